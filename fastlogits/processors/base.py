"""What all processors share: the list that runs as one plan, and the base of processors that say what they are."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module
from inspect import Parameter, signature
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, SupportsIndex, TypeAlias, overload

import torch
import transformers
from transformers.generation import logits_process as theirs
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.logits_process import LogitsProcessorList as _TransformersList

from fastlogits import warm_up as warming
from fastlogits.checks import whole_number
from fastlogits.compilers import constant
from fastlogits.plan.barrier import Barrier
from fastlogits.plan.causes import checked_processors
from fastlogits.plan.plan import Plan
from fastlogits.plan.run import Run
from fastlogits.plan.stages import AllowFrom, Given, Member, Opaque, Stage, stages_of
from fastlogits.transformers.hooks import assembles
from fastlogits.warm_up import WarmUp

if TYPE_CHECKING:
    from fastlogits.inspect.trace import Trace
    from fastlogits.plan.explain import Explanation
    from fastlogits.plan.position import Index

__all__ = ["LogitsProcessor", "LogitsProcessorList", "StagedProcessor"]


_UNKNOWN = 6
"""The first version of transformers that no test has seen, as pyproject.toml has it."""


def _check_version(version: str) -> None:
    """Warn of a transformers that is newer than what the processors are held to: its own may do something else."""
    if int(version.partition(".")[0]) >= _UNKNOWN:
        warnings.warn(
            f"transformers {version} is newer than what fastlogits is tested with (below {_UNKNOWN}): results "
            "may differ from it. `python -m fastlogits doctor` compares some; "
            f"pip install 'transformers<{_UNKNOWN}' is sure",
            RuntimeWarning,
            stacklevel=2,
        )


_check_version(transformers.__version__)

_changes = count()


class RunProcessor(LogitsProcessor):
    """A processor, or a list of them, in one run: of two parameters for any list, to be dropped with its run.

    Args:
        planned: the processor or the list; its plan is asked for at each call, since attributes of it may be set.
        run: the run.
    """

    def __init__(self, planned: _HasPlan, run: Run) -> None:
        self._planned = planned
        self.run = run
        """The run that it stands in."""

    @property
    def plan(self) -> Plan:
        """The plan that it runs."""
        return self._planned.plan

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Processed scores ``[B, V]``, see ``StagedProcessor``."""
        return self._planned.plan(input_ids, scores, self.run)

    def __repr__(self) -> str:
        names = ", ".join(member.name for member in self.plan.members)
        return f"<{names or 'nothing'}, of one run>"

    def starts_at(self, prompt_length: int) -> bool:
        """Whether its run is one that starts after so many tokens, see ``Run.starts_at``."""
        return self.run.starts_at(prompt_length)

    def apply_(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The same in place."""
        return self._planned.plan(input_ids, scores, self.run, in_place=True)

    def explain(
        self,
        shape: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        bandwidth: float | None = None,
    ) -> Explanation:
        """The plan for people, see ``Plan.explain``."""
        return self._planned.plan.explain(shape, dtype, bandwidth)


class _HasPlan(Protocol):
    """What a run can be made of."""

    @property
    def plan(self) -> Plan:
        """The compiled plan, as it is now."""


class _Planned:
    """What a processor and a list of them have in common: a plan, and the ways to run it."""

    @property
    def plan(self) -> Plan:
        """The compiled plan."""
        raise NotImplementedError

    def for_run(self, prompt_length: Index | None = None, cache_position: Index | None = None) -> RunProcessor:
        """A processor of two parameters for one run, whose start it knows; it goes into any list.

        Args:
            prompt_length: number of tokens of the run's prompt, padding included: an integer, or an integer tensor
                ``()`` or ``(B,)`` on the device of the scores, which is then read there at each call. None, without
                ``cache_position``, takes the length of the first ``input_ids`` that the processor is called with.
            cache_position: index of the token whose logits are processed, of the same forms. None takes it from
                the length of ``input_ids`` at each call. By itself it doesn't say where the run starts: what asks
                for the step then raises a ValueError when it is called.

        Raises:
            ValueError: not an integer or integer tensor, or out of range.
        """
        _ = self.plan  # what can't be compiled raises here
        return RunProcessor(self, Run(prompt_length, cache_position))

    def explain(
        self,
        shape: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        bandwidth: float | None = None,
    ) -> Explanation:
        """What becomes of the processors: launches, merges and why each is allowed; see ``Plan.explain``."""
        return self.plan.explain(shape, dtype, bandwidth)

    def trace(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        tokenizer: Any = None,
        *,
        prompt_length: Index | None = None,
        cache_position: Index | None = None,
        top: int = 3,
    ) -> Trace:
        """What each processor does to the candidates of each row; see ``fastlogits.trace``."""
        from fastlogits.inspect.trace import trace  # which imports this module

        positions: Any = {"prompt_length": prompt_length, "cache_position": cache_position}
        return trace(self, input_ids, scores, tokenizer, **positions, top=top)

    def warm_up(
        self,
        vocab_size: int,
        dtype: torch.dtype = torch.float32,
        *,
        batch: int = 1,
        device: torch.device | str | None = None,
        row_stride: int | None = None,
        input_ids: torch.Tensor | None = None,
        prompt_length: Index | None = None,
        cache_position: Index | None = None,
    ) -> WarmUp:
        """Compile now, and at once, what calls with such logits launch; else the first of them does it, and waits.

        A call and one in place are rehearsed: their launches are collected, compiled side by side and loaded, and none
        is made. No processor is called that fastlogits doesn't know, no model and no function of yours; no run begins,
        nothing counts as a step, and no random number is drawn. The number of rows, the length of the text, and the
        numbers and token ids of the processors change nothing of what is compiled; the vocabulary, the dtypes and which
        processors there are do. Where the kernels don't run, as on a CPU, this returns at once and says so.

        Args:
            vocab_size: tokens of the vocabulary, V.
            dtype: of the logits: float32, as ``generate`` has them, float16 or bfloat16.
            batch: rows of the logits; of importance only where a processor has something of its own for each row, as
                with ``encoder_input_ids``.
            device: where the logits are; None for the current GPU where there is one, else the CPU.
            row_stride: ``logits.stride(0)``, where logits are a part of wider ones; None for contiguous ones.
            input_ids: tokens as calls have them; None for int64.
            prompt_length: as calls have it, where that is a tensor on the device; None for integers, or none at all.
            cache_position: likewise.

        Returns:
            What was compiled, in how many seconds, and what was not rehearsed: see ``WarmUp``.

        Raises:
            ValueError: an argument out of range or of a wrong type; what a processor refuses of such logits.
            RuntimeError: a CUDA graph is being captured.

        Example:
            >>> from fastlogits import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper
            >>> processors = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)])
            >>> processors.warm_up(128256, torch.bfloat16, device="cpu").kernels
            ()
        """
        where = warming.checked_device(device)
        rows = whole_number("batch", batch, 1)
        logits = warming.dummy_logits(rows, vocab_size, dtype, where, row_stride)
        ids = warming.dummy_ids(input_ids, rows, where)
        plan = self.plan

        def rehearse() -> None:
            for in_place in (False, True):
                if prompt_length is not None or cache_position is not None:
                    plan(ids, logits, Run.of(prompt_length, cache_position), in_place=in_place)
                    continue
                for at, start in warming.host_positions(plan):
                    plan(ids, logits, Run(start, at), in_place=in_place)

        return warming.warmed(where, rehearse, warming.not_rehearsed(plan))


class StagedProcessor(_Planned, LogitsProcessor):
    """Base of processors that say which stage they are and leave the rest to the plan.

    A subclass defines ``stage()``, which returns a stage of ``fastlogits.plan.stages``. Calling the processor, fusing
    it with its neighbours and running it in place follow from that. A subclass that overrides ``__call__`` is a
    barrier instead, as any ``LogitsProcessor`` is.

    Example:
        >>> from fastlogits.plan.stages import Ban
        >>> class NoThree(StagedProcessor):
        ...     def stage(self):
        ...         return Ban((3,))
        >>> NoThree()(torch.tensor([[1, 2]]), torch.zeros(1, 4))
        tensor([[0., 0., 0., -inf]])
    """

    _plan: Plan | None = None
    _revision = ""  # another after each change; no number, which a compiler might take for one that varies
    _read: _Versions = ()

    def stage(self) -> Stage:
        """What this processor does; asked once, and again after an attribute has been set."""
        raise NotImplementedError(f"{type(self).__name__} must define stage()")

    @property
    def plan(self) -> Plan:
        """The compiled plan of this processor alone."""
        plan = None if torch.compiler.is_compiling() or _is_written(self._read) else self._plan
        if plan is None:
            self._make_plan(_revision(self))
            plan = self._plan
            assert plan is not None
        return plan

    @constant
    def _make_plan(self, revision: str) -> None:
        if self._plan is None or _is_written(self._read):
            member = _staged(self)
            self.__dict__["_read"] = _read_once(self, member.stage)
            self.__dict__["_plan"] = Plan.compile([member])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Process the scores of one step; the input is never written.

        Args:
            input_ids: tokens so far, int32 or int64 ``(B, L)``.
            scores: logits, float32, float16 or bfloat16 ``(B, V)`` of any row stride.

        Returns:
            Processed scores ``(B, V)`` of the same dtype: a new tensor, or ``scores`` itself where nothing changes.

        Raises:
            ValueError: scores of another shape or dtype; tensors on different devices; a token id or mask that
                doesn't fit the vocabulary; or a first-step processor that can't know where the run starts.
        """
        return self.plan(input_ids, scores)

    def apply_(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The same in place; returns ``scores``."""
        return self.plan(input_ids, scores, in_place=True)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if not name.startswith("_"):
            # What stage() reads may have changed, as with set_begin_index.
            self.__dict__["_plan"] = None
            self.__dict__["_revision"] = str(next(_changes))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_plan", "_read")}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}{_described(self)}>"


class _PlannedList(NamedTuple):
    """The plan of a list, and what it was made for."""

    ids: tuple[int, ...]
    revisions: tuple[Any, ...]
    plan: Plan
    processors: list[Any]
    """Kept with all that their attributes hold, so that nothing else gets their ids."""
    values: list[Any]
    staged: bool
    """Whether all of them are ``StagedProcessor``, and tell themselves of a change."""
    read: _Versions
    """What the plan has taken over from their tensors."""


def _takes(processor: Any, name: str) -> bool:
    """Whether a processor may have an argument of this name."""
    try:
        parameters = signature(processor.__call__).parameters
    except (TypeError, ValueError):  # written in C, and says nothing
        return True
    return name in parameters or any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())


@lru_cache
def _meant(name: str) -> str | None:
    """The position that somebody may have misspelt; None where the name is another one altogether."""
    return next(iter(get_close_matches(name, ("prompt_length", "cache_position"), 1, 0.8)), None)


class LogitsProcessorList(_Planned, _TransformersList):
    """``LogitsProcessorList`` of transformers that runs as one plan.

    transformers' own processors in it run as fastlogits' do. Given to ``model.generate(logits_processor=...)``, it
    tells its first-step processors where each run starts: ``generate`` iterates the list before the first step, and
    gets processors made for that run.

    Example:
        >>> processors = LogitsProcessorList([])
        >>> processors(torch.tensor([[1, 2]]), torch.zeros(1, 3))
        tensor([[0., 0., 0.]])
    """

    _planned: _PlannedList | None = None

    def __init__(self, iterable: Iterable[Any] = (), /) -> None:
        """Make a list of some processors.

        Raises:
            TypeError: they can't be iterated over, as one processor that isn't in a list.
        """
        try:
            super().__init__(iterable)
        except TypeError as error:
            if isinstance(iterable, Iterable):
                raise
            name = type(iterable).__name__
            raise TypeError(
                f"processors must be a list of processors, got {name}: put it into one, [{name}(...)]"
            ) from error

    @property
    def plan(self) -> Plan:
        """The compiled plan of the processors that the list holds now."""
        processors = list(super().__iter__())
        if torch.compiler.is_compiling():
            ids = tuple(map(id, processors))
            self._trace_plan(ids, tuple(map(_traced_revision, processors, self._attributes(ids))))
        else:
            planned = self._planned
            # What is asked at each step: whether these are the same processors, and none of them has changed.
            if (
                planned is not None
                and planned.staged
                and len(processors) == len(planned.processors)
                and not _is_written(planned.read)
            ):
                for processor, known, revision in zip(processors, planned.processors, planned.revisions, strict=True):
                    if processor is not known or processor._revision is not revision:
                        break
                else:
                    return planned.plan
            self._make_plan(tuple(map(id, processors)), tuple(map(_revision, processors)))
        assert self._planned is not None
        return self._planned.plan

    @constant
    def _attributes(self, ids: tuple[int, ...]) -> tuple[tuple[tuple[str, float | None], ...], ...]:
        """The attributes of each processor, and their values where they are numbers."""
        made = [getattr(processor, "__dict__", {}).items() for processor in super().__iter__()]
        return tuple([tuple([(k, v if isinstance(v, (int, float)) else None) for k, v in items]) for items in made])

    @constant
    def _trace_plan(self, ids: tuple[int, ...], revisions: tuple[Any, ...]) -> None:
        self._make_plan(ids, tuple(map(_revision, super().__iter__())))

    def _make_plan(self, ids: tuple[int, ...], revisions: tuple[Any, ...]) -> None:
        planned = self._planned
        if planned is None or (planned.ids, planned.revisions) != (ids, revisions) or _is_written(planned.read):
            processors = list(super().__iter__())
            members = [self._member_of(processor) for processor in checked_processors(processors)]
            pairs = zip(processors, members, strict=True)
            read = tuple(each for processor, member in pairs for each in _read_once(processor, member.stage))
            values = [list(getattr(processor, "__dict__", {}).values()) for processor in processors]
            staged = all(isinstance(processor, StagedProcessor) for processor in processors)
            self._planned = _PlannedList(ids, revisions, Plan.compile(members), processors, values, staged, read)

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        *,
        prompt_length: Index | None = None,
        cache_position: Index | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Process the scores of one step with all processors in order.

        Args:
            input_ids: tokens so far, int32 or int64 ``(B, L)``.
            scores: logits ``(B, V)``; never written.
            prompt_length: number of tokens of the run's prompt; see ``for_run``. First-step processors need it.
            cache_position: index of the newest token; by default from the length of ``input_ids``.
            **kwargs: what processors with more than two parameters ask for, as in transformers.

        Raises:
            ValueError: see ``StagedProcessor``; or an argument that a processor asks for is missing.
            TypeError: an argument that looks like one of the two above, and that no processor asks for.
        """
        run = None
        self._check_names(kwargs)
        if prompt_length is not None or cache_position is not None:
            run = Run.of(prompt_length, cache_position)
            kwargs |= positions_for_others(prompt_length, cache_position)
        return self.plan(input_ids, scores, run, kwargs)

    def _check_names(self, names: Iterable[str]) -> None:
        for name in names:
            if _meant(name) is not None and not any(_takes(each, name) for each in self):
                raise TypeError(f"there is no argument {name!r}: did you mean {_meant(name)}?")

    def apply_(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        *,
        prompt_length: Index | None = None,
        cache_position: Index | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The same in place; returns ``scores``, whose dtype the result is rounded to where it is another.

        Args:
            input_ids: see ``__call__``, as all that follow.
            scores: logits ``(B, V)``, which are overwritten.
            prompt_length: number of tokens of the run's prompt.
            cache_position: index of the newest token.
            **kwargs: what processors with more than two parameters ask for.

        Raises:
            ValueError: see ``__call__``; or the result is of another shape.
            TypeError: see ``__call__``.
        """
        run = None
        self._check_names(kwargs)
        if prompt_length is not None or cache_position is not None:
            run = Run.of(prompt_length, cache_position)
            kwargs |= positions_for_others(prompt_length, cache_position)
        return self.plan(input_ids, scores, run, kwargs, in_place=True)

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        if assembles(frame):
            return self._for_generate(frame.f_locals)
        return iter(super().__iter__())

    def _for_generate(self, merging: dict[str, Any]) -> Iterator[Any]:
        """The processors of one run: one for all between two that fastlogits doesn't know, and these as they are.

        ``generate`` drops each processor of its own that it finds in the list too, by its exact type: those are
        handed to it as transformers' own, and once.
        """
        made = {type(processor) for processor in merging.get("default_list", ())}
        present = {type(processor) for processor in merging.get("final_list", ())}
        rest = []
        for processor in super().__iter__():
            twin = their_class(type(processor))
            if twin in made:
                if twin not in present:
                    yield processor if type(processor) is twin else as_theirs(processor, twin)
            else:
                rest.append(processor)
        same = LogitsProcessorList(rest)
        if len(rest) == len(self):
            _ = self.plan
            same._planned = self._planned  # the launches and their tables serve all runs
        for number, piece in enumerate(same.plan.pieces):
            yield piece.processor if isinstance(piece, Barrier) else RunProcessor(_Piece(same, number), Run())

    def _member_of(self, processor: Any) -> Member:
        return member_of(processor)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_planned"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list.__repr__(self)})"

    # A part of such a list, or two of them, are one too; lists of a run become plain ones, since a run is begun once.

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Any: ...
    @overload
    def __getitem__(self, index: slice, /) -> LogitsProcessorList: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> Any:
        found: Any = list.__getitem__(self, index)
        return LogitsProcessorList(found) if isinstance(index, slice) else found

    def __add__(self, others: Any, /) -> Any:
        joined = list.__add__(self, others)
        return joined if joined is NotImplemented else LogitsProcessorList(joined)

    def __radd__(self, others: Any, /) -> Any:
        return LogitsProcessorList([*others, *list.__iter__(self)]) if isinstance(others, list) else NotImplemented

    def __mul__(self, count: SupportsIndex, /) -> LogitsProcessorList:
        return LogitsProcessorList(list.__mul__(self, count))

    def copy(self) -> LogitsProcessorList:
        """A list of the same processors."""
        return self[:]


class _Piece:
    """What stands between two barriers of a list.

    Args:
        processors: the list.
        number: which of the pieces of its plan it is.
    """

    def __init__(self, processors: LogitsProcessorList, number: int) -> None:
        self._processors, self._number = processors, number

    @property
    def plan(self) -> Plan:
        """The plan of the piece, as the processors are now."""
        piece = self._processors.plan.pieces[self._number]
        assert isinstance(piece, Plan)
        return piece


def positions_for_others(prompt_length: Index | None, cache_position: Index | None) -> dict[str, Any]:
    """What a call tells of its position, for processors with more than two parameters."""
    told = {"prompt_length": prompt_length, "cache_position": cache_position}
    return {name: index for name, index in told.items() if index is not None}


def their_class(cls: type) -> type | None:
    """The class of transformers that ``cls`` is or stands for."""
    name = cls.__name__
    twin = getattr(theirs, name, None)
    if twin is cls or (
        twin is not None and cls.__module__.startswith("fastlogits.processors.") and issubclass(cls, twin)
    ):
        return twin
    return None


def as_theirs(processor: Any, twin: type) -> Any:
    """A processor of transformers' own class with the same attributes, also those that are set later."""
    same: Any = object.__new__(twin)
    same.__dict__ = processor.__dict__
    return same


def _described(processor: StagedProcessor) -> str:
    """What a processor does, in a few words; nothing for one that can't say so yet."""
    try:
        return ": " + ", ".join(stage.describe() for stage in stages_of(processor.stage()))
    except Exception:  # a repr never raises, whatever an attribute has been set to
        return ""


_Versions: TypeAlias = tuple[tuple[torch.Tensor, int], ...]
"""Tensors whose numbers a plan has taken over, and their versions then."""


def _is_written(read: _Versions) -> bool:
    """Whether anybody has written to such a tensor since."""
    return bool(read) and any(tensor._version != version for tensor, version in read)


def _read_once(processor: Any, stage: Stage) -> _Versions:
    """A processor's tensors that are read when a plan is made: token ids, as far as its stage doesn't hold them."""
    if isinstance(stage, Opaque):
        return ()
    held: set[int] = set()

    def hold(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            held.add(id(value))
        elif isinstance(value, (tuple, list)):
            for each in value:
                hold(each)
        elif is_dataclass(value) and not isinstance(value, (type, Given, AllowFrom)):  # whose ids are put into tables
            for field in fields(value):
                hold(getattr(value, field.name))

    hold(stage)
    values = getattr(processor, "__dict__", {}).values()
    tensors = [each for each in values if isinstance(each, torch.Tensor) and not each.is_floating_point()]
    return tuple((each, each._version) for each in tensors if id(each) not in held and not each.is_inference())


def _revision(processor: Any) -> Any:
    """Something that changes when an attribute of the processor is set."""
    if isinstance(processor, StagedProcessor):
        return processor._revision
    if isinstance(processor, RunProcessor):  # what it runs may be planned for itself, as if it stood here
        return _revision(processor._planned)
    return tuple([id(value) for value in getattr(processor, "__dict__", {}).values()])


_GUARDED = (str, list, tuple, dict, type(None))


def _traced_revision(processor: Any, attributes: tuple[tuple[str, float | None], ...]) -> Any:
    """What ``torch.compile`` has to guard; not every version lists attributes, or knows the identity of each value."""
    if isinstance(processor, RunProcessor):
        processor = processor._planned
    if isinstance(processor, StagedProcessor):
        return processor._revision
    made: list[Any] = []
    for name, number in attributes:
        value = getattr(processor, name)
        if number is not None:
            if value == number:  # a number that has changed before is a symbol, and the comparison its guard
                made.append(number)
        else:
            made.append(value if isinstance(value, _GUARDED) else id(value))
    return tuple(made)


def _staged(processor: StagedProcessor) -> Member:
    original = super(StagedProcessor, processor).__call__
    is_theirs = getattr(original, "__func__", None) is not LogitsProcessor.__call__
    return Member(type(processor).__name__, processor.stage(), original if is_theirs else None)


def member_of(processor: Any) -> Member:
    """What a processor is to the plan of a list."""
    cls = type(processor)
    name = cls.__name__
    if isinstance(processor, StagedProcessor):
        # A subclass that overrides the call does more than its stage says.
        if cls.__call__ is StagedProcessor.__call__:
            return _staged(processor)
    elif getattr(theirs, name, None) is cls:
        twin = getattr(import_module("fastlogits"), name, None)
        if twin is not None and issubclass(twin, StagedProcessor) and twin.__call__ is StagedProcessor.__call__:
            return Member(name, twin.stage(processor), processor)
    return Member(name, Opaque(processor), processor)
