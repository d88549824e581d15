"""SGLang's sampling backend ``fastlogits``: the edits of the logits in one launch, and the draw in one pass.

SGLang puts penalties and biases together as whole rows of numbers, and grammars as bits. They are applied in one
launch, in SGLang's order. Then temperature, top-p, top-k, min-p and the draw are one step. Drafts are accepted as long
as they equal what a request draws, so they never change a token.

What this depends on inside of SGLang stands at the end: ``install`` looks for it, and leaves to SGLang what isn't
there.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from fastlogits_kernels.pointwise.dense import DenseEdits, edit_densely_
from fastlogits_kernels.runtime.bits import WORD_BITS
from fastlogits_kernels.selection.logprobs import MOST, Report, launch_report, reference_report, takes

if TYPE_CHECKING:
    from fastlogits.sampling import Sampler

logger = logging.getLogger(__name__)

SEEN = ("0.5.23",)
"""The versions of SGLang in which all of this has been seen to hold."""

_SAMPLER = "sglang.srt.layers.sampler"


@lru_cache
def sampler_class() -> type:
    """SGLang's ``Sampler``, sampling with fastlogits. It is made on demand, since SGLang is slow to import."""
    return type("FastLogitsSampler", (SamplesFromLogits, import_module(_SAMPLER).Sampler), {})


class SamplesFromLogits:
    """Samples from the logits in one pass, where SGLang divides, takes a softmax, and truncates probabilities.

    The distribution is SGLang's: top-p and top-k on all of it, then min-p. If the requests have no seeds, torch's
    generator gives one to each row and step. What needs the probabilities themselves stays with SGLang: masks of kept
    tokens, watermarks and on-policy targets.
    """

    # What SGLang's class has, in whose place this one stands.
    rl_on_policy_target: Any
    enable_deterministic: bool
    output_logprob_processor: Any
    _preprocess_logits: Any
    _sync_token_ids_across_tp: Any

    def __init__(self) -> None:
        super().__init__()
        self._tensors: tuple[Any, ...] | None = None
        self._sampler: Sampler | None = None
        self._greedy = _sampler(temperature=0.0)

    def forward(
        self,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: torch.Tensor,
        **more: Any,
    ) -> torch.Tensor:
        """Sample the token of each row, int32 ``[B]``, with SGLang's arguments; log-probabilities go to the output."""
        if (
            sampling_info.sampling_mask_batch_indices is not None
            or self.rl_on_policy_target is not None
            or not logits_output.next_token_logits.numel()
            or any(value is not None for value in more.values())
        ):
            theirs: Any = super()
            tokens: torch.Tensor = theirs.forward(
                logits_output, sampling_info, return_logprob, top_logprobs_nums, token_ids_logprobs, positions, **more
            )
            return tokens
        logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
        if sampling_info.is_all_greedy:
            drawn = self._greedy(logits, 0, 0).tokens
        else:
            drawn = self._sampler_for(sampling_info)(logits, _seeds(sampling_info, len(logits)), positions).tokens
        tokens = drawn.to(torch.int32)
        if return_logprob:
            scale = None if sampling_info.is_all_greedy else sampling_info.temperatures
            if import_module(_SAMPLER).SGLANG_RETURN_ORIGINAL_LOGPROB:
                scale = None
            self._report(logits, scale, drawn, top_logprobs_nums, token_ids_logprobs).write_output_to(logits_output)
        self._sync_token_ids_across_tp(tokens, sampling_info)
        return tokens

    def _report(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor | None,
        tokens: torch.Tensor,
        tops: list[int],
        named: list[list[int]],
    ) -> Any:
        """SGLang's ``LogprobResult``: of the logits over their temperatures, truncations left out."""
        most = max(tops, default=0)
        # Deterministic inference wants the very function with which prompts are scored.
        if self.enable_deterministic or most > MOST or any(ids is not None for ids in named):
            scaled = logits if temperatures is None else logits / temperatures
            return self.output_logprob_processor.compute_logprobs(scaled.log_softmax(-1), tops, named, tokens)
        found = _reported(logits, temperatures, tokens, most)
        least = torch.finfo(torch.float32).min
        result = import_module("sglang.srt.layers.logprob_processor").LogprobResult()
        result.token_logprobs = found.logprobs.clamp(min=least)
        if most:
            values = found.top_logprobs.clamp(min=least)
            result.top_logprobs_val = [values[row, :count] for row, count in enumerate(tops)]
            result.top_logprobs_idx = [found.top_tokens[row, :count] for row, count in enumerate(tops)]
        return result

    def _sampler_for(self, info: Any) -> Sampler:
        """The sampler of a batch, kept as long as the batch has the same tensors."""
        tensors = (info.temperatures, info.top_ps, info.top_ks, info.min_ps)
        kept = self._tensors
        if self._sampler is None or kept is None or any(a is not b for a, b in zip(tensors, kept, strict=True)):
            self._sampler, self._tensors = _sampler_of(info), tensors
        return self._sampler

    def _sample_from_probs(
        self, probs: torch.Tensor, sampling_info: Any, positions: torch.Tensor, simple_sampling_case: bool
    ) -> tuple[torch.Tensor, Any]:
        """What SGLang's own path samples, for the masks of kept tokens that it can report."""
        if simple_sampling_case:
            theirs: Any = super()
            sampled: tuple[torch.Tensor, Any] = theirs._sample_from_probs(
                probs, sampling_info, positions, simple_sampling_case
            )
            return sampled
        sglang = import_module(_SAMPLER)
        tokens, weights, ids, chosen = sglang.top_k_top_p_min_p_sampling_from_probs_torch(
            probs, sampling_info.top_ks, sampling_info.top_ps, sampling_info.min_ps,
            sampling_info.need_min_p_sampling, sampling_info.sampling_seed, positions, return_filtered_probs=True,
        )  # fmt: skip
        rows = sampling_info.sampling_mask_batch_indices
        if rows is None:
            return tokens, None
        return tokens, sglang._SamplingMaskCapture(
            weights=weights[rows], token_ids=ids[rows], selected_weight=chosen[rows], batch_rows=rows
        )


def _sampler(**options: Any) -> Sampler:
    from fastlogits.sampling import Sampler

    return Sampler(**options, order="sglang", ties="lowest")


def _sampler_of(info: Any, repeat: int = 1) -> Sampler:
    """The sampler of SGLang's ``SamplingBatchInfo``, for ``repeat`` rows of each request."""

    def rows(tensor: torch.Tensor, needed: bool = True) -> torch.Tensor | None:
        if not needed:
            return None
        return tensor.flatten() if repeat == 1 else tensor.flatten().repeat_interleave(repeat)

    return _sampler(
        temperature=rows(info.temperatures),
        top_p=rows(info.top_ps, info.need_top_p_sampling),
        top_k=rows(info.top_ks, info.need_top_k_sampling),
        min_p=rows(info.min_ps, info.need_min_p_sampling),
    )


def _seeds(info: Any, rows: int, repeat: int = 1) -> torch.Tensor:
    """The seeds of the requests, or random ones for all rows."""
    given: torch.Tensor | None = info.sampling_seed
    if given is None:
        return torch.empty(rows, dtype=torch.int64, device=info.temperatures.device).random_()
    return given if repeat == 1 else given.repeat_interleave(repeat)


def _reported(logits: torch.Tensor, temperatures: torch.Tensor | None, tokens: torch.Tensor, count: int) -> Report:
    if takes(logits, count):
        return launch_report(
            logits, tokens, count, temperature=None if temperatures is None else temperatures.flatten()
        )
    return reference_report(logits if temperatures is None else logits / temperatures, tokens, count)


# -- Edits of the logits, and drafts ----------------------------------------------------------------------------------


def apply_logits_bias(original: Callable[..., None], info: Any, logits: torch.Tensor) -> None:
    """Apply penalties, the grammar's mask and biases in one launch: around ``SamplingBatchInfo.apply_logits_bias``."""
    added, scales = info.acc_additive_penalties, info.acc_scaling_penalties
    penalties = info.penalizer_orchestrator
    if penalties is not None and penalties.is_required:
        if added is not None or scales is not None:
            original(info, logits)
            return
        added = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device)
        penalties.accumulate_additive_penalties(added)
        scales = penalties.accumulate_scaling_penalties()
    _edit_(logits, added, scales, info.grammar_mask, info.logit_bias)


def _edit_(
    logits: torch.Tensor, added: Any, scales: Any, grammar_mask: Any, biases: Any, repeat: int = 1
) -> torch.Tensor:
    """Apply what SGLang has put together; a grammar's mask that isn't packed bits by the grammar's own function."""
    bitmask = None if grammar_mask is None else _packed(grammar_mask, logits)
    if grammar_mask is None or bitmask is not None:
        return edit_densely_(logits, DenseEdits(added, scales, bitmask, biases), repeat)
    edit_densely_(logits, DenseEdits(added, scales), repeat)
    grammar_mask.apply(logits)
    return edit_densely_(logits, DenseEdits(biases=biases), repeat)


def _packed(grammar_mask: Any, logits: torch.Tensor) -> torch.Tensor | None:
    """The mask as packed bits for all tokens; None where it is something else."""
    mask = grammar_mask.vocab_mask
    is_packed = isinstance(mask, torch.Tensor) and mask.dtype == torch.int32 and mask.ndim == 2
    if not is_packed or mask.device != logits.device or len(mask) != len(logits):
        return None
    return mask if mask.shape[1] * WORD_BITS >= logits.shape[1] and mask.stride(1) == 1 else None


def eagle_sample(
    original: Callable[..., Any],
    verify_input: Any,
    batch: Any,
    logits_output: Any,
    grammar_mask: Any = None,
    uno_target_max_top_k: int | None = None,
    *,
    watermark_state: Any = None,
    watermark_full_mask: bool = True,
) -> Any:
    """Accept the drafts that equal what each request draws: around SGLang's function of that name.

    Each node of a draft tree is drawn from with the noise of its request and position, and the tree is followed along
    the drawn tokens. So a request's tokens are those that it gets without drafts, if it has a seed.

    Returns:
        As SGLang's function: the drawn token of each node, how many tokens each request takes, and their nodes.
    """
    info, utils = batch.sampling_info, import_module(_EAGLE)
    if (
        batch.forward_mode.is_idle()
        or info.is_all_greedy
        or uno_target_max_top_k is not None
        or (watermark_state is not None and info.has_watermark_candidates)
        or import_module("sglang.srt.speculative.spec_utils").SIMULATE_ACC_LEN > 0
    ):
        return original(
            verify_input, batch, logits_output, grammar_mask, uno_target_max_top_k,
            watermark_state=watermark_state, watermark_full_mask=watermark_full_mask,
        )  # fmt: skip
    logits, each, B = logits_output.next_token_logits, verify_input.draft_token_num, len(batch.seq_lens)
    import_module("sglang.srt.utils.async_probe").sanitize_nan_logits(logits, "verify: target model logits")
    _edit_(logits, info.acc_additive_penalties, info.acc_scaling_penalties, grammar_mask, info.logit_bias, each)
    drawn = _sampler_of(info, each)(logits, _seeds(info, len(logits), each), verify_input.positions).tokens
    made = {"dtype": torch.int32, "device": logits.device}
    predict, nodes, kept = utils.verify_tree_greedy_func(
        predicts=torch.zeros(len(logits), **made),
        accept_index=torch.full((B, verify_input.max_tree_depth), -1, **made),
        accept_token_num=torch.empty(B, **made),
        candidates=verify_input.draft_token.reshape(B, each),
        retrieve_index=verify_input.retrieve_index,
        retrieve_next_token=verify_input.retrieve_next_token,
        retrieve_next_sibling=verify_input.retrieve_next_sibling,
        target_predict=drawn.reshape(B, each),
        topk=verify_input.tree_topk,
    )
    group = _tensor_parallel_group()
    if group.world_size > 1:  # without seeds, each rank draws its own
        for tensor in (predict, nodes, kept):
            group.broadcast(tensor, src=0)
    return predict, kept + 1, nodes


def _tensor_parallel_group() -> Any:
    parallel = import_module("sglang.srt.runtime_context").get_parallel()
    attention = import_module("sglang.srt.layers.dp_attention").is_dp_attention_enabled()
    return parallel.attn_tp_group if attention else parallel.tp_group


# -- What it depends on -----------------------------------------------------------------------------------------------

_INFO, _EAGLE = "sglang.srt.sampling.sampling_batch_info", "sglang.srt.speculative.eagle_utils"
_HOOKS: tuple[tuple[str, str, Callable[..., Any], tuple[str, ...]], ...] = (
    (_INFO, "SamplingBatchInfo.apply_logits_bias", apply_logits_bias, ("self", "logits")),
    (_EAGLE, "eagle_sample", eagle_sample, (
        "verify_input", "batch", "logits_output", "grammar_mask", "uno_target_max_top_k", "watermark_state",
        "watermark_full_mask",
    )),
)  # fmt: skip
"""Module, name, what comes around it, and the arguments that it must have."""


def install() -> None:
    """Come around what SGLang does to the logits, in a process whose backend this is; once.

    Where a function is missing or has other arguments, SGLang's own runs, and a warning says so.
    """
    registry = import_module("sglang.srt.plugins.hook_registry")
    for module, name, hook, arguments in _HOOKS:
        target = f"{module}.{name}"
        if target in registry.HookRegistry._hooks:
            continue
        try:
            function: Any = import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            found = tuple(inspect.signature(function).parameters)
        except Exception as error:
            logger.warning("SGLang's own %s runs: %s", name, error)
            continue
        if found != arguments:
            logger.warning("SGLang's own %s runs: it takes %s, not %s", name, ", ".join(found), ", ".join(arguments))
            continue
        registry.HookRegistry.register(target, hook, registry.HookType.AROUND)
    registry.HookRegistry.apply_hooks()


def make_sampler() -> Any:
    """SGLang's factory of this backend."""
    install()
    return sampler_class()()
