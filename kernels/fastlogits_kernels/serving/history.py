"""Histories that grow: append the tokens of a step, accept drafts; and exchange two slots. One launch each.

Bytes moved: a token and a slot of each row, for each program the slots of the rows before its own, and what a new token
changes of the index; and the two rows of a table, once.

A program owns the slot of the first row that names it, so that no two write to one slot, and none waits for another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastlogits_kernels.history import narrow
from fastlogits_kernels.runtime.launcher import Launch, Launcher, tl, triton
from fastlogits_kernels.serving.index import Index, catch_up
from fastlogits_kernels.serving.layout import ACTIVE, COUNT_PLANES, FLAGS, INDEXED, Slots

_UNALIGNED = ["slots_ptr", "tokens_ptr", "drafts_ptr", "kept_ptr", "counts_ptr", "records_ptr", "history_ptr"]
_UNALIGNED += ["lengths_ptr", "prompts_ptr", "index_ptr"]
_STEPWISE = ["N", "S", "L", "stride_slot", "stride_token", "stride_draft", "stride_record", "stride_history"]
_STEPWISE += ["stride_length", "stride_prompt", "W", "V", "planes_at", "shift", "span", "carries"]


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

    slot: tl.tensor
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
def _first_of_its_slot(entries, first, BLOCK: tl.constexpr):
    """The slot of an entry if no earlier one names it; else -1."""
    slot = tl.max(_slots_of(entries, first + tl.zeros([1], tl.int32)), 0)
    earlier = 0
    for start in range(0, first, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        earlier += tl.sum(((_slots_of(entries, entry) == slot) & (entry < first)).to(tl.int32))
    return tl.where(earlier == 0, slot, -1)


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
    return _Growing(slot, history_ptr + slot * stride_history, length_ptr, length, tl.where(taken, L, 0), taken)


@triton.jit
def _store_tokens(growing, rank, token, found):
    """Store tokens behind a history, as far as there is room."""
    place = growing.length + rank
    tl.store(growing.ptr + place, narrow(token), mask=found & (place < growing.L))


@triton.jit
def _store_length(growing, added):
    length = tl.minimum(growing.length + added, growing.L)
    tl.store(growing.length_ptr, length.to(growing.length_ptr.dtype.element_ty), mask=growing.taken)
    return length


@triton.jit
def _index(
    growing, length, records_ptr, prompts_ptr, index_ptr, V, W, planes_at, shift, span, carries,
    stride_record, stride_prompt, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bring the index of a history that has grown up to date."""
    tl.debug_barrier()
    record_ptr = records_ptr + growing.slot * stride_record
    here = index_ptr + growing.slot * stride_record
    planes_ptr, carries_ptr = None, None
    if COUNTS:
        planes_ptr = here + planes_at
        carries_ptr = planes_ptr + COUNT_PLANES * W
    index = Index(here, here + W, planes_ptr, carries_ptr, tl.load(record_ptr + INDEXED), shift, span)
    prompt = tl.load(prompts_ptr + growing.slot * stride_prompt).to(tl.int32)
    catch_up(record_ptr, growing.ptr, length, prompt, growing.taken, index, V, W, carries, BLOCK)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _append_kernel(
    # inputs
    slots_ptr, tokens_ptr,
    # outputs
    records_ptr, history_ptr, lengths_ptr, prompts_ptr, index_ptr,
    # shapes
    N, S, L, V, W, planes_at, shift, span, carries,
    # strides
    stride_slot, stride_token, stride_record, stride_history, stride_length, stride_prompt,
    # constants
    COUNTS: tl.constexpr, BLOCK: tl.constexpr, INDEX_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first entry of each slot appends the tokens of all its entries, in their order."""
    first = tl.program_id(0)
    entries = _Entries(slots_ptr, tokens_ptr, N, stride_slot, stride_token)
    slot = _first_of_its_slot(entries, first, BLOCK)
    growing = _history_of(
        records_ptr, history_ptr, lengths_ptr, slot, S, L, stride_record, stride_history, stride_length
    )  # fmt: skip
    added = 0
    for start in range(first, tl.where(growing.taken, N, first), BLOCK):
        entry = start + tl.arange(0, BLOCK)
        token = _tokens_of(entries, entry, _slots_of(entries, entry) == slot)
        found = token >= 0
        _store_tokens(growing, added + tl.cumsum(found.to(tl.int32)) - 1, token, found)
        added += tl.sum(found.to(tl.int32))
    length = _store_length(growing, added)
    if index_ptr is not None:
        _index(
            growing, length, records_ptr, prompts_ptr, index_ptr, V, W, planes_at, shift, span, carries,
            stride_record, stride_prompt, COUNTS, INDEX_BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _accept_kernel(
    # inputs
    slots_ptr, tokens_ptr, drafts_ptr,
    # outputs
    kept_ptr, counts_ptr, records_ptr, history_ptr, lengths_ptr, prompts_ptr, index_ptr,
    # shapes
    N, S, L, V, W, planes_at, shift, span, carries,
    # strides
    stride_slot, stride_token, stride_draft, stride_record, stride_history, stride_length, stride_prompt,
    # constants
    APPENDS: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr, INDEX_BLOCK: tl.constexpr,
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
        fits = own & (token >= 0) & ((entry == first) | (draft == drawn))
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
        length = _store_length(growing, counted)
        if index_ptr is not None:
            _index(
                growing, length, records_ptr, prompts_ptr, index_ptr, V, W, planes_at, shift, span, carries,
                stride_record, stride_prompt, COUNTS, INDEX_BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _cover_kernel(
    # inputs
    slots_ptr, history_ptr, lengths_ptr, prompts_ptr,
    # outputs
    records_ptr, index_ptr,
    # shapes
    N, S, L, V, W, planes_at, shift, span, carries,
    # strides
    stride_slot, stride_record, stride_history, stride_length, stride_prompt,
    # constants
    COUNTS: tl.constexpr, BLOCK: tl.constexpr, INDEX_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first row of each slot brings the index of its history up to date."""
    first = tl.program_id(0)
    entries = _Entries(slots_ptr, slots_ptr, N, stride_slot, stride_slot)
    slot = _first_of_its_slot(entries, first, BLOCK)
    growing = _history_of(
        records_ptr, history_ptr, lengths_ptr, slot, S, L, stride_record, stride_history, stride_length
    )  # fmt: skip
    _index(
        growing, growing.length, records_ptr, prompts_ptr, index_ptr, V, W, planes_at, shift, span, carries,
        stride_record, stride_prompt, COUNTS, INDEX_BLOCK,
    )  # fmt: skip


_append_launcher = Launcher(_append_kernel, num_warps=4)
_accept_launcher = Launcher(_accept_kernel, num_warps=4)
_cover_launcher = Launcher(_cover_kernel, num_warps=4)
# Slots that a program compares at once; and rows of a request, which are few.
_APPEND_BLOCK = 256
_ACCEPT_BLOCK = 32


# Tokens that are put into an index at once.
_INDEX_BLOCK = 1024


def launch_append(tables: Slots, of: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add each token to the history of its slot: one launch."""
    _append_launcher((*_key(tables, of), tokens.dtype), len(of), (
        of, tokens, *_grown(tables),
        len(of), *_shapes(tables),
        of.stride(0), tokens.stride(0), *_strides(tables),
        tables.indices.sizes.carries > 0, _APPEND_BLOCK, _INDEX_BLOCK,
    ))  # fmt: skip


def launch_accept(
    tables: Slots, of: torch.Tensor, tokens: torch.Tensor, drafts: torch.Tensor, appends: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that count, -1 elsewhere, and how many drafts the request of each row keeps: one launch."""
    kept = torch.empty(len(of), dtype=torch.int64, device=of.device)
    counts = torch.empty(len(of), dtype=torch.int32, device=of.device)
    _accept_launcher((*_key(tables, of), tokens.dtype, drafts.dtype, appends), len(of), (
        of, tokens, drafts, kept, counts, *_grown(tables),
        len(of), *_shapes(tables),
        of.stride(0), tokens.stride(0), drafts.stride(0), *_strides(tables),
        appends, tables.indices.sizes.carries > 0, _ACCEPT_BLOCK, _INDEX_BLOCK,
    ))  # fmt: skip
    return kept, counts


def cover_launch(tables: Slots, of: torch.Tensor, given: Any) -> Launch:
    """The launch that brings the indices of some slots up to date; the kernel is given ``given`` of the slots."""
    records, history, lengths, prompts, memory = _grown(tables)
    return Launch(_cover_launcher, _key(tables, of), len(of), (
        given, history, lengths, prompts, records, memory,
        len(of), *_shapes(tables),
        of.stride(0), *_strides(tables),
        tables.indices.sizes.carries > 0, _APPEND_BLOCK, _INDEX_BLOCK,
    ))  # fmt: skip


def _key(tables: Slots, of: torch.Tensor) -> tuple[Any, ...]:
    """What launches depend on that write to histories."""
    memory, sizes, _ = tables.indices
    return (
        of.device, of.dtype, tables.history.dtype, tables.lengths.dtype, tables.prompts.dtype, memory is None,
        sizes.carries > 0,
    )  # fmt: skip


def _grown(tables: Slots) -> tuple[torch.Tensor | None, ...]:
    return tables.records, tables.history, tables.lengths, tables.prompts, tables.indices.memory


def _shapes(tables: Slots) -> tuple[int, ...]:
    sizes = tables.indices.sizes
    return tables.records.shape[0], tables.history.shape[1], sizes.V, sizes.W, *tables.indices.arguments


def _strides(tables: Slots) -> tuple[int, ...]:
    return (
        tables.records.stride(0), tables.history.stride(0), tables.lengths.stride(0), tables.prompts.stride(0)
    )  # fmt: skip


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
