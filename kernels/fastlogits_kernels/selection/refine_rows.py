"""The rules applied to rows whose candidates were too many, or not enough: block by block, with the rules at run time.

A row is passed over again and again. Each pass looks at its tokens, or at the list of its candidates; counts what is
kept at or above three keys, weighs it, and finds the least and the largest key. Where few tokens are left of a search
they are collected, and the search ends among them in registers. What to measure, and what follows from it, is decided
between the passes by a few numbers, so that the code of a pass doesn't depend on the rules. Compiled once for a chain
and a dtype. Where a row is done, its program goes on to the next at once.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.refine import (
    LEAST_TERM,
    Found,
    below_of,
    centre_of,
    deviation_of,
    fitted,
    from_key,
    load_sure,
    log_mass_of,
    search,
    store_token,
    surprises_kept,
    term_of,
    ties_kept,
    unpacked,
    weighed,
    with_ties,
)
from fastlogits_kernels.selection.row import (
    BANDED_AT,
    BOUND_AT,
    BRACKET,
    CENTRE_AT,
    COUNT_AT,
    COUNT_GOAL,
    DISTANCE_GOAL,
    DONE_AT,
    ENTROPY_GOAL,
    FREE,
    GOAL,
    HIGH_AT,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MASS_GOAL,
    N_RULES,
    NEEDS_SUMS,
    NO_GOAL,
    ONE,
    ROW_SUMS_AT,
    RULE_WORDS,
    RULES_AT,
    SPARES_FEWEST,
    STATE_AT,
    STEPWISE,
    SURE_AT,
    TOP_H_TOKENS,
    TOP_KEY_AT,
    UNALIGNED,
    WHOLE,
    Kept,
    Maps,
    Sample,
    Samples,
    Scores,
    Shape,
    Sure,
    all_kept,
    collect,
    cutoff,
    exp,
    is_greedy,
    is_kept,
    is_near,
    key_of,
    load_candidates,
    load_float,
    load_seed,
    noise_of,
    number_of,
    rank_of,
    row_logits,
    scaled,
    store_kept,
    wait_for_launch,
    weight_of,
)
from fastlogits_kernels.selection.row_sums import load_row_sums

# Where a pass looks for tokens.
ROW, LIST = (tl.constexpr(i) for i in range(2))
# By what it orders them.
_BY_LOGIT, _BY_RANK, _BY_DISTANCE, _BY_TERM = (tl.constexpr(i) for i in range(4))
# What it adds up beside their number.
_NOTHING, _MASS, _BELOW, _SURPRISE, _SQUARES = (tl.constexpr(i) for i in range(5))
# What a pass is for.
_FIND_TOP, _WEIGH, _WEIGH_BELOW, _ADD_SQUARES, _SEARCH, _COLLECT, _BISECT, _FOUND, _FIND_TERM, _ADD_TERMS, _DONE = (
    tl.constexpr(i) for i in range(11)
)
# What a search is for.
_OF_RULE, _OF_TIES, _OF_SHARE, _OF_SHARED_TIES = (tl.constexpr(i) for i in range(4))


class Source(NamedTuple):
    """Where tokens are looked for, in the row or in a list of them; and how many."""

    kind: tl.tensor
    pairs: tl.tensor
    size: tl.tensor


class Near(NamedTuple):
    """Which logits are candidates, see ``is_near``; of a list those that are sure are not, but may be drawn."""

    least: tl.tensor
    banded: tl.tensor
    centre: tl.tensor
    sure_low: tl.tensor
    sure_high: tl.tensor


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


class Bounds(NamedTuple):
    """Between which keys a search is, what is at or above the lower one, and at or above the upper one."""

    low: tl.tensor
    high: tl.tensor
    number: tl.tensor
    amount: tl.tensor
    above: tl.tensor
    amount_above: tl.tensor


class Goal(NamedTuple):
    """How many tokens, and what amount of them, are to be at or above the key that is searched for."""

    number: tl.tensor
    amount: tl.tensor


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


class State(NamedTuple):
    """Where a row stands between two passes."""

    phase: tl.tensor
    task: tl.tensor
    rule: tl.tensor  # the number of the rule that is applied; behind the last one the sums of what is kept
    top_key: tl.tensor
    count: tl.tensor
    mass: tl.tensor
    below: tl.tensor
    edge: tl.tensor  # the key of the rule's cut-off
    budget: tl.tensor
    total: tl.tensor
    by_turns: tl.tensor
    open_below: tl.tensor  # whether tokens below the bound may be kept
    uncut: tl.tensor  # whether no rule may have dropped anything yet
    failed: tl.tensor


@triton.jit
def _is_sure(raw, near):
    return (raw >= near.sure_low) & (raw <= near.sure_high)


@triton.jit
def _is_candidate(x, raw, near):
    """Which tokens of a list are candidates: of those that were collected, a few too many."""
    return is_near(x, near.least, near.banded, near.centre, True) & (_is_sure(raw, near) == 0)


@triton.jit
def _block(
    start, source, near, row, scores, maps,
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits, whether they are there, tokens, and ranks of a block of where tokens are looked for."""
    place = start + tl.arange(0, BLOCK)
    inside = place < source.size
    if source.kind == ROW:
        token = place
        valid = inside
        x = row_logits(row, token >> 5, token & 31, token, inside, scores, maps, OPS, MAX)
    else:
        pair = tl.load(source.pairs + place, mask=inside, other=0)
        token = (pair >> 32).to(tl.int32)
        # Collected as they were before the division.
        raw = pair.to(tl.int32).to(tl.float32, bitcast=True)
        x = scaled(raw, row, maps)
        valid = inside & _is_candidate(x, raw, near)
    return x, valid, token, rank_of(token, LOWEST_TIES)


@triton.jit
def _measured(x, valid, rank, kept, measure):
    """What a pass orders tokens by, which of them count, and what it adds up of each."""
    lives = is_kept(x, valid, rank, kept, True)
    key = key_of(x)
    amount = tl.zeros_like(rank).to(tl.int64)
    if measure.order == _BY_RANK:
        lives = lives & (key == measure.tie)
        key = rank
    elif measure.order == _BY_DISTANCE:
        key = key_of(-tl.abs(x - measure.centre))
    if (measure.amount == _SURPRISE) | (measure.order == _BY_TERM):
        term = term_of(x, measure.top, measure.mass)
        amount = (term / measure.largest * ONE).to(tl.int64)
        if measure.order == _BY_TERM:
            key = key_of(term)
            amount = tl.zeros_like(amount)
    elif measure.amount == _MASS:
        amount = weight_of(x, measure.top)
    elif measure.amount == _BELOW:
        amount = below_of(x, measure.top, lives)
    return key, lives, amount


@triton.jit
def _tally(key, lives, amount, first, second, third, low, high, sums, ends):
    """What some tokens add to the sums at or above three keys, and to the least and the largest key between two."""
    each = weighed(lives, amount)
    least = tl.where(lives & (key >= low), key, HIGHEST)
    most = tl.where(lives & (key <= high), key, LOWEST)
    return (
        sums[0] + tl.where(key >= first, each, 0), sums[1] + tl.where(key >= second, each, 0),
        sums[2] + tl.where(key >= third, each, 0),
    ), (tl.minimum(ends[0], least), tl.maximum(ends[1], most))  # fmt: skip


@triton.jit
def _pass(
    first, second, third, low, high, simple, searches, looks, collects, counter, collected, slots,
    source, near, kept, measure, row, scores, maps,
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, BLOCK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Pass over the tokens: a tally of them, or those between two keys collected.

    Each thread adds up for itself, and all of them once at the end. Most passes are ``simple``: tokens are counted or
    weighed, in the order of the logits or of distances. Squares of deviations are float64 numbers in the same words.
    """
    nothing = tl.zeros([BLOCK], tl.int64)
    sums = (nothing, nothing, nothing)
    ends = (tl.full([BLOCK], HIGHEST, tl.int32), tl.full([BLOCK], LOWEST, tl.int32))
    by_distance = measure.order == _BY_DISTANCE
    cuts = (kept.edge > LOWEST) | (kept.near > LOWEST)
    one = tl.where(measure.amount == _MASS, ONE, 0.0)
    for start in range(0, tl.where(simple, source.size, 0), BLOCK):
        x, valid, token, rank = _block(start, source, near, row, scores, maps, OPS, MAX, LOWEST_TIES, BLOCK)
        lives = valid
        if cuts:
            lives = is_kept(x, valid, rank, kept, True)
        key = key_of(tl.where(by_distance, -tl.abs(x - measure.centre), x))
        p = exp(x - measure.top) * one
        amount = tl.where(p == p, p, 0.0).to(tl.int64)
        if searches:
            sums, ends = _tally(key, lives, amount, first, second, third, low, high, sums, ends)
        else:
            sums = (sums[0] + weighed(lives, amount), sums[1], sums[2])
            ends = (ends[0], tl.maximum(ends[1], tl.where(lives, key, LOWEST)))
    for start in range(0, tl.where(simple, 0, source.size), BLOCK):
        x, valid, token, rank = _block(start, source, near, row, scores, maps, OPS, MAX, LOWEST_TIES, BLOCK)
        key, lives, amount = _measured(x, valid, rank, kept, measure)
        if measure.amount == _SQUARES:
            lives = lives & (tl.abs(x) < float("inf"))
            off = tl.where(lives, x - centre_of(measure.top), 0.0).to(tl.float64)
            sums = (
                (sums[0].to(tl.float64, bitcast=True) + lives.to(tl.float64)).to(tl.int64, bitcast=True),
                (sums[1].to(tl.float64, bitcast=True) + off).to(tl.int64, bitcast=True),
                (sums[2].to(tl.float64, bitcast=True) + off * off).to(tl.int64, bitcast=True),
            )
        elif collects:
            between = lives & (key >= low) & (key <= high)
            collect(between.to(tl.int32) != 0, x, token, counter, collected, slots, PORTABLE)
        else:
            sums, ends = _tally(key, lives, amount, first, second, third, low, high, sums, ends)
    none, no_amount = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    number_1, number_2, number_3 = none, none, none
    amount_1, amount_2, amount_3 = no_amount, no_amount, no_amount
    least, most = none, none
    # What costs time is each sum over all threads.
    if measure.amount == _SQUARES:
        # As bits; the tally's other fields say nothing.
        amount_1 = tl.sum(sums[0].to(tl.float64, bitcast=True)).to(tl.int64, bitcast=True)
        amount_2 = tl.sum(sums[1].to(tl.float64, bitcast=True)).to(tl.int64, bitcast=True)
        amount_3 = tl.sum(sums[2].to(tl.float64, bitcast=True)).to(tl.int64, bitcast=True)
    elif looks:
        count_a, amount_a = unpacked(sums[0])
        number_1, amount_1 = tl.sum(count_a), tl.sum(amount_a)
        most = tl.max(ends[1])
        if searches:
            count_b, amount_b = unpacked(sums[1])
            count_c, amount_c = unpacked(sums[2])
            number_2, amount_2 = tl.sum(count_b), tl.sum(amount_b)
            number_3, amount_3 = tl.sum(count_c), tl.sum(amount_c)
            least = tl.min(ends[0])
    return Tally(least, most, number_1, amount_1, number_2, amount_2, number_3, amount_3)


# -- Searches -------------------------------------------------------------------------------------------------------


@triton.jit
def _pivots(bounds, goal, likely_low, likely_high, told, by_turns, order):
    """The three keys that the next pass of a search looks at.

    First those that the sample made likely, or the range of the numbers quartered, twice; then those around where the
    goal lies if amounts grow evenly between the bounds. Every fourth time the keys are quartered, which comes to an end
    whatever they are.
    """
    low, high = bounds.low, bounds.high
    turn = by_turns % 4
    highest = number_of((high - 1).to(tl.int32))
    span = tl.where(order == _BY_DISTANCE, 16.0, 128.0)
    lowest = tl.maximum(number_of(low.to(tl.int32)), highest - span)
    apart = highest - lowest
    weighs = goal.amount > 0
    above = tl.where(weighs, (bounds.amount - goal.amount).to(tl.float32), (bounds.number - goal.number).to(tl.float32))
    whole = tl.where(
        weighs, (bounds.amount - bounds.amount_above).to(tl.float32), (bounds.number - bounds.above).to(tl.float32)
    )
    even = tl.where(whole > 0, above / whole, 0.5)
    even = tl.minimum(tl.maximum(even, 0.1), 0.9)
    middle = tl.where(turn < 2, 0.5, even) * apart
    step = tl.where(turn < 2, 0.25, 0.083) * apart
    by_number = (order != _BY_RANK) & (turn != 3) & (apart > 0) & (apart < float("inf"))
    first = tl.where(by_number, key_of(lowest + (middle - step)).to(tl.int64), low + (high - low) // 4)
    second = tl.where(by_number, key_of(lowest + middle).to(tl.int64), low + (high - low) // 2)
    third = tl.where(by_number, key_of(lowest + (middle + step)).to(tl.int64), low + (high - low) * 3 // 4)
    first = tl.where(told, likely_low, first)
    second = tl.where(told, (likely_low + likely_high) // 2, second)
    third = tl.where(told, likely_high, third)
    return first, second, third


@triton.jit
def _moved(pivot, number, amount, goal, bounds):
    """Bounds of a search, of which one becomes ``pivot``: at or above it are so many tokens of such an amount."""
    inside = (pivot > bounds.low) & (pivot < bounds.high)
    reached = inside & (number >= goal.number) & (amount >= goal.amount)
    missed = inside & (reached == 0)
    return Bounds(
        tl.where(reached, pivot, bounds.low), tl.where(missed, pivot, bounds.high),
        tl.where(reached, number, bounds.number), tl.where(reached, amount, bounds.amount),
        tl.where(missed, number, bounds.above), tl.where(missed, amount, bounds.amount_above),
    )  # fmt: skip


@triton.jit
def _narrowed(tally, first, second, third, beyond, goal, bounds):
    """Bounds of a search after a pass; ``beyond`` are the tokens that the pass doesn't see."""
    least, most = tally.least, tally.most
    # Only where keys are is there anything to find.
    bounds = _moved(first, tally.number_1 + beyond.number, tally.amount_1 + beyond.amount, goal, bounds)
    bounds = _moved(second, tally.number_2 + beyond.number, tally.amount_2 + beyond.amount, goal, bounds)
    bounds = _moved(third, tally.number_3 + beyond.number, tally.amount_3 + beyond.amount, goal, bounds)
    return Bounds(
        tl.maximum(bounds.low, least.to(tl.int64)), tl.minimum(bounds.high, most.to(tl.int64) + 1),
        bounds.number, bounds.amount, bounds.above, bounds.amount_above,
    )  # fmt: skip


@triton.jit
def _next_of_search(bounds, held, room):
    """What a search does next: pass again, collect what is left, or end: in registers where all of it is ``held``."""
    left = bounds.number - bounds.above
    phase = tl.where(held, _BISECT, tl.where(left <= room, _COLLECT, _SEARCH))
    return tl.where(bounds.high - bounds.low <= 1, _FOUND, phase)


# -- Rules ----------------------------------------------------------------------------------------------------------


@triton.jit
def _of_kind(kind, TABLE: tl.constexpr):
    """What a table of rules says of a rule."""
    found = tl.full([], 0, tl.int32)
    for i in tl.static_range(N_RULES):
        found = tl.where(kind == i, TABLE[i], found)
    return found


@triton.jit
def _cutoff_of(kind, value, top, mass, entropy, deviation):
    """The logit below which a rule drops all, NaN for one that has a goal."""
    found = tl.full([], float("nan"), tl.float32)
    for i in tl.static_range(N_RULES):
        if GOAL[i] == NO_GOAL:
            if kind == i:
                found = cutoff(value, top, mass, entropy, deviation, i)
    return found


@triton.jit
def _load_rule(rules_ptr, rule, n_rules):
    """A rule's code, how many tokens it keeps at least, and its parameter, NaN where it doesn't act."""
    here = rules_ptr + RULE_WORDS * tl.minimum(rule, tl.maximum(n_rules - 1, 0))
    there = rule < n_rules
    kind, least = tl.load(here, mask=there, other=-1), tl.load(here + 1, mask=there, other=1)
    return kind, least, tl.load((here + 2).to(tl.pointer_type(tl.float64)), mask=there, other=float("nan"))


@triton.jit
def _is_idle(kind, value, top_key):
    """Whether a rule has nothing to drop in a row of that largest key."""
    needs, goal = _of_kind(kind, NEEDS_SUMS), _of_kind(kind, GOAL)
    highest = tl.where(needs >= 3, KEY_OF_INFINITY, KEY_OF_INFINITY - 1)
    acts = (goal == COUNT_GOAL) | ((top_key <= highest) & (top_key > KEY_OF_MINUS_INFINITY))
    return (value != value) | (acts == 0)


@triton.jit
def _begin(
    rule, uncut, stale, top_key, open_below, failed, row_top_key, n_rules, rules_ptr, NORMALISE: tl.constexpr
):  # fmt: skip
    """The next rule that drops anything, its first pass, whether a question is left open, and what that pass adds up.

    The largest logit is looked for first where it is ``stale``. Last, whether that rule is the first of all: the row's
    sums are those that the first one asks for, whether that can act or not.
    """
    for _ in range(n_rules):
        kind, _least, value = _load_rule(rules_ptr, rule, n_rules)
        idle = (rule < n_rules) & _is_idle(kind, value, top_key)
        uncut = uncut & ((idle == 0) | (value != value))
        rule += idle.to(tl.int32)
    kind, _least, value = _load_rule(rules_ptr, rule, n_rules)
    needs = _of_kind(kind, NEEDS_SUMS)
    summed = uncut & (row_top_key > LOWEST)
    blind = tl.where(_of_kind(kind, GOAL) == ENTROPY_GOAL, uncut == 0, (needs > 0) & (summed == 0))
    ends = rule >= n_rules
    failed = failed | (open_below & (ends | blind))
    phase = tl.where(ends, _DONE, tl.where(stale, _FIND_TOP, _WEIGH))
    if NORMALISE:
        phase = tl.where(ends, _FIND_TOP, phase)
        rule = tl.where(ends, n_rules + 1, rule)
    counts = ends | stale | (needs == 0) | (needs >= 3)
    return rule, phase, failed, tl.where(counts, _NOTHING, _MASS), uncut


@triton.jit
def _stats(mass, below, summed, row_sums):
    """The mass of what is kept, as an integer and relative to the largest probability, and its mean distance.

    From the sums of the row where these hold, else from the last passes.
    """
    mass = tl.where(summed, (row_sums.mass * ONE).to(tl.int64), mass)
    below = tl.where(summed, (row_sums.below * ONE).to(tl.int64), below)
    relative = (mass.to(tl.float64) / ONE).to(tl.float32)
    distance = (below.to(tl.float64) / mass.to(tl.float64)).to(tl.float32)
    return mass, relative, distance


@triton.jit
def _deviation(summed, row_sums, tally):
    """The deviation of what is kept, float32: likewise."""
    finite = tally.amount_1.to(tl.float64, bitcast=True)
    first = tally.amount_2.to(tl.float64, bitcast=True)
    squares = tally.amount_3.to(tl.float64, bitcast=True) - first * first / tl.maximum(finite, 1.0)
    finite = tl.where(summed, row_sums.finite, finite)
    squares = tl.where(summed, row_sums.squares, squares)
    return deviation_of(finite, squares)


@triton.jit
def refine_row(
    row, scores, maps, samples, work, out_ptr, tokens_ptr, shape, n_rules, tried, stride_out, stride_out_token,
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, NORMALISE: tl.constexpr, LOWEST_TIES: tl.constexpr,
    PORTABLE: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A row that is not done, from its candidates where they are a list, else from itself."""
    V = scores.V
    greedy = tl.full([], False, tl.int1)
    seed, position = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if tokens_ptr is not None:
        seed, position = load_seed(row, samples)
        if maps.temperature_ptr is not None:
            greedy = is_greedy(maps.temperature_ptr + row * maps.stride_temperature)
    row_state = tl.load(work + STATE_AT)
    found_number = tl.load(work + COUNT_AT)
    pairs = (work + shape.pairs_at).to(tl.pointer_type(tl.int64))
    # Where a search collects: not over the candidates, where there may be so many that they come as a list.
    collected_pairs = pairs + tl.where(shape.slots > ROOM, shape.slots, 0)
    room = tl.minimum(shape.slots, ROOM)
    listed = (row_state != WHOLE) & (found_number > tried) & (found_number <= shape.slots)
    none, nothing = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    yes, no = tl.full([], True, tl.int1), tl.full([], False, tl.int1)
    # The largest logit may be known from the sums of the row.
    row_top_key = tl.load(work + TOP_KEY_AT)
    first_rule, first_phase, first_failed, first_amount, uncut = _begin(
        none, yes, row_top_key == LOWEST, row_top_key, listed, no, row_top_key, n_rules, work + RULES_AT, NORMALISE
    )  # fmt: skip
    # A list that leaves a question open from the start is none.
    is_drawn_as_is = greedy
    if tokens_ptr is not None:
        is_drawn_as_is = greedy | (row_state == FREE)
    listed = listed & (is_drawn_as_is | (first_failed == 0) | (row_top_key == LOWEST))
    base = Source(tl.where(listed, LIST, ROW), pairs, tl.where(listed, found_number, V))
    sure = load_sure(work, shape, tl.where(listed, row_state, WHOLE), PARTS)
    near = Near(
        number_of(tl.load(work + BOUND_AT)), tl.load(work + BANDED_AT) != 0, load_float(work + CENTRE_AT),
        load_float(work + SURE_AT), load_float(work + SURE_AT + 1),
    )  # fmt: skip
    # All tokens that aren't in the list are below the bound; one of distances says nothing of keys.
    bound = tl.where(listed & (near.banded == 0), tl.load(work + BOUND_AT), KEY_OF_MINUS_INFINITY)
    row_sums = load_row_sums(work + ROW_SUMS_AT, row_top_key > LOWEST)
    likely_low, likely_high = tl.load(work + BOUND_AT).to(tl.int64), tl.load(work + HIGH_AT).to(tl.int64)
    # Of distances the sample makes one likely, which is a little too far.
    likely_high = tl.where(near.banded, key_of(0.9 * near.least).to(tl.int64), likely_high)

    zero = tl.full([], 0.0, tl.float32)
    lowest = tl.full([], LOWEST, tl.int64)
    kept = all_kept()
    bounds = Bounds(lowest, lowest, none, nothing, none, nothing)
    goal = Goal(none, nothing)
    beyond = Goal(none, nothing)
    # Whether a search has collected the tokens that it is about, and so many.
    collected, collected_number = no, none
    first_phase = tl.where(row_top_key == LOWEST, _FIND_TOP, first_phase)
    first_rule = tl.where(row_top_key == LOWEST, 0, first_rule)
    uncut = uncut | (row_top_key == LOWEST)
    measure = Measure(
        none,
        tl.where(row_top_key == LOWEST, _NOTHING, first_amount),
        none,
        zero,
        number_of(row_top_key),
        zero + 1,
        zero + 1,
    )
    kind, least, value = _load_rule(work + RULES_AT, first_rule, n_rules)
    state = State(
        tl.where(is_drawn_as_is, _DONE, first_phase), none + _OF_RULE, first_rule, row_top_key, none, nothing, nothing,
        tl.full([], LOWEST, tl.int32), nothing, nothing, none, listed, uncut, no,
    )  # fmt: skip

    while state.phase != _DONE:
        phase, task, rule = state.phase, state.task, state.rule
        top_key, edge = state.top_key, state.edge
        open_below, failed, uncut = state.open_below, state.failed, state.uncut
        searches = phase == _SEARCH
        collects = phase == _COLLECT
        # Whether all tokens that a search is about fit into registers.
        is_short = (base.kind == LIST) & (base.size <= ROOM)

        # -- Pass over the tokens.
        of_order = tl.where(near.banded, _BY_DISTANCE, _BY_LOGIT)
        told = (base.kind == ROW) & (state.by_turns == 0) & (measure.order == of_order)
        told = told & (likely_high < HIGHEST) & (near.least > float("-inf"))
        first, second, third = _pivots(bounds, goal, likely_low, likely_high, told, state.by_turns, measure.order)
        in_bounds = searches | collects
        low = tl.where(in_bounds, bounds.low, lowest)
        high = tl.where(in_bounds, (bounds.high - 1).to(tl.int32), HIGHEST)
        if collects:
            # Other threads may still read what a search before this one has collected.
            tl.debug_barrier()
            tl.store(work + COUNT_AT, 0)
            tl.debug_barrier()
        # What a whole row weighs may be known from its sums.
        goal_kind = _of_kind(kind, GOAL)
        knows_mass = (phase == _WEIGH) & (base.kind == ROW) & uncut & (row_top_key > LOWEST) & (rule < n_rules)
        knows_mass = knows_mass & ((goal_kind == MASS_GOAL) | (goal_kind == DISTANCE_GOAL))
        # The same of a cut-off that asks for the largest logit alone, where a pass has found that.
        knows_all = (phase == _WEIGH) & (goal_kind == NO_GOAL) & (least == 1) & (row_top_key == LOWEST)
        knows_all = knows_all & (_of_kind(kind, NEEDS_SUMS) == 0) & (rule < n_rules)
        ends_search = (phase == _BISECT) | (phase == _FOUND)
        passes_over = knows_mass | knows_all | ends_search
        looks = (collects == 0) & (passes_over == 0)
        simple = (collects == 0) & ((measure.order == _BY_LOGIT) | (measure.order == _BY_DISTANCE))
        simple = simple & ((measure.amount == _NOTHING) | (measure.amount == _MASS))
        tally = _pass(
            tl.where(searches, first, lowest).to(tl.int32), tl.where(searches, second, lowest).to(tl.int32),
            tl.where(searches, third, lowest).to(tl.int32), low.to(tl.int32), high,
            simple, searches, looks, collects, work + COUNT_AT,
            collected_pairs.to(tl.pointer_type(tl.int32)), room,
            Source(base.kind, base.pairs, tl.where(passes_over, 0, base.size)), near, kept,
            measure, row, scores, maps, OPS, MAX, LOWEST_TIES, BLOCK, PORTABLE,
        )  # fmt: skip
        found = Found(bounds.low.to(tl.int32), bounds.number, bounds.amount, bounds.above, bounds.amount_above)
        if collects:
            tl.debug_barrier()
            collected = yes
            collected_number = tl.minimum(tl.load(work + COUNT_AT, volatile=True), room)
        # A loop of one turn or none: Triton 3.6 can't compile one in a branch.
        for _ in range(tl.where(collects | (phase == _BISECT), 1, 0)):
            of_list = collected == 0
            x, valid, token = load_candidates(
                tl.where(of_list, base.pairs, collected_pairs), tl.where(of_list, base.size, collected_number), ROOM
            )  # fmt: skip
            if of_list:
                raw = x
                x = scaled(raw, row, maps)
                valid = valid & _is_candidate(x, raw, near)
            rank = token
            if LOWEST_TIES:
                rank = -token
            key, lives, amount = _measured(x, valid, rank, kept, measure)
            lives = lives & (key >= bounds.low.to(tl.int32)) & (key.to(tl.int64) < bounds.high)
            found = search(
                key, lives, amount, bounds.low, bounds.high - 1, goal.number, goal.amount, bounds.number, bounds.amount,
                bounds.above, bounds.amount_above, True,
            )  # fmt: skip

        # -- What follows from it.
        kind_goal, needs = _of_kind(kind, GOAL), _of_kind(kind, NEEDS_SUMS)
        weighs = (needs == 1) | (needs == 2)
        summed = uncut & (row_top_key > LOWEST)
        count, mass, below = state.count, state.mass, state.below
        budget, total, by_turns = state.budget, state.total, state.by_turns
        has_goal = no  # the sums of a rule are there
        begins = no  # the next rule is due
        stale = no  # and the largest logit has to be found again
        finishes = no  # the cut-off of a rule is known
        starts_ties = no
        normalises = rule > n_rules
        # NaN is no candidate beside tokens that were kept for certain.
        is_wrong = (sure.number > 0) & (tally.most > KEY_OF_INFINITY)
        tied = found.number - found.above
        if phase == _FIND_TOP:
            top_key = tl.maximum(tally.most, sure.largest)
            failed = failed | is_wrong
            begins = normalises == 0
            phase = tl.where(normalises, _WEIGH, phase)
            measure = Measure(
                measure.order, tl.where(normalises, _MASS, _NOTHING), none, zero, number_of(top_key), zero + 1, zero + 1
            )  # fmt: skip
        elif phase == _WEIGH:
            of_share = task == _OF_SHARE
            failed = failed | (is_wrong & looks)
            count = tl.where(knows_mass, V, tally.number_1 + sure.number)
            # One more than the sum of the tiles says, which is rounded: as much as any goal.
            mass = tl.where(knows_mass, (row_sums.mass * ONE).to(tl.int64) + 1, tally.amount_1)
            mass += tl.where(weighs, sure.mass, 0)
            phase = tl.where(normalises, _DONE, phase)
            has_goal = (normalises == 0) & (of_share == 0)
            lacks_below = has_goal & (needs == 2) & (summed == 0)
            lacks_squares = has_goal & (needs == 3) & (summed == 0)
            has_goal = has_goal & (lacks_below == 0) & (lacks_squares == 0)
            phase = tl.where(lacks_below, _WEIGH_BELOW, tl.where(lacks_squares, _ADD_SQUARES, phase))
            phase = tl.where(of_share, _FIND_TERM, phase)
            amount = tl.where(lacks_below, _BELOW, tl.where(lacks_squares, _SQUARES, measure.amount))
            measure = Measure(
                tl.where(of_share, _BY_TERM, measure.order), tl.where(of_share, _NOTHING, amount), none, zero,
                measure.top, (mass.to(tl.float64) / ONE).to(tl.float32), zero + 1,
            )  # fmt: skip
        elif phase == _WEIGH_BELOW:
            below = tally.amount_1
            has_goal = yes
        elif phase == _ADD_SQUARES:
            has_goal = yes
        elif phase == _FIND_TERM:
            largest = tl.maximum(number_of(tally.most), LEAST_TERM)
            measure = Measure(none + _BY_LOGIT, none + _SURPRISE, none, zero, measure.top, measure.mass, largest)
            phase = tl.full([], _ADD_TERMS, tl.int32)
        elif phase == _ADD_TERMS:
            total = tally.amount_1
            budget = (value * total.to(tl.float64)).to(tl.int64)
            goes_on = total > budget
            # The first token that goes beyond the budget.
            goal = Goal(none + 1, budget + 1)
            beyond = Goal(none, nothing)
            bounds = Bounds(
                nothing + KEY_OF_MINUS_INFINITY, top_key.to(tl.int64) + 1, tally.number_1, total, none, nothing
            )  # fmt: skip
            by_turns = none
            phase = tl.where(goes_on, _next_of_search(bounds, is_short, room), phase)
            begins = goes_on == 0
            rule += begins.to(tl.int32)
        elif phase == _SEARCH:
            bounds = _narrowed(tally, first, second, third, beyond, goal, bounds)
            by_turns += 1
            phase = _next_of_search(bounds, is_short, room)
        elif task == _OF_RULE:
            if kind_goal == DISTANCE_GOAL:
                kept = Kept(kept.edge, kept.cut, measure.centre, found.key)
                rule += 1
                uncut = no
                open_below = open_below & (found.key > KEY_OF_INFINITY)
                begins, stale = yes, yes
            else:
                keep = ties_kept(found, goal.number, goal.amount, edge, kind_goal, LOWEST_TIES)
                edge = tl.where(kind_goal == NO_GOAL, tl.minimum(edge, found.key), found.key)
                # As many NaN as that: nothing is below them.
                all_nan = (kind_goal == COUNT_GOAL) & (found.key > KEY_OF_INFINITY)
                edge = tl.where(all_nan, LOWEST, edge)
                open_below = open_below & ((kind_goal == NO_GOAL) | (found.key > KEY_OF_INFINITY))
                spares = (kind_goal != NO_GOAL) | (_of_kind(kind, SPARES_FEWEST) != 0)
                starts_ties = spares & (keep < tied)
                goal = Goal(keep, nothing)
                if starts_ties == 0:
                    kept = from_key(kept, edge)
                    finishes = yes
        else:
            if task == _OF_SHARE:
                keep = surprises_kept(found, budget)
                starts_ties = (keep > 0) & (keep < tied)
                goal = Goal(keep, nothing)
                edge = found.key
                if starts_ties == 0:
                    kept = from_key(kept, tl.where(keep > 0, found.key, found.key + 1))
                    begins = yes
            else:
                kept = with_ties(kept, edge, found.key)
                finishes = task == _OF_TIES
                begins = task == _OF_SHARED_TIES
            failed = failed | (begins & open_below)
            rule += begins.to(tl.int32)

        if has_goal:
            # -- A rule's sums are there: its cut-off, or how many tokens and what mass are to stay.
            top = number_of(top_key)
            all_mass, relative, distance = _stats(mass, below, summed, row_sums)
            edge = tl.full([], LOWEST, tl.int32)
            if kind_goal == NO_GOAL:
                deviation = zero
                if needs == 3:
                    deviation = _deviation(summed, row_sums, tally)
                limit = _cutoff_of(kind, value, top, relative, tl.log(relative) + distance, deviation)
                edge = tl.where(limit == limit, key_of(limit), LOWEST)
            by_mass = (kind_goal == MASS_GOAL) | (kind_goal == DISTANCE_GOAL)
            number = tl.where(kind_goal == COUNT_GOAL, value.to(tl.int32), least)
            number = tl.where(kind_goal == ENTROPY_GOAL, TOP_H_TOKENS, number)
            amount_goal = tl.where(by_mass, tl.ceil(value * all_mass.to(tl.float64)).to(tl.int64), 0)
            asks = (kind_goal != NO_GOAL) | (least > 1)
            wrong = (kind_goal != NO_GOAL) & (sure.number > 0) & (sure.number >= number) & (sure.mass >= amount_goal)
            reached = asks & (count >= number) & ((by_mass == 0) | (mass >= amount_goal)) & (wrong == 0)
            # What is here is not enough; there may be more.
            failed = failed | wrong | ((kind_goal != NO_GOAL) & (reached == 0) & open_below)
            edge = tl.where((kind_goal == NO_GOAL) & asks & (reached == 0), LOWEST, edge)
            by_distance = kind_goal == DISTANCE_GOAL
            goal = Goal(number, amount_goal)
            beyond = Goal(sure.number, tl.where(by_mass, sure.mass, 0))
            highest = tl.where(sure.number > 0, sure.edge - 1, tl.where(by_distance, 0, top_key))
            bounds = Bounds(
                tl.where(by_distance, KEY_OF_MINUS_INFINITY, bound).to(tl.int64),
                highest.to(tl.int64) + 1,
                count, tl.where(by_mass, mass, 0), beyond.number, beyond.amount,
            )  # fmt: skip
            measure = Measure(
                tl.where(by_distance, _BY_DISTANCE, _BY_LOGIT), tl.where(by_mass, _MASS, _NOTHING), none,
                top - distance, top, zero + 1, zero + 1,
            )  # fmt: skip
            by_turns = none
            task = none + _OF_RULE
            finishes = reached == 0
            phase = tl.where(reached, _next_of_search(bounds, is_short, room), phase)
            collected = no

        if starts_ties:
            # -- Of the tokens at a key as many as it takes, by their ranks.
            task = tl.where(task == _OF_RULE, _OF_TIES, _OF_SHARED_TIES)
            beyond = Goal(none, nothing)
            bounds = Bounds(nothing - V, nothing + V + 1, tied, nothing, none, nothing)
            measure = Measure(
                none + _BY_RANK, none + _NOTHING, found.key, zero, measure.top, measure.mass, measure.largest
            )  # fmt: skip
            by_turns = none + 1
            phase = _next_of_search(bounds, is_short | collected, room)

        if finishes:
            # -- A rule has said what it drops.
            threshold = kind_goal == NO_GOAL
            edge = tl.where(threshold, tl.minimum(edge, top_key), edge)
            open_below = open_below & ((threshold == 0) | (edge < bound))
            failed = failed | (threshold & (sure.number > 0) & (edge > sure.edge))
            if threshold:
                kept = from_key(kept, edge)
            spends = (kind_goal == ENTROPY_GOAL) & (open_below == 0)
            failed = failed | ((kind_goal == ENTROPY_GOAL) & open_below)
            uncut = no
            if spends:
                # What float32 takes for impossible goes.
                kept = from_key(kept, key_of(number_of(top_key) - 103.0))
                task = none + _OF_SHARE
                phase = tl.full([], _WEIGH, tl.int32)
                measure = Measure(none, none + _MASS, none, zero, number_of(top_key), zero + 1, zero + 1)
            begins = spends == 0
            rule += begins.to(tl.int32)

        if begins:
            rule, phase, failed, amount, uncut = _begin(
                rule, uncut, stale, top_key, open_below, failed, row_top_key, n_rules, work + RULES_AT, NORMALISE
            )  # fmt: skip
            task = none + _OF_RULE
            kind, least, value = _load_rule(work + RULES_AT, rule, n_rules)
            measure = Measure(none, amount, none, zero, number_of(top_key), zero + 1, zero + 1)

        if failed & (base.kind == LIST):
            # -- The list leaves a question open: from the row itself.
            base = Source(none + ROW, pairs, V)
            sure = Sure(none, nothing, none + LOWEST, none + HIGHEST)
            bound = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
            kept = all_kept()
            measure = Measure(none, none, none, zero, zero, zero + 1, zero + 1)
            open_below, failed, uncut = no, no, yes
            rule = none
            task = none + _OF_RULE
            phase = tl.full([], _FIND_TOP, tl.int32)
        state = State(
            phase, task, rule, top_key, count, mass, below, edge, budget, total, by_turns, open_below, uncut, failed
        )  # fmt: skip

    # -- Write what is kept, and over what the filter has kept; or sample of it and of what the filter has sampled.
    top = number_of(state.top_key)
    log_mass = zero
    if NORMALISE:
        log_mass = log_mass_of(state.top_key, state.mass)
    overwrites = tl.where((row_state == BRACKET) & (base.kind == ROW), 1, 0)
    best = tl.full([BLOCK], LOWEST, tl.int32)
    which = tl.full([BLOCK], HIGHEST, tl.int32)
    for start in range(0, base.size, BLOCK):
        x, valid, token, rank = _block(start, base, near, row, scores, maps, OPS, MAX, LOWEST_TIES, BLOCK)
        lives = is_kept(x, valid, rank, kept, True)
        if out_ptr is not None:
            y = x - log_mass
            if maps.temperature_ptr is not None:
                y = fitted(y, top, out_ptr)
            there = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
            written = lives | (tl.where(valid, overwrites, 0) != 0)
            tl.store(there, tl.where(lives, y, FILL).to(out_ptr.dtype.element_ty), mask=written)
        if tokens_ptr is not None:
            if base.kind == LIST:
                # What is kept for certain and was collected, as it may be drawn.
                place = start + tl.arange(0, BLOCK)
                pair = tl.load(base.pairs + place, mask=place < base.size, other=0)
                raw = pair.to(tl.int32).to(tl.float32, bitcast=True)
                lives = lives | (_is_sure(raw, near) & (place < base.size))
            key = key_of(x)
            if greedy == 0:
                key = key_of(x - tl.log(noise_of(token, seed, position)))
            key = tl.where(lives, key, LOWEST)
            better = (key > best) | ((key == best) & (token < which) & lives)
            which = tl.where(better, token, which)
            best = tl.maximum(best, key)
    store_kept(work, kept)
    if tokens_ptr is not None:
        largest = tl.max(best)
        store_token(tokens_ptr + row, tl.min(tl.where(best == largest, which, HIGHEST)))


@triton.jit(do_not_specialize=[*STEPWISE, "rows", "n_rules", "tried"], do_not_specialize_on_alignment=UNALIGNED)
def refine_rows_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    work_ptr,
    # outputs
    out_ptr, tokens_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share,
    rows, n_rules, tried,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, NORMALISE: tl.constexpr, LOWEST_TIES: tl.constexpr,
    PORTABLE: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What the rules leave of the rows that the launch before has left open."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    samples = Samples(seeds_ptr, positions_ptr, stride_seed, stride_position)
    shape = Shape(
        W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, Sample(runs, sample_size, share)
    )  # fmt: skip
    wait_for_launch(PDL)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + index
        work = work_ptr + row * stride_work
        # A loop of one turn or none: most rows are done, and Triton 3.6 can't compile a loop in a branch.
        for _ in range(1 - tl.load(work + DONE_AT)):
            refine_row(
                row, Scores(scores_ptr, stride_row, stride_token, V, shape.W), maps, samples, work,
                out_ptr, tokens_ptr, shape, n_rules, tried, stride_out, stride_out_token,
                OPS, MAX, FILL, NORMALISE, LOWEST_TIES, PORTABLE, BLOCK, ROOM, PARTS,
            )  # fmt: skip
