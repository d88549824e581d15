"""What a rank sends of its part of each row, once a selection has found which tokens of the part are kept.

Most rows keep few tokens, which stand in the selection's list: they are sent with their logits. Where more tie at the
cut-off than there is room for, of these the records are sent: in the order in which a rule takes tokens that tie, each
one whose perturbed logit is the best so far. Whatever number of them is kept in the end, one of the records is the best
of those; and there are about as many as the logarithm of the number of tokens.

Bytes moved: the candidates of each row, and what is sent. A row whose list didn't suffice is read once; one with many
ties three times.
"""

from __future__ import annotations

from fastlogits_kernels.parallel.layout import HEAD, RECORDS_AT, TIE_AT, TIED_AT, TOKENS_AT
from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.noise import load_request, perturbed_key
from fastlogits_kernels.selection.row import (
    COLLECTED,
    COUNT_AT,
    DONE_AT,
    HIGHEST,
    KEPT_AT,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MAP_STRIDES,
    STATE_AT,
    UNALIGNED,
    Form,
    Maps,
    Sampling,
    Scores,
    is_kept,
    key_of,
    let_next_launch,
    load_kept,
    number_of,
    rank_of,
    scaled,
    scaled_logits,
    store_float,
    wait_for_launch,
)

_STEPWISE = [*MAP_STRIDES, "stride_seed", "stride_position", "stride_work", "stride_packed", "W", "first", "pairs_at"]
_MISSING = tl.constexpr(0x7FC00000)  # the bits of NaN


@triton.jit
def _load_some(start, listed, found, row, pairs, scores, form, BLOCK: tl.constexpr):
    """Scaled logits of some entries of a row's list, or of the row itself; whether they are there; their tokens."""
    at = start + tl.arange(0, BLOCK)
    if listed:
        valid = at < found
        # From L2: this multiprocessor may hold what stood there before.
        pair = tl.load(pairs + at, mask=valid, other=0, volatile=True)
        token = (pair >> 32).to(tl.int32)
        x = scaled(pair.to(tl.int32).to(tl.float32, bitcast=True), row, scores.maps)
    else:
        valid = at < scores.V
        token = at
        x = scaled_logits(row, at >> 5, at & 31, at, valid, scores, form)
    return x, valid, token


@triton.jit
def _store_entries(to, before, chosen, bits, token, room):
    """Store some entries behind those that came before, as far as there is room; returns how many there are then."""
    # The interpreter may hold what was combined as something else than booleans.
    chosen = chosen.to(tl.int32) != 0
    place = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
    fits = chosen & (place < room)
    tl.store(to + HEAD + 2 * place, bits, mask=fits)
    tl.store(to + HEAD + 2 * place + 1, token, mask=fits)
    return before + tl.sum(chosen.to(tl.int32))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=[*UNALIGNED, "packed_ptr"])
def pack_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    work_ptr,
    # output
    packed_ptr,
    # shapes
    V, W, first, pairs_at,
    # strides
    stride_row, stride_token, stride_work, stride_packed,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What is sent of a part of a row of V tokens that begins at the token ``first`` of the vocabulary.

    A token of NaN stands alone where one ``SAMPLES`` from it.
    """
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    work, to = work_ptr + row * stride_work, packed_ptr + row * stride_packed
    request = load_request(row, Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position), maps)
    wait_for_launch(PDL)
    kept = load_kept(work + KEPT_AT)
    # Only then all that is kept stands in the list.
    listed = (tl.load(work + STATE_AT) == COLLECTED) & (tl.load(work + DONE_AT) != 0)
    found = tl.load(work + COUNT_AT)
    pairs = (work + pairs_at).to(tl.pointer_type(tl.int64))
    count = tl.full([], 0, tl.int32)
    nan_token = tl.full([], HIGHEST, tl.int32)
    for start in range(0, tl.where(listed, found, V), BLOCK):
        x, valid, token = _load_some(start, listed, found, row, pairs, scores, Form(OPS, MAX), BLOCK)
        key = key_of(x)
        # What has no probability is never sampled where there is anything else.
        stays = is_kept(x, valid, rank_of(token, LOWEST_TIES), kept, False) & (key > KEY_OF_MINUS_INFINITY)
        count = _store_entries(to, count, stays, x.to(tl.int32, bitcast=True), token + first, CAPACITY)
        nan_token = tl.minimum(nan_token, tl.min(tl.where(valid & (key == HIGHEST), token, HIGHEST)))
    tl.debug_barrier()
    has_nan = (nan_token < HIGHEST) & SAMPLES
    many = (count > CAPACITY) & (has_nan == 0)
    records, tied = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    # Fewer than the rule keeps are above the cut-off.
    count = tl.where(many, 0, tl.minimum(count, CAPACITY))
    for start in range(0, tl.where(many, V, 0), BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = scaled_logits(row, at >> 5, at & 31, at, at < V, scores, Form(OPS, MAX))
        above = (at < V) & (key_of(x) > kept.cutoff)
        count = _store_entries(to, count, above, x.to(tl.int32, bitcast=True), at + first, CAPACITY)
    # From the end, since the largest ids come first. The lowest one is that of the largest logit.
    plain = request.greedy | (kept.cutoff >= KEY_OF_INFINITY)
    best = tl.full([], LOWEST, tl.int32)
    least = tl.full([], HIGHEST, tl.int32)
    for start in range(0, tl.where(many, V, 0), BLOCK):
        back = V - 1 - start - tl.arange(0, BLOCK)
        at = tl.maximum(back, 0)
        x = scaled_logits(row, at >> 5, at & 31, at, back >= 0, scores, Form(OPS, MAX))
        ties = (back >= 0) & (key_of(x) == kept.cutoff)
        perturbed = tl.where(ties, perturbed_key(x, at + first, request), LOWEST)
        # The lower id wins where two are equal.
        leads = ties & (perturbed >= best) & (perturbed == tl.associative_scan(perturbed, 0, _larger))
        place = tied + tl.cumsum(ties.to(tl.int32), 0)
        records = _store_entries(to + 2 * count, records, leads & (plain == 0), place, at + first, CAPACITY - count)
        tied += tl.sum(ties.to(tl.int32))
        best = tl.maximum(best, tl.max(perturbed))
        least = tl.minimum(least, tl.min(tl.where(ties, at, HIGHEST)))
    tl.debug_barrier()
    if many & plain:
        tl.store(to + HEAD + 2 * count, 1)
        tl.store(to + HEAD + 2 * count + 1, least + first)
        records = tl.full([], 1, tl.int32)
    if has_nan:
        tl.store(to + HEAD, _MISSING)
        tl.store(to + HEAD + 1, nan_token + first)
        count = tl.full([], 1, tl.int32)
    records = tl.minimum(records, CAPACITY - count)
    place = tl.arange(0, CAPACITY)
    for i in tl.static_range(2):
        tl.store(to + HEAD + 2 * place + i, tl.zeros_like(place), mask=place >= count + records)
    tl.store(to + TOKENS_AT, count)
    tl.store(to + RECORDS_AT, records)
    store_float(to + TIE_AT, number_of(kept.cutoff))
    tl.store(to + TIED_AT, tied)
