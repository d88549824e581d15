"""A list of stages compiled into launches: which of them fuse, in what order they run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from fastlogits_kernels.runtime.backend import has_gradient
from fastlogits_kernels.runtime.launcher import empty_out, is_collecting

from fastlogits.plan.causes import explain_failure
from fastlogits.plan.masks import MaskLaunch, is_plain_mask
from fastlogits.plan.part import NO_ARGUMENTS, Step, apart, placed
from fastlogits.plan.pointwise import FOLDED, FoldLaunch
from fastlogits.plan.run import Run, known
from fastlogits.plan.selection import SelectLaunch, TruncateLaunch
from fastlogits.plan.stages import AllowFrom, Clean, Force, Member, Normalise, Opaque, Rows, Truncate

if TYPE_CHECKING:
    from fastlogits.plan.explain import Explanation


class RowsLaunch(Step):
    """A function of whole rows, in torch."""

    def __init__(self, member: Member, stage: Rows) -> None:
        super().__init__([member])
        self._stage = stage
        self.is_normalisation = isinstance(stage, Normalise)

    def process(
        self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Process the scores of one call."""
        if is_collecting():
            return empty_out(scores) if self._stage.rehearse is None else self._stage.rehearse(scores)
        if not self._stage.positioned:
            return self._stage.function(input_ids, scores)
        run = known(run, self.members)
        own = (run,) if self._stage.keeps_notes else ()
        return self._stage.function(input_ids, scores, *run.locate(input_ids, scores), *own)

    @property
    def launches(self) -> bool:
        """Whether it launches kernels of ours."""
        return self._stage.rehearse is not None

    def describe(self) -> str:
        """The function in a word, for ``explain()``."""
        return f"torch: {self._stage.law}"


class Barrier(Step):
    """A processor that fastlogits doesn't know: it runs as it is, and nothing merges across it."""

    is_barrier = True

    def __init__(self, member: Member, processor: Any) -> None:
        super().__init__([member])
        self.processor = processor
        # Those of fastlogits itself that are none of its stages keep its contract: they never write their input.
        self.may_write = not type(processor).__module__.startswith("fastlogits.")
        parameters = list(inspect.signature(processor.__call__).parameters)
        self._parameters, self._extra = parameters, parameters[2:]
        self.asks_for_more = len(self._extra) > 0
        """Whether it has more than the two parameters that all processors have."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Process the scores of one call; what the processor returns may be any view of them."""
        processed = self.process(input_ids, scores, run, kwargs)
        if not in_place or processed is scores or processed.dtype != scores.dtype:
            return processed
        return placed(apart(processed, scores), scores, in_place)

    def process(
        self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Run the processor as ``LogitsProcessorList`` of transformers does."""
        if is_collecting():
            return empty_out(scores) if self.inner is None else self.inner(input_ids, scores, run, kwargs)
        if self._extra:
            if not all(argument in kwargs for argument in self._extra):
                raise ValueError(
                    f"Make sure that all the required parameters: {self._parameters} for "
                    f"{type(self.processor)} are passed to the logits processor."
                )
            return self.processor(input_ids, scores, **{name: kwargs[name] for name in self._extra})  # type: ignore[no-any-return]
        return self.processor(input_ids, scores)  # type: ignore[no-any-return]

    @property
    def inner(self) -> Plan | None:
        """The plan of what ``for_run`` has made, which may stand in any list."""
        plan = None if self.may_write else getattr(self.processor, "plan", None)
        return plan if isinstance(plan, Plan) else None

    def describe(self) -> str:
        """The barrier in a word, for ``explain()``."""
        return "barrier"


class Plan:
    """Launches and barriers that together do what a list of processors does, in its order."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        members = [member for step in steps for member in step.members]
        originals = [
            (member.original, step) for step in steps for member in step.members if member.original is not None
        ]
        self._originals = originals if len(originals) == len(members) else None
        self.gpu_steps = _selected(steps)
        """The same for kernels: truncations take in what stands before them, and the normalisation after them."""
        self._parts: list[Plan | Barrier] | None = None

    @classmethod
    def compile(cls, members: Iterable[Member]) -> Plan:
        """Fuse what the laws allow."""
        steps: list[Step] = []
        group: list[Member] = []

        def close() -> None:
            if not group:
                return
            first = group[0].stage
            if isinstance(first, Truncate):
                steps.append(TruncateLaunch(group))
            elif isinstance(first, Rows):
                steps.append(RowsLaunch(group[0], first))
            elif isinstance(first, Opaque):
                steps.append(Barrier(group[0], first.processor))
            elif all(is_plain_mask(member.stage) for member in group):
                steps.append(MaskLaunch(group))
            elif isinstance(first, FOLDED):
                steps.append(FoldLaunch(group))
            else:
                raise TypeError(
                    f"{group[0].name}.stage() must return a stage of fastlogits.plan.stages, such as Ban or Rows, got "
                    f"{first!r}"
                )
            group.clear()

        for member in members:
            if not (group and _fuses(group, member)):
                close()
            group.append(member)
        close()
        return cls(steps)

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Processed scores ``[B, V]``: new ones, or ``scores`` itself where nothing changes it or ``in_place``.

        What may write its input, as processors that fastlogits doesn't know, gets a copy of ``scores`` rather than
        ``scores``, unless it was asked for in place.
        """
        try:
            if scores.ndim != 2 or (input_ids is not None and input_ids.ndim != 2):
                originals = self._originals
                if originals is not None:
                    return self._by_originals(originals, input_ids, scores, run, kwargs, in_place)
            if in_place and has_gradient(scores):
                # What the graph keeps of the scores may not be written.
                return placed(self(input_ids, scores.clone(), run, kwargs), scores, True)
            processed = scores
            for step in self.gpu_steps if scores.is_cuda else self.steps:
                if step.may_write and not in_place:
                    processed = apart(processed, scores)
                processed = step(input_ids, processed, run, kwargs, in_place and processed is scores)
            return placed(processed, scores, True) if in_place else processed
        except Exception as error:
            explain_failure(error, [member for step in self.steps for member in step.members], input_ids, scores)
            raise

    def _by_originals(
        self,
        originals: Sequence[tuple[Callable[..., torch.Tensor], Step]],
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None,
        kwargs: Mapping[str, Any],
        in_place: bool,
    ) -> torch.Tensor:
        """What transformers takes and a plan doesn't: other shapes."""
        processed = scores
        for original, step in originals:
            if not in_place and (step.may_write if step.is_barrier else _writes_its_input(original)):
                processed = apart(processed, scores)
            processed = step(input_ids, processed, run, kwargs) if step.is_barrier else original(input_ids, processed)
        if in_place and processed is not scores:
            processed = apart(processed, scores)
        return placed(processed, scores, in_place)

    @property
    def parts(self) -> list[Plan | Barrier]:
        """What must be called by itself, and what stands between as a plan of its own: for who calls one by one."""
        if self._parts is None:
            parts: list[Plan | Barrier] = []
            between: list[Step] = []
            for step in self.steps:
                if isinstance(step, Barrier) and (step.may_write or step.asks_for_more):
                    if between:
                        parts.append((_BeforeWriter if step.may_write else Plan)(between))
                    parts.append(step)
                    between = []
                else:
                    between.append(step)
            if between:
                parts.append(Plan(between))
            self._parts = parts
        return self._parts

    def explain(
        self,
        shape: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.float32,
        bandwidth: float | None = None,
    ) -> Explanation:
        """The plan for people: steps and barriers in order, what each processor does, merges and the law of each.

        Args:
            shape: batch size and vocabulary of logits, to tell the bytes that a GPU has to move for them.
            dtype: their dtype.
            bandwidth: bytes per second of the GPU's memory, to tell the time which that takes at least;
                ``python -m fastlogits doctor`` measures it.

        Returns:
            A string to print; its ``html`` is the same as a table, which notebooks show.

        Raises:
            ValueError: a shape that is none, or a bandwidth that isn't positive.
        """
        from fastlogits.plan.explain import explain  # which reads plans

        return explain(self, shape, dtype, bandwidth)


class _BeforeWriter(Plan):
    """A plan whose result may be written by what is called next, and so never is what it was given."""

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Processed scores ``[B, V]``: new ones, unless ``in_place``."""
        processed = super().__call__(input_ids, scores, run, kwargs, in_place)
        return processed if in_place else apart(processed, scores)


_WRITERS = {
    "RepetitionPenaltyLogitsProcessor", "DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor"
}  # fmt: skip
"""The classes of transformers that write their input, some of them for scores of three dimensions only."""


def _writes_its_input(original: Callable[..., torch.Tensor]) -> bool:
    """Whether an implementation of transformers does."""
    processor = getattr(original, "__self__", original)
    return any(cls.__name__ in _WRITERS for cls in type(processor).__mro__)


def _selected(steps: Sequence[Step]) -> Sequence[Step]:
    """The steps with truncations and their neighbours as one."""
    found: list[Step] = []
    for number, step in enumerate(steps, 1):
        last = found[-1] if found else None
        if isinstance(step, TruncateLaunch):
            before = found.pop() if isinstance(last, (FoldLaunch, MaskLaunch)) else None
            found.append(SelectLaunch(step, before, first=number - (before is not None)))
        elif isinstance(step, RowsLaunch) and step.is_normalisation and isinstance(last, SelectLaunch):
            found[-1] = last.followed_by(step)
        else:
            found.append(step)
    return found


def _fuses(group: list[Member], member: Member) -> bool:
    """Whether a processor goes into one launch with those before it."""
    first, stage = group[0].stage, member.stage
    if isinstance(stage, Truncate):
        return isinstance(first, Truncate)
    if not (isinstance(stage, FOLDED) and isinstance(first, FOLDED)):
        return False
    # A launch reads one set of allowed rows, and bans don't move across what brings a score back from -inf.
    parted = any(isinstance(each.stage, (Clean, Force)) for each in group)
    return not (parted and isinstance(stage, AllowFrom) and any(isinstance(each.stage, AllowFrom) for each in group))
