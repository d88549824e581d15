"""From logits to candidates: sums over a row, a bound from a sample of it, and the sweep that puts tokens by."""

from __future__ import annotations

from fastlogits_kernels._triton import tl, triton
from fastlogits_kernels.selection import (
    BRACKET,
    COUNT_AT,
    EPSILON,
    ETA,
    FEW,
    FREE,
    HIGH_AT,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MIN_P,
    PART_WORDS,
    STEPWISE,
    SUM_WORDS,
    SUMS_AT,
    TILE_W,
    TOP_AT,
    TOP_H,
    TOP_H_TOKENS,
    TOP_K,
    TOP_N_SIGMA,
    TYPICAL,
    UNALIGNED,
    WHOLE,
    exp,
    is_active,
    is_greedy,
    is_summed,
    key_of,
    let_next_launch,
    noise_of,
    number_of,
    put_by,
    row_logits,
    rule_value,
    sums_of_row,
    wait_for_launch,
    weight_of,
)

_STEPS = tl.constexpr(256)  # of a histogram
_GROUPS = tl.constexpr(64)  # of a sample
_SURE = tl.constexpr(4.5)  # standard deviations by which a sample is trusted


# -- Bounds, from a sample ----------------------------------------------------------------------------------------


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
def _bound_of_mass(keys, p, goal, BITS: tl.constexpr):
    """A key which probabilities ``p`` of a mass of ``goal`` are not below, less what the sample may have by chance."""
    low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int64)
    high = tl.max(keys).to(tl.int64) + 1
    for _ in range(BITS):
        middle = (low + high) >> 1
        near = tl.where(keys >= middle.to(tl.int32), p, 0.0)
        enough = tl.sum(near) - 3 * tl.sqrt(tl.sum(near * near)) >= goal
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


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
def _in_sample(count, share):
    """So many of a sample at most, and at least, are among the ``count`` largest of the row, as good as always."""
    expected = (count * share).to(tl.float32)
    unsure = _SURE * tl.sqrt(expected * tl.maximum(1 - share, 0.0)) + 3
    return tl.minimum(count.to(tl.float32), tl.ceil(expected + unsure)), tl.floor(expected - unsure)


@triton.jit
def _bounds_of_rule(
    x, keys, top, sums, share, capacity, value, V,
    KIND: tl.constexpr, LEAST: tl.constexpr, SUMS: tl.constexpr, BRACKETED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """A key below which a rule hardly keeps anything, and one from which it keeps all, from a sample and row's sums.

    For typical tokens the lower one is one of distances, from a centre, and there is no other.
    """
    mass, below, count, squares, summed = sums
    centre = top
    logarithm = tl.log(value.to(tl.float32))
    high = tl.full([], HIGHEST, tl.int32)
    if KIND == TOP_K:
        most, fewest = _in_sample(value, share)
        bound = _bound_of_count(keys, most, BITS)
        if BRACKETED:
            if (most > capacity * share) & (fewest >= 1):
                # Above it are fewer of the sample.
                _bound, high = _key_of_count(keys, fewest, BITS)
    elif KIND == TOP_H:
        most, fewest = _in_sample(tl.full([], TOP_H_TOKENS, tl.float64), share)
        bound = _bound_of_count(keys, most, BITS)
    elif KIND == MIN_P:
        bound = key_of(top + logarithm - 0.01)
        if SUMS >= 1:  # else the largest logit is that of the sample only
            high = tl.where(summed, key_of(top + logarithm + 0.01), HIGHEST)
    elif KIND == EPSILON:
        bound = key_of(top + logarithm + tl.log(mass.to(tl.float32)) - 0.01)
        high = key_of(top + logarithm + tl.log(mass.to(tl.float32)) + 0.01)
    elif KIND == ETA:
        entropy = tl.log(mass.to(tl.float32)) + (below / mass).to(tl.float32)
        edge = top + tl.minimum(logarithm, logarithm / 2 - entropy) + tl.log(mass.to(tl.float32))
        bound, high = key_of(edge - 0.01), key_of(edge + 0.01)
    elif KIND == TOP_N_SIGMA:
        deviation = value.to(tl.float32) * tl.sqrt(squares / tl.maximum(count - 1, 1.0)).to(tl.float32)
        bound, high = key_of(top - deviation * 1.001), key_of(top - deviation * 0.999)
    elif KIND == TYPICAL:
        centre = top - (below / mass).to(tl.float32)
        # Of the likeliest a sample has too many or too few; where the others are not enough, it is no guide.
        p = tl.where(x < centre + 2.5, exp(x - top), 0.0)
        bound = _bound_of_mass(key_of(-tl.abs(x - centre)), p, (value * mass * share).to(tl.float32), BITS)
    else:
        bound, high = _bounds_of_nucleus(x, top, mass, value, share, V)
    bound = tl.where(bound > KEY_OF_INFINITY, KEY_OF_MINUS_INFINITY, bound)  # NaN is no bound
    if LEAST > 1:
        if KIND == TYPICAL:
            bound = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
        else:
            most, fewest = _in_sample(tl.full([], LEAST, tl.float64), share)
            bound = tl.minimum(bound, _bound_of_count(keys, most, BITS))
    return bound, high, centre


@triton.jit
def _bounds(
    x, row, top, sums, share, capacity, V, values,
    RULES: tl.constexpr, SUMS: tl.constexpr, BRACKETED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """What a row is, its bounds, and whether the lower one is of distances from a centre."""
    keys = key_of(x)
    bound = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
    high = bound
    centre = top
    banded = tl.full([], False, tl.int1)
    cut = banded  # whether a rule may have dropped something
    sealed = banded  # whether a later rule needs all that its predecessors leave
    for i in tl.static_range(0, len(RULES), 3):
        value = rule_value(row, values, RULES[i + 2])
        active = is_active(value, V, RULES[i], RULES[i + 2] >= 0)
        if (RULES[i] != TOP_K) and (RULES[i] != MIN_P) and (RULES[i] != TOP_H):
            sealed = sealed | (active & cut)
        if active & (sealed == 0):
            mine, above, from_here = _bounds_of_rule(
                x, keys, top, sums, share, capacity, value, V, RULES[i], RULES[i + 1], SUMS, BRACKETED, BITS
            )  # fmt: skip
            bound = tl.maximum(bound, mine)
            high = tl.maximum(high, above)
            if RULES[i] == TYPICAL:
                bound = mine
                centre = from_here
                banded = banded | True
                sealed = sealed | True
        elif active:
            high = tl.full([], HIGHEST, tl.int32)
        if RULES[i] == TOP_H:
            sealed = sealed | active
        cut = cut | active
    test = keys
    if banded:
        test = key_of(-tl.abs(x - centre))
    expected = tl.sum((test >= bound).to(tl.float32)) / share
    state = tl.where(expected > capacity, WHOLE, FEW)
    if BRACKETED:
        # Of many tokens most are kept for certain: only those at the edge are put by.
        sure = tl.sum((keys >= high).to(tl.float32)) / share
        several = (state == WHOLE) & (banded == 0) & (high <= KEY_OF_INFINITY) & (high > bound)
        state = tl.where(several & (expected - sure <= capacity), BRACKET, state)
    return tl.where(cut, state, FREE), bound, high, banded, centre


# -- The launches -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def sums_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    values_ptr, r0, r1, r2, r3, r4, r5, r6, r7,
    # output
    work_ptr,
    # shapes
    V, W, tiles,
    # strides
    stride_row, stride_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, RULES: tl.constexpr, SUMS: tl.constexpr, GREEDY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sums over a tile of a row, by itself: so they don't depend on how the row is split."""
    let_next_launch(PDL)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    if is_summed(row, V, values, temperature_ptr, stride_temperature, RULES, GREEDY):
        word = tile * TILE_W + tl.arange(0, TILE_W)[:, None]
        lane = tl.arange(0, 32)[None, :]
        token = word * 32 + lane
        x = row_logits(row, word, lane, token, token < V, V, access, OPS, MAX)
        here = work_ptr + row * stride_work + SUMS_AT + SUM_WORDS * tile
        top = tl.max(x)
        safe = tl.where(top > float("-inf"), top, 0.0)
        p = exp(x - safe)
        tl.store(here, top.to(tl.int32, bitcast=True))
        tl.store(here + 1, tl.sum(p).to(tl.int32, bitcast=True))
        if SUMS >= 2:
            below = tl.where(p > 0, p * (safe - x), 0.0)
            tl.store(here + 2, tl.sum(below).to(tl.int32, bitcast=True))
        if SUMS >= 3:
            finite = tl.abs(x) < float("inf")
            count = tl.sum(finite.to(tl.float32))
            mean = tl.sum(tl.where(finite, x, 0.0)) / tl.maximum(count, 1.0)
            off = tl.where(finite, x - mean, 0.0)
            tl.store(here + 3, count.to(tl.int32, bitcast=True))
            tl.store(here + 4, mean.to(tl.int32, bitcast=True))
            tl.store(here + 5, tl.sum(off * off).to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def bound_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    values_ptr, r0, r1, r2, r3, r4, r5, r6, r7,
    # output
    work_ptr,
    # shapes
    V, W, tiles, runs, sampled, share, capacity,
    # strides
    stride_row, stride_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, RULES: tl.constexpr, SUMS: tl.constexpr, NORMALISE: tl.constexpr,
    BRACKETED: tl.constexpr, GREEDY: tl.constexpr, SAMPLE: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What a row is, and the bounds of its candidates."""
    let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    # Runs of 8 tokens, spread evenly over all of them.
    flat = tl.arange(0, SAMPLE // _GROUPS)[:, None] * _GROUPS + tl.arange(0, _GROUPS)[None, :]
    token = (flat // 8) * runs // (SAMPLE // 8) * 8 + flat % 8
    sample = row_logits(row, token >> 5, token & 31, token, (flat < sampled) & (token < V), V, access, OPS, MAX)
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    top = tl.max(sample)
    sums = (0.0, 0.0, 0.0, 0.0, tl.full([], False, tl.int1))
    if SUMS >= 1:
        summed = is_summed(row, V, values, temperature_ptr, stride_temperature, RULES, GREEDY)
        wait_for_launch(PDL)
        row_top, mass, below, count, squares = sums_of_row(work, tiles, SUMS, TILES)
        top = tl.where(summed, row_top, top)
        sums = (mass, below, count, squares, summed)
    state, bound, high, banded, centre = _bounds(
        sample, row, top, sums, share, capacity, V, values, RULES, SUMS, BRACKETED, BITS
    )  # fmt: skip
    if GREEDY:
        if is_greedy(temperature_ptr + row * stride_temperature):
            state = tl.full([], FEW, tl.int32)
            bound = tl.max(key_of(sample))
            banded = tl.full([], False, tl.int1)
    if NORMALISE:
        state = tl.where(state == FREE, WHOLE, state)
    tl.store(work, state)
    tl.store(work + 1, bound)
    tl.store(work + 2, banded.to(tl.int32))
    tl.store(work + 3, centre.to(tl.int32, bitcast=True))
    tl.store(work + COUNT_AT, 0)
    # No number is above that of NaN.
    tl.store(work + HIGH_AT, tl.where(state == FEW, HIGHEST, high))
    tl.store(work + TOP_AT, top.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def sweep_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    seeds_ptr, positions_ptr,
    # outputs
    out_ptr, work_ptr,
    # shapes
    V, W, slots, parts, parts_at, pairs_at,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row, stride_seed, stride_position,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, BANDED: tl.constexpr, BRACKETED: tl.constexpr,
    MAY_BE_FREE: tl.constexpr, BLOCK_W: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The fill value for a part of a row, what is kept for certain, and its candidates put by."""
    let_next_launch(PDL)
    program = tl.program_id(0)
    row = (program // parts).to(tl.int64)
    part = program % parts
    work = work_ptr + row * stride_work
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    word = part * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    lane = tl.arange(0, 32)[None, :]
    token = word * 32 + lane
    inside = token < V
    x = row_logits(row, word, lane, token, inside, V, access, OPS, MAX)
    wait_for_launch(PDL)
    state = tl.load(work)
    least = number_of(tl.load(work + 1))
    taken = tl.full(x.shape, False, tl.int1)  # kept for certain
    if MAY_BE_FREE:
        taken = taken | (inside & (state == FREE))
    if BRACKETED:
        taken = taken | (inside & (x >= number_of(tl.load(work + HIGH_AT))) & (state == BRACKET))
    if out_ptr is not None:
        kept = tl.full(x.shape, FILL, tl.float32)
        if MAY_BE_FREE or BRACKETED:
            kept = tl.where(taken, x, kept)
        here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
        tl.store(here, kept.to(out_ptr.dtype.element_ty), mask=inside)
    test = x
    if BANDED:
        centre = tl.load(work + 3).to(tl.float32, bitcast=True)
        test = tl.where(tl.load(work + 2) != 0, -tl.abs(x - centre), x)
    put = (state == FEW) | (state == BRACKET)
    candidate = (inside & ((test < least) == 0) & put & (taken == 0)).to(tl.int32) != 0
    put_by(candidate, x, token, work + COUNT_AT, work + pairs_at, slots, PORTABLE)
    here = work + parts_at + PART_WORDS * part
    if BRACKETED:
        if state == BRACKET:
            top = tl.load(work + TOP_AT).to(tl.float32, bitcast=True)
            tl.store(here + 2, tl.sum(taken.to(tl.int32)))
            tl.store(here + 3, tl.max(tl.where(taken, key_of(x), LOWEST)))
            mass = tl.sum(tl.where(taken, weight_of(x, top), 0))
            tl.store((here + 4).to(tl.pointer_type(tl.int64)), mass)
    if MAY_BE_FREE or BRACKETED:
        if seeds_ptr is not None:
            if (state == FREE) | (state == BRACKET):
                seed = tl.load(seeds_ptr + row * stride_seed).to(tl.int64)
                position = tl.load(positions_ptr + row * stride_position).to(tl.int64)
                noisy = tl.where(taken, key_of(x - tl.log(noise_of(token, seed, position))), LOWEST)
                best = tl.max(noisy)
                tl.store(here, best)
                tl.store(here + 1, tl.min(tl.where(noisy == best, token, HIGHEST)))
