"""Log-probabilities of sampled tokens under the distribution that they were sampled from, with gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import torch
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.training.logprobs import logprobs as kernel_logprobs
from fastlogits_kernels.training.reference import Task

from fastlogits.checks import is_integer
from fastlogits.kept_tokens import KeptTokens
from fastlogits.plan.causes import kind
from fastlogits.sampling import SamplingOptions, SamplingParams

if TYPE_CHECKING:
    from typing import Literal

    from typing_extensions import Unpack

    from fastlogits.plan.position import Index

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Rows = TypeVar("_Rows", torch.Tensor, Rule)


class LogProbs(NamedTuple):
    """Log-probabilities, and what was asked beside them."""

    logprobs: torch.Tensor
    """Of the targets, float32, of their shape."""
    entropy: torch.Tensor | None
    """Of the distribution that each was sampled from, float32, of the same shape."""
    outside: torch.Tensor | None
    """Which targets the truncations or the kept sets would have dropped, bool, of the same shape."""


@dataclass(frozen=True)
class _Given:
    """The arguments of a call, checked."""

    logits: torch.Tensor
    task: Task
    """What is asked of the rows, one after the other."""
    shape: torch.Size
    entropy: bool
    in_place: bool


@overload
def logprobs(
    logits: torch.Tensor, targets: torch.Tensor, *, entropy: Literal[False] = False,
    outside: Literal[False] = False, params: SamplingParams | None = None,
    processors: Iterable[Any] | None = None, input_ids: torch.Tensor | None = None,
    prompt_length: Index | None = None, kept: KeptTokens | torch.Tensor | None = None, strict: bool = False,
    ignore_index: int = -100, inplace_backward: bool = False, group: Any = None, **options: Unpack[SamplingOptions],
) -> torch.Tensor: ...  # fmt: skip
@overload
def logprobs(
    logits: torch.Tensor, targets: torch.Tensor, *, entropy: bool = False, outside: bool = False,
    params: SamplingParams | None = None, processors: Iterable[Any] | None = None,
    input_ids: torch.Tensor | None = None, prompt_length: Index | None = None,
    kept: KeptTokens | torch.Tensor | None = None, strict: bool = False,
    ignore_index: int = -100, inplace_backward: bool = False, group: Any = None, **options: Unpack[SamplingOptions],
) -> torch.Tensor | LogProbs: ...  # fmt: skip
def logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    entropy: bool = False,
    outside: bool = False,
    params: SamplingParams | None = None,
    processors: Iterable[Any] | None = None,
    input_ids: torch.Tensor | None = None,
    prompt_length: Index | None = None,
    kept: KeptTokens | torch.Tensor | None = None,
    strict: bool = False,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    group: Any = None,
    **options: Unpack[SamplingOptions],
) -> torch.Tensor | LogProbs:
    """Log-probabilities of ``targets`` under the distribution that was sampled, differentiable in the logits.

    A token that was sampled with a temperature, top-k or top-p has the log-probability
    ``x[t] / T - log(sum of exp(x / T) over the kept tokens)``, not that of a softmax over the whole vocabulary. The
    kept tokens are found again by the same rules, or are those that sampling has returned (``kept``). They are
    constant: the gradient is (1 at the target - softmax over them) / T, and 0 elsewhere. A target always counts as
    kept; ``outside`` says which ones wouldn't have been. Without rules and sets it is a fused log-softmax and gather.

    For the same logits, the result is that of ``Sampler(logprobs="processed")``, bit for bit on one kind of device,
    whatever the batch. With ``kept`` it is where a rule dropped something, or nothing did. Beside the results, only a
    few numbers of each row are kept for the backward pass, and the logits themselves.

    A row of temperature 0 is greedy, as in sampling: it is that of all its tokens, or of those that ``kept`` gives,
    undivided. A row with NaN, +inf or
    nothing but -inf has NaN, and so has its gradient. Gradients of a row whose incoming gradient is 0 are 0.

    Args:
        logits: float32, bfloat16 or float16, ``[N, V]`` or ``[B, T, V]``, of any strides; float64 on the CPU, then
            results are float64. Never written, but see ``inplace_backward``.
        targets: integers ``[N]`` or ``[B, T]``.
        entropy: whether the entropy of each row's distribution is returned too; differentiable as well.
        outside: whether it is returned which targets would have been dropped.
        params: temperature and truncations, as for ``Sampler``. Tensors of them have a value for each target.
        processors: a ``LogitsProcessorList``, or any list of processors, applied first as in sampling, each position
            with its own history. Their truncations count if they stand last, and no others are given. Rows are
            processed position by position, in float32; in the backward pass once more, in torch. With a ``group`` they
            must map each logit by itself, and each position has exchanges of its own.
        input_ids: for processors, the tokens that the model has seen: int32 or int64 ``[B, L]`` where logits are
            ``[B, T, V]``; those of position t have seen the first ``L - T + t + 1``, so that L is T where the logits
            are those of the whole text. ``[N, L]`` for ``[N, V]``: all of them.
        prompt_length: for processors that ask for the step, see ``LogitsProcessorList``: an integer, or one for each of
            the B or N texts. Positions inside the prompt count as its last.
        kept: what sampling has returned, in place of the truncations: ``KeptTokens``, or packed bits, int32
            ``[..., W]``. A row for whose ids there was no room has NaN.
        strict: whether a target that wouldn't have been kept is refused, and a set for which there was no room; this
            waits for the GPU.
        ignore_index: targets of this value are left out: their results and gradients are 0, and their logits not read.
        inplace_backward: whether the gradient takes the place of the logits in memory. Nobody may read them after the
            backward pass, nor run it twice. Under ``torch.compile`` it has no effect.
        group: a process group of ``torch.distributed`` over whose ranks the vocabulary is split, in the order of the
            ranks; the logits are this rank's part ``[..., V / n]``, and targets count over all. A ``DTensor`` that is
            split over its last dimension needs none. Or a ``Group``, one for each vocabulary. All ranks make the same
            calls, and get the same results. Where all tokens or those of ``kept`` count, some 100 bytes a row are
            exchanged; on GPUs some 1100 where ``top_k`` is a number, say 50, and stands before what adds up
            probabilities. Where other truncations are applied, or logits are float64, the logits of other ranks' rows
            are. The backward pass exchanges nothing.
        options: fields of ``SamplingParams``, which replace those of ``params``.

    Returns:
        A float32 tensor of the targets' shape; ``LogProbs`` if ``entropy`` or ``outside`` is asked for.

    Raises:
        ValueError: an argument of another shape, dtype or device than is said, or out of range. On the CPU a target
            that is no token; on a GPU, where that can't be seen without waiting, it has NaN.

    Example:
        >>> logits = torch.tensor([[0.1, 0.2, 0.7]]).log().requires_grad_()
        >>> found = logprobs(logits, torch.tensor([1]), top_k=2)
        >>> found.exp()
        tensor([0.2222], grad_fn=<ExpBackward0>)
        >>> found.sum().backward()
        >>> logits.grad
        tensor([[ 0.0000,  0.7778, -0.7778]])
    """
    from fastlogits.training import shards

    asked = SamplingParams(**options) if params is None else _replaced(params, options)
    logits, group = shards.local_logits(logits, group)
    given = _checked(logits, targets, asked, kept, ignore_index, entropy, inplace_backward, group)
    if processors is not None:
        from fastlogits.training.history import processed_logprobs

        found = processed_logprobs(given.logits, given.task, entropy, processors, input_ids, prompt_length, group)
    elif group is not None:
        found = shards.sharded_logprobs(given.logits, given.task, entropy, inplace_backward, group)
    else:
        found = kernel_logprobs(given.logits, given.task, entropy, inplace_backward)
    if strict:
        _check_inside(found[2], kept)
    result: torch.Tensor
    result, entropies, unlikely = found[0].view(given.shape), found[1], found[2].view(given.shape)
    if not (entropy or outside):
        return result
    entropies = None if entropies is None else entropies.view(given.shape)
    return LogProbs(result, entropies, unlikely if outside else None)


def _replaced(params: SamplingParams, options: SamplingOptions) -> SamplingParams:
    from dataclasses import replace

    if not isinstance(params, SamplingParams):
        raise ValueError(f"params must be SamplingParams or None, got {params!r}")
    return replace(params, **options) if options else params


def _checked(
    logits: torch.Tensor,
    targets: torch.Tensor,
    params: SamplingParams,
    kept: KeptTokens | torch.Tensor | None,
    ignore_index: int,
    entropy: bool,
    in_place: bool,
    group: Any,
) -> _Given:
    """The arguments as the kernels take them.

    Raises:
        ValueError: they can't be taken.
    """
    if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3) or logits.dtype not in _DTYPES:
        raise ValueError(
            "logits must be float32, bfloat16 or float16 of shape (N, V) or (B, T, V), got "
            f"{kind(logits)}"
        )  # fmt: skip
    if not logits.shape[-1]:
        raise ValueError(f"logits must have at least one token, got shape {tuple(logits.shape)}")
    if logits.dtype == torch.float64 and logits.device.type != "cpu":
        raise ValueError(f"logits must be float32, bfloat16 or float16 on {logits.device}, got float64")
    _check_targets(logits, targets, ignore_index, group)
    rows = targets.numel()
    if kept is not None and params.rules:
        names = ", ".join(rule.describe() for rule in params.rules)
        raise ValueError(f"kept must be None where truncations are given, got kept tokens beside {names}")
    if in_place and any(logits.stride(dim) == 0 and logits.shape[dim] > 1 for dim in range(logits.ndim)):
        raise ValueError("logits must have memory of their own for inplace_backward, got an expanded tensor")
    temperature = params.temperature
    if isinstance(temperature, torch.Tensor):
        temperature = _by_row("temperature", temperature, logits, targets)
    elif temperature is not None and temperature != 1:
        largest = torch.finfo(torch.float32).max
        temperature = torch.full((), min(temperature, largest), dtype=torch.float32, device=logits.device)
    else:
        temperature = None
    rules = tuple([
        rule._replace(value=_by_row(rule.spec.argument or rule.kind, rule.value, logits, targets))
        if isinstance(rule.value, torch.Tensor)
        else rule
        for rule in params.rules
    ])  # fmt: skip
    sets = None
    if kept is not None:
        V = logits.shape[-1]
        # The size of a vocabulary that is split isn't known here yet: it is compared later.
        vocab = kept.vocab_size if group is not None and isinstance(kept, KeptTokens) else None
        kept = _checked_kept(kept, None if group is not None else V, logits.device)
        sets = kept.flat(rows)._replace(vocab=vocab)
    task = Task(targets.reshape(rows), temperature, rules, sets, int(ignore_index))
    return _Given(logits, task, targets.shape, entropy, in_place)


def _check_targets(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, group: Any) -> None:
    if not isinstance(targets, torch.Tensor) or targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"targets must be a tensor of int64 or int32, got {kind(targets)}")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must be of shape {tuple(logits.shape[:-1])}, that of logits without the vocabulary, got "
            f"{tuple(targets.shape)}"
        )
    if targets.device != logits.device:
        raise ValueError(f"targets must be on {logits.device}, as logits are, got them on {targets.device}")
    if not is_integer(ignore_index):
        raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}")
    if targets.device.type == "cpu" and group is None and not torch.compiler.is_compiling():
        V = logits.shape[-1]
        wrong = ((targets < 0) | (targets >= V)) & (targets != ignore_index)
        if bool(wrong.any()):
            raise ValueError(
                f"targets must be tokens from 0 to {V - 1}, or the ignore_index {ignore_index}, got "
                f"{int(targets[wrong][0])}"
            )


def _by_row(argument: str, value: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A value for each row, one after the other."""
    if value.numel() != targets.numel():
        raise ValueError(
            f"{argument} must be a number or have a value for each of {targets.numel()} targets, got {value.numel()}"
        )
    if value.device != logits.device:
        raise ValueError(f"{argument} must be on {logits.device}, as logits are, got it on {value.device}")
    return value.reshape(-1)


def _checked_kept(kept: KeptTokens | torch.Tensor, V: int | None, device: torch.device) -> KeptTokens:
    if isinstance(kept, torch.Tensor):
        kept = KeptTokens(kept.shape[-1] * 32 if V is None else V, bits=kept)
    if not isinstance(kept, KeptTokens):
        raise ValueError(f"kept must be KeptTokens or packed bits of int32, got {kind(kept)}")
    if V is not None and kept.vocab_size != V:
        raise ValueError(f"kept must be of the {V} tokens of the logits, got kept tokens of {kept.vocab_size}")
    if kept.device != device:
        raise ValueError(f"kept must be on {device}, as logits are, got it on {kept.device}: kept.to({str(device)!r})")
    return kept


def _check_inside(unlikely: torch.Tensor, kept: KeptTokens | torch.Tensor | None) -> None:
    """Raise where a target wouldn't have been kept."""
    if isinstance(kept, KeptTokens):
        kept.check()
    number = int(unlikely.sum())
    if number:
        row = int(unlikely.int().argmax())
        raise ValueError(
            f"targets must be among the kept tokens with strict=True, got {number} of {unlikely.numel()} outside, the "
            f"first in row {row}: sampling and training differ in parameters or logits"
        )
