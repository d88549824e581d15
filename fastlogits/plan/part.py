"""A part of a plan: what several processors do in one launch, or what one of them does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from fastlogits.plan.run import Run
from fastlogits.plan.stages import Member

NO_ARGUMENTS: Mapping[str, Any] = {}


class Merge(NamedTuple):
    """Processors that act as one."""

    reason: str
    """Why they may."""
    names: tuple[str, ...]
    """Which they are."""


class Cost(NamedTuple):
    """What a part of a plan asks of a GPU in a call, at most."""

    launches: int | None
    """Kernels launched; None where it is some operations of torch, or a processor that nothing is known of."""
    reads: int = 1
    """How often the logits are read."""
    writes: int = 1
    """How often they are written."""
    row_values: int = 0
    """Values of each row that torch computes before its launches, in a few small operations."""


class Part:
    """A part of a plan, which makes new scores that are then copied where they are wanted in place.

    A part that can write in place itself overrides the call instead of ``process``.

    Args:
        members: the processors.
    """

    is_barrier: ClassVar[bool] = False
    """Whether it is a processor that fastlogits knows nothing of."""
    may_write: bool = False
    """Whether it may write what it is given, also where nobody has asked for that."""
    takes_in_others: ClassVar[bool] = False
    """Whether it stands for several parts of the plan, which share kernels on a GPU."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)

    @property
    def inner_parts(self) -> tuple[Part, ...]:
        """The parts that it stands for: those that run one after the other where its kernels don't."""
        return (self,)

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Process the scores of one call; in place unless the result is of another dtype."""
        processed = self.process(input_ids, scores, run, kwargs)
        return placed(processed, scores, in_place and processed.dtype == scores.dtype)

    def process(
        self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None, kwargs: Mapping[str, Any]
    ) -> torch.Tensor:
        """New scores, or ``scores`` itself where nothing changes."""
        raise NotImplementedError

    def describe(self) -> str:
        """What it is, for ``explain()``; then a line each for what it moves, if that is known."""
        raise NotImplementedError

    def merges(self) -> list[Merge]:
        """Which of its processors act as one, and why they may."""
        return []

    def cost(self) -> Cost:
        """What it asks of a GPU."""
        return Cost(None)


class AnyPlan:
    """What runs as a plan: parts, one after the other."""

    parts: Sequence[Part]

    def __call__(
        self,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        run: Run | None = None,
        kwargs: Mapping[str, Any] = NO_ARGUMENTS,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Process the scores of one call."""
        raise NotImplementedError

    @property
    def inner_parts(self) -> list[Part]:
        """The parts as they run where no kernels of several do."""
        return [inner for part in self.parts for inner in part.inner_parts]


def placed(processed: torch.Tensor, scores: torch.Tensor, in_place: bool) -> torch.Tensor:
    """``processed``, or ``scores`` that has been given its values."""
    if not in_place or processed is scores:
        return processed
    if processed.shape != scores.shape:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} can't be processed in place: the result is of shape "
            f"{tuple(processed.shape)}; call the processor instead"
        )
    return scores.copy_(processed)


def apart(tensor: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy of it where it may lie in the memory of ``given``, of which it may be a view."""
    if tensor is given or torch.compiler.is_compiling():  # a compiler drops the copies that aren't needed
        return tensor.clone()
    same = tensor.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return tensor.clone() if same else tensor
