"""What the kernels of a selection share: the logits of a row, their order, their noise, and the workspace.

A rule is three constants: its kind, how many tokens it keeps at least, and where its parameter is found.
"""

from __future__ import annotations

import torch

from fastlogits_kernels._triton import tl, triton
from fastlogits_kernels.fold import fold_logits
from fastlogits_kernels.ptx import check_fours, for_four_tokens

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
# it is settled, what is alive, as settle.py says it; between which logits, before the temperature divides them, all
# candidates are; and the sums of the row. Then those of each tile; of each part, what it has drawn and what it has
# taken for kept; and the candidates, each with its token, or before them the row's sample.
COUNT_AT = tl.constexpr(4)
HIGH_AT = tl.constexpr(5)
TOP_AT = tl.constexpr(6)
ALIVE_AT = tl.constexpr(8)
REACH_AT = tl.constexpr(12)
ROW_SUMS_AT = tl.constexpr(14)  # four of 64 bits
SUMS_AT = tl.constexpr(22)
SUM_WORDS = tl.constexpr(6)
# Of a part: the key of the best draw and its token, how many tokens were taken, their largest key, and their mass.
PART_WORDS = tl.constexpr(6)

# Keys: integers in the order of float32 numbers.
LOWEST = tl.constexpr(-(2**31))  # below all
HIGHEST = tl.constexpr(2**31 - 1)  # that of NaN
MINUS_INFINITY = tl.constexpr(-8388608)  # its bits
KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
KEY_OF_INFINITY = tl.constexpr(2139095040)

FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
LOG2_E = tl.constexpr(1.4426950408889634)
TILE_W = tl.constexpr(64)  # mask words of a tile, 32 logits each
FEW_SLOTS = tl.constexpr(512)  # candidates that rows have no more of where a rule says so
SOME_SLOTS = tl.constexpr(1024)  # candidates that most rows have no more of
MANY_SLOTS = tl.constexpr(4096)  # candidates that are looked at at once
ONE = tl.constexpr(float(2**37))  # the largest probability of a row, as an integer

UNALIGNED = [
    "bits_ptr", "planes_ptr", "biases_ptr", "row_values_ptr", "numbers_ptr", "work_ptr", "values_ptr",
    "temperature_ptr", "listed_ptr", "spans_ptr", "seeds_ptr", "positions_ptr", "tokens_ptr",
    "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r7",
]  # fmt: skip
STEPWISE = [
    "W", "stride_temperature", "stride_set", "stride_bits_row", "stride_plane", "stride_values_row", "stride_work",
    "tiles", "slots", "parts", "parts_at", "pairs_at", "runs", "sampled", "sample_at", "share", "capacity", "room",
    "stride_seed", "stride_position", "all_lists", "lists", "stride_span",
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
    return tl.exp2(x * LOG2_E)


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
def row_scores(row, token, inside, access):
    """Logits of a row as they are given; -inf beyond its end."""
    scores_ptr, stride_row, stride_token = access[0], access[8], access[9]
    here = scores_ptr + row * stride_row + token.to(tl.int64) * stride_token
    return tl.load(here, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def folded(x, row, word, lane, token, inside, V, access, OPS: tl.constexpr, MAX: tl.constexpr):
    """Given logits of a row as the chain makes them."""
    (
        scores_ptr, _temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        W, _stride_row, _stride_token, _stride_temperature, stride_set, stride_bits_row, stride_plane,
        stride_values_row,
    ) = access  # fmt: skip
    # Between maps the logits are rounded to the dtype whose largest number is said; to float32 for a draw.
    dtype: tl.constexpr = tl.float32 if MAX == FLOAT32_MAX else scores_ptr.dtype.element_ty
    x = fold_logits(
        x, row, word, lane, token, inside,
        bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        V, W, stride_set, stride_bits_row, stride_plane, stride_values_row,
        dtype, OPS, MAX,
    )  # fmt: skip
    if len(OPS) > 0:
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def divisor_of(row, access):
    """What divides the logits of a row."""
    temperature_ptr, stride_temperature = access[1], access[10]
    divisor = tl.full([], 1.0, tl.float32)
    if temperature_ptr is not None:
        here = temperature_ptr + row * stride_temperature
        divisor = tl.where(is_greedy(here), 1.0, tl.load(here).to(tl.float32))
    return divisor


@triton.jit
def heated(x, row, access):
    """Logits of a row as the temperature makes them."""
    if access[1] is not None:
        # What is not finite stays as it is, and would take the long way of the division.
        divisor = divisor_of(row, access)
        finite = tl.abs(x) < float("inf")
        x = tl.where(finite, tl.div_rn(tl.where(finite, x, divisor), divisor), x)
    return x


@triton.jit
def inverse_of(row, access):
    """What the logits of a row are multiplied by, where that is exact enough."""
    return tl.minimum(1.0 / divisor_of(row, access), FLOAT32_MAX)


@triton.jit
def row_logits(row, word, lane, token, inside, V, access, OPS: tl.constexpr, MAX: tl.constexpr):
    """Logits of a row as the chain and the temperature make them; -inf beyond its end."""
    x = folded(row_scores(row, token, inside, access), row, word, lane, token, inside, V, access, OPS, MAX)
    return heated(x, row, access)


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
def sums_asked(row, V, values, temperature_ptr, stride_temperature, RULES: tl.constexpr, GREEDY: tl.constexpr):
    """Which sums over a row anything reads: 1 for its mass, 2 for its entropy too, 3 for its deviation too, 0 for none.

    Those that the first rule which may drop something speaks of. Temperatures by row make some rows greedy, where
    ``GREEDY`` says so; no rule is asked there.
    """
    asked = tl.full([], 0, tl.int32)
    cut = tl.full([], False, tl.int1)
    for i in tl.static_range(0, len(RULES), 3):
        active = is_active(rule_value(row, values, RULES[i + 2]), V, RULES[i], RULES[i + 2] >= 0)
        if (RULES[i] == TOP_P) or (RULES[i] == EPSILON):
            asked = tl.where(active & (cut == 0), 1, asked)
        elif (RULES[i] == ETA) or (RULES[i] == TYPICAL):
            asked = tl.where(active & (cut == 0), 2, asked)
        elif RULES[i] == TOP_N_SIGMA:
            asked = tl.where(active & (cut == 0), 3, asked)
        cut = cut | active
    if GREEDY:
        asked = tl.where(is_greedy(temperature_ptr + row * stride_temperature), 0, asked)
    return asked


@triton.jit
def sums_of_row(work, tiles, asked, SUMS: tl.constexpr, TILES: tl.constexpr):
    """Of a row: its largest logit, mass, mass times distance, number of finite logits, and squares of deviations.

    Masses are in units of the largest probability, distances those from the largest logit. All but that are float64;
    what wasn't ``asked`` for is 0.
    """
    tile = tl.arange(0, TILES)
    here = work + SUMS_AT + SUM_WORDS * tile
    there = tile < tiles
    tops = tl.load(here, mask=there, other=MINUS_INFINITY).to(tl.float32, bitcast=True)
    masses = tl.load(here + 1, mask=there, other=0).to(tl.float32, bitcast=True)
    top = tl.max(tops)
    apart = tl.where(tops > float("-inf"), top - tops, 0.0)
    share = tl.where(tops > float("-inf"), exp(-apart), 0.0).to(tl.float64)
    mass = tl.sum(masses.to(tl.float64) * share)
    below, count, squares = (tl.full([], 0.0, tl.float64),) * 3
    if SUMS >= 2:
        if asked >= 2:
            belows = tl.load(here + 2, mask=there, other=0).to(tl.float32, bitcast=True)
            below = tl.sum((belows + apart * masses).to(tl.float64) * share)
    if SUMS >= 3:
        if asked >= 3:
            counts = tl.load(here + 3, mask=there, other=0).to(tl.float32, bitcast=True).to(tl.float64)
            means = tl.load(here + 4, mask=there, other=0).to(tl.float32, bitcast=True).to(tl.float64)
            each = tl.load(here + 5, mask=there, other=0).to(tl.float32, bitcast=True).to(tl.float64)
            count = tl.sum(counts)
            off = means - tl.sum(counts * means) / tl.maximum(count, 1.0)
            squares = tl.sum(each + counts * off * off)
    return top, mass, below, count, squares


@triton.jit
def _exponential(word):
    """An exponential random number of a random word."""
    v = (word.to(tl.uint32).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    v = tl.minimum(v, 0.99999994)
    # -log1p(-v); where v is small the logarithm of 1 - v would lose it.
    return tl.where(v < 0.001, v * (1 + v * (0.5 + v * (1.0 / 3))), -tl.log(1 - v))


@triton.jit
def _random_words(quad, seed, position):
    """The four random words of four tokens, of a request's seed and position."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = quad * 0
    return tl.philox(
        seed, quad.to(tl.uint32), (zero + low).to(tl.uint32), (zero + high).to(tl.uint32), zero.to(tl.uint32)
    )


@triton.jit
def noise_of(token, seed, position):
    """An exponential random number for each token, of a request's seed and position."""
    a, b, c, d = _random_words(token // 4, seed, position)
    lane = token % 4
    return _exponential(tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d))))


@triton.jit
def noise_of_words(word, seed, position, WORDS: tl.constexpr):
    """The same for the tokens of so many mask words from one on, ``[WORDS, 32]``: four share their random words."""
    quad = (word + tl.arange(0, WORDS)[:, None]) * 8 + tl.arange(0, 8)[None, :]
    a, b, c, d = _random_words(quad, seed, position)
    return _exponential(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [WORDS, 32]))


# Hardly any thread has a candidate, and those that have none are done with one branch. Triton itself would make an
# atomic addition and a store for each token, which takes longer than all the rest of the sweep.
_ARE_THERE = """
    .reg .pred none, there;
    .reg .b32 count, place;
    .reg .b64 to;
    mov.b32 $out#, 0;
    add.s32 count, $candidate0, $candidate1; add.s32 count, count, $candidate2; add.s32 count, count, $candidate3;
    setp.eq.s32 none, count, 0;
    @none bra done;
"""
_STORE = """
    atom.relaxed.gpu.global.add.u32 place, [$counter], count;
    setp.ne.s32 there, $candidate#, 0; setp.lt.and.u32 there, place, $slots, there; mad.wide.u32 to, place, 8, $pairs; \
    @there st.global.v2.b32 [to], {$x#, $token#}; add.u32 place, place, $candidate#;
    done:
"""
_PUT_BY, _PUT_BY_OPERANDS = for_four_tokens("out candidate x token counter:l pairs:l slots", _ARE_THERE + _STORE)
_PUT_PLAIN_BY, _PUT_PLAIN_BY_OPERANDS = for_four_tokens(
    "out candidate x token edited:l banned:l counter:l pairs:l slots",
    _ARE_THERE
    + """
    .reg .pred asks<4>;
    .reg .b32 plain<4>, word, hidden;
    .reg .b64 from;
    setp.ne.s32 asks#, $candidate#, 0; mov.b32 plain#, 0;
    shr.u32 word, $token#, 5; mad.wide.u32 from, word, 4, $edited; @asks# ld.global.b32 plain#, [from];
    shr.u32 word, $token#, 5; mad.wide.u32 from, word, 4, $banned; @asks# ld.global.b32 hidden, [from]; \
    @asks# or.b32 plain#, plain#, hidden;
    and.b32 word, $token#, 31; shr.u32 plain#, plain#, word; \
    not.b32 plain#, plain#; and.b32 plain#, plain#, $candidate#;
    add.s32 count, plain0, plain1; add.s32 count, count, plain2; add.s32 count, count, plain3;
    setp.eq.s32 none, count, 0;
    @none bra done;
"""
    + _STORE.replace("$candidate", "plain"),
)


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
        check_fours(x)
        tl.inline_asm_elementwise(
            _PUT_BY, _PUT_BY_OPERANDS,
            [candidate.to(tl.int32), bits, token, counter.to(tl.int64), pairs.to(tl.int64), slots],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip


@triton.jit
def put_plain_by(candidate, x, token, edited_ptr, banned_ptr, counter, pairs, slots, PORTABLE: tl.constexpr):
    """Put by those candidates that are in neither of two sets."""
    if PORTABLE:
        held = tl.load(edited_ptr + (token >> 5), mask=candidate, other=0)
        held |= tl.load(banned_ptr + (token >> 5), mask=candidate, other=0)
        put_by(candidate & (((held >> (token & 31)) & 1) == 0), x, token, counter, pairs, slots, True)
    else:
        check_fours(x)
        tl.inline_asm_elementwise(
            _PUT_PLAIN_BY, _PUT_PLAIN_BY_OPERANDS,
            [
                candidate.to(tl.int32), x.to(tl.int32, bitcast=True), token, edited_ptr.to(tl.int64),
                banned_ptr.to(tl.int64), counter.to(tl.int64), pairs.to(tl.int64), slots,
            ],
            dtype=tl.int32, is_pure=False, pack=4,
        )  # fmt: skip
