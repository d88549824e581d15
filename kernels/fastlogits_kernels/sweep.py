"""From logits to candidates: sums over a row, a bound from a sample of it, and the sweep that puts tokens by."""

from __future__ import annotations

from fastlogits_kernels._triton import tl, triton
from fastlogits_kernels.selection import (
    BRACKET,
    COUNT_AT,
    EPSILON,
    ETA,
    FEW,
    FLOAT32_MAX,
    FREE,
    HIGH_AT,
    HIGHEST,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOG2_E,
    LOWEST,
    MIN_P,
    MINUS_INFINITY,
    PART_WORDS,
    REACH_AT,
    ROW_SUMS_AT,
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
    divisor_of,
    exp,
    folded,
    heated,
    inverse_of,
    is_active,
    is_greedy,
    key_of,
    let_next_launch,
    noise_of_words,
    number_of,
    put_by,
    put_plain_by,
    row_scores,
    rule_value,
    sums_asked,
    sums_of_row,
    wait_for_launch,
    weight_of,
)

# Of a thread's tokens four at a time are put by or looked up: a program of 128 threads has at least 512 of them.
_STEPS = tl.constexpr(256)  # of a histogram
_GROUPS = tl.constexpr(64)  # of a sample
_CHUNK = tl.constexpr(512)  # tokens of a sample that a program takes
_KEPT_W = tl.constexpr(16)  # so many words of a part are looked at at a time
_LISTED = tl.constexpr(512)  # so many tokens of a list are looked at at a time
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
    x, row, top, sums, share, capacity, room, V, values,
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
    # Both counts at once: the sample has fewer than 2 ** 16 tokens.
    counts = tl.sum((test >= bound).to(tl.int32) + ((keys >= high).to(tl.int32) << 16))
    expected = (counts & 0xFFFF).to(tl.float32) / share
    state = tl.where(expected > room, WHOLE, FEW)
    if BRACKETED:
        # Of many tokens most are kept for certain: only those at the edge are put by.
        sure = (counts >> 16).to(tl.float32) / share
        several = (expected > capacity) & (banded == 0) & (high <= KEY_OF_INFINITY) & (high > bound)
        state = tl.where(several & (expected - sure <= room), BRACKET, state)
    # The sample was divided roughly.
    spare = (tl.abs(number_of(bound)) + tl.abs(centre)) * 1e-6
    spare = tl.where(spare < float("inf"), spare, 0.0)
    bound = key_of(number_of(bound) - spare)
    high = tl.where(high <= KEY_OF_INFINITY, key_of(number_of(high) + spare), high)
    return tl.where(cut, state, FREE), bound, high, banded, centre


@triton.jit
def _sampled(row, flat, runs, sampled, V, access, OPS: tl.constexpr, MAX: tl.constexpr, SAMPLE: tl.constexpr):
    """Of the undivided logits of a row runs of 8, spread evenly over all of them; -inf beyond the sample's end."""
    token = (flat // 8) * runs // (SAMPLE // 8) * 8 + flat % 8
    inside = (flat < sampled) & (token < V)
    x = row_scores(row, token, inside, access)
    return folded(x, row, token >> 5, token & 31, token, inside, V, access, OPS, MAX)


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


# -- The launches -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def sums_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    values_ptr, r0, r1, r2, r3, r4, r5, r6, r7,
    # output
    work_ptr,
    # shapes
    V, W, tiles, runs, sampled, sample_at,
    # strides
    stride_row, stride_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, RULES: tl.constexpr, SUMS: tl.constexpr, GREEDY: tl.constexpr,
    SAMPLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of the row's sample, and sums over a tile by itself: so they don't depend on how the row is split."""
    # Nothing is known of the launch before but that it ends; the next one reads what all before it have written.
    wait_for_launch(PDL)
    let_next_launch(PDL)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    work = work_ptr + row * stride_work
    inverse = inverse_of(row, access)
    for start in range(tile * _CHUNK, sampled, tiles * _CHUNK):
        flat = start + tl.arange(0, _CHUNK)
        x = _sampled(row, flat, runs, sampled, V, access, OPS, MAX, SAMPLE) * inverse
        tl.store(work + sample_at + flat, x.to(tl.int32, bitcast=True))
    asked = sums_asked(row, V, values, temperature_ptr, stride_temperature, RULES, GREEDY)
    if asked > 0:
        word = tile * TILE_W + tl.arange(0, TILE_W)[:, None]
        lane = tl.arange(0, 32)[None, :]
        token = word * 32 + lane
        inside = token < V
        x = folded(row_scores(row, token, inside, access), row, word, lane, token, inside, V, access, OPS, MAX)
        here = work + SUMS_AT + SUM_WORDS * tile
        top = tl.max(x)
        off = x - tl.where(top > float("-inf"), top, 0.0)
        p = tl.exp2(off * (inverse * LOG2_E))
        # Of the other logits a product by the reciprocal serves.
        tl.store(here, heated(top, row, access).to(tl.int32, bitcast=True))
        tl.store(here + 1, tl.sum(p).to(tl.int32, bitcast=True))
        if SUMS >= 2:
            if asked >= 2:
                below = tl.sum(tl.where(p > 0, p * -off, 0.0)) * inverse
                tl.store(here + 2, below.to(tl.int32, bitcast=True))
        if SUMS >= 3:
            if asked >= 3:
                x = x * inverse
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
    V, W, tiles, runs, sampled, sample_at, share, capacity, room,
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
    flat = tl.arange(0, SAMPLE // _GROUPS)[:, None] * _GROUPS + tl.arange(0, _GROUPS)[None, :]
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    mass, below, count, squares = (tl.full([], 0.0, tl.float64),) * 4
    summed = tl.full([], False, tl.int1)
    if SUMS >= 1:
        asked = sums_asked(row, V, values, temperature_ptr, stride_temperature, RULES, GREEDY)
        summed = asked > 0
        wait_for_launch(PDL)
        sample = tl.load(work + sample_at + flat, mask=flat < sampled, other=MINUS_INFINITY)
        sample = sample.to(tl.float32, bitcast=True)
        top = tl.max(sample)
        if summed:
            top, mass, below, count, squares = sums_of_row(work, tiles, asked, SUMS, TILES)
            there = (work + ROW_SUMS_AT).to(tl.pointer_type(tl.float64))
            tl.store(there, mass)
            tl.store(there + 1, below)
            tl.store(there + 2, count)
            tl.store(there + 3, squares)
    else:
        sample = _sampled(row, flat, runs, sampled, V, access, OPS, MAX, SAMPLE) * inverse_of(row, access)
        top = tl.max(sample)
    state, bound, high, banded, centre = _bounds(
        sample, row, top, (mass, below, count, squares, summed), share, capacity, room, V, values, RULES, SUMS,
        BRACKETED, BITS,
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
    low, up = _reach(number_of(bound), banded, centre, divisor_of(row, access))
    tl.store(work + REACH_AT, low.to(tl.int32, bitcast=True))
    tl.store(work + REACH_AT + 1, up.to(tl.int32, bitcast=True))
    # No number is above that of NaN.
    tl.store(work + HIGH_AT, tl.where(state == FEW, HIGHEST, high))
    tl.store(work + TOP_AT, top.to(tl.int32, bitcast=True))


@triton.jit
def _keep_some(
    row, part, state, low, out_ptr, stride_out, stride_out_token, access, V, seeds_ptr, positions_ptr, stride_seed,
    stride_position, work, slots, parts_at, pairs_at,
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, MAY_BE_FREE: tl.constexpr, BRACKETED: tl.constexpr,
    BLOCK_W: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Keep what is kept for certain of a part of a row, all of it or what is above its candidates, and sum it up.

    Few tokens at a time: most rows don't come here, and what this takes of registers all programs have to spare.
    """
    lane = tl.arange(0, 32)[None, :]
    high = number_of(tl.load(work + HIGH_AT))
    count = tl.zeros([_KEPT_W, 32], tl.int32)
    largest, best = count + LOWEST, count + LOWEST
    which = count + HIGHEST
    mass = count.to(tl.int64)
    for start in range(0, BLOCK_W, _KEPT_W):
        word = part * BLOCK_W + start + tl.arange(0, _KEPT_W)[:, None]
        token = word * 32 + lane
        inside = token < V
        x = folded(row_scores(row, token, inside, access), row, word, lane, token, inside, V, access, OPS, MAX)
        hot = heated(x, row, access)
        taken = inside & (hot >= high)
        if MAY_BE_FREE:
            taken = inside & (taken | (state == FREE))
        if out_ptr is not None:
            here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
            tl.store(here, tl.where(taken, hot, FILL).to(out_ptr.dtype.element_ty), mask=inside)
        if BRACKETED:
            if state == BRACKET:
                near = inside & ((x < low) == 0) & (taken == 0)
                put_by(near, x, token, work + COUNT_AT, work + pairs_at, slots, PORTABLE)
                count += taken.to(tl.int32)
                largest = tl.maximum(largest, tl.where(taken, key_of(hot), LOWEST))
                top = tl.load(work + TOP_AT).to(tl.float32, bitcast=True)
                mass += tl.where(taken, weight_of(hot, top), 0)
        if seeds_ptr is not None:
            seed = tl.load(seeds_ptr + row * stride_seed).to(tl.int64)
            position = tl.load(positions_ptr + row * stride_position).to(tl.int64)
            key = key_of(hot - tl.log(noise_of_words(part * BLOCK_W + start, seed, position, _KEPT_W)))
            better = taken & (key > best)
            best = tl.where(better, key, best)
            which = tl.where(better, token, which)
    summary = work + parts_at + PART_WORDS * part
    if BRACKETED:
        if state == BRACKET:
            tl.store(summary + 2, tl.sum(count))
            tl.store(summary + 3, tl.max(largest))
            tl.store((summary + 4).to(tl.pointer_type(tl.int64)), tl.sum(mass))
    if seeds_ptr is not None:
        key = tl.max(best)
        tl.store(summary, key)
        tl.store(summary + 1, tl.min(tl.where(best == key, which, HIGHEST)))


@triton.jit
def _sweep_list(
    row, index, listed_ptr, spans_ptr, stride_span, values_ptr, banned_ptr, work, slots, pairs_at,
    ROOM: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Put by the candidates of a list of tokens that have values in place of their logits."""
    span_ptr = spans_ptr + row * stride_span + 2 * index
    first, count = tl.load(span_ptr), tl.load(span_ptr + 1)
    wait_for_launch(PDL)
    low = tl.load(work + REACH_AT).to(tl.float32, bitcast=True)
    up = tl.load(work + REACH_AT + 1).to(tl.float32, bitcast=True)
    for start in range(0, tl.where(tl.load(work) == FEW, count, 0), _LISTED):
        entry = start + tl.arange(0, _LISTED)
        place = row * ROOM + ((first + entry) & (ROOM - 1))
        token = tl.load(listed_ptr + place, mask=entry < count, other=0)
        x = tl.load(values_ptr + place, mask=entry < count, other=0.0)
        banned = (tl.load(banned_ptr + (token >> 5), mask=entry < count, other=0) >> (token & 31)) & 1
        candidate = (entry < count) & (banned == 0) & ((x < low) == 0) & ((x > up) == 0)
        put_by(candidate, x, token, work + COUNT_AT, work + pairs_at, slots, PORTABLE)


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def sweep_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    seeds_ptr, positions_ptr, listed_ptr, spans_ptr,
    # outputs
    out_ptr, work_ptr,
    # shapes
    V, W, slots, parts, all_lists, lists, parts_at, pairs_at,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row, stride_seed, stride_position,
    stride_span,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, BANDED: tl.constexpr, BRACKETED: tl.constexpr,
    MAY_BE_FREE: tl.constexpr, BLOCK_W: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The fill value for a part of a row, what is kept for certain, and its candidates put by.

    Where tokens that have values in place of their logits come as lists, the first programs look through these, and
    the others pass such tokens over.
    """
    let_next_launch(PDL)
    program = tl.program_id(0)
    # Of a chain that replaces such logits and bans others.
    LISTED: tl.constexpr = listed_ptr is not None
    if LISTED and (program < all_lists):
        row = (program // lists).to(tl.int64)
        _sweep_list(
            row, program % lists, listed_ptr, spans_ptr, stride_span, planes_ptr,
            bits_ptr + OPS[5] * stride_set + row * stride_bits_row, work_ptr + row * stride_work, slots, pairs_at,
            OPS[2] + 1, PORTABLE, PDL,
        )  # fmt: skip
    else:
        program -= all_lists
        row = (program // parts).to(tl.int64)
        part = program % parts
        work = work_ptr + row * stride_work
        access = (
            scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
            W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane,
            stride_values_row,
        )  # fmt: skip
        word = part * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
        lane = tl.arange(0, 32)[None, :]
        token = word * 32 + lane
        inside = token < V
        x = row_scores(row, token, inside, access)
        if not LISTED:
            x = folded(x, row, word, lane, token, inside, V, access, OPS, MAX)
        wait_for_launch(PDL)
        state = tl.load(work)
        low = tl.load(work + REACH_AT).to(tl.float32, bitcast=True)
        up = tl.load(work + REACH_AT + 1).to(tl.float32, bitcast=True)
        if (MAY_BE_FREE and (state == FREE)) or (BRACKETED and (state == BRACKET)):
            _keep_some(
                row, part, state, low, out_ptr, stride_out, stride_out_token, access, V, seeds_ptr, positions_ptr,
                stride_seed, stride_position, work, slots, parts_at, pairs_at,
                OPS, MAX, FILL, MAY_BE_FREE, BRACKETED, BLOCK_W, PORTABLE,
            )  # fmt: skip
        else:
            if out_ptr is not None:
                here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
                # Not of that dtype at once: the interpreter of Triton before 3.9 has no constants of bfloat16.
                fill = tl.full(token.shape, FILL, tl.float32).to(out_ptr.dtype.element_ty)
                tl.store(here, fill, mask=inside)
            if state == FEW:
                near = inside & ((x < low) == 0)
                if BANDED:
                    near = near & ((x > up) == 0)
                if LISTED:
                    sets_ptr = bits_ptr + row * stride_bits_row
                    edited_ptr, banned_ptr = sets_ptr + OPS[1] * stride_set, sets_ptr + OPS[5] * stride_set
                    put_plain_by(
                        near, x, token, edited_ptr, banned_ptr, work + COUNT_AT, work + pairs_at, slots, PORTABLE
                    )  # fmt: skip
                else:
                    put_by(near, x, token, work + COUNT_AT, work + pairs_at, slots, PORTABLE)
