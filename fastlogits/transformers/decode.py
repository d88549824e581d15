"""A decoding method for ``generate``, whose step is one CUDA graph, and which draws without softmax or multinomial."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol, cast

import torch
from fastlogits_kernels.selection import launch
from transformers import StaticCache

from fastlogits.checks import is_integer
from fastlogits.plan import chance
from fastlogits.plan.plan import Plan
from fastlogits.sampling import FusedDraw, Sampler
from fastlogits.transformers import drafters, drafts, loop
from fastlogits.transformers.accelerate import RunList
from fastlogits.transformers.caches import NAME, rows_of
from fastlogits.transformers.graphs import GRAPHS
from fastlogits.transformers.hooks import arguments_of_generate, is_synced, keeps_tokenizer, with_tokens

__all__ = ["decode"]

# Where the sequences of one request part: they share its seed.
_PART = 2**32


_P = ParamSpec("_P")


class _Decode(Protocol[_P]):
    """A decoding method that keeps something between calls."""

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        """Decode, see ``decode``."""

    def clear(self) -> None:
        """Drop all CUDA graphs that are kept, with their caches; the next call captures anew."""


def _with_clear(method: Callable[_P, Any]) -> _Decode[_P]:
    method.clear = GRAPHS.drop  # type: ignore[attr-defined]
    return cast("_Decode[_P]", method)


@_with_clear
@keeps_tokenizer
def decode(
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    compile: bool = False,
    seeds: int | torch.Tensor | None = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy decoding and sampling for ``model.generate(custom_generate=fl.decode)``, a CUDA graph for each step.

    On a GPU the step is captured: the forward pass on a static cache, the processors, the draw, and the token that is
    appended. Each later step, and each later call of the same kind, replays it. A call is of the same kind if it has
    the model, the number of rows, the same kind of processors, and a length that rounds up to the same. Seeds, prompts,
    masks, and mostly temperatures and the like are its own. The host runs two steps ahead of what it knows of the rows
    that have finished, so a streamer gets its tokens, all of them and in order, that much later. A cache that
    ``generate`` hands in or returns gets the same states as ever. Up to four graphs are kept, each with its cache;
    ``decode.clear()`` drops them.

    What can't be captured takes transformers' own loop, with the same tokens for the same logits: models on a CPU or on
    several devices, those with a state, a ``prepare_inputs_for_generation`` of their own or hooks in their modules,
    attention other than ``"sdpa"``, other caches than dynamic and static ones, processors that
    fastlogits doesn't know or that read the text on the host, ``output_attentions``, ``output_hidden_states`` and
    ``synced_gpus``. The logger ``fastlogits`` says why, at level INFO. So does a step of which a capture fails.

    Drafts act, for one row at a time, and change no token: with ``prompt_lookup_num_tokens`` or an ``assistant_model``
    of the same vocabulary, each position draws what it would have drawn without them, by its own noise, and the draft
    model draws with the same noise. Both steps are captured. With ``return_dict_in_generate``, the output's
    ``accepted_drafts`` says how many drafts each forward pass after the prompt's has confirmed; the logger has the sum.

    A token is drawn from the distribution that sampling has in transformers. It depends on the row's own logits, the
    seed of its request and the number of tokens generated before it: not on the rest of the batch, if ``seeds`` is a
    tensor with one for each prompt.

    ``custom_generate`` may be a function of your own that calls this one. Decorate it with ``functools.wraps(decode)``:
    by the signature ``generate`` sees what to hand on, such as ``seeds``, and the tokenizer for ``stop_strings``.

    Args:
        model: this and the following are what ``generate`` gives a decoding method.
        input_ids: tokens so far ``(B, L)``.
        logits_processor: the processors, run as one plan whether or not the model is accelerated.
        stopping_criteria: when to stop.
        generation_config: the configuration, of greedy decoding or sampling.
        synced_gpus: whether to go on until all processes have finished. This and the streamer are taken from the
            ``generate`` that calls, which hands neither on.
        streamer: what receives the tokens.
        compile: given to ``generate``: whether the forward pass that is captured is one of ``torch.compile``. The
            first calls then wait for the compiler. Of no effect in transformers' own loop, which compiles by itself
            for a static cache.
        seeds: given to ``generate``: an integer of 64 bits, or an integer tensor with one for each prompt, whatever
            ``num_return_sequences`` is. None draws one from torch's generator, so that ``torch.manual_seed`` decides.
            Rows of an integer seed differ from each other, as do several sequences of one prompt: what a prompt draws
            depends on its row then. With a tensor it depends on the seed of the prompt, not on the row.
        tokenizer: given to ``generate``, for ``stop_strings`` and token healing.
        **model_kwargs: the rest.

    Raises:
        ValueError: a configuration of another decoding method (beams, contrastive search, ...), seeds of another shape
            or dtype, a cache of other rows, or drafts for several rows or of another vocabulary.

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
    called = arguments_of_generate(sys._getframe(1), model)
    assistant = called.get("assistant_model")
    _check_method(generation_config, assistant)
    _check_cache(model_kwargs.get(NAME), len(input_ids))
    if streamer is None:
        streamer = called.get("streamer")
    synced_gpus = synced_gpus or is_synced(model, called.get("synced_gpus"))
    run = logits_processor
    if not isinstance(run, RunList):
        run = RunList(logits_processor, input_ids.shape[1])
    if generation_config.do_sample:
        rows = _seeded(seeds, input_ids, generation_config.num_return_sequences or 1)
    else:
        rows = (torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device),) * 2
    request = loop.Request(
        model, input_ids, run, stopping_criteria, generation_config, streamer, bool(generation_config.do_sample), *rows,
        compile, model_kwargs,
    )  # fmt: skip
    try:
        if run.is_watched:
            raise loop.Unfit("fastlogits.watch notes what each processor does")
        if synced_gpus:
            raise loop.Unfit("synced_gpus: processes wait for each other at each step")
        if assistant is None and not generation_config.prompt_lookup_num_tokens:
            return loop.decode(request)
        _check_drafts(request, assistant)
        reason = drafts.unfit(request)
        if reason is not None:
            raise loop.Unfit(reason)
        return drafts.decode(request, functools.partial(_drafter, request, assistant))
    except loop.Unfit as reason:
        loop.logger.info("decode takes transformers' own loop, without a CUDA graph: %s", str(reason))
    keeps_scores = bool(generation_config.return_dict_in_generate and generation_config.output_scores)
    keeps_scores = keeps_scores or run.is_watched
    if generation_config.do_sample:
        run = _Drawing(run, *rows, input_ids.shape[1], keeps_scores)
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


# -- Arguments ----------------------------------------------------------------------------------------------------

# What makes a configuration one of another decoding method, and what it must be.
_OTHER_METHODS = {
    "num_beams": "1",
    "penalty_alpha": "None",
    "dola_layers": "None",
    "assistant_early_exit": "None",
    "use_mtp": "False",
    "constraints": "None",
    "force_words_ids": "None",
}


def _check_method(generation_config: Any, assistant_model: Any) -> None:
    """Refuse what another decoding method is asked for by."""
    mode = generation_config.get_generation_mode(assistant_model)
    asked = next(_asked(generation_config), None)
    if asked is None and mode in ("greedy_search", "sample", "assisted_generation"):
        return
    argument, allowed = asked or ("generation_config", "one of greedy decoding or sampling")
    value = repr(getattr(generation_config, argument, mode))
    raise ValueError(
        f"{argument} must be {allowed} with custom_generate=fastlogits.decode, which decodes greedily or samples, got "
        f"{value}: leave {argument} out, or leave custom_generate out, since fastlogits.accelerate takes all methods"
    )


def _check_cache(cache: Any, B: int) -> None:
    """Refuse a cache of another batch."""
    rows = rows_of(cache)
    if rows not in (None, B):
        raise ValueError(
            f"{NAME} must hold {B} rows, one for each row of the input (num_return_sequences counts), got a "
            f"cache of {rows}: give the one that the same batch has made, repeat it with "
            f"{NAME}.batch_repeat_interleave(...), or leave it out"
        )


def _check_drafts(request: loop.Request, assistant: Any) -> None:
    """Refuse calls that drafts can't help."""
    argument = "prompt_lookup_num_tokens" if assistant is None else "assistant_model"
    B = len(request.input_ids)
    if B != 1:
        raise ValueError(
            f"{argument} takes one row at a time, got {B}: leave {argument} out, or call generate for each prompt"
        )
    if request.config.cache_implementation == "static" or isinstance(request.model_kwargs.get(NAME), StaticCache):
        raise ValueError(
            f"{argument} needs a cache that takes tokens back, got a static one: leave cache_implementation out, or "
            f"leave {argument} out"
        )
    if assistant is None:
        return
    sizes = [each.config.get_text_config(decoder=True).vocab_size for each in (request.model, assistant)]
    if sizes[0] != sizes[1] or request.model.config.is_encoder_decoder or assistant.config.is_encoder_decoder:
        raise ValueError(
            "assistant_model must be a decoder with the vocabulary of the model with custom_generate=fastlogits.decode,"
            f" got {type(assistant).__name__} of {sizes[1]} tokens for {type(request.model).__name__} of {sizes[0]}: "
            "leave custom_generate out, since fastlogits.accelerate takes all assistants, or use "
            "prompt_lookup_num_tokens"
        )


def _drafter(request: loop.Request, assistant: Any, plan: Plan | None) -> drafters.Drafter:
    if assistant is not None:
        return drafters.DraftModel(assistant, request, plan)
    config = request.config
    return drafters.PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size or 2)


def _asked(generation_config: Any) -> Iterator[tuple[str, str]]:
    """The arguments of other methods that act in a configuration, and what they must be."""
    for argument, allowed in _OTHER_METHODS.items():
        value = getattr(generation_config, argument, None)
        if value and not (argument == "num_beams" and value == 1):
            yield argument, allowed


def _seeded(
    seeds: int | torch.Tensor | None, input_ids: torch.Tensor, num_return_sequences: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The seed of each row, and where its positions start, int64 ``[B]``."""
    B, device = input_ids.shape[0], input_ids.device
    row = torch.arange(B, device=device)
    if seeds is None:
        seeds = int(torch.randint(2**62, ()))
    if is_integer(seeds) and -(2**63) <= seeds < 2**64:
        seed = int(seeds) - (2**64 if seeds >= 2**63 else 0)  # the same 64 bits
        return torch.full((B,), seed, device=device), row * _PART
    if not isinstance(seeds, torch.Tensor):
        raise ValueError(
            f"seeds must be an integer of 64 bits, or an integer tensor with one per prompt, got {seeds!r}"
        )
    prompts = B // num_return_sequences
    if seeds.shape != (prompts,) or seeds.is_floating_point() or seeds.is_complex() or seeds.dtype == torch.bool:
        raise ValueError(
            f"seeds must be an integer tensor with one per prompt, of shape ({prompts},), got {seeds.dtype} of shape "
            f"{tuple(seeds.shape)}: give one seed for each prompt"
            + (", whose sequences share it" if num_return_sequences > 1 else "")
        )
    part = row % num_return_sequences * _PART
    return seeds.to(device, torch.int64).repeat_interleave(num_return_sequences), part


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
        if self._fused is not None and not kwargs and launch.takes_scores(scores):
            tokens, _ = self._fused(scores, self._seeds, positions, input_ids, self._process.run)
            return with_tokens(scores, tokens)
        with chance.by_seeds(self._seeds, positions):
            scores = self._process(input_ids, scores, **kwargs)
        return with_tokens(scores, self._sampler(scores, self._seeds, positions).tokens)


class _Choosing(RunList):
    """The processors of a greedy run whose processed scores nobody asks for: the same, for the likeliest token."""

    def __init__(self, run: RunList, input_ids: torch.Tensor) -> None:
        super().__init__((), input_ids.shape[1])
        self._process, self._fused = run, FusedDraw(run, temperature=0.0, seeded=False)
        self._anything = torch.zeros(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Process the scores of one step, and find the largest."""
        if kwargs or not launch.takes_scores(scores):
            return self._process(input_ids, scores, **kwargs)
        tokens, _ = self._fused(scores, self._anything, self._anything, input_ids, self._process.run)
        return with_tokens(scores, tokens)
