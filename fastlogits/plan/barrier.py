"""Processors that fastlogits doesn't know."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from fastlogits_kernels.runtime.launcher import empty_out, is_collecting

from fastlogits.plan.causes import kind
from fastlogits.plan.part import NO_ARGUMENTS, AnyPlan, Part, apart, placed
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member


class Barrier(Part):
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
            processed = self.processor(input_ids, scores, **{name: kwargs[name] for name in self._extra})
        else:
            processed = self.processor(input_ids, scores)
        if not isinstance(processed, torch.Tensor):
            raise ValueError(f"{self.members[0].name} must return the processed scores, got {kind(processed)}")
        return processed

    @property
    def inner(self) -> AnyPlan | None:
        """The plan of what ``for_run`` has made, which may stand in any list."""
        plan = None if self.may_write else getattr(self.processor, "plan", None)
        return plan if isinstance(plan, AnyPlan) else None

    def describe(self) -> str:
        """The barrier in a word, for ``explain()``."""
        return "barrier"
