"""The rows of what stands beside the scores: ids of texts, sources, values of each row."""

from __future__ import annotations

import torch
from fastlogits_kernels._rows import HOW_TO_REPEAT

__all__ = ["HOW_TO_REPEAT", "check_rows"]


def check_rows(name: str, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Refuse ids of other rows than the scores, for what reads the tokens of each row.

    Args:
        name: the processor, for people.
        input_ids: ``(R, L)``.
        scores: ``(B, V)``.

    Raises:
        ValueError: R is not B.
    """
    if input_ids.shape[0] != scores.shape[0]:
        raise ValueError(
            f"input_ids must have as many rows as scores ({scores.shape[0]}), since {name} reads the tokens of each, "
            f"got {input_ids.shape[0]}; {HOW_TO_REPEAT}"
        )
