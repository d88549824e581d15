"""Append the tokens of a step to the histories of their slots, and exchange two slots: one launch each.

Bytes moved: a token and a length of each row; and the two rows of a table, once.
"""

from __future__ import annotations

import torch

from fastlogits_kernels.history import narrow
from fastlogits_kernels.runtime.launcher import Launcher, tl, triton
from fastlogits_kernels.serving.layout import ACTIVE, FLAGS, Slots

_APPEND_UNALIGNED = ["slots_ptr", "tokens_ptr", "records_ptr", "history_ptr", "lengths_ptr"]
_APPEND_STEPWISE = ["N", "S", "L", "stride_slot", "stride_token", "stride_record", "stride_history", "stride_length"]


@triton.jit(do_not_specialize=_APPEND_STEPWISE, do_not_specialize_on_alignment=_APPEND_UNALIGNED)
def _append_kernel(
    # inputs
    slots_ptr, tokens_ptr,
    # outputs
    records_ptr, history_ptr, lengths_ptr,
    # shapes
    N, S, L,
    # strides
    stride_slot, stride_token, stride_record, stride_history, stride_length,
    # constants
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: a token's place is the length of its history and the number of earlier tokens for the same slot."""
    for start in range(0, N, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        slot, token = _appended(
            slots_ptr, tokens_ptr, records_ptr, entry, N, S, stride_slot, stride_token, stride_record
        )
        place = tl.load(lengths_ptr + slot.to(tl.int64) * stride_length, mask=slot >= 0, other=0).to(tl.int32)
        for other_start in range(0, start + BLOCK, BLOCK):
            other = other_start + tl.arange(0, BLOCK)
            theirs, _token = _appended(
                slots_ptr, tokens_ptr, records_ptr, other, N, S, stride_slot, stride_token, stride_record
            )
            earlier = (theirs[None, :] == slot[:, None]) & (other[None, :] < entry[:, None])
            place += tl.sum(earlier.to(tl.int32), 1)
        here = history_ptr + slot.to(tl.int64) * stride_history + place
        tl.store(here, token, mask=(slot >= 0) & (place < L))
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        slot, token = _appended(
            slots_ptr, tokens_ptr, records_ptr, entry, N, S, stride_slot, stride_token, stride_record
        )
        one = tl.full([BLOCK], 1, lengths_ptr.dtype.element_ty)
        here = lengths_ptr + slot.to(tl.int64) * stride_length
        length = tl.atomic_add(here, one, mask=slot >= 0, sem="relaxed")
        # One that was too many is taken back: so many tokens leave no more than the limit.
        tl.atomic_add(here, -one, mask=(slot >= 0) & (length >= L), sem="relaxed")


@triton.jit
def _appended(slots_ptr, tokens_ptr, records_ptr, entry, N, S, stride_slot, stride_token, stride_record):
    """Slots and tokens of some entries; the slot is -1 where there is nothing to append."""
    slot = tl.load(slots_ptr + entry * stride_slot, mask=entry < N, other=-1)
    token = tl.load(tokens_ptr + entry * stride_token, mask=entry < N, other=-1)
    there = (slot >= 0) & (slot < S) & (token >= 0)
    slot = slot.to(tl.int32)
    flags = tl.load(records_ptr + slot.to(tl.int64) * stride_record + FLAGS, mask=there, other=0)
    return tl.where(there & ((flags & ACTIVE) != 0), slot, -1), narrow(token)


_append_launcher = Launcher(_append_kernel, num_warps=4)
_APPEND_BLOCK = 32


def launch_append(tables: Slots, of: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add each token to the history of its slot: one launch."""
    _append_launcher((of.device, of.dtype, tokens.dtype), 1, (
        of, tokens, tables.records, tables.history, tables.lengths,
        len(of), tables.records.shape[0], tables.history.shape[1],
        of.stride(0), tokens.stride(0), tables.records.stride(0), tables.history.stride(0), tables.lengths.stride(0),
        _APPEND_BLOCK,
    ))  # fmt: skip


@triton.jit(do_not_specialize=["a", "b", "N", "stride_row"], do_not_specialize_on_alignment=["table_ptr"])
def _swap_kernel(
    # input and output
    table_ptr, a, b,
    # shapes
    N,
    # strides
    stride_row,
    # constants
    BLOCK: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a_ptr = table_ptr + a.to(tl.int64) * stride_row + word
    b_ptr = table_ptr + b.to(tl.int64) * stride_row + word
    of_a = tl.load(a_ptr, mask=word < N)
    of_b = tl.load(b_ptr, mask=word < N)
    tl.store(a_ptr, of_b, mask=word < N)
    tl.store(b_ptr, of_a, mask=word < N)


_swap_launcher = Launcher(_swap_kernel, num_warps=4)
_SWAP_BLOCK = 1024


def launch_swap(table: torch.Tensor, a: int, b: int) -> None:
    """Exchange two rows of ``table``, int32 ``[S, N]``: one launch."""
    N = table.shape[1]
    _swap_launcher((table.device,), -(-N // _SWAP_BLOCK), (table, a, b, N, table.stride(0), _SWAP_BLOCK))
