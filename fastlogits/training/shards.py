"""Log-probabilities where the vocabulary is split over ranks."""

from __future__ import annotations

from typing import Any

import torch
from fastlogits_kernels.training.reference import Task


def local_logits(logits: Any, group: Any) -> tuple[Any, Any]:
    """This rank's logits, and the group over which the vocabulary is split."""
    return logits, group


def sharded_logprobs(
    logits: torch.Tensor, task: Task, entropy: bool, in_place: bool, group: Any
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probabilities of targets of a vocabulary that is split over a group."""
    raise ValueError("group must be None, got one: split vocabularies are not supported yet")
