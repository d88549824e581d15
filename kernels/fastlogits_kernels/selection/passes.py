"""A pass over a row, or over a list of its candidates: what it measures, and the tally of what it finds."""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.collect import Collection, collect
from fastlogits_kernels.selection.goals import (
    below_of,
    centre_of,
    term_of,
    unpacked,
    weighed,
)
from fastlogits_kernels.selection.row import (
    HIGHEST,
    LOWEST,
    ONE,
    Form,
    RowSums,
    Scores,
    exp,
    is_candidate,
    is_kept,
    key_of,
    rank_of,
    scaled,
    scaled_logits,
    weight_of,
)

# Where a pass looks for tokens.
ROW, LIST = (tl.constexpr(i) for i in range(2))
# By what it orders them.
BY_LOGIT, BY_RANK, BY_DISTANCE, BY_TERM = (tl.constexpr(i) for i in range(4))
# What it adds up beside their number.
NOTHING, MASS, BELOW, SURPRISE, SQUARES = (tl.constexpr(i) for i in range(5))


class Source(NamedTuple):
    """Where tokens are looked for, in the row or in a list of them; and how many."""

    kind: tl.tensor
    pairs: tl.tensor
    size: tl.tensor


class Range(NamedTuple):
    """Which logits are candidates: see ``is_candidate``. Those between two raw logits are kept for certain."""

    least: tl.tensor
    banded: tl.tensor
    centre: tl.tensor
    raw_first: tl.tensor
    raw_last: tl.tensor


class Row(NamedTuple):
    """What doesn't change while a row is processed.

    ``collection`` is where a search collects; ``likely_low`` and ``likely_high`` are keys around the cut-off, as the
    sample tells; ``top_key`` is the largest key where the ``sums`` of the row are known, else LOWEST.
    """

    index: tl.tensor
    scores: Scores
    range: Range
    work: tl.tensor
    collection: Collection
    likely_low: tl.tensor
    likely_high: tl.tensor
    sums: RowSums
    top_key: tl.tensor
    n_rules: tl.tensor


class Config(NamedTuple):
    """What the compiler knows; passed on and never assigned, see ``Form``."""

    form: Form
    LOWEST_TIES: tl.constexpr
    NORMALISE: tl.constexpr
    PORTABLE: tl.constexpr
    BLOCK: tl.constexpr
    ROOM: tl.constexpr


class Measure(NamedTuple):
    """What a pass measures: an order, an amount, and what these are about.

    ``tie`` is the key of the tokens that are ordered by rank, ``centre`` of what distances are, ``top``, ``mass`` and
    ``largest`` the largest logit, mass and term of the entropy of what is kept.
    """

    order: tl.tensor
    amount: tl.tensor
    tie: tl.tensor
    centre: tl.tensor
    top: tl.tensor
    mass: tl.tensor
    largest: tl.tensor


class Pass(NamedTuple):
    """What a pass does: count at or above three keys, or collect, between two keys; over how many tokens.

    ``simple`` ones count or weigh, in the order of the logits or of distances. ``looks``: its tally says something.
    """

    first: tl.tensor
    second: tl.tensor
    third: tl.tensor
    low: tl.tensor
    high: tl.tensor
    size: tl.tensor
    simple: tl.tensor
    searches: tl.tensor
    collects: tl.tensor
    looks: tl.tensor
    knows_mass: tl.tensor


class Tally(NamedTuple):
    """What a pass has found: the least and the largest key, and numbers and amounts at or above each of three keys."""

    least: tl.tensor
    most: tl.tensor
    number_1: tl.tensor
    amount_1: tl.tensor
    number_2: tl.tensor
    amount_2: tl.tensor
    number_3: tl.tensor
    amount_3: tl.tensor


@triton.jit
def is_certain_of(raw, of):
    """Whether raw logits are kept for certain."""
    return (raw >= of.raw_first) & (raw <= of.raw_last)


@triton.jit
def is_candidate_of(x, raw, of):
    """Which tokens of a list are candidates: of those that were collected, a few too many."""
    return is_candidate(x, of.least, of.banded, of.centre, True) & (is_certain_of(raw, of) == 0)


@triton.jit
def load_block(start, source, row, config):
    """Logits, whether they are there, tokens, and ranks of a block of where tokens are looked for."""
    place = start + tl.arange(0, config.BLOCK)
    inside = place < source.size
    if source.kind == ROW:
        token = place
        valid = inside
        x = scaled_logits(row.index, token >> 5, token & 31, token, inside, row.scores, config.form)
    else:
        pair = tl.load(source.pairs + place, mask=inside, other=0)
        token = (pair >> 32).to(tl.int32)
        raw = pair.to(tl.int32).to(tl.float32, bitcast=True)
        x = scaled(raw, row.index, row.scores.maps)
        valid = inside & is_candidate_of(x, raw, row.range)
    return x, valid, token, rank_of(token, config.LOWEST_TIES)


@triton.jit
def measured(x, valid, rank, kept, measure):
    """What a pass orders tokens by, which of them count, and what it adds up of each."""
    counts = is_kept(x, valid, rank, kept, True)
    key = key_of(x)
    amount = tl.zeros_like(rank).to(tl.int64)
    if measure.order == BY_RANK:
        counts = counts & (key == measure.tie)
        key = rank
    elif measure.order == BY_DISTANCE:
        key = key_of(-tl.abs(x - measure.centre))
    if (measure.amount == SURPRISE) | (measure.order == BY_TERM):
        term = term_of(x, measure.top, measure.mass)
        amount = (term / measure.largest * ONE).to(tl.int64)
        if measure.order == BY_TERM:
            key = key_of(term)
            amount = tl.zeros_like(amount)
    elif measure.amount == MASS:
        amount = weight_of(x, measure.top)
    elif measure.amount == BELOW:
        amount = below_of(x, measure.top, counts)
    return key, counts, amount


@triton.jit
def _added(key, counts, amount, what, sums, least, most):
    """Sums at or above three keys, and the least and the largest key between two, with those of some tokens."""
    first, second, third = sums
    each = weighed(counts, amount)
    first += tl.where(key >= what.first, each, 0)
    second += tl.where(key >= what.second, each, 0)
    third += tl.where(key >= what.third, each, 0)
    least = tl.minimum(least, tl.where(counts & (key >= what.low), key, HIGHEST))
    most = tl.maximum(most, tl.where(counts & (key <= what.high), key, LOWEST))
    return (first, second, third), least, most


@triton.jit
def _squares_added(x, counts, top, sums):
    """Sums of the finite logits: their number, their distances from a centre and the squares, float64 as bits."""
    number, distances, squares = sums
    counts = counts & (tl.abs(x) < float("inf"))
    off = tl.where(counts, x - centre_of(top), 0.0).to(tl.float64)
    number = number.to(tl.float64, bitcast=True) + counts.to(tl.float64)
    distances = distances.to(tl.float64, bitcast=True) + off
    squares = squares.to(tl.float64, bitcast=True) + off * off
    return number.to(tl.int64, bitcast=True), distances.to(tl.int64, bitcast=True), squares.to(tl.int64, bitcast=True)


@triton.jit
def _sum_of_bits(bits):
    return tl.sum(bits.to(tl.float64, bitcast=True)).to(tl.int64, bitcast=True)


@triton.jit
def _tally_of(sums, least, most, what, squares):
    """The tally of all threads; each sum over them costs time."""
    first, second, third = sums
    none, nothing = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    number_1, number_2, number_3 = none, none, none
    amount_1, amount_2, amount_3 = nothing, nothing, nothing
    least_of_all, most_of_all = none, none
    if squares:
        amount_1, amount_2, amount_3 = _sum_of_bits(first), _sum_of_bits(second), _sum_of_bits(third)
    elif what.looks:
        count_a, amount_a = unpacked(first)
        number_1, amount_1 = tl.sum(count_a), tl.sum(amount_a)
        most_of_all = tl.max(most)
        if what.searches:
            count_b, amount_b = unpacked(second)
            count_c, amount_c = unpacked(third)
            number_2, amount_2 = tl.sum(count_b), tl.sum(amount_b)
            number_3, amount_3 = tl.sum(count_c), tl.sum(amount_c)
            least_of_all = tl.min(least)
    return Tally(least_of_all, most_of_all, number_1, amount_1, number_2, amount_2, number_3, amount_3)


@triton.jit
def pass_over(what, source, kept, measure, row, config):
    """Pass over the tokens: a tally of them, or those between two keys collected.

    Each thread adds up for itself, and all of them once at the end. Squares of deviations are float64 numbers in the
    same words.
    """
    nothing = tl.zeros([config.BLOCK], tl.int64)
    sums = (nothing, nothing, nothing)
    least, most = tl.full([config.BLOCK], HIGHEST, tl.int32), tl.full([config.BLOCK], LOWEST, tl.int32)
    by_distance = measure.order == BY_DISTANCE
    cuts = (kept.cutoff > LOWEST) | (kept.farthest > LOWEST)
    one = tl.where(measure.amount == MASS, ONE, 0.0)
    source = Source(source.kind, source.pairs, what.size)
    for start in range(0, tl.where(what.simple, what.size, 0), config.BLOCK):
        x, valid, token, rank = load_block(start, source, row, config)
        counts = valid
        if cuts:
            counts = is_kept(x, valid, rank, kept, True)
        key = key_of(tl.where(by_distance, -tl.abs(x - measure.centre), x))
        p = exp(x - measure.top) * one
        amount = tl.where(p == p, p, 0.0).to(tl.int64)
        if what.searches:
            sums, least, most = _added(key, counts, amount, what, sums, least, most)
        else:
            first, second, third = sums
            sums = (first + weighed(counts, amount), second, third)
            most = tl.maximum(most, tl.where(counts, key, LOWEST))
    for start in range(0, tl.where(what.simple, 0, what.size), config.BLOCK):
        x, valid, token, rank = load_block(start, source, row, config)
        key, counts, amount = measured(x, valid, rank, kept, measure)
        if measure.amount == SQUARES:
            sums = _squares_added(x, counts, measure.top, sums)
        elif what.collects:
            between = counts & (key >= what.low) & (key <= what.high)
            collect(between.to(tl.int32) != 0, x, token, row.collection, config.PORTABLE)
        else:
            sums, least, most = _added(key, counts, amount, what, sums, least, most)
    return _tally_of(sums, least, most, what, measure.amount == SQUARES)
