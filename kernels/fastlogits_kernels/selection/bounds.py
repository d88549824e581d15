"""What a row is, and the bounds of its candidates: a guess from a sample of it, which the last launches verify."""

from __future__ import annotations

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
    FLOAT32_MAX,
    FREE,
    GOAL,
    HIGH_AT,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOG2_E,
    LOWEST,
    MASS_GOAL,
    MINUS_INFINITY,
    NEEDS_SUMS,
    NO_GOAL,
    OCTET,
    OFFSET_AT,
    REACH_AT,
    ROW_SUMS_AT,
    RULE_WORDS,
    RULES_AT,
    RUN,
    SCALE_AT,
    STATE_AT,
    STEPWISE,
    SURE_AT,
    TOP_AT,
    TOP_H_TOKENS,
    TOP_KEY_AT,
    UNALIGNED,
    WHOLE,
    Maps,
    RowSums,
    Sample,
    Samples,
    Scores,
    Shape,
    coarse_words,
    cutoff,
    divisor_of,
    exp,
    inverse_of,
    is_active,
    is_greedy,
    key_of,
    least_sample,
    let_next_launch,
    load_seed,
    number_of,
    rule_value,
    scaled,
    store_float,
    wait_for_launch,
)
from fastlogits_kernels.selection.row_sums import load_sums, sampled, store_row_sums, sums_asked

_STEPS = tl.constexpr(256)  # of a histogram
_GROUPS = tl.constexpr(64)  # of a sample
_LEAST_SAFE = tl.constexpr(2.0**-6)  # a divisor from which on float16 logits of up to 1023 stay finite
_LIKELY_ROOM = tl.constexpr(0.7)  # of the room, what a sample is let to fill
_SURE = tl.constexpr(4.5)  # standard deviations by which a sample is trusted


@triton.jit
def _key_of_count(keys, count, BITS: tl.constexpr):
    """A key which at least ``count`` of the keys are not below, nearly the largest one."""
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
    """The same of the keys ``[N, _GROUPS]``, in one step where few are counted."""
    if count <= _GROUPS // 2:
        # The count-th largest of the groups' largest keys is such a bound.
        largest = tl.max(keys, 0)
        above = tl.sum((largest[None, :] > largest[:, None]).to(tl.int32), 1)
        bound = tl.max(tl.where(above >= (count - 1).to(tl.int32), largest, KEY_OF_MINUS_INFINITY))
    else:
        bound, _above = _key_of_count(keys, count, BITS)
    return bound


@triton.jit
def _bounds_of_nucleus(x, top, mass, p, share, V):
    """A key below which the nucleus hardly reaches, and one from which it holds all, as good as always.

    The sample is counted in steps of the logit. What a step adds up to lies between taking all in it for its likeliest
    and for its least likely; the sample may have missed so many standard deviations, and five tokens at the edge.
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
    unsure = _SURE * tl.sqrt(spread) + 5 * likely
    edge = tl.min(tl.where(tl.cumsum(counts * likely, 0, reverse=True) + unsure <= spare, j, _STEPS))
    low = tl.where(edge < _STEPS, key_of(top - step * edge.to(tl.float32)), KEY_OF_MINUS_INFINITY)
    last = tl.max(tl.where(tl.cumsum(counts * least, 0, reverse=True) - unsure > spare, j, -1))
    return low, tl.where(last > 0, key_of(top - step * last.to(tl.float32)), HIGHEST)


@triton.jit
def _bounds_of_band(x, top, centre, mass, p, share, V):
    """Keys of distances from a centre: below one no token of a band of mass ``p`` is, from another it holds all.

    As good as always. The sample is counted in steps of the distance, on both sides. What is within a distance is known
    from the sample there, or from all that there is and the sample beyond, whichever says more.
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
    unsure_within = _SURE * tl.sqrt(spread_within * misses) + 5 * exp(tl.minimum(reached - above, 0.0))
    unsure_beyond = _SURE * tl.sqrt(tl.maximum(spread_beyond, 0.0) * misses)
    unsure_beyond += 5 * tl.where(reached < above, 1.0, exp(-reached - above))
    rest = mass.to(tl.float32) * share - beyond
    least = tl.maximum(within - unsure_within, rest - unsure_beyond)
    most = tl.minimum(within + unsure_within, rest + unsure_beyond)
    far = tl.min(tl.where(least >= goal, reached, float("inf")))
    near = tl.max(tl.where(most < goal, reached, -1.0))
    low = tl.where(far < float("inf"), key_of(-far), KEY_OF_MINUS_INFINITY)
    return low, tl.where(near > 0, key_of(-near), HIGHEST)


@triton.jit
def _in_sample(count, share):
    """So many of a sample at most, and at least, are among the ``count`` largest of the row, as good as always."""
    expected = (count * share).to(tl.float32)
    unsure = _SURE * tl.sqrt(expected * tl.maximum(1 - share, 0.0)) + 3
    return tl.minimum(count.to(tl.float32), tl.ceil(expected + unsure)), tl.floor(expected - unsure)


@triton.jit
def _bounds_of_cutoff(value, top, sums, summed, KIND: tl.constexpr, SUMS: tl.constexpr):
    """A key below which a rule with a cut-off keeps nothing, and one from which it keeps all."""
    mass = sums.mass.to(tl.float32)
    entropy = tl.log(mass) + (sums.below / sums.mass).to(tl.float32)
    deviation = tl.sqrt(sums.squares / tl.maximum(sums.finite - 1, 1.0)).to(tl.float32)
    edge = cutoff(value, top, mass, entropy, deviation, KIND)
    # More than what the sums and the division by the temperature are rounded by.
    margin = 0.01
    if NEEDS_SUMS[KIND] >= 3:
        margin = 0.001 * (top - edge)
    high = key_of(edge + margin)
    if NEEDS_SUMS[KIND] == 0:
        # The largest logit is that of the sample only, where nobody has asked for sums.
        high = tl.where(summed, high, HIGHEST) if SUMS >= 1 else tl.full([], HIGHEST, tl.int32)
    return key_of(edge - margin), high


@triton.jit
def _bounds_of_rule(
    x, keys, top, sums, summed, shape, value, V,
    KIND: tl.constexpr, LEAST: tl.constexpr, SUMS: tl.constexpr, BRACKETED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A key below which a rule hardly keeps anything, and one from which it keeps all, from a sample and row's sums.

    Where a rule keeps what is near a centre they are keys of distances from it.
    """
    share = shape.sample.share
    centre = top
    high = tl.full([], HIGHEST, tl.int32)
    if GOAL[KIND] == NO_GOAL:
        bound, high = _bounds_of_cutoff(value, top, sums, summed, KIND, SUMS)
    elif GOAL[KIND] == COUNT_GOAL:
        most, fewest = _in_sample(value, share)
        bound = _bound_of_count(keys, most, BITS)
        if BRACKETED:
            if (most > shape.capacity * share) & (fewest >= 1):
                # Above it are fewer of the sample.
                _bound, high = _key_of_count(keys, fewest, BITS)
    elif GOAL[KIND] == ENTROPY_GOAL:
        most, fewest = _in_sample(tl.full([], TOP_H_TOKENS, tl.float64), share)
        bound = _bound_of_count(keys, most, BITS)
    elif GOAL[KIND] == DISTANCE_GOAL:
        centre = top - (sums.below / sums.mass).to(tl.float32)
        bound, high = _bounds_of_band(x, top, centre, sums.mass, value, share, V)
    else:
        tl.static_assert(GOAL[KIND] == MASS_GOAL, "a goal has no branch in _bounds_of_rule()")
        bound, high = _bounds_of_nucleus(x, top, sums.mass, value, share, V)
    bound = tl.where(bound > KEY_OF_INFINITY, KEY_OF_MINUS_INFINITY, bound)  # NaN is no bound
    if LEAST > 1:
        if GOAL[KIND] == DISTANCE_GOAL:
            bound = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
        else:
            most, fewest = _in_sample(tl.full([], LEAST, tl.float64), share)
            bound = tl.minimum(bound, _bound_of_count(keys, most, BITS))
    return bound, high, centre


@triton.jit
def _within_room(keys, bound, shape, BITS: tl.constexpr):
    """A bound that lets no more through than there is room for, as the sample tells."""
    room = tl.floor(_LIKELY_ROOM * shape.room * shape.sample.share)
    let_through = tl.sum((keys >= bound).to(tl.int32)).to(tl.float32)
    if (let_through > room) & (room >= 1):
        raised, _above = _key_of_count(keys, room, BITS)
        bound = tl.maximum(bound, raised)
    return bound


@triton.jit
def _bounds(
    x, row, top, sums, summed, shape, V, values, rules_ptr,
    KINDS: tl.constexpr, LEASTS: tl.constexpr, PLACES: tl.constexpr, SUMS: tl.constexpr, BRACKETED: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """What a row is, its bounds, and whether the lower one is of distances from a centre; notes the rules' values."""
    keys = key_of(x)
    bound = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
    high = bound
    centre = top
    banded = tl.full([], False, tl.int1)
    cut = banded  # whether a rule may have dropped something
    acting = tl.full([], 0, tl.int32)
    sealed = banded  # whether a later rule needs all that its predecessors leave
    for i in tl.static_range(len(KINDS)):
        value = rule_value(row, values, PLACES[i])
        active = is_active(value, V, KINDS[i], PLACES[i] >= 0)
        here = rules_ptr + RULE_WORDS * i
        tl.store(here, KINDS[i])
        tl.store(here + 1, LEASTS[i])
        tl.store((here + 2).to(tl.pointer_type(tl.float64)), tl.where(active, value, float("nan")))
        if NEEDS_SUMS[KINDS[i]] > 0:
            sealed = sealed | (active & cut)
        if active & (sealed == 0):
            mine, above, from_here = _bounds_of_rule(
                x, keys, top, sums, summed, shape, value, V, KINDS[i], LEASTS[i], SUMS, BRACKETED, BITS
            )  # fmt: skip
            if GOAL[KINDS[i]] == NO_GOAL and NEEDS_SUMS[KINDS[i]] == 0:
                # The largest logit is hardly in the sample: the true cut-off is higher.
                if summed == 0:
                    mine = _within_room(keys, mine, shape, BITS)
            bound = tl.maximum(bound, mine)
            high = tl.maximum(high, above)
            if GOAL[KINDS[i]] == DISTANCE_GOAL:
                bound = mine
                centre = from_here
                banded = banded | True
                sealed = sealed | True
        elif active:
            high = tl.full([], HIGHEST, tl.int32)
        if GOAL[KINDS[i]] == ENTROPY_GOAL:
            sealed = sealed | active
        cut = cut | active
        acting += active.to(tl.int32)
    test = keys
    if banded:
        test = key_of(-tl.abs(x - centre))
    # Both counts at once: the sample has fewer than 2 ** 16 tokens.
    counts = tl.sum((test >= bound).to(tl.int32) + ((test >= high).to(tl.int32) << 16))
    expected = (counts & 0xFFFF).to(tl.float32) / shape.sample.share
    state = tl.where(expected > shape.room, WHOLE, FEW)
    if BRACKETED:
        # Of many tokens most are kept for certain: only those at the edge are collected.
        sure = (counts >> 16).to(tl.float32) / shape.sample.share
        several = (expected > shape.capacity) & (high <= KEY_OF_INFINITY) & (high > bound)
        # What is kept for certain in a band is not the likeliest, of which other rules speak.
        several = several & ((banded == 0) | (acting == 1)) & (tl.abs(centre) < float("inf"))
        state = tl.where(several & (expected - sure <= shape.room), BRACKET, state)
    # The sample was divided roughly.
    spare = (tl.abs(number_of(bound)) + tl.abs(centre)) * 1e-6
    spare = tl.where(spare < float("inf"), spare, 0.0)
    bound = key_of(number_of(bound) - spare)
    high = tl.where(high <= KEY_OF_INFINITY, key_of(number_of(high) + spare), high)
    return tl.where(cut, state, FREE), bound, high, banded, centre


@triton.jit
def _draw_from_sample(row, x, counts, shape, samples, SAMPLE: tl.constexpr):
    """No more than the best sample of some tokens: what these have with all that their noise may come to."""
    seed, position = load_seed(row, samples)
    # A run is some octets.
    each: tl.constexpr = _GROUPS // OCTET
    flat = tl.arange(0, SAMPLE // _GROUPS)[:, None] * each + tl.arange(0, each)[None, :]
    run = flat // (RUN // OCTET) * shape.sample.runs // (SAMPLE // RUN)
    a, b, c, d = coarse_words(run * (RUN // OCTET) + flat % (RUN // OCTET), seed, position)
    pairs = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [SAMPLE // _GROUPS, _GROUPS // 2])
    coarse = tl.reshape(tl.join(pairs & 0xFFFF, pairs >> 16), [SAMPLE // _GROUPS, _GROUPS])
    return tl.max(tl.where(counts, least_sample(x, coarse), float("-inf")))


@triton.jit
def scale_and_offset(best, inverse):
    """What ``may_win`` asks for, where a sample of ``best`` is known."""
    offset = 16.001 - best * LOG2_E + tl.abs(best) * 1e-6
    # Beside NaN or infinity only such tokens may win, and where nothing is known all but -inf.
    offset = tl.where(best < float("inf"), offset, float("-inf"))
    return inverse * LOG2_E, tl.where(best > float("-inf"), offset, tl.where(best == best, 1e30, offset))


@triton.jit
def _undivided(x, divisor, margin):
    """About the logit that becomes ``x`` once it is divided, moved by more than all roundings in the way of a sign."""
    before = tl.clamp(x * divisor, -FLOAT32_MAX, FLOAT32_MAX)
    return tl.where(tl.abs(x) < float("inf"), before + margin * (tl.abs(before) * 1e-6 + divisor * 1e-38), x)


@triton.jit
def _reach(least, banded, centre, divisor):
    """From where to where the undivided logits of candidates are; a few more may be there."""
    low, up = least, tl.full([], float("inf"), tl.float32)
    if banded:
        # ``least`` is that of the negative distances.
        spare = (tl.abs(centre) - least) * 1e-6
        low, up = centre + least - spare, centre - least + spare
    return _undivided(low, divisor, -1.0), _undivided(up, divisor, 1.0)


@triton.jit
def _sure_between(high, banded, centre, row, maps):
    """Between which undivided logits those are that come to a key of at least ``high``, and whether that is certain.

    The division never changes the order, so that these are the first and the last of which it says so.
    """
    divisor = divisor_of(row, maps)
    near = tl.arange(0, 32) - 16
    distance = -number_of(high)
    from_here = tl.where(banded, centre - distance, number_of(high)) * divisor
    to_here = tl.where(banded, (centre + distance) * divisor, 0.0)
    first = key_of(from_here) + near
    last = key_of(to_here) + near
    x, y = scaled(number_of(first), row, maps), scaled(number_of(last), row, maps)
    test = tl.where(banded, -tl.abs(x - centre), x)
    least = tl.min(tl.where(key_of(test) >= high, first, HIGHEST))
    most = tl.max(tl.where(key_of(-tl.abs(y - centre)) >= high, last, LOWEST))
    certain = (tl.abs(from_here) < 1e38) & (tl.abs(to_here) < 1e38) & (least > tl.min(first)) & (least < HIGHEST)
    certain = certain & ((banded == 0) | ((most > LOWEST) & (most < tl.max(last))))
    return number_of(least), tl.where(banded, number_of(most), float("inf")), certain


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
    FITS: tl.constexpr, SAMPLE: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What a row is, and the bounds of its candidates."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    shape = Shape(
        W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, Sample(runs, sample_size, share)
    )  # fmt: skip
    samples = Samples(seeds_ptr, positions_ptr, stride_seed, stride_position)
    let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    scores = Scores(scores_ptr, stride_row, stride_token, V, shape.W)
    flat = tl.arange(0, SAMPLE // _GROUPS)[:, None] * _GROUPS + tl.arange(0, _GROUPS)[None, :]
    nothing = tl.full([], 0.0, tl.float64)
    sums = RowSums(nothing, nothing, nothing, nothing)
    summed = tl.full([], False, tl.int1)
    top_key = tl.full([], LOWEST, tl.int32)
    if SUMS >= 1:
        asked = sums_asked(row, V, values, maps, KINDS, PLACES, GREEDY)
        summed = asked > 0
        wait_for_launch(PDL)
        sample = tl.load(work + shape.pairs_at + flat, mask=flat < shape.sample.size, other=MINUS_INFINITY)
        sample = sample.to(tl.float32, bitcast=True)
        top = tl.max(sample)
        if summed:
            top, sums = load_sums(work + shape.sums_at, shape.tiles, asked, SUMS, TILES)
            store_row_sums(work + ROW_SUMS_AT, sums)
            # A NaN among the logits is one in the mass, and would be the largest key.
            top_key = tl.where(top == float("inf"), KEY_OF_INFINITY, HIGHEST)
            top_key = tl.where(sums.mass == sums.mass, key_of(top), top_key)
    else:
        sample = sampled(row, flat, shape.sample, scores, maps, OPS, MAX, SAMPLE) * inverse_of(row, maps)
        top = tl.max(sample)
    state, bound, high, banded, centre = _bounds(
        sample, row, top, sums, summed, shape, V, values, work + RULES_AT,
        KINDS, LEASTS, PLACES, SUMS, BRACKETED, BITS,
    )  # fmt: skip
    if GREEDY:
        if is_greedy(maps.temperature_ptr + row * maps.stride_temperature):
            state = tl.full([], FEW, tl.int32)
            bound = tl.max(key_of(sample))
            banded = tl.full([], False, tl.int1)
    if BRACKETED:
        first, last, certain = _sure_between(high, banded, centre, row, maps)
        state = tl.where((state == BRACKET) & (certain == 0), WHOLE, state)
        store_float(work + SURE_AT, tl.where(state == BRACKET, first, float("nan")))
        store_float(work + SURE_AT + 1, last)
    else:
        store_float(work + SURE_AT, tl.full([], float("nan"), tl.float32))
    if NORMALISE:
        state = tl.where(state == FREE, WHOLE, state)
    if seeds_ptr is not None:
        # Greedy rows have no sample, and their state is another.
        if (state == FREE) | (state == BRACKET):
            test = tl.where(banded, -tl.abs(sample - centre), sample)
            counts = (flat < shape.sample.size) & ((state == FREE) | (key_of(test) >= high))
            best = _draw_from_sample(row, sample, counts, shape, samples, SAMPLE)
            scale, offset = scale_and_offset(best, inverse_of(row, maps))
            store_float(work + SCALE_AT, scale)
            store_float(work + OFFSET_AT, offset)
    if FITS:
        # Its largest logit may be beyond float16: what is kept for certain is written before it is known.
        risky = (divisor_of(row, maps) < _LEAST_SAFE) & ((state == FREE) | (state == BRACKET))
        state = tl.where(risky, WHOLE, state)
    tl.store(work + STATE_AT, state)
    tl.store(work + BOUND_AT, bound)
    tl.store(work + BANDED_AT, banded.to(tl.int32))
    store_float(work + CENTRE_AT, centre)
    tl.store(work + COUNT_AT, 0)
    tl.store(work + DONE_AT, 0)
    low, up = _reach(number_of(bound), banded, centre, divisor_of(row, maps))
    store_float(work + REACH_AT, low)
    store_float(work + REACH_AT + 1, up)
    # No number is above that of NaN.
    tl.store(work + HIGH_AT, tl.where(state == FEW, HIGHEST, high))
    store_float(work + TOP_AT, top)
    tl.store(work + TOP_KEY_AT, top_key)
