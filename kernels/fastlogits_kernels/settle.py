"""The rules, applied to the candidates of a row, or to all of it.

What is alive in a row is said by four numbers: tokens of a key above ``edge``, those at it whose rank is at least
``cut``, and of these those no further from ``centre`` than ``near`` says. Ranks order tokens that tie.
"""

from __future__ import annotations

from fastlogits_kernels._triton import tl, triton
from fastlogits_kernels.selection import (
    ALIVE_AT,
    EPSILON,
    ETA,
    FEW_SLOTS,
    FREE,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MANY_SLOTS,
    MIN_P,
    ONE,
    STEPWISE,
    TOP_H,
    TOP_H_TOKENS,
    TOP_K,
    TOP_N_SIGMA,
    TOP_P,
    TYPICAL,
    UNALIGNED,
    WHOLE,
    exp,
    is_active,
    is_greedy,
    key_of,
    noise_of,
    number_of,
    row_logits,
    rule_value,
    sums_of_row,
    weight_of,
)

_BLOCK = tl.constexpr(4096)  # where there are more, so many tokens are looked at at a time
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
def _block(start, row, V, access, OPS: tl.constexpr, SETUP: tl.constexpr):
    """Logits, whether they are there, tokens, and ranks of a block of the row."""
    token = start + tl.arange(0, _BLOCK)
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
        top = tl.full([], LOWEST, tl.int32)
        for start in range(0, V, _BLOCK):
            x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
            top = tl.maximum(top, tl.max(tl.where(_alive(x, valid, rank, alive, SETUP[1]), key_of(x), LOWEST)))
    else:
        x, valid, token, rank = few
        top = tl.max(tl.where(_alive(x, valid, rank, alive, SETUP[1]), key_of(x), LOWEST))
    return top


@triton.jit
def _sums_of(x, valid, rank, alive, top, BANDED: tl.constexpr):
    lives = _alive(x, valid, rank, alive, BANDED)
    weight = tl.where(lives, weight_of(x, top), 0)
    below = tl.where(weight > 0, exp(x - top) * (top - x) * ONE, 0.0).to(tl.int64)
    return tl.sum(lives.to(tl.int32)), tl.sum(weight), tl.sum(tl.where(lives, below, 0))


@triton.jit
def _sums(few, row, V, access, alive, top, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr):
    """Of what is alive: how many, their mass, and the mass times the distance from the top."""
    if WHOLE:
        count, mass, below = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        for start in range(0, V, _BLOCK):
            x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
            c, m, b = _sums_of(x, valid, rank, alive, top, SETUP[1])
            count += c
            mass += m
            below += b
    else:
        x, valid, token, rank = few
        count, mass, below = _sums_of(x, valid, rank, alive, top, SETUP[1])
    return count, mass, below


@triton.jit
def _squares_of(x, valid, rank, alive, top, BANDED: tl.constexpr):
    lives = _alive(x, valid, rank, alive, BANDED) & (tl.abs(x) < float("inf"))
    off = tl.where(lives, x - top, 0.0).to(tl.float64)
    return tl.sum(lives.to(tl.float64)), tl.sum(off), tl.sum(off * off)


@triton.jit
def _squares(few, row, V, access, alive, top, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr):
    """Of what is alive and finite: how many, and the sums of their distances from the top and of the squares."""
    if WHOLE:
        zero = tl.full([], 0.0, tl.float64)
        count, first, second = zero, zero, zero
        for start in range(0, V, _BLOCK):
            x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
            c, f, s = _squares_of(x, valid, rank, alive, top, SETUP[1])
            count += c
            first += f
            second += s
    else:
        x, valid, token, rank = few
        count, first, second = _squares_of(x, valid, rank, alive, top, SETUP[1])
    return count, first, second


@triton.jit
def _tally(key, lives, amount, pivot, WHAT: tl.constexpr):
    """How many are at or above a key, and their amount."""
    above = lives & (key >= pivot)
    total = tl.full([], 0, tl.int64)
    if WHAT != _COUNT:
        # In halves of 19 bits: the sums of 4096 of them fit into 32 bits, and those are added up faster.
        high = tl.sum(tl.where(above, (amount >> 19).to(tl.int32), 0))
        low = tl.sum(tl.where(above, (amount & 0x7FFFF).to(tl.int32), 0))
        total = (high.to(tl.int64) << 19) + low
    return tl.sum(above.to(tl.int32)), total


@triton.jit
def _tally_all(
    length, pivot, row, V, access, alive, top, mass, tie,
    WHAT: tl.constexpr, DISTANCE: tl.constexpr, TIES: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """The same, block by block; each thread adds up for itself, and all of them once at the end."""
    counts = tl.zeros([_BLOCK], tl.int32)
    highs, lows = counts, counts
    for start in tl.range(0, length, _BLOCK, loop_unroll_factor=2):
        x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
        key, lives, amount = _measure(x, valid, rank, alive, top, mass, tie, WHAT, DISTANCE, TIES, SETUP[1])
        above = lives & (key >= pivot)
        counts += above.to(tl.int32)
        if WHAT != _COUNT:
            highs += tl.where(above, (amount >> 19).to(tl.int32), 0)
            lows += tl.where(above, (amount & 0x7FFFF).to(tl.int32), 0)
    total = tl.full([], 0, tl.int64)
    if WHAT != _COUNT:
        total = (tl.sum(highs.to(tl.int64)) << 19) + tl.sum(lows.to(tl.int64))
    return tl.sum(counts), total


@triton.jit
def _pick(condition, a, b, c, x, y, z):
    return tl.where(condition, a, x), tl.where(condition, b, y), tl.where(condition, c, z)


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
    low = low.to(tl.int64)
    high = high.to(tl.int64) + 1
    count_above, amount_above = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    # Until one token is left between the two, or one key.
    if WHOLE:
        for _ in range(33):
            open_still = (high - low > 1) & (count - count_above > 1)
            middle = (low + high) >> 1
            # No blocks where there is nothing left to find: a branch around the loop is what Triton 3.6 can't compile.
            c, a = _tally_all(
                tl.where(open_still, V, 0), middle.to(tl.int32), row, V, access, alive, top, mass, tie,
                WHAT, DISTANCE, TIES, OPS, SETUP,
            )  # fmt: skip
            reached = open_still & (c >= goal) & (a >= amount_goal)
            missed = open_still & (reached == 0)
            low, count, amount = _pick(reached, middle, c, a, low, count, amount)
            high, count_above, amount_above = _pick(missed, middle, c, a, high, count_above, amount_above)
    else:
        x, valid, token, rank = few
        key, lives, each = _measure(x, valid, rank, alive, top, mass, tie, WHAT, DISTANCE, TIES, SETUP[1])
        while (high - low > 1) & (count - count_above > 1):
            middle = (low + high) >> 1
            c, a = _tally(key, lives, each, middle.to(tl.int32), WHAT)
            stuck = (c == count) | (c == count_above)
            reached = (c >= goal) & (a >= amount_goal)
            low, count, amount = _pick(reached, middle, c, a, low, count, amount)
            high, count_above, amount_above = _pick(reached == 0, middle, c, a, high, count_above, amount_above)
            if stuck:
                # A gap between keys, or keys that many share: go on from those that are there.
                between = lives & (key >= low.to(tl.int32)) & (key.to(tl.int64) < high)
                low = tl.min(tl.where(between, key, 0x7FFFFFFF)).to(tl.int64)
                high = tl.max(tl.where(between, key, LOWEST)).to(tl.int64) + 1
    least = low.to(tl.int32)
    found = tl.full([], 0x7FFFFFFF, tl.int32)
    if WHOLE:
        for start in range(0, V, _BLOCK):
            x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
            key, lives, each = _measure(x, valid, rank, alive, top, mass, tie, WHAT, DISTANCE, TIES, SETUP[1])
            found = tl.minimum(found, tl.min(tl.where(lives & (key >= least), key, 0x7FFFFFFF)))
    else:
        found = tl.min(tl.where(lives & (key >= least), key, 0x7FFFFFFF))
    return found, count, amount, count_above, amount_above


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
    surprise = tl.full([], 0, tl.int64)
    if WHOLE:
        largest = tl.full([], 1e-38, tl.float32)
        for start in range(0, V, _BLOCK):
            x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
            term = tl.where(_alive(x, valid, rank, alive, SETUP[1]), _term(x, top, mass), 0.0)
            largest = tl.maximum(largest, tl.max(term))
        for start in range(0, V, _BLOCK):
            x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
            key, lives, each = _measure(x, valid, rank, alive, top, mass, largest, _SURPRISE, False, False, SETUP[1])
            surprise += tl.sum(each)
    else:
        x, valid, token, rank = few
        term = tl.where(_alive(x, valid, rank, alive, SETUP[1]), _term(x, top, mass), 0.0)
        largest = tl.maximum(tl.max(term), 1e-38)
        key, lives, each = _measure(x, valid, rank, alive, top, mass, largest, _SURPRISE, False, False, SETUP[1])
        surprise = tl.sum(each)
    return largest, surprise


@triton.jit
def _spend(
    few, row, V, access, alive, top_key, top, value, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr
):
    """Of what is alive, the most likely tokens that make up a share of the entropy."""
    # What float32 takes for impossible goes.
    possible = key_of(top - 103.0)
    if possible > alive[0]:
        alive = (possible, tl.full([], LOWEST, tl.int32), alive[2], alive[3])
    count, mass, below = _sums(few, row, V, access, alive, top, WHOLE, OPS, SETUP)
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
    few, row, V, access, alive, top, value, relative, distance, uncut, row_sums,
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
            n = tl.where(uncut, row_sums[2], n)
            squares = tl.where(uncut, row_sums[3], squares)
        deviation = tl.sqrt(tl.where(squares > 0, squares, 0.0) / tl.maximum(n - 1, 1.0)).to(tl.float32)
        # Squares beyond float32 say nothing.
        known = (n > 1) & (squares.to(tl.float32) < float("inf"))
        edge = tl.where(known, key_of(top - value.to(tl.float32) * deviation), LOWEST)
    else:
        edge = tl.full([], LOWEST, tl.int32)
    return edge


@triton.jit
def _apply(
    few, row, V, access, alive, top_key, open_below, uncut, value, bound, row_sums,
    KIND: tl.constexpr, LEAST: tl.constexpr, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Apply a rule: what is alive, the largest key of it, and whether tokens below the bound may be."""
    RANKED: tl.constexpr = (KIND == TOP_K) or (KIND == TOP_H) or (KIND == TOP_P) or (KIND == TYPICAL)
    MASS: tl.constexpr = (KIND == TOP_P) or (KIND == TYPICAL)
    nothing = tl.full([], 0, tl.int64)
    top = number_of(top_key)
    count, mass, below = _sums(few, row, V, access, alive, top, WHOLE, OPS, SETUP)
    all_mass, all_below = mass, below
    if SETUP[3] >= 1:
        all_mass = tl.where(uncut, (row_sums[0] * ONE).to(tl.int64), mass)
    if SETUP[3] >= 2:
        all_below = tl.where(uncut, (row_sums[1] * ONE).to(tl.int64), below)
    relative = (all_mass.to(tl.float64) / ONE).to(tl.float32)  # in units of the largest probability
    distance = (all_below.to(tl.float64) / all_mass.to(tl.float64)).to(tl.float32)
    edge = _threshold(
        few, row, V, access, alive, top, value, relative, distance, uncut, row_sums, KIND, WHOLE, OPS, SETUP
    )  # fmt: skip
    # How many tokens, and what mass of them, are to stay at least.
    goal, mass_goal = tl.full([], LEAST, tl.int32), nothing
    if KIND == TOP_K:
        goal = value.to(tl.int32)
    elif KIND == TOP_H:
        goal = tl.full([], TOP_H_TOKENS, tl.int32)
    elif MASS:
        mass_goal = tl.ceil(value * all_mass.to(tl.float64)).to(tl.int64)
    if RANKED or (LEAST > 1):
        if (count >= goal) & (mass >= mass_goal):
            low, high = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32), top_key
            if KIND == TYPICAL:
                high = tl.full([], 0, tl.int32)
            elif not WHOLE:
                low = tl.maximum(low, bound)
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
                if RANKED or (KIND == MIN_P):
                    alive = _cut_ties(few, row, V, access, alive, edge, keep, c - c_above, WHOLE, OPS, SETUP)
            open_below = open_below & (found > KEY_OF_INFINITY)
        elif not RANKED:
            edge = tl.full([], LOWEST, tl.int32)
    if not RANKED:
        edge = tl.minimum(edge, top_key)
        open_below = open_below & (edge < bound)
        if edge > alive[0]:
            alive = (edge, tl.full([], LOWEST, tl.int32), alive[2], alive[3])
    if KIND == TOP_H:
        if open_below == 0:
            alive = _spend(few, row, V, access, alive, top_key, top, value, WHOLE, OPS, SETUP)
    return alive, top_key, open_below


@triton.jit
def _settle(
    few, row, V, access, alive, values, bound, complete, top_key, row_sums,
    WHOLE: tl.constexpr, RULES: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Apply the rules to what is alive: what is left of it, and whether all that it takes was known.

    All tokens that aren't there are below ``bound``, or there are none where ``complete``. ``top_key`` is the largest
    key of the row, where its sums are known.
    """
    if SETUP[3] == 0:
        top_key = _top(few, row, V, access, alive, WHOLE, OPS, SETUP)
    open_below = complete == 0  # whether tokens below the bound may be alive
    uncut = tl.full([], True, tl.int1)  # whether no rule may have dropped anything yet
    failed = tl.full([], False, tl.int1)
    for i in tl.static_range(0, len(RULES), 3):
        value = rule_value(row, values, RULES[i + 2])
        active = is_active(value, V, RULES[i], RULES[i + 2] >= 0)
        if (RULES[i] != TOP_K) and (RULES[i] != MIN_P):
            failed = failed | (active & (uncut == 0) & open_below)
        if RULES[i] == TOP_N_SIGMA:
            active = active & (top_key <= KEY_OF_INFINITY) & (top_key > KEY_OF_MINUS_INFINITY)
        elif RULES[i] != TOP_K:
            # Nothing is likely or unlikely beside NaN or an infinity.
            active = active & (top_key < KEY_OF_INFINITY) & (top_key > KEY_OF_MINUS_INFINITY)
        if active & (failed == 0):
            alive, top_key, open_below = _apply(
                few, row, V, access, alive, top_key, open_below, uncut, value, bound, row_sums,
                RULES[i], RULES[i + 1], WHOLE, OPS, SETUP,
            )  # fmt: skip
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
    few, row, V, access, alive, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position, greedy,
    NORMALISE: tl.constexpr, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Write what is alive, or draw a token of it."""
    if out_ptr is not None:
        log_mass = 0.0
        if NORMALISE:
            top_key = _top(few, row, V, access, alive, WHOLE, OPS, SETUP)
            top = number_of(top_key)
            _count, mass, _below = _sums(few, row, V, access, alive, top, WHOLE, OPS, SETUP)
            log_mass = top + tl.log((mass.to(tl.float64) / ONE).to(tl.float32))
            finite = (top_key > KEY_OF_MINUS_INFINITY) & (top_key < KEY_OF_INFINITY)
            log_mass = tl.where(finite, log_mass, float("nan"))
        here = out_ptr + row * stride_out
        if WHOLE:
            for start in range(0, V, _BLOCK):
                x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
                lives = _alive(x, valid, rank, alive, SETUP[1])
                kept = (x - log_mass).to(out_ptr.dtype.element_ty)
                tl.store(here + token.to(tl.int64) * stride_out_token, kept, mask=lives)
        else:
            x, valid, token, rank = few
            lives = _alive(x, valid, rank, alive, SETUP[1])
            kept = (x - log_mass).to(out_ptr.dtype.element_ty)
            tl.store(here + token.to(tl.int64) * stride_out_token, kept, mask=lives)
    if tokens_ptr is not None:
        if WHOLE:
            best, which = tl.full([], LOWEST, tl.int32), tl.full([], 0, tl.int32)
            for start in range(0, V, _BLOCK):
                x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
                mine, my_token = _drawn(x, valid, token, rank, alive, seed, position, greedy, SETUP[1])
                which = tl.where(mine > best, my_token, which)
                best = tl.maximum(best, mine)
        else:
            x, valid, token, rank = few
            best, which = _drawn(x, valid, token, rank, alive, seed, position, greedy, SETUP[1])
        tl.store(tokens_ptr + row, which.to(tl.int64))


@triton.jit
def _settle_few(
    row, V, access, pairs, found, values, bound, top_key, row_sums, greedy, alive, out_ptr, stride_out,
    stride_out_token, tokens_ptr, seed, position,
    RULES: tl.constexpr, NORMALISE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Settle a row of so many candidates: whether they were enough, and what is alive."""
    slot = tl.arange(0, SLOTS)
    valid = slot < found
    pair = tl.load(pairs + slot, mask=valid, other=0)
    x, token = pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32)
    rank = token
    if SETUP[0]:
        rank = -token
    few = (x, valid, token, rank)
    settled = greedy
    if greedy == 0:
        alive, settled = _settle(
            few, row, V, access, alive, values, bound, found >= V, top_key, row_sums, False, RULES, OPS, SETUP
        )  # fmt: skip
    if settled:
        _emit(
            few, row, V, access, alive, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position, greedy,
            NORMALISE, False, OPS, SETUP,
        )  # fmt: skip
    return settled, alive


@triton.jit
def _settle_all(
    row, V, access, values, bound, top_key, row_sums, greedy, alive, out_ptr, stride_out, stride_out_token,
    tokens_ptr, seed, position,
    RULES: tl.constexpr, NORMALISE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Settle a row by itself, block by block: what is alive."""
    few = (0, 0, 0, 0)
    if greedy == 0:
        alive, _settled = _settle(
            few, row, V, access, alive, values, bound, True, top_key, row_sums, True, RULES, OPS, SETUP
        )  # fmt: skip
    _emit(
        few, row, V, access, alive, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position, greedy,
        NORMALISE, True, OPS, SETUP,
    )  # fmt: skip
    return alive


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def settle_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    values_ptr, r0, r1, r2, r3, r4, r5, r6, r7, seeds_ptr, positions_ptr, work_ptr,
    # outputs
    out_ptr, tokens_ptr,
    # shapes
    V, W, tiles, slots, parts, bests_at, pairs_at,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row, stride_seed, stride_position,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, RULES: tl.constexpr, NORMALISE: tl.constexpr, SUMS: tl.constexpr,
    SETUP: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What the rules leave of a row, or a token of it."""
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    state = tl.load(work)
    # A bound of distances says nothing of keys.
    bound = tl.where(tl.load(work + 2) != 0, KEY_OF_MINUS_INFINITY, tl.load(work + 1))
    found = tl.load(work + 4)
    greedy = tl.full([], False, tl.int1)
    seed, position = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if tokens_ptr is not None:
        seed = tl.load(seeds_ptr + row * stride_seed).to(tl.int64)
        position = tl.load(positions_ptr + row * stride_position).to(tl.int64)
        if temperature_ptr is not None:
            greedy = is_greedy(temperature_ptr + row * stride_temperature)
    top_key = tl.full([], LOWEST, tl.int32)
    row_sums = (tl.full([], 0.0, tl.float64), 0.0, 0.0, 0.0)
    if SUMS >= 1:
        top, mass, below, count, squares = sums_of_row(work, tiles, SUMS, TILES)
        # A NaN among the logits is one in the mass, and would be the largest key.
        top_key = tl.where(mass == mass, key_of(top), tl.where(top == float("inf"), KEY_OF_INFINITY, 0x7FFFFFFF))
        row_sums = (mass, below, count, squares)

    lowest = tl.full([], LOWEST, tl.int32)
    all_alive = (lowest, lowest, tl.full([], 0.0, tl.float32), lowest)
    alive = all_alive
    if state == FREE:
        if tokens_ptr is not None:
            part = tl.arange(0, PARTS)
            best = tl.load(work + bests_at + 2 * part, mask=part < parts, other=LOWEST)
            which = tl.load(work + bests_at + 2 * part + 1, mask=part < parts, other=0)
            tl.store(tokens_ptr + row, tl.min(tl.where(best == tl.max(best), which, 0x7FFFFFFF)).to(tl.int64))
    else:
        of_row = (state == WHOLE) | (found > slots)
        pairs = (work + pairs_at).to(tl.pointer_type(tl.int64))
        access = (
            scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
            W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane,
            stride_values_row,
        )  # fmt: skip
        settled = tl.full([], False, tl.int1)
        if (of_row == 0) & (found <= FEW_SLOTS):
            settled, alive = _settle_few(
                row, V, access, pairs, found, values, bound, top_key, row_sums, greedy, all_alive, out_ptr, stride_out,
                stride_out_token, tokens_ptr, seed, position, RULES, NORMALISE, OPS, SETUP, FEW_SLOTS,
            )  # fmt: skip
        elif of_row == 0:
            settled, alive = _settle_few(
                row, V, access, pairs, found, values, bound, top_key, row_sums, greedy, all_alive, out_ptr, stride_out,
                stride_out_token, tokens_ptr, seed, position, RULES, NORMALISE, OPS, SETUP, MANY_SLOTS,
            )  # fmt: skip
        if settled == 0:
            # More than could be put by, or a question that they leave open.
            alive = _settle_all(
                row, V, access, values, bound, top_key, row_sums, greedy, all_alive, out_ptr, stride_out,
                stride_out_token, tokens_ptr, seed, position, RULES, NORMALISE, OPS, SETUP,
            )  # fmt: skip
    tl.store(work + ALIVE_AT, alive[0])
    tl.store(work + ALIVE_AT + 1, alive[1])
    tl.store(work + ALIVE_AT + 2, alive[2].to(tl.int32, bitcast=True))
    tl.store(work + ALIVE_AT + 3, alive[3])
