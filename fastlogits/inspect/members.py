"""The processors of any list, each as a plan of its own. Looking at them changes none of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastlogits.plan import causes
from fastlogits.plan.plan import Plan
from fastlogits.processors.base import member_of

if TYPE_CHECKING:
    from fastlogits.plan.stages import Member


def listed(processors: Any) -> list[Any]:
    """The processors of a list of fastlogits or transformers, of any iterable, or a single processor.

    Raises:
        ValueError: a class or a list is among them.
        AttributeError: something else among them can't be called.
    """
    return list(causes.checked_processors(processors if isinstance(processors, Iterable) else [processors]))


def fresh_members(processors: Sequence[Any]) -> list[Member]:
    """Copies of processors, so that a processor with state keeps its own.

    Raises:
        CannotBeCopiedError: one of them can't be copied; it names the first.
    """
    return [member_of(_copied(number, processor)) for number, processor in enumerate(processors)]


def copyable(processors: Sequence[Any]) -> tuple[int, str]:
    """How many processors can be copied before the first that can't, and why that one can't."""
    try:
        fresh_members(processors)
    except CannotBeCopiedError as error:
        return error.number, error.reason
    return len(processors), ""


class CannotBeCopiedError(ValueError):
    """A processor that can't be copied, so that a run would use it up.

    Args:
        number: place of the processor in the list, from 0.
        name: its class name.
        reason: why it can't be copied.
    """

    def __init__(self, number: int, name: str, reason: str) -> None:
        self.number, self.reason = number, reason
        super().__init__(
            f"processors must be copyable, because copies of them run and they stay as they are, got {name} (number "
            f"{number + 1}): {reason}. Leave it out, or give it a __deepcopy__"
        )


def single_plans(members: Iterable[Member]) -> list[Plan]:
    """A plan for each processor alone."""
    return [Plan.compile([member]) for member in members]


def checked_scores(scores: torch.Tensor) -> torch.Tensor:
    """``scores``, if they are logits ``(B, V)``.

    Raises:
        ValueError: they are of another shape or dtype.
    """
    wrong = causes.of_scores(scores)
    if wrong is not None or scores.ndim != 2:
        raise ValueError(
            wrong or f"scores must be floating-point of shape (B, V), got {scores.dtype} of {tuple(scores.shape)}"
        )
    return scores


def _copied(number: int, processor: Any) -> Any:
    """A copy that shares models, which are large and not written."""
    shared: dict[int, Any] = {}
    for value in getattr(processor, "__dict__", {}).values():
        for each in value.values() if isinstance(value, dict) else [value]:
            if isinstance(each, torch.nn.Module):
                shared[id(each)] = each
    try:
        return copy.deepcopy(processor, shared)
    except Exception as error:  # a lock, a file, a generator, a matcher in C++
        reason = f"it can't be copied ({type(error).__name__}: {error})"
        raise CannotBeCopiedError(number, type(processor).__name__, reason) from error
