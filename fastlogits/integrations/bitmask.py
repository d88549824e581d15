"""The bitmasks of grammar engines (xgrammar, llguidance, outlines), applied to logits in place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from fastlogits_kernels.pointwise.bitmask import apply_bitmask_
from fastlogits_kernels.runtime.bits import WORD_BITS
from fastlogits_kernels.runtime.launcher import to_device

from fastlogits.checks import LOGITS_DTYPES


def apply_token_bitmask_inplace(
    logits: torch.Tensor,
    bitmask: torch.Tensor,
    *,
    vocab_size: int | None = None,
    indices: Sequence[int] | torch.Tensor | None = None,
    mask_rows: Sequence[int] | torch.Tensor | None = None,
    mask_tail: bool = False,
) -> None:
    """Set the logits of the tokens that a bitmask forbids to -inf: xgrammar's function, with two more arguments.

    The bitmask has no words for tokens from ``32 * W`` on. They keep their logits, with a warning, as in xgrammar;
    ``mask_tail=True`` forbids them, as llguidance does. Bits beyond ``vocab_size`` are not read. If ``indices`` and
    ``mask_rows`` are absent or on the device of the logits, nothing is allocated and nothing waits for the device.

    Args:
        logits: ``[B, V]``, or ``[V]`` for one row; float32, float16 or bfloat16, of any strides. Written in place.
        bitmask: int32 ``[M, W]`` or ``[W]``, on the device of the logits; bit ``i`` of word ``w`` is 1 where token
            ``32 * w + i`` is allowed.
        vocab_size: only the first ``vocab_size`` tokens are masked: between 0 and ``min(V, 32 * W)`` (with
            ``mask_tail``, ``V``), which is the default.
        indices: the rows of the logits to mask, each once; the others keep their logits. None for all.
        mask_rows: the row of the bitmask for each of these rows; -1 leaves a row unmasked. None for the row of the same
            number.
        mask_tail: whether the tokens that the bitmask has no word for are forbidden.

    Raises:
        ValueError: another dtype, shape or device, a ``vocab_size`` out of range, or a row that does not exist. Indices
            on a GPU can't be checked without waiting for it: there such a row is left alone.

    Example:
        >>> logits = torch.zeros(2, 4)
        >>> apply_token_bitmask_inplace(logits, torch.tensor([[0b0101], [0b0011]], dtype=torch.int32), indices=[1])
        >>> logits.tolist()
        [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -inf, -inf]]
    """
    _check_tensors(logits, bitmask)
    logits = logits if logits.ndim == 2 else logits.unsqueeze(0)
    bitmask = bitmask if bitmask.ndim == 2 else bitmask.unsqueeze(0)
    if bitmask.stride(1) != 1:
        bitmask = bitmask.contiguous()
    V, covered = logits.shape[1], bitmask.shape[1] * WORD_BITS
    most = V if mask_tail else min(V, covered)
    if vocab_size is None:
        vocab_size = most
        if most < V:
            warnings.warn(
                f"bitmask has bits for {covered} tokens, logits have {V}: tokens from {covered} on stay allowed. Make "
                "the bitmask as wide as the model's padded vocabulary, or give mask_tail=True or vocab_size",
                stacklevel=2,
            )
    elif not 0 <= vocab_size <= most:
        raise ValueError(
            f"vocab_size must be between 0 and {most}, got {vocab_size}: logits have {V} tokens, bitmask has {covered}"
        )
    rows, chosen = _paired_rows(logits.shape[0], bitmask.shape[0], indices, mask_rows)
    moved = None if rows is None else to_device(rows, logits.device)
    if chosen is not None:
        chosen = moved if chosen is rows else to_device(chosen, logits.device)
    apply_bitmask_(logits, bitmask, vocab_size, moved, chosen)


def _check_tensors(logits: torch.Tensor, bitmask: torch.Tensor) -> None:
    for argument, given in (("logits", logits), ("bitmask", bitmask)):
        if not isinstance(given, torch.Tensor):
            raise ValueError(f"{argument} must be a tensor, got {type(given).__name__}")
    if logits.dtype not in LOGITS_DTYPES or logits.ndim not in (1, 2):
        raise ValueError(
            f"logits must be float32, float16 or bfloat16 of shape (B, V) or (V,), got {logits.dtype} of "
            f"{tuple(logits.shape)}"
        )
    if bitmask.dtype != torch.int32 or bitmask.ndim not in (1, 2):
        raise ValueError(
            f"bitmask must be int32 of shape (M, W) or (W,), got {bitmask.dtype} of {tuple(bitmask.shape)}"
        )
    if bitmask.device != logits.device:
        raise ValueError(
            f"bitmask must be on {logits.device}, where the logits are, got it on {bitmask.device}: move it with "
            "bitmask.to(logits.device, non_blocking=True)"
        )


class _PairedRows(NamedTuple):
    """Which row of the bitmask masks which row of the logits; None for all rows in their order."""

    logits: torch.Tensor | None
    bitmask: torch.Tensor | None


def _paired_rows(
    B: int,
    M: int,
    indices: Sequence[int] | torch.Tensor | None,
    mask_rows: Sequence[int] | torch.Tensor | None,
) -> _PairedRows:
    rows = None if indices is None else _index("indices", indices, 0, B)
    if mask_rows is not None:
        chosen = _index("mask_rows", mask_rows, -1, M)
        entries = B if rows is None else rows.shape[0]
        if chosen.shape[0] != entries:
            raise ValueError(f"mask_rows must have one entry for each of {entries} rows, got {chosen.shape[0]}")
        return _PairedRows(rows, chosen)
    if rows is not None:
        rows = _index("indices (which bitmask has to have too)", rows, 0, M)
        return _PairedRows(rows, rows)
    if B > M:
        raise ValueError(
            f"bitmask must have a row for each of {B} rows of logits, got {M}: say with indices or mask_rows which "
            "rows belong together"
        )
    return _PairedRows(None, None)


def _index(argument: str, index: Sequence[int] | torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """Row numbers as a contiguous integer tensor, checked where that needs no wait."""
    if isinstance(index, torch.Tensor):
        made = index
    else:
        # In the dtype that it has: fractions and truth values are no row numbers.
        made = torch.tensor(index) if len(index) else torch.zeros(0, dtype=torch.int64)
    if made.ndim != 1 or made.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{argument} must be integers of shape (E,), got {made.dtype} of {tuple(made.shape)}")
    if made.device.type == "cpu" and not torch.compiler.is_compiling():
        known = made.tolist()
        wrong = [row for row in known if not first <= row < stop]
        if wrong:
            raise ValueError(f"{argument} must be rows from {first} to {stop - 1}, got {wrong[0]}")
        if argument == "indices" and len(set(known)) < len(known):
            twice = next(row for row in known if known.count(row) > 1)
            raise ValueError(f"{argument} must be different rows, got {twice} twice: combine its masks with &")
    return made.contiguous()
