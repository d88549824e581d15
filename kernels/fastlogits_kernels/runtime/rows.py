"""The rows of what stands beside the scores, which a kernel would read beyond its end."""

from __future__ import annotations

import torch

HOW_TO_REPEAT = (
    "repeat_interleave(n, 0) repeats rows for n beams, returned sequences or drafts of each, "
    "torch.cat([rows, rows]) for the two halves of guidance"
)


def check_rows(scores: torch.Tensor, input_ids: torch.Tensor | None, allowed: torch.Tensor | None) -> None:
    """Refuse ids and sets of other rows than ``scores`` ``[B, V]``.

    Raises:
        ValueError: ``input_ids`` ``[B, L]`` have other rows, or ``allowed`` sets other ones than these, or one for all.
    """
    B = scores.shape[0]
    if input_ids is not None and input_ids.shape[0] != B:
        raise ValueError(f"input_ids must have the {B} rows of scores, got {input_ids.shape[0]} rows")
    if allowed is not None and allowed.shape[0] not in (1, B):
        raise ValueError(f"allowed must have 1 row or the {B} rows of scores, got {allowed.shape[0]} rows")
