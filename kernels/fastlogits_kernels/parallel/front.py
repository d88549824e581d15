"""The token of each row where rules keep any number of the most likely tokens, from parts of a vocabulary.

Such rules keep the first tokens in one order: by logit, then by rank. So the token that is sampled is better perturbed
than all before it in that order: a record. Each rank sends the records of its part, which are few. Then the mass before
each record says which of them are kept; the last one that is wins. The README beside says more.

Bytes moved: three reads of the part's logits, of which the third leaves out tiles that have no token before the best
record, and of at most two tiles once more. Sent by a rank: 536 bytes of each row; then 544, and 16 for each shared
tile, where anything is added up.
"""

from __future__ import annotations

from fastlogits_kernels.parallel.best import best_number
from fastlogits_kernels.parallel.layout import NOBODY, RECORDS
from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.collect import load_candidates
from fastlogits_kernels.selection.goals import can_act, cutoff_key_of, goal_of, stats_of
from fastlogits_kernels.selection.noise import (
    coarse_of,
    coarse_words,
    least_coarse,
    least_perturbed,
    load_request,
    perturbed_key,
    store_token,
)
from fastlogits_kernels.selection.row import (
    GOAL,
    HIGHEST,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MAP_STRIDES,
    MASS_GOAL,
    NEEDS_SUMS,
    OCTET,
    ONE,
    UNALIGNED,
    Form,
    Maps,
    RowSums,
    Sampling,
    Scores,
    cutoff,
    folded_logits,
    inverse_of,
    is_active,
    key_of,
    let_next_launch,
    load_float,
    number_of,
    rank_of,
    rule_value,
    scaled,
    store_float,
    wait_for_launch,
    weight_of,
)
from fastlogits_kernels.selection.tiles import joined, tile_of
from fastlogits_kernels.training.rows import TILE_WORDS, store_tile
from fastlogits_kernels.training.shards import (
    RECORDS_AT,
    SHARED_AT,
    TOLD_WORDS,
    Part,
    edge_tops,
    joined_sums,
    load_own_tiles,
    load_told,
    store_sums,
    store_told,
)

ROOM = tl.constexpr(RECORDS)
"""Records of a row, or of a part of it; and tokens of a tile that may be some."""
# A row's front: how many records, then a scaled logit and a token each.
FRONT_WORDS = tl.constexpr(3 + 2 * RECORDS)
_WEIGHED_AT = tl.constexpr(1)  # of a front: how many of its records have to be weighed
_TOP_AT = tl.constexpr(2)  # beside which scaled logit
_FRONT_AT = tl.constexpr(3)
# What a rank sends of a row: what is told of it (training/shards.py), then its records, and zeros after the last.
SENT_WORDS = tl.constexpr(TOLD_WORDS.value + 2 * RECORDS)

_FEW = tl.constexpr(256)  # survivors of a row, nearly always
_LOW_WORD = tl.constexpr(0xFFFFFFFF)


@triton.jit
def _ordered(x, rank):
    """One number for a scaled logit and a rank from 0 on: the largest is that of the first token in the order."""
    return (key_of(x).to(tl.int64) << 32) + rank.to(tl.int64)


@triton.jit
def _rank_from_0(token, LOWEST_TIES: tl.constexpr):
    """The rank of tokens, or of octets, as a number from 0 on: of those that tie the largest comes first."""
    rank = token
    if LOWEST_TIES:
        rank = HIGHEST - token
    return rank


@triton.jit
def _order_of(x, token, LOWEST_TIES: tl.constexpr):
    """Where tokens stand in the order in which rules keep them: the largest number is the first."""
    return _ordered(x, _rank_from_0(token, LOWEST_TIES))


@triton.jit
def _ordered_and_best(x, valid, token, request, LOWEST_TIES: tl.constexpr):
    """Where tokens stand in the order, and how they win; NOBODY where there is none."""
    best = tl.where(valid, best_number(perturbed_key(x, token, request), token), NOBODY)
    return _order_of(x, token, LOWEST_TIES), best


@triton.jit
def _first_of(order, which):
    """The place in the order of the first of some tokens."""
    return tl.max(tl.where(which, order, NOBODY))


@triton.jit
def _store_record(to, place, order, LOWEST_TIES: tl.constexpr):
    """Store the scaled logit and the token of a place in the order."""
    rank = (order & _LOW_WORD).to(tl.int32)
    tl.store(to + 2 * place, number_of((order >> 32).to(tl.int32)).to(tl.int32, bitcast=True))
    tl.store(to + 2 * place + 1, HIGHEST - rank if LOWEST_TIES else rank)


@triton.jit
def _store_front(to, x, valid, token, request, LOWEST_TIES: tl.constexpr):
    """Store the records of some tokens, the best perturbed one first; returns how many there are.

    Of too many, the first token in the order comes last all the same, which is always kept.
    """
    order, best = _ordered_and_best(x, valid, token, request, LOWEST_TIES)
    count = tl.full([], 0, tl.int32)
    most = tl.max(best)
    while (most > NOBODY) & (count < ROOM):
        at = _first_of(order, best == most)
        _store_record(to, count, at, LOWEST_TIES)
        count += 1
        best = tl.where(order > at, best, NOBODY)
        most = tl.max(best)
    if most > NOBODY:
        _store_record(to, ROOM - 1, _first_of(order, best > NOBODY), LOWEST_TIES)
    return count


# -- A rank's part ---------------------------------------------------------------------------------------------------

_STEPWISE = [*MAP_STRIDES, "stride_seed", "stride_position", "stride_temperature", "W", "tiles", "first"]
_STEPWISE += ["first_slot", "last_slot", "ranks", "shared", "all_tokens", "stride_rank", "stride_sent"]
_ANYWHERE = [*UNALIGNED, "survivors_ptr", "counts_ptr", "tiles_ptr", "pivots_ptr", "bounds_ptr", "sent_ptr"]
_ANYWHERE += ["told_ptr", "front_ptr", "sums_ptr"]


@triton.jit
def _load_octets(row, tile, offset, scores, form, TILE: tl.constexpr):
    """The folded logits of a tile in octets, whether they are there, and where in the part they stand."""
    octet = tl.arange(0, TILE // OCTET)[:, None]
    place = tile * TILE - offset + octet * OCTET + tl.arange(0, OCTET)[None, :]
    inside = (place >= 0) & (place < scores.V)
    word = tl.where(inside, place >> 5, scores.W)  # none, before the part
    return folded_logits(row, word, place & 31, place, inside, scores, form), inside, place


@triton.jit
def _octets_of(tile, offset, first, TILE: tl.constexpr):
    """The octets of a tile, in the whole vocabulary."""
    return (first - offset + tile * TILE) // OCTET + tl.arange(0, TILE // OCTET)


@triton.jit
def _pivots_of(x, octets, words, inverse, LOWEST_TIES: tl.constexpr):
    """Of each octet a token of its largest logit: its place in the order, and a lower bound of its perturbed logit."""
    largest = tl.max(x, 1)
    lane = tl.min(tl.where(x == largest[:, None], tl.arange(0, OCTET)[None, :], OCTET - 1), 1)
    least = least_perturbed(largest * inverse, coarse_of(octets * OCTET + lane, words))
    # More than what products, logarithms and differences are rounded by.
    least = tl.where(largest > float("-inf"), least - tl.abs(least) * 4e-6 - 1e-3, float("-inf"))
    return _ordered(largest, _rank_from_0(octets, LOWEST_TIES)), least


@triton.jit
def _most_perturbed(x, coarse, inverse):
    """An upper bound of perturbed logits, from the first bits of the noise."""
    return x * inverse - tl.log(coarse.to(tl.float32) * (2.0**-16))


@triton.jit
def _survive(stays, x, most, rank, order, least, inverse):
    """Which tokens no pivot rules out: those that come before it, or may be better perturbed; or which octets.

    Of an octet ``x`` is the largest logit, and ``most`` an upper bound for all of it. Pivots are gone through from the
    best one on; each of those that come before all better ones.
    """
    y = x * inverse
    y += tl.abs(y) * 2e-6
    best = tl.max(least)
    while best > float("-inf"):
        at = _first_of(order, least == best)
        its_x = number_of((at >> 32).to(tl.int32))
        # Logits that differ may be one after the division.
        comes_later = (y < its_x * inverse) | ((x == its_x) & (rank < (at & _LOW_WORD).to(tl.int32)))
        stays = stays & (((most < best) & comes_later) == 0)
        least = tl.where(order > at, least, float("-inf"))
        best = tl.max(least)
    return stays


@triton.jit
def _records_among(x, stays, token, request, LOWEST_TIES: tl.constexpr):
    """Which of some tokens are records, and how many: of too many the best ones, and the first in the order."""
    order, best = _ordered_and_best(x, stays, token, request, LOWEST_TIES)
    records = best < NOBODY
    count = tl.full([], 0, tl.int32)
    most = tl.max(best)
    while most > NOBODY:
        at = _first_of(order, best == most)
        if count == ROOM - 1:
            at = _first_of(order, best > NOBODY)
        records = records | (order == at)
        count += 1
        best = tl.where(order > at, best, NOBODY)
        most = tl.max(best)
    return records, count


@triton.jit
def _store_tokens(to, x, token, stays):
    """Store some tokens of octets with their logits."""
    chosen = stays.to(tl.int32)
    of_octet = tl.sum(chosen, 1)
    place = (tl.cumsum(of_octet, 0) - of_octet)[:, None] + tl.cumsum(chosen, 1) - chosen
    tl.store(to + 2 * place, x.to(tl.int32, bitcast=True), mask=stays)
    tl.store(to + 2 * place + 1, token, mask=stays)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_ANYWHERE)
def pivots_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    # outputs
    tiles_ptr, pivots_ptr, bounds_ptr, counts_ptr,
    # shapes
    V, W, tiles, offset, first,
    # strides
    stride_row, stride_token,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What a tile comes to, and the best pivot of it. Begins the count of a row's survivors with 0."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    let_next_launch(PDL)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    x, _inside, _place = _load_octets(row, tile, offset, scores, Form(OPS, MAX), TILE)
    inverse = inverse_of(row, maps)
    request = load_request(row, Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position), maps)
    of = tile_of(x, inverse, BELOW=False)
    at = row * tiles + tile
    store_tile(tiles_ptr + at * TILE_WORDS, of)
    octets = _octets_of(tile, offset, first, TILE)
    words = coarse_words(octets, request.seed, request.position)
    order, least = _pivots_of(x, octets, words, inverse, LOWEST_TIES)
    best = tl.max(least)
    tl.store(bounds_ptr + at, best)
    tl.store(pivots_ptr + at, _first_of(order, least == best))
    if tile == 0:
        tl.store(counts_ptr + row, 0)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_ANYWHERE)
def survivors_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    tiles_ptr, pivots_ptr, bounds_ptr,
    # outputs
    survivors_ptr, counts_ptr,
    # shapes
    V, W, tiles, offset, first,
    # strides
    stride_row, stride_token,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The tokens of a tile that may be records of the row, with their logits before the temperature.

    Beside NaN or +inf, and where the row is greedy, only the best one is: no rule drops anything there.
    """
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    let_next_launch(PDL)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    x, inside, place = _load_octets(row, tile, offset, scores, Form(OPS, MAX), TILE)
    token = place + first
    inverse = inverse_of(row, maps)
    request = load_request(row, Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position), maps)
    here = survivors_ptr + row * tiles * (2 * ROOM)
    octets = _octets_of(tile, offset, first, TILE)
    words = coarse_words(octets, request.seed, request.position)
    wait_for_launch(PDL)
    mass = tl.load(tiles_ptr + (row * tiles + tile) * TILE_WORDS + 1)
    if request.greedy | (mass != mass):
        key = tl.where(inside, key_of(scaled(x, row, maps)), LOWEST)
        top = tl.max(key)
        lowest = tl.min(tl.where(key == top, token, HIGHEST))
        raw = tl.max(tl.where(token == lowest, key_of(x), LOWEST))
        at = here + 2 * tl.atomic_add(counts_ptr + row, 1, sem="relaxed")
        tl.store(at, number_of(raw).to(tl.int32, bitcast=True))
        tl.store(at + 1, lowest)
    else:
        each = tl.arange(0, TILES)
        order = tl.load(pivots_ptr + row * tiles + each, mask=each < tiles, other=NOBODY)
        least = tl.load(bounds_ptr + row * tiles + each, mask=each < tiles, other=float("-inf"))
        rank = _rank_from_0(octets, LOWEST_TIES)
        largest = tl.max(x, 1)
        most = _most_perturbed(largest, least_coarse(words), inverse)
        octet_stays = _survive(largest > float("-inf"), largest, most, rank, order, least, inverse)
        count = tl.sum(octet_stays.to(tl.int32))
        stays = inside & (x > float("-inf")) & octet_stays[:, None]
        if count > 0:
            # In most tiles none is left.
            words_of = (words[0][:, None], words[1][:, None], words[2][:, None], words[3][:, None])
            most_of = _most_perturbed(x, coarse_of(token, words_of), inverse)
            stays = _survive(stays, x, most_of, rank[:, None], order, least, inverse)
            count = tl.sum(stays.to(tl.int32))
            if count > ROOM:
                own_order, own_least = _pivots_of(x, octets, words, inverse, LOWEST_TIES)
                stays = _survive(stays, x, most_of, rank[:, None], own_order, own_least, inverse)
                count = tl.sum(stays.to(tl.int32))
        if count > ROOM:
            stays, count = _records_among(scaled(x, row, maps), stays, token, request, LOWEST_TIES)
        if count > 0:
            at = here + 2 * tl.atomic_add(counts_ptr + row, count, sem="relaxed")
            _store_tokens(at, x, token, stays)


@triton.jit
def _store_front_of(row, survivors, found, to, request, maps, LOWEST_TIES: tl.constexpr, SLOTS: tl.constexpr):
    """Store the records of a row's survivors."""
    raw, valid, token = load_candidates(survivors.to(tl.pointer_type(tl.int64)), found, SLOTS)
    x = scaled(raw, row, maps)
    # What has no probability is never sampled where there is anything else.
    valid = valid & (key_of(x) > KEY_OF_MINUS_INFINITY)
    return _store_front(to, x, valid, token, request, LOWEST_TIES)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_ANYWHERE)
def front_kernel(
    # inputs
    temperature_ptr, stride_temperature,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    survivors_ptr, counts_ptr, tiles_ptr,
    # output
    sent_ptr,
    # shapes
    tiles, first_slot, last_slot,
    # strides
    stride_sent,
    # constants
    LOWEST_TIES: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What is sent of a part of a row: the largest logits, and the records."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    row = tl.program_id(0).to(tl.int64)
    request = load_request(row, Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position), maps)
    to = sent_ptr + row * stride_sent
    wait_for_launch(PDL)
    tile = tl.arange(0, TILES)
    here = tiles_ptr + (row * tiles + tile) * TILE_WORDS
    tops = tl.load(here, mask=tile < tiles, other=float("-inf"))
    masses = tl.load(here + 1, mask=tile < tiles, other=0.0)
    top = tl.max(tops)
    # A mass is undefined beside NaN, which is above all.
    top = tl.where((top < float("inf")) & (tl.sum((masses != masses).to(tl.int32)) > 0), float("nan"), top)
    nothing = tl.full([], float("-inf"), tl.float32)
    first_top, last_top = edge_tops(tops, tile, tiles, first_slot, last_slot)
    found = tl.load(counts_ptr + row)
    here = survivors_ptr + row * tiles * (2 * ROOM)
    if found <= _FEW:
        count = _store_front_of(row, here, found, to + TOLD_WORDS, request, maps, LOWEST_TIES, _FEW)
    else:
        count = _store_front_of(row, here, found, to + TOLD_WORDS, request, maps, LOWEST_TIES, TILES * ROOM)
    word = tl.arange(0, 2 * ROOM)
    tl.store(to + TOLD_WORDS + word, tl.zeros_like(word), mask=word >= 2 * count)
    none = tl.full([], 0, tl.int32)
    store_told(to.to(tl.pointer_type(tl.float32)), first_top, last_top, top, nothing, none, count)


# -- All parts -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_ANYWHERE)
def join_fronts_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    tiles_ptr, sent_ptr, told_ptr, slots_ptr,
    # outputs
    front_ptr, sums_ptr,
    # shapes
    V, W, tiles, offset, first_slot, last_slot, ranks, shared, all_tokens,
    # strides
    stride_row, stride_token, stride_rank, stride_sent,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, RANKS: tl.constexpr, TILES: tl.constexpr,
    SHARED: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The records of a row, from those that all ranks have sent; and what this rank's part comes to, if anything asks.

    What is added up of the records begins with 0.
    """
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    request = load_request(row, Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position), maps)
    slot = tl.arange(0, RANKS * ROOM)
    here = sent_ptr + (slot // ROOM).to(tl.int64) * stride_rank + row * stride_sent
    found = tl.load(here + RECORDS_AT, mask=slot // ROOM < ranks, other=0).to(tl.float32, bitcast=True)
    valid = slot % ROOM < found.to(tl.int32)
    here += TOLD_WORDS + 2 * (slot % ROOM)
    x = tl.load(here, mask=valid, other=0).to(tl.float32, bitcast=True)
    token = tl.load(here + 1, mask=valid, other=0)
    to = front_ptr + row * FRONT_WORDS
    count = _store_front(to + _FRONT_AT, x, valid, token, request, LOWEST_TIES)
    tl.store(to, count)
    if sums_ptr is not None:
        part = Part(tiles, offset, first_slot, last_slot, ranks, slots_ptr, stride_rank, stride_sent)
        told = load_told(row, told_ptr, part, all_tokens, RANKS)
        acts = (tl.abs(told.raw_top) < float("inf")) & (request.greedy == 0)
        tl.store(to + _WEIGHED_AT, tl.where(acts, count, 0))
        store_float(to + _TOP_AT, scaled(told.raw_top, row, maps))
        here = sums_ptr + row * (SHARED_AT + 2 * shared + ROOM)
        of = load_own_tiles(row, acts, tiles_ptr, part, TILES)
        mass, _below = joined(of, told.raw_top, inverse_of(row, maps))
        no = tl.full([], 0, tl.int64)
        store_sums(
            row, acts, tl.sum(mass), no, no, no, told, here, shared, part, scores, Form(OPS, MAX), False, SHARED, TILE
        )  # fmt: skip
        tl.store(here + SHARED_AT + 2 * shared + tl.arange(0, ROOM), tl.zeros([ROOM], tl.int64))


@triton.jit
def _mass_from(x, least, weight):
    """The mass of what is at least so large."""
    return tl.sum(tl.where(x >= least, weight, 0))


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_ANYWHERE)
def weigh_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    tiles_ptr, front_ptr,
    # output
    sums_ptr,
    # shapes
    V, W, tiles, offset, first, shared,
    # strides
    stride_row, stride_token,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Add up the mass of a tile's tokens before each record; a tile that has none is not read."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    front = front_ptr + row * FRONT_WORDS
    to = sums_ptr + row * (SHARED_AT + 2 * shared + ROOM) + SHARED_AT + 2 * shared
    tile_top = scaled(tl.load(tiles_ptr + (row * tiles + tile) * TILE_WORDS), row, maps)
    wait_for_launch(PDL)
    count = tl.load(front + _WEIGHED_AT)
    count = tl.where(tile_top < load_float(front + _FRONT_AT), 0, count)
    place = tile * TILE - offset + tl.arange(0, TILE)
    inside = (place >= 0) & (place < tl.where(count > 0, V, 0))
    token = place + first
    word = tl.where(inside, place >> 5, W)  # none, before the part
    x = scaled(folded_logits(row, word, place & 31, place, inside, scores, Form(OPS, MAX)), row, maps)
    weight = tl.where(inside, weight_of(x, load_float(front + _TOP_AT)), 0)
    rank = rank_of(token, LOWEST_TIES)
    start = tile * TILE - offset + first
    one_rank, other_rank = rank_of(start, LOWEST_TIES), rank_of(start + TILE - 1, LOWEST_TIES)
    first_rank, last_rank = tl.minimum(one_rank, other_rank), tl.maximum(one_rank, other_rank)
    record = tl.full([], 0, tl.int32)
    while record < count:
        its_x = load_float(front + _FRONT_AT + 2 * record)
        its_rank = rank_of(tl.load(front + _FRONT_AT + 2 * record + 1), LOWEST_TIES)
        above = number_of(key_of(its_x) + 1)
        if (first_rank <= its_rank) & (its_rank <= last_rank):
            mass = _mass_from(x, tl.where(rank > its_rank, its_x, above), weight)
        else:
            # Of a tile that doesn't have the record, all tokens that tie with it are before it, or none.
            mass = _mass_from(x, tl.where(first_rank > its_rank, its_x, above), weight)
        if mass > 0:
            tl.atomic_add(to + record, mass, sem="relaxed")
        # Nothing is before those that follow either.
        record = tl.where(mass > 0, record + 1, count)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_ANYWHERE)
def pick_kernel(
    # inputs
    values, temperature_ptr, stride_temperature,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    told_ptr, slots_ptr, front_ptr, sums_ptr,
    # output
    tokens_ptr,
    # shapes
    all_tokens, ranks, shared,
    # strides
    stride_rank, stride_sent,
    # constants
    KINDS: tl.constexpr, PLACES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """The token of a row: the best perturbed record that the rules keep."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    row = tl.program_id(0).to(tl.int64)
    request = load_request(row, Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position), maps)
    part = Part(0, 0, -1, -1, ranks, slots_ptr, stride_rank, stride_sent)
    told = load_told(row, told_ptr, part, all_tokens, RANKS)
    top = scaled(told.raw_top, row, maps)
    top_key = key_of(top)
    nothing, summed = tl.full([], 0.0, tl.float64), tl.full([], True, tl.int1)
    mass = nothing.to(tl.int64)
    slot = tl.arange(0, ROOM)
    before = tl.zeros([ROOM], tl.int64)
    if sums_ptr is not None:
        here = sums_ptr + row * (SHARED_AT + 2 * shared + ROOM)
        sums, _log_mass = joined_sums(row, told, here, shared, maps)
        mass = sums.mass
        before = tl.load(here + SHARED_AT + 2 * shared + slot)
    # As a selection has them.
    stats = stats_of(mass, mass, summed, RowSums(mass.to(tl.float64) / ONE, nothing, nothing, nothing))
    count = tl.load(front_ptr + row * FRONT_WORDS)
    here = front_ptr + row * FRONT_WORDS + _FRONT_AT + 2 * slot
    key = key_of(tl.load(here, mask=slot < count, other=0).to(tl.float32, bitcast=True))
    kept = slot < count
    for i in tl.static_range(len(KINDS)):
        value = rule_value(row, values, PLACES[i])
        active = is_active(value, all_tokens, KINDS[i], PLACES[i] >= 0) & (request.greedy == 0)
        if active & can_act(top_key, NEEDS_SUMS[KINDS[i]], GOAL[KINDS[i]]):
            if GOAL[KINDS[i]] == MASS_GOAL:
                goal = goal_of(value, stats.all_mass, tl.full([], 1, tl.int32), tl.full([], MASS_GOAL, tl.int32))
                kept = kept & (before < tl.maximum(goal.amount, 1))
            else:
                limit = cutoff(value, top, stats.mass, top, top, KINDS[i])
                kept = kept & (key >= tl.minimum(cutoff_key_of(limit), top_key))
    # The best perturbed one comes first, and the first token in the order last.
    best = tl.min(tl.where(kept, slot, tl.maximum(count, 1) - 1))
    token = tl.load(front_ptr + row * FRONT_WORDS + _FRONT_AT + 2 * best + 1, mask=count > 0, other=HIGHEST)
    store_token(tokens_ptr + row, token)
