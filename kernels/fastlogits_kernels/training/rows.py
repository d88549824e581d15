"""The log-probability of a token of each row under the distribution that is sampled, and what its gradient needs.

    logprobs[b] = x[b, t] - log(sum over v of exp(x[b, v])),   v in what is kept of row b, and t, its target
    entropy[b]  = log(sum) - sum over v of p[b, v] * (x[b, v] - top[b])

with x the logits divided by the temperature. Three ways, by what is known of the rows:

- Nothing is dropped: a program takes a tile of a row, one more joins the tiles of a row. One read of the logits.
- A selection has said what is kept: its candidates are at hand. Next to nothing is read beside what it has read.
- Kept sets are given: as token ids, of which only these logits are read, or as packed bits, one or two reads.

Each row leaves a record of 48 bytes, and the backward pass needs nothing else but the logits.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.goals import below_of
from fastlogits_kernels.selection.masses import KeptSums, is_whole, log_of, source_of, sums_of_kept
from fastlogits_kernels.selection.row import (
    KEPT_AT,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    ONE,
    STEPWISE,
    UNALIGNED,
    Form,
    Maps,
    Scores,
    Shape,
    all_kept,
    folded_logits,
    inverse_of,
    is_kept,
    key_of,
    load_kept,
    number_of,
    rank_of,
    scaled,
    store_float,
    weight_of,
)
from fastlogits_kernels.selection.tiles import Tile, joined, tile_of

# -- The record of a row, in words of 32 bits ------------------------------------------------------------------------

FIRST_AT = tl.constexpr(0)  # the least raw logit that comes to the cut-off: tokens from here on with a rank are kept
ABOVE_AT = tl.constexpr(1)  # the least raw logit that comes to more: all tokens from here on are kept
RANK_AT = tl.constexpr(2)
RAW_TOP_AT = tl.constexpr(3)  # the largest raw logit of what is kept
LOG_MASS_AT = tl.constexpr(4)
ENTROPY_AT = tl.constexpr(5)
CUTOFF_AT = tl.constexpr(6)  # what is kept, as ``Kept`` has it, for bands
CENTRE_AT = tl.constexpr(7)
FARTHEST_AT = tl.constexpr(8)
WORDS = tl.constexpr(12)

# How a row knows what is kept of it.
WHOLE, SELECTED, LISTED, PACKED = (tl.constexpr(i) for i in range(4))
TILE = tl.constexpr(2048)  # tokens of a tile: as many as where the sampler's report adds them up
TILE_WORDS = tl.constexpr(3)
_ROUNDS = tl.constexpr(7)  # of a search among 2 ** 32 keys, each of which leaves a 32nd
_PER_ONE = tl.constexpr(1 / ONE.value)


# Some rows of a tensor, or a tensor of the caller: they begin anywhere.
BEGINS_ANYWHERE = ["temperature_ptr", "targets_ptr", "logprobs_ptr", "entropy_ptr", "outside_ptr", "record_ptr"]
SETS = ["ids_ptr", "counts_ptr", "offsets_ptr", "bits_ptr"]
STEPWISE_SETS = ["stride_ids", "stride_counts", "stride_bits", "most", "first", "all_tokens"]


class Sets(NamedTuple):
    """Kept sets that are given: token ids with where a row's begin and how many there are, or packed bits.

    Of ``all_tokens``, of which the logits are those from ``first`` on.
    """

    ids_ptr: tl.tensor
    counts_ptr: tl.tensor
    offsets_ptr: tl.tensor
    bits_ptr: tl.tensor
    stride_ids: tl.tensor
    stride_counts: tl.tensor
    stride_bits: tl.tensor
    most: tl.tensor
    first: tl.tensor
    all_tokens: tl.tensor


class Results(NamedTuple):
    """What is written of each row."""

    logprobs_ptr: tl.tensor
    entropy_ptr: tl.tensor
    outside_ptr: tl.tensor
    record_ptr: tl.tensor


class Own(NamedTuple):
    """The target of a row: its token, whether it is one, and whether the row is left out.

    Then its logit before and after the temperature.
    """

    token: tl.tensor
    known: tl.tensor
    ignored: tl.tensor
    raw: tl.tensor
    x: tl.tensor


@triton.jit
def load_own(row, targets_ptr, stride_target, ignore_index, scores, form):
    """The target of a row."""
    target = tl.load(targets_ptr + row * stride_target).to(tl.int64)
    ignored = target == ignore_index
    known = (target >= 0) & (target < scores.V) & (ignored == 0)
    token = tl.where(known, target, 0).to(tl.int32)
    raw = folded_logits(row, token >> 5, token & 31, token, known, scores, form)
    return Own(token, known, ignored, raw, scaled(raw, row, scores.maps))


@triton.jit
def store_row(row, own, outside, kept_raw, raw_top, top, log_mass, entropy, results):
    """What a row comes to, and its record; ``kept_raw`` is what is kept, in raw logits."""
    logprob = own.x - top - log_mass
    logprob = tl.where(own.known, logprob, float("nan"))
    tl.store(results.logprobs_ptr + row, tl.where(own.ignored, 0.0, logprob))
    if results.entropy_ptr is not None:
        tl.store(results.entropy_ptr + row, tl.where(own.ignored, 0.0, entropy))
    if results.outside_ptr is not None:
        unlikely = own.known & (outside | (own.raw == float("-inf")))
        tl.store(results.outside_ptr + row, unlikely.to(tl.int8))
    record = results.record_ptr + row * WORDS
    store_float(record + RAW_TOP_AT, raw_top)
    # A row whose target is none has no gradient either, but NaN.
    store_float(record + LOG_MASS_AT, tl.where(own.known, log_mass, float("nan")))
    store_float(record + ENTROPY_AT, entropy)
    store_float(record + FIRST_AT, kept_raw[0])
    store_float(record + ABOVE_AT, kept_raw[1])
    tl.store(record + RANK_AT, kept_raw[2])


# -- Rows that are kept as a whole -----------------------------------------------------------------------------------


@triton.jit
def store_tile(here, tile):
    """Write what a tile comes to."""
    tl.store(here, tile.top)
    tl.store(here + 1, tile.mass)
    tl.store(here + 2, tile.below)


@triton.jit(
    do_not_specialize=["stride_temperature", "stride_target", "tiles"], do_not_specialize_on_alignment=BEGINS_ANYWHERE
)
def tile_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr,
    # output
    tiles_ptr,
    # shapes
    V, tiles, offset,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target,
    # constants
    BELOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The largest logit of a tile, its mass, and its mass times distance from there; not of rows left out.

    The logits begin ``offset`` tokens behind the beginning of a tile.
    """
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    if tl.load(targets_ptr + row * stride_target).to(tl.int64) != ignore_index:
        token = tile * TILE + tl.arange(0, TILE) - offset
        here = scores_ptr + row * stride_row + token.to(tl.int64) * stride_token
        x = tl.load(here, mask=(token >= 0) & (token < V), other=float("-inf")).to(tl.float32)
        found = tile_of(x, inverse_of(row, maps), BELOW)
        store_tile(tiles_ptr + (row * tiles + tile) * TILE_WORDS, found)


@triton.jit(
    do_not_specialize=["stride_temperature", "stride_target", "tiles"], do_not_specialize_on_alignment=BEGINS_ANYWHERE
)
def join_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, tiles_ptr,
    # outputs
    logprobs_ptr, entropy_ptr, outside_ptr, record_ptr,
    # shapes
    V, tiles,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target,
    # constants
    TILES: tl.constexpr,
):  # fmt: skip
    """A row from its tiles."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, 0, maps)
    row = tl.program_id(0).to(tl.int64)
    own = load_own(row, targets_ptr, stride_target, ignore_index, scores, Form((), 0.0))
    tile = tl.arange(0, TILES)
    here = tiles_ptr + (row * tiles + tile) * TILE_WORDS
    there = tile < tl.where(own.ignored, 0, tiles)
    of = Tile(
        tl.load(here, mask=there, other=float("-inf")), tl.load(here + 1, mask=there, other=0.0),
        tl.load(here + 2, mask=there, other=0.0),
    )  # fmt: skip
    raw_top = tl.max(of.top)
    mass, below = joined(of, raw_top, inverse_of(row, maps))
    defined = tl.sum((of.mass != of.mass).to(tl.int32)) == 0
    sums = KeptSums(raw_top, scaled(raw_top, row, maps), tl.sum(mass), tl.sum(below))
    log_mass = log_of(sums.mass, sums.top, defined)
    no = tl.full([], False, tl.int1)
    lowest = tl.full([], float("-inf"), tl.float32)
    store_row(
        row, own, no, (lowest, lowest, tl.full([], LOWEST, tl.int32)), raw_top, sums.top, log_mass,
        entropy_of(sums, log_mass), Results(logprobs_ptr, entropy_ptr, outside_ptr, record_ptr),
    )  # fmt: skip


@triton.jit
def entropy_of(sums, log_mass):
    """The entropy of what is kept."""
    return log_mass + (sums.below.to(tl.float64) / sums.mass.to(tl.float64)).to(tl.float32)


@triton.jit
def _whole_row(row, whole, scores, form, BELOW: tl.constexpr, TILE: tl.constexpr):
    """The same by one program, tile after tile, where a row is ``whole``; 0 elsewhere."""
    inverse = inverse_of(row, scores.maps)
    size = tl.where(whole, scores.V, 0)
    raw_top = tl.full([], float("-inf"), tl.float32)
    for start in range(0, size, TILE):
        token = start + tl.arange(0, TILE)
        x = folded_logits(row, token >> 5, token & 31, token, token < scores.V, scores, form)
        raw_top = tl.maximum(raw_top, tl.max(x))
    mass, below = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    broken = tl.full([], 0, tl.int32)
    for start in range(0, size, TILE):
        token = start + tl.arange(0, TILE)
        x = folded_logits(row, token >> 5, token & 31, token, token < scores.V, scores, form)
        tile = tile_of(x, inverse, BELOW)
        more, more_below = joined(tile, raw_top, inverse)
        mass += more
        below += more_below
        broken += (tile.mass != tile.mass).to(tl.int32)
    return KeptSums(raw_top, scaled(raw_top, row, scores.maps), mass, below), broken == 0


# -- Rows of which a selection, or a set, says what is kept ----------------------------------------------------------


@triton.jit
def _least_raw(key, row, maps):
    """The least raw logit whose scaled logit has at least a key: the division never changes the order."""
    low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int64)  # comes to less, or is the least of all
    high = tl.full([], KEY_OF_INFINITY + 1, tl.int64)  # comes to as much
    lane = tl.arange(0, 32) + 1
    for _ in range(_ROUNDS):
        pivot = low + ((high - low) * lane >> 5)
        pivot = tl.minimum(tl.maximum(pivot, low + 1), high)
        reached = (pivot >= high) | (key_of(scaled(number_of(pivot.to(tl.int32)), row, maps)) >= key)
        low = tl.maximum(low, tl.max(tl.where(reached, low, pivot)))
        high = tl.min(tl.where(reached, pivot, high))
    return tl.where(key <= KEY_OF_MINUS_INFINITY, float("-inf"), number_of(high.to(tl.int32)))


@triton.jit
def kept_in_raw(row, kept, maps):
    """What is kept of a row, in raw logits: from where on with a rank, from where on without, and the rank."""
    if maps.temperature_ptr is not None:
        first = _least_raw(kept.cutoff, row, maps)
        above = _least_raw(kept.cutoff + 1, row, maps)
    else:
        first = tl.where(kept.cutoff <= KEY_OF_MINUS_INFINITY, float("-inf"), number_of(kept.cutoff))
        above = tl.where(kept.cutoff < KEY_OF_MINUS_INFINITY, float("-inf"), number_of(kept.cutoff + 1))
    return first, above, kept.rank


@triton.jit(
    do_not_specialize=[*STEPWISE, "stride_target"], do_not_specialize_on_alignment=[*UNALIGNED, *BEGINS_ANYWHERE]
)
def selected_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, work_ptr,
    # outputs
    logprobs_ptr, entropy_ptr, outside_ptr, record_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target, stride_work,
    # constants
    LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr, CERTAIN: tl.constexpr, BELOW: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row of which a selection says what is kept."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    shape = Shape(W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share)
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    own = load_own(row, targets_ptr, stride_target, ignore_index, scores, Form((), 0.0))
    kept = load_kept(work + KEPT_AT)
    whole = is_whole(row, kept, maps)
    if whole:
        kept = all_kept()
    stays = is_kept(own.x, own.known, rank_of(own.token, LOWEST_TIES), kept, BANDED)
    joins = own.known & (stays == 0) & (own.x == own.x)
    source, beside = source_of(work, shape, whole | own.ignored, V, CERTAIN)
    sums = sums_of_kept(
        row, source, kept, beside, shape, own.raw, joins, scores, Form((), 0.0),
        LOWEST_TIES, BANDED, CERTAIN, BELOW, PARTS, BLOCK,
    )  # fmt: skip
    defined = sums.mass > 0
    all_sums, all_defined = _whole_row(row, whole & (own.ignored == 0), scores, Form((), 0.0), BELOW, TILE)
    if whole:
        sums = all_sums
        defined = all_defined
    log_mass = log_of(sums.mass, sums.top, defined)
    store_row(
        row, own, joins, kept_in_raw(row, kept, maps), sums.raw_top, sums.top, log_mass,
        entropy_of(sums, log_mass), Results(logprobs_ptr, entropy_ptr, outside_ptr, record_ptr),
    )  # fmt: skip
    if BANDED:
        record = record_ptr + row * WORDS
        tl.store(record + CUTOFF_AT, kept.cutoff)
        store_float(record + CENTRE_AT, kept.centre)
        tl.store(record + FARTHEST_AT, kept.farthest)


# -- Sets that are given ---------------------------------------------------------------------------------------------


@triton.jit
def span_of(row, sets):
    """Where the ids of a row begin and how many there are; whether all tokens are kept, or more than there is room."""
    if sets.offsets_ptr is not None:
        begin = tl.load(sets.offsets_ptr + row).to(tl.int64)
        count = tl.load(sets.offsets_ptr + row + 1).to(tl.int64) - begin
        room = count
    else:
        begin = row * sets.stride_ids
        count = tl.load(sets.counts_ptr + row * sets.stride_counts).to(tl.int64)
        room = tl.zeros_like(count) + sets.most
    whole = count >= sets.all_tokens
    return begin, tl.where(whole, 0, tl.minimum(count, room)).to(tl.int32), whole, (count > room) & (whole == 0)


@triton.jit
def in_bits(bits_ptr, token, inside):
    """Whether tokens are in a packed set."""
    return ((tl.load(bits_ptr + (token >> 5), mask=inside, other=0) >> (token & 31)) & 1) != 0


@triton.jit
def load_given(start, size, row, begin, sets, scores, BLOCK: tl.constexpr):
    """Raw logits of a block of a given set, whether they are in it, and tokens."""
    place = start + tl.arange(0, BLOCK)
    inside = place < size
    if sets.ids_ptr is not None:
        token = tl.load(sets.ids_ptr + begin + place, mask=inside, other=0).to(tl.int64)
        token = (token - sets.first).to(tl.int32)
        inside = inside & (token >= 0) & (token < scores.V)
    else:
        token = place
        inside = in_bits(sets.bits_ptr + row * sets.stride_bits, token + sets.first, inside)
    x = folded_logits(row, token >> 5, token & 31, token, inside, scores, Form((), 0.0))
    return x, inside, token


@triton.jit(
    do_not_specialize=["stride_temperature", "stride_target", *STEPWISE_SETS],
    do_not_specialize_on_alignment=[*BEGINS_ANYWHERE, *SETS],
)
def given_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, ids_ptr, counts_ptr, offsets_ptr, bits_ptr,
    # outputs
    logprobs_ptr, entropy_ptr, outside_ptr, record_ptr,
    # shapes
    V, most, first, all_tokens,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target, stride_ids, stride_counts, stride_bits,
    # constants
    BELOW: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A row of which a set says what is kept."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, 0, maps)
    sets = Sets(
        ids_ptr, counts_ptr, offsets_ptr, bits_ptr, stride_ids, stride_counts, stride_bits, most, first, all_tokens
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = load_own(row, targets_ptr, stride_target, ignore_index, scores, Form((), 0.0))
    no = tl.full([], False, tl.int1)
    if ids_ptr is not None:
        begin, size, whole, overflows = span_of(row, sets)
    else:
        begin, size, whole, overflows = row, tl.full([], 0, tl.int32) + V, no, no
    size = tl.where(own.ignored | overflows, 0, size)
    raw_key = tl.where(own.known, key_of(own.raw), LOWEST)
    found, number = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        x, inside, token = load_given(start, size, row, begin, sets, scores, BLOCK)
        raw_key = tl.maximum(raw_key, tl.max(tl.where(inside, key_of(x), LOWEST)))
        found += tl.sum((inside & (token == own.token)).to(tl.int32))
        number += tl.sum(inside.to(tl.int32))
    if bits_ptr is not None:
        whole = number >= V
    joins = own.known & (found == 0) & (whole == 0)
    raw_top = number_of(raw_key)
    top = scaled(raw_top, row, maps)
    nothing = tl.full([], 0, tl.int64)
    mass = tl.where(joins, weight_of(own.x, top), nothing)
    below = tl.where(joins, below_of(own.x, top, joins), nothing)
    for start in range(0, size, BLOCK):
        x, inside, token = load_given(start, size, row, begin, sets, scores, BLOCK)
        x = scaled(x, row, maps)
        mass += tl.sum(tl.where(inside, weight_of(x, top), 0))
        if BELOW:
            below += tl.sum(below_of(x, top, inside))
    sums = KeptSums(raw_top, top, mass, below)
    defined = (mass > 0) & (overflows == 0)
    all_sums, all_defined = _whole_row(row, whole & (own.ignored == 0), scores, Form((), 0.0), BELOW, TILE)
    if whole:
        sums = all_sums
        defined = all_defined
    log_mass = log_of(sums.mass, sums.top, defined)
    lowest = tl.full([], float("-inf"), tl.float32)
    store_row(
        row, own, joins, (lowest, lowest, tl.full([], LOWEST, tl.int32)), sums.raw_top, sums.top, log_mass,
        entropy_of(sums, log_mass), Results(logprobs_ptr, entropy_ptr, outside_ptr, record_ptr),
    )  # fmt: skip
