"""Truncations: by themselves, and on a GPU together with what stands before and after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastlogits_kernels.rules import check_rules
from fastlogits_kernels.runtime.recent import hold, is_capturing, recent
from fastlogits_kernels.selection import launch
from fastlogits_kernels.truncate.dispatch import truncate

from fastlogits.compilers import constant
from fastlogits.plan.part import NO_ARGUMENTS, Cost, Merge, Part, placed
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member, Truncate


class Truncation(Part):
    """Truncations that follow each other, as one: they act on the same tokens."""

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__(members)
        self.rules = tuple(
            rule for member in members if isinstance(member.stage, Truncate) for rule in member.stage.rules
        )

    def process(
        self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Truncate the scores of one call."""
        return truncate(scores, self.rules)

    def describe(self) -> str:
        """The launch in a line, for ``explain()``."""
        return f"truncate: {len(self.members)} truncations in one" if len(self.members) > 1 else "truncate"

    def merges(self) -> list[Merge]:
        """All of its truncations, where they are several."""
        names = tuple(member.name for member in self.members)
        return [Merge("truncations look at one order of the tokens, each at what is left", names)] if names[1:] else []


class Selection(Part):
    """Truncations, with a fold before them and a normalisation after them, in kernels that share one pass.

    Args:
        truncation: the truncations.
        before: the fold that stands before them; None for none.
        after: the normalisation that stands after them; None for none.
        first: the number of the first of these parts, for people.
    """

    takes_in_others = True

    def __init__(
        self, truncation: Truncation, before: Pointwise | None = None, after: Part | None = None, first: int = 1
    ) -> None:
        self._parts = tuple(part for part in (before, truncation, after) if part is not None)
        super().__init__([member for part in self._parts for member in part.members])
        self._before, self._after, self._first = before, after, first
        self._rules = truncation.rules
        self._kept: dict[tuple[int, torch.device], launch.Selection] = {}
        self._captured: list[launch.Selection] = []
        self._last: tuple[int, torch.device, launch.Selection] | None = None
        self._by_row = any(isinstance(rule.value, torch.Tensor) for rule in self._rules)

    @property
    def inner_parts(self) -> tuple[Part, ...]:
        """The fold, the truncations and the normalisation."""
        return self._parts

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Process the scores of one call, on a CPU part by part."""
        if launch.takes_scores(scores):
            return placed(self._select(input_ids, scores, run), scores, in_place)
        processed = scores
        for part in self._parts:
            processed = part(input_ids, processed, run, kwargs, in_place and processed is scores)
        return processed

    def _select(self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None) -> torch.Tensor:
        mates = None
        if self._before is not None and self._before.mixes:
            scores, mates = self._before.halves(input_ids, scores)
        if self._by_row:
            check_rules(scores, self._rules)
        device = scores.device
        last = None if torch.compiler.is_compiling() else self._last
        if last is not None and last[0] == scores.shape[1] and last[1] == device:
            selection = last[2]
        else:
            selection = self._selection(scores.shape[1], device)
        capturing = is_capturing(device)
        if capturing:
            hold(self._captured, selection)
        if self._before is None:
            return launch.select(scores, selection)
        return launch.select(scores, selection, *self._before.inputs(input_ids, scores, run, capturing, mates))

    def _selection(self, V: int, device: torch.device) -> launch.Selection:
        self._make_selection(V, device)
        selection = self._kept.get((V, device))
        while selection is None:  # other threads have made many meanwhile
            self._make_selection(V, device)
            selection = self._kept.get((V, device))
        if not torch.compiler.is_compiling():
            self._last = (V, device, selection)
        return selection

    @constant
    def _make_selection(self, V: int, device: torch.device) -> None:
        normalise = self._after is not None
        recent(self._kept, (V, device), lambda: launch.Selection(self._rules, V, device, normalise=normalise))

    def describe(self) -> str:
        """Which parts it takes together, for ``explain()``."""
        numbers = self._numbers
        last = numbers[-1] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} and {numbers[-1]}"
        parts = f"part {last} takes" if len(numbers) == 1 else f"parts {last} share"
        reads = "one read" if self.cost().reads == 1 else f"{self.cost().reads} reads"
        return f"{parts} {reads} and one write of the logits, after a look at a sample of each row"

    def merges(self) -> list[Merge]:
        """The parts that its kernels take together."""
        parts = [f"part {number}" for number in self._numbers]
        found = []
        if self._before is not None:
            found.append(Merge("a pointwise map is done wherever a logit is read", (parts[0], parts[1])))
        if self._after is not None:
            found.append(Merge("the sum over a row is that over the tokens kept", (parts[-2], parts[-1])))
        return found

    @property
    def _numbers(self) -> list[str]:
        return [str(self._first + i) for i in range(len(self._parts))]

    def cost(self) -> Cost:
        """The launches of its kernels, and the fold's search."""
        selection = launch.Selection(self._rules, 2**20, torch.device("cpu"))
        sums = selection.sums > 0
        searches = self._before is not None and self._before.searches
        values = 0 if self._before is None else self._before.cost().row_values
        return Cost(selection.launches + searches, 1 + sums, row_values=values)
