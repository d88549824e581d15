"""The token of each row, from what all ranks have sent of it: every rank finds the same.

The rules are applied to all that was sent as ``selection.refine`` applies them to candidates. Nothing else can be kept,
so nothing has to be verified.

Bytes moved: what was sent.
"""

from __future__ import annotations

from fastlogits_kernels.parallel.layout import HEAD, RECORDS_AT, TIE_AT, TIED_AT, TOKENS_AT
from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.goals import can_act
from fastlogits_kernels.selection.noise import best_of, load_request, store_token
from fastlogits_kernels.selection.refine import Candidates, Progress, apply_rule, stays_of, top_of
from fastlogits_kernels.selection.row import (
    GOAL,
    HIGHEST,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    NEEDS_SUMS,
    Certain,
    Maps,
    RowSums,
    Sampling,
    all_kept,
    is_active,
    key_of,
    let_next_launch,
    rank_of,
    rule_value,
    wait_for_launch,
)

_STEPWISE = ["stride_temperature", "stride_seed", "stride_position", "stride_row", "stride_rank", "ranks"]
_UNALIGNED = ["packed_ptr", "temperature_ptr", "seeds_ptr", "positions_ptr", "tokens_ptr"]


@triton.jit
def _load_sent(packed, stride_rank, ranks, V, CAPACITY: tl.constexpr, SLOTS: tl.constexpr, LOWEST_TIES: tl.constexpr,
               TIED: tl.constexpr):  # fmt: skip
    """What the ranks have sent of a row."""
    slot = tl.arange(0, SLOTS)
    entry = slot % CAPACITY
    head = packed + (slot // CAPACITY).to(tl.int64) * stride_rank
    there = slot // CAPACITY < ranks
    tokens = tl.load(head + TOKENS_AT, mask=there, other=0)
    here = head + HEAD + 2 * entry
    valid = there & (entry < tokens)
    many = entry
    if TIED:
        records = tl.load(head + RECORDS_AT, mask=there, other=0)
        valid = there & (entry < tokens + records)
    bits = tl.load(here, mask=valid, other=0)
    token = tl.load(here + 1, mask=valid, other=0)
    x = bits.to(tl.float32, bitcast=True)
    if TIED:
        ties = valid & (entry >= tokens)
        x = tl.where(ties, tl.load(head + TIE_AT, mask=there, other=0).to(tl.float32, bitcast=True), x)
        # A record stands for those that tie from its place on to the next one's.
        following = tl.load(here + 2, mask=ties & (entry + 1 < tokens + records), other=0)
        following = tl.where(
            entry + 1 < tokens + records, following, tl.load(head + TIED_AT, mask=there, other=0) + 1
        )  # fmt: skip
        many = tl.where(ties, following - bits, 1)
    nothing, none = tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
    zero = tl.full([], 0.0, tl.float64)
    return Candidates(
        x, valid, valid & (valid == 0), token, rank_of(token, LOWEST_TIES),
        Certain(none, nothing, none + LOWEST, none + HIGHEST), none + KEY_OF_MINUS_INFINITY,
        RowSums(zero, zero, zero, zero), V, many,
    )  # fmt: skip


@triton.jit
def _kept_of(
    row, some, values, V,
    KINDS: tl.constexpr, LEASTS: tl.constexpr, PLACES: tl.constexpr, BANDED: tl.constexpr, LOWEST_TIES: tl.constexpr,
    TIED: tl.constexpr,
):  # fmt: skip
    """What the rules keep, where there are no other tokens; and how many of those at the cut-off, or HIGHEST."""
    kept = all_kept()
    no = tl.full([], False, tl.int1)
    at = Progress(kept, top_of(some, kept, BANDED), no, tl.full([], HIGHEST, tl.int32))
    for i in tl.static_range(len(KINDS)):
        value = rule_value(row, values, PLACES[i])
        active = is_active(value, V, KINDS[i], PLACES[i] >= 0)
        if active & can_act(at.top_key, NEEDS_SUMS[KINDS[i]], GOAL[KINDS[i]]):
            at, _wrong = apply_rule(some, at, value, no, KINDS[i], LEASTS[i], 0, BANDED, LOWEST_TIES, TIED)
    return at.kept, at.cut


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def union_kernel(
    # inputs
    packed_ptr, values,
    temperature_ptr, stride_temperature,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    # output
    tokens_ptr,
    # shapes
    V, ranks,
    # strides
    stride_row, stride_rank,
    # constants
    KINDS: tl.constexpr, LEASTS: tl.constexpr, PLACES: tl.constexpr, BANDED: tl.constexpr, LOWEST_TIES: tl.constexpr,
    CAPACITY: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr, TIED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token of a row: of rows whose ties are sent as records where ``TIED``, else of the others.

    The launch for ties comes second, and begins while the first one runs: it reads nothing of that.
    """
    if not TIED:
        let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    packed = packed_ptr + row * stride_row
    rank = tl.arange(0, RANKS)
    tied = tl.max(tl.load(packed + rank * stride_rank + RECORDS_AT, mask=rank < ranks, other=0)) > 0
    if tied == TIED:
        maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
        request = load_request(row, Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position), maps)
        some = _load_sent(packed, stride_rank, ranks, V, CAPACITY, SLOTS, LOWEST_TIES, TIED)
        kept = all_kept()
        if request.greedy == 0:
            kept, _cut = _kept_of(row, some, values, V, KINDS, LEASTS, PLACES, BANDED, LOWEST_TIES, TIED)
        _best, token = best_of(some.x, stays_of(some, kept, BANDED), some.token, request)
        store_token(tokens_ptr + row, token)
    if TIED:
        # What comes after this launch comes after the first one too.
        wait_for_launch(PDL)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=[*_UNALIGNED, "kept_ptr"])
def union_kept_kernel(
    # inputs
    packed_ptr, values,
    # output
    kept_ptr,
    # shapes
    V, ranks,
    # strides
    stride_row, stride_rank,
    # constants
    KINDS: tl.constexpr, LEASTS: tl.constexpr, PLACES: tl.constexpr, LOWEST_TIES: tl.constexpr,
    CAPACITY: tl.constexpr, SLOTS: tl.constexpr, RANKS: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """What is kept of a row, in three words: cut-off and rank as ``Kept`` has them, and how far a record is kept.

    A record stands for tokens that tie, from its own on. If a rule takes some of these, the last word says how many.
    """
    row = tl.program_id(0).to(tl.int64)
    packed = packed_ptr + row * stride_row
    rank = tl.arange(0, RANKS)
    tied = tl.max(tl.load(packed + rank * stride_rank + RECORDS_AT, mask=rank < ranks, other=0)) > 0
    if tied == TIED:
        some = _load_sent(packed, stride_rank, ranks, V, CAPACITY, SLOTS, LOWEST_TIES, TIED)
        kept, cut = _kept_of(row, some, values, V, KINDS, LEASTS, PLACES, False, LOWEST_TIES, TIED)
        within = tl.full([], 0, tl.int32)
        if TIED:
            before = some.valid & (key_of(some.x) == kept.cutoff) & (some.rank > kept.rank)
            within = tl.where(kept.rank == LOWEST, 0, cut - tl.sum(tl.where(before, some.many, 0)))
        tl.store(kept_ptr + 3 * row, kept.cutoff)
        tl.store(kept_ptr + 3 * row + 1, kept.rank)
        tl.store(kept_ptr + 3 * row + 2, within)
