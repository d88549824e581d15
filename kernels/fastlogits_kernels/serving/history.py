"""Histories that grow: append the tokens of a step, accept drafts; and exchange two slots. One launch each.

Bytes moved: a token and a slot of each row, and for each program the slots of the rows before its own; and the two rows
of a table, once.

A program owns the slot of the first row that names it, so that no two write to one slot, and none waits for another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.history import narrow
from fastlogits_kernels.runtime.launcher import Launcher, tl, triton
from fastlogits_kernels.serving.layout import ACTIVE, FLAGS, Slots

_UNALIGNED = ["slots_ptr", "tokens_ptr", "drafts_ptr", "kept_ptr", "counts_ptr", "records_ptr", "history_ptr"]
_UNALIGNED += ["lengths_ptr"]
_STEPWISE = ["N", "S", "L", "stride_slot", "stride_token", "stride_draft", "stride_record", "stride_history"]
_STEPWISE += ["stride_length"]


class _Entries(NamedTuple):
    """What is appended: a token for the slot of each entry; ``N`` in all."""

    slots_ptr: tl.tensor
    tokens_ptr: tl.tensor
    N: tl.tensor
    stride_slot: tl.tensor
    stride_token: tl.tensor


class _Growing(NamedTuple):
    """The history of one slot: its tokens, how many there are, and room for how many; ``taken`` is whether it grows.

    There is no room in one that doesn't.
    """

    ptr: tl.tensor
    length_ptr: tl.tensor
    length: tl.tensor
    L: tl.tensor
    taken: tl.tensor


@triton.jit
def _slots_of(entries, entry):
    """The slots of some entries; -1 beyond the last, and for any that is negative."""
    slot = tl.load(entries.slots_ptr + entry * entries.stride_slot, mask=(entry >= 0) & (entry < entries.N), other=-1)
    return tl.maximum(slot, -1)


@triton.jit
def _tokens_of(entries, entry, inside):
    return tl.load(entries.tokens_ptr + entry * entries.stride_token, mask=inside, other=-1)


@triton.jit
def _history_of(records_ptr, history_ptr, lengths_ptr, slot, S, L, stride_record, stride_history, stride_length):
    """The history of a slot; one that holds no request doesn't grow."""
    there = (slot >= 0) & (slot < S)
    slot = tl.where(there, slot, 0).to(tl.int64)
    flags = tl.load(records_ptr + slot * stride_record + FLAGS)
    length_ptr = lengths_ptr + slot * stride_length
    length = tl.minimum(tl.maximum(tl.load(length_ptr).to(tl.int32), 0), L)
    taken = there & ((flags & ACTIVE) != 0)
    return _Growing(history_ptr + slot * stride_history, length_ptr, length, tl.where(taken, L, 0), taken)


@triton.jit
def _store_tokens(growing, rank, token, found):
    """Store tokens behind a history, as far as there is room."""
    place = growing.length + rank
    tl.store(growing.ptr + place, narrow(token), mask=found & (place < growing.L))


@triton.jit
def _store_length(growing, added):
    length = tl.minimum(growing.length + added, growing.L)
    tl.store(growing.length_ptr, length.to(growing.length_ptr.dtype.element_ty), mask=growing.taken)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
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
    """The first entry of each slot appends the tokens of all its entries, in their order."""
    first = tl.program_id(0)
    entries = _Entries(slots_ptr, tokens_ptr, N, stride_slot, stride_token)
    slot = tl.max(_slots_of(entries, first + tl.zeros([1], tl.int32)), 0)
    earlier = 0
    for start in range(0, first, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        earlier += tl.sum(((_slots_of(entries, entry) == slot) & (entry < first)).to(tl.int32))
    growing = _history_of(
        records_ptr, history_ptr, lengths_ptr, tl.where(earlier == 0, slot, -1), S, L,
        stride_record, stride_history, stride_length,
    )  # fmt: skip
    added = 0
    for start in range(first, tl.where(growing.taken, N, first), BLOCK):
        entry = start + tl.arange(0, BLOCK)
        token = _tokens_of(entries, entry, _slots_of(entries, entry) == slot)
        found = token >= 0
        _store_tokens(growing, added + tl.cumsum(found.to(tl.int32)) - 1, token, found)
        added += tl.sum(found.to(tl.int32))
    _store_length(growing, added)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _accept_kernel(
    # inputs
    slots_ptr, tokens_ptr, drafts_ptr,
    # outputs
    kept_ptr, counts_ptr, records_ptr, history_ptr, lengths_ptr,
    # shapes
    N, S, L,
    # strides
    stride_slot, stride_token, stride_draft, stride_record, stride_history, stride_length,
    # constants
    APPENDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first row of each request compares drafts with tokens, and appends those that count."""
    first = tl.program_id(0)
    entries = _Entries(slots_ptr, tokens_ptr, N, stride_slot, stride_token)
    slot = tl.max(_slots_of(entries, first + tl.zeros([1], tl.int32)), 0)
    before = tl.max(_slots_of(entries, first - 1 + tl.zeros([1], tl.int32)), 0)
    begins = (first == 0) | (before != slot)
    growing = _history_of(
        records_ptr, history_ptr, lengths_ptr, tl.where(begins, slot, -1), S, L,
        stride_record, stride_history, stride_length,
    )  # fmt: skip
    rows, counted = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    more = begins
    start = first
    while more:
        entry = start + tl.arange(0, BLOCK)
        own = (entry < N) & (_slots_of(entries, entry) == slot)
        own = tl.cumsum((own == 0).to(tl.int32)) == 0
        token = tl.where(growing.taken, _tokens_of(entries, entry, own), -1)
        drawn = _tokens_of(entries, entry - 1, own & (entry > first))
        draft = tl.load(drafts_ptr + entry * stride_draft, mask=own & (entry > first), other=-1)
        fits = own & (token >= 0) & ((entry == first) | ((draft >= 0) & (draft == drawn)))
        counts = tl.cumsum((fits == 0).to(tl.int32)) + tl.where(counted == rows, 0, 1) == 0
        if APPENDS:
            _store_tokens(growing, entry - first, token, counts)
        tl.store(kept_ptr + entry, tl.where(counts, token, -1).to(tl.int64), mask=own)
        in_block = tl.sum(own.to(tl.int32))
        counted += tl.sum(counts.to(tl.int32))
        rows += in_block
        start += BLOCK
        more = in_block == BLOCK
    for done in range(0, rows, BLOCK):
        entry = done + tl.arange(0, BLOCK)
        tl.store(
            counts_ptr + first + entry, tl.zeros([BLOCK], tl.int32) + tl.maximum(counted - 1, 0), mask=entry < rows
        )
    if APPENDS:
        _store_length(growing, counted)


_append_launcher = Launcher(_append_kernel, num_warps=1)
_accept_launcher = Launcher(_accept_kernel, num_warps=1)
# Slots that a program compares at once; and rows of a request, which are few.
_APPEND_BLOCK = 256
_ACCEPT_BLOCK = 32


def launch_append(tables: Slots, of: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add each token to the history of its slot: one launch."""
    _append_launcher((of.device, of.dtype, tokens.dtype), len(of), (
        of, tokens, tables.records, tables.history, tables.lengths,
        len(of), tables.records.shape[0], tables.history.shape[1],
        of.stride(0), tokens.stride(0), tables.records.stride(0), tables.history.stride(0), tables.lengths.stride(0),
        _APPEND_BLOCK,
    ))  # fmt: skip


def launch_accept(
    tables: Slots, of: torch.Tensor, tokens: torch.Tensor, drafts: torch.Tensor, appends: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that count, -1 elsewhere, and how many drafts the request of each row keeps: one launch."""
    kept = torch.empty(len(of), dtype=torch.int64, device=of.device)
    counts = torch.empty(len(of), dtype=torch.int32, device=of.device)
    key = (of.device, of.dtype, tokens.dtype, drafts.dtype, tables.history.dtype, tables.lengths.dtype, appends)
    _accept_launcher(key, len(of), (
        of, tokens, drafts, kept, counts, tables.records, tables.history, tables.lengths,
        len(of), tables.records.shape[0], tables.history.shape[1],
        of.stride(0), tokens.stride(0), drafts.stride(0), tables.records.stride(0), tables.history.stride(0),
        tables.lengths.stride(0),
        appends, _ACCEPT_BLOCK,
    ))  # fmt: skip
    return kept, counts


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
