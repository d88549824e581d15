"""Fold, truncate and draw in two launches: find the few tokens of a row that count, then settle among them.

    x = fold(scores) / temperature;  for rule in rules: drop what it drops;  out = x or the fill, or a token

The first launch, the sweep, splits each row over some programs. Each reads a sample of the row, some thousand logits,
and takes from it a bound which hardly any token below can survive. Then it reads its part of the row once, writes the
fill value everywhere, adds up what the rules ask of a whole row, and puts by the tokens above the bound. The second
launch, one program a row, applies the rules to these few, by bisection on the bits of the logits, and writes the
survivors.

A bound is a guess that the second launch verifies: where too many tokens are above it, or a rule would keep one below,
that program works on the whole row instead, with the same arithmetic. So the result never depends on the guess, nor on
how a row was split, on the batch around it, or on the order in which tokens were put by: probabilities are added up as
integers of 2 ** -37 of the largest one.

Bytes moved: one read and one write of the logits (no write for a token), and at most 3 % for the tokens put by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastlogits_kernels._triton import HAS_TRITON, Launcher, empty_out, row_stride, tl, to_device, triton
from fastlogits_kernels.bits import words
from fastlogits_kernels.fold import NOWHERE, Chain, find_sets, fold_logits
from fastlogits_kernels.token_sets import Position, TokenSets
from fastlogits_kernels.truncate import Rule

TOP_K = tl.constexpr(0)
TOP_P = tl.constexpr(1)
MIN_P = tl.constexpr(2)
TYPICAL = tl.constexpr(3)
EPSILON = tl.constexpr(4)
ETA = tl.constexpr(5)
TOP_H = tl.constexpr(6)
TOP_N_SIGMA = tl.constexpr(7)
_KINDS = {"top_k": 0, "top_p": 1, "min_p": 2, "typical": 3, "epsilon": 4, "eta": 5, "top_h": 6, "top_n_sigma": 7}
_TOP_H_TOKENS = tl.constexpr(100)

# What a row is, in the first word of its workspace; the second is its bound.
FEW = tl.constexpr(0)  # its candidates were put by
WHOLE = tl.constexpr(1)  # they would be too many
FREE = tl.constexpr(2)  # no rule says anything of it

# The workspace of a row, in words of 32 bits: what it is, its bound, whether that is one of distances, and their
# centre, how many candidates there are; sums of each tile; the best token of each tile, and its key; and the
# candidates, each with its token.
_SUMS_AT = tl.constexpr(8)
_SUMS = tl.constexpr(6)

# Keys: integers in the order of float32 numbers.
_LOWEST = tl.constexpr(-(2**31))  # below all
_KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
_KEY_OF_INFINITY = tl.constexpr(2139095040)

_FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_LOG2_E = tl.constexpr(1.4426950408889634)
_TILE_W = tl.constexpr(64)  # mask words of a tile, 32 logits each
_FEW = tl.constexpr(512)  # candidates that most rows have no more of
_MANY = tl.constexpr(4096)  # candidates that a row may have
_BLOCK = tl.constexpr(4096)  # where there are more, so many tokens are looked at at a time
_STEPS = tl.constexpr(64)  # of a histogram
_GROUPS = tl.constexpr(64)  # of a sample
_ONE = tl.constexpr(float(2**37))  # the largest probability of a row, as an integer

# What a search adds up.
_COUNT = tl.constexpr(0)
_MASS = tl.constexpr(1)
_SURPRISE = tl.constexpr(2)


@triton.jit
def _key(x):
    """Integers in the order of float32 numbers: NaN is the largest, and the zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def _number(key):
    """The number of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _weight(x, top):
    """Probabilities relative to that of ``top``, as integers; 0 for what has none."""
    p = _exp(x - top)
    return tl.where(p == p, p * _ONE, 0.0).to(tl.int64)


@triton.jit
def _is_greedy(temperature_ptr):
    temperature = tl.load(temperature_ptr).to(tl.float32)
    return ((temperature > 0) & (temperature < float("inf"))) == 0


@triton.jit
def _read(row, token, inside, access):
    """Logits as they are given."""
    here = access[0] + row * access[8] + token.to(tl.int64) * access[9]
    return tl.load(here, mask=inside, other=float("-inf"))


@triton.jit
def _folded(x, row, word, lane, token, inside, V, access, OPS: tl.constexpr, MAX: tl.constexpr):
    """What the chain and the temperature make of given logits; -inf beyond the end of the row."""
    (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, _stride_row, _stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    ) = access  # fmt: skip
    # Between maps the logits are rounded to the dtype whose largest number is said; to float32 for a draw.
    dtype: tl.constexpr = tl.float32 if MAX == _FLOAT32_MAX else scores_ptr.dtype.element_ty
    x = fold_logits(
        x.to(tl.float32), row, word, lane, token, inside,
        bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        V, W, stride_set, stride_bits_row, stride_plane, stride_values_row,
        dtype, OPS, MAX,
    )  # fmt: skip
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row * stride_temperature).to(tl.float32)
        warm = (temperature > 0) & (temperature < float("inf"))
        x = tl.where(warm, tl.div_rn(x, tl.where(warm, temperature, 1.0)), x)
    if len(OPS) > 0:
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def _logits(row, word, lane, token, inside, V, access, OPS: tl.constexpr, MAX: tl.constexpr):
    return _folded(_read(row, token, inside, access), row, word, lane, token, inside, V, access, OPS, MAX)


@triton.jit
def _value(row, values, AT: tl.constexpr):
    """The parameter of a rule in a row, float64; ``values`` are those of all rules, then what differs by row."""
    return tl.load(values[0] - AT - 1) if AT < 0 else tl.load(values[AT + 1] + row).to(tl.float64)


@triton.jit
def _is_active(value, V, KIND: tl.constexpr, PER_ROW: tl.constexpr):
    """Whether a rule of that parameter may drop anything; never for NaN."""
    if KIND == TOP_K:
        active = (value >= 1) & (value < V)
    elif KIND == TOP_P:
        active = (value >= 0) & (value < 1)
    elif KIND == MIN_P:
        active = (value > 0) & (value <= 1)
    elif KIND == TOP_H:
        active = (value > 0) & ((value < 1) if PER_ROW else (value <= 1))
    elif KIND == TOP_N_SIGMA:
        active = (value > 0) & (value < float("inf"))
    else:
        active = (value > 0) & (value < 1)
    return active


# -- Sums over a row ----------------------------------------------------------------------------------------------


@triton.jit
def _row_sums(work, tiles, SUMS: tl.constexpr, TILES: tl.constexpr):
    """Of a row: its largest logit, mass, mass times distance, number of finite logits, and squares of deviations.

    Masses are in units of the largest probability, distances those from the largest logit. All but that are float64.
    """
    tile = tl.arange(0, TILES)
    here = work + _SUMS_AT + _SUMS * tile
    there = tile < tiles
    tops = tl.load(here, mask=there, other=-8388608).to(tl.float32, bitcast=True)
    masses = tl.load(here + 1, mask=there, other=0).to(tl.float32, bitcast=True)
    top = tl.max(tops)
    apart = tl.where(tops > float("-inf"), top - tops, 0.0)
    share = tl.where(tops > float("-inf"), _exp(-apart), 0.0).to(tl.float64)
    mass = tl.sum(masses.to(tl.float64) * share)
    below, count, squares = mass, mass, mass
    if SUMS >= 2:
        belows = tl.load(here + 2, mask=there, other=0).to(tl.float32, bitcast=True)
        below = tl.sum((belows + apart * masses).to(tl.float64) * share)
    if SUMS >= 3:
        counts = tl.load(here + 3, mask=there, other=0).to(tl.float32, bitcast=True).to(tl.float64)
        means = tl.load(here + 4, mask=there, other=0).to(tl.float32, bitcast=True).to(tl.float64)
        each = tl.load(here + 5, mask=there, other=0).to(tl.float32, bitcast=True).to(tl.float64)
        count = tl.sum(counts)
        off = means - tl.sum(counts * means) / tl.maximum(count, 1.0)
        squares = tl.sum(each + counts * off * off)
    return top, mass, below, count, squares


# -- The bound, from a sample -------------------------------------------------------------------------------------


@triton.jit
def _bound_of_count(keys, count, BITS: tl.constexpr):
    """A key which at least ``count`` of the keys ``[N, _GROUPS]`` are not below, nearly the largest one."""
    if count <= _GROUPS // 2:
        # The count-th largest of the groups' largest keys is such a bound.
        largest = tl.max(keys, 0)
        above = tl.sum((largest[None, :] > largest[:, None]).to(tl.int32), 1)
        bound = tl.max(tl.where(above >= (count - 1).to(tl.int32), largest, _KEY_OF_MINUS_INFINITY))
    else:
        low = tl.full([], _KEY_OF_MINUS_INFINITY, tl.int64)
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
    low = tl.full([], _KEY_OF_MINUS_INFINITY, tl.int64)
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
    likely = _exp(-step * j.to(tl.float32))
    below = j[:, None] >= j[None, :]
    tail = tl.sum(tl.where(below, (counts * likely)[:, None], 0.0), 0)
    unsure = tl.sqrt(tl.sum(tl.where(below, (counts * likely * likely)[:, None], 0.0), 0))
    enough = tail + 3 * unsure + 5 * likely <= spare
    edge = tl.min(tl.where(enough, j, _STEPS))
    return tl.where(edge < _STEPS, _key(top - step * edge.to(tl.float32)), _KEY_OF_MINUS_INFINITY)


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
        bound = _bound_of_count(keys, _in_sample(tl.full([], _TOP_H_TOKENS, tl.float64), share), BITS)
    elif KIND == MIN_P:
        bound = _key(top + logarithm - 0.01)
    elif KIND == EPSILON:
        bound = _key(top + logarithm + tl.log(mass.to(tl.float32)) - 0.01)
    elif KIND == ETA:
        entropy = tl.log(mass.to(tl.float32)) + (below / mass).to(tl.float32)
        bound = _key(top + tl.minimum(logarithm, logarithm / 2 - entropy) + tl.log(mass.to(tl.float32)) - 0.01)
    elif KIND == TOP_N_SIGMA:
        deviation = tl.sqrt(squares / tl.maximum(count - 1, 1.0)).to(tl.float32)
        bound = _key(top - value.to(tl.float32) * deviation * 1.001)
    else:
        # Most of the mass that may go; not all, for a sample is only that.
        if KIND == TYPICAL:
            p = tl.where(x == x, _exp(x - top), 0.0)
            limit = ((1 - value) * 0.75 * mass * share).to(tl.float32)
            centre = top - (below / mass).to(tl.float32)
            bound = _bound_of_mass(_key(-tl.abs(x - centre)), p, limit, BITS)
        else:
            bound = _bound_of_nucleus(x, top, mass, value, share, V)
    if LEAST > 1:
        if KIND == TYPICAL:
            bound = tl.full([], _KEY_OF_MINUS_INFINITY, tl.int32)
        else:
            spared = _bound_of_count(keys, _in_sample(tl.full([], LEAST, tl.float64), share), BITS)
            bound = tl.minimum(bound, spared)
    return bound, centre


@triton.jit
def _bound(x, row, top, sums, share, capacity, V, values, RULES: tl.constexpr, BITS: tl.constexpr):
    """What a row is, its bound, and whether that is one of distances from a centre."""
    keys = _key(x)
    bound = tl.full([], _KEY_OF_MINUS_INFINITY, tl.int32)
    centre = top
    banded = tl.full([], False, tl.int1)
    cut = banded  # whether a rule may have dropped something
    sealed = banded  # whether a later rule needs all that its predecessors leave
    for i in tl.static_range(0, len(RULES), 3):
        value = _value(row, values, RULES[i + 2])
        active = _is_active(value, V, RULES[i], RULES[i + 2] >= 0)
        if (RULES[i] != TOP_K) and (RULES[i] != MIN_P) and (RULES[i] != TOP_H):
            sealed = sealed | (active & cut)
        if active & (sealed == 0):
            mine, from_here = _bound_of_rule(x, keys, top, sums, share, value, V, RULES[i], RULES[i + 1], BITS)
            mine = tl.where(mine > _KEY_OF_INFINITY, _KEY_OF_MINUS_INFINITY, mine)  # NaN is no bound
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
        test = _key(-tl.abs(x - centre))
    expected = tl.sum((test >= bound).to(tl.float32)) / share
    state = tl.where(expected > capacity, WHOLE, FEW)
    return tl.where(cut, state, FREE), bound, banded, centre


# -- The sweep ----------------------------------------------------------------------------------------------------


@triton.jit
def _noise(token, seed, position):
    """An exponential random number for each token, of a request's seed and position."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = token * 0
    a, b, c, d = tl.philox(
        seed, (token // 4).to(tl.uint32), (zero + low).to(tl.uint32), (zero + high).to(tl.uint32), zero.to(tl.uint32)
    )
    lane = token % 4
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    v = (word.to(tl.uint32).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    v = tl.minimum(v, 0.99999994)
    # -log1p(-v); where v is small the logarithm of 1 - v would lose it.
    return tl.where(v < 0.001, v * (1 + v * (0.5 + v * (1.0 / 3))), -tl.log(1 - v))


_UNALIGNED = [
    "bits_ptr", "planes_ptr", "biases_ptr", "row_values_ptr", "numbers_ptr", "work_ptr", "values_ptr",
    "temperature_ptr", "seeds_ptr", "positions_ptr", "tokens_ptr",
    "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7",
]  # fmt: skip
_STEPWISE = [
    "W", "stride_temperature", "stride_set", "stride_bits_row", "stride_plane", "stride_values_row", "stride_work",
    "tiles", "slots", "parts", "bests_at", "pairs_at", "apart", "sampled", "share", "capacity", "stride_seed",
    "stride_position",
]  # fmt: skip


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _sums_kernel(
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
    # Of each tile by itself, so that the sums don't depend on how the row is split.
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    word = tile * _TILE_W + tl.arange(0, _TILE_W)[:, None]
    lane = tl.arange(0, 32)[None, :]
    token = word * 32 + lane
    x = _logits(row, word, lane, token, token < V, V, access, OPS, MAX)
    here = work_ptr + row * stride_work + _SUMS_AT + _SUMS * tile
    top = tl.max(x)
    safe = tl.where(top > float("-inf"), top, 0.0)
    p = _exp(x - safe)
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


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _bound_kernel(
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
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    access = (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    # Runs of 8 tokens, evenly apart.
    flat = tl.arange(0, SAMPLE // _GROUPS)[:, None] * _GROUPS + tl.arange(0, _GROUPS)[None, :]
    token = (flat // 8) * apart + flat % 8
    sample = _logits(row, token >> 5, token & 31, token, (flat < sampled) & (token < V), V, access, OPS, MAX)
    if SUMS >= 1:
        top, mass, below, count, squares = _row_sums(work, tiles, SUMS, TILES)
    else:
        top = tl.max(sample)
        mass, below, count, squares = 0.0, 0.0, 0.0, 0.0
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    state, bound, banded, centre = _bound(
        sample, row, top, (mass, below, count, squares), share, capacity, V, values, RULES, BITS
    )  # fmt: skip
    if GREEDY:
        if _is_greedy(temperature_ptr + row * stride_temperature):
            state = tl.full([], FEW, tl.int32)
            bound = tl.max(_key(sample))
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


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _sweep_kernel(
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
    x = _logits(row, word, lane, token, inside, V, access, OPS, MAX)
    state = tl.load(work)
    least = _number(tl.load(work + 1))
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
                seed = tl.load(seeds_ptr + row * stride_seed)
                position = tl.load(positions_ptr + row * stride_position)
                noisy = tl.where(inside, _key(x - tl.log(_noise(token, seed, position))), _LOWEST)
                best = tl.max(noisy)
                tl.store(work + bests_at + 2 * part, best)
                tl.store(work + bests_at + 2 * part + 1, tl.min(tl.where(noisy == best, token, 0x7FFFFFFF)))


# -- Settling -----------------------------------------------------------------------------------------------------
#
# What is alive in a row is said by four numbers: tokens of a key above ``edge``, those at it whose rank is at least
# ``cut``, and of these those no further from ``centre`` than ``near`` says. Ranks order tokens that tie.


@triton.jit
def _alive(x, valid, rank, alive, BANDED: tl.constexpr):
    edge, cut, centre, near = alive
    key = _key(x)
    lives = valid & ((key > edge) | ((key == edge) & (rank >= cut)))
    if BANDED:
        lives = lives & (_key(-tl.abs(x - centre)) >= near)
    return lives


@triton.jit
def _term(x, top, mass):
    """What a token adds to the entropy."""
    p = _exp(x - top) / mass
    return tl.where(p > 0, tl.maximum(p * (tl.log(mass) + (top - x)), 0.0), 0.0)


@triton.jit
def _measure(
    x, valid, rank, alive, top, mass, tie,
    WHAT: tl.constexpr, DISTANCE: tl.constexpr, TIES: tl.constexpr, BANDED: tl.constexpr,
):  # fmt: skip
    """What a search orders tokens by, and what it adds up; ``tie`` is the key, centre or largest term it is about."""
    lives = _alive(x, valid, rank, alive, BANDED)
    key = _key(x)
    if TIES:
        lives = lives & (key == tie)
        key = rank
    if DISTANCE:
        key = _key(-tl.abs(x - tie))
    amount = tl.zeros_like(key).to(tl.int64)
    if WHAT == _MASS:
        amount = _weight(x, top)
    elif WHAT == _SURPRISE:
        amount = (_term(x, top, mass) / tie * _ONE).to(tl.int64)
    return key, lives, tl.where(lives, amount, 0)


@triton.jit
def _block(start, row, V, access, OPS: tl.constexpr, SETUP: tl.constexpr):
    """Logits, whether they are there, tokens, and ranks of a block of the row."""
    token = start + tl.arange(0, _BLOCK)
    valid = token < V
    x = _logits(row, token >> 5, token & 31, token, valid, V, access[0], OPS, SETUP[2])
    rank = token
    if SETUP[0]:
        rank = -token
    return x, valid, token, rank


@triton.jit
def _top(few, row, V, access, alive, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr):
    """The largest key alive, or below all."""
    if WHOLE:
        top = tl.full([], _LOWEST, tl.int32)
        for start in range(0, access[1], _BLOCK):
            x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
            top = tl.maximum(top, tl.max(tl.where(_alive(x, valid, rank, alive, SETUP[1]), _key(x), _LOWEST)))
    else:
        x, valid, token, rank = few
        top = tl.max(tl.where(_alive(x, valid, rank, alive, SETUP[1]), _key(x), _LOWEST))
    return top


@triton.jit
def _sums_of(x, valid, rank, alive, top, BANDED: tl.constexpr):
    lives = _alive(x, valid, rank, alive, BANDED)
    weight = tl.where(lives, _weight(x, top), 0)
    below = tl.where(weight > 0, _exp(x - top) * (top - x) * _ONE, 0.0).to(tl.int64)
    return tl.sum(lives.to(tl.int32)), tl.sum(weight), tl.sum(tl.where(lives, below, 0))


@triton.jit
def _sums(few, row, V, access, alive, top, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr):
    """Of what is alive: how many, their mass, and the mass times the distance from the top."""
    if WHOLE:
        count, mass, below = tl.full([], 0, tl.int32), tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
        for start in range(0, access[1], _BLOCK):
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
        for start in range(0, access[1], _BLOCK):
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
                tl.where(open_still, access[1], 0), middle.to(tl.int32), row, V, access, alive, top, mass, tie,
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
                high = tl.max(tl.where(between, key, _LOWEST)).to(tl.int64) + 1
    least = low.to(tl.int32)
    found = tl.full([], 0x7FFFFFFF, tl.int32)
    if WHOLE:
        for start in range(0, access[1], _BLOCK):
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
    cut = tl.where(keep < count, cut, _LOWEST)
    if edge == alive[0]:
        cut = tl.maximum(cut, alive[1])
    return (edge, cut, alive[2], alive[3])


@triton.jit
def _surprise(few, row, V, access, alive, top, mass, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr):
    """The largest term of the entropy of what is alive, and all of them in units of 2 ** -37 of it."""
    surprise = tl.full([], 0, tl.int64)
    if WHOLE:
        largest = tl.full([], 1e-38, tl.float32)
        for start in range(0, access[1], _BLOCK):
            x, valid, token, rank = _block(start, row, V, access, OPS, SETUP)
            term = tl.where(_alive(x, valid, rank, alive, SETUP[1]), _term(x, top, mass), 0.0)
            largest = tl.maximum(largest, tl.max(term))
        for start in range(0, access[1], _BLOCK):
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
    possible = _key(top - 103.0)
    if possible > alive[0]:
        alive = (possible, tl.full([], _LOWEST, tl.int32), alive[2], alive[3])
    count, mass, below = _sums(few, row, V, access, alive, top, WHOLE, OPS, SETUP)
    relative = (mass.to(tl.float64) / _ONE).to(tl.float32)
    largest, surprise = _surprise(few, row, V, access, alive, top, relative, WHOLE, OPS, SETUP)
    budget = (value * surprise.to(tl.float64)).to(tl.int64)
    if surprise > budget:
        # The first token that goes beyond the budget.
        floor = tl.full([], _KEY_OF_MINUS_INFINITY, tl.int32)
        found, c, s, c_above, s_above = _search(
            few, row, V, access, alive, top, relative, largest, floor, top_key, tl.full([], 1, tl.int32), budget + 1,
            count, surprise, _SURPRISE, False, False, WHOLE, OPS, SETUP,
        )  # fmt: skip
        each = tl.maximum((s - s_above) // tl.maximum(c - c_above, 1), 1)
        keep = tl.maximum((budget - s_above) // each, (1 - c_above).to(tl.int64)).to(tl.int32)
        if keep > 0:
            alive = _cut_ties(few, row, V, access, alive, found, keep, c - c_above, WHOLE, OPS, SETUP)
        else:
            alive = (found + 1, tl.full([], _LOWEST, tl.int32), alive[2], alive[3])
    return alive


@triton.jit
def _threshold(
    few, row, V, access, alive, top, value, relative, distance, uncut, row_sums,
    KIND: tl.constexpr, WHOLE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """The key below which a rule drops all, where it is one that says so; else one below all."""
    logarithm = tl.log(value)
    if KIND == MIN_P:
        edge = _key((top.to(tl.float64) + logarithm).to(tl.float32))
    elif KIND == EPSILON:
        edge = _key((top.to(tl.float64) + logarithm + tl.log(relative).to(tl.float64)).to(tl.float32))
    elif KIND == ETA:
        entropy = (tl.log(relative) + distance).to(tl.float64)
        cutoff = tl.minimum(logarithm, logarithm * 0.5 - entropy)
        edge = _key((top.to(tl.float64) + cutoff + tl.log(relative).to(tl.float64)).to(tl.float32))
    elif KIND == TOP_N_SIGMA:
        n, first, second = _squares(few, row, V, access, alive, top, WHOLE, OPS, SETUP)
        squares = second - first * first / tl.maximum(n, 1.0)
        if SETUP[3] >= 3:
            n = tl.where(uncut, row_sums[2], n)
            squares = tl.where(uncut, row_sums[3], squares)
        deviation = tl.sqrt(tl.where(squares > 0, squares, 0.0) / tl.maximum(n - 1, 1.0)).to(tl.float32)
        # Squares beyond float32 say nothing.
        known = (n > 1) & (squares.to(tl.float32) < float("inf"))
        edge = tl.where(known, _key(top - value.to(tl.float32) * deviation), _LOWEST)
    else:
        edge = tl.full([], _LOWEST, tl.int32)
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
    top = _number(top_key)
    count, mass, below = _sums(few, row, V, access, alive, top, WHOLE, OPS, SETUP)
    all_mass, all_below = mass, below
    if SETUP[3] >= 1:
        all_mass = tl.where(uncut, (row_sums[0] * _ONE).to(tl.int64), mass)
    if SETUP[3] >= 2:
        all_below = tl.where(uncut, (row_sums[1] * _ONE).to(tl.int64), below)
    relative = (all_mass.to(tl.float64) / _ONE).to(tl.float32)  # in units of the largest probability
    distance = (all_below.to(tl.float64) / all_mass.to(tl.float64)).to(tl.float32)
    edge = _threshold(
        few, row, V, access, alive, top, value, relative, distance, uncut, row_sums, KIND, WHOLE, OPS, SETUP
    )  # fmt: skip
    # How many tokens, and what mass of them, are to stay at least.
    goal, mass_goal = tl.full([], LEAST, tl.int32), nothing
    if KIND == TOP_K:
        goal = value.to(tl.int32)
    elif KIND == TOP_H:
        goal = tl.full([], _TOP_H_TOKENS, tl.int32)
    elif MASS:
        mass_goal = tl.ceil(value * all_mass.to(tl.float64)).to(tl.int64)
    if RANKED or (LEAST > 1):
        if (count >= goal) & (mass >= mass_goal):
            low, high = tl.full([], _KEY_OF_MINUS_INFINITY, tl.int32), top_key
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
                    edge = tl.where(found > _KEY_OF_INFINITY, _LOWEST, edge)
                if RANKED or (KIND == MIN_P):
                    alive = _cut_ties(few, row, V, access, alive, edge, keep, c - c_above, WHOLE, OPS, SETUP)
            open_below = open_below & (found > _KEY_OF_INFINITY)
        elif not RANKED:
            edge = tl.full([], _LOWEST, tl.int32)
    if not RANKED:
        edge = tl.minimum(edge, top_key)
        open_below = open_below & (edge < bound)
        if edge > alive[0]:
            alive = (edge, tl.full([], _LOWEST, tl.int32), alive[2], alive[3])
    if KIND == TOP_H:
        if open_below == 0:
            alive = _spend(few, row, V, access, alive, top_key, top, value, WHOLE, OPS, SETUP)
    return alive, top_key, open_below


@triton.jit
def _settle(
    few, row, V, access, values, bound, complete, top_key, row_sums,
    WHOLE: tl.constexpr, RULES: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Apply the rules: what is alive, and whether all that it takes was known.

    All tokens that aren't there are below ``bound``, or there are none where ``complete``. ``top_key`` is the largest
    key of the row, where its sums are known.
    """
    lowest = tl.full([], _LOWEST, tl.int32)
    alive = (lowest, lowest, tl.full([], 0.0, tl.float32), lowest)
    if SETUP[3] == 0:
        top_key = _top(few, row, V, access, alive, WHOLE, OPS, SETUP)
    open_below = complete == 0  # whether tokens below the bound may be alive
    uncut = tl.full([], True, tl.int1)  # whether no rule may have dropped anything yet
    failed = tl.full([], False, tl.int1)
    for i in tl.static_range(0, len(RULES), 3):
        value = _value(row, values, RULES[i + 2])
        active = _is_active(value, V, RULES[i], RULES[i + 2] >= 0)
        if (RULES[i] != TOP_K) and (RULES[i] != MIN_P):
            failed = failed | (active & (uncut == 0) & open_below)
        if RULES[i] == TOP_N_SIGMA:
            active = active & (top_key <= _KEY_OF_INFINITY) & (top_key > _KEY_OF_MINUS_INFINITY)
        elif RULES[i] != TOP_K:
            # Nothing is likely or unlikely beside NaN or an infinity.
            active = active & (top_key < _KEY_OF_INFINITY) & (top_key > _KEY_OF_MINUS_INFINITY)
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
    key = _key(x)
    if greedy == 0:
        key = _key(x - tl.log(_noise(token, seed, position)))
    key = tl.where(_alive(x, valid, rank, alive, BANDED), key, _LOWEST)
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
            top = _number(top_key)
            _count, mass, _below = _sums(few, row, V, access, alive, top, WHOLE, OPS, SETUP)
            log_mass = top + tl.log((mass.to(tl.float64) / _ONE).to(tl.float32))
            finite = (top_key > _KEY_OF_MINUS_INFINITY) & (top_key < _KEY_OF_INFINITY)
            log_mass = tl.where(finite, log_mass, float("nan"))
        here = out_ptr + row * stride_out
        if WHOLE:
            for start in range(0, access[1], _BLOCK):
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
            best, which = tl.full([], _LOWEST, tl.int32), tl.full([], 0, tl.int32)
            for start in range(0, access[1], _BLOCK):
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
    row, V, logits, pairs, found, values, bound, top_key, row_sums, greedy, alive, out_ptr, stride_out,
    stride_out_token, tokens_ptr, seed, position,
    RULES: tl.constexpr, NORMALISE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Settle a row of so many candidates; whether they were enough."""
    slot = tl.arange(0, SLOTS)
    valid = slot < found
    pair = tl.load(pairs + slot, mask=valid, other=0)
    x, token = pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32)
    rank = token
    if SETUP[0]:
        rank = -token
    few = (x, valid, token, rank)
    access = (logits, V)
    settled = greedy
    if greedy == 0:
        alive, settled = _settle(
            few, row, V, access, values, bound, found >= V, top_key, row_sums, False, RULES, OPS, SETUP
        )  # fmt: skip
    if settled:
        _emit(
            few, row, V, access, alive, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position, greedy,
            NORMALISE, False, OPS, SETUP,
        )  # fmt: skip
    return settled


@triton.jit
def _settle_all(
    row, V, access, values, bound, top_key, row_sums, greedy, alive, out_ptr, stride_out, stride_out_token,
    tokens_ptr, seed, position,
    RULES: tl.constexpr, NORMALISE: tl.constexpr, OPS: tl.constexpr, SETUP: tl.constexpr,
):  # fmt: skip
    """Settle a row by itself, block by block."""
    few = (0, 0, 0, 0)
    settled = greedy
    if greedy == 0:
        alive, settled = _settle(
            few, row, V, access, values, bound, True, top_key, row_sums, True, RULES, OPS, SETUP
        )  # fmt: skip
    _emit(
        few, row, V, access, alive, out_ptr, stride_out, stride_out_token, tokens_ptr, seed, position, greedy,
        NORMALISE, True, OPS, SETUP,
    )  # fmt: skip
    return settled


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _settle_kernel(
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
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    values = (values_ptr, r0, r1, r2, r3, r4, r5, r6, r7)
    state = tl.load(work)
    # A bound of distances says nothing of keys.
    bound = tl.where(tl.load(work + 2) != 0, _KEY_OF_MINUS_INFINITY, tl.load(work + 1))
    found = tl.load(work + 4)
    greedy = tl.full([], False, tl.int1)
    seed, position = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    if tokens_ptr is not None:
        seed = tl.load(seeds_ptr + row * stride_seed).to(tl.int64)
        position = tl.load(positions_ptr + row * stride_position).to(tl.int64)
        if temperature_ptr is not None:
            greedy = _is_greedy(temperature_ptr + row * stride_temperature)
    top_key = tl.full([], _LOWEST, tl.int32)
    row_sums = (tl.full([], 0.0, tl.float64), 0.0, 0.0, 0.0)
    if SUMS >= 1:
        top, mass, below, count, squares = _row_sums(work, tiles, SUMS, TILES)
        # A NaN among the logits is one in the mass, and would be the largest key.
        top_key = tl.where(mass == mass, _key(top), tl.where(top == float("inf"), _KEY_OF_INFINITY, 0x7FFFFFFF))
        row_sums = (mass, below, count, squares)

    if state == FREE:
        if tokens_ptr is not None:
            part = tl.arange(0, PARTS)
            best = tl.load(work + bests_at + 2 * part, mask=part < parts, other=_LOWEST)
            which = tl.load(work + bests_at + 2 * part + 1, mask=part < parts, other=0)
            tl.store(tokens_ptr + row, tl.min(tl.where(best == tl.max(best), which, 0x7FFFFFFF)).to(tl.int64))
    else:
        of_row = (state == WHOLE) | (found > slots)
        pairs = (work + pairs_at).to(tl.pointer_type(tl.int64))
        logits = (
            scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
            W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane,
            stride_values_row,
        )  # fmt: skip
        lowest = tl.full([], _LOWEST, tl.int32)
        all_alive = (lowest, lowest, tl.full([], 0.0, tl.float32), lowest)
        settled = tl.full([], False, tl.int1)
        if (of_row == 0) & (found <= _FEW):
            settled = _settle_few(
                row, V, logits, pairs, found, values, bound, top_key, row_sums, greedy, all_alive, out_ptr, stride_out,
                stride_out_token, tokens_ptr, seed, position, RULES, NORMALISE, OPS, SETUP, _FEW,
            )  # fmt: skip
        elif of_row == 0:
            settled = _settle_few(
                row, V, logits, pairs, found, values, bound, top_key, row_sums, greedy, all_alive, out_ptr, stride_out,
                stride_out_token, tokens_ptr, seed, position, RULES, NORMALISE, OPS, SETUP, _MANY,
            )  # fmt: skip
        if settled == 0:
            # More than could be put by, or a question that they leave open.
            settled = _settle_all(
                row, V, (logits, V), values, bound, top_key, row_sums, greedy, all_alive, out_ptr, stride_out,
                stride_out_token, tokens_ptr, seed, position, RULES, NORMALISE, OPS, SETUP,
            )  # fmt: skip


_sums_launcher = Launcher(_sums_kernel, num_warps=4, enable_fp_fusion=False)
_bound_launcher = Launcher(_bound_kernel, num_warps=16, enable_fp_fusion=False)
_sweep_launcher = Launcher(_sweep_kernel, num_warps=4, enable_fp_fusion=False)
# Two programs of a multiprocessor at once: what spills then is the way of rows that are settled as a whole.
_settle_launcher = Launcher(_settle_kernel, num_warps=8, enable_fp_fusion=False, maxnreg=128)

FORCE_KERNEL = False
"""Take the kernels for tensors on the CPU too; for tests, with Triton's interpreter."""

_MAX = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_MAX_RULES = 8
_SAMPLE = 8192
_BITS = 20
_BLOCK_W = 32
_SUMS_OF = {"top_p": 1, "epsilon": 1, "eta": 2, "typical": 2, "top_n_sigma": 3}


def is_selectable(scores: torch.Tensor, rules: Sequence[Rule]) -> bool:
    """Whether the kernels take these; what they don't take is rare, and torch's."""
    return (
        (FORCE_KERNEL or (scores.is_cuda and HAS_TRITON))
        and scores.dtype in _MAX
        and len(rules) <= _MAX_RULES
        and scores.shape[1] > 1
        # What a rule fills with another value counts for the next one.
        and (len(rules) <= 1 or all(rule.filter_value == -math.inf for rule in rules))
        and len({rule.ties for rule in rules if rule.kind in ("top_k", "top_p")}) <= 1
        and sum(rule.kind == "typical" for rule in rules) <= 1
        # Where next to nothing is dropped, all depends on how the smallest probabilities are rounded.
        and not any(_is_number(rule) and rule.kind == "top_p" and rule.value > 1 - 1e-6 for rule in rules)
        and not any(_is_number(rule) and rule.kind == "min_p" and 0 < rule.value < 1e-30 for rule in rules)
    )


def _is_number(rule: Rule) -> bool:
    return not isinstance(rule.value, torch.Tensor)


class Selection:
    """Rules as the kernels take them.

    Args:
        rules: the rules.
        V: tokens of the vocabulary.
        device: where the logits are.
        normalise: whether what stays is normalised, as ``log_softmax`` does it.
    """

    def __init__(self, rules: Sequence[Rule], V: int, device: torch.device, normalise: bool = False) -> None:
        rules = [rule for rule in rules if not _is_idle(rule, V)]
        self.rows = [rule.value for rule in rules if isinstance(rule.value, torch.Tensor)]
        numbers = [1.0 if isinstance(rule.value, torch.Tensor) else float(rule.value) for rule in rules]
        self.values = to_device(torch.tensor([*numbers, 0.0], dtype=torch.float64), device)
        flat: list[int] = []
        per_row = self.sums = 0
        self.may_be_free = True
        for index, rule in enumerate(rules):
            tensor = isinstance(rule.value, torch.Tensor)
            flat += [_KINDS[rule.kind], rule.min_tokens_to_keep, per_row if tensor else -1 - index]
            per_row += tensor
            if self.may_be_free:  # nothing may have been dropped before it
                self.sums = max(self.sums, _SUMS_OF.get(rule.kind, 0))
            self.may_be_free = self.may_be_free and tensor
        self.rules = tuple(flat)
        self.fill = rules[0].filter_value if rules else -math.inf
        self.first = any(rule.ties == "lowest" for rule in rules if rule.kind in ("top_k", "top_p"))
        self.banded = any(rule.kind == "typical" for rule in rules)
        self.normalise = normalise
        self.form = _forms.setdefault((self.rules, self.fill, self.first, normalise), len(_forms))


def _is_idle(rule: Rule, V: int) -> bool:
    """Whether a rule of one parameter for all rows drops nothing."""
    value = rule.value
    if isinstance(value, torch.Tensor):
        return False
    return {"top_k": value >= V, "min_p": value <= 0, "top_p": value >= 1, "top_n_sigma": value == math.inf}.get(
        rule.kind, False
    )


_forms: dict[object, int] = {}
_NO_CHAIN = Chain()


def launch_select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None = None,
    found: TokenSets | None = None,
    out: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> None:
    """Write what the rules keep of ``scores`` to ``out``, or a token of each row to ``tokens``: two launches."""
    B, V = scores.shape
    chain = chain or _NO_CHAIN
    W, tiles = words(V), -(-V // (32 * _TILE_W.value))
    # With the sums, at most 5 % of what the logits of a large vocabulary take.
    slots = min(_MANY.value, max(_FEW.value, V // 46 // 128 * 128))
    portable = not scores.is_cuda or torch.version.hip is not None
    apart = 8 * max(1, (V // 8) // (_SAMPLE // 8))
    sampled = min(V, _SAMPLE)
    parts = -(-W // _BLOCK_W)
    bests_at = _SUMS_AT.value + _SUMS.value * tiles
    pairs_at = bests_at + 2 * parts
    words_of_row = pairs_at + 2 * slots
    work = torch.empty((B, words_of_row), dtype=torch.int32, device=scores.device)
    stride_row, stride_token = scores.stride()
    stride_out, stride_out_token = (0, 0) if out is None else out.stride()
    bits, planes, row_values = (None, None, None) if found is None else found
    rows = [*selection.rows, None, None, None, None, None, None, None, None][:8]
    strides = (
        0 if temperature is None or temperature.ndim == 0 else temperature.stride(0),
        0 if bits is None else bits.stride(0), 0 if bits is None or bits.shape[1] == 1 else W,
        0 if planes is None else planes.stride(0),
        0 if row_values is None or row_values.shape[0] == 1 else row_values.stride(0),
        row_stride(seeds), row_stride(positions),
    )  # fmt: skip
    key = (
        scores.device, scores.dtype, V, chain.form, selection.form,
        scores.data_ptr() % 16, stride_row == 1, stride_row % 16, stride_row >> 31, stride_token,
        None if out is None else (
            out.data_ptr() % 16, out.dtype, stride_out == 1, stride_out % 16, stride_out >> 31, stride_out_token
        ),
        None if temperature is None else temperature.dtype,
        None if seeds is None or positions is None else (seeds.dtype, positions.dtype),
        tuple(row.dtype for row in selection.rows),
    )  # fmt: skip
    given = (scores, temperature, bits, planes, chain.biases, row_values, chain.kernel_numbers(scores.device))
    top = _MAX[scores.dtype if tokens is None else torch.float32]
    TILES = triton.next_power_of_2(tiles)
    if selection.sums:
        _sums_launcher(key, B * tiles, (
            *given, work,
            V, W, tiles,
            stride_row, stride_token, words_of_row, *strides[:5],
            chain.flat, top, selection.sums,
        ))  # fmt: skip
    _bound_launcher(key, B, (
        *given, selection.values, *rows,
        work,
        V, W, tiles, apart, sampled, sampled / V, float(0.95 * slots),
        stride_row, stride_token, words_of_row, *strides[:5],
        chain.flat, top, selection.rules, selection.sums, selection.normalise,
        tokens is not None and temperature is not None, _SAMPLE, _BITS, TILES,
    ))  # fmt: skip
    _sweep_launcher(key, B * parts, (
        *given, seeds, positions,
        out, work,
        V, W, slots, parts, bests_at, pairs_at,
        stride_row, stride_token, stride_out, stride_out_token, words_of_row, *strides,
        chain.flat, top, selection.fill, selection.banded, selection.may_be_free, _BLOCK_W, portable,
    ))  # fmt: skip
    setup = (selection.first, selection.banded, top, selection.sums)
    _settle_launcher(key, B, (
        *given, selection.values, *rows, seeds, positions, work,
        out, tokens,
        V, W, tiles, slots, parts, bests_at, pairs_at,
        stride_row, stride_token, stride_out, stride_out_token, words_of_row, *strides,
        chain.flat, top, selection.rules, selection.normalise, selection.sums, setup, TILES,
        triton.next_power_of_2(parts),
    ))  # fmt: skip


def select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None = None,
    input_ids: torch.Tensor | None = None,
    position: Position = NOWHERE,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scores`` ``[B, V]`` folded, and what the rules keep of them: a new contiguous tensor.

    Args:
        scores: float32, float16 or bfloat16 of any strides; never written.
        selection: the rules.
        chain: what is done to the logits before; None for nothing.
        input_ids: what the chain reads.
        position: likewise.
        allowed: likewise.
    """
    out = empty_out(scores)
    if scores.numel():
        found = None if chain is None else find_sets(scores, chain, input_ids, position, allowed)
        launch_select(scores, selection, chain, found, out=out)
    return out


def select_tokens(
    logits: torch.Tensor,
    selection: Selection,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None = None,
    chain: Chain | None = None,
    input_ids: torch.Tensor | None = None,
    position: Position = NOWHERE,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token drawn from what the rules keep of each row of ``logits`` ``[B, V]``, int64 ``[B]``.

    Args:
        logits: float32, float16 or bfloat16 of any strides, taken as float32; never written.
        selection: the rules.
        seeds: int64 ``[B]``, or of no dimensions.
        positions: likewise.
        temperature: what the logits are divided by, ``[B]`` or of no dimensions; rows of another than a positive finite
            number are greedy. None for 1.
        chain: what is done to the logits before; None for nothing.
        input_ids: what the chain reads.
        position: likewise.
        allowed: likewise.
    """
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.numel():
        found = None if chain is None else find_sets(logits, chain, input_ids, position, allowed)
        launch_select(
            logits, selection, chain, found, temperature=temperature, seeds=seeds, positions=positions, tokens=tokens
        )
    return tokens
