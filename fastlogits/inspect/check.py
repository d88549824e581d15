"""Whether a plan gives the scores of transformers: a list run both ways, and the first difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlogits.checks import finite_number
from fastlogits.inspect.members import checked_scores, copyable, fresh_members, listed, single_plans
from fastlogits.plan.plan import Plan
from fastlogits.plan.run import PositionError, Run
from fastlogits.plan.stages import Member, Opaque, Truncate

if TYPE_CHECKING:
    from fastlogits.plan.position import Index

_UNITS = 16
"""Units in the last place by which scores may differ: a plan rounds once, transformers after each processor."""
_SORTED = ("top_p", "typical", "top_h")
"""Rules that keep as many tokens as they need, so that only some of a tie may be kept."""


@dataclass(frozen=True)
class Difference:
    """Where the two results differ.

    Args:
        number: place of the processor in the list, from 0.
        processor: its class name.
        row: the first row that differs; None if there are no scores to compare.
        token: the first token of that row that differs.
        expected: its score in transformers.
        found: its score from the plan.
        count: how many scores differ.
        reason: in words, if there are no scores to compare.
    """

    number: int
    processor: str
    row: int | None = None
    token: int | None = None
    expected: float | None = None
    found: float | None = None
    count: int = 0
    reason: str = ""

    def __str__(self) -> str:
        where = f"{self.processor} (processor {self.number + 1})"
        if self.reason:
            return f"{where}: {self.reason}"
        one = f"row {self.row}, token {self.token}: transformers {self.expected:.9g}, fastlogits {self.found:.9g}"
        return f"{where}: {one}; {self.count:,} score{'' if self.count == 1 else 's'} of its result differ"


@dataclass(frozen=True)
class Check:
    """The result of a check; true if something was compared and nothing differs.

    Args:
        difference: the first difference; None for none.
        compared: the processors that were compared with those of transformers.
        not_compared: the others, each with the reason.
        largest: the largest difference of two finite scores at the end of the list.
        notes: what differs and is allowed to, such as other tokens of a tie.
        fused: whether processors ran fused, and so were compared with the same processors one by one.
    """

    difference: Difference | None
    compared: tuple[str, ...]
    not_compared: tuple[tuple[str, str], ...]
    largest: float
    notes: tuple[str, ...] = ()
    fused: bool = False

    @property
    def compared_nothing(self) -> bool:
        """Whether there was nothing to compare: no processor of transformers, and none that ran fused."""
        return self.difference is None and not self.compared and not self.fused

    def __bool__(self) -> bool:
        return self.difference is None and not self.compared_nothing

    def __str__(self) -> str:
        if self.difference is not None:
            lines = [f"different, first in {self.difference}"]
        elif self.compared_nothing:
            lines = ["nothing was compared" + ("" if self.not_compared else ": there are no processors")]
        else:
            head = f"the same: {len(self.compared)} compared with transformers"
            lines = [f"{head}, the largest difference of two scores is {self.largest:.3g}"]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"not compared: {name}: {reason}" for name, reason in self.not_compared]
        return "\n".join(lines)


def check(
    processors: Any,
    input_ids: torch.Tensor,
    scores: torch.Tensor,
    *,
    prompt_length: Index | None = None,
    cache_position: Index | None = None,
    tolerance: float | None = None,
) -> Check:
    """Run a list through transformers, one processor after the other, and as one plan, and compare the scores.

    Both run on the device of the scores. Both must keep the same tokens; their scores may differ by rounding. If the
    results differ, the first processor that makes them differ is found. The processors themselves are not changed:
    copies of them run, so that both begin in the same state. A processor that can't be copied is not compared, nor are
    those behind it, since running it would use it up.

    Tokens may tie at the cut-off of a nucleus. Both keep the same number of them, but in transformers a sort decides
    which, and it is not stable on every machine. Such a row is a note, not a difference. A token whose cumulative
    probability is within rounding of the cut-off may be reported; its score shows that.

    Args:
        processors: a list of fastlogits or transformers, any iterable of processors, or one processor.
        input_ids: tokens so far, int32 or int64 ``(B, L)``.
        scores: logits ``(B, V)``; never written.
        prompt_length: number of tokens of the run's prompt, which first-step processors ask for.
        cache_position: index of the newest token; by default from the length of ``input_ids``.
        tolerance: how far scores may be apart, relative to the larger one, or absolutely if that is below 1. None for
            16 units in the last place of the scores' dtype.

    Returns:
        The result: true if something was compared and nothing differs. If nothing could be compared it is false, and
        ``compared_nothing`` is true.

    Raises:
        ValueError: scores that are no logits ``(B, V)``, or a negative tolerance; a class or a list among the
            processors; impossible positions; or a processor needs the step of the run, and nothing says where the run
            starts.
        AttributeError: something among them is no processor.

    Example:
        >>> from fastlogits import TemperatureLogitsWarper, TopKLogitsWarper
        >>> processors = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(2)]
        >>> print(check(processors, torch.tensor([[0]]), torch.tensor([[1.0, 3.0, 2.0]])))
        the same: 2 compared with transformers, the largest difference of two scores is 0
    """
    unit = torch.finfo(checked_scores(scores).dtype).eps
    tolerance = _UNITS * unit if tolerance is None else finite_number("tolerance", tolerance, 0)
    run = Run.of(prompt_length, cache_position)
    everything = listed(processors)
    count, uncopyable = copyable(everything)
    usable = everything[:count]
    members = fresh_members(usable)
    reasons = _reasons(members, _is_elsewhere(cache_position, input_ids))
    alone = _one_by_one(members, reasons, input_ids, scores, run)
    compared, not_compared = _sorted_out(members, reasons, alone)
    if count < len(everything):
        name = type(everything[count]).__name__
        behind = [
            (type(each).__name__, f"it stands behind {name}, which isn't run") for each in everything[count + 1 :]
        ]
        not_compared = (*not_compared, (name, f"{uncopyable}, and running it would use it up"), *behind)
    comparison = _Comparison(usable, alone, input_ids, scores, run, tolerance)
    difference = comparison.first_difference()
    fused, largest = comparison.fused_and_largest(difference) if alone.scores else (False, 0.0)
    return Check(difference, compared, not_compared, largest, tuple(comparison.ties.notes), fused)


class _Alone(NamedTuple):
    """What the processors give one by one."""

    scores: list[torch.Tensor]
    """After each processor, up to the first that raises."""
    failure: Exception | None
    """What that one raises; None if none does."""


class _Comparison:
    """Processors as a plan, compared with the same processors one by one."""

    def __init__(
        self,
        processors: Sequence[Any],
        alone: _Alone,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None,
        tolerance: float,
    ) -> None:
        self._processors, self._alone, self._tolerance = processors, alone, tolerance
        self._input_ids, self._scores, self._run = input_ids, scores, run
        self.ties = _Ties(tolerance)

    def first_difference(self) -> Difference | None:
        total = len(self._alone.scores) + (self._alone.failure is not None)
        difference = self._difference(total) if total else None
        if difference is None and not self.ties.notes:
            return None
        # From the beginning: a tie that is broken in another way makes a difference to all that follows.
        self.ties = _Ties(self._tolerance)
        found = (self._difference(count) for count in range(1, total + 1))
        return next((each for each in found if each is not None), None)

    def fused_and_largest(self, difference: Difference | None) -> tuple[bool, float]:
        """Whether processors run fused, and the largest difference of two finite scores at the end."""
        plan = Plan.compile(fresh_members(self._processors[: len(self._alone.scores)]))
        fused = any(len(part.members) > 1 for part in (plan.parts if self._scores.is_cuda else plan.inner_parts))
        if difference is not None or self._alone.failure is not None:
            return fused, 0.0
        apart = (plan(self._input_ids, self._scores, self._run).double() - self._alone.scores[-1].double()).abs()
        apart = apart[~self.ties.rows_of(apart)]
        return fused, float(apart[apart.isfinite()].max()) if apart.isfinite().any() else 0.0

    def _difference(self, count: int) -> Difference | None:
        """The difference that the first ``count`` processors make as a plan."""
        members = fresh_members(self._processors[:count])
        last, failure = members[-1], self._alone.failure
        raised_alone = count - 1 == len(self._alone.scores)
        try:
            found = Plan.compile(members)(self._input_ids, self._scores, self._run)
        except Exception as error:
            if raised_alone and type(error) is type(failure):
                return None
            return Difference(count - 1, last.name, reason=f"fastlogits raised {type(error).__name__}: {error}")
        if raised_alone:
            return Difference(count - 1, last.name, reason=f"transformers raised {type(failure).__name__}: {failure}")
        return self.ties.compared(count - 1, last, self._alone.scores[count - 1], found)


def _is_elsewhere(cache_position: Index | None, input_ids: torch.Tensor) -> bool:
    """Whether the newest token isn't the last of ``input_ids``, from which transformers takes the position."""
    if cache_position is None or input_ids is None:
        return False
    return bool((torch.as_tensor(cache_position) != input_ids.shape[-1] - 1).any())


def _reasons(members: list[Member], elsewhere: bool) -> list[str | None]:
    """Why each of the processors has nothing in transformers to be compared with; None where it has."""
    reasons: list[str | None] = []
    for member in members:
        if isinstance(member.stage, Opaque):
            reasons.append("fastlogits runs it as it is")
        elif member.original is None:
            reasons.append("transformers has no such processor; what it does alone is taken for right")
        elif elsewhere and member.stage.needs_history:
            reasons.append("transformers knows no cache_position; what it does alone is taken for right")
        else:
            reasons.append(None)
    return reasons


def _sorted_out(
    members: list[Member], reasons: list[str | None], alone: _Alone
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Which processors have something to be compared with, and why the others haven't."""
    compared, others = [], []
    for number, (member, reason) in enumerate(zip(members, reasons, strict=True)):
        if number == len(alone.scores):
            others.append((member.name, f"by itself it raises {type(alone.failure).__name__}: {alone.failure}"))
        elif number > len(alone.scores):
            others.append((member.name, "it stands behind one that raises"))
        elif reason is not None:
            others.append((member.name, reason))
        else:
            compared.append(member.name)
    return tuple(compared), tuple(others)


def _one_by_one(
    members: list[Member],
    reasons: list[str | None],
    input_ids: torch.Tensor,
    scores: torch.Tensor,
    run: Run | None,
) -> _Alone:
    """Run the processors one by one: those of transformers where it has them."""
    found: list[torch.Tensor] = []
    try:
        for member, reason, plan in zip(members, reasons, single_plans(members), strict=True):
            # A copy, because some processors of transformers write their input.
            before = (found[-1] if found else scores).clone()
            if reason is None and member.original is not None:
                found.append(member.original(input_ids, before))
            else:
                found.append(plan(input_ids, before, run))
    except PositionError:
        raise  # the caller has to give other positions
    except Exception as error:
        return _Alone(found, error)
    return _Alone(found, None)


class _Ties:
    """Compares scores row by row. Rows in which a tie was broken in another way are left out from there on."""

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._rows: torch.Tensor | None = None
        self.notes: list[str] = []

    def compared(self, number: int, member: Member, expected: torch.Tensor, found: torch.Tensor) -> Difference | None:
        """The first difference that a processor makes, apart from rows in which ties are broken in another way."""
        if expected.shape != found.shape or expected.dtype != found.dtype:
            theirs, ours = (f"{each.dtype} of {tuple(each.shape)}" for each in (expected, found))
            return Difference(number, member.name, reason=f"transformers returned {theirs}, fastlogits {ours}")
        same = self._same(found, expected) | self.rows_of(found).unsqueeze(1)
        if isinstance(member.stage, Truncate) and any(rule.kind in _SORTED for rule in member.stage.rules):
            rows = [
                row for row in (~same.all(1)).nonzero().flatten().tolist() if self._is_tie(expected, found, same, row)
            ]
            if rows:
                self._rows = self.rows_of(found).index_fill(0, torch.tensor(rows, device=found.device), True)
                same |= self._rows.unsqueeze(1)
                self.notes.append(
                    f"{member.name} (processor {number + 1}): in {len(rows)} row{'' if len(rows) == 1 else 's'}, first "
                    f"{rows[0]}, other tokens of the same score are kept at the cut-off than in transformers, and "
                    "as many; these rows are not compared any further"
                )
        if bool(same.all()):
            return None
        row, token = (~same).nonzero()[0].tolist()
        values = float(expected[row, token]), float(found[row, token])
        return Difference(number, member.name, row, token, *values, int((~same).sum()))

    def rows_of(self, scores: torch.Tensor) -> torch.Tensor:
        """Which rows come from rows with a tie broken in another way, bool ``[B]``."""
        B = len(scores)
        if self._rows is None:
            return torch.zeros(B, dtype=torch.bool, device=scores.device)
        # A processor that mixes rows, such as guidance, makes one of several that are so many rows apart.
        return self._rows if len(self._rows) == B else self._rows.reshape(-1, B).any(0)

    def _same(self, found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        within = self._tolerance
        return torch.isclose(found.double(), expected.double(), rtol=within, atol=within, equal_nan=True)

    def _is_tie(self, expected: torch.Tensor, found: torch.Tensor, same: torch.Tensor, row: int) -> bool:
        """Whether the two keep the same number of tokens of one score, but other tokens."""
        differ = ~same[row]
        theirs, ours = expected[row, differ].sort().values, found[row, differ].sort().values
        one_score = all(len(set(values.tolist())) == 2 for values in (theirs, ours))  # and what is filled in
        return one_score and bool(self._same(ours, theirs).all())
