"""A look at the scores of one call, beside the parts that process them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fastlogits_kernels.runtime.launcher import is_collecting

from fastlogits.plan.part import NO_ARGUMENTS, Cost, Part
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member, Observe


class Observation(Part):
    """A look at what some parts make of the scores, in the one call of a run that it is for.

    It stands before those parts, which come behind it as if it weren't there, and so may fuse with what follows. In
    its own call they run once more, for it.

    Args:
        member: the processor that looks.
        stage: its stage.
        before: parts that have no state, and stand in front of the processor in the user's order.
    """

    def __init__(self, member: Member, stage: Observe, before: Sequence[Part]) -> None:
        super().__init__([member])
        self._stage, self._before = stage, before

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """The scores of one call, as they are."""
        if input_ids.shape[1] == self._stage.length or is_collecting():
            seen = scores
            for part in self._before:
                seen = part(input_ids, seen, run, kwargs)
            if not is_collecting():
                self._stage.function(input_ids, seen)
        return scores

    def describe(self) -> str:
        """When it acts, for ``explain()``."""
        count = sum(len(part.members) for part in self._before)
        what = f"what the next {count} stages make of the scores" if count else "the scores"
        return f"observe: where input_ids have {self._stage.length} tokens, {what}"

    def cost(self) -> Cost:
        """Nothing, but in its own call."""
        return Cost(0, 0, 0)
