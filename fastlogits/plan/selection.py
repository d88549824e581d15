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
from fastlogits.plan.part import Cost, Merge, Step
from fastlogits.plan.pointwise import FoldLaunch
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member, Truncate


class TruncateLaunch(Step):
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


class SelectLaunch(Step):
    """Truncations, with a fold before them and a normalisation after them, in kernels that share one pass.

    Args:
        truncations: the truncations.
        before: the fold, or the masks, that stand before them; None for none.
        after: the normalisation that stands after them; None for none.
        first: the number of the first of these steps, for people.
    """

    takes_in_others = True

    def __init__(
        self, truncations: TruncateLaunch, before: Step | None = None, after: Step | None = None, first: int = 1
    ) -> None:
        self._steps = [step for step in (before, truncations, after) if step is not None]
        super().__init__([member for step in self._steps for member in step.members])
        self._truncations, self._before, self._after, self._first = truncations, before, after, first
        self._rules = truncations.rules
        self._takes_rules = launch.takes_rules(self._rules)
        self._fold = None if before is None else FoldLaunch(before.members)
        self._kept: dict[tuple[int, torch.device], launch.Selection] = {}
        self._captured: list[launch.Selection] = []
        self._last: tuple[int, torch.device, launch.Selection] | None = None
        self._by_row = any(isinstance(rule.value, torch.Tensor) for rule in self._rules)

    def followed_by(self, after: Step) -> SelectLaunch:
        """The same with a normalisation after it."""
        return SelectLaunch(self._truncations, self._before, after, self._first)

    def process(
        self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """Process the scores of one call."""
        if not (self._takes_rules and launch.takes_scores(scores)):
            for step in self._steps:
                scores = step(input_ids, scores, run, kwargs)
            return scores
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
        if self._fold is None:
            return launch.select(scores, selection)
        return launch.select(scores, selection, *self._fold.inputs(input_ids, scores, run, capturing))

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
        """Which steps it takes together, for ``explain()``."""
        numbers = self._numbers
        last = numbers[-1] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} and {numbers[-1]}"
        steps = f"step {last} takes" if len(numbers) == 1 else f"steps {last} share"
        reads = "one read" if self.cost().reads == 1 else f"{self.cost().reads} reads"
        return f"{steps} {reads} and one write of the logits, after a look at a sample of each row"

    def merges(self) -> list[Merge]:
        """The steps that its kernels take together."""
        steps = [f"step {number}" for number in self._numbers]
        found = []
        if self._before is not None:
            found.append(Merge("a pointwise map is done wherever a logit is read", (steps[0], steps[1])))
        if self._after is not None:
            found.append(Merge("the sum over a row is that over the tokens kept", (steps[-2], steps[-1])))
        return found

    @property
    def _numbers(self) -> list[str]:
        return [str(self._first + i) for i in range(len(self._steps))]

    def cost(self) -> Cost:
        """The launches of its kernels, and the fold's search."""
        if not self._takes_rules:
            return Cost(None)
        selection = launch.Selection(self._rules, 2**20, torch.device("cpu"))
        sums = selection.sums > 0
        searches = self._fold is not None and self._fold.searches
        return Cost(selection.launches + searches, 1 + sums)
