"""From logits to candidates: sums over a row, a bound from a sample of it, and the sweep that puts tokens by."""

from __future__ import annotations

from fastlogits_kernels._triton import tl, triton
from fastlogits_kernels.selection import (
    EPSILON,
    ETA,
    FEW,
    FREE,
    KEY_OF_INFINITY,
    KEY_OF_MINUS_INFINITY,
    LOWEST,
    MIN_P,
    STEPWISE,
    SUM_WORDS,
    SUMS_AT,
    TILE_W,
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
    key_of,
    noise_of,
    number_of,
    row_logits,
    rule_value,
    sums_of_row,
)

_STEPS = tl.constexpr(64)  # of a histogram
_GROUPS = tl.constexpr(64)  # of a sample


# -- The bound, from a sample -------------------------------------------------------------------------------------


@triton.jit
def _bound_of_count(keys, count, BITS: tl.constexpr):
    """A key which at least ``count`` of the keys ``[N, _GROUPS]`` are not below, nearly the largest one."""
    if count <= _GROUPS // 2:
        # The count-th largest of the groups' largest keys is such a bound.
        largest = tl.max(keys, 0)
        above = tl.sum((largest[None, :] > largest[:, None]).to(tl.int32), 1)
        bound = tl.max(tl.where(above >= (count - 1).to(tl.int32), largest, KEY_OF_MINUS_INFINITY))
    else:
        low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int64)
        high = tl.max(keys).to(tl.int64) + 1
        for _ in range(BITS):
            middle = (low + high) >> 1
            enough = tl.sum((keys >= middle.to(tl.int32)).to(tl.int32)) >= count
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        bound = low.to(tl.int32)
    return bound


@triton.jit
def _bound_of_mass(keys, p, limit, BITS: tl.constexpr):
    """A key which at most the mass ``limit`` of the probabilities ``p`` is below, nearly the largest one."""
    low = tl.full([], KEY_OF_MINUS_INFINITY, tl.int64)
    high = tl.max(keys).to(tl.int64) + 1
    for _ in range(BITS):
        middle = (low + high) >> 1
        little = tl.sum(tl.where(keys < middle.to(tl.int32), p, 0.0)) <= limit
        low = tl.where(little, middle, low)
        high = tl.where(little, high, middle)
    return low.to(tl.int32)


@triton.jit
def _bound_of_nucleus(x, top, mass, p, share, V):
    """A key below which the nucleus hardly reaches.

    The sample is counted in steps of the logit. All of a step are taken for as likely as its likeliest, and to what
    they add up to comes what the sample may have missed: three standard deviations, and five tokens at the edge.
    """
    spare = (1 - p).to(tl.float32) * mass.to(tl.float32) * share
    step = (tl.log(V / tl.maximum((1 - p).to(tl.float32) * mass.to(tl.float32), 1e-30)) + 2) / (_STEPS - 1)
    step = tl.maximum(step, 1e-6)
    at = tl.minimum(tl.maximum((top - x) / step, 0.0), _STEPS - 1.0)
    counts = tl.histogram(tl.reshape(at.to(tl.int32), [x.shape[0] * x.shape[1]]), _STEPS).to(tl.float32)
    j = tl.arange(0, _STEPS)
    likely = exp(-step * j.to(tl.float32))
    below = j[:, None] >= j[None, :]
    tail = tl.sum(tl.where(below, (counts * likely)[:, None], 0.0), 0)
    unsure = tl.sqrt(tl.sum(tl.where(below, (counts * likely * likely)[:, None], 0.0), 0))
    enough = tail + 3 * unsure + 5 * likely <= spare
    edge = tl.min(tl.where(enough, j, _STEPS))
    return tl.where(edge < _STEPS, key_of(top - step * edge.to(tl.float32)), KEY_OF_MINUS_INFINITY)


@triton.jit
def _in_sample(count, share):
    """So many of a sample at most are among the ``count`` largest of the row, as good as always."""
    expected = (count * share).to(tl.float32)
    return tl.minimum(count.to(tl.float32), tl.ceil(expected + 5 * tl.sqrt(expected) + 4))


@triton.jit
def _bound_of_rule(
    x, keys, top, sums, share, value, V, KIND: tl.constexpr, LEAST: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """A key below which a rule hardly keeps anything, from a sample and the sums over the row.

    For typical tokens it is one of distances, from a centre.
    """
    mass, below, count, squares = sums
    centre = top
    logarithm = tl.log(value.to(tl.float32))
    if KIND == TOP_K:
        bound = _bound_of_count(keys, _in_sample(value, share), BITS)
    elif KIND == TOP_H:
        bound = _bound_of_count(keys, _in_sample(tl.full([], TOP_H_TOKENS, tl.float64), share), BITS)
    elif KIND == MIN_P:
        bound = key_of(top + logarithm - 0.01)
    elif KIND == EPSILON:
        bound = key_of(top + logarithm + tl.log(mass.to(tl.float32)) - 0.01)
    elif KIND == ETA:
        entropy = tl.log(mass.to(tl.float32)) + (below / mass).to(tl.float32)
        bound = key_of(top + tl.minimum(logarithm, logarithm / 2 - entropy) + tl.log(mass.to(tl.float32)) - 0.01)
    elif KIND == TOP_N_SIGMA:
        deviation = tl.sqrt(squares / tl.maximum(count - 1, 1.0)).to(tl.float32)
        bound = key_of(top - value.to(tl.float32) * deviation * 1.001)
    elif KIND == TYPICAL:
        # Most of the mass that may go; not all, for a sample is only that.
        p = tl.where(x == x, exp(x - top), 0.0)
        limit = ((1 - value) * 0.75 * mass * share).to(tl.float32)
        centre = top - (below / mass).to(tl.float32)
        bound = _bound_of_mass(key_of(-tl.abs(x - centre)), p, limit, BITS)
    else:
        bound = _bound_of_nucleus(x, top, mass, value, share, V)
    if LEAST > 1:
        if KIND == TYPICAL:
            bound = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
        else:
            spared = _bound_of_count(keys, _in_sample(tl.full([], LEAST, tl.float64), share), BITS)
            bound = tl.minimum(bound, spared)
    return bound, centre


@triton.jit
def _bound(x, row, top, sums, share, capacity, V, values, RULES: tl.constexpr, BITS: tl.constexpr):
    """What a row is, its bound, and whether that is one of distances from a centre."""
    keys = key_of(x)
    bound = tl.full([], KEY_OF_MINUS_INFINITY, tl.int32)
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
            mine, from_here = _bound_of_rule(x, keys, top, sums, share, value, V, RULES[i], RULES[i + 1], BITS)
            mine = tl.where(mine > KEY_OF_INFINITY, KEY_OF_MINUS_INFINITY, mine)  # NaN is no bound
            bound = tl.maximum(bound, mine)
            if RULES[i] == TYPICAL:
                bound = mine
                centre = from_here
                banded = banded | True
                sealed = sealed | True
        if RULES[i] == TOP_H:
            sealed = sealed | active
        cut = cut | active
    test = keys
    if banded:
        test = key_of(-tl.abs(x - centre))
    expected = tl.sum((test >= bound).to(tl.float32)) / share
    state = tl.where(expected > capacity, WHOLE, FEW)
    return tl.where(cut, state, FREE), bound, banded, centre


# -- The launches -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def sums_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    # output
    work_ptr,
    # shapes
    V, W, tiles,
    # strides
    stride_row, stride_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Sums over a tile of a row, by itself: so they don't depend on how the row is split."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
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
    V, W, tiles, apart, sampled, share, capacity,
    # strides
    stride_row, stride_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, RULES: tl.constexpr, SUMS: tl.constexpr, NORMALISE: tl.constexpr,
    GREEDY: tl.constexpr, SAMPLE: tl.constexpr, BITS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What a row is, and the bound of its candidates."""
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    # Runs of 8 tokens, evenly apart.
    flat = tl.arange(0, SAMPLE // _GROUPS)[:, None] * _GROUPS + tl.arange(0, _GROUPS)[None, :]
    token = (flat // 8) * apart + flat % 8
    sample = row_logits(row, token >> 5, token & 31, token, (flat < sampled) & (token < V), V, access, OPS, MAX)
    if SUMS >= 1:
        top, mass, below, count, squares = sums_of_row(work, tiles, SUMS, TILES)
    else:
        top = tl.max(sample)
        mass, below, count, squares = 0.0, 0.0, 0.0, 0.0
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    state, bound, banded, centre = _bound(
        sample, row, top, (mass, below, count, squares), share, capacity, V, values, RULES, BITS
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
    tl.store(work + 4, 0)


# Four tokens of a thread: hardly any thread has a candidate, and those that have none are done with one branch. Triton
# itself would make an atomic addition and a store for each token, which takes longer than all the rest of the sweep.
_PUT_BY = tl.constexpr("""{
    .reg .pred none, there;
    .reg .b32 count, place;
    .reg .b64 to;
    mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;
    add.s32 count, $4, $5; add.s32 count, count, $6; add.s32 count, count, $7;
    setp.eq.s32 none, count, 0;
    @none bra done;
    atom.relaxed.gpu.global.add.u32 place, [$16], count;
    setp.ne.s32 there, $4, 0; setp.lt.and.u32 there, place, $24, there;
    mad.wide.u32 to, place, 8, $20; @there st.global.v2.b32 [to], {$8, $12}; add.u32 place, place, $4;
    setp.ne.s32 there, $5, 0; setp.lt.and.u32 there, place, $24, there;
    mad.wide.u32 to, place, 8, $20; @there st.global.v2.b32 [to], {$9, $13}; add.u32 place, place, $5;
    setp.ne.s32 there, $6, 0; setp.lt.and.u32 there, place, $24, there;
    mad.wide.u32 to, place, 8, $20; @there st.global.v2.b32 [to], {$10, $14}; add.u32 place, place, $6;
    setp.ne.s32 there, $7, 0; setp.lt.and.u32 there, place, $24, there;
    mad.wide.u32 to, place, 8, $20; @there st.global.v2.b32 [to], {$11, $15};
    done:
}""")
_PUT_BY_OPERANDS = tl.constexpr("=r,=r,=r,=r" + 12 * ",r" + 8 * ",l" + 4 * ",r")


@triton.jit
def _put_by(candidate, x, token, counter, pairs, slots, PORTABLE: tl.constexpr):
    """Put candidates by, each as 64 bits: its token above its logit."""
    bits = x.to(tl.int32, bitcast=True)
    if PORTABLE:
        place = tl.atomic_add(counter + tl.zeros_like(token), 1, mask=candidate, sem="relaxed")
        here = pairs + 2 * place
        tl.store(here, bits, mask=candidate & (place < slots))
        tl.store(here + 1, token, mask=candidate & (place < slots))
    else:
        tl.inline_asm_elementwise(
            _PUT_BY, _PUT_BY_OPERANDS,
            [candidate.to(tl.int32), bits, token, counter.to(tl.int64), pairs.to(tl.int64), slots],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def sweep_kernel(
    # inputs
    scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    seeds_ptr, positions_ptr,
    # outputs
    out_ptr, work_ptr,
    # shapes
    V, W, slots, parts, bests_at, pairs_at,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_work,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row, stride_seed, stride_position,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, BANDED: tl.constexpr, MAY_BE_FREE: tl.constexpr,
    BLOCK_W: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """The fill value for a part of a row, and its candidates put by."""
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
    state = tl.load(work)
    least = number_of(tl.load(work + 1))
    if out_ptr is not None:
        kept = tl.full(x.shape, FILL, tl.float32)
        if MAY_BE_FREE:
            kept = tl.where(state == FREE, x, kept)
        here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
        tl.store(here, kept.to(out_ptr.dtype.element_ty), mask=inside)
    test = x
    if BANDED:
        centre = tl.load(work + 3).to(tl.float32, bitcast=True)
        test = tl.where(tl.load(work + 2) != 0, -tl.abs(x - centre), x)
    candidate = (inside & ((test < least) == 0) & (state == FEW)).to(tl.int32) != 0
    _put_by(candidate, x, token, work + 4, work + pairs_at, slots, PORTABLE)
    if MAY_BE_FREE:
        if seeds_ptr is not None:
            if state == FREE:
                seed = tl.load(seeds_ptr + row * stride_seed).to(tl.int64)
                position = tl.load(positions_ptr + row * stride_position).to(tl.int64)
                noisy = tl.where(inside, key_of(x - tl.log(noise_of(token, seed, position))), LOWEST)
                best = tl.max(noisy)
                tl.store(work + bests_at + 2 * part, best)
                tl.store(work + bests_at + 2 * part + 1, tl.min(tl.where(noisy == best, token, 0x7FFFFFFF)))
