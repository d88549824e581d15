"""What a row is, and the bounds of its candidates: a guess from a sample of it, which the refinements verify."""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.noise import coarse_words, least_perturbed, load_seed, win_test
from fastlogits_kernels.selection.row import (
    BANDED_AT,
    BOUND_AT,
    BRACKET,
    CENTRE_AT,
    CERTAIN_AT,
    COLLECTED,
    COUNT_AT,
    COUNT_GOAL,
    DISTANCE_GOAL,
    DONE_AT,
    ENTROPY_GOAL,
    FLOAT32_MAX,
    FULL_ROW,
    GOAL,
    GROUPS,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MASS_GOAL,
    MINUS_INFINITY,
    NEEDS_SUMS,
    NO_GOAL,
    OCTET,
    OFFSET_AT,
    RAW_CERTAIN_AT,
    RAW_RANGE_AT,
    ROW_SUMS_AT,
    RULE_KIND_AT,
    RULE_LEAST_AT,
    RULE_VALUE_AT,
    RULE_WORDS,
    RULES_AT,
    RUN,
    SCALE_AT,
    STATE_AT,
    STEPWISE,
    TOP_AT,
    TOP_H_TOKENS,
    TOP_KEY_AT,
    UNALIGNED,
    UNCUT,
    Form,
    Maps,
    RowSums,
    Sampling,
    Scores,
    Shape,
    cutoff,
    divisor_of,
    exp,
    inverse_of,
    is_active,
    is_greedy,
    key_of,
    let_next_launch,
    number_of,
    rule_value,
    scaled,
    store_float,
    wait_for_launch,
)
from fastlogits_kernels.selection.row_sums import load_sums, sampled, store_row_sums, sums_asked

_STEPS = tl.constexpr(256)  # of a histogram
_LEAST_SAFE = tl.constexpr(2.0**-6)  # a divisor from which on float16 logits of up to 1023 stay finite
_LIKELY_ROOM = tl.constexpr(0.7)  # of the room, what a sample is let to fill


class Known(NamedTuple):
    """What is known of a row: a sample of it, roughly scaled, its largest logit, and its sums where ``summed``."""

    x: tl.tensor
    keys: tl.tensor
    top: tl.tensor
    sums: RowSums
    summed: tl.tensor
    top_key: tl.tensor


class Bounds(NamedTuple):
    """Hardly any token below the key ``low`` is kept, and all from ``high`` on; keys of distances where ``banded``."""

    low: tl.tensor
    high: tl.tensor
    banded: tl.tensor
    centre: tl.tensor


@triton.jit
def _key_of_count(keys, count, BITS: tl.constexpr):
    """Nearly the largest key that at least ``count`` of the keys reach, and one that fewer reach."""
    low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int64)
    high = tl.max(keys).to(tl.int64) + 1
    for _ in range(BITS):
        middle = (low + high) >> 1
        enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32)) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32), high.to(tl.int32)


@triton.jit
def _bound_of_count(keys, count, BITS: tl.constexpr):
    """A key that at least ``count`` of the keys ``[N, GROUPS]`` reach; in one step where few are counted."""
    if count <= GROUPS // 2:
        # The count-th largest of the groups' largest keys is such a bound.
        largest = tl.max(keys, 0)
        above = tl.sum((largest[None, :] > largest[:, None]).to(tl.int32), 1)
        bound = tl.max(tl.where(above >= (count - 1).to(tl.int32), largest, KEY_OF_MINUS_INFINITY))
    else:
        bound, _above = _key_of_count(keys, count, BITS)
    return bound


@triton.jit
def _bounds_of_nucleus(x, top, mass, p, share, V, DEVIATIONS: tl.constexpr):
    """A key below which the nucleus hardly reaches, and one from which on it holds all tokens, nearly always.

    The sample is counted in steps of the logit. The mass of a step is between that of its tokens if all were its most
    likely, and if all were its least likely. The sample may miss so many standard deviations, and five tokens more.
    """
    spare = (1 - p).to(tl.float32) * mass.to(tl.float32) * share
    step = (tl.log(V / tl.maximum((1 - p).to(tl.float32) * mass.to(tl.float32), 1e-30)) + 2) / (_STEPS - 1)
    step = tl.maximum(step, 1e-6)
    at = tl.minimum(tl.maximum((top - x) / step, 0.0), _STEPS - 1.0)
    counts = tl.histogram(tl.reshape(at.to(tl.int32), [x.shape[0] * x.shape[1]]), _STEPS).to(tl.float32)
    j = tl.arange(0, _STEPS)
    likely = exp(-step * j.to(tl.float32))
    least = tl.where(j < _STEPS - 1, likely * exp(-step), 0.0)
    spread = tl.cumsum(counts * likely * likely, 0, reverse=True) * tl.maximum(1 - share, 0.0)
    unsure = DEVIATIONS * tl.sqrt(spread) + 5 * likely
    lost = tl.min(tl.where(tl.cumsum(counts * likely, 0, reverse=True) + unsure <= spare, j, _STEPS))
    low = tl.where(lost < _STEPS, key_of(top - step * lost.to(tl.float32)), KEY_OF_MINUS_INFINITY)
    last = tl.max(tl.where(tl.cumsum(counts * least, 0, reverse=True) - unsure > spare, j, -1))
    return low, tl.where(last > 0, key_of(top - step * last.to(tl.float32)), HIGHEST)


@triton.jit
def _bounds_of_band(x, top, centre, mass, p, share, V, DEVIATIONS: tl.constexpr):
    """Keys of distances from a centre: a band of mass ``p`` hardly reaches below one, and from the other on holds all.

    The sample is counted in steps of the distance, on both sides. The mass within a distance is known from the sample
    there, or from the whole mass and the sample beyond, whichever says more.
    """
    goal = p.to(tl.float32) * mass.to(tl.float32) * share
    # Below that not even all tokens together would count.
    depth = tl.log(V / tl.maximum((1 - p).to(tl.float32) * mass.to(tl.float32), 1e-30)) + 2
    above = top - centre
    step = tl.maximum(tl.maximum(above, depth - above) / (_STEPS // 2 - 2), 1e-6)
    at = tl.minimum(tl.abs(x - centre) / step, _STEPS // 2 - 1.0).to(tl.int32)
    at = tl.where(x > centre, at + _STEPS // 2, at)
    counts = tl.histogram(tl.reshape(at, [x.shape[0] * x.shape[1]]), _STEPS).to(tl.float32)
    j = tl.arange(0, _STEPS)
    i = j % (_STEPS // 2)
    away = (i.to(tl.float32) + 0.5) * step
    likely = exp(tl.where(j < _STEPS // 2, -away, away) - above)
    likely = tl.where(i < _STEPS // 2 - 1, tl.minimum(likely, 1.0), 0.0)
    amount = tl.sum(tl.reshape(counts * likely, [2, _STEPS // 2]), 0)
    spread = tl.sum(tl.reshape(counts * likely * likely, [2, _STEPS // 2]), 0)
    reached = (tl.arange(0, _STEPS // 2) + 1).to(tl.float32) * step
    within, spread_within = tl.cumsum(amount, 0), tl.cumsum(spread, 0)
    beyond, spread_beyond = tl.sum(amount) - within, tl.sum(spread) - spread_within
    # A sample misses some, and steps are a little wide.
    misses = tl.maximum(1 - share, 0.0) + 0.1 * step * step
    unsure_within = DEVIATIONS * tl.sqrt(spread_within * misses) + 5 * exp(tl.minimum(reached - above, 0.0))
    unsure_beyond = DEVIATIONS * tl.sqrt(tl.maximum(spread_beyond, 0.0) * misses)
    unsure_beyond += 5 * tl.where(reached < above, 1.0, exp(-reached - above))
    rest = mass.to(tl.float32) * share - beyond
    least = tl.maximum(within - unsure_within, rest - unsure_beyond)
    most = tl.minimum(within + unsure_within, rest + unsure_beyond)
    far = tl.min(tl.where(least >= goal, reached, float("inf")))
    near = tl.max(tl.where(most < goal, reached, -1.0))
    low = tl.where(far < float("inf"), key_of(-far), KEY_OF_MINUS_INFINITY)
    return low, tl.where(near > 0, key_of(-near), HIGHEST)


@triton.jit
def _in_sample(count, share, DEVIATIONS: tl.constexpr):
    """At most and at least so many of a sample are among the ``count`` largest of the row, nearly always."""
    expected = (count * share).to(tl.float32)
    unsure = DEVIATIONS * tl.sqrt(expected * tl.maximum(1 - share, 0.0)) + 3
    return tl.minimum(count.to(tl.float32), tl.ceil(expected + unsure)), tl.floor(expected - unsure)


@triton.jit
def _bounds_of_cutoff(value, known, KIND: tl.constexpr, SUMS: tl.constexpr):
    """A key below which a rule with a cut-off keeps nothing, and one from which on it keeps all."""
    top, sums = known.top, known.sums
    mass = sums.mass.to(tl.float32)
    entropy = tl.log(mass) + (sums.below / sums.mass).to(tl.float32)
    deviation = tl.sqrt(sums.squares / tl.maximum(sums.finite - 1, 1.0)).to(tl.float32)
    limit = cutoff(value, top, mass, entropy, deviation, KIND)
    # More than the rounding of the sums and of the division by the temperature.
    margin = 0.01
    if NEEDS_SUMS[KIND] >= 3:
        margin = 0.001 * (top - limit)
    high = key_of(limit + margin)
    if NEEDS_SUMS[KIND] == 0:
        # Without sums the largest logit is that of the sample only.
        high = tl.where(known.summed, high, HIGHEST) if SUMS >= 1 else tl.full([], HIGHEST, tl.int32)
    return key_of(limit - margin), high


@triton.jit
def _bounds_of_rule(
    known, shape, value, V,
    KIND: tl.constexpr, LEAST: tl.constexpr, SUMS: tl.constexpr, BRACKETED: tl.constexpr, DEVIATIONS: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """The bounds of what a rule keeps, from a sample and the row's sums."""
    keys = known.keys
    top, sums, share = known.top, known.sums, shape.share
    centre = top
    high = tl.full([], HIGHEST, tl.int32)
    if GOAL[KIND] == NO_GOAL:
        low, high = _bounds_of_cutoff(value, known, KIND, SUMS)
    elif GOAL[KIND] == COUNT_GOAL:
        most, fewest = _in_sample(value, share, DEVIATIONS)
        low = _bound_of_count(keys, most, BITS)
        if BRACKETED:
            if (most > shape.capacity * share) & (fewest >= 1):
                # Above it are fewer of the sample.
                _low, high = _key_of_count(keys, fewest, BITS)
    elif GOAL[KIND] == ENTROPY_GOAL:
        most, fewest = _in_sample(tl.full([], TOP_H_TOKENS, tl.float64), share, DEVIATIONS)
        low = _bound_of_count(keys, most, BITS)
    elif GOAL[KIND] == DISTANCE_GOAL:
        centre = top - (sums.below / sums.mass).to(tl.float32)
        low, high = _bounds_of_band(known.x, top, centre, sums.mass, value, share, V, DEVIATIONS)
    else:
        tl.static_assert(GOAL[KIND] == MASS_GOAL, "a goal has no branch in _bounds_of_rule()")
        low, high = _bounds_of_nucleus(known.x, top, sums.mass, value, share, V, DEVIATIONS)
    low = tl.where(low > KEY_OF_INFINITY, KEY_OF_MINUS_INFINITY, low)  # NaN is no bound
    if LEAST > 1:
        if GOAL[KIND] == DISTANCE_GOAL:
            low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
        else:
            most, fewest = _in_sample(tl.full([], LEAST, tl.float64), share, DEVIATIONS)
            low = tl.minimum(low, _bound_of_count(keys, most, BITS))
    return low, high, centre


@triton.jit
def _within_room(keys, low, shape, BITS: tl.constexpr):
    """A bound that lets no more through than there is room for, as the sample tells."""
    room = tl.floor(_LIKELY_ROOM * shape.room * shape.share)
    let_through = tl.sum((keys >= low).to(tl.int32)).to(tl.float32)
    if (let_through > room) & (room >= 1):
        raised, _above = _key_of_count(keys, room, BITS)
        low = tl.maximum(low, raised)
    return low


@triton.jit
def _store_rule(ptr, value, active, KIND: tl.constexpr, LEAST: tl.constexpr):
    """Leave a rule where the refinements find it."""
    tl.store(ptr + RULE_KIND_AT, KIND)
    tl.store(ptr + RULE_LEAST_AT, LEAST)
    tl.store((ptr + RULE_VALUE_AT).to(tl.pointer_type(tl.float64)), tl.where(active, value, float("nan")))


@triton.jit
def _state_of(known, bounds, acting, shape, BRACKETED: tl.constexpr):
    """What a row is where some rules act: ``acting`` is how many."""
    test = known.keys
    if bounds.banded:
        test = key_of(-tl.abs(known.x - bounds.centre))
    # Both counts at once: the sample has fewer than 2 ** 16 tokens.
    counts = tl.sum((test >= bounds.low).to(tl.int32) + ((test >= bounds.high).to(tl.int32) << 16))
    expected = (counts & 0xFFFF).to(tl.float32) / shape.share
    state = tl.where(expected > shape.room, FULL_ROW, COLLECTED)
    if BRACKETED:
        # Most of many tokens are kept for certain: only those between the bounds are collected.
        certain = (counts >> 16).to(tl.float32) / shape.share
        several = (expected > shape.capacity) & (bounds.high <= KEY_OF_INFINITY) & (bounds.high > bounds.low)
        # What is kept for certain in a band is not the likeliest, of which other rules speak.
        several = several & ((bounds.banded == 0) | (acting == 1)) & (tl.abs(bounds.centre) < float("inf"))
        state = tl.where(several & (expected - certain <= shape.room), BRACKET, state)
    return state


@triton.jit
def _widened(bounds):
    """Bounds with a margin, since the sample was divided roughly."""
    spare = (tl.abs(number_of(bounds.low)) + tl.abs(bounds.centre)) * 1e-6
    spare = tl.where(spare < float("inf"), spare, 0.0)
    high = tl.where(bounds.high <= KEY_OF_INFINITY, key_of(number_of(bounds.high) + spare), bounds.high)
    return Bounds(key_of(number_of(bounds.low) - spare), high, bounds.banded, bounds.centre)


@triton.jit
def _bounds(
    row, known, shape, V, values, rules_ptr,
    KINDS: tl.constexpr, LEASTS: tl.constexpr, PLACES: tl.constexpr, SUMS: tl.constexpr, BRACKETED: tl.constexpr,
    DEVIATIONS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What a row is, and its bounds; stores the rules' values."""
    low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
    high = low
    centre = known.top
    banded = tl.full([], False, tl.int1)
    cut = banded  # whether a rule may have dropped something
    sealed = banded  # whether a later rule needs all that its predecessors leave
    acting = tl.full([], 0, tl.int32)
    for i in tl.static_range(len(KINDS)):
        value = rule_value(row, values, PLACES[i])
        active = is_active(value, V, KINDS[i], PLACES[i] >= 0)
        _store_rule(rules_ptr + RULE_WORDS * i, value, active, KINDS[i], LEASTS[i])
        if NEEDS_SUMS[KINDS[i]] > 0:
            sealed = sealed | (active & cut)
        if active & (sealed == 0):
            its_low, its_high, its_centre = _bounds_of_rule(
                known, shape, value, V, KINDS[i], LEASTS[i], SUMS, BRACKETED, DEVIATIONS, BITS
            )  # fmt: skip
            if GOAL[KINDS[i]] == NO_GOAL and NEEDS_SUMS[KINDS[i]] == 0:
                # The largest logit is hardly in the sample: the true cut-off is higher.
                if known.summed == 0:
                    its_low = _within_room(known.keys, its_low, shape, BITS)
            low = tl.maximum(low, its_low)
            high = tl.maximum(high, its_high)
            if GOAL[KINDS[i]] == DISTANCE_GOAL:
                low = its_low
                centre = its_centre
                banded = banded | True
                sealed = sealed | True
        elif active:
            high = tl.full([], HIGHEST, tl.int32)
        if GOAL[KINDS[i]] == ENTROPY_GOAL:
            sealed = sealed | active
        cut = cut | active
        acting += active.to(tl.int32)
    bounds = Bounds(low, high, banded, centre)
    state = tl.where(cut, _state_of(known, bounds, acting, shape, BRACKETED), UNCUT)
    return state, _widened(bounds)


@triton.jit
def _least_best(row, x, counts, shape, sampling, SAMPLE: tl.constexpr):
    """At most the best perturbed logit of the tokens of a sample that count, from the first bits of their noise."""
    seed, position = load_seed(row, sampling)
    # A run is some octets.
    each: tl.constexpr = GROUPS // OCTET
    flat = tl.arange(0, SAMPLE // GROUPS)[:, None] * each + tl.arange(0, each)[None, :]
    run = flat // (RUN // OCTET) * shape.runs // (SAMPLE // RUN)
    a, b, c, d = coarse_words(run * (RUN // OCTET) + flat % (RUN // OCTET), seed, position)
    pairs = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [SAMPLE // GROUPS, GROUPS // 2])
    coarse = tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), [SAMPLE // GROUPS, GROUPS])
    return tl.max(tl.where(counts, least_perturbed(x, coarse), float("-inf")))


@triton.jit
def _raw(x, divisor, margin):
    """About the raw logit that is ``x`` once it is divided, moved by more than all rounding in the way of a sign."""
    before = tl.clamp(x * divisor, -FLOAT32_MAX, FLOAT32_MAX)
    return tl.where(tl.abs(x) < float("inf"), before + margin * (tl.abs(before) * 1e-6 + divisor * 1e-38), x)


@triton.jit
def _raw_range(bounds, divisor):
    """The range of the raw logits of candidates, a little too wide."""
    low, up = number_of(bounds.low), tl.full([], float("inf"), tl.float32)
    if bounds.banded:
        # ``low`` is that of the negative distances.
        spare = (tl.abs(bounds.centre) - low) * 1e-6
        low, up = bounds.centre + low - spare, bounds.centre - low + spare
    return _raw(low, divisor, -1.0), _raw(up, divisor, 1.0)


@triton.jit
def _raw_certain(bounds, row, maps):
    """The exact range of the raw logits that come to a key of at least ``high``, and whether it was found.

    The division never changes the order, so the range ends at the first and the last raw logit that do.
    """
    high, banded, centre = bounds.high, bounds.banded, bounds.centre
    divisor = divisor_of(row, maps)
    around = tl.arange(0, 32) - 16
    distance = -number_of(high)
    from_here = tl.where(banded, centre - distance, number_of(high)) * divisor
    to_here = tl.where(banded, (centre + distance) * divisor, 0.0)
    first = key_of(from_here) + around
    last = key_of(to_here) + around
    x, y = scaled(number_of(first), row, maps), scaled(number_of(last), row, maps)
    test = tl.where(banded, -tl.abs(x - centre), x)
    least = tl.min(tl.where(key_of(test) >= high, first, HIGHEST))
    most = tl.max(tl.where(key_of(-tl.abs(y - centre)) >= high, last, LOWEST))
    found = (tl.abs(from_here) < 1e38) & (tl.abs(to_here) < 1e38) & (least > tl.min(first)) & (least < HIGHEST)
    found = found & ((banded == 0) | ((most > LOWEST) & (most < tl.max(last))))
    return number_of(least), tl.where(banded, number_of(most), float("inf")), found


@triton.jit
def _look_at(
    row, flat, shape, scores, form, values, work,
    KINDS: tl.constexpr, PLACES: tl.constexpr, SUMS: tl.constexpr, GREEDY: tl.constexpr, SAMPLE: tl.constexpr,
    TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Take a sample of a row, and its sums where there are any; stores these."""
    nothing = tl.full([], 0.0, tl.float64)
    sums = RowSums(nothing, nothing, nothing, nothing)
    summed = tl.full([], False, tl.int1)
    top_key = tl.full([], LOWEST, tl.int32)
    if SUMS >= 1:
        asked = sums_asked(row, scores.V, values, scores.maps, KINDS, PLACES, GREEDY)
        summed = asked > 0
        wait_for_launch(PDL)
        x = tl.load(work + shape.pairs_at + flat, mask=flat < shape.sample_size, other=MINUS_INFINITY)
        x = x.to(tl.float32, bitcast=True)
        top = tl.max(x)
        if summed:
            top, sums = load_sums(row, work + shape.sums_at, shape.tiles, asked, scores.maps, SUMS, TILES)
            store_row_sums(work + ROW_SUMS_AT, sums)
            # A NaN among the logits is one in the mass, and would be the largest key.
            top_key = tl.where(top == float("inf"), KEY_OF_INFINITY, HIGHEST)
            top_key = tl.where(sums.mass == sums.mass, key_of(top), top_key)
    else:
        x = sampled(row, flat, shape, scores, form, SAMPLE) * inverse_of(row, scores.maps)
        top = tl.max(x)
    return Known(x, key_of(x), top, sums, summed, top_key)


@triton.jit
def _store_certain(row, state, bounds, maps, work, BRACKETED: tl.constexpr):
    """Store the raw logits that are kept for certain, none where the state is not BRACKET; returns the state."""
    if BRACKETED:
        first, last, found = _raw_certain(bounds, row, maps)
        state = tl.where((state == BRACKET) & (found == 0), FULL_ROW, state)
        first = tl.where(state == BRACKET, first, float("nan"))
    else:
        first = tl.full([], float("nan"), tl.float32)
        last = first
    store_float(work + RAW_CERTAIN_AT, first)
    store_float(work + RAW_CERTAIN_AT + 1, last)
    return state


@triton.jit
def _store_win_test(row, state, x, flat, bounds, shape, maps, sampling, work, SAMPLE: tl.constexpr):
    """Store which tokens may be sampled before the rules are applied: of all, or of those kept for certain."""
    if (state == UNCUT) | (state == BRACKET):
        test = tl.where(bounds.banded, -tl.abs(x - bounds.centre), x)
        counts = (flat < shape.sample_size) & ((state == UNCUT) | (key_of(test) >= bounds.high))
        wins = win_test(_least_best(row, x, counts, shape, sampling, SAMPLE), inverse_of(row, maps))
        store_float(work + SCALE_AT, wins.scale)
        store_float(work + OFFSET_AT, wins.offset)


@triton.jit
def _store_bounds(row, state, bounds, known, maps, work):
    """Leave what a row is where the other launches find it; no candidate is collected yet."""
    tl.store(work + STATE_AT, state)
    tl.store(work + BOUND_AT, bounds.low)
    tl.store(work + BANDED_AT, bounds.banded.to(tl.int32))
    store_float(work + CENTRE_AT, bounds.centre)
    tl.store(work + COUNT_AT, 0)
    tl.store(work + DONE_AT, 0)
    low, up = _raw_range(bounds, divisor_of(row, maps))
    store_float(work + RAW_RANGE_AT, low)
    store_float(work + RAW_RANGE_AT + 1, up)
    # No number is above that of NaN.
    tl.store(work + CERTAIN_AT, tl.where(state == COLLECTED, HIGHEST, bounds.high))
    store_float(work + TOP_AT, known.top)
    tl.store(work + TOP_KEY_AT, known.top_key)


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def bounds_kernel(
    # inputs
    scores_ptr, values,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    # output
    work_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share,
    # strides
    stride_row, stride_token, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, KINDS: tl.constexpr, LEASTS: tl.constexpr, PLACES: tl.constexpr,
    SUMS: tl.constexpr, NORMALISE: tl.constexpr, BRACKETED: tl.constexpr, GREEDY: tl.constexpr,
    FITS: tl.constexpr, SAMPLE: tl.constexpr, DEVIATIONS: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What a row is, and the bounds of its candidates."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    shape = Shape(W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share)
    sampling = Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position)
    let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    flat = tl.arange(0, SAMPLE // GROUPS)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    known = _look_at(
        row, flat, shape, scores, Form(OPS, MAX), values, work, KINDS, PLACES, SUMS, GREEDY, SAMPLE, TILES, PDL
    )  # fmt: skip
    state, bounds = _bounds(
        row, known, shape, V, values, work + RULES_AT, KINDS, LEASTS, PLACES, SUMS, BRACKETED, DEVIATIONS, BITS
    )  # fmt: skip
    if GREEDY:
        if is_greedy(temperature_ptr + row * stride_temperature):
            state = tl.full([], COLLECTED, tl.int32)
            bounds = Bounds(tl.max(known.keys), bounds.high, tl.full([], False, tl.int1), bounds.centre)
    state = _store_certain(row, state, bounds, maps, work, BRACKETED)
    if NORMALISE:
        state = tl.where(state == UNCUT, FULL_ROW, state)
    if seeds_ptr is not None:
        # Greedy rows need no test, and their state is another.
        _store_win_test(row, state, known.x, flat, bounds, shape, maps, sampling, work, SAMPLE)
    if FITS:
        # Its largest logit may be beyond float16: what is kept for certain is written before it is known.
        risky = (divisor_of(row, maps) < _LEAST_SAFE) & ((state == UNCUT) | (state == BRACKET))
        state = tl.where(risky, FULL_ROW, state)
    _store_bounds(row, state, bounds, known, maps, work)
