"""What the kernels of a selection share: the logits of a row, their order, their noise, and the workspace of a row."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.pointwise.fold import fold_logits
from fastlogits_kernels.rules import CODES, RULES
from fastlogits_kernels.rules import TINY_TEMPERATURE as _TINY_TEMPERATURE
from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.runtime.ptx import check_tokens, for_tokens, logits_of
from fastlogits_kernels.truncate.reference import TOP_H_TOKENS as _TOP_H_TOKENS

# -- Rules: what the table says, as the kernels read it ------------------------------------------------------------

TOP_K = tl.constexpr(CODES["top_k"])
TOP_P = tl.constexpr(CODES["top_p"])
MIN_P = tl.constexpr(CODES["min_p"])
TOP_A = tl.constexpr(CODES["top_a"])
TYPICAL = tl.constexpr(CODES["typical"])
EPSILON = tl.constexpr(CODES["epsilon"])
ETA = tl.constexpr(CODES["eta"])
TOP_H = tl.constexpr(CODES["top_h"])
TOP_N_SIGMA = tl.constexpr(CODES["top_n_sigma"])
TOP_H_TOKENS = tl.constexpr(_TOP_H_TOKENS)
N_RULES = tl.constexpr(len(RULES))

# Of each rule by its code. What a rule keeps the most likely tokens up to; NO_GOAL for those with a cut-off.
NO_GOAL, COUNT_GOAL, MASS_GOAL, DISTANCE_GOAL, ENTROPY_GOAL = (tl.constexpr(i) for i in range(5))
_GOALS = {"none": 0, "count": 1, "mass": 2, "distance": 3, "entropy": 4}
GOAL = tl.constexpr(tuple(_GOALS[spec.goal] for spec in RULES.values()))
NEEDS_SUMS = tl.constexpr(tuple(spec.sums for spec in RULES.values()))
SPARES_FEWEST = tl.constexpr(tuple(int(spec.spares_fewest) for spec in RULES.values()))
# With which values it acts; of a count the vocabulary is the upper end. A number may act where a row's value is off.
_LOW = tl.constexpr(tuple(float(spec.range.low) for spec in RULES.values()))
_HIGH = tl.constexpr(tuple(float(spec.range.high) for spec in RULES.values()))
_LOW_ACTS = tl.constexpr(tuple(spec.range.inside == "low" for spec in RULES.values()))
_HIGH_ACTS = tl.constexpr(tuple(spec.range.inside == "high" for spec in RULES.values()))
_OFF_ACTS = tl.constexpr(tuple(not spec.off_as_number for spec in RULES.values()))

# -- The workspace of a row, in words of 32 bits --------------------------------------------------------------------

# What a row is.
FEW = tl.constexpr(0)  # its candidates were collected
WHOLE = tl.constexpr(1)  # they would be too many
FREE = tl.constexpr(2)  # no rule says anything of it
BRACKET = tl.constexpr(3)  # as FEW, and tokens above the upper bound are kept for certain

STATE_AT = tl.constexpr(0)
BOUND_AT = tl.constexpr(1)  # the key below which no token is a candidate
BANDED_AT = tl.constexpr(2)  # whether that is a key of distances
CENTRE_AT = tl.constexpr(3)  # from this logit
HIGH_AT = tl.constexpr(4)  # the key from which tokens are kept for certain
TOP_AT = tl.constexpr(5)  # the largest logit
DONE_AT = tl.constexpr(6)  # whether the candidates were enough
KEPT_AT = tl.constexpr(8)  # what is kept: the four fields of Kept
REACH_AT = tl.constexpr(12)  # between which logits, before the temperature divides them, all candidates are
ROW_SUMS_AT = tl.constexpr(14)  # the sums of the row, four of 64 bits: see RowSums
TOP_KEY_AT = tl.constexpr(22)  # the largest key where the sums of the row are known, else LOWEST
SURE_AT = tl.constexpr(26)  # between which logits, before the division, tokens are kept for certain
SCALE_AT = tl.constexpr(24)  # which tokens may be drawn, where a row is drawn from before all is known: see may_win
OFFSET_AT = tl.constexpr(25)
COUNT_AT = tl.constexpr(32)  # how many candidates there are; on a cache line that holds nothing else
RULES_AT = tl.constexpr(64)
LINE = tl.constexpr(32)  # words of a cache line, at whose start a row's workspace begins
# Of each rule: its code, how many tokens it keeps at least, and its parameter, NaN where it doesn't act.
RULE_WORDS = tl.constexpr(4)
# Behind the rules stand the sums of each tile, the summary of each part, and the candidates, each with its token, or
# before them the row's sample.
SUM_WORDS = tl.constexpr(6)
# Of a part: how many tokens it keeps for certain, their largest key and their mass.
PART_WORDS = tl.constexpr(4)
PART_COUNT_AT = tl.constexpr(0)
PART_LARGEST_AT = tl.constexpr(1)
PART_MASS_AT = tl.constexpr(2)

# -- Keys: integers in the order of float32 numbers -----------------------------------------------------------------

LOWEST = tl.constexpr(-(2**31))  # below all
HIGHEST = tl.constexpr(2**31 - 1)  # that of NaN
MINUS_INFINITY = tl.constexpr(-8388608)  # its bits
KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
KEY_OF_INFINITY = tl.constexpr(2139095040)

FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
LOG2_E = tl.constexpr(1.4426950408889634)
TINY_TEMPERATURE = tl.constexpr(_TINY_TEMPERATURE)
TILE_W = tl.constexpr(64)  # mask words of a tile, 32 logits each
OCTET = tl.constexpr(8)  # tokens that have their noise together
RUN = tl.constexpr(16)  # tokens of a sample that stand together: as many bytes as memory reads at once
ONE = tl.constexpr(float(2**37))  # the largest probability of a row, as an integer


class Maps(NamedTuple):
    """What a chain reads, and what divides the logits after it: the same for all launches of a selection."""

    temperature_ptr: tl.tensor
    bits_ptr: tl.tensor
    planes_ptr: tl.tensor
    biases_ptr: tl.tensor
    row_values_ptr: tl.tensor
    numbers_ptr: tl.tensor
    stride_temperature: tl.tensor
    stride_set: tl.tensor
    stride_bits_row: tl.tensor
    stride_plane: tl.tensor
    stride_values_row: tl.tensor


class Scores(NamedTuple):
    """The logits as they are given, ``[B, V]`` of any strides; W mask words a row."""

    ptr: tl.tensor
    stride_row: tl.tensor
    stride_token: tl.tensor
    V: tl.tensor
    W: tl.tensor


class Samples(NamedTuple):
    """What a token is drawn with: None and 0 where none is."""

    seeds_ptr: tl.tensor
    positions_ptr: tl.tensor
    stride_seed: tl.tensor
    stride_position: tl.tensor


class Kept(NamedTuple):
    """What is kept of a row.

    Keys above ``edge``, those at it whose rank is at least ``cut``, all no further from ``centre`` than ``near`` says.
    Ranks order tokens that tie.
    """

    edge: tl.tensor
    cut: tl.tensor
    centre: tl.tensor
    near: tl.tensor


class Sure(NamedTuple):
    """Tokens that are kept for certain and aren't candidates: how many, their mass, largest key, and from which key."""

    number: tl.tensor
    mass: tl.tensor
    largest: tl.tensor
    edge: tl.tensor


class Sample(NamedTuple):
    """How a row is sampled: of so many ``runs`` some, evenly apart, ``size`` tokens, which are a ``share`` of all."""

    runs: tl.tensor
    size: tl.tensor
    share: tl.tensor


class Shape(NamedTuple):
    """How a row is cut, what its workspace holds and where, in words of 32 bits.

    W mask words, in tiles for the sums and in parts for the filter; ``slots`` candidates at most; of more than
    ``capacity`` some are taken for kept, and of more than ``room`` the whole row is looked at.
    """

    W: tl.tensor
    tiles: tl.tensor
    parts: tl.tensor
    slots: tl.tensor
    sums_at: tl.tensor
    parts_at: tl.tensor
    pairs_at: tl.tensor
    capacity: tl.tensor
    room: tl.tensor
    sample: tl.tensor


class Listed(NamedTuple):
    """Tokens that have values in place of their logits: lists of them, so many a row and over all rows."""

    tokens_ptr: tl.tensor
    spans_ptr: tl.tensor
    stride_span: tl.tensor
    lists: tl.tensor
    all_lists: tl.tensor


class RowSums(NamedTuple):
    """Sums over a row, all float64: its mass, mass times distance from the top, number and squares of finite logits."""

    mass: tl.tensor
    below: tl.tensor
    finite: tl.tensor
    squares: tl.tensor


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
def load_float(ptr):
    """A float32 number of the workspace."""
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit
def store_float(ptr, x):
    """Put a float32 number into the workspace."""
    tl.store(ptr, x.to(tl.int32, bitcast=True))


@triton.jit
def exp(x):
    """The exponential."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def weight_of(x, top):
    """Probabilities relative to that of ``top``, as integers; 0 for what has none."""
    p = exp(x - top)
    return tl.where(p == p, p * ONE, 0.0).to(tl.int64)


# -- The logits of a row --------------------------------------------------------------------------------------------


@triton.jit
def is_greedy(temperature_ptr):
    """Whether a temperature makes its row greedy: anything but a finite number that isn't tiny."""
    temperature = tl.load(temperature_ptr).to(tl.float32)
    return ((temperature >= TINY_TEMPERATURE) & (temperature < float("inf"))) == 0


@triton.jit
def raw_scores(row, token, inside, scores):
    """Logits of a row as they are given, of their dtype; -inf beyond its end."""
    here = scores.ptr + row * scores.stride_row + token.to(tl.int64) * scores.stride_token
    return tl.load(here, mask=inside, other=float("-inf"))


@triton.jit
def row_scores(row, token, inside, scores):
    """The same in float32."""
    return raw_scores(row, token, inside, scores).to(tl.float32)


@triton.jit
def folded(x, row, word, lane, token, inside, scores, maps, OPS: tl.constexpr, MAX: tl.constexpr):
    """Given logits of a row as the chain makes them."""
    # Between maps the logits are rounded to the dtype whose largest number is said; to float32 for a sample.
    dtype: tl.constexpr = tl.float32 if MAX == FLOAT32_MAX else scores.ptr.dtype.element_ty
    x = fold_logits(
        x, row, word, lane, token, inside,
        maps.bits_ptr, maps.planes_ptr, maps.biases_ptr, maps.row_values_ptr, maps.numbers_ptr,
        scores.V, scores.W, maps.stride_set, maps.stride_bits_row, maps.stride_plane, maps.stride_values_row,
        dtype, OPS, MAX,
    )  # fmt: skip
    if len(OPS) > 0:
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def divisor_of(row, maps):
    """What divides the logits of a row."""
    divisor = tl.full([], 1.0, tl.float32)
    if maps.temperature_ptr is not None:
        here = maps.temperature_ptr + row * maps.stride_temperature
        divisor = tl.where(is_greedy(here), 1.0, tl.load(here).to(tl.float32))
    return divisor


@triton.jit
def scaled(x, row, maps):
    """Logits of a row, divided by the temperature."""
    if maps.temperature_ptr is not None:
        # What is not finite stays as it is, and would take the long way of the division.
        divisor = divisor_of(row, maps)
        finite = tl.abs(x) < float("inf")
        x = tl.where(finite, tl.div_rn(tl.where(finite, x, divisor), divisor), x)
    return x


@triton.jit
def inverse_of(row, maps):
    """What the logits of a row are multiplied by, where that is exact enough."""
    return tl.minimum(1.0 / divisor_of(row, maps), FLOAT32_MAX)


@triton.jit
def row_logits(row, word, lane, token, inside, scores, maps, OPS: tl.constexpr, MAX: tl.constexpr):
    """Logits of a row as the chain and the temperature make them; -inf beyond its end."""
    x = row_scores(row, token, inside, scores)
    return scaled(folded(x, row, word, lane, token, inside, scores, maps, OPS, MAX), row, maps)


# -- What is kept ---------------------------------------------------------------------------------------------------


@triton.jit
def rank_of(token, LOWEST_TIES: tl.constexpr):
    """Which of two tokens that tie comes first: the one of the larger id, or of the lower one."""
    rank = token
    if LOWEST_TIES:
        rank = -token
    return rank


@triton.jit
def is_kept(x, valid, rank, kept, BANDED: tl.constexpr):
    """Which tokens of a row are kept; ``BANDED`` where centre and nearness say anything."""
    key = key_of(x)
    found = valid & ((key > kept.edge) | ((key == kept.edge) & (rank >= kept.cut)))
    if BANDED:
        found = found & (key_of(-tl.abs(x - kept.centre)) >= kept.near)
    return found


@triton.jit
def all_kept():
    """What keeps everything."""
    lowest = tl.full([], LOWEST, tl.int32)
    return Kept(lowest, lowest, tl.full([], 0.0, tl.float32), lowest)


@triton.jit
def load_kept(ptr):
    """What is kept of a row, as its workspace has it."""
    return Kept(tl.load(ptr), tl.load(ptr + 1), load_float(ptr + 2), tl.load(ptr + 3))


@triton.jit
def store_kept(work, kept):
    """Leave what is kept of a row where other launches find it."""
    tl.store(work + KEPT_AT, kept.edge)
    tl.store(work + KEPT_AT + 1, kept.cut)
    store_float(work + KEPT_AT + 2, kept.centre)
    tl.store(work + KEPT_AT + 3, kept.near)


# -- Rules ----------------------------------------------------------------------------------------------------------


@triton.jit
def rule_value(row, values, PLACE: tl.constexpr):
    """The parameter of a rule in a row, float64: ``values`` are the numbers of all rules, then tensors by row."""
    return tl.load(values[0] - PLACE - 1) if PLACE < 0 else tl.load(values[PLACE + 1] + row).to(tl.float64)


@triton.jit
def is_active(value, V, KIND: tl.constexpr, PER_ROW: tl.constexpr):
    """Whether a rule of that parameter may drop anything; never for NaN."""
    if GOAL[KIND] == COUNT_GOAL:
        active = (value >= _LOW[KIND]) & (value < V)
    else:
        if _LOW_ACTS[KIND]:
            above = value >= _LOW[KIND]
        else:
            above = value > _LOW[KIND]
        if _HIGH_ACTS[KIND] or (_OFF_ACTS[KIND] and not PER_ROW):
            active = above & (value <= _HIGH[KIND])
        else:
            active = above & (value < _HIGH[KIND])
    return active


@triton.jit
def cutoff(value, top, mass, entropy, deviation, KIND: tl.constexpr):
    """The logit below which a rule without a goal drops all, float32: the one place where such a rule is said.

    ``value`` float64; ``top`` the largest logit, ``mass`` in units of the largest probability, float32; ``entropy`` and
    the ``deviation`` of the logits float32.
    """
    logarithm = tl.log(value)
    if KIND == MIN_P:
        x = (top.to(tl.float64) + logarithm).to(tl.float32)
    elif KIND == TOP_A:
        # The largest probability is one over the mass.
        x = (top.to(tl.float64) + logarithm - tl.log(mass).to(tl.float64)).to(tl.float32)
    elif KIND == EPSILON:
        x = (top.to(tl.float64) + logarithm + tl.log(mass).to(tl.float64)).to(tl.float32)
    elif KIND == ETA:
        least = tl.minimum(logarithm, logarithm * 0.5 - entropy.to(tl.float64))
        x = (top.to(tl.float64) + least + tl.log(mass).to(tl.float64)).to(tl.float32)
    else:
        tl.static_assert(KIND == TOP_N_SIGMA, "a rule without a goal has no branch in cutoff()")
        x = top - value.to(tl.float32) * deviation
    return x


# -- Noise: see fastlogits_kernels.draw for its definition ------------------------------------------------------------

_COARSE, _FINE = (tl.constexpr(i) for i in range(2))  # the two calls of the generator


@triton.jit
def _random_words(block, seed, position, CALL: tl.constexpr):
    """Four random words of a block of tokens, of a request's seed and position."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = block * 0
    return tl.philox(
        seed, block.to(tl.uint32), (zero + low).to(tl.uint32), (zero + high).to(tl.uint32), (zero + CALL).to(tl.uint32)
    )


@triton.jit
def coarse_words(octet, seed, position):
    """The first 16 bits of eight tokens each, two in a word, the lower token in the lower half."""
    return _random_words(octet, seed, position, _COARSE)


@triton.jit
def coarse_of(token, words):
    """The first 16 bits of tokens, of the words of their octets."""
    pair = (token >> 1) & 3
    word = tl.where(pair == 0, words[0], tl.where(pair == 1, words[1], tl.where(pair == 2, words[2], words[3])))
    return (word >> (16 * (token & 1)).to(tl.uint32)) & 0xFFFF


@triton.jit
def least_coarse(words):
    """The least 16 bits of the tokens of an octet."""
    low = tl.minimum(tl.minimum(words[0] << 16, words[1] << 16), tl.minimum(words[2] << 16, words[3] << 16))
    high = tl.minimum(tl.minimum(words[0], words[1]), tl.minimum(words[2], words[3]))
    return tl.minimum(low, high) >> 16


@triton.jit
def exponential_of(u, rest):
    """-log(1 - u), where ``rest`` is 1 - u to all its digits."""
    z = u / (2 - u)
    y = z * z
    series = 2 * z * (1 + y * (1.0 / 3 + y * (0.2 + y * (1.0 / 7 + y * (1.0 / 9)))))
    return tl.where(u < 0.25, series, -tl.log(rest))


@triton.jit
def least_sample(x, coarse):
    """No more than the samples of tokens of some first 16 bits: their noise may come to no more than that."""
    most = (coarse.to(tl.float32) + 1) * (2.0**-16)
    return x - tl.log(exponential_of(most, 1 - most))


@triton.jit
def noise_of(token, seed, position):
    """An exponential random number for each token, of a request's seed and position."""
    coarse = coarse_of(token, coarse_words(token >> 3, seed, position))
    words = _random_words(token >> 2, seed, position, _FINE)
    lane = token & 3
    fine = tl.where(lane == 0, words[0], tl.where(lane == 1, words[1], tl.where(lane == 2, words[2], words[3])))
    n = (coarse.to(tl.int64) << 32) | fine.to(tl.int64)
    u = (n.to(tl.float32) + 0.5) * (2.0**-48)
    rest = ((n ^ 0xFFFFFFFFFFFF).to(tl.float32) + 0.5) * (2.0**-48)
    return exponential_of(u, rest)


@triton.jit
def may_win(coarse, x, scale, offset):
    """Whether tokens of undivided logits may be drawn; ``scale`` and ``offset`` are those of ``bounds``.

    A token wins only if its noise is less than exp(x - best), where best is no more than the best sample of all; and
    its noise is at least its first 16 bits as a number between 0 and 1. NaN may always.
    """
    return (coarse.to(tl.float32) >= tl.exp2(x * scale + offset)) == 0


@triton.jit
def load_seed(row, samples):
    """A request's seed and position."""
    seed = tl.load(samples.seeds_ptr + row * samples.stride_seed).to(tl.int64)
    return seed, tl.load(samples.positions_ptr + row * samples.stride_position).to(tl.int64)


# -- Candidates -----------------------------------------------------------------------------------------------------

# Hardly any thread has a candidate: one test tells for all tokens of its 16 bytes, and warps that have none are done
# with one branch. Triton itself would make an atomic addition and a store for each token, which takes longer than all
# the rest of the filter.
_NEAR = """
    setp.geu.f32 some, largest, $low; vote.sync.any.pred some, some, 0xffffffff;
    @!some bra done;
    setp.geu.f32 asks#, value#, $low; setp.leu.and.f32 asks#, value#, $up, asks#; \
    setp.lt.and.s32 asks#, $token#, $end, asks#;
"""
# Of an octet the largest logit and the least noise tell for all.
_MAY_WIN = """
    .reg .f32 limit, coarse;
    .reg .b32 least, pair, word;
    .reg .pred is;
    mov.b32 least, $least0;
    min.u32 least, least, $least#;
    fma.rn.f32 limit, largest, $scale, $offset; ex2.approx.f32 limit, limit; cvt.rn.f32.u32 coarse, least;
    setp.ltu.f32 some, coarse, limit; vote.sync.any.pred some, some, 0xffffffff;
    @!some bra done;
    and.b32 pair, $token#, 6; setp.eq.b32 is, pair, 0; selp.b32 word, $aa#, $bb#, is; \
    setp.eq.b32 is, pair, 4; selp.b32 word, $cc#, word, is; setp.eq.b32 is, pair, 6; selp.b32 word, $dd#, word, is; \
    and.b32 pair, $token#, 1; shl.b32 pair, pair, 4; shr.u32 word, word, pair; and.b32 word, word, 65535; \
    cvt.rn.f32.u32 coarse, word; fma.rn.f32 limit, value#, $scale, $offset; ex2.approx.f32 limit, limit; \
    setp.ltu.f32 asks#, coarse, limit; setp.lt.and.s32 asks#, $token#, $end, asks#;
"""
# Those that were chosen already.
_CHOSEN = """
    .reg .f32 value<4>;
    setp.ne.s32 asks#, $candidate#, 0; mov.f32 value#, $x#;
"""
# What is in neither of two sets.
_PLAIN = """
    .reg .b32 place, plain, hidden;
    .reg .b64 from;
    mov.b32 plain, 0; mov.b32 hidden, 0; shr.u32 place, $token#, 5; mad.wide.u32 from, place, 4, $edited; \
    @asks# ld.global.b32 plain, [from]; mad.wide.u32 from, place, 4, $banned; @asks# ld.global.b32 hidden, [from]; \
    or.b32 plain, plain, hidden; and.b32 place, $token#, 31; shr.u32 plain, plain, place; and.b32 plain, plain, 1; \
    setp.eq.and.b32 asks#, plain, 0, asks#;
"""
# A warp asks for room once.
_STORE = """
    .reg .b32 count, free, lane, below, votes<8>, mine<8>;
    .reg .b64 to;
    .reg .pred first;
    vote.sync.ballot.b32 votes#, asks#, 0xffffffff;
    mov.b32 count, 0;
    popc.b32 mine#, votes#; add.u32 count, count, mine#;
    setp.eq.s32 first, count, 0;
    @first bra done;
    mov.u32 lane, %laneid; mov.u32 below, %lanemask_lt; mov.b32 free, 0; setp.eq.u32 first, lane, 0;
    @first atom.relaxed.gpu.global.add.u32 free, [$counter], count;
    shfl.sync.idx.b32 free, free, 0, 31, 0xffffffff;
    and.b32 lane, votes#, below; popc.b32 lane, lane; add.u32 lane, lane, free; \
    setp.lt.and.u32 asks#, lane, $slots, asks#; mad.wide.u32 to, lane, 8, $pairs; \
    @asks# st.global.v2.b32 [to], {value#, $token#}; add.u32 free, free, mine#;
    done:
"""


_START = ".reg .pred some, asks<8>;"
_COLLECT_ONE, _COLLECT_ONE_OPERANDS = for_tokens(
    "out:b candidate x token counter:l pairs:l slots", f"{_START}\nmov.b32 $out0, 0;\n" + _CHOSEN + _STORE, 4
)


def _collecting(dtype: str, wins: bool, listed: bool) -> tuple[tl.constexpr, tl.constexpr]:
    """PTX that collects of 16 bytes the tokens that are near enough, or may win; ``listed``: those of no list."""
    wide = dtype != "fp32"
    operands = f"out:b x{':h' if wide else ''} token end counter:l pairs:l slots"
    operands += " least aa bb cc dd scale offset" if wins else " low up"
    operands += " edited:l banned:l" if listed else ""
    outputs = "mov.b32 $out0, 0;" + " mov.b32 $out1, 0;" * wide
    body = f"{_START}\n{outputs}\n" + logits_of(dtype) + (_MAY_WIN if wins else _NEAR) + (_PLAIN if listed else "")
    return for_tokens(operands, body + _STORE, 8 if wide else 4)


_DTYPES = ("fp32", "bf16", "fp16")
_MADE = [_collecting(dtype, wins, listed) for dtype in _DTYPES for wins in (False, True) for listed in (False, True)]
_COLLECTING = tl.constexpr(tuple(text.value for text, _ in _MADE))
_COLLECTING_OPERANDS = tl.constexpr(tuple(operands.value for _, operands in _MADE))
_BF16, _FP16 = tl.constexpr(_DTYPES.index("bf16")), tl.constexpr(_DTYPES.index("fp16"))


@triton.jit
def collect(candidate, x, token, counter, pairs, slots, PORTABLE: tl.constexpr):
    """Collect candidates of float32 logits, each as 64 bits: its token above its logit."""
    if PORTABLE:
        # The interpreter may hold what was combined as something else than booleans.
        candidate = candidate.to(tl.int32) != 0
        place = tl.atomic_add(counter + tl.zeros_like(token), 1, mask=candidate, sem="relaxed")
        here = pairs + 2 * place
        tl.store(here, x.to(tl.int32, bitcast=True), mask=candidate & (place < slots))
        tl.store(here + 1, token, mask=candidate & (place < slots))
    else:
        check_tokens(x, 4)
        tl.inline_asm_elementwise(
            _COLLECT_ONE, _COLLECT_ONE_OPERANDS,
            [candidate.to(tl.int32), x, token, counter.to(tl.int64), pairs.to(tl.int64), slots],
            dtype=tl.int8, is_pure=False, pack=4,
        )  # fmt: skip


@triton.jit
def _collect_tested(
    x, token, end, counter, pairs, slots, tests, edited_ptr, banned_ptr, WINS: tl.constexpr
):  # fmt: skip
    """Collect tokens by PTX; ``tests`` are the operands of the test."""
    KIND: tl.constexpr = _BF16 if x.dtype == tl.bfloat16 else (_FP16 if x.dtype == tl.float16 else 0)
    TOKENS: tl.constexpr = 4 if KIND == 0 else 8
    WHICH: tl.constexpr = 4 * KIND + 2 * WINS + (edited_ptr is not None)
    check_tokens(x, TOKENS)
    sets = () if edited_ptr is None else (edited_ptr.to(tl.int64), banned_ptr.to(tl.int64))
    tl.inline_asm_elementwise(
        _COLLECTING[WHICH], _COLLECTING_OPERANDS[WHICH],
        (x, token, end, counter.to(tl.int64), pairs.to(tl.int64), slots) + tests + sets,  # noqa: RUF005
        dtype=tl.int8, is_pure=False, pack=TOKENS,
    )  # fmt: skip


@triton.jit
def _collect_chosen(candidate, x, token, end, counter, pairs, slots, edited_ptr, banned_ptr):
    """Collect candidates without PTX, those before ``end`` and of no set where there are sets."""
    candidate = candidate & (token < end)
    if edited_ptr is not None:
        held = tl.load(edited_ptr + (token >> 5), mask=candidate, other=0)
        held |= tl.load(banned_ptr + (token >> 5), mask=candidate, other=0)
        candidate = candidate & (((held >> (token & 31)) & 1) == 0)
    collect(candidate, x, token, counter, pairs, slots, True)


@triton.jit
def collect_near(
    x, token, low, up, edited_ptr, banned_ptr, end, counter, pairs, slots, PORTABLE: tl.constexpr
):  # fmt: skip
    """Collect tokens before ``end`` of logits between two, of any dtype, and NaN; of no set where there are sets."""
    if PORTABLE:
        x = x.to(tl.float32)
        candidate = ((x < low) == 0) & ((x > up) == 0)
        _collect_chosen(candidate, x, token, end, counter, pairs, slots, edited_ptr, banned_ptr)
    else:
        _collect_tested(x, token, end, counter, pairs, slots, (low, up), edited_ptr, banned_ptr, False)


@triton.jit
def collect_winners(
    x, token, words, least, scale, offset, edited_ptr, banned_ptr, end, counter, pairs, slots, PORTABLE: tl.constexpr
):  # fmt: skip
    """The same of tokens that may be drawn: see ``may_win``; ``words`` and ``least`` are the noise of their octets."""
    if PORTABLE:
        x = x.to(tl.float32)
        candidate = may_win(coarse_of(token, words), x, scale, offset)
        _collect_chosen(candidate, x, token, end, counter, pairs, slots, edited_ptr, banned_ptr)
    else:
        noise = (
            least.to(tl.int32, bitcast=True), words[0].to(tl.int32, bitcast=True),
            words[1].to(tl.int32, bitcast=True), words[2].to(tl.int32, bitcast=True),
            words[3].to(tl.int32, bitcast=True), scale, offset,
        )  # fmt: skip
        _collect_tested(x, token, end, counter, pairs, slots, noise, edited_ptr, banned_ptr, True)


@triton.jit
def load_candidates(pairs, found, SLOTS: tl.constexpr):
    """Logits, whether they are there, and tokens of what was collected."""
    slot = tl.arange(0, SLOTS)
    valid = slot < found
    # From L2: this multiprocessor may hold what stood there before.
    pair = tl.load(pairs + slot, mask=valid, other=0, volatile=True)
    return pair.to(tl.int32).to(tl.float32, bitcast=True), valid, (pair >> 32).to(tl.int32)


@triton.jit
def is_near(x, least, banded, centre, BANDED: tl.constexpr):
    """Whether logits are candidates: those that were collected are a few too many."""
    test = x
    if BANDED:
        test = tl.where(banded, -tl.abs(x - centre), x)
    return (test < least) == 0


@triton.jit
def is_sure(x, work):
    """Whether undivided logits of a row are kept for certain."""
    return (x >= load_float(work + SURE_AT)) & (x <= load_float(work + SURE_AT + 1))


# Launches differ in these from step to step; no kernel is compiled for their values. They are arguments of their own,
# and become named tuples in the kernel: Triton specialises what stands in a tuple, whatever it is told.
MAPS = [
    "temperature_ptr", "bits_ptr", "planes_ptr", "biases_ptr", "row_values_ptr", "numbers_ptr",
    "stride_temperature", "stride_set", "stride_bits_row", "stride_plane", "stride_values_row",
]  # fmt: skip
MAP_STRIDES = [name for name in MAPS if name.startswith("stride")]
UNALIGNED = [*MAPS, "work_ptr", "tokens_ptr", "seeds_ptr", "positions_ptr", "listed_ptr", "spans_ptr"]
STEPWISE = [
    *MAP_STRIDES, "stride_work", "stride_seed", "stride_position", "stride_span", "lists", "all_lists",
    "W", "tiles", "parts", "slots", "sums_at", "parts_at", "pairs_at", "capacity", "room", "runs", "sample_size",
    "share",
]  # fmt: skip
