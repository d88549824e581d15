"""Set to -inf, in place, what a grammar engine's bitmask forbids: one mask a row, rows of both sides by index.

For each entry ``e`` (the logits row ``rows[e]`` and the mask row ``mask_rows[e]``, or ``e`` itself where an index is
absent), with bit ``v % 32`` of mask word ``v // 32`` set where token ``v`` is allowed:

    logits[rows[e], v] = -inf  for every v < vocab_size that is not allowed; words that the mask lacks allow nothing

An entry whose row or mask row does not exist is left alone. Bytes moved: the mask once, a write of each 32-token word
that is forbidden as a whole, a read and a write of one that is forbidden in part, nothing for the others.
"""

from __future__ import annotations

import torch

from fastlogits_kernels.pointwise.mask import IN_PLACE_BLOCK_W, ban_words
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.bits import ban_unset_, words
from fastlogits_kernels.runtime.launcher import Launcher, tl, triton
from fastlogits_kernels.runtime.library import register

# What changes with the batch must not make a new variant of the kernel.
_STEPWISE = ["B", "M", "W", "row_blocks", "stride_mask"]
_UNALIGNED = ["bitmask_ptr", "rows_ptr", "mask_rows_ptr"]


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _bitmask_kernel(
    # inputs
    bitmask_ptr, rows_ptr, mask_rows_ptr,
    # output
    logits_ptr,
    # shapes
    B, M, V, W, row_blocks,
    # strides
    stride_row, stride_token, stride_mask,
    # constants
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // row_blocks).to(tl.int64)
    mask_row = row
    if mask_rows_ptr is not None:
        mask_row = tl.load(mask_rows_ptr + row).to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + row).to(tl.int64)
    exists = (row >= 0) & (row < B) & (mask_row >= 0) & (mask_row < M)
    word = (program % row_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]  # [BLOCK_W, 1]
    W = tl.where(exists, W, 0)
    allowed = tl.load(bitmask_ptr + mask_row * stride_mask + word, mask=word < W, other=0)
    ban_words(logits_ptr + row * stride_row, tl.where(exists, ~allowed, 0), word, V, stride_token)


_bitmask_launcher = Launcher(_bitmask_kernel, num_warps=4)


def launch_bitmask_(
    logits: torch.Tensor,
    bitmask: torch.Tensor,
    vocab_size: int,
    rows: torch.Tensor | None,
    mask_rows: torch.Tensor | None,
) -> None:
    """Apply ``bitmask`` to ``logits`` in place: one launch."""
    B, M = logits.shape[0], bitmask.shape[0]
    entries = _entries(logits, rows, mask_rows)
    row_blocks = -(-words(vocab_size) // IN_PLACE_BLOCK_W)
    if entries * row_blocks == 0:
        return
    stride_row, stride_token = logits.stride()
    key = (
        logits.device, logits.dtype, logits.data_ptr() % 16, vocab_size,
        stride_row == 1, stride_row % 16, stride_row >> 31, stride_token,
        None if rows is None else rows.dtype, None if mask_rows is None else mask_rows.dtype,
    )  # fmt: skip
    _bitmask_launcher(key, entries * row_blocks, (
        bitmask, rows, mask_rows,
        logits,
        B, M, vocab_size, bitmask.shape[1], row_blocks,
        stride_row, stride_token, bitmask.stride(0),
        IN_PLACE_BLOCK_W,
    ))  # fmt: skip


def reference_bitmask_(
    logits: torch.Tensor,
    bitmask: torch.Tensor,
    vocab_size: int,
    rows: torch.Tensor | None,
    mask_rows: torch.Tensor | None,
) -> None:
    """The same in torch, and the path of the CPU."""
    B, M = logits.shape[0], bitmask.shape[0]
    entries = _entries(logits, rows, mask_rows)
    decided = logits[:, :vocab_size]
    if rows is None and mask_rows is None and entries <= M:
        ban_unset_(decided, bitmask[:entries])
        return
    each = torch.arange(entries, device=logits.device)
    rows, mask_rows = (each if index is None else index.long() for index in (rows, mask_rows))
    exists = ((rows >= 0) & (rows < B) & (mask_rows >= 0) & (mask_rows < M)).nonzero().flatten()
    rows, mask_rows = rows[exists], mask_rows[exists]
    chosen = decided[rows]
    ban_unset_(chosen, bitmask[mask_rows])
    decided[rows] = chosen


def _entries(logits: torch.Tensor, rows: torch.Tensor | None, mask_rows: torch.Tensor | None) -> int:
    """Number of pairs of a logits row and a mask row."""
    index = rows if rows is not None else mask_rows
    return logits.shape[0] if index is None else index.shape[0]


_OPERATION = Operation("apply_bitmask_")


@_OPERATION.falls_back
def _in_place(
    logits: torch.Tensor,
    bitmask: torch.Tensor,
    vocab_size: int,
    rows: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
) -> None:
    apply = launch_bitmask_ if _OPERATION.takes(logits) else reference_bitmask_
    apply(logits, bitmask, vocab_size, rows, mask_rows)


register(
    "apply_bitmask_(Tensor(a!) logits, Tensor bitmask, SymInt vocab_size, Tensor? rows=None, Tensor? mask_rows=None)"
    " -> ()",
    _in_place,
    lambda logits, *arguments: None,
)


def apply_bitmask_(
    logits: torch.Tensor,
    bitmask: torch.Tensor,
    vocab_size: int,
    rows: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
) -> None:
    """Set what ``bitmask`` forbids to -inf; the one place where this operation is dispatched.

    Args:
        logits: ``[B, V]`` of any strides, float32, float16 or bfloat16; written in place.
        bitmask: int32 ``[M, W]`` of any row stride, on the same device; bit 1 = allowed.
        vocab_size: the leading tokens that are decided, at most V; those from ``32 * W`` on are forbidden.
        rows: integer ``[E]``, contiguous: the logits row of each entry; distinct. None: all rows in their order.
        mask_rows: integer ``[E]``, contiguous: the mask row of each entry. None: the entry's own number.
    """
    if torch.compiler.is_compiling():
        torch.ops.fastlogits.apply_bitmask_(logits, bitmask, vocab_size, rows, mask_rows)
    else:
        _in_place(logits, bitmask, vocab_size, rows, mask_rows)
