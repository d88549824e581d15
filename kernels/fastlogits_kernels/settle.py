"""The rules, applied to the candidates of a row, or to all of it.

What is alive in a row is said by four numbers: tokens of a key above ``edge``, those at it whose rank is at least
``cut``, and of these those no further from ``centre`` than ``near`` says. Ranks order tokens that tie.

``few`` is where the tokens are looked for. Of a row whose candidates were put by: their logits, whether they are there,
tokens and ranks, and of the tokens above them, all kept for certain, how many they are, their mass and largest key, and
the key from which they are. Block by block, of a whole row or of more candidates than are looked at at once: where a
search puts by what is left, and the bounds that the sample made likely; the same of the tokens above them; whether it
is candidates, how many tokens, where they are, what ``_is_near`` takes, and for how many a search has room.
"""

from __future__ import annotations

from fastlogits_kernels._triton import tl, triton
from fastlogits_kernels.selection import (
    ALIVE_AT,
    BRACKET,
    COUNT_AT,
    EPSILON,
    ETA,
    FREE,
    HIGH_AT,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MANY_SLOTS,
    MIN_P,
    ONE,
    PART_WORDS,
    ROW_SUMS_AT,
    STEPWISE,
    TOP_AT,
    TOP_H,
    TOP_H_TOKENS,
    TOP_K,
    TOP_N_SIGMA,
    TOP_P,
    TYPICAL,
    UNALIGNED,
    WHOLE,
    exp,
    heated,
    is_active,
    is_greedy,
    key_of,
    noise_of,
    number_of,
    put_by,
    row_logits,
    rule_value,
    sums_asked,
    wait_for_launch,
    weight_of,
)

_BLOCK = tl.constexpr(2048)  # so many tokens of a whole row are looked at at a time
_COUNTED = tl.constexpr(50)  # sums of weights hold a count from this bit on
# What a search adds up.
_COUNT = tl.constexpr(0)
_MASS = tl.constexpr(1)
_SURPRISE = tl.constexpr(2)


@triton.jit
def _alive(x, valid, rank, alive, BANDED: tl.constexpr):
    edge, cut, centre, near = alive
    key = key_of(x)
    lives = valid & ((key > edge) | ((key == edge) & (rank >= cut)))
    if BANDED:
        lives = lives & (key_of(-tl.abs(x - centre)) >= near)
    return lives


@triton.jit
def _from(alive, edge):
    """``alive`` without what is below a key."""
    return tl.maximum(edge, alive[0]), tl.where(edge > alive[0], LOWEST, alive[1]), alive[2], alive[3]


@triton.jit
def _term(x, top, mass):
    """What a token adds to the entropy."""
    p = exp(x - top) / mass
    return tl.where(p > 0, tl.maximum(p * (tl.log(mass) + (top - x)), 0.0), 0.0)


@triton.jit
def _measure(
    x, valid, rank, alive, top, mass, tie,
    WHAT: tl.constexpr, DISTANCE: tl.constexpr, TIES: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """What a search orders tokens by, and what it adds up; ``tie`` is the key, centre or largest term it is about."""
    lives = _alive(x, valid, rank, alive, BANDED)
    key = key_of(x)
    if TIES:
        lives = lives & (key == tie)
        key = rank
    if DISTANCE:
        key = key_of(-tl.abs(x - tie))
    amount = tl.zeros_like(key).to(tl.int64)
    if WHAT == _MASS:
        amount = weight_of(x, top)
    elif WHAT == _SURPRISE:
        amount = (_term(x, top, mass) / tie * ONE).to(tl.int64)
    return key, lives, tl.where(lives, amount, 0)


@triton.jit
def _is_near(x, least, banded, centre, BANDED: tl.constexpr):
    """Whether logits are candidates: those that were put by are a few too many."""
    test = x
    if BANDED:
        test = tl.where(banded, -tl.abs(x - centre), x)
    return (test < least) == 0


@triton.jit
def _block(start, few, row, V, access, OPS: tl.constexpr, SETUP: tl.constexpr):
    """Logits, whether they are there, tokens, and ranks of a block of the row, or of its candidates."""
    place = start + tl.arange(0, _BLOCK)
    if few[8]:
        valid = place < few[9]
        pair = tl.load(few[10] + place, mask=valid, other=0)
        token = (pair >> 32).to(tl.int32)
        x = heated(pair.to(tl.int32).to(tl.float32, bitcast=True), row, access)
        valid = valid & _is_near(x, few[11], few[12], few[13], SETUP[1])
    else:
        token = place
        valid = token < V
        x = row_logits(row, token >> 5, token & 31, token, valid, V, access, OPS, SETUP[2])
    rank = token
    if SETUP[0]:
        rank = -token
    return x, valid, token, rank


@triton.jit
def _top(few, row, V, access, alive, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr):
    """The largest key alive, or below all."""
    if WHOLE:
        tops = tl.full([_BLOCK], LOWEST, tl.int32)
        for start in range(0, few[9], _BLOCK):
            x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
            tops = tl.maximum(tops, tl.where(_alive(x, valid, rank, alive, SETUP[1]), key_of(x), LOWEST))
        top = tl.max(tops)
    else:
        x, valid, rank = few[0], few[1], few[3]
        top = tl.max(tl.where(_alive(x, valid, rank, alive, SETUP[1]), key_of(x), LOWEST))
    if SETUP[4]:
        top = tl.maximum(top, few[6])
    return top


@triton.jit
def _weighed(lives, amount):
    """What is added up of tokens: their number above their amount."""
    return tl.where(lives, amount + (tl.full([], 1, tl.int64) << _COUNTED), 0)


@triton.jit
def _unpacked(total):
    return (total >> _COUNTED).to(tl.int32), total & ((tl.full([], 1, tl.int64) << _COUNTED) - 1)


@triton.jit
def _sums_of(x, lives, top, MASS: tl.constexpr, BELOW: tl.constexpr):
    """What tokens add to their number and mass, and to the mass times the distance from the top."""
    weight = tl.zeros_like(lives.to(tl.int64))
    below = weight
    if MASS:
        weight = weight_of(x, top)
    if BELOW:
        below = tl.where(lives & (weight > 0), exp(x - top) * (top - x) * ONE, 0.0).to(tl.int64)
    return _weighed(lives, weight), below


@triton.jit
def _sums(
    few, row, V, access, alive, top,
    MASS: tl.constexpr, BELOW: tl.constexpr, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Of what is alive: how many; their mass; and the mass times the distance from the top, of candidates alone."""
    if WHOLE:
        weights = tl.zeros([_BLOCK], tl.int64)
        belows = weights
        for start in range(0, few[9], _BLOCK):
            x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
            weight, below = _sums_of(x, _alive(x, valid, rank, alive, SETUP[1]), top, MASS, BELOW)
            weights += weight
            belows += below
        counts, masses = _unpacked(weights)
        count, mass, below = tl.sum(counts), tl.sum(masses), tl.sum(belows)
    else:
        x, valid, rank = few[0], few[1], few[3]
        weights, belows = _sums_of(x, _alive(x, valid, rank, alive, SETUP[1]), top, MASS, BELOW)
        count, mass = _unpacked(tl.sum(weights))
        below = tl.full([], 0, tl.int64)
        if BELOW:
            below = tl.sum(belows)
    if SETUP[4]:
        count += few[4]
        mass += few[5]
    return count, mass, below


@triton.jit
def _squares_of(x, valid, rank, alive, top, BANDED: tl.constexpr):
    lives = _alive(x, valid, rank, alive, BANDED) & (tl.abs(x) < float("inf"))
    off = tl.where(lives, x - top, 0.0).to(tl.float64)
    return lives.to(tl.float64), off, off * off


@triton.jit
def _squares(few, row, V, access, alive, top, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr):
    """Of what is alive and finite: how many, and the sums of their distances from the top and of the squares."""
    if WHOLE:
        counts = tl.zeros([_BLOCK], tl.float64)
        firsts, seconds = counts, counts
        for start in range(0, few[9], _BLOCK):
            x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
            count, first, second = _squares_of(x, valid, rank, alive, top, SETUP[1])
            counts += count
            firsts += first
            seconds += second
    else:
        x, valid, rank = few[0], few[1], few[3]
        counts, firsts, seconds = _squares_of(x, valid, rank, alive, top, SETUP[1])
    return tl.sum(counts), tl.sum(firsts), tl.sum(seconds)


@triton.jit
def _moved(pivot, count, amount, goal, amount_goal, bounds):
    """Bounds of a search, of which one becomes ``pivot``: at or above it are so many tokens of such an amount."""
    low, high, at_low, amount_at_low, at_high, amount_at_high = bounds
    inside = (pivot > low) & (pivot < high)
    reached = inside & (count >= goal) & (amount >= amount_goal)
    missed = inside & (reached == 0)
    return (
        tl.where(reached, pivot, low), tl.where(missed, pivot, high),
        tl.where(reached, count, at_low), tl.where(reached, amount, amount_at_low),
        tl.where(missed, count, at_high), tl.where(missed, amount, amount_at_high),
    )  # fmt: skip


@triton.jit
def _tally_all(
    few, low, high, first, second, third, row, V, access, alive, top, mass, tie,
    WHAT: tl.constexpr, DISTANCE: tl.constexpr, TIES: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """What is at or above each of three keys, and the least and the largest key that is there from ``low`` to ``high``.

    Each thread adds up for itself, and all of them once at the end.
    """
    a = tl.zeros([_BLOCK], tl.int64)
    b, c = a, a
    least = tl.full([_BLOCK], HIGHEST, tl.int32)
    most = tl.full([_BLOCK], LOWEST, tl.int32)
    for start in range(0, few[9], _BLOCK):
        x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
        key, lives, amount = _measure(x, valid, rank, alive, top, mass, tie, WHAT, DISTANCE, TIES, SETUP[1])
        weighed = _weighed(lives, amount)
        a += tl.where(key >= first, weighed, 0)
        b += tl.where(key >= second, weighed, 0)
        c += tl.where(key >= third, weighed, 0)
        least = tl.minimum(least, tl.where(lives & (key >= low), key, HIGHEST))
        most = tl.maximum(most, tl.where(lives & (key < high), key, LOWEST))
    count_a, amount_a = _unpacked(a)
    count_b, amount_b = _unpacked(b)
    count_c, amount_c = _unpacked(c)
    return (
        tl.min(least), tl.max(most),
        tl.sum(count_a), tl.sum(amount_a), tl.sum(count_b), tl.sum(amount_b), tl.sum(count_c), tl.sum(amount_c),
    )  # fmt: skip


@triton.jit
def _narrow(
    few, row, V, access, alive, top, mass, tie, bounds, goal, amount_goal,
    WHAT: tl.constexpr, DISTANCE: tl.constexpr, TIES: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Bounds of a search in a whole row between which no more tokens are than can be put by, or one key.

    The first keys looked at are those that the sample made likely; then the range is quartered, by turns of the
    numbers, among which logits are spread, and of the keys, which comes to an end whatever they are.
    """
    low, high, count, amount, above, amount_above = bounds
    beyond, amount_beyond = above, amount_above  # the tokens that aren't here
    likely_low, likely_high = few[2].to(tl.int64), few[3].to(tl.int64)
    told = likely_high < HIGHEST
    by_turns = tl.full([], 0, tl.int32)
    while (high - low > 1) & (count - above > few[14]):
        first = low + (high - low) // 4
        second = low + (high - low) // 2
        third = low + (high - low) * 3 // 4
        if not TIES:
            highest = number_of((high - 1).to(tl.int32))
            lowest = tl.maximum(number_of(low.to(tl.int32)), highest - 128.0)
            apart = (highest - lowest) * 0.25
            by_number = (by_turns % 2 == 0) & (apart > 0) & (apart < float("inf"))
            first = tl.where(by_number, key_of(lowest + apart).to(tl.int64), first)
            second = tl.where(by_number, key_of(lowest + 2 * apart).to(tl.int64), second)
            third = tl.where(by_number, key_of(lowest + 3 * apart).to(tl.int64), third)
            if not DISTANCE:
                first = tl.where(told, likely_low, first)
                second = tl.where(told, (likely_low + likely_high) // 2, second)
                third = tl.where(told, likely_high, third)
        least, most, count_1, amount_1, count_2, amount_2, count_3, amount_3 = _tally_all(
            few, low.to(tl.int32), high, first.to(tl.int32), second.to(tl.int32), third.to(tl.int32), row, V, access,
            alive, top, mass, tie, WHAT, DISTANCE, TIES, OPS, SETUP,
        )  # fmt: skip
        bounds = (low, high, count, amount, above, amount_above)
        bounds = _moved(first, count_1 + beyond, amount_1 + amount_beyond, goal, amount_goal, bounds)
        bounds = _moved(second, count_2 + beyond, amount_2 + amount_beyond, goal, amount_goal, bounds)
        bounds = _moved(third, count_3 + beyond, amount_3 + amount_beyond, goal, amount_goal, bounds)
        low, high, count, amount, above, amount_above = bounds
        # Only where keys are is there anything to find.
        low = tl.maximum(low, least)
        high = tl.minimum(high, most.to(tl.int64) + 1)
        by_turns += 1
        told = told & False
    return (low, high, count, amount, above, amount_above)


@triton.jit
def _gathered(
    few, row, V, access, alive, top, mass, tie, bounds,
    WHAT: tl.constexpr, DISTANCE: tl.constexpr, TIES: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """The tokens of a whole row between the bounds of a search."""
    counter, pairs, slots = few[0], few[1], few[14]
    # Other threads may still read what a search before this one has put by.
    tl.debug_barrier()
    tl.store(counter, 0)
    tl.debug_barrier()
    for start in range(0, tl.where(bounds[2] > 0, few[9], 0), _BLOCK):
        x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
        key, lives, _amount = _measure(x, valid, rank, alive, top, mass, tie, WHAT, DISTANCE, TIES, SETUP[1])
        between = lives & (key >= bounds[0].to(tl.int32)) & (key.to(tl.int64) < bounds[1])
        put_by(between.to(tl.int32) != 0, x, token, counter, pairs.to(tl.pointer_type(tl.int32)), slots, SETUP[5])
    tl.debug_barrier()
    found = tl.minimum(tl.load(counter, volatile=True), slots)
    return _candidates(pairs, found, MANY_SLOTS, SETUP)


@triton.jit
def _candidates(pairs, found, SLOTS: tl.constexpr, SETUP: tl.constexpr):
    """Logits, whether they are there, tokens, and ranks of what was put by."""
    slot = tl.arange(0, SLOTS)
    valid = slot < found
    pair = tl.load(pairs + slot, mask=valid, other=0, volatile=True)
    x, token = pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32)
    rank = token
    if SETUP[0]:
        rank = -token
    return x, valid, token, rank


@triton.jit
def _search(
    few, row, V, access, alive, top, mass, tie, low, high, goal, amount_goal, count, amount,
    WHAT: tl.constexpr, DISTANCE: tl.constexpr, TIES: tl.constexpr, WHOLE: tl.constexpr, OPS: tl.constexpr,
    SETUP: tl.constexpr,
):  # fmt: skip
    """The largest key at or above which there are ``goal`` tokens with an amount of ``amount_goal``.

    ``low`` and ``high`` enclose it; ``count`` and ``amount`` are what is at or above ``low``, which reaches both. Also
    returns what is at or above the key, and what is above it.
    """
    above, amount_above = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    if SETUP[4] and not TIES:
        above, amount_above = few[4], few[5]
    bounds = (low.to(tl.int64), high.to(tl.int64) + 1, count, amount, above, amount_above)
    if WHOLE:
        bounds = _narrow(
            few, row, V, access, alive, top, mass, tie, bounds, goal, amount_goal, WHAT, DISTANCE, TIES, OPS, SETUP
        )  # fmt: skip
        x, valid, _token, rank = _gathered(
            few, row, V, access, alive, top, mass, tie, bounds, WHAT, DISTANCE, TIES, OPS, SETUP
        )  # fmt: skip
    else:
        x, valid, rank = few[0], few[1], few[3]
    key, lives, each = _measure(x, valid, rank, alive, top, mass, tie, WHAT, DISTANCE, TIES, SETUP[1])
    low, high, count, amount, above, amount_above = bounds
    # A row has one key left, or few tokens.
    lives = lives & (key >= low.to(tl.int32)) & (key.to(tl.int64) < high)
    weighed = _weighed(lives, each)
    beyond, amount_beyond = above, amount_above  # the tokens that aren't here
    # Until one token is left between the two, or one key. What costs time is each sum over all threads.
    while (high - low > 1) & (count - above > 1):
        pivot = (low + high) >> 1
        reach = key >= pivot.to(tl.int32)
        if WHAT == _COUNT:
            c, a = tl.sum((lives & reach).to(tl.int32)), tl.full([], 0, tl.int64)
        else:
            c, a = _unpacked(tl.sum(tl.where(reach, weighed, 0)))
        c += beyond
        a += amount_beyond
        stuck = (c == count) | (c == above)
        reached = (c >= goal) & (a >= amount_goal)
        low, count, amount = tl.where(reached, pivot, low), tl.where(reached, c, count), tl.where(reached, a, amount)
        high, above = tl.where(reached, high, pivot), tl.where(reached, above, c)
        amount_above = tl.where(reached, amount_above, a)
        if stuck:
            # A gap between keys, or keys that many share: go on from those that are there.
            between = lives & (key >= low.to(tl.int32)) & (key.to(tl.int64) < high)
            low = tl.min(tl.where(between, key, HIGHEST)).to(tl.int64)
            high = tl.max(tl.where(between, key, LOWEST)).to(tl.int64) + 1
    least = tl.min(tl.where(lives & (key >= low.to(tl.int32)), key, HIGHEST))
    return least, count, amount, above, amount_above


@triton.jit
def _cut_ties(
    few, row, V, access, alive, edge, keep, count, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr
):
    """``alive`` without what is below a key, and of the ``count`` tokens at it with only ``keep``."""
    nothing = tl.full([], 0, tl.int64)
    # Where all stay there is nothing to search; a branch around it is what Triton 3.6 can't compile.
    goal = tl.where(keep < count, keep, 0)
    cut, _c, _a, _c_above, _a_above = _search(
        few, row, V, access, alive, 0.0, 1.0, edge, -V, V, goal, nothing, tl.where(keep < count, count, 0), nothing,
        _COUNT, False, True, WHOLE, OPS, SETUP,
    )  # fmt: skip
    cut = tl.where(keep < count, cut, LOWEST)
    if edge == alive[0]:
        cut = tl.maximum(cut, alive[1])
    return (edge, cut, alive[2], alive[3])


@triton.jit
def _surprise(few, row, V, access, alive, top, mass, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr):
    """The largest term of the entropy of what is alive, and all of them in units of 2 ** -37 of it."""
    if WHOLE:
        terms = tl.full([_BLOCK], 1e-38, tl.float32)
        for start in range(0, few[9], _BLOCK):
            x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
            terms = tl.maximum(terms, tl.where(_alive(x, valid, rank, alive, SETUP[1]), _term(x, top, mass), 0.0))
        largest = tl.max(terms)
        each = tl.zeros([_BLOCK], tl.int64)
        for start in range(0, few[9], _BLOCK):
            x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
            _key, _lives, more = _measure(x, valid, rank, alive, top, mass, largest, _SURPRISE, False, False, SETUP[1])
            each += more
    else:
        x, valid, rank = few[0], few[1], few[3]
        term = tl.where(_alive(x, valid, rank, alive, SETUP[1]), _term(x, top, mass), 0.0)
        largest = tl.maximum(tl.max(term), 1e-38)
        _key, _lives, each = _measure(x, valid, rank, alive, top, mass, largest, _SURPRISE, False, False, SETUP[1])
    return largest, tl.sum(each)


@triton.jit
def _spend(
    few, row, V, access, alive, top_key, top, value, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr
):
    """Of what is alive, the most likely tokens that make up a share of the entropy."""
    # What float32 takes for impossible goes.
    alive = _from(alive, key_of(top - 103.0))
    count, mass, _below = _sums(few, row, V, access, alive, top, True, False, WHOLE, OPS, SETUP)
    relative = (mass.to(tl.float64) / ONE).to(tl.float32)
    largest, surprise = _surprise(few, row, V, access, alive, top, relative, WHOLE, OPS, SETUP)
    budget = (value * surprise.to(tl.float64)).to(tl.int64)
    if surprise > budget:
        # The first token that goes beyond the budget.
        floor = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
        found, c, s, c_above, s_above = _search(
            few, row, V, access, alive, top, relative, largest, floor, top_key, tl.full([], 1, tl.int32), budget + 1,
            count, surprise, _SURPRISE, False, False, WHOLE, OPS, SETUP,
        )  # fmt: skip
        each = tl.maximum((s - s_above) // tl.maximum(c - c_above, 1), 1)
        keep = tl.maximum((budget - s_above) // each, (1 - c_above).to(tl.int64)).to(tl.int32)
        if keep > 0:
            alive = _cut_ties(few, row, V, access, alive, found, keep, c - c_above, WHOLE, OPS, SETUP)
        else:
            alive = (found + 1, tl.full([], LOWEST, tl.int32), alive[2], alive[3])
    return alive


@triton.jit
def _threshold(
    few, row, V, access, alive, top, value, relative, distance, summed, row_sums,
    KIND: tl.constexpr, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """The key below which a rule drops all, where it is one that says so; else one below all."""
    logarithm = tl.log(value)
    if KIND == MIN_P:
        edge = key_of((top.to(tl.float64) + logarithm).to(tl.float32))
    elif KIND == EPSILON:
        edge = key_of((top.to(tl.float64) + logarithm + tl.log(relative).to(tl.float64)).to(tl.float32))
    elif KIND == ETA:
        entropy = (tl.log(relative) + distance).to(tl.float64)
        cutoff = tl.minimum(logarithm, logarithm * 0.5 - entropy)
        edge = key_of((top.to(tl.float64) + cutoff + tl.log(relative).to(tl.float64)).to(tl.float32))
    elif KIND == TOP_N_SIGMA:
        n, first, second = _squares(few, row, V, access, alive, top, WHOLE, OPS, SETUP)
        squares = second - first * first / tl.maximum(n, 1.0)
        if SETUP[3] >= 3:
            n = tl.where(summed, row_sums[2], n)
            squares = tl.where(summed, row_sums[3], squares)
        deviation = tl.sqrt(tl.where(squares > 0, squares, 0.0) / tl.maximum(n - 1, 1.0)).to(tl.float32)
        # Squares beyond float32 say nothing.
        known = (n > 1) & (squares.to(tl.float32) < float("inf"))
        edge = tl.where(known, key_of(top - value.to(tl.float32) * deviation), LOWEST)
    else:
        edge = tl.full([], LOWEST, tl.int32)
    return edge


@triton.jit
def _apply(
    few, row, V, access, alive, top_key, open_below, summed, value, bound, row_sums,
    KIND: tl.constexpr, LEAST: tl.constexpr, FIRST: tl.constexpr, WHOLE: tl.constexpr, OPS: tl.constexpr,
    SETUP: tl.constexpr,
):  # fmt: skip
    """Apply a rule: what is alive, the largest key of it, and whether tokens below the bound may be.

    ``row_sums`` are those of what is alive where ``summed``. Also returns whether tokens that were taken for kept may
    not be.
    """
    RANKED: tl.constexpr = (KIND == TOP_K) or (KIND == TOP_H) or (KIND == TOP_P) or (KIND == TYPICAL)
    MASS: tl.constexpr = (KIND == TOP_P) or (KIND == TYPICAL)
    nothing = tl.full([], 0, tl.int64)
    top = number_of(top_key)
    LIKELY: tl.constexpr = MASS or (KIND == EPSILON) or (KIND == ETA)
    BELOW: tl.constexpr = ((KIND == ETA) or (KIND == TYPICAL)) and not (SETUP[3] >= 2 and FIRST)
    count, mass, below = _sums(few, row, V, access, alive, top, LIKELY, BELOW, WHOLE, OPS, SETUP)
    all_mass, all_below = mass, below
    if SETUP[3] >= 1:
        all_mass = tl.where(summed, (row_sums[0] * ONE).to(tl.int64), mass)
    if SETUP[3] >= 2:
        all_below = tl.where(summed, (row_sums[1] * ONE).to(tl.int64), below)
    relative = (all_mass.to(tl.float64) / ONE).to(tl.float32)  # in units of the largest probability
    distance = (all_below.to(tl.float64) / all_mass.to(tl.float64)).to(tl.float32)
    edge = _threshold(
        few, row, V, access, alive, top, value, relative, distance, summed, row_sums, KIND, WHOLE, OPS, SETUP
    )  # fmt: skip
    # How many tokens, and what mass of them, are to stay at least.
    goal, mass_goal = tl.full([], LEAST, tl.int32), nothing
    if KIND == TOP_K:
        goal = value.to(tl.int32)
    elif KIND == TOP_H:
        goal = tl.full([], TOP_H_TOKENS, tl.int32)
    elif MASS:
        mass_goal = tl.ceil(value * all_mass.to(tl.float64)).to(tl.int64)
    wrong = tl.full([], False, tl.int1)
    if RANKED or (LEAST > 1):
        if SETUP[4]:
            wrong = RANKED & (few[4] > 0) & (few[4] >= goal) & (few[5] >= mass_goal)
        if (count >= goal) & (mass >= mass_goal) & (wrong == 0):
            low, high = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32), top_key
            if KIND == TYPICAL:
                high = tl.full([], 0, tl.int32)
            else:
                low = tl.maximum(low, bound)
                if SETUP[4]:
                    high = tl.where(few[4] > 0, few[7] - 1, high)
            centre = top - distance
            found, c, m, c_above, m_above = _search(
                few, row, V, access, alive, top, relative, centre, low, high, goal, mass_goal, count,
                mass if MASS else nothing, _MASS if MASS else _COUNT, KIND == TYPICAL, False, WHOLE, OPS, SETUP,
            )  # fmt: skip
            if KIND == TYPICAL:
                alive = (alive[0], alive[1], centre, found)
                top_key = _top(few, row, V, access, alive, WHOLE, OPS, SETUP)
            else:
                keep = c - c_above
                if KIND == TOP_P:
                    each = tl.maximum((m - m_above) // tl.maximum(c - c_above, 1), 1)
                    lacking = (tl.maximum(mass_goal - m_above, 0) + each - 1) // each
                    keep = tl.maximum(lacking, (goal - c_above).to(tl.int64)).to(tl.int32)
                elif (KIND == TOP_H) or ((KIND == TOP_K) and SETUP[0]):
                    keep = goal - c_above
                elif KIND == MIN_P:
                    keep = tl.where(found < edge, goal - c_above, keep)
                if RANKED:
                    edge = found
                edge = tl.minimum(edge, found)
                if KIND == TOP_K:
                    # As many NaN as that: nothing is below them.
                    edge = tl.where(found > KEY_OF_INFINITY, LOWEST, edge)
                if (KIND == TOP_K) and not SETUP[0]:
                    # Of those that tie at the edge all stay.
                    alive = _from(alive, edge)
                elif RANKED or (KIND == MIN_P):
                    alive = _cut_ties(few, row, V, access, alive, edge, keep, c - c_above, WHOLE, OPS, SETUP)
            if RANKED:
                open_below = open_below & (found > KEY_OF_INFINITY)
        elif RANKED:
            # What is here is not enough; there may be more.
            wrong = wrong | open_below
        else:
            edge = tl.full([], LOWEST, tl.int32)
    if not RANKED:
        edge = tl.minimum(edge, top_key)
        open_below = open_below & (edge < bound)
        if SETUP[4]:
            wrong = wrong | ((few[4] > 0) & (edge > few[7]))
        alive = _from(alive, edge)
    if KIND == TOP_H:
        if open_below == 0:
            alive = _spend(few, row, V, access, alive, top_key, top, value, WHOLE, OPS, SETUP)
    return alive, top_key, open_below, wrong


@triton.jit
def _settle(
    few, row, V, access, alive, values, bound, complete, top_key, row_sums,
    WHOLE: tl.constexpr, RULES: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Apply the rules to what is alive: what is left of it, and whether all that it takes was known.

    All tokens that aren't there are below ``bound``, or there are none where ``complete``. ``top_key`` is the largest
    key of the row, where its sums are known; else LOWEST.
    """
    summed = top_key > LOWEST
    if summed == 0:
        top_key = _top(few, row, V, access, alive, WHOLE, OPS, SETUP)
    open_below = complete == 0  # whether tokens below the bound may be alive
    uncut = tl.full([], True, tl.int1)  # whether no rule may have dropped anything yet
    failed = tl.full([], False, tl.int1)
    for i in tl.static_range(0, len(RULES), 3):
        value = rule_value(row, values, RULES[i + 2])
        active = is_active(value, V, RULES[i], RULES[i + 2] >= 0)
        if RULES[i] == TOP_H:
            failed = failed | (active & (uncut == 0) & open_below)
        elif (RULES[i] != TOP_K) and (RULES[i] != MIN_P):
            failed = failed | (active & ((uncut & summed) == 0) & open_below)
        if RULES[i] == TOP_N_SIGMA:
            active = active & (top_key <= KEY_OF_INFINITY) & (top_key > KEY_OF_MINUS_INFINITY)
        elif RULES[i] != TOP_K:
            # Nothing is likely or unlikely beside NaN or an infinity.
            active = active & (top_key < KEY_OF_INFINITY) & (top_key > KEY_OF_MINUS_INFINITY)
        if active & (failed == 0):
            alive, top_key, open_below, wrong = _apply(
                few, row, V, access, alive, top_key, open_below, uncut & summed, value, bound, row_sums,
                RULES[i], RULES[i + 1], i == 0, WHOLE, OPS, SETUP,
            )  # fmt: skip
            failed = failed | wrong
            uncut = uncut & False
            if RULES[i] == TOP_H:
                failed = failed | open_below
    return alive, (failed == 0) & (open_below == 0)


@triton.jit
def _drawn(x, valid, token, rank, alive, seed, position, greedy, BANDED: tl.constexpr):
    """The key of the best token alive, and the lowest token that has it."""
    key = key_of(x)
    if greedy == 0:
        key = key_of(x - tl.log(noise_of(token, seed, position)))
    key = tl.where(_alive(x, valid, rank, alive, BANDED), key, LOWEST)
    best = tl.max(key)
    return best, tl.min(tl.where(key == best, token, 0x7FFFFFFF))


@triton.jit
def _emit(
    few, row, V, access, alive, kept_more, drawn, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position,
    greedy, NORMALISE: tl.constexpr, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Write what is alive, and over what the sweep has kept; or draw of it and of what the sweep has ``drawn``."""
    if out_ptr is not None:
        log_mass = 0.0
        if NORMALISE:
            top_key = _top(few, row, V, access, alive, WHOLE, OPS, SETUP)
            top = number_of(top_key)
            _count, mass, _below = _sums(few, row, V, access, alive, top, True, False, WHOLE, OPS, SETUP)
            log_mass = top + tl.log((mass.to(tl.float64) / ONE).to(tl.float32))
            finite = (top_key > KEY_OF_MINUS_INFINITY) & (top_key < KEY_OF_INFINITY)
            log_mass = tl.where(finite, log_mass, float("nan"))
        here = out_ptr + row * stride_out
        if WHOLE:
            for start in range(0, few[9], _BLOCK):
                x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
                lives = _alive(x, valid, rank, alive, SETUP[1])
                kept = tl.where(lives, x - log_mass, SETUP[6]).to(out_ptr.dtype.element_ty)
                there = here + token.to(tl.int64) * stride_out_token
                tl.store(there, kept, mask=lives | (valid & (tl.where(valid, kept_more, 0) != 0)))
        else:
            x, valid, token, rank = few[0], few[1], few[2], few[3]
            lives = _alive(x, valid, rank, alive, SETUP[1])
            kept = (x - log_mass).to(out_ptr.dtype.element_ty)
            tl.store(here + token.to(tl.int64) * stride_out_token, kept, mask=lives)
    if tokens_ptr is not None:
        if WHOLE:
            best, which = tl.full([], LOWEST, tl.int32), tl.full([], 0, tl.int32)
            for start in range(0, few[9], _BLOCK):
                x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
                mine, my_token = _drawn(x, valid, token, rank, alive, seed, position, greedy, SETUP[1])
                which = tl.where(mine > best, my_token, which)
                best = tl.maximum(best, mine)
        else:
            x, valid, token, rank = few[0], few[1], few[2], few[3]
            best, which = _drawn(x, valid, token, rank, alive, seed, position, greedy, SETUP[1])
        if SETUP[4]:
            first = (drawn[0] > best) | ((drawn[0] == best) & (drawn[1] < which))
            which = tl.where(first, drawn[1], which)
        tl.store(tokens_ptr + row, which.to(tl.int64))


@triton.jit
def _remember(work, alive):
    """Leave what is alive where others find it."""
    tl.store(work + ALIVE_AT, alive[0])
    tl.store(work + ALIVE_AT + 1, alive[1])
    tl.store(work + ALIVE_AT + 2, alive[2].to(tl.int32, bitcast=True))
    tl.store(work + ALIVE_AT + 3, alive[3])


@triton.jit
def _settle_few(
    row, V, access, work, pairs, found, near, taken, values, bound, top_key, row_sums, greedy, alive, drawn, out_ptr,
    stride_out, stride_out_token, tokens_ptr, seed, position,
    RULES: tl.constexpr, NORMALISE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Settle a row of so many candidates; whether they were enough."""
    x, valid, token, rank = _candidates(pairs, found, SLOTS, SETUP)
    # They were put by as they were before the division.
    x = heated(x, row, access)
    valid = valid & _is_near(x, near[0], near[1], near[2], SETUP[1])
    complete = (found >= V) & (near[0] == float("-inf"))
    few = (x, valid, token, rank, taken[0], taken[1], taken[2], taken[3])
    settled = greedy
    if greedy == 0:
        alive, settled = _settle(
            few, row, V, access, alive, values, bound, complete, top_key, row_sums, False, RULES, OPS, SETUP
        )  # fmt: skip
        if SETUP[4]:
            # NaN is no candidate beside tokens that were taken for kept.
            settled = settled & ((taken[0] == 0) | (tl.max(tl.where(valid, key_of(x), LOWEST)) < taken[3]))
    if settled:
        _remember(work, alive)
        _emit(
            few, row, V, access, alive, 0, drawn, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position,
            greedy, NORMALISE, False, OPS, SETUP,
        )  # fmt: skip
    return settled


@triton.jit
def _settle_many(
    row, V, access, work, pairs, slots, found, near, taken, values, bound, top_key, row_sums, greedy, alive, state,
    drawn, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position,
    LISTED: tl.constexpr, RULES: tl.constexpr, NORMALISE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Settle a row block by block, by its candidates where they are ``LISTED``, else by itself; whether that does."""
    lowest, highest = tl.full([], LOWEST, tl.int32), tl.full([], HIGHEST, tl.int32)
    counter, room = work + COUNT_AT, tl.minimum(slots, MANY_SLOTS)
    # Where a search puts by: not over the candidates, where there may be so many that they come as a list.
    gathered = pairs + tl.where(slots > MANY_SLOTS, slots, 0)
    if LISTED:
        few = (
            counter, gathered, lowest, highest, taken[0], taken[1], taken[2], taken[3],
            True, found, pairs, near[0], near[1], near[2], room,
        )  # fmt: skip
        edge, kept_more = bound, 0
    else:
        few = (
            counter, gathered, tl.load(work + 1), tl.load(work + HIGH_AT), tl.full([], 0, tl.int32),
            tl.full([], 0, tl.int64), lowest, highest, False, V, pairs, near[0], near[1], near[2], room,
        )  # fmt: skip
        edge, kept_more = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32), tl.where(state == BRACKET, 1, 0)
        drawn = (lowest, highest)
    settled = greedy
    if greedy == 0:
        alive, settled = _settle(
            few, row, V, access, alive, values, edge, not LISTED, top_key, row_sums, True, RULES, OPS, SETUP
        )  # fmt: skip
        if SETUP[4] and LISTED:
            largest = tl.full([_BLOCK], LOWEST, tl.int32)
            for start in range(0, tl.where(taken[0] > 0, found, 0), _BLOCK):
                x, valid, token, rank = _block(start, few, row, V, access, OPS, SETUP)
                largest = tl.maximum(largest, tl.where(valid, key_of(x), LOWEST))
            settled = settled & ((taken[0] == 0) | (tl.max(largest) < taken[3]))
    if settled:
        _remember(work, alive)
        _emit(
            few, row, V, access, alive, kept_more, drawn, out_ptr, stride_out, stride_out_token, tokens_ptr, seed,
            position, greedy, NORMALISE, True, OPS, SETUP,
        )  # fmt: skip
    return settled


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def settle_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    values_ptr, r0, r1, r2, r3, r4, r5, r6, r7, seeds_ptr, positions_ptr, work_ptr,
    # outputs
    out_ptr, tokens_ptr,
    # shapes
    V, W, slots, parts, parts_at, pairs_at,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row, stride_seed, stride_position,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, RULES: tl.constexpr, NORMALISE: tl.constexpr, SUMS: tl.constexpr,
    SETUP: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What the rules leave of a row, or a token of it."""
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    greedy = tl.full([], False, tl.int1)
    seed, position = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if tokens_ptr is not None:
        seed = tl.load(seeds_ptr + row * stride_seed).to(tl.int64)
        position = tl.load(positions_ptr + row * stride_position).to(tl.int64)
        if temperature_ptr is not None:
            greedy = is_greedy(temperature_ptr + row * stride_temperature)
    if SUMS >= 1:
        summed = sums_asked(row, V, values, temperature_ptr, stride_temperature, RULES, False) > 0
        summed = summed & (greedy == 0)
    wait_for_launch(PDL)
    state = tl.load(work)
    # A bound of distances says nothing of keys.
    bound = tl.where(tl.load(work + 2) != 0, KEY_OF_MINUS_INFINITY, tl.load(work + 1))
    found = tl.load(work + COUNT_AT)
    top_key = tl.full([], LOWEST, tl.int32)
    row_sums = (tl.full([], 0.0, tl.float64), 0.0, 0.0, 0.0)
    if SUMS >= 1:
        top = tl.load(work + TOP_AT).to(tl.float32, bitcast=True)
        there = (work + ROW_SUMS_AT).to(tl.pointer_type(tl.float64))
        mass = tl.load(there, mask=summed, other=0.0)
        row_sums = (
            mass,
            tl.load(there + 1, mask=summed, other=0.0),
            tl.load(there + 2, mask=summed, other=0.0),
            tl.load(there + 3, mask=summed, other=0.0),
        )
        # A NaN among the logits is one in the mass, and would be the largest key.
        top_key = tl.where(mass == mass, key_of(top), tl.where(top == float("inf"), KEY_OF_INFINITY, HIGHEST))
        top_key = tl.where(summed, top_key, LOWEST)
    lowest = tl.full([], LOWEST, tl.int32)
    all_alive = (lowest, lowest, tl.full([], 0.0, tl.float32), lowest)

    # Of what the sweep has taken for kept: how many, their mass, their largest key, and the key from which they are.
    taken = (tl.full([], 0, tl.int32), tl.full([], 0, tl.int64), lowest, tl.full([], HIGHEST, tl.int32))
    drawn = (lowest, tl.full([], HIGHEST, tl.int32))
    if (state == FREE) | (state == BRACKET):
        part = tl.arange(0, PARTS)
        here = work + parts_at + PART_WORDS * part
        if tokens_ptr is not None:
            best = tl.load(here, mask=part < parts, other=LOWEST)
            which = tl.load(here + 1, mask=part < parts, other=0)
            drawn = (tl.max(best), tl.min(tl.where(best == tl.max(best), which, HIGHEST)))
        if state == BRACKET:
            mass_here = (here + 4).to(tl.pointer_type(tl.int64))
            taken = (
                tl.sum(tl.load(here + 2, mask=part < parts, other=0)),
                tl.sum(tl.load(mass_here, mask=part < parts, other=0)),
                tl.max(tl.load(here + 3, mask=part < parts, other=LOWEST)),
                tl.load(work + HIGH_AT),
            )

    if state == FREE:
        _remember(work, all_alive)
        if tokens_ptr is not None:
            tl.store(tokens_ptr + row, drawn[1].to(tl.int64))
    else:
        of_row = (state == WHOLE) | (found > slots)
        pairs = (work + pairs_at).to(tl.pointer_type(tl.int64))
        near = (
            number_of(tl.load(work + 1)), tl.load(work + 2) != 0, tl.load(work + 3).to(tl.float32, bitcast=True)
        )  # fmt: skip
        access = (
            scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
            W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane,
            stride_values_row,
        )  # fmt: skip
        settled = tl.full([], False, tl.int1)
        if (of_row == 0) & (found <= SETUP[7]):
            settled = _settle_few(
                row, V, access, work, pairs, found, near, taken, values, bound, top_key, row_sums, greedy, all_alive,
                drawn, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position,
                RULES, NORMALISE, OPS, SETUP, SETUP[7],
            )  # fmt: skip
        elif (of_row == 0) & (found <= MANY_SLOTS):
            settled = _settle_few(
                row, V, access, work, pairs, found, near, taken, values, bound, top_key, row_sums, greedy, all_alive,
                drawn, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position,
                RULES, NORMALISE, OPS, SETUP, MANY_SLOTS,
            )  # fmt: skip
        elif of_row == 0:
            settled = _settle_many(
                row, V, access, work, pairs, slots, found, near, taken, values, bound, top_key, row_sums, greedy,
                all_alive, state, drawn, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position,
                True, RULES, NORMALISE, OPS, SETUP,
            )  # fmt: skip
        if settled == 0:
            # More than could be put by, or a question that they leave open.
            _settle_many(
                row, V, access, work, pairs, slots, found, near, taken, values, bound, top_key, row_sums, greedy,
                all_alive, state, drawn, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position,
                False, RULES, NORMALISE, OPS, SETUP,
            )  # fmt: skip
