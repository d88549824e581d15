"""The rules applied to the candidates of a row, in registers; rows whose candidates don't suffice are left open.

Compiled for each set of rules and not for any chain: candidates were collected folded.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
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
    FEW,
    FREE,
    GOAL,
    HIGH_AT,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MASS_GOAL,
    NEEDS_SUMS,
    NO_GOAL,
    ONE,
    PART_COUNT_AT,
    PART_LARGEST_AT,
    PART_MASS_AT,
    PART_WORDS,
    ROW_SUMS_AT,
    RULE_WORDS,
    RULES_AT,
    SPARES_FEWEST,
    STATE_AT,
    STEPWISE,
    TOP_H_TOKENS,
    TOP_KEY_AT,
    UNALIGNED,
    Kept,
    Maps,
    Sample,
    Samples,
    Shape,
    Sure,
    all_kept,
    cutoff,
    exp,
    is_greedy,
    is_kept,
    is_near,
    is_sure,
    key_of,
    let_next_launch,
    load_candidates,
    load_float,
    load_seed,
    noise_of,
    number_of,
    rank_of,
    scaled,
    store_kept,
    wait_for_launch,
    weight_of,
)
from fastlogits_kernels.selection.row_sums import load_row_sums

COUNTED = tl.constexpr(50)  # sums of weights hold a count from this bit on
LEAST_TERM = tl.constexpr(1.2e-38)  # of an entropy: the least normal float32 number, about


class Candidates(NamedTuple):
    """Logits, whether they are there, tokens and ranks."""

    x: tl.tensor
    valid: tl.tensor
    token: tl.tensor
    rank: tl.tensor


class Found(NamedTuple):
    """What a search has found: a key, how many tokens are at or above it and their amount, and the same above it."""

    key: tl.tensor
    number: tl.tensor
    amount: tl.tensor
    above: tl.tensor
    amount_above: tl.tensor


# -- What both refinements share ------------------------------------------------------------------------------------


@triton.jit
def from_key(kept, edge):
    """``kept`` without what is below a key."""
    return Kept(tl.maximum(edge, kept.edge), tl.where(edge > kept.edge, LOWEST, kept.cut), kept.centre, kept.near)


@triton.jit
def with_ties(kept, edge, cut):
    """``kept`` without what is below a key, and of the tokens at it only those of a rank of at least ``cut``."""
    return Kept(edge, tl.where(edge == kept.edge, tl.maximum(cut, kept.cut), cut), kept.centre, kept.near)


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
def weighed(lives, amount):
    """What is added up of tokens: their number above their amount."""
    return tl.where(lives, amount + (tl.full([], 1, tl.int64) << COUNTED), 0)


@triton.jit
def unpacked(total):
    """The number and the amount of a sum."""
    return (total >> COUNTED).to(tl.int32), total & ((tl.full([], 1, tl.int64) << COUNTED) - 1)


@triton.jit
def centre_of(top):
    """From where the finite logits of a row of that largest one are measured, so that squares stay small."""
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def deviation_of(finite, squares):
    """The standard deviation of so many finite logits, float32; NaN where nothing is known of it."""
    deviation = tl.sqrt(tl.where(squares > 0, squares, 0.0) / tl.maximum(finite - 1, 1.0)).to(tl.float32)
    # Squares beyond float32 say nothing.
    return tl.where((finite > 1) & (squares.to(tl.float32) < float("inf")), deviation, float("nan"))


@triton.jit
def ties_kept(found, goal, mass_goal, edge, goal_kind, LOWEST_TIES: tl.constexpr):
    """Of the tokens at the key that was found, how many stay."""
    tied = found.number - found.above
    each = tl.maximum((found.amount - found.amount_above) // tl.maximum(tied, 1), 1)
    lacking = (tl.maximum(mass_goal - found.amount_above, 0) + each - 1) // each
    exact = goal - found.above
    by_mass = tl.maximum(lacking, exact.to(tl.int64)).to(tl.int32)
    counts = goal_kind == ENTROPY_GOAL
    if LOWEST_TIES:
        counts = counts | (goal_kind == COUNT_GOAL)
    keep = tl.where(goal_kind == MASS_GOAL, by_mass, tl.where(counts, exact, tied))
    return tl.where((goal_kind == NO_GOAL) & (found.key < edge), exact, keep)


@triton.jit
def load_sure(work, shape, state, PARTS: tl.constexpr):
    """What the filter has kept for certain of a row beside its candidates."""
    part = tl.arange(0, PARTS)
    there = part < tl.where(state == BRACKET, shape.parts, 0)
    here = work + shape.parts_at + PART_WORDS * part
    mass_here = (here + PART_MASS_AT).to(tl.pointer_type(tl.int64))
    return Sure(
        tl.sum(tl.load(here + PART_COUNT_AT, mask=there, other=0)),
        tl.sum(tl.load(mass_here, mask=there, other=0)),
        tl.max(tl.load(here + PART_LARGEST_AT, mask=there, other=LOWEST)),
        tl.where(state == BRACKET, tl.load(work + HIGH_AT), HIGHEST),
    )


@triton.jit
def log_mass_of(top_key, mass):
    """The logarithm of the mass of what is kept, NaN where its largest logit is no finite number."""
    log_mass = number_of(top_key) + tl.log((mass.to(tl.float64) / ONE).to(tl.float32))
    return tl.where((top_key > KEY_OF_MINUS_INFINITY) & (top_key < KEY_OF_INFINITY), log_mass, float("nan"))


@triton.jit
def best_of(x, lives, token, seed, position, greedy):
    """The key of the best sample of some tokens, or of the largest logit, and the lowest of those that have it.

    LOWEST and HIGHEST where there are none.
    """
    key = key_of(x)
    if greedy == 0:
        key = key_of(x - tl.log(noise_of(token, seed, position)))
    key = tl.where(lives, key, LOWEST)
    best = tl.max(key)
    return best, tl.min(tl.where(lives & (key == best), token, HIGHEST))


@triton.jit
def store_token(ptr, which):
    """Write the token of a row: 0 where nothing was above -inf."""
    tl.store(ptr, tl.where(which == HIGHEST, 0, which).to(tl.int64))


@triton.jit
def can_act(top_key, NEEDS: tl.constexpr, KIND_GOAL: tl.constexpr):
    """Whether a rule says anything of a row of that largest key."""
    if KIND_GOAL == COUNT_GOAL:
        acts = top_key >= LOWEST
    elif NEEDS >= 3:
        acts = (top_key <= KEY_OF_INFINITY) & (top_key > KEY_OF_MINUS_INFINITY)
    else:
        # Nothing is likely or unlikely beside NaN or an infinity.
        acts = (top_key < KEY_OF_INFINITY) & (top_key > KEY_OF_MINUS_INFINITY)
    return acts


# -- Candidates in registers ----------------------------------------------------------------------------------------


@triton.jit
def _lives(some, kept, BANDED: tl.constexpr):
    return is_kept(some.x, some.valid, some.rank, kept, BANDED)


@triton.jit
def _top(some, sure, kept, BANDED: tl.constexpr):
    """The largest key that is kept, or below all."""
    top = tl.max(tl.where(_lives(some, kept, BANDED), key_of(some.x), LOWEST))
    return tl.maximum(top, sure.largest)


@triton.jit
def search(
    key, lives, amount, low, high, goal, amount_goal, count, all_amount, above, amount_above, WEIGHS: tl.constexpr
):
    """The largest key at or above which there are ``goal`` tokens with an amount of ``amount_goal``.

    ``low`` and ``high`` enclose it; ``count`` and ``all_amount`` are what is at or above ``low``, which reaches both,
    ``above`` and ``amount_above`` what is above ``high`` and not among the tokens.
    """
    low, high = low.to(tl.int64), high.to(tl.int64) + 1
    each = weighed(lives, amount)
    beyond, amount_beyond = above, amount_above
    # Until one token is left between the two, or one key. What costs time is each sum over all threads.
    while (high - low > 1) & (count - above > 1):
        pivot = (low + high) >> 1
        if WEIGHS:
            number, more = unpacked(tl.sum(tl.where(key >= pivot.to(tl.int32), each, 0)))
        else:
            number = tl.sum((lives & (key >= pivot.to(tl.int32))).to(tl.int32))
            more = tl.full([], 0, tl.int64)
        number += beyond
        more += amount_beyond
        stuck = (number == count) | (number == above)
        reached = (number >= goal) & (more >= amount_goal)
        low, high = tl.where(reached, pivot, low), tl.where(reached, high, pivot)
        count, all_amount = tl.where(reached, number, count), tl.where(reached, more, all_amount)
        above, amount_above = tl.where(reached, above, number), tl.where(reached, amount_above, more)
        if stuck:
            # A gap between keys, or keys that many share: go on from those that are there.
            between = lives & (key >= low.to(tl.int32)) & (key.to(tl.int64) < high)
            low = tl.min(tl.where(between, key, HIGHEST)).to(tl.int64)
            high = tl.max(tl.where(between, key, LOWEST)).to(tl.int64) + 1
    least = tl.min(tl.where(lives & (key >= low.to(tl.int32)), key, HIGHEST))
    return Found(least, count, all_amount, above, amount_above)


@triton.jit
def _cut_ties(some, kept, edge, keep, tied, V, BANDED: tl.constexpr):
    """``kept`` without what is below a key, and of the ``tied`` tokens at it with only ``keep``."""
    nothing = tl.full([], 0, tl.int64)
    none = tl.full([], 0, tl.int32)
    V = none + V  # a constant, and no tensor, where it is 1
    lives = _lives(some, kept, BANDED) & (key_of(some.x) == edge)
    # Where all stay there is nothing to search; a branch around it is what Triton 3.6 can't compile.
    some_go = keep < tied
    found = search(
        some.rank, lives, tl.zeros_like(some.rank).to(tl.int64), -V, V,
        tl.where(some_go, keep, 0), nothing, tl.where(some_go, tied, 0), nothing, none, nothing, False,
    )  # fmt: skip
    return with_ties(kept, edge, tl.where(some_go, found.key, LOWEST))


@triton.jit
def _spend(some, sure, kept, top_key, top, value, V, BANDED: tl.constexpr):
    """Of what is kept, the most likely tokens that make up a share of the entropy."""
    nothing, none = tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
    # What float32 takes for impossible goes.
    kept = from_key(kept, key_of(top - 103.0))
    lives = _lives(some, kept, BANDED)
    count, mass = unpacked(tl.sum(weighed(lives, weight_of(some.x, top))))
    relative = (mass.to(tl.float64) / ONE).to(tl.float32)
    term = tl.where(lives, term_of(some.x, top, relative), 0.0)
    largest = tl.maximum(tl.max(term), LEAST_TERM)
    surprise = (term / largest * ONE).to(tl.int64)
    total = tl.sum(surprise)
    budget = (value * total.to(tl.float64)).to(tl.int64)
    if total > budget:
        # The first token that goes beyond the budget.
        found = search(
            key_of(some.x), lives, surprise, tl.full([], KEY_OF_MINUS_INFINITY, tl.int32), top_key,
            tl.full([], 1, tl.int32), budget + 1, count, total, none, nothing, True,
        )  # fmt: skip
        tied = found.number - found.above
        keep = surprises_kept(found, budget)
        kept = _cut_ties(some, kept, found.key, tl.maximum(keep, 0), tied, V, BANDED)
        if keep <= 0:
            kept = Kept(found.key + 1, tl.full([], LOWEST, tl.int32), kept.centre, kept.near)
    return kept


@triton.jit
def surprises_kept(found, budget):
    """Of the tokens that go beyond a budget of entropy, how many stay within it; the first of all always does."""
    each = tl.maximum((found.amount - found.amount_above) // tl.maximum(found.number - found.above, 1), 1)
    return tl.maximum((budget - found.amount_above) // each, (1 - found.above).to(tl.int64)).to(tl.int32)


@triton.jit
def _apply(
    some, sure, kept, top_key, open_below, summed, value, bound, row_sums, V,
    KIND: tl.constexpr, LEAST: tl.constexpr, SUMS: tl.constexpr, BANDED: tl.constexpr, LOWEST_TIES: tl.constexpr,
):  # fmt: skip
    """Apply a rule: what is kept, the largest key of it, whether tokens below the bound may be, and what is wrong.

    ``row_sums`` are those of what is kept where ``summed``. It is wrong where tokens that were kept for certain may not
    be, or what is here is not enough.
    """
    KIND_GOAL: tl.constexpr = GOAL[KIND]
    MASS: tl.constexpr = (KIND_GOAL == MASS_GOAL) or (KIND_GOAL == DISTANCE_GOAL)
    NEEDS: tl.constexpr = NEEDS_SUMS[KIND]
    nothing = tl.full([], 0, tl.int64)
    top = number_of(top_key)
    lives = _lives(some, kept, BANDED)
    amount = tl.zeros_like(some.rank).to(tl.int64)
    if (NEEDS >= 1) and (NEEDS < 3):
        amount = weight_of(some.x, top)
    count, mass = unpacked(tl.sum(weighed(lives, amount)))
    count += sure.number
    if (NEEDS >= 1) and (NEEDS < 3):
        mass += sure.mass
    all_mass, all_below = mass, nothing
    if NEEDS == 2:
        all_below = tl.sum(below_of(some.x, top, lives))
    if (SUMS >= 1) and (NEEDS >= 1) and (NEEDS < 3):
        all_mass = tl.where(summed, (row_sums.mass * ONE).to(tl.int64), mass)
    if (SUMS >= 2) and (NEEDS == 2):
        all_below = tl.where(summed, (row_sums.below * ONE).to(tl.int64), all_below)
    relative = (all_mass.to(tl.float64) / ONE).to(tl.float32)  # in units of the largest probability
    distance = (all_below.to(tl.float64) / all_mass.to(tl.float64)).to(tl.float32)
    edge = tl.full([], LOWEST, tl.int32)
    if KIND_GOAL == NO_GOAL:
        deviation = top
        if NEEDS >= 3:
            off = tl.where(lives & (tl.abs(some.x) < float("inf")), some.x - centre_of(top), 0.0).to(tl.float64)
            finite = tl.sum((lives & (tl.abs(some.x) < float("inf"))).to(tl.float64))
            first = tl.sum(off)
            squares = tl.sum(off * off) - first * first / tl.maximum(finite, 1.0)
            if SUMS >= 3:
                finite = tl.where(summed, row_sums.finite, finite)
                squares = tl.where(summed, row_sums.squares, squares)
            deviation = deviation_of(finite, squares)
        limit = cutoff(value, top, relative, tl.log(relative) + distance, deviation, KIND)
        edge = tl.where(limit == limit, key_of(limit), LOWEST)
    # How many tokens, and what mass of them, are to stay at least.
    goal, mass_goal = tl.full([], LEAST, tl.int32), nothing
    if KIND_GOAL == COUNT_GOAL:
        goal = value.to(tl.int32)
    elif KIND_GOAL == ENTROPY_GOAL:
        goal = tl.full([], TOP_H_TOKENS, tl.int32)
    elif MASS:
        mass_goal = tl.ceil(value * all_mass.to(tl.float64)).to(tl.int64)
    else:
        tl.static_assert(KIND_GOAL == NO_GOAL, "a goal has no branch in refine._apply()")
    wrong = tl.full([], False, tl.int1)
    if (KIND_GOAL != NO_GOAL) or (LEAST > 1):
        if KIND_GOAL != NO_GOAL:
            wrong = (sure.number > 0) & (sure.number >= goal) & (sure.mass >= mass_goal)
        if (count >= goal) & (mass >= mass_goal) & (wrong == 0):
            centre = top - distance
            if KIND_GOAL == DISTANCE_GOAL:
                key = key_of(-tl.abs(some.x - centre))
                low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
                high = tl.where(sure.number > 0, sure.edge - 1, 0)
            else:
                key = key_of(some.x)
                low = tl.maximum(tl.full([], KEY_OF_MINUS_INFINITY, tl.int32), bound)
                high = tl.where(sure.number > 0, sure.edge - 1, top_key)
            if MASS:
                found = search(
                    key,
                    lives,
                    amount,
                    low,
                    high,
                    goal,
                    mass_goal,
                    count,
                    mass,
                    sure.number,
                    sure.mass,
                    True,
                )
            else:
                none = tl.zeros_like(amount)
                found = search(
                    key,
                    lives,
                    none,
                    low,
                    high,
                    goal,
                    mass_goal,
                    count,
                    nothing,
                    sure.number,
                    nothing,
                    False,
                )
            if KIND_GOAL == DISTANCE_GOAL:
                kept = Kept(kept.edge, kept.cut, centre, found.key)
                top_key = _top(some, sure, kept, BANDED)
            else:
                kind_goal = tl.full([], KIND_GOAL, tl.int32)
                keep = ties_kept(found, goal, mass_goal, edge, kind_goal, LOWEST_TIES)
                if KIND_GOAL != NO_GOAL:
                    edge = found.key
                edge = tl.minimum(edge, found.key)
                if KIND_GOAL == COUNT_GOAL:
                    # As many NaN as that: nothing is below them.
                    edge = tl.where(found.key > KEY_OF_INFINITY, LOWEST, edge)
                if (KIND_GOAL == COUNT_GOAL) and not LOWEST_TIES:
                    # Of those that tie at the edge all stay.
                    kept = from_key(kept, edge)
                elif (KIND_GOAL != NO_GOAL) or SPARES_FEWEST[KIND]:
                    kept = _cut_ties(some, kept, edge, keep, found.number - found.above, V, BANDED)
            if KIND_GOAL != NO_GOAL:
                open_below = open_below & (found.key > KEY_OF_INFINITY)
        elif KIND_GOAL == DISTANCE_GOAL:
            # What is here is not enough; there may be more, of larger logits too.
            wrong = wrong | open_below
        elif KIND_GOAL == NO_GOAL:
            edge = tl.full([], LOWEST, tl.int32)
        # Else all of it stays, and what is below the bound: unless a later rule drops that, the row is left open.
    if KIND_GOAL == NO_GOAL:
        edge = tl.minimum(edge, top_key)
        open_below = open_below & (edge < bound)
        wrong = wrong | ((sure.number > 0) & (edge > sure.edge))
        kept = from_key(kept, edge)
    if KIND_GOAL == ENTROPY_GOAL:
        if open_below == 0:
            kept = _spend(some, sure, kept, top_key, top, value, V, BANDED)
    return kept, top_key, open_below, wrong


@triton.jit
def _apply_all(
    some, sure, rules_ptr, bound, complete, top_key, row_sums, V,
    KINDS: tl.constexpr, LEASTS: tl.constexpr, SUMS: tl.constexpr, BANDED: tl.constexpr, LOWEST_TIES: tl.constexpr,
):  # fmt: skip
    """Apply the rules: what is left, its largest key, and whether all that it takes was known.

    All tokens that aren't there are below ``bound``, or there are none where ``complete``. ``top_key`` is the largest
    key of the row, where its sums are known; else LOWEST.
    """
    kept = all_kept()
    summed = top_key > LOWEST
    if summed == 0:
        top_key = _top(some, sure, kept, BANDED)
    open_below = complete == 0  # whether tokens below the bound may be kept
    uncut = tl.full([], True, tl.int1)  # whether no rule may have dropped anything yet
    failed = tl.full([], False, tl.int1)
    for i in tl.static_range(len(KINDS)):
        value = tl.load((rules_ptr + RULE_WORDS * i + 2).to(tl.pointer_type(tl.float64)))
        active = value == value
        if GOAL[KINDS[i]] == ENTROPY_GOAL:
            failed = failed | (active & (uncut == 0) & open_below)
        elif NEEDS_SUMS[KINDS[i]] > 0:
            failed = failed | (active & ((uncut & summed) == 0) & open_below)
        active = active & can_act(top_key, NEEDS_SUMS[KINDS[i]], GOAL[KINDS[i]])
        if active & (failed == 0):
            kept, top_key, open_below, wrong = _apply(
                some, sure, kept, top_key, open_below, uncut & summed, value, bound, row_sums, V,
                KINDS[i], LEASTS[i], SUMS, BANDED, LOWEST_TIES,
            )  # fmt: skip
            failed = failed | wrong
            if GOAL[KINDS[i]] == ENTROPY_GOAL:
                failed = failed | open_below
        # The row's sums are those that its first rule asks for, whether that can act or not.
        uncut = uncut & (value != value)
    return kept, top_key, (failed == 0) & (open_below == 0)


@triton.jit
def fitted(x, top, out_ptr):
    """Logits that the dtype of the result holds: float16 ones are scaled where the largest would overflow."""
    if out_ptr.dtype.element_ty == tl.float16:
        most = tl.maximum(tl.abs(top), 65504.0)
        x = tl.where(most < float("inf"), x * (65504.0 / most), x)
    return x


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def refine_kernel(
    # inputs
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    work_ptr,
    # outputs
    out_ptr, tokens_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share,
    # strides
    stride_out, stride_out_token, stride_work,
    # constants
    KINDS: tl.constexpr, LEASTS: tl.constexpr, SUMS: tl.constexpr, NORMALISE: tl.constexpr, BANDED: tl.constexpr,
    LOWEST_TIES: tl.constexpr, SLOTS: tl.constexpr, MORE_THAN: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What the rules leave of a row's candidates, or a token of it; a row that is left open is for the next launch.

    Rows with more candidates than the slots, here or where they were collected, or not ``MORE_THAN`` those of a launch
    before, are left to others.
    """
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    samples = Samples(seeds_ptr, positions_ptr, stride_seed, stride_position)
    shape = Shape(
        W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, Sample(runs, sample_size, share)
    )  # fmt: skip
    let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    greedy = tl.full([], False, tl.int1)
    seed, position = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if tokens_ptr is not None:
        seed, position = load_seed(row, samples)
        if maps.temperature_ptr is not None:
            greedy = is_greedy(maps.temperature_ptr + row * maps.stride_temperature)
    wait_for_launch(PDL)
    state = tl.load(work + STATE_AT)
    found = tl.load(work + COUNT_AT)
    listed = (state == FEW) | (state == BRACKET)
    free = state == FREE
    if tokens_ptr is not None:
        # Of a row that is drawn from as it is, the candidates are those that may be drawn.
        listed = listed | free
    elif free & (MORE_THAN < 0):
        store_kept(work, all_kept())
        tl.store(work + DONE_AT, 1)
    if listed & (found <= tl.minimum(shape.slots, SLOTS)) & (found > MORE_THAN):
        banded = tl.load(work + BANDED_AT) != 0
        least = number_of(tl.load(work + BOUND_AT))
        centre = load_float(work + CENTRE_AT)
        x, valid, token = load_candidates((work + shape.pairs_at).to(tl.pointer_type(tl.int64)), found, SLOTS)
        # They were collected as they were before the division.
        raw = x
        x = scaled(x, row, maps)
        sure = load_sure(work, shape, state, PARTS)
        beside = valid & is_sure(raw, work)
        valid = valid & is_near(x, least, banded, centre, BANDED) & (beside == 0)
        some = Candidates(x, valid, token, rank_of(token, LOWEST_TIES))
        top_key = tl.load(work + TOP_KEY_AT)
        row_sums = load_row_sums(work + ROW_SUMS_AT, top_key > LOWEST)
        kept = all_kept()
        settled = greedy | free
        if settled == 0:
            # A bound of distances says nothing of keys.
            bound = tl.where(banded, KEY_OF_MINUS_INFINITY, tl.load(work + BOUND_AT))
            kept, top_key, settled = _apply_all(
                some, sure, work + RULES_AT, bound, (found >= V) & (least == float("-inf")), top_key, row_sums, V,
                KINDS, LEASTS, SUMS, BANDED, LOWEST_TIES,
            )  # fmt: skip
            # NaN is no candidate beside tokens that were kept for certain.
            largest = tl.max(tl.where(valid, key_of(x), LOWEST))
            settled = settled & ((sure.number == 0) | (largest <= KEY_OF_INFINITY))
        if settled:
            store_kept(work, kept)
            tl.store(work + DONE_AT, 1)
            lives = _lives(some, kept, BANDED)
            if out_ptr is not None:
                top = number_of(top_key)
                if NORMALISE:
                    top_key = _top(some, sure, kept, BANDED)
                    top = number_of(top_key)
                    _number, mass = unpacked(tl.sum(weighed(lives, weight_of(x, top))))
                    x = x - log_mass_of(top_key, mass)
                elif maps.temperature_ptr is not None:
                    x = fitted(x, top, out_ptr)
                here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
                tl.store(here, x.to(out_ptr.dtype.element_ty), mask=lives)
            if tokens_ptr is not None:
                _best, which = best_of(x, lives | beside, token, seed, position, greedy)
                store_token(tokens_ptr + row, which)
