"""What both refinements share: the goal or the cut-off of a rule, and the search for the key that reaches it.

Masses are integers, so that a sum doesn't depend on the order of its terms: see the README beside.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.row import (
    BRACKET,
    CERTAIN_AT,
    COUNT_GOAL,
    DISTANCE_GOAL,
    ENTROPY_GOAL,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MASS_GOAL,
    NO_GOAL,
    ONE,
    PART_COUNT_AT,
    PART_LARGEST_AT,
    PART_MASS_AT,
    PART_WORDS,
    TOP_H_TOKENS,
    Certain,
    Kept,
    exp,
    key_of,
    number_of,
    weight_of,
)

COUNTED = tl.constexpr(50)  # sums of weights hold a count from this bit on
LEAST_TERM = tl.constexpr(1.2e-38)  # of an entropy: the least normal float32 number, about
_IMPOSSIBLE = tl.constexpr(103.0)  # a token so far below the largest logit has no probability in float32


class Goal(NamedTuple):
    """How many tokens, and what amount of them, are to be at or above the key that is searched for."""

    number: tl.tensor
    amount: tl.tensor


class Interval(NamedTuple):
    """The keys among which a search is, from ``low`` to below ``high``; how many tokens of what amount reach each.

    ``number`` and ``amount`` are those at or above ``low``, ``above`` and ``amount_above`` those at or above ``high``.
    """

    low: tl.tensor
    high: tl.tensor
    number: tl.tensor
    amount: tl.tensor
    above: tl.tensor
    amount_above: tl.tensor


class Found(NamedTuple):
    """What a search has found: a key, how many tokens are at or above it and their amount, and the same above it."""

    key: tl.tensor
    number: tl.tensor
    amount: tl.tensor
    above: tl.tensor
    amount_above: tl.tensor


class Stats(NamedTuple):
    """What is kept: its mass as an integer, and float32 in units of the largest probability; its mean distance."""

    all_mass: tl.tensor
    mass: tl.tensor
    distance: tl.tensor


# -- What is kept ---------------------------------------------------------------------------------------------------


@triton.jit
def from_key(kept, key):
    """``kept`` without what is below a key."""
    rank = tl.where(key > kept.cutoff, LOWEST, kept.rank)
    return Kept(tl.maximum(key, kept.cutoff), rank, kept.centre, kept.farthest)


@triton.jit
def with_ties(kept, key, rank):
    """``kept`` without what is below a key, and without the tokens at it that have a lower rank."""
    # A rule that would keep more than is left drops nothing.
    higher = key > kept.cutoff
    rank = tl.where(higher, rank, tl.where(key == kept.cutoff, tl.maximum(rank, kept.rank), kept.rank))
    return Kept(tl.maximum(key, kept.cutoff), rank, kept.centre, kept.farthest)


@triton.jit
def cut_below(kept, top):
    """``kept`` without what float32 takes for impossible beside the largest logit."""
    return from_key(kept, key_of(top - _IMPOSSIBLE))


@triton.jit
def load_certain(work, shape, state, PARTS: tl.constexpr):
    """What the filter has kept for certain of a row beside its candidates."""
    part = tl.arange(0, PARTS)
    there = part < tl.where(state == BRACKET, shape.parts, 0)
    here = work + shape.parts_at + PART_WORDS * part
    mass_here = (here + PART_MASS_AT).to(tl.pointer_type(tl.int64))
    return Certain(
        tl.sum(tl.load(here + PART_COUNT_AT, mask=there, other=0)),
        tl.sum(tl.load(mass_here, mask=there, other=0)),
        tl.max(tl.load(here + PART_LARGEST_AT, mask=there, other=LOWEST)),
        tl.where(state == BRACKET, tl.load(work + CERTAIN_AT), HIGHEST),
    )


# -- What is added up of tokens -------------------------------------------------------------------------------------


@triton.jit
def term_of(x, top, mass):
    """What a token adds to the entropy."""
    p = exp(x - top) / mass
    return tl.where(p > 0, tl.maximum(p * (tl.log(mass) + (top - x)), 0.0), 0.0)


@triton.jit
def below_of(x, top, counts):
    """The mass of tokens that count times their distance from the top, as an integer."""
    return tl.where(counts & (weight_of(x, top) > 0), exp(x - top) * (top - x) * ONE, 0.0).to(tl.int64)


@triton.jit
def weighed(counts, amount):
    """What is added up of tokens: their number above their amount."""
    return tl.where(counts, amount + (tl.full([], 1, tl.int64) << COUNTED), 0)


@triton.jit
def unpacked(total):
    """The number and the amount of a sum."""
    return (total >> COUNTED).to(tl.int32), total & ((tl.full([], 1, tl.int64) << COUNTED) - 1)


@triton.jit
def log_mass_of(top_key, mass):
    """The logarithm of the mass of what is kept, NaN where its largest logit is no finite number."""
    log_mass = number_of(top_key) + tl.log((mass.to(tl.float64) / ONE).to(tl.float32))
    return tl.where((top_key > KEY_OF_MINUS_INFINITY) & (top_key < KEY_OF_INFINITY), log_mass, float("nan"))


@triton.jit
def stats_of(mass, below, summed, row_sums):
    """The statistics of what is kept: those of the full row where it is ``summed``."""
    mass = tl.where(summed, (row_sums.mass * ONE).to(tl.int64), mass)
    below = tl.where(summed, (row_sums.below * ONE).to(tl.int64), below)
    relative = (mass.to(tl.float64) / ONE).to(tl.float32)
    return Stats(mass, relative, (below.to(tl.float64) / mass.to(tl.float64)).to(tl.float32))


@triton.jit
def centre_of(top):
    """From where the finite logits of a row of that largest one are measured, so that squares stay small."""
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def deviation_of(finite, first, second, summed, row_sums):
    """The standard deviation of what is kept, float32; NaN where nothing is known of it.

    From its number of finite logits and the sums of their distances and squared distances from a centre; from the sums
    of the full row where it is ``summed``.
    """
    squares = second - first * first / tl.maximum(finite, 1.0)
    finite = tl.where(summed, row_sums.finite, finite)
    squares = tl.where(summed, row_sums.squares, squares)
    deviation = tl.sqrt(tl.where(squares > 0, squares, 0.0) / tl.maximum(finite - 1, 1.0)).to(tl.float32)
    # Squares beyond float32 say nothing.
    return tl.where((finite > 1) & (squares.to(tl.float32) < float("inf")), deviation, float("nan"))


# -- Rules: each of these takes what a rule is as a number, known to the compiler or not ----------------------------


@triton.jit
def can_act(top_key, needs, kind_goal):
    """Whether a rule says anything of a row of that largest key."""
    # Nothing is likely or unlikely beside NaN or an infinity; a deviation ignores infinities.
    highest = tl.where(needs >= 3, KEY_OF_INFINITY, KEY_OF_INFINITY - 1)
    return ((top_key <= highest) & (top_key > KEY_OF_MINUS_INFINITY)) | (kind_goal == COUNT_GOAL)


@triton.jit
def goal_of(value, mass, least, kind_goal):
    """How many tokens, and what mass of them, a rule keeps at least."""
    by_mass = (kind_goal == MASS_GOAL) | (kind_goal == DISTANCE_GOAL)
    number = tl.where(kind_goal == COUNT_GOAL, value.to(tl.int32), least)
    number = tl.where(kind_goal == ENTROPY_GOAL, TOP_H_TOKENS, number)
    return Goal(number, tl.where(by_mass, tl.ceil(value * mass.to(tl.float64)).to(tl.int64), 0))


@triton.jit
def is_reached(goal, count, mass, certain, kind_goal):
    """Whether a goal is reached by what is here; whether tokens that were kept for certain reach it by themselves."""
    exceeds = (certain.number > 0) & (certain.number >= goal.number) & (certain.mass >= goal.amount)
    exceeds = exceeds & (kind_goal != NO_GOAL)
    return (count >= goal.number) & (mass >= goal.amount) & (exceeds == 0), exceeds


@triton.jit
def cutoff_key_of(limit):
    """The key of a rule's cut-off; below all where that is NaN."""
    return tl.where(limit == limit, key_of(limit), LOWEST)


@triton.jit
def cutoff_found(found, cutoff_key, kind_goal):
    """The key of the cut-off of a rule, once a search has found the key where its goal is reached."""
    key = tl.where(kind_goal == NO_GOAL, tl.minimum(cutoff_key, found.key), found.key)
    # As many NaN as that: nothing is below them.
    return tl.where((kind_goal == COUNT_GOAL) & (found.key > KEY_OF_INFINITY), LOWEST, key)


@triton.jit
def ties_kept(found, goal, cutoff_key, kind_goal, LOWEST_TIES: tl.constexpr):
    """How many of the tokens at the key that was found stay."""
    tied = found.number - found.above
    each = tl.maximum((found.amount - found.amount_above) // tl.maximum(tied, 1), 1)
    lacking = (tl.maximum(goal.amount - found.amount_above, 0) + each - 1) // each
    exact = goal.number - found.above
    by_mass = tl.maximum(lacking, exact.to(tl.int64)).to(tl.int32)
    counts = kind_goal == ENTROPY_GOAL
    if LOWEST_TIES:
        counts = counts | (kind_goal == COUNT_GOAL)
    keep = tl.where(kind_goal == MASS_GOAL, by_mass, tl.where(counts, exact, tied))
    return tl.where((kind_goal == NO_GOAL) & (found.key < cutoff_key), exact, keep)


@triton.jit
def surprises_kept(found, budget):
    """How many of the tokens that go beyond a budget of entropy stay within it; the first of all always does."""
    each = tl.maximum((found.amount - found.amount_above) // tl.maximum(found.number - found.above, 1), 1)
    return tl.maximum((budget - found.amount_above) // each, (1 - found.above).to(tl.int64)).to(tl.int32)


@triton.jit
def finish_cutoff(cutoff_key, top_key, open_below, bound, certain):
    """The cut-off of a rule without a goal, which the largest logit always reaches.

    Then whether tokens below the bound may be kept, and whether it drops tokens that were kept for certain.
    """
    cutoff_key = tl.minimum(cutoff_key, top_key)
    exceeds = (certain.number > 0) & (cutoff_key > certain.least)
    return cutoff_key, open_below & (cutoff_key < bound), exceeds


@triton.jit
def totals_of(counts, amount, many, TIED: tl.constexpr):
    """How many tokens count, and their amount; each of them stands for ``many`` where ``TIED``, else for itself."""
    if TIED:  # too many for one word
        number = tl.sum(tl.where(counts, many, 0))
        total = tl.sum(tl.where(counts, amount * many, 0))
    else:
        number, total = unpacked(tl.sum(weighed(counts, amount)))
    return number, total


@triton.jit
def search(key, counts, amount, many, interval, goal, WEIGHS: tl.constexpr, TIED: tl.constexpr):
    """The largest key at or above which there are as many tokens, and as large an amount of them, as the goal asks for.

    ``low`` of the interval reaches the goal. What is at or above its ``high`` is not among the tokens. Each
    stands for ``many`` tokens where ``TIED``.
    """
    low, high, count, all_amount, above, amount_above = interval
    each = weighed(counts, amount)
    beyond, amount_beyond = above, amount_above
    # Until one token is left between the two, or one key. What costs time is each sum over all threads.
    while (high - low > 1) & (count - above > 1):
        pivot = (low + high) >> 1
        if TIED:
            number, more = totals_of(counts & (key >= pivot.to(tl.int32)), amount, many, TIED)
        elif WEIGHS:
            number, more = unpacked(tl.sum(tl.where(key >= pivot.to(tl.int32), each, 0)))
        else:
            number = tl.sum((counts & (key >= pivot.to(tl.int32))).to(tl.int32))
            more = tl.full([], 0, tl.int64)
        number += beyond
        more += amount_beyond
        stuck = (number == count) | (number == above)
        reached = (number >= goal.number) & (more >= goal.amount)
        low, high = tl.where(reached, pivot, low), tl.where(reached, high, pivot)
        count, all_amount = tl.where(reached, number, count), tl.where(reached, more, all_amount)
        above, amount_above = tl.where(reached, above, number), tl.where(reached, amount_above, more)
        if stuck:
            # A gap between keys, or keys that many share: go on from those that are there.
            between = counts & (key >= low.to(tl.int32)) & (key.to(tl.int64) < high)
            low = tl.min(tl.where(between, key, HIGHEST)).to(tl.int64)
            high = tl.max(tl.where(between, key, LOWEST)).to(tl.int64) + 1
    least = tl.min(tl.where(counts & (key >= low.to(tl.int32)), key, HIGHEST))
    return Found(least, count, all_amount, above, amount_above)


@triton.jit
def fitted(x, top, out_ptr):
    """Logits that the dtype of the result holds: float16 ones are scaled where the largest would overflow."""
    if out_ptr.dtype.element_ty == tl.float16:
        most = tl.maximum(tl.abs(top), 65504.0)
        x = tl.where(most < float("inf"), x * (65504.0 / most), x)
    return x
