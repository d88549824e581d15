"""A decoding method for ``generate``: tokens are drawn without a softmax or ``multinomial`` over the vocabulary."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from fastlogits_kernels import select

from fastlogits.acceleration import RunList
from fastlogits.sampling import FusedDraw, Sampler

__all__ = ["decode"]

# Where the sequences of one request part: they share its seed.
_PART = 2**32


def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    seeds: int | torch.Tensor | None = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy decoding and sampling for ``model.generate(custom_generate=fl.decode)``, reproducible for each request.

    All else is the model's own loop: caches, compiled forward passes, stopping criteria, streamers, what is returned.
    A token is drawn from the distribution that sampling has in transformers. It depends on the row's own logits, the
    seed of its request and the number of tokens generated before it: not on the rest of the batch.

    Args:
        model: this and the following are what ``generate`` gives a decoding method.
        input_ids: tokens so far ``(B, L)``.
        logits_processor: the processors, run as one plan whether or not the model is accelerated.
        stopping_criteria: when to stop.
        generation_config: the configuration; ``num_beams`` has to be 1.
        synced_gpus: whether to go on until all processes have finished.
        streamer: what receives the tokens.
        seeds: given to ``generate``: an integer, or an integer tensor with one for each prompt. None draws one from
            torch's generator, so that ``torch.manual_seed`` decides. Rows of an integer seed differ from each other, as
            do several sequences of one prompt.
        **model_kwargs: the rest.

    Raises:
        ValueError: several beams, or seeds of another shape or dtype.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> asked = {"do_sample": True, "max_new_tokens": 3, "custom_generate": decode, "seeds": torch.tensor([7])}
        >>> first, second = (model.generate(torch.tensor([[5, 7]]), **asked) for _ in range(2))
        >>> torch.equal(first, second)
        True
    """
    if generation_config.num_beams and generation_config.num_beams > 1:
        raise ValueError(
            f"num_beams={generation_config.num_beams}: fastlogits.decode decodes greedily or samples, with one beam; "
            "leave custom_generate out for beams"
        )
    streamer = streamer or _streamer_of(sys._getframe(1))
    run = logits_processor
    if not isinstance(run, RunList):
        run = RunList(logits_processor, input_ids.shape[1])
    keeps_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
    if generation_config.do_sample:
        run = _Drawing(run, *_seeded(seeds, input_ids), input_ids.shape[1], keeps_scores)
        generation_config = copy.copy(generation_config)
        generation_config.do_sample = False
    elif not keeps_scores:
        run = _Choosing(run, input_ids)
    output = type(model)._sample(
        model,
        input_ids,
        logits_processor=run,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        synced_gpus=synced_gpus,
        streamer=streamer,
        **model_kwargs,
    )
    if getattr(output, "scores", None) is not None:
        output.scores = tuple(scores.as_subclass(torch.Tensor) for scores in output.scores)
    return output


def _streamer_of(frame: FrameType) -> Any:
    """The streamer that ``generate`` was given: it does not hand it on to a decoding method."""
    is_generate = frame.f_code.co_name == "generate" and "custom_generate" in frame.f_locals
    return frame.f_locals.get("streamer") if is_generate else None


def _seeded(seeds: int | torch.Tensor | None, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The seed of each row, and where its positions start, int64 ``[B]``."""
    B, device = input_ids.shape[0], input_ids.device
    row = torch.arange(B, device=device)
    if seeds is None:
        seeds = int(torch.randint(2**62, ()))
    if isinstance(seeds, int) and not isinstance(seeds, bool) and -(2**63) <= seeds < 2**63:
        return torch.full((B,), seeds, device=device), row * _PART
    if not isinstance(seeds, torch.Tensor):
        raise ValueError(
            f"seeds must be an integer of 64 bits, or an integer tensor with one for each prompt: {seeds!r}"
        )
    count = seeds.shape[0] if seeds.ndim == 1 else 0
    if not count or B % count or seeds.is_floating_point() or seeds.dtype == torch.bool:
        raise ValueError(
            f"seeds must be an integer tensor with one for each prompt, got {seeds.dtype} of {tuple(seeds.shape)} for "
            f"{B} rows"
        )
    return seeds.to(device, torch.int64).repeat_interleave(B // count), row % (B // count) * _PART


class _Drawing(RunList):
    """The processors of a run; their scores know which token they have drawn.

    Args:
        run: the processors.
        seeds: the seed of each row, int64 ``[B]``.
        starts: where its positions start, int64 ``[B]``.
        prompt_length: number of tokens of the prompt.
        keeps_scores: whether somebody asks for the processed scores. Where nobody does, they are written nowhere: the
            kernels that draw process what they read.
    """

    def __init__(
        self, run: RunList, seeds: torch.Tensor, starts: torch.Tensor, prompt_length: int, keeps_scores: bool
    ) -> None:
        super().__init__((), prompt_length)
        self._process, self._seeds, self._starts, self._start = run, seeds, starts, prompt_length
        self._fused = None if keeps_scores else FusedDraw(run)
        self._sampler = Sampler()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Process the scores of one step, and draw from them."""
        positions = self._starts + (input_ids.shape[1] - self._start)
        if self._fused is not None and not kwargs and select.takes_scores(scores):
            tokens, _ = self._fused(scores, self._seeds, positions, input_ids, self._process.run)
            return _drawn(scores, tokens)
        scores = self._process(input_ids, scores, **kwargs)
        return _drawn(scores, self._sampler(scores, self._seeds, positions).tokens)


class _Choosing(RunList):
    """The processors of a greedy run whose processed scores nobody asks for: the same, for the likeliest token."""

    def __init__(self, run: RunList, input_ids: torch.Tensor) -> None:
        super().__init__((), input_ids.shape[1])
        self._process, self._fused = run, FusedDraw(run, temperature=0.0)
        self._anything = torch.zeros(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Process the scores of one step, and find the largest."""
        if kwargs or not select.takes_scores(scores):
            return self._process(input_ids, scores, **kwargs)
        tokens, _ = self._fused(scores, self._anything, self._anything, input_ids, self._process.run)
        return _drawn(scores, tokens)


def _drawn(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    drawn: Any = scores.as_subclass(_Drawn)
    drawn.tokens = tokens
    return drawn  # type: ignore[no-any-return]


class _Drawn(torch.Tensor):
    """Scores whose largest, to the loop that asks for it, is the token that was drawn."""

    tokens: torch.Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.argmax, torch.Tensor.argmax):
            return args[0].tokens
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
