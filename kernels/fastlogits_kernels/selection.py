"""What the kernels of a selection share: the logits of a row, their order, their noise, and the workspace.

A rule is three constants: its kind, how many tokens it keeps at least, and where its parameter is found.
"""

from __future__ import annotations

import torch

from fastlogits_kernels._triton import tl, triton
from fastlogits_kernels.fold import fold_logits

TOP_K = tl.constexpr(0)
TOP_P = tl.constexpr(1)
MIN_P = tl.constexpr(2)
TYPICAL = tl.constexpr(3)
EPSILON = tl.constexpr(4)
ETA = tl.constexpr(5)
TOP_H = tl.constexpr(6)
TOP_N_SIGMA = tl.constexpr(7)
TOP_H_TOKENS = tl.constexpr(100)

# What a row is.
FEW = tl.constexpr(0)  # its candidates were put by
WHOLE = tl.constexpr(1)  # they would be too many
FREE = tl.constexpr(2)  # no rule says anything of it
BRACKET = tl.constexpr(3)  # as FEW, and tokens above them were taken for kept

# The workspace of a row, in words of 32 bits. First what it is, its bound, whether that is one of distances, and their
# centre, how many candidates there are, the key from which tokens are taken for kept, and the largest logit; then, once
# it is settled, what is alive, as settle.py says it. Then the sums of each tile; of each part, what it has drawn and
# what it has taken for kept; and the candidates, each with its token.
COUNT_AT = tl.constexpr(4)
HIGH_AT = tl.constexpr(5)
TOP_AT = tl.constexpr(6)
ALIVE_AT = tl.constexpr(8)
SUMS_AT = tl.constexpr(12)
SUM_WORDS = tl.constexpr(6)
# Of a part: the key of the best draw and its token, how many tokens were taken, their largest key, and their mass.
PART_WORDS = tl.constexpr(6)

# Keys: integers in the order of float32 numbers.
LOWEST = tl.constexpr(-(2**31))  # below all
HIGHEST = tl.constexpr(2**31 - 1)  # that of NaN
KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
KEY_OF_INFINITY = tl.constexpr(2139095040)

_FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
_LOG2_E = tl.constexpr(1.4426950408889634)
TILE_W = tl.constexpr(64)  # mask words of a tile, 32 logits each
FEW_SLOTS = tl.constexpr(512)  # candidates that most rows have no more of
MANY_SLOTS = tl.constexpr(4096)  # candidates that a row may have
ONE = tl.constexpr(float(2**37))  # the largest probability of a row, as an integer

UNALIGNED = [
    "bits_ptr", "planes_ptr", "biases_ptr", "row_values_ptr", "numbers_ptr", "work_ptr", "values_ptr",
    "temperature_ptr", "seeds_ptr", "positions_ptr", "tokens_ptr",
    "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7",
]  # fmt: skip
STEPWISE = [
    "W", "stride_temperature", "stride_set", "stride_bits_row", "stride_plane", "stride_values_row", "stride_work",
    "tiles", "slots", "parts", "parts_at", "pairs_at", "runs", "sampled", "share", "capacity", "stride_seed",
    "stride_position",
]  # fmt: skip


@triton.jit
def key_of(x):
    """Integers in the order of float32 numbers: NaN is the largest, and the zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def number_of(key):
    """The number of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def wait_for_launch(PDL: tl.constexpr):
    """Wait until the launch before this one has written all; what was there before it may be read earlier."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def let_next_launch(PDL: tl.constexpr):
    """Let programs of the next launch take their places, as soon as all of this one have theirs."""
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )  # fmt: skip


@triton.jit
def exp(x):
    """The exponential."""
    return tl.exp2(x * _LOG2_E)


@triton.jit
def weight_of(x, top):
    """Probabilities relative to that of ``top``, as integers; 0 for what has none."""
    p = exp(x - top)
    return tl.where(p == p, p * ONE, 0.0).to(tl.int64)


@triton.jit
def is_greedy(temperature_ptr):
    """Whether a temperature, anything but a positive finite one, makes its row greedy."""
    temperature = tl.load(temperature_ptr).to(tl.float32)
    return ((temperature > 0) & (temperature < float("inf"))) == 0


@triton.jit
def row_logits(row, word, lane, token, inside, V, access, OPS: tl.constexpr, MAX: tl.constexpr):
    """Logits of a row as the chain and the temperature make them; -inf beyond its end."""
    (
        scores_ptr, temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, stride_row, stride_token, stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    ) = access  # fmt: skip
    here = scores_ptr + row * stride_row + token.to(tl.int64) * stride_token
    x = tl.load(here, mask=inside, other=float("-inf")).to(tl.float32)
    # Between maps the logits are rounded to the dtype whose largest number is said; to float32 for a draw.
    dtype: tl.constexpr = tl.float32 if MAX == _FLOAT32_MAX else scores_ptr.dtype.element_ty
    x = fold_logits(
        x, row, word, lane, token, inside,
        bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        V, W, stride_set, stride_bits_row, stride_plane, stride_values_row,
        dtype, OPS, MAX,
    )  # fmt: skip
    if temperature_ptr is not None:
        here = temperature_ptr + row * stride_temperature
        divisor = tl.where(is_greedy(here), 1.0, tl.load(here).to(tl.float32))
        x = tl.div_rn(x, divisor)
    if len(OPS) > 0:
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def rule_value(row, values, AT: tl.constexpr):
    """The parameter of a rule in a row, float64; ``values`` are those of all rules, then what differs by row."""
    return tl.load(values[0] - AT - 1) if AT < 0 else tl.load(values[AT + 1] + row).to(tl.float64)


@triton.jit
def is_active(value, V, KIND: tl.constexpr, PER_ROW: tl.constexpr):
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


@triton.jit
def is_summed(row, V, values, temperature_ptr, stride_temperature, RULES: tl.constexpr, GREEDY: tl.constexpr):
    """Whether anything reads the sums over a row: where the first rule that may drop something speaks of them.

    Temperatures by row make some rows greedy, where ``GREEDY`` says so; no rule is asked there.
    """
    summed = tl.full([], False, tl.int1)
    cut = summed
    for i in tl.static_range(0, len(RULES), 3):
        active = is_active(rule_value(row, values, RULES[i + 2]), V, RULES[i], RULES[i + 2] >= 0)
        if (RULES[i] != TOP_K) and (RULES[i] != MIN_P) and (RULES[i] != TOP_H):
            summed = summed | (active & (cut == 0))
        cut = cut | active
    if GREEDY:
        summed = summed & (is_greedy(temperature_ptr + row * stride_temperature) == 0)
    return summed


@triton.jit
def sums_of_row(work, tiles, SUMS: tl.constexpr, TILES: tl.constexpr):
    """Of a row: its largest logit, mass, mass times distance, number of finite logits, and squares of deviations.

    Masses are in units of the largest probability, distances those from the largest logit. All but that are float64.
    """
    tile = tl.arange(0, TILES)
    here = work + SUMS_AT + SUM_WORDS * tile
    there = tile < tiles
    tops = tl.load(here, mask=there, other=-8388608).to(tl.float32, bitcast=True)
    masses = tl.load(here + 1, mask=there, other=0).to(tl.float32, bitcast=True)
    top = tl.max(tops)
    apart = tl.where(tops > float("-inf"), top - tops, 0.0)
    share = tl.where(tops > float("-inf"), exp(-apart), 0.0).to(tl.float64)
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


@triton.jit
def noise_of(token, seed, position):
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
def put_by(candidate, x, token, counter, pairs, slots, PORTABLE: tl.constexpr):
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
