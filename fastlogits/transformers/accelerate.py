"""The list that ``generate`` assembles, run as one plan: for a model, or for all models of the process."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple

import torch
from transformers import GenerationMixin
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.logits_process import LogitsProcessorList as _TransformersList

from fastlogits.plan.barrier import Barrier
from fastlogits.plan.part import Part
from fastlogits.plan.plan import Plan
from fastlogits.plan.run import Run
from fastlogits.plan.stages import (
    AllowFrom,
    Member,
    Mix,
    Observe,
    Opaque,
    Rows,
    Stage,
    Truncate,
    has_row_values,
    values_keep_notes,
)
from fastlogits.processors.base import LogitsProcessorList, RunProcessor, StagedProcessor, as_theirs, their_class
from fastlogits.transformers.continuous import assemble_for_requests, take_over

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

    def expect_nothing(self) -> None:
        """Be told that the candidates of before have been verified: a draft may call meanwhile."""
        self._candidates = None

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
    return any(member.stage.needs_position for member in processor.plan.members)


class _Candidates:
    """Tokens that a draft proposes for one row, all verified at the first call of the several that verify them.

    The caller stores each result into the row that it was computed from. So a result is that row itself, or it is in
    memory of its own.
    """

    def __init__(self, tokens: torch.Tensor, seen: int, prompt_length: int) -> None:
        self._tokens, self._seen, self._prompt_length = tokens, seen, prompt_length
        self._processed: torch.Tensor | None = None
        self._changed = False
        self._first_address = self._stride = 0

    def take(self, plan: Plan, run: Run, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """The processed scores of a position, or None where this is no call of the verification."""
        i = input_ids.shape[1] - self._seen
        count = self._tokens.shape[1] - self._seen + 1
        if not 0 <= i < count or scores.shape[0] != 1:
            return None
        if i == 0:
            rows = _rows_behind(scores, count)
            if rows is None or any(isinstance(part, Barrier) for part in plan.parts):
                return None
            processed = self._process(plan, run, rows)
            self._changed = processed is not rows
            self._processed = processed.clone() if self._changed and _share_memory(processed, rows) else processed
            self._first_address, self._stride = rows.data_ptr(), rows.stride(0) * rows.element_size()
        if self._processed is None or scores.data_ptr() != self._first_address + i * self._stride:
            return None
        return self._processed[i : i + 1] if self._changed else scores

    def _process(self, plan: Plan, run: Run, rows: torch.Tensor) -> torch.Tensor:
        count, tokens, seen = rows.shape[0], self._tokens, self._seen
        newest = torch.arange(seen - 1, seen - 1 + count, device=rows.device)
        everywhere = Run(self._prompt_length, newest)
        ids = tokens.expand(count, -1)
        for part in plan.parts:
            if takes_any_length(part):
                rows = part(ids, rows, everywhere)
            else:
                rows = torch.cat([part(tokens[:, : seen + i], rows[i : i + 1], run) for i in range(count)])
        return rows


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


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


def takes_any_length(part: Part) -> bool:
    """Whether a part of a plan takes positions of one row as rows of one call."""
    return not any(_is_of_a_row(member.stage) for member in part.members)


def _is_of_a_row(stage: Stage) -> bool:
    """Whether a stage has something that belongs to a row of the run, or reads other rows."""
    if isinstance(stage, Rows):
        return stage.needs_history or stage.acts_as == "mix"
    reads_or_carries = isinstance(stage, (AllowFrom, Mix, Observe, Opaque)) or values_keep_notes(stage)
    return reads_or_carries or has_row_values(stage)


# -- Where generate assembles its list ----------------------------------------------------------------------------


class _Hold:
    """How many times something is accelerated at once."""

    def __init__(self) -> None:
        self.count = 0


class _Accelerated:
    """What is accelerated now, and the methods of transformers that are wrapped meanwhile."""

    def __init__(self) -> None:
        self.models: weakref.WeakKeyDictionary[Any, _Hold] = weakref.WeakKeyDictionary()
        self.everything: _Hold | None = None
        self.lock = threading.RLock()
        self._wrapped: dict[tuple[type, str], tuple[Any, Any]] = {}

    def holds(self, model: Any) -> bool:
        return self.everything is not None or model in self.models

    def is_begun(self, model: Any) -> bool:
        """Whether a model is accelerated by itself; for None, whether everything is."""
        return self.everything is not None if model is None else model in self.models

    def begin(self, model: Any) -> _Hold:
        """Accelerate a model, or everything, once more."""
        hold = self.everything if model is None else self.models.get(model)
        if hold is None:
            hold = _Hold()
            if model is None:
                self.everything = hold
            else:
                self.models[model] = hold
        hold.count += 1
        if model is None:
            self.wrap(_all_classes(GenerationMixin))
            self.wrap(cls for cls in GenerationMixin.__mro__ if cls is not object)
        else:
            self.wrap(type(model).__mro__)
        return hold

    def end(self, model: Any, hold: _Hold) -> None:
        """Take one ``begin`` back; one that ``forget`` has ended stays ended."""
        hold.count -= 1
        if not hold.count and hold is (self.everything if model is None else self.models.get(model)):
            self.forget(model)

    def forget(self, model: Any) -> None:
        """End all that was begun for a model, or for everything."""
        if model is None:
            self.everything = None
        else:
            self.models.pop(model, None)
        self.unwrap_if_idle()

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
        if self.everything is not None or len(self.models):
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
                return assemble_for_requests(model, functools.partial(original, model), *args, **kwargs)
            processors = original(model, *args, **kwargs)
        finally:
            _assembling.inside = False
        if not isinstance(processors, list):
            warnings.warn(
                f"{type(model).__name__} assembles its processors in a {type(processors).__name__} that fastlogits "
                "doesn't know: its generate runs as it is",
                stacklevel=2,
            )
            return processors
        if not all(map(callable, processors)):
            return processors  # the first call of transformers' own list says what is wrong with one of them
        start = kwargs.get("input_ids_seq_length", args[1] if len(args) > 1 else None)
        return RunList(processors, start if isinstance(start, int) else None)

    return assemble


def _as_generate_knows_them(processors: Iterable[Any]) -> _TransformersList:
    """The same processors, ours as transformers' own types: by these it sees which of its own they replace."""
    made: dict[int, Any] = {}
    known = _TransformersList()
    for processor in list.__iter__(processors) if isinstance(processors, LogitsProcessorList) else processors:
        twin = their_class(type(processor))
        if twin is not None and type(processor) is not twin and not isinstance(processor, list):
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
                processors.expect_nothing()
                candidates, logits = propose(input_ids, *args, **kwargs)
                processors.expect(candidates.to(input_ids.device), input_ids.shape[1])
                return candidates, logits

            generator.get_candidates = get_candidates
        return generator

    return build


def _seen(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_prepare_generation_config``, early in each ``generate``: the class may be newer than ``accelerate()``."""

    def prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
        if _state.holds(model):
            with _state.lock:
                if _state.holds(model):
                    _state.wrap(type(model).__mro__)
        return original(model, *args, **kwargs)

    return prepare


def _for_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """``init_continuous_batching``, whose manager then processes each request as itself."""

    def init(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not _state.holds(model):
            return original(model, *args, **kwargs)
        with _state.lock:
            _state.wrap(type(model).__mro__)
        _assembling.for_requests = True
        try:
            manager = original(model, *args, **kwargs)
        finally:
            _assembling.for_requests = False
        return take_over(manager)

    return init


_WRAPPERS = {
    "_prepare_generation_config": _seen,
    "_get_logits_processor": _assembled,
    "_get_candidate_generator": _with_candidates,
}
if find_spec("transformers.generation.continuous_batching.cb_logits_processors"):
    _WRAPPERS["init_continuous_batching"] = _for_requests


# -- What generates in what is given --------------------------------------------------------------------------------

# Where things that are no modules keep a model: pipelines of transformers, models of outlines, wrappers of one's own.
_KEPT_AS = ("model", "module", "base_model", "_orig_mod")


class _Found(NamedTuple):
    """The models in what was given, by their paths there; the path of the thing itself is empty."""

    models: list[tuple[str, Any]]
    """Those that generate as transformers does."""
    others: list[tuple[str, Any]]
    """Those that generate in a way of their own, and have none of the former inside."""


def _generators(given: Any) -> _Found:
    """What generates in a model, a pipeline, or whatever holds a model."""
    path, model = _modules_in(given)
    modules = model.named_modules(prefix=path) if isinstance(model, torch.nn.Module) else [(path, model)]
    models: list[tuple[str, Any]] = []
    others: list[tuple[str, Any]] = []
    for where, module in modules:
        if isinstance(module, GenerationMixin):
            models.append((where, module))
        elif callable(getattr(type(module), "generate", None)):
            others.append((where, module))
    if not models and not others:
        raise TypeError(
            f"model must be, or hold, a model of transformers that can generate, got {type(given).__name__}: give the "
            "model whose generate you call, what holds it (a PEFT model, DataParallel, a pipeline), or nothing for all "
            "models of the process"
        )
    alone = [(where, other) for where, other in others if not _has_inside(other, models)]
    return _Found(models, alone)


def _modules_in(given: Any) -> tuple[str, Any]:
    """The module that something holds, and the path to it."""
    path, found = "", given
    for _ in range(3):  # an outlines generator holds an outlines model, which holds the model
        if isinstance(found, (torch.nn.Module, GenerationMixin)):
            return path, found
        name = next((name for name in _KEPT_AS if getattr(found, name, None) is not None), None)
        if name is None:
            break
        path, found = f"{path}.{name}".lstrip("."), getattr(found, name)
    is_model = isinstance(found, (torch.nn.Module, GenerationMixin))
    return (path, found) if is_model else ("", None)


def _has_inside(module: Any, models: Sequence[tuple[str, Any]]) -> bool:
    if not isinstance(module, torch.nn.Module):
        return False
    inside = {id(each) for each in module.modules()}
    return any(id(model) in inside for _, model in models)


def _listed(found: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{path} ({type(model).__name__})" if path else "itself" for path, model in found)


def _all_classes(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    below: type[Any]
    for below in cls.__subclasses__():
        yield from _all_classes(below)


class Acceleration:
    """What ``accelerate`` has begun; as a context manager it ends with the block.

    Blocks may overlap, in threads or one in another: each ends what it has begun itself. One object may be entered
    several times, one after the other or at once: it ends with the last of its blocks.

    Args:
        given: the model, or what holds it; None for all.
    """

    def __init__(self, given: Any) -> None:
        name, self._models, what = _EVERYTHING, [_no_model], ""
        if given is not None:
            found = _generators(given)
            name = type(given).__name__
            self._models = [weakref.ref(model) for _, model in found.models]
            if found.others or [path for path, _ in found.models] != [""]:
                what = f": {_listed(found.models) or 'nothing'}"
            if found.others:
                what += f"; not {_listed(found.others)}"
            if not found.models:
                warnings.warn(
                    f"nothing in {name} can be accelerated: its generate assembles no logits processors, and hands on "
                    "to no model of transformers that does. It works as it did",
                    stacklevel=3,
                )
        self._entered = 0
        self._holds: list[tuple[Any, _Hold]] = []
        with _state.lock:
            before = len(self._models) > 0 and all(_state.is_begun(model) for _, model in _alive(self._models))
            self._begin()
        self._text = f"<Acceleration of {name}{what}{', which was accelerated before' if before else ''}>"

    def _begin(self) -> None:
        ended = self._holds
        # A model is held while it is asked for: None would be all models.
        self._holds = [(of, _state.begin(model)) for of, model in _alive(self._models)]
        self._end(ended)

    @staticmethod
    def _end(ended: list[tuple[Any, _Hold]]) -> None:
        for of, hold in ended:
            for _, model in _alive([of]):
                _state.end(model, hold)
        _state.unwrap_if_idle()  # where the models are gone

    def __repr__(self) -> str:
        return self._text

    def __enter__(self) -> Acceleration:
        with _state.lock:
            if not self._entered:
                self._begin()  # anew, where a block or a restore has ended it
            self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _state.lock:
            self._entered -= 1
            if not self._entered:
                ended, self._holds = self._holds, []
                self._end(ended)


def _no_model() -> None:
    """Stands where a reference to a model does, for all models."""


def _alive(references: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The models that there still are, each with its reference; None for all models."""
    for of in references:
        model = of()
        if model is not None or of is _no_model:
            yield of, model


def accelerate(model: Any = None) -> Acceleration:
    """Run what ``generate`` assembles from its arguments as one fused plan, with nothing else to change.

    Every call of ``model.generate`` says the same as before, token for token: the order of the processors, which of
    them gives way to which, and the warnings are those of transformers. Processors of your own stay in their place;
    first-step processors may come in any list, since the run's start is known. With assisted decoding all candidates
    are processed in one call, and with continuous batching each request has its own history and position.

    A model may hand its ``generate`` on to one inside it (BLIP-2, Bark, CSM). All models inside it that generate as
    transformers does are accelerated too; one with a decoding loop of its own (the fine model of Bark) works as before.
    The ``repr`` of the result names both. A copy of a model (``copy.deepcopy``, ``pickle``) is another model: it is
    not accelerated until you accelerate it, unless all models are.

    Args:
        model: a model of transformers that can generate, or what holds one: a compiled or PEFT model,
            ``DataParallel``, a pipeline, a model of outlines. None, the default, for all models of the process, those
            that are made later included.

    Returns:
        A context manager that ends this acceleration at the end of its block; it may be dropped. What is accelerated
        several times at once, in threads or in nested blocks, stays so until the last of them has ended.

    Raises:
        TypeError: neither a model that can generate nor something that holds one.

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
    return Acceleration(model)


def restore(model: Any = None) -> None:
    """Undo ``accelerate``, however often it was called; what was not accelerated stays as it is.

    Blocks that are still open end without a further effect.

    Args:
        model: what ``accelerate`` was given. None for the process: models that were accelerated one by one stay so.

    Raises:
        TypeError: neither a model that can generate nor something that holds one.

    Example:
        >>> restore()
    """
    models = [None] if model is None else [each for _, each in _generators(model).models]
    with _state.lock:
        for each in models:
            _state.forget(each)
