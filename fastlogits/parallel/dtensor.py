"""Logits that are a ``DTensor``, split over the last dimension."""

from __future__ import annotations

from typing import Any

import torch


def is_split(logits: object) -> bool:
    """Whether logits are a ``DTensor``."""
    return type(logits) is not torch.Tensor and hasattr(logits, "placements") and hasattr(logits, "to_local")


def local_part(logits: Any) -> tuple[torch.Tensor, Any]:
    """The part of a ``DTensor`` that this rank has, and the process group over which its vocabulary is split.

    Raises:
        ValueError: it isn't split over its last dimension, or over another one too.
    """
    split = [dim for dim, placement in enumerate(logits.placements) if not placement.is_replicate()]
    ok = len(split) == 1 and logits.placements[split[0]].is_shard()
    if not ok or logits.placements[split[0]].dim not in (-1, logits.ndim - 1):
        raise ValueError(
            f"logits must be a DTensor that is split over its last dimension, got placements {logits.placements}: "
            "redistribute it with Shard(1)"
        )
    return logits.to_local(), logits.device_mesh.get_group(split[0])
