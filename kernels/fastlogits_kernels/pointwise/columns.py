"""Write one value to some columns of a matrix on the CPU, the fastest way that torch has."""

from __future__ import annotations

from functools import lru_cache

import torch

# From about this many columns on, torch's scatter is twice as fast as its index_fill, in float32 on the CPU only.
_FEW = 64


@lru_cache(maxsize=64)
def _filled(count: int, value: float) -> torch.Tensor:
    return torch.full((1, count), value)


def fill_columns(x: torch.Tensor, columns: torch.Tensor, value: float) -> torch.Tensor:
    """Write ``value`` to the distinct ``columns`` int64 ``[N]`` of ``x`` ``[B, V]``; returns ``x``."""
    N = columns.shape[0]
    if N < _FEW or x.dtype != torch.float32 or x.is_cuda:
        return x.index_fill_(1, columns, value)
    B = x.shape[0]
    return x.scatter_(1, columns.expand(B, N), _filled(N, value).expand(B, N))
