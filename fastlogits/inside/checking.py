"""Whether a plan says what transformers says: a list run both ways, and the first place where they part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastlogits.inside.members import checked_scores, fresh_members, run_of, single_plans
from fastlogits.plan import Plan
from fastlogits.stages import Member, Opaque

if TYPE_CHECKING:
    from fastlogits.position import Index
    from fastlogits.run import Run

# The steps of a plan round once where transformers rounds after each processor: some units in the last place.
_UNITS = 16


@dataclass(frozen=True)
class Difference:
    """Where the two part.

    Args:
        number: place of the processor in the list, from 0.
        processor: its class name.
        row: the first row that differs; None where there are no scores to compare.
        token: the first token of that row that differs.
        expected: its score in transformers.
        found: its score from the plan.
        count: how many scores differ.
        reason: in words, where there are no scores to compare.
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
    """What came out; true where nothing differs.

    Args:
        difference: the first difference; None for none.
        compared: the processors that were compared with those of transformers.
        not_compared: the others, each with the reason.
        largest: the largest difference of two finite scores at the end of the list.
    """

    difference: Difference | None
    compared: tuple[str, ...]
    not_compared: tuple[tuple[str, str], ...]
    largest: float

    def __bool__(self) -> bool:
        return self.difference is None

    def __str__(self) -> str:
        if self.difference is None:
            head = f"the same: {len(self.compared)} compared with transformers"
            lines = [f"{head}, the largest difference of two scores is {self.largest:.3g}"]
        else:
            lines = [f"different, first in {self.difference}"]
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

    Both run on the device of the scores. A token must be kept or dropped by both; other scores may differ by
    rounding. Where the results differ, the beginnings of the list tell the first processor that makes them differ. The
    processors themselves are not changed: copies of them run, so that both begin in the same state.

    A token whose cumulative probability is within rounding of the edge of a nucleus may be reported; its score tells.

    Args:
        processors: a list of fastlogits or transformers, any iterable of processors, or one processor.
        input_ids: tokens so far, int32 or int64 ``(B, L)``.
        scores: logits ``(B, V)``; never written.
        prompt_length: number of tokens of the run's prompt, which first-step processors ask for.
        cache_position: index of the newest token; by default from the length of ``input_ids``.
        tolerance: how far scores may be apart, in parts of the larger one or, below 1, absolutely; by default 16 units
            in the last place of the scores' dtype.

    Raises:
        ValueError: scores that are no logits ``(B, V)``, or a negative tolerance.

    Example:
        >>> from fastlogits import TemperatureLogitsWarper, TopKLogitsWarper
        >>> processors = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(2)]
        >>> print(check(processors, torch.tensor([[0]]), torch.tensor([[1.0, 3.0, 2.0]])))
        the same: 2 compared with transformers, the largest difference of two scores is 0
    """
    if tolerance is None:
        tolerance = _UNITS * torch.finfo(checked_scores(scores).dtype).eps
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    run = run_of(prompt_length, cache_position)
    members = fresh_members(processors)
    expected, failure = _one_by_one(members, input_ids, scores, run)
    compared, not_compared = _sorted_out(members, len(expected), failure)

    def differs(count: int) -> Difference | None:
        """The difference of the first processors as a plan."""
        name = members[count - 1].name
        try:
            found = Plan.compile(fresh_members(processors)[:count])(input_ids, scores, run)
        except Exception as error:
            if count - 1 == len(expected) and type(error) is type(failure):
                return None
            return Difference(count - 1, name, reason=f"fastlogits raised {type(error).__name__}: {error}")
        if count - 1 == len(expected):
            return Difference(count - 1, name, reason=f"transformers raised {type(failure).__name__}: {failure}")
        return _compared(count - 1, name, expected[count - 1], found, tolerance)

    total = len(expected) + (failure is not None)
    difference = differs(total) if total else None
    if difference is not None:
        difference = next((found for count in range(1, total) if (found := differs(count)) is not None), difference)
    largest = 0.0
    if difference is None and failure is None and expected:
        together = Plan.compile(fresh_members(processors))(input_ids, scores, run)
        apart = (together.double() - expected[-1].double()).abs()
        largest = float(apart[apart.isfinite()].max()) if apart.isfinite().any() else 0.0
    return Check(difference, compared, not_compared, largest)


def _sorted_out(
    members: list[Member], done: int, failure: Exception | None
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Which processors have something to be compared with, and why the others haven't."""
    compared, others = [], []
    for number, member in enumerate(members):
        if number == done:
            others.append((member.name, f"by itself it raises {type(failure).__name__}: {failure}"))
        elif number > done:
            others.append((member.name, "it stands behind one that raises"))
        elif isinstance(member.stage, Opaque):
            others.append((member.name, "fastlogits runs it as it is"))
        elif member.original is None:
            others.append((member.name, "transformers has no such processor; what it does alone is taken for right"))
        else:
            compared.append(member.name)
    return tuple(compared), tuple(others)


def _one_by_one(
    members: list[Member], input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None
) -> tuple[list[torch.Tensor], Exception | None]:
    """The scores after each processor, as transformers has them, up to the first that raises, and its error."""
    found: list[torch.Tensor] = []
    for member, plan in zip(members, single_plans(members), strict=True):
        opaque = isinstance(member.stage, Opaque)
        original = None if opaque else member.original
        try:
            # A copy, because some processors of transformers write their input.
            before = (found[-1] if found else scores).clone()
            found.append(plan(input_ids, before, run) if original is None else original(input_ids, before))
        except Exception as error:
            return found, error
    return found, None


def _compared(
    number: int, name: str, expected: torch.Tensor, found: torch.Tensor, tolerance: float
) -> Difference | None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        kinds = [f"{each.dtype} of {tuple(each.shape)}" for each in (expected, found)]
        return Difference(number, name, reason=f"transformers returned {kinds[0]}, fastlogits {kinds[1]}")
    same = torch.isclose(found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if bool(same.all()):
        return None
    row, token = (~same).nonzero()[0].tolist()
    return Difference(
        number, name, row, token, float(expected[row, token]), float(found[row, token]), int((~same).sum())
    )
