"""Apply the rules to rows with too many candidates, or too few: block by block, with the rules known at run time.

A program passes over a row again and again. A pass looks at all tokens of the row, or at the list of its candidates. It
counts and weighs what is kept at or above three keys, and finds the least and the largest key. Once a search has few
tokens left, a pass collects them, and the search ends among them in registers. Between the passes a few numbers decide
what the next one measures, so the code of a pass doesn't depend on the rules: it is compiled once for a chain and a
dtype. A program goes on to its next row as soon as one is done.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.collect import Collection, load_candidates
from fastlogits_kernels.selection.goals import (
    LEAST_TERM,
    Found,
    Goal,
    Interval,
    can_act,
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
    ties_kept,
    with_ties,
)
from fastlogits_kernels.selection.noise import load_request, perturbed_key, store_token
from fastlogits_kernels.selection.passes import (
    BELOW,
    BY_DISTANCE,
    BY_LOGIT,
    BY_RANK,
    BY_TERM,
    LIST,
    MASS,
    NOTHING,
    ROW,
    SQUARES,
    SURPRISE,
    Config,
    Measure,
    Pass,
    Range,
    Row,
    Source,
    is_candidate_of,
    is_certain_of,
    load_block,
    measured,
    pass_over,
)
from fastlogits_kernels.selection.row import (
    BANDED_AT,
    BOUND_AT,
    BRACKET,
    CENTRE_AT,
    CERTAIN_AT,
    COUNT_AT,
    DISTANCE_GOAL,
    DONE_AT,
    ENTROPY_GOAL,
    FULL_ROW,
    GOAL,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MASS_GOAL,
    N_RULES,
    NEEDS_SUMS,
    NO_GOAL,
    ONE,
    RAW_CERTAIN_AT,
    ROW_SUMS_AT,
    RULE_KIND_AT,
    RULE_LEAST_AT,
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
    Form,
    Kept,
    Maps,
    Output,
    Sampling,
    Scores,
    Shape,
    all_kept,
    cutoff,
    is_kept,
    key_of,
    load_float,
    number_of,
    rank_of,
    scaled,
    store_kept,
    wait_for_launch,
)
from fastlogits_kernels.selection.row_sums import load_row_sums

# What a pass is for.
_FIND_TOP, _WEIGH, _WEIGH_BELOW, _ADD_SQUARES, _SEARCH, _COLLECT, _BISECT, _FOUND, _FIND_TERM, _ADD_TERMS, _DONE = (
    tl.constexpr(i) for i in range(11)
)
# What a search is for.
_OF_RULE, _OF_TIES, _OF_SHARE, _OF_SHARED_TIES = (tl.constexpr(i) for i in range(4))


class Rule(NamedTuple):
    """A rule: its code, how many tokens it keeps at least, its parameter, and what the table says of it."""

    kind: tl.tensor
    least: tl.tensor
    value: tl.tensor
    goal: tl.tensor
    needs: tl.tensor


class Totals(NamedTuple):
    """What passes have added up of what is kept: its number, its mass, and its mass times distance from the top."""

    count: tl.tensor
    mass: tl.tensor
    below: tl.tensor


class Search(NamedTuple):
    """A search: what it is for, among which keys, for which goal, and what is ``beyond`` the tokens of its passes."""

    task: tl.tensor
    interval: Interval
    goal: Goal
    beyond: Goal
    turns: tl.tensor  # how many passes it has made
    collected: tl.tensor  # how many tokens it has collected, -1 where it has not


class State(NamedTuple):
    """Where a row stands between two passes."""

    phase: tl.tensor  # what the next pass is for
    index: tl.tensor  # of the rule that is applied; behind the last one the sums of what is kept
    rule: Rule
    kept: Kept
    top_key: tl.tensor  # the largest key that is kept
    totals: Totals
    measure: Measure
    search: Search
    cutoff_key: tl.tensor
    budget: tl.tensor  # of entropy
    open_below: tl.tensor  # whether tokens below the bound may be kept
    uncut: tl.tensor  # whether no rule may have dropped anything yet
    failed: tl.tensor


class Next(NamedTuple):
    """What follows from a pass."""

    has_sums: tl.tensor  # the sums that a rule needs are there
    starts_ties: tl.tensor  # of the tokens that tie some are to go
    finishes: tl.tensor  # the cut-off of a rule is known
    begins: tl.tensor  # the next rule is due
    stale: tl.tensor  # and the largest logit has to be found again


class Base(NamedTuple):
    """What a row is processed from: a source, the tokens kept for certain beside it, and a bound of all others."""

    source: Source
    certain: Certain
    bound: tl.tensor


# -- Searches -------------------------------------------------------------------------------------------------------


@triton.jit
def _pivots(interval, goal, row, told, turns, order):
    """The three keys that the next pass of a search looks at.

    First those that the sample made likely, or the range of the numbers quartered, twice; then those around where the
    goal lies if amounts grow evenly between the bounds. Every fourth time the keys are quartered, which comes to an end
    whatever they are.
    """
    low, high = interval.low, interval.high
    turn = turns % 4
    highest = number_of((high - 1).to(tl.int32))
    span = tl.where(order == BY_DISTANCE, 16.0, 128.0)
    lowest = tl.maximum(number_of(low.to(tl.int32)), highest - span)
    apart = highest - lowest
    weighs = goal.amount > 0
    above = tl.where(
        weighs, (interval.amount - goal.amount).to(tl.float32), (interval.number - goal.number).to(tl.float32)
    )
    whole = tl.where(
        weighs,
        (interval.amount - interval.amount_above).to(tl.float32),
        (interval.number - interval.above).to(tl.float32),
    )
    even = tl.where(whole > 0, above / whole, 0.5)
    even = tl.minimum(tl.maximum(even, 0.1), 0.9)
    middle = tl.where(turn < 2, 0.5, even) * apart
    step = tl.where(turn < 2, 0.25, 0.083) * apart
    by_number = (order != BY_RANK) & (turn != 3) & (apart > 0) & (apart < float("inf"))
    first = tl.where(by_number, key_of(lowest + (middle - step)).to(tl.int64), low + (high - low) // 4)
    second = tl.where(by_number, key_of(lowest + middle).to(tl.int64), low + (high - low) // 2)
    third = tl.where(by_number, key_of(lowest + (middle + step)).to(tl.int64), low + (high - low) * 3 // 4)
    first = tl.where(told, row.likely_low, first)
    second = tl.where(told, (row.likely_low + row.likely_high) // 2, second)
    third = tl.where(told, row.likely_high, third)
    return first, second, third


@triton.jit
def _moved(pivot, number, amount, goal, interval):
    """An interval of which one end becomes ``pivot``: at or above it are so many tokens of such an amount."""
    pivot = pivot.to(tl.int64)
    inside = (pivot > interval.low) & (pivot < interval.high)
    reached = inside & (number >= goal.number) & (amount >= goal.amount)
    missed = inside & (reached == 0)
    return Interval(
        tl.where(reached, pivot, interval.low), tl.where(missed, pivot, interval.high),
        tl.where(reached, number, interval.number), tl.where(reached, amount, interval.amount),
        tl.where(missed, number, interval.above), tl.where(missed, amount, interval.amount_above),
    )  # fmt: skip


@triton.jit
def _narrowed(tally, what, of):
    """The interval of a search after a pass."""
    interval, goal, beyond = of.interval, of.goal, of.beyond
    interval = _moved(what.first, tally.number_1 + beyond.number, tally.amount_1 + beyond.amount, goal, interval)
    interval = _moved(what.second, tally.number_2 + beyond.number, tally.amount_2 + beyond.amount, goal, interval)
    interval = _moved(what.third, tally.number_3 + beyond.number, tally.amount_3 + beyond.amount, goal, interval)
    # Only where keys are is there anything to find.
    return Interval(
        tl.maximum(interval.low, tally.least.to(tl.int64)), tl.minimum(interval.high, tally.most.to(tl.int64) + 1),
        interval.number, interval.amount, interval.above, interval.amount_above,
    )  # fmt: skip


@triton.jit
def _next_of_search(interval, held, room):
    """What a search does next: pass again, collect what is left, or end: in registers where all of it is ``held``."""
    left = interval.number - interval.above
    phase = tl.where(held, _BISECT, tl.where(left <= room, _COLLECT, _SEARCH))
    return tl.where(interval.high - interval.low <= 1, _FOUND, phase)


@triton.jit
def _end_of_search(state, source, row, config):
    """What a search has found; where few tokens are left of it, it ends among them in registers."""
    phase, interval, collected = state.phase, state.search.interval, state.search.collected
    found = Found(interval.low.to(tl.int32), interval.number, interval.amount, interval.above, interval.amount_above)
    # A loop of one turn or none: Triton 3.6 can't compile one in a branch.
    for _ in range(tl.where((phase == _COLLECT) | (phase == _BISECT), 1, 0)):
        of_list = collected < 0
        collected_pairs = row.collection.pairs.to(tl.pointer_type(tl.int64))
        x, valid, token = load_candidates(
            tl.where(of_list, source.pairs, collected_pairs), tl.where(of_list, source.size, collected), config.ROOM
        )
        if of_list:
            raw = x
            x = scaled(raw, row.index, row.scores.maps)
            valid = valid & is_candidate_of(x, raw, row.range)
        key, counts, amount = measured(x, valid, rank_of(token, config.LOWEST_TIES), state.kept, state.measure)
        counts = counts & (key >= interval.low.to(tl.int32)) & (key.to(tl.int64) < interval.high)
        found = search(key, counts, amount, counts, interval, state.search.goal, True, False)
    return found


# -- Rules ----------------------------------------------------------------------------------------------------------


@triton.jit
def _of_kind(kind, TABLE: tl.constexpr):
    """What a table of rules says of a rule."""
    found = tl.full([], 0, tl.int32)
    for i in tl.static_range(N_RULES):
        found = tl.where(kind == i, TABLE[i], found)
    return found


@triton.jit
def _cutoff_of(rule, top, stats, deviation):
    """The logit below which a rule drops all, NaN for one that has a goal."""
    found = tl.full([], float("nan"), tl.float32)
    for i in tl.static_range(N_RULES):
        if GOAL[i] == NO_GOAL:
            if rule.kind == i:
                found = cutoff(rule.value, top, stats.mass, tl.log(stats.mass) + stats.distance, deviation, i)
    return found


@triton.jit
def _load_rule(index, row):
    """A rule of a row; one that is never there, and keeps all, behind the last."""
    here = row.work + RULES_AT + RULE_WORDS * tl.minimum(index, tl.maximum(row.n_rules - 1, 0))
    there = index < row.n_rules
    kind = tl.load(here + RULE_KIND_AT, mask=there, other=-1)
    least = tl.load(here + RULE_LEAST_AT, mask=there, other=1)
    value = tl.load((here + RULE_VALUE_AT).to(tl.pointer_type(tl.float64)), mask=there, other=float("nan"))
    return Rule(kind, least, value, _of_kind(kind, GOAL), _of_kind(kind, NEEDS_SUMS))


@triton.jit
def _begin(index, uncut, stale, top_key, open_below, failed, row, config):
    """The next rule that drops anything, its first pass, whether a question is left open, and what that pass adds up.

    The largest logit is looked for first where it is ``stale``. Last, whether that rule is the first of all: the row's
    sums are those that the first one asks for, whether that can act or not.
    """
    for _ in range(row.n_rules):
        rule = _load_rule(index, row)
        absent = rule.value != rule.value
        idle = (index < row.n_rules) & (absent | (can_act(top_key, rule.needs, rule.goal) == 0))
        uncut = uncut & ((idle == 0) | absent)
        index += idle.to(tl.int32)
    rule = _load_rule(index, row)
    summed = uncut & (row.top_key > LOWEST)
    blind = tl.where(rule.goal == ENTROPY_GOAL, uncut == 0, (rule.needs > 0) & (summed == 0))
    ends = index >= row.n_rules
    failed = failed | (open_below & (ends | blind))
    phase = tl.where(ends, _DONE, tl.where(stale, _FIND_TOP, _WEIGH))
    if config.NORMALISE:
        phase = tl.where(ends, _FIND_TOP, phase)
        index = tl.where(ends, row.n_rules + 1, index)
    counts = ends | stale | (rule.needs == 0) | (rule.needs >= 3)
    return index, rule, phase, failed, tl.where(counts, NOTHING, MASS), uncut


@triton.jit
def _of_mass(rule):
    """Whether a rule's goal is a mass."""
    return (rule.goal == MASS_GOAL) | (rule.goal == DISTANCE_GOAL)


@triton.jit
def _of_amount(amount, top_key):
    """The measure of a pass that adds up an amount, in the order of the logits."""
    none, zero = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    return Measure(none, none + amount, none, zero, number_of(top_key), zero + 1, zero + 1)


@triton.jit
def _next_pass(state, source, row):
    """What the next pass does."""
    rule, measure, interval = state.rule, state.measure, state.search.interval
    searches = state.phase == _SEARCH
    collects = state.phase == _COLLECT
    of_order = tl.where(row.range.banded, BY_DISTANCE, BY_LOGIT)
    told = (source.kind == ROW) & (state.search.turns == 0) & (measure.order == of_order)
    told = told & (row.likely_high < HIGHEST) & (row.range.least > float("-inf"))
    first, second, third = _pivots(interval, state.search.goal, row, told, state.search.turns, measure.order)
    lowest = tl.full([], LOWEST, tl.int64)
    bounded = searches | collects
    low = tl.where(bounded, interval.low, lowest)
    high = tl.where(bounded, (interval.high - 1).to(tl.int32), HIGHEST)
    # What a whole row weighs may be known from its sums.
    weighs = (state.phase == _WEIGH) & (state.index < row.n_rules)
    knows_mass = weighs & (source.kind == ROW) & state.uncut & (row.top_key > LOWEST) & _of_mass(rule)
    # The same of a cut-off that asks for the largest logit alone, where a pass has found that.
    knows_all = weighs & (rule.goal == NO_GOAL) & (rule.least == 1) & (row.top_key == LOWEST) & (rule.needs == 0)
    skips = knows_mass | knows_all | (state.phase == _BISECT) | (state.phase == _FOUND)
    simple = (collects == 0) & ((measure.order == BY_LOGIT) | (measure.order == BY_DISTANCE))
    simple = simple & ((measure.amount == NOTHING) | (measure.amount == MASS))
    return Pass(
        tl.where(searches, first, lowest).to(tl.int32), tl.where(searches, second, lowest).to(tl.int32),
        tl.where(searches, third, lowest).to(tl.int32),
        low.to(tl.int32), high, tl.where(skips, 0, source.size),
        simple, searches, collects, (collects == 0) & (skips == 0), knows_mass,
    )  # fmt: skip


# -- What follows from a pass ---------------------------------------------------------------------------------------


@triton.jit
def _measuring(state, phase, measure):
    """A state whose next pass is for another phase, and measures something else."""
    return State(
        phase, state.index, state.rule, state.kept, state.top_key, state.totals, measure, state.search,
        state.cutoff_key, state.budget, state.open_below, state.uncut, state.failed,
    )  # fmt: skip


@triton.jit
def _searching(state, phase, of):
    """A state whose next pass is for another phase, of another search."""
    return State(
        phase, state.index, state.rule, state.kept, state.top_key, state.totals, state.measure, of,
        state.cutoff_key, state.budget, state.open_below, state.uncut, state.failed,
    )  # fmt: skip


@triton.jit
def _with_collected(state, number):
    """A state whose search has collected so many tokens."""
    of = state.search
    return _searching(state, state.phase, Search(of.task, of.interval, of.goal, of.beyond, of.turns, number))


@triton.jit
def _with_number(of, number):
    """A search for so many tokens, whatever their amount."""
    goal = Goal(number, tl.full([], 0, tl.int64))
    return Search(of.task, of.interval, goal, of.beyond, of.turns, of.collected)


@triton.jit
def _is_short(source, config):
    """Whether all tokens that a search is about fit into registers."""
    return (source.kind == LIST) & (source.size <= config.ROOM)


@triton.jit
def _after_top(state, tally, certain, row):
    """The largest key is known; whether the next rule is due, and not the sums of what is kept."""
    none, zero = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    normalises = state.index > row.n_rules
    top_key = tl.maximum(tally.most, certain.largest)
    # NaN is no candidate beside tokens that were kept for certain.
    failed = state.failed | ((certain.number > 0) & (tally.most > KEY_OF_INFINITY))
    amount = tl.where(normalises, MASS, NOTHING)
    measure = Measure(state.measure.order, amount, none, zero, number_of(top_key), zero + 1, zero + 1)
    return State(
        tl.where(normalises, _WEIGH, state.phase), state.index, state.rule, state.kept, top_key, state.totals,
        measure, state.search, state.cutoff_key, state.budget, state.open_below, state.uncut, failed,
    ), normalises == 0  # fmt: skip


@triton.jit
def _after_weighing(state, what, tally, certain, row):
    """The mass of what is kept is known; whether the rule has all sums that it needs."""
    rule, measure, zero = state.rule, state.measure, tl.full([], 0.0, tl.float32)
    normalises = state.index > row.n_rules
    summed = state.uncut & (row.top_key > LOWEST)
    of_share = state.search.task == _OF_SHARE
    failed = state.failed | ((certain.number > 0) & (tally.most > KEY_OF_INFINITY) & what.looks)
    count = tl.where(what.knows_mass, row.scores.V, tally.number_1 + certain.number)
    # One more than the sum of the tiles says, which is rounded: as much as any goal.
    mass = tl.where(what.knows_mass, (row.sums.mass * ONE).to(tl.int64) + 1, tally.amount_1)
    mass += tl.where((rule.needs == 1) | (rule.needs == 2), certain.mass, 0)
    phase = tl.where(normalises, _DONE, state.phase)
    has_sums = (normalises == 0) & (of_share == 0)
    lacks_below = has_sums & (rule.needs == 2) & (summed == 0)
    lacks_squares = has_sums & (rule.needs == 3) & (summed == 0)
    phase = tl.where(lacks_below, _WEIGH_BELOW, tl.where(lacks_squares, _ADD_SQUARES, phase))
    phase = tl.where(of_share, _FIND_TERM, phase)
    amount = tl.where(lacks_below, BELOW, tl.where(lacks_squares, SQUARES, measure.amount))
    measure = Measure(
        tl.where(of_share, BY_TERM, measure.order), tl.where(of_share, NOTHING, amount), tl.full([], 0, tl.int32),
        zero, measure.top, (mass.to(tl.float64) / ONE).to(tl.float32), zero + 1,
    )  # fmt: skip
    return State(
        phase, state.index, rule, state.kept, state.top_key, Totals(count, mass, state.totals.below), measure,
        state.search, state.cutoff_key, state.budget, state.open_below, state.uncut, failed,
    ), has_sums & (lacks_below == 0) & (lacks_squares == 0)  # fmt: skip


@triton.jit
def _after_weighing_below(state, tally):
    """The mass times distance is known."""
    totals = Totals(state.totals.count, state.totals.mass, tally.amount_1)
    return State(
        state.phase, state.index, state.rule, state.kept, state.top_key, totals, state.measure, state.search,
        state.cutoff_key, state.budget, state.open_below, state.uncut, state.failed,
    )  # fmt: skip


@triton.jit
def _after_term(state, tally):
    """The largest term of the entropy is known: all are added up in its units."""
    none, zero = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    largest = tl.maximum(number_of(tally.most), LEAST_TERM)
    measure = Measure(
        none + BY_LOGIT, none + SURPRISE, none, zero, state.measure.top, state.measure.mass, largest
    )  # fmt: skip
    return _measuring(state, none + _ADD_TERMS, measure)


@triton.jit
def _after_terms(state, tally, source, row, config):
    """The entropy is known: the first token that goes beyond its share is searched for; whether there is none."""
    none, nothing = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    total = tally.amount_1
    budget = (state.rule.value * total.to(tl.float64)).to(tl.int64)
    interval = Interval(
        nothing + KEY_OF_MINUS_INFINITY, state.top_key.to(tl.int64) + 1, tally.number_1, total, none, nothing
    )  # fmt: skip
    begins = total <= budget
    phase = _next_of_search(interval, _is_short(source, config), row.collection.slots)
    phase = tl.where(begins, state.phase, phase)
    goal = Goal(none + 1, budget + 1)
    return State(
        phase, state.index + begins.to(tl.int32), state.rule, state.kept, state.top_key, state.totals, state.measure,
        Search(state.search.task, interval, goal, Goal(none, nothing), none, state.search.collected),
        state.cutoff_key, budget, state.open_below, state.uncut, state.failed,
    ), begins  # fmt: skip


@triton.jit
def _after_pass_of_search(state, what, tally, source, row, config):
    """A search has fewer keys left."""
    of = state.search
    interval = _narrowed(tally, what, of)
    phase = _next_of_search(interval, _is_short(source, config), row.collection.slots)
    return _searching(state, phase, Search(of.task, interval, of.goal, of.beyond, of.turns + 1, of.collected))


@triton.jit
def _after_search_of_rule(state, found, row, config):
    """The key where a rule's goal is reached is known; whether ties are to go, it is finished, or the next one is due.

    After a rule of distances the largest logit that is kept is another.
    """
    rule, kept = state.rule, state.kept
    by_distance = rule.goal == DISTANCE_GOAL
    keep = ties_kept(found, state.search.goal, state.cutoff_key, rule.goal, config.LOWEST_TIES)
    cutoff_key = cutoff_found(found, state.cutoff_key, rule.goal)
    spares = (rule.goal != NO_GOAL) | (_of_kind(rule.kind, SPARES_FEWEST) != 0)
    starts_ties = spares & (keep < found.number - found.above) & (by_distance == 0)
    if by_distance:
        kept = Kept(kept.cutoff, kept.rank, state.measure.centre, found.key)
    elif starts_ties == 0:
        kept = from_key(kept, cutoff_key)
    open_below = state.open_below & ((rule.goal == NO_GOAL) | (found.key > KEY_OF_INFINITY))
    return State(
        state.phase, state.index + by_distance.to(tl.int32), rule, kept, state.top_key, state.totals, state.measure,
        _with_number(state.search, keep), cutoff_key, state.budget, open_below, state.uncut & (by_distance == 0),
        state.failed,
    ), starts_ties, (by_distance | starts_ties) == 0, by_distance  # fmt: skip


@triton.jit
def _after_other_search(state, found):
    """The last token of a share of the entropy is known, or the last of those that tie; likewise."""
    of_share = state.search.task == _OF_SHARE
    kept, cutoff_key = state.kept, state.cutoff_key
    keep = surprises_kept(found, state.budget)
    starts_ties = of_share & (keep > 0) & (keep < found.number - found.above)
    if of_share:
        cutoff_key = found.key
        if starts_ties == 0:
            kept = from_key(kept, tl.where(keep > 0, found.key, found.key + 1))
    else:
        kept = with_ties(kept, cutoff_key, found.key)
    finishes = state.search.task == _OF_TIES
    begins = (finishes | starts_ties) == 0
    return State(
        state.phase, state.index + begins.to(tl.int32), state.rule, kept, state.top_key, state.totals, state.measure,
        _with_number(state.search, keep), cutoff_key, state.budget, state.open_below, state.uncut,
        state.failed | (begins & state.open_below),
    ), starts_ties, finishes, begins  # fmt: skip


@triton.jit
def _follow(state, what, tally, found, base, row, config):
    """The state after a pass, and what follows from it."""
    yes, no = tl.full([], True, tl.int1), tl.full([], False, tl.int1)
    has_sums, starts_ties, finishes, begins, stale = no, no, no, no, no
    phase = state.phase
    if phase == _FIND_TOP:
        state, begins = _after_top(state, tally, base.certain, row)
    elif phase == _WEIGH:
        state, has_sums = _after_weighing(state, what, tally, base.certain, row)
    elif phase == _WEIGH_BELOW:
        state = _after_weighing_below(state, tally)
        has_sums = yes
    elif phase == _ADD_SQUARES:
        has_sums = yes
    elif phase == _FIND_TERM:
        state = _after_term(state, tally)
    elif phase == _ADD_TERMS:
        state, begins = _after_terms(state, tally, base.source, row, config)
    elif phase == _SEARCH:
        state = _after_pass_of_search(state, what, tally, base.source, row, config)
    elif state.search.task == _OF_RULE:
        state, starts_ties, finishes, begins = _after_search_of_rule(state, found, row, config)
        stale = begins
    else:
        state, starts_ties, finishes, begins = _after_other_search(state, found)
    return state, Next(has_sums, starts_ties, finishes, begins, stale)


@triton.jit
def _deviation(tally, summed, row_sums):
    """The deviation of what is kept, from sums that are float64 as bits."""
    finite = tally.amount_1.to(tl.float64, bitcast=True)
    first, second = tally.amount_2.to(tl.float64, bitcast=True), tally.amount_3.to(tl.float64, bitcast=True)
    return deviation_of(finite, first, second, summed, row_sums)


@triton.jit
def _start_search(state, tally, base, row, config):
    """A rule has its sums: its cut-off, or the search for the key where its goal is reached; whether it is finished."""
    rule, totals, certain = state.rule, state.totals, base.certain
    none, zero = tl.full([], 0, tl.int32), tl.full([], 0.0, tl.float32)
    top = number_of(state.top_key)
    summed = state.uncut & (row.top_key > LOWEST)
    stats = stats_of(totals.mass, totals.below, summed, row.sums)
    cutoff_key = tl.full([], LOWEST, tl.int32)
    if rule.goal == NO_GOAL:
        deviation = zero
        if rule.needs == 3:
            deviation = _deviation(tally, summed, row.sums)
        cutoff_key = cutoff_key_of(_cutoff_of(rule, top, stats, deviation))
    by_mass, by_distance = _of_mass(rule), rule.goal == DISTANCE_GOAL
    goal = goal_of(rule.value, stats.all_mass, rule.least, rule.goal)
    reached, exceeds = is_reached(goal, totals.count, totals.mass, certain, rule.goal)
    asks = (rule.goal != NO_GOAL) | (rule.least > 1)
    reached = reached & asks
    # What is here is not enough; there may be more.
    failed = state.failed | exceeds | ((rule.goal != NO_GOAL) & (reached == 0) & state.open_below)
    cutoff_key = tl.where((rule.goal == NO_GOAL) & asks & (reached == 0), LOWEST, cutoff_key)
    beyond = Goal(certain.number, tl.where(by_mass, certain.mass, 0))
    highest = tl.where(certain.number > 0, certain.least - 1, tl.where(by_distance, 0, state.top_key))
    interval = Interval(
        tl.where(by_distance, KEY_OF_MINUS_INFINITY, base.bound).to(tl.int64), highest.to(tl.int64) + 1,
        totals.count, tl.where(by_mass, totals.mass, 0), beyond.number, beyond.amount,
    )  # fmt: skip
    measure = Measure(
        tl.where(by_distance, BY_DISTANCE, BY_LOGIT), tl.where(by_mass, MASS, NOTHING), none,
        top - stats.distance, top, zero + 1, zero + 1,
    )  # fmt: skip
    phase = _next_of_search(interval, _is_short(base.source, config), row.collection.slots)
    return State(
        tl.where(reached, phase, state.phase), state.index, rule, state.kept, state.top_key, totals, measure,
        Search(none + _OF_RULE, interval, goal, beyond, none, none - 1),
        cutoff_key, state.budget, state.open_below, state.uncut, failed,
    ), reached == 0  # fmt: skip


@triton.jit
def _start_ties(state, found, source, row, config):
    """Of the tokens at a key only as many stay as it takes, by their ranks: these are searched."""
    none, nothing, of, measure = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64), state.search, state.measure
    V = row.scores.V
    interval = Interval(nothing - V, nothing + V + 1, found.number - found.above, nothing, none, nothing)
    task = tl.where(of.task == _OF_RULE, _OF_TIES, _OF_SHARED_TIES)
    phase = _next_of_search(interval, _is_short(source, config) | (of.collected >= 0), row.collection.slots)
    zero = tl.full([], 0.0, tl.float32)
    return State(
        phase, state.index, state.rule, state.kept, state.top_key, state.totals,
        Measure(none + BY_RANK, none + NOTHING, found.key, zero, measure.top, measure.mass, measure.largest),
        Search(task, interval, of.goal, Goal(none, nothing), none + 1, of.collected),
        state.cutoff_key, state.budget, state.open_below, state.uncut, state.failed,
    )  # fmt: skip


@triton.jit
def _finish_rule(state, base):
    """A rule's cut-off is known: it drops what is below. Whether the next rule is due, and not the entropy's share."""
    none, of, kept = tl.full([], 0, tl.int32), state.search, state.kept
    threshold, entropy = state.rule.goal == NO_GOAL, state.rule.goal == ENTROPY_GOAL
    cutoff_key, open_below, exceeds = finish_cutoff(
        state.cutoff_key, state.top_key, state.open_below, base.bound, base.certain
    )  # fmt: skip
    cutoff_key = tl.where(threshold, cutoff_key, state.cutoff_key)
    open_below = tl.where(threshold, open_below, state.open_below)
    if threshold:
        kept = from_key(kept, cutoff_key)
    failed = state.failed | (threshold & exceeds) | (entropy & open_below)
    spends = entropy & (open_below == 0)
    phase, task, measure = state.phase, of.task, state.measure
    if spends:
        kept = cut_below(kept, number_of(state.top_key))
        task = none + _OF_SHARE
        phase = none + _WEIGH
        measure = _of_amount(MASS, state.top_key)
    begins = spends == 0
    return State(
        phase, state.index + begins.to(tl.int32), state.rule, kept, state.top_key, state.totals, measure,
        Search(task, of.interval, of.goal, of.beyond, of.turns, of.collected),
        cutoff_key, state.budget, open_below, tl.full([], False, tl.int1), failed,
    ), begins  # fmt: skip


@triton.jit
def _begin_rule(state, stale, row, config):
    """The next rule that drops anything."""
    index, rule, phase, failed, amount, uncut = _begin(
        state.index, state.uncut, stale, state.top_key, state.open_below, state.failed, row, config
    )  # fmt: skip
    of = state.search
    return State(
        phase, index, rule, state.kept, state.top_key, state.totals,
        _of_amount(amount, state.top_key),
        Search(tl.full([], _OF_RULE, tl.int32), of.interval, of.goal, of.beyond, of.turns, of.collected),
        state.cutoff_key, state.budget, state.open_below, uncut, failed,
    )  # fmt: skip


@triton.jit
def _first_state(phase, index, rule, top_key, amount, open_below, uncut):
    """The state before the first pass."""
    none, nothing, lowest = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64), tl.full([], LOWEST, tl.int64)
    of = Search(
        none + _OF_RULE, Interval(lowest, lowest, none, nothing, none, nothing), Goal(none, nothing),
        Goal(none, nothing), none, none - 1,
    )  # fmt: skip
    return State(
        phase, index, rule, all_kept(), top_key, Totals(none, nothing, nothing),
        _of_amount(amount, top_key), of, none + LOWEST, nothing, open_below, uncut, tl.full([], False, tl.int1),
    )  # fmt: skip


@triton.jit
def _full_row(row, pairs):
    """A row processed from itself."""
    none, nothing = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64)
    return Base(
        Source(none + ROW, pairs, none + row.scores.V),
        Certain(none, nothing, none + LOWEST, none + HIGHEST), none + KEY_OF_MINUS_INFINITY,
    )  # fmt: skip


@triton.jit
def _apply_rules(state, base, row, config):
    """Pass over a row until all rules are applied."""
    while state.phase != _DONE:
        what = _next_pass(state, base.source, row)
        if what.collects:
            # Other threads may still read what a search before this one has collected.
            tl.debug_barrier()
            tl.store(row.collection.counter, 0)
            tl.debug_barrier()
        tally = pass_over(what, base.source, state.kept, state.measure, row, config)
        if what.collects:
            tl.debug_barrier()
            number = tl.load(row.collection.counter, volatile=True)
            state = _with_collected(state, tl.minimum(number, row.collection.slots))
        found = _end_of_search(state, base.source, row, config)
        state, then = _follow(state, what, tally, found, base, row, config)
        finishes, begins = then.finishes, then.begins
        if then.has_sums:
            state, finishes = _start_search(state, tally, base, row, config)
        if then.starts_ties:
            state = _start_ties(state, found, base.source, row, config)
        if finishes:
            state, begins = _finish_rule(state, base)
        if begins:
            state = _begin_rule(state, then.stale, row, config)
        if state.failed & (base.source.kind == LIST):
            # The list leaves a question open: process the full row.
            base = _full_row(row, base.source.pairs)
            none, no = tl.full([], 0, tl.int32), tl.full([], False, tl.int1)
            state = _first_state(none + _FIND_TOP, none, state.rule, state.top_key, none, no, no == 0)
    return state, base


# -- A row ----------------------------------------------------------------------------------------------------------


@triton.jit
def _load_range(work):
    """Which logits of a row are candidates."""
    return Range(
        number_of(tl.load(work + BOUND_AT)), tl.load(work + BANDED_AT) != 0, load_float(work + CENTRE_AT),
        load_float(work + RAW_CERTAIN_AT), load_float(work + RAW_CERTAIN_AT + 1),
    )  # fmt: skip


@triton.jit
def _collection(work, shape, ROOM: tl.constexpr):
    """Where a search collects: not over the candidates, where there may be so many that they come as a list."""
    collected_at = shape.pairs_at + 2 * tl.where(shape.slots > ROOM, shape.slots, 0)
    return Collection(work + COUNT_AT, work + collected_at, tl.minimum(shape.slots, ROOM))


@triton.jit
def _likely(of, work):
    """Two keys around the cut-off, as the sample tells; of distances it makes one likely, a little too far."""
    high = tl.where(of.banded, key_of(0.9 * of.least), tl.load(work + CERTAIN_AT))
    return tl.load(work + BOUND_AT).to(tl.int64), high.to(tl.int64)


@triton.jit
def _start(row, shape, tried, greedy, config, SAMPLES: tl.constexpr, PARTS: tl.constexpr):
    """The first state of a row, what it is processed from, and its state in the workspace."""
    work = row.work
    none, yes, no = tl.full([], 0, tl.int32), tl.full([], True, tl.int1), tl.full([], False, tl.int1)
    row_state = tl.load(work + STATE_AT)
    number = tl.load(work + COUNT_AT)
    listed = (row_state != FULL_ROW) & (number > tried) & (number <= shape.slots)
    # The largest logit may be known from the sums of the row.
    unknown = row.top_key == LOWEST
    index, rule, phase, failed, amount, uncut = _begin(none, yes, unknown, row.top_key, listed, no, row, config)
    is_sampled_as_it_is = greedy
    if SAMPLES:
        is_sampled_as_it_is = greedy | (row_state == UNCUT)
    # A list that leaves a question open from the start is none.
    listed = listed & (is_sampled_as_it_is | (failed == 0) | unknown)
    pairs = (work + shape.pairs_at).to(tl.pointer_type(tl.int64))
    source = Source(tl.where(listed, LIST, ROW), pairs, tl.where(listed, number, row.scores.V))
    certain = load_certain(work, shape, tl.where(listed, row_state, FULL_ROW), PARTS)
    # All tokens that aren't in the list are below the bound; one of distances says nothing of keys.
    bound = tl.where(listed & (row.range.banded == 0), tl.load(work + BOUND_AT), KEY_OF_MINUS_INFINITY)
    phase = tl.where(is_sampled_as_it_is, _DONE, tl.where(unknown, _FIND_TOP, phase))
    state = _first_state(
        phase, tl.where(unknown, 0, index), rule, row.top_key, tl.where(unknown, NOTHING, amount), listed,
        uncut | unknown,
    )  # fmt: skip
    return state, Base(source, certain, bound), row_state


@triton.jit
def _write(state, base, overwrites, request, out, row, config):
    """Write what is kept, and over what the filter has kept; or sample of it and of what the filter has sampled."""
    source = base.source
    log_mass = tl.full([], 0.0, tl.float32)
    if config.NORMALISE:
        log_mass = log_mass_of(state.top_key, state.totals.mass)
    best = tl.full([config.BLOCK], LOWEST, tl.int32)
    which = tl.full([config.BLOCK], HIGHEST, tl.int32)
    for start in range(0, source.size, config.BLOCK):
        x, valid, token, rank = load_block(start, source, row, config)
        stays = is_kept(x, valid, rank, state.kept, True)
        if out.ptr is not None:
            y = x - log_mass
            if row.scores.maps.temperature_ptr is not None:
                y = fitted(y, number_of(state.top_key), out.ptr)
            there = out.ptr + row.index * out.stride_row + token.to(tl.int64) * out.stride_token
            written = stays | (tl.where(valid, overwrites, 0) != 0)
            tl.store(there, tl.where(stays, y, out.fill).to(out.ptr.dtype.element_ty), mask=written)
        if out.tokens_ptr is not None:
            if source.kind == LIST:
                # What is kept for certain and was collected, as it may be sampled.
                place = start + tl.arange(0, config.BLOCK)
                pair = tl.load(source.pairs + place, mask=place < source.size, other=0)
                raw = pair.to(tl.int32).to(tl.float32, bitcast=True)
                stays = stays | (is_certain_of(raw, row.range) & (place < source.size))
            key = tl.where(stays, perturbed_key(x, token, request), LOWEST)
            better = (key > best) | ((key == best) & (token < which) & stays)
            which = tl.where(better, token, which)
            best = tl.maximum(best, key)
    if out.tokens_ptr is not None:
        largest = tl.max(best)
        store_token(out.tokens_ptr + row.index, tl.min(tl.where(best == largest, which, HIGHEST)))


@triton.jit
def _refine_row(index, scores, work, shape, n_rules, tried, sampling, out, config, PARTS: tl.constexpr):
    """Process a row that is not done, from its candidates where they are a list, else from itself."""
    request = load_request(index, sampling, scores.maps)
    of = _load_range(work)
    likely_low, likely_high = _likely(of, work)
    top_key = tl.load(work + TOP_KEY_AT)
    row = Row(
        index, scores, of, work, _collection(work, shape, config.ROOM), likely_low, likely_high,
        load_row_sums(work + ROW_SUMS_AT, top_key > LOWEST), top_key, n_rules,
    )  # fmt: skip
    state, base, row_state = _start(row, shape, tried, request.greedy, config, out.tokens_ptr is not None, PARTS)
    state, base = _apply_rules(state, base, row, config)
    overwrites = tl.where((row_state == BRACKET) & (base.source.kind == ROW), 1, 0)
    _write(state, base, overwrites, request, out, row, config)
    store_kept(work, state.kept)


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
    """What the rules keep of the rows that the launch before has left open."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    sampling = Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position)
    shape = Shape(W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share)
    out = Output(out_ptr, stride_out, stride_out_token, tokens_ptr, FILL)
    wait_for_launch(PDL)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        index = tl.full([], 0, tl.int64) + i
        work = work_ptr + index * stride_work
        # A loop of one turn or none: most rows are done, and Triton 3.6 can't compile a loop in a branch.
        for _ in range(1 - tl.load(work + DONE_AT)):
            _refine_row(
                index, scores, work, shape, n_rules, tried, sampling, out,
                Config(Form(OPS, MAX), LOWEST_TIES, NORMALISE, PORTABLE, BLOCK, ROOM), PARTS,
            )  # fmt: skip
