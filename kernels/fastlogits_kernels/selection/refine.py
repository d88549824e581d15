"""Apply the rules to the candidates of a row, in registers; rows whose candidates don't suffice are left open.

Compiled for each set of rules and for no chain: candidates were collected folded.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.collect import load_candidates
from fastlogits_kernels.selection.goals import (
    LEAST_TERM,
    Goal,
    Interval,
    below_of,
    can_act,
    centre_of,
    cut_below,
    cutoff_found,
    cutoff_key_of,
    deviation_of,
    finish_cutoff,
    fitted,
    from_key,
    goal_of,
    is_reached,
    load_certain,
    log_mass_of,
    search,
    stats_of,
    surprises_kept,
    term_of,
    ties_kept,
    totals_of,
    unpacked,
    weighed,
    with_ties,
)
from fastlogits_kernels.selection.noise import best_of, load_request, store_token
from fastlogits_kernels.selection.row import (
    BANDED_AT,
    BOUND_AT,
    BRACKET,
    CENTRE_AT,
    COLLECTED,
    COUNT_AT,
    COUNT_GOAL,
    DISTANCE_GOAL,
    DONE_AT,
    ENTROPY_GOAL,
    GOAL,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MASS_GOAL,
    NEEDS_SUMS,
    NO_GOAL,
    ONE,
    ROW_SUMS_AT,
    RULE_VALUE_AT,
    RULE_WORDS,
    RULES_AT,
    SPARES_FEWEST,
    STATE_AT,
    STEPWISE,
    TOP_KEY_AT,
    UNALIGNED,
    UNCUT,
    Certain,
    Kept,
    Maps,
    Output,
    RowSums,
    Sampling,
    Shape,
    all_kept,
    cutoff,
    is_candidate,
    is_certain,
    is_kept,
    key_of,
    let_next_launch,
    load_float,
    number_of,
    rank_of,
    scaled,
    store_kept,
    wait_for_launch,
    weight_of,
)
from fastlogits_kernels.selection.row_sums import load_row_sums


class Candidates(NamedTuple):
    """The candidates of a row: scaled logits, whether they are there, tokens and ranks; what is known of the others.

    ``beside`` are tokens that were collected only because they may be sampled: they are kept for certain. Tokens that
    are neither here nor ``certain`` are below ``bound``.
    """

    x: tl.tensor
    valid: tl.tensor
    beside: tl.tensor
    token: tl.tensor
    rank: tl.tensor
    certain: Certain
    bound: tl.tensor
    sums: RowSums
    V: tl.tensor
    many: tl.tensor
    """For how many tokens that tie each of them stands, where they are ``TIED``."""


class Progress(NamedTuple):
    """How far the rules are applied: what is kept, its largest key, and whether tokens below the bound may be kept.

    ``cut`` says how many of the tokens at the cut-off stay, where candidates stand for several: HIGHEST for all.
    """

    kept: Kept
    top_key: tl.tensor
    open_below: tl.tensor
    cut: tl.tensor


@triton.jit
def stays_of(some, kept, BANDED: tl.constexpr):
    """Which candidates are kept."""
    return is_kept(some.x, some.valid, some.rank, kept, BANDED)


@triton.jit
def top_of(some, kept, BANDED: tl.constexpr):
    """The largest key that is kept, or below all."""
    top = tl.max(tl.where(stays_of(some, kept, BANDED), key_of(some.x), LOWEST))
    return tl.maximum(top, some.certain.largest)


@triton.jit
def _cut_ties(some, kept, key, keep, tied, BANDED: tl.constexpr, TIED: tl.constexpr):
    """``kept`` without what is below a key, and with only ``keep`` of the ``tied`` tokens at it."""
    nothing = tl.full([], 0, tl.int64)
    none = tl.full([], 0, tl.int32)
    V = (none + some.V).to(tl.int64)  # a constant, and no tensor, where it is 1
    at_key = stays_of(some, kept, BANDED) & (key_of(some.x) == key)
    # Where all stay there is nothing to search; a branch around it is what Triton 3.6 can't compile.
    some_go = keep < tied
    found = search(
        some.rank, at_key, tl.zeros_like(some.rank).to(tl.int64), some.many,
        Interval(-V, V + 1, tl.where(some_go, tied, 0), nothing, none, nothing),
        Goal(tl.where(some_go, keep, 0), nothing), False, TIED,
    )  # fmt: skip
    return with_ties(kept, key, tl.where(some_go, found.key, LOWEST))


@triton.jit
def _spend(some, at, value, BANDED: tl.constexpr):
    """Of what is kept, the most likely tokens that make up a share of the entropy."""
    nothing, none = tl.full([], 0, tl.int64), tl.full([], 0, tl.int32)
    top = number_of(at.top_key)
    kept = cut_below(at.kept, top)
    stays = stays_of(some, kept, BANDED)
    count, mass = totals_of(stays, weight_of(some.x, top), some.many, False)
    relative = (mass.to(tl.float64) / ONE).to(tl.float32)
    term = tl.where(stays, term_of(some.x, top, relative), 0.0)
    largest = tl.maximum(tl.max(term), LEAST_TERM)
    surprise = (term / largest * ONE).to(tl.int64)
    total = tl.sum(surprise)
    budget = (value * total.to(tl.float64)).to(tl.int64)
    if total > budget:
        # The first token that goes beyond the budget.
        low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int64)
        found = search(
            key_of(some.x), stays, surprise, some.many,
            Interval(low, at.top_key.to(tl.int64) + 1, count, total, none, nothing),
            Goal(none + 1, budget + 1), True, False,
        )  # fmt: skip
        tied = found.number - found.above
        keep = surprises_kept(found, budget)
        kept = _cut_ties(some, kept, found.key, tl.maximum(keep, 0), tied, BANDED, False)
        if keep <= 0:
            kept = Kept(found.key + 1, tl.full([], LOWEST, tl.int32), kept.centre, kept.farthest)
    return kept


@triton.jit
def _deviation(some, stays, top, summed, TIED: tl.constexpr):
    """The deviation of what is kept, float32."""
    finite = stays & (tl.abs(some.x) < float("inf"))
    off = tl.where(finite, some.x - centre_of(top), 0.0).to(tl.float64)
    number, first, second = finite.to(tl.float64), off, off * off
    if TIED:
        number, first, second = number * some.many, first * some.many, second * some.many
    return deviation_of(tl.sum(number), tl.sum(first), tl.sum(second), summed, some.sums)


@triton.jit
def _search_goal(
    some, stays, amount, goal, count, mass, top_key, centre, KIND_GOAL: tl.constexpr, TIED: tl.constexpr
):  # fmt: skip
    """The key at or above which a rule's goal is reached: of logits, or of distances from a centre."""
    certain = some.certain
    if KIND_GOAL == DISTANCE_GOAL:
        key = key_of(-tl.abs(some.x - centre))
        low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
        high = tl.where(certain.number > 0, certain.least - 1, 0)
    else:
        key = key_of(some.x)
        low = tl.maximum(tl.full([], KEY_OF_MINUS_INFINITY, tl.int32), some.bound)
        high = tl.where(certain.number > 0, certain.least - 1, top_key)
    low, high = low.to(tl.int64), high.to(tl.int64) + 1
    if (KIND_GOAL == MASS_GOAL) or (KIND_GOAL == DISTANCE_GOAL):
        interval = Interval(low, high, count, mass, certain.number, certain.mass)
        found = search(key, stays, amount, some.many, interval, goal, True, TIED)
    else:
        nothing = tl.full([], 0, tl.int64)
        interval = Interval(low, high, count, nothing, certain.number, nothing)
        found = search(key, stays, tl.zeros_like(amount), some.many, interval, goal, False, TIED)
    return found


@triton.jit
def apply_rule(
    some, at, value, summed,
    KIND: tl.constexpr, LEAST: tl.constexpr, SUMS: tl.constexpr, BANDED: tl.constexpr, LOWEST_TIES: tl.constexpr,
    TIED: tl.constexpr,
):  # fmt: skip
    """Apply a rule; whether its result is wrong, since it depends on tokens that aren't here.

    Tokens that are kept for certain may not be, or there are not enough tokens here.
    """
    KIND_GOAL: tl.constexpr = GOAL[KIND]
    NEEDS: tl.constexpr = NEEDS_SUMS[KIND]
    WEIGHS: tl.constexpr = (NEEDS == 1) or (NEEDS == 2)
    kind_goal = tl.full([], KIND_GOAL, tl.int32)
    kept, top_key, open_below, cut = at
    top = number_of(top_key)
    stays = stays_of(some, kept, BANDED)
    amount = weight_of(some.x, top) if WEIGHS else tl.zeros_like(some.rank).to(tl.int64)
    count, mass = totals_of(stays, amount, some.many, TIED)
    count += some.certain.number
    mass += some.certain.mass if WEIGHS else 0
    below = tl.full([], 0, tl.int64)
    if NEEDS == 2:
        distances = below_of(some.x, top, stays)
        below = tl.sum(distances * some.many if TIED else distances)
    if SUMS < NEEDS:
        # The first rule that needs sums finds those that it needs, or none.
        summed = tl.full([], False, tl.int1)
    stats = stats_of(mass, below, summed, some.sums)
    cutoff_key = tl.full([], LOWEST, tl.int32)
    if KIND_GOAL == NO_GOAL:
        deviation = _deviation(some, stays, top, summed, TIED) if NEEDS >= 3 else top
        cutoff_key = cutoff_key_of(
            cutoff(value, top, stats.mass, tl.log(stats.mass) + stats.distance, deviation, KIND)
        )  # fmt: skip
    goal = goal_of(value, stats.all_mass, tl.full([], LEAST, tl.int32), kind_goal)
    reached, wrong = is_reached(goal, count, mass, some.certain, kind_goal)
    if (KIND_GOAL != NO_GOAL) or (LEAST > 1):
        if reached:
            centre = top - stats.distance
            found = _search_goal(some, stays, amount, goal, count, mass, top_key, centre, KIND_GOAL, TIED)
            if KIND_GOAL == DISTANCE_GOAL:
                kept = Kept(kept.cutoff, kept.rank, centre, found.key)
                top_key = top_of(some, kept, BANDED)
            else:
                keep = ties_kept(found, goal, cutoff_key, kind_goal, LOWEST_TIES)
                cutoff_key = cutoff_found(found, cutoff_key, kind_goal)
                if (KIND_GOAL == COUNT_GOAL) and not LOWEST_TIES:
                    # All that tie with the last one stay.
                    cut = tl.where(cutoff_key > kept.cutoff, HIGHEST, cut)
                    kept = from_key(kept, cutoff_key)
                elif (KIND_GOAL != NO_GOAL) or SPARES_FEWEST[KIND]:
                    fewer = tl.where(cutoff_key == kept.cutoff, tl.minimum(cut, keep), cut)
                    cut = tl.where(cutoff_key > kept.cutoff, keep, fewer)
                    kept = _cut_ties(some, kept, cutoff_key, keep, found.number - found.above, BANDED, TIED)
            if KIND_GOAL != NO_GOAL:
                open_below = open_below & (found.key > KEY_OF_INFINITY)
        elif KIND_GOAL == DISTANCE_GOAL:
            # What is here is not enough; there may be more, of larger logits too.
            wrong = wrong | open_below
        elif KIND_GOAL == NO_GOAL:
            cutoff_key = tl.full([], LOWEST, tl.int32)
        # Else all of it stays, and what is below the bound: unless a later rule drops that, the row is left open.
    if KIND_GOAL == NO_GOAL:
        cutoff_key, open_below, exceeds = finish_cutoff(cutoff_key, top_key, open_below, some.bound, some.certain)
        wrong = wrong | exceeds
        cut = tl.where(cutoff_key > kept.cutoff, HIGHEST, cut)
        kept = from_key(kept, cutoff_key)
    if KIND_GOAL == ENTROPY_GOAL:
        if open_below == 0:
            kept = _spend(some, Progress(kept, top_key, open_below, at.cut), value, BANDED)
    return Progress(kept, top_key, open_below, cut), wrong


@triton.jit
def _apply_all(
    some, rules_ptr, complete, top_key,
    KINDS: tl.constexpr, LEASTS: tl.constexpr, SUMS: tl.constexpr, BANDED: tl.constexpr, LOWEST_TIES: tl.constexpr,
):  # fmt: skip
    """Apply the rules: what is kept, its largest key, and whether all tokens that this depends on were known.

    There are no other tokens where the candidates are ``complete``. ``top_key`` is the largest key of the row where its
    sums are known, else LOWEST.
    """
    kept = all_kept()
    summed = top_key > LOWEST
    if summed == 0:
        top_key = top_of(some, kept, BANDED)
    at = Progress(kept, top_key, complete == 0, tl.full([], HIGHEST, tl.int32))
    uncut = tl.full([], True, tl.int1)  # whether no rule may have dropped anything yet
    failed = tl.full([], False, tl.int1)
    for i in tl.static_range(len(KINDS)):
        value = tl.load((rules_ptr + RULE_WORDS * i + RULE_VALUE_AT).to(tl.pointer_type(tl.float64)))
        active = value == value
        if GOAL[KINDS[i]] == ENTROPY_GOAL:
            failed = failed | (active & (uncut == 0) & at.open_below)
        elif NEEDS_SUMS[KINDS[i]] > 0:
            failed = failed | (active & ((uncut & summed) == 0) & at.open_below)
        active = active & can_act(at.top_key, NEEDS_SUMS[KINDS[i]], GOAL[KINDS[i]])
        if active & (failed == 0):
            at, wrong = apply_rule(
                some, at, value, uncut & summed, KINDS[i], LEASTS[i], SUMS, BANDED, LOWEST_TIES, False
            )  # fmt: skip
            failed = failed | wrong
            if GOAL[KINDS[i]] == ENTROPY_GOAL:
                failed = failed | at.open_below
        # The row's sums are those that its first rule asks for, whether that can act or not.
        uncut = uncut & (value != value)
    return at.kept, at.top_key, (failed == 0) & (at.open_below == 0)


@triton.jit
def _load_candidates(
    row, found, state, maps, work, shape, V,
    BANDED: tl.constexpr, LOWEST_TIES: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The candidates of a row; they were collected raw, a few too many."""
    raw, valid, token = load_candidates((work + shape.pairs_at).to(tl.pointer_type(tl.int64)), found, SLOTS)
    x = scaled(raw, row, maps)
    banded = tl.load(work + BANDED_AT) != 0
    least = number_of(tl.load(work + BOUND_AT))
    beside = valid & is_certain(raw, work)
    valid = valid & is_candidate(x, least, banded, load_float(work + CENTRE_AT), BANDED) & (beside == 0)
    # A bound of distances says nothing of keys.
    bound = tl.where(banded, KEY_OF_MINUS_INFINITY, tl.load(work + BOUND_AT))
    return Candidates(
        x, valid, beside, token, rank_of(token, LOWEST_TIES), load_certain(work, shape, state, PARTS), bound,
        load_row_sums(work + ROW_SUMS_AT, tl.load(work + TOP_KEY_AT) > LOWEST), V, token,
    )  # fmt: skip


@triton.jit
def _write(row, some, kept, top_key, request, maps, out, NORMALISE: tl.constexpr, BANDED: tl.constexpr):
    """Write what is kept of a row, or sample a token of it; ``request`` is seed, position, and whether it is greedy."""
    stays = stays_of(some, kept, BANDED)
    if out.ptr is not None:
        x = some.x
        if NORMALISE:
            top_key = top_of(some, kept, BANDED)
            _number, mass = unpacked(tl.sum(weighed(stays, weight_of(x, number_of(top_key)))))
            x = x - log_mass_of(top_key, mass)
        elif maps.temperature_ptr is not None:
            x = fitted(x, number_of(top_key), out.ptr)
        here = out.ptr + row * out.stride_row + some.token.to(tl.int64) * out.stride_token
        tl.store(here, x.to(out.ptr.dtype.element_ty), mask=stays)
    if out.tokens_ptr is not None:
        _best, token = best_of(some.x, stays | some.beside, some.token, request)
        store_token(out.tokens_ptr + row, token)


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
    """What the rules keep of a row's candidates, or a token of it; a row that is left open is for the next launch.

    Rows with more candidates than the slots, here or where they were collected, or not ``MORE_THAN`` those of a launch
    before, are left to others.
    """
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    shape = Shape(W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share)
    out = Output(out_ptr, stride_out, stride_out_token, tokens_ptr, None)
    let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    request = load_request(row, Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position), maps)
    wait_for_launch(PDL)
    state = tl.load(work + STATE_AT)
    found = tl.load(work + COUNT_AT)
    listed = (state == COLLECTED) | (state == BRACKET)
    uncut = state == UNCUT
    if tokens_ptr is not None:
        # Of a row that no rule cuts, the candidates are the tokens that may win.
        listed = listed | uncut
    elif uncut & (MORE_THAN < 0):
        store_kept(work, all_kept())
        tl.store(work + DONE_AT, 1)
    if listed & (found <= tl.minimum(slots, SLOTS)) & (found > MORE_THAN):
        some = _load_candidates(row, found, state, maps, work, shape, V, BANDED, LOWEST_TIES, SLOTS, PARTS)
        top_key = tl.load(work + TOP_KEY_AT)
        kept = all_kept()
        done = request.greedy | uncut
        if done == 0:
            complete = (found >= V) & (tl.load(work + BOUND_AT) == KEY_OF_MINUS_INFINITY)
            kept, top_key, done = _apply_all(
                some, work + RULES_AT, complete, top_key, KINDS, LEASTS, SUMS, BANDED, LOWEST_TIES
            )  # fmt: skip
            # NaN is no candidate beside tokens that were kept for certain.
            largest = tl.max(tl.where(some.valid, key_of(some.x), LOWEST))
            done = done & ((some.certain.number == 0) | (largest <= KEY_OF_INFINITY))
        if done:
            store_kept(work, kept)
            tl.store(work + DONE_AT, 1)
            _write(row, some, kept, top_key, request, maps, out, NORMALISE, BANDED)
