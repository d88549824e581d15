"""Where fastlogits depends on the inside of transformers: on frames, method names and attributes that no page promises.

Each place is a ``Hook``, which says what it is for, what stands in transformers, and what is lost without it. All of
them are here or named here, so that a new version of transformers is one file to look at. ``python -m fastlogits
doctor`` tries each with a tiny model; see ``fastlogits.inspect.hooks``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple, ParamSpec

import torch

_P = ParamSpec("_P")

SEEN = ("4.57.6", "5.0.0", "5.17.0", "5.20.2", "5.23.0", "5.24.0")
"""The versions of transformers in which all hooks have been seen to hold."""


class Hook(NamedTuple):
    """One place that depends on the inside of transformers."""

    purpose: str
    """What it is for."""
    depends_on: str
    """What stands in transformers."""
    without: str
    """What no longer works where that has changed."""


RUN_START = Hook(
    "the start of a run in a plain generate",
    "generate iterates the list in a function named _merge_criteria_processor_list",
    "first-step processors raise UnknownRunStartError in generate; for_run(prompt_length=...) works",
)
ASSEMBLED = Hook(
    "accelerate",
    "the models' methods _get_logits_processor and _prepare_generation_config",
    "an accelerated model runs transformers' own loop over its processors",
)
DRAFTS = Hook(
    "assisted decoding under accelerate",
    "_get_candidate_generator, get_candidates, and the logits_processor of PromptLookupCandidateGenerator",
    "each candidate is processed in a call of its own, which is slower",
)
CONTINUOUS = Hook(
    "continuous batching under accelerate",
    "init_continuous_batching and the manager's ContinuousBatchingLogitsProcessorList",
    "continuous batching runs transformers' own processors",
)
DECODE = Hook(
    "custom_generate=decode",
    "_sample takes argmax of the processed scores, and generate keeps streamer and synced_gpus in its frame",
    "sampling with custom_generate=decode is greedy, or a streamer gets nothing",
)
LOOP = Hook(
    "the captured step of custom_generate=decode",
    "_prefill, prepare_inputs_for_generation with next_sequence_length, _update_model_kwargs_for_generation, and "
    "static layers that count in a tensor, cumulative_length",
    "custom_generate=decode takes transformers' own loop, or draws other tokens on a GPU than there",
)
ATTENTION = Hook(
    "attention without copies of the cache in the step of custom_generate=decode",
    "models take their attention from ALL_ATTENTION_FUNCTIONS under the name sdpa, and hand it num_key_value_groups",
    "the step is slower where heads share keys and values: up to three times at 64 rows",
)
TOKENIZER = Hook(
    "stop strings beside custom_generate=decode",
    "_extract_generation_mode_kwargs looks at the signature of custom_generate after it has taken the tokenizer",
    "stop_strings raise a ValueError with custom_generate=decode",
)
HOOKS = (RUN_START, ASSEMBLED, DRAFTS, CONTINUOUS, DECODE, LOOP, ATTENTION, TOKENIZER)


# -- The start of a run -------------------------------------------------------------------------------------------


def assembles(frame: FrameType) -> bool:
    """Whether a frame is transformers', assembling a run's list, or runs the list as a model's remote code does."""
    module = str(frame.f_globals.get("__name__", ""))
    if module.partition(".")[0] == "transformers_modules":
        return True
    return module.startswith("transformers.") and frame.f_code.co_name == "_merge_criteria_processor_list"


# -- What generate doesn't hand on to a decoding method ------------------------------------------------------------


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def arguments_of_generate(frame: FrameType, model: Any) -> Mapping[str, Any]:
    """The arguments of the ``generate`` that decodes by this: a decoding method of one's own isn't given all.

    It is the nearest of the model: a function of the user may stand between.
    """
    for caller in _callers(frame):
        code = caller.f_code
        if (
            code.co_name == "generate"
            and "custom_generate" in code.co_varnames
            and caller.f_locals.get("self") is model
        ):
            return caller.f_locals
    return {}


def is_synced(model: Any, asked: bool | None) -> bool:
    """What ``generate`` makes of ``synced_gpus``: where it isn't given, the way that the model is spread decides."""
    found = model._extract_generation_mode_kwargs(None, {}, asked, None, None)
    return bool(found.get("synced_gpus"))


class _Signature(inspect.Signature):
    """The signature of a decoding method, by which ``generate`` tells what to hand on.

    Before it looks here, transformers takes the tokenizer out of the arguments that it hands on, and then drops it.
    So it is put back while it looks.
    """

    __slots__ = ()

    @property
    def parameters(self) -> MappingProxyType[str, inspect.Parameter]:
        """The parameters by name."""
        for caller in _callers(sys._getframe(1)):
            if caller.f_code.co_name == "_extract_generation_mode_kwargs":
                taken, rest = caller.f_locals.get("generation_mode_kwargs", {}), caller.f_locals.get("kwargs")
                if "tokenizer" in taken and isinstance(rest, dict):
                    rest["tokenizer"] = taken["tokenizer"]
                break
            if caller.f_code.co_filename != inspect.__file__:
                break
        return super().parameters


def keeps_tokenizer(method: Callable[_P, Any]) -> Callable[_P, Any]:
    """A decoding method, to which ``generate`` hands on the tokenizer too."""
    plain = inspect.signature(method)
    method.__signature__ = _Signature(  # type: ignore[attr-defined]
        list(plain.parameters.values()), return_annotation=plain.return_annotation
    )
    return method


# -- Scores that know which token was drawn ------------------------------------------------------------------------


def with_tokens(scores: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Scores whose largest, to the loop that asks for it, is the token that was drawn."""
    drawn: Any = scores.as_subclass(_Drawn)
    drawn.tokens = tokens
    return drawn  # type: ignore[no-any-return]


class _Drawn(torch.Tensor):
    """See ``with_tokens``."""

    tokens: torch.Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.argmax, torch.Tensor.argmax):
            return args[0].tokens
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
