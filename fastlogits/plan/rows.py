"""Functions of whole rows, in torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fastlogits_kernels.runtime.launcher import empty_out, is_collecting

from fastlogits.plan import chance
from fastlogits.plan.causes import kind
from fastlogits.plan.part import Part
from fastlogits.plan.run import Run, known
from fastlogits.plan.stages import Member, Normalise, Rows


class RowsPart(Part):
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
        if self._stage.positioned:
            run = known(run, self.members)
            own = (run,) if self._stage.keeps_notes else ()
            found = self._stage.function(input_ids, scores, *run.locate(input_ids, scores), *own)
        elif self._stage.draws:
            drawn = chance.numbers(len(scores), scores.device, self._stage.generator)
            found = self._stage.function(input_ids, scores, drawn)
        else:
            found = self._stage.function(input_ids, scores)
        # One that mixes rows may return fewer.
        if not isinstance(found, torch.Tensor) or found.shape[-1:] != scores.shape[-1:]:
            raise ValueError(
                f"the function of {self.members[0].name} must return scores of all {scores.shape[-1]} tokens, got "
                f"{kind(found)}"
            )
        return found

    @property
    def launches(self) -> bool:
        """Whether it launches kernels of ours."""
        return self._stage.rehearse is not None

    def describe(self) -> str:
        """The function in a word, for ``explain()``."""
        return f"torch: {self._stage.acts_as}"
