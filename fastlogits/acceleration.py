"""The list that ``generate`` assembles, run as one plan: for a model, or for all models of the process."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.logits_process import LogitsProcessorList as _TransformersList

from fastlogits.plan import Barrier, Plan, RowsLaunch
from fastlogits.processors.base import LogitsProcessorList, RunProcessor, StagedProcessor, as_theirs, their_class
from fastlogits.run import Run
from fastlogits.stages import AllowFrom, History, Member, Opaque, Truncate
from fastlogits.step import Step

__all__ = ["accelerate", "restore"]

_EVERYTHING = "every model of the process"


class RunList(LogitsProcessorList):
    """The processors of one run of ``generate`` as one plan, which knows where the run started.

    It holds transformers' own objects, for those who look for them, change them or insert others.

    Args:
        processors: what ``generate`` has assembled.
        prompt_length: number of tokens of the prompt; None where it is not known.
    """

    def __init__(self, processors: Iterable[Any], prompt_length: int | None) -> None:
        # A draft model may call them one by one, with lengths that its own tokenizer counts.
        self._drafts = Run()
        super().__init__(
            _OfRun(processor, self._drafts) if _asks_for_position(processor) else processor for processor in processors
        )
        self._prompt_length = prompt_length
        self.run = Run(prompt_length)
        """The run that the processors stand in."""
        self._candidates: _Candidates | None = None
        self._sorts = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Process the scores of one step, see ``fastlogits.LogitsProcessorList``."""
        candidates = self._candidates
        if candidates is not None and not kwargs:
            processed = candidates.take(self.plan, self.run, input_ids, scores)
            if processed is not None:
                return processed
        return self.plan(input_ids, scores, self.run, kwargs)

    def __iter__(self) -> Iterator[Any]:
        return list.__iter__(self)

    def _member_of(self, processor: Any) -> Member:
        mine = isinstance(processor, _OfRun) and processor.run is self._drafts
        member = super()._member_of(processor.processor if mine else processor)
        if self._sorts and isinstance(member.stage, Truncate) and member.original is not None:
            return member._replace(stage=Opaque(member.original))
        return member

    def sorting(self) -> RunList:
        """The same processors in the same run, where tokens that tie are kept or dropped as a sort comes out."""
        same = RunList((), self._prompt_length)
        list.extend(same, self)
        same._drafts, same.run, same._sorts = self._drafts, self.run, True
        return same

    def expect(self, candidates: torch.Tensor, seen: int) -> None:
        """Be told which tokens are verified next: ``candidates`` ``[1, L]``, of which ``seen`` are settled."""
        several = self._prompt_length is not None and candidates.shape[0] == 1 and candidates.shape[1] > seen > 0
        self._candidates = _Candidates(candidates, seen, self._prompt_length or 0) if several else None


class _OfRun(RunProcessor):
    """A processor of ours in its run, for those who call it by itself."""

    def __init__(self, processor: StagedProcessor, run: Run) -> None:
        super().__init__(processor, run)
        self.processor, self.run = processor, run


def _asks_for_position(processor: Any) -> bool:
    """Whether a processor is one of ours that can't run without knowing the start of the run."""
    if not isinstance(processor, StagedProcessor) or type(processor).__call__ is not StagedProcessor.__call__:
        return False
    return any(member.stage.needs_position for step in processor.plan.steps for member in step.members)


class _Candidates:
    """Tokens that a draft proposes for one row, all verified at the first call of the several that verify them."""

    def __init__(self, tokens: torch.Tensor, seen: int, prompt_length: int) -> None:
        self._tokens, self._seen, self._prompt_length = tokens, seen, prompt_length
        self._processed: torch.Tensor | None = None
        self._first_address = self._stride = 0

    def take(self, plan: Plan, run: Run, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """The processed scores of a position, or None where this is no call of the verification."""
        i = input_ids.shape[1] - self._seen
        count = self._tokens.shape[1] - self._seen + 1
        if not 0 <= i < count or scores.shape[0] != 1:
            return None
        if i == 0:
            rows = _rows_behind(scores, count)
            if rows is None or any(isinstance(step, Barrier) for step in plan.steps):
                return None
            self._processed = self._process(plan, run, rows)
            self._first_address, self._stride = rows.data_ptr(), rows.stride(0) * rows.element_size()
        if self._processed is None or scores.data_ptr() != self._first_address + i * self._stride:
            return None
        return self._processed[i : i + 1]

    def _process(self, plan: Plan, run: Run, rows: torch.Tensor) -> torch.Tensor:
        count, tokens, seen = rows.shape[0], self._tokens, self._seen
        newest = torch.arange(seen - 1, seen - 1 + count, device=rows.device)
        everywhere = Run(self._prompt_length, newest)
        ids = tokens.expand(count, -1)
        for step in plan.steps:
            if _takes_any_length(step):
                rows = step(ids, rows, everywhere)
            else:
                rows = torch.cat([step(tokens[:, : seen + i], rows[i : i + 1], run) for i in range(count)])
        return rows


def _rows_behind(scores: torch.Tensor, count: int) -> torch.Tensor | None:
    """``[count, V]`` logits of which ``scores`` ``[1, V]`` is a view of the first row; None where they aren't known."""
    base = scores._base
    if base is None or base.ndim != 3 or base.shape[0] != 1 or base.shape[2] != scores.shape[1]:
        return None
    if base.dtype != scores.dtype or base.stride(2) != scores.stride(1) or not base.stride(1):
        return None
    first, rest = divmod(int(scores.storage_offset()) - int(base.storage_offset()), base.stride(1))
    if rest or first < 0 or first + count > base.shape[1]:
        return None
    return base[0, first : first + count]


def _takes_any_length(step: Step) -> bool:
    """Whether a step takes rows of different lengths in one call, and has nothing that belongs to a row."""
    if isinstance(step, RowsLaunch):
        return not any(member.stage.needs_history for member in step.members)
    for member in step.members:
        source = getattr(member.stage, "tokens", None)
        if isinstance(member.stage, AllowFrom) or (isinstance(source, History) and torch.is_tensor(source.ignore)):
            return False
    return True


# -- Where generate assembles its list ----------------------------------------------------------------------------


class _Accelerated:
    """What is accelerated now, and the methods of transformers that are wrapped meanwhile."""

    def __init__(self) -> None:
        self.models: weakref.WeakSet[Any] = weakref.WeakSet()
        self.everything = False
        self.lock = threading.RLock()
        self._wrapped: dict[tuple[type, str], tuple[Any, Any]] = {}

    def holds(self, model: Any) -> bool:
        return self.everything or model in self.models

    def wrap(self, classes: Iterable[type]) -> None:
        """Wrap the methods that these classes define, each once."""
        for cls in classes:
            for name, wrapped in _WRAPPERS.items():
                original = cls.__dict__.get(name)
                if callable(original) and (cls, name) not in self._wrapped:
                    wrapper = functools.wraps(original)(wrapped(original))
                    self._wrapped[cls, name] = original, wrapper
                    setattr(cls, name, wrapper)

    def unwrap_if_idle(self) -> None:
        """Give the classes their own methods back once nothing is accelerated."""
        if self.everything or len(self.models):
            return
        for (cls, name), (original, wrapper) in self._wrapped.items():
            if cls.__dict__.get(name) is wrapper:  # else another has wrapped it since, and ours just calls through
                setattr(cls, name, original)
        self._wrapped.clear()


_state = _Accelerated()
_assembling = threading.local()


def _assembled(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_get_logits_processor``, whose list then runs as a plan."""

    def assemble(model: Any, *args: Any, **kwargs: Any) -> Any:
        # A model's own method calls that of its base class: the list is the one that the outermost returns.
        if not _state.holds(model) or getattr(_assembling, "inside", False):
            return original(model, *args, **kwargs)
        for_requests = getattr(_assembling, "for_requests", False)
        if kwargs.get("logits_processor"):
            kwargs["logits_processor"] = _as_generate_knows_them(kwargs["logits_processor"])
        _assembling.inside = True
        try:
            if for_requests:
                # Imported here: it needs what transformers' continuous batching needs.
                from fastlogits.continuous import assemble_for_requests

                return assemble_for_requests(model, functools.partial(original, model), *args, **kwargs)
            processors = original(model, *args, **kwargs)
        finally:
            _assembling.inside = False
        if not isinstance(processors, list) or not all(map(callable, processors)):
            warnings.warn(
                f"{type(model).__name__} assembles its processors in a {type(processors).__name__} that fastlogits "
                "doesn't know: its generate runs as it is",
                stacklevel=2,
            )
            return processors
        start = kwargs.get("input_ids_seq_length", args[1] if len(args) > 1 else None)
        return RunList(processors, start if isinstance(start, int) else None)

    return assemble


def _as_generate_knows_them(processors: Iterable[Any]) -> _TransformersList:
    """The same processors, ours as transformers' own types: by these it sees which of its own they replace."""
    made: dict[int, Any] = {}
    known = _TransformersList()
    for processor in list.__iter__(processors) if isinstance(processors, LogitsProcessorList) else processors:
        twin = their_class(type(processor))
        if twin is not None and type(processor) is not twin:
            processor = made.setdefault(id(processor), as_theirs(processor, twin))
        known.append(processor)
    return known


def _with_candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_get_candidate_generator``, whose candidates are then verified in one call."""

    def build(model: Any, *args: Any, **kwargs: Any) -> Any:
        generator = original(model, *args, **kwargs)
        processors = kwargs.get("logits_processor")
        if isinstance(processors, RunList):
            if isinstance(generator, PromptLookupCandidateGenerator):
                # It asks which tokens may follow by processing scores that are all the same.
                generator.logits_processor = processors.sorting()
            propose = generator.get_candidates

            def get_candidates(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                candidates, logits = propose(input_ids, *args, **kwargs)
                processors.expect(candidates.to(input_ids.device), input_ids.shape[1])
                return candidates, logits

            generator.get_candidates = get_candidates
        return generator

    return build


def _for_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """``init_continuous_batching``, whose manager then processes each request as itself."""

    def init(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not _state.holds(model):
            return original(model, *args, **kwargs)
        from fastlogits.continuous import take_over

        _assembling.for_requests = True
        try:
            manager = original(model, *args, **kwargs)
        finally:
            _assembling.for_requests = False
        return take_over(manager)

    return init


_WRAPPERS = {
    "_get_logits_processor": _assembled,
    "_get_candidate_generator": _with_candidates,
}
if find_spec("transformers.generation.continuous_batching.cb_logits_processors"):
    _WRAPPERS["init_continuous_batching"] = _for_requests


def _generation_model(model: Any) -> Any:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(model, GenerationMixin):
        raise TypeError(
            f"model must be a model of transformers that can generate, got {type(model).__name__}: give the model "
            "whose generate you call, or nothing for all models of the process"
        )
    return model


def _all_classes(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    below: type[Any]
    for below in cls.__subclasses__():
        yield from _all_classes(below)


class Acceleration:
    """What ``accelerate`` has begun; as a context manager it ends with the block.

    Args:
        model: the model; None for all.
        began: whether this call accelerated it, rather than one before.
    """

    def __init__(self, model: Any, began: bool) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._began = began

    def __repr__(self) -> str:
        model = _EVERYTHING if self._model is None else type(self._model()).__name__
        return f"<Acceleration of {model}{'' if self._began else ', which was accelerated before'}>"

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._began:
            model = None if self._model is None else self._model()
            if model is not None or self._model is None:
                restore(model)


def accelerate(model: Any = None) -> Acceleration:
    """Run what ``generate`` assembles from its arguments as one fused plan, with nothing else to change.

    Every call of ``model.generate`` says the same as before, token for token: the order of the processors, which of
    them gives way to which, and the warnings are those of transformers. Processors of your own stay in their place;
    first-step processors may come in any list, since the run's start is known. With assisted decoding all candidates
    are processed in one call, and with continuous batching each request has its own history and position.

    Args:
        model: a model of transformers that can generate. None, the default, for all models of the process, those
            that are made later included.

    Returns:
        A context manager that restores the model at the end of its block; it may be dropped.

    Raises:
        TypeError: not a model that can generate.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> with accelerate(model):
        ...     out = model.generate(torch.tensor([[5, 7]]), max_new_tokens=3, do_sample=True, top_p=0.9)
        >>> out.shape[0]
        1
    """
    with _state.lock:
        if model is None:
            began, _state.everything = not _state.everything, True
            _state.wrap(_all_classes(GenerationMixin))
            _state.wrap(cls for cls in GenerationMixin.__mro__ if cls is not object)
        else:
            model = _generation_model(model)
            began = model not in _state.models
            _state.models.add(model)
            _state.wrap(type(model).__mro__)
    return Acceleration(model, began)


def restore(model: Any = None) -> None:
    """Undo ``accelerate``; what was not accelerated stays as it is.

    Args:
        model: what ``accelerate`` was given. None for the process: models that were accelerated one by one stay so.

    Raises:
        TypeError: not a model that can generate.

    Example:
        >>> restore()
    """
    with _state.lock:
        if model is None:
            _state.everything = False
        else:
            _state.models.discard(_generation_model(model))
        _state.unwrap_if_idle()
