"""The processors of any list, each as a plan of its own, and none of them changed by being looked at."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from fastlogits.plan import Plan
from fastlogits.processors.base import member_of
from fastlogits.run import Run

if TYPE_CHECKING:
    from fastlogits.position import Index
    from fastlogits.stages import Member


def fresh_members(processors: Any) -> list[Member]:
    """Copies of some processors, so that one that carries a state from call to call keeps its own.

    Args:
        processors: a list of fastlogits or transformers, any iterable of processors, or one processor.
    """
    listed = list(processors) if isinstance(processors, Iterable) else [processors]
    return [member_of(_copied(processor)) for processor in listed]


def single_plans(members: Iterable[Member]) -> list[Plan]:
    """A plan for each of them alone."""
    return [Plan.compile([member]) for member in members]


def run_of(prompt_length: Index | None, cache_position: Index | None) -> Run | None:
    """The run that the positions tell; None where they tell none."""
    return None if prompt_length is None and cache_position is None else Run(prompt_length, cache_position)


def checked_scores(scores: torch.Tensor) -> torch.Tensor:
    """``scores``, if they are logits ``(B, V)``.

    Raises:
        ValueError: they are of another shape or dtype.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"scores must be floating-point of shape (B, V), got {scores.dtype} of {tuple(scores.shape)}")
    return scores


def _copied(processor: Any) -> Any:
    """A copy that shares what is large and isn't written: models."""
    shared: dict[int, Any] = {}
    for value in getattr(processor, "__dict__", {}).values():
        for each in value.values() if isinstance(value, dict) else [value]:
            if isinstance(each, torch.nn.Module):
                shared[id(each)] = each
    try:
        return copy.deepcopy(processor, shared)
    except Exception:  # a lock, a file, a generator: what can't be copied is looked at as it is
        return processor
