"""What the kernels of a selection share: the rules, the logits of a row and their order, and its workspace."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.pointwise.fold import Tokens, fold_logits
from fastlogits_kernels.rules import CODES, RULES
from fastlogits_kernels.rules import TINY_TEMPERATURE as _TINY_TEMPERATURE
from fastlogits_kernels.runtime.launcher import tl, triton
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

# What the bounds say of a row.
COLLECTED = tl.constexpr(0)  # its candidates are collected
FULL_ROW = tl.constexpr(1)  # they would be too many: the full row is processed
UNCUT = tl.constexpr(2)  # no rule drops anything
BRACKET = tl.constexpr(3)  # as COLLECTED, and tokens above an upper bound are kept for certain

STATE_AT = tl.constexpr(0)
BOUND_AT = tl.constexpr(1)  # the key of the scaled logit below which no token is a candidate
BANDED_AT = tl.constexpr(2)  # whether that is a key of negative distances
CENTRE_AT = tl.constexpr(3)  # from this scaled logit
CERTAIN_AT = tl.constexpr(4)  # the key of the scaled logit from which on tokens are kept for certain
TOP_AT = tl.constexpr(5)  # the largest scaled logit
DONE_AT = tl.constexpr(6)  # whether the candidates were enough
KEPT_AT = tl.constexpr(8)  # what is kept: the four fields of Kept
RAW_RANGE_AT = tl.constexpr(12)  # all candidates are between these two raw logits
ROW_SUMS_AT = tl.constexpr(14)  # the sums of the row, four of 64 bits: see RowSums
TOP_KEY_AT = tl.constexpr(22)  # the largest key where the sums of the row are known, else LOWEST
SCALE_AT = tl.constexpr(24)  # which tokens may be sampled before the rules are applied: see may_win
OFFSET_AT = tl.constexpr(25)
RAW_CERTAIN_AT = tl.constexpr(26)  # tokens between these two raw logits are kept for certain
COUNT_AT = tl.constexpr(32)  # how many candidates there are; on a cache line that holds nothing else
RULES_AT = tl.constexpr(64)
LINE = tl.constexpr(32)  # words of a cache line, at whose start a row's workspace begins
# Of each rule: its code, how many tokens it keeps at least, and its parameter, NaN where it doesn't act.
RULE_WORDS = tl.constexpr(4)
RULE_KIND_AT = tl.constexpr(0)
RULE_LEAST_AT = tl.constexpr(1)
RULE_VALUE_AT = tl.constexpr(2)
# Behind the rules: the sums of each tile, the summary of each part, then the candidates, each with its token. The
# row's sample stands where the candidates will be.
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
GROUPS = tl.constexpr(64)  # of a sample, whose largest keys are a bound
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
    """Raw logits, ``[B, V]`` of any strides with W mask words a row, and what the chain reads."""

    ptr: tl.tensor
    stride_row: tl.tensor
    stride_token: tl.tensor
    V: tl.tensor
    W: tl.tensor
    maps: Maps


class Form(NamedTuple):
    """What the compiler knows of a chain: its maps, and the largest number of the dtype that it rounds to.

    Passed on and never assigned: Triton makes numbers of constants in a tuple that is assigned to a variable.
    """

    OPS: tl.constexpr
    MAX: tl.constexpr


class Sampling(NamedTuple):
    """The seeds and positions with which tokens are sampled: None and 0 where none are."""

    seeds_ptr: tl.tensor
    positions_ptr: tl.tensor
    stride_seed: tl.tensor
    stride_position: tl.tensor


class Output(NamedTuple):
    """What a selection writes: rows of logits with a fill value, or tokens; the other pointer is None."""

    ptr: tl.tensor
    stride_row: tl.tensor
    stride_token: tl.tensor
    tokens_ptr: tl.tensor
    fill: tl.tensor


class Kept(NamedTuple):
    """What is kept of a row.

    Tokens with a key above ``cutoff``, and those at it with a rank of at least ``rank``; of them those at most as far
    from ``centre`` as ``farthest`` says, a key of negative distances. Ranks order tokens that tie.
    """

    cutoff: tl.tensor
    rank: tl.tensor
    centre: tl.tensor
    farthest: tl.tensor


class Certain(NamedTuple):
    """Tokens that are kept for certain and are no candidates: their number, mass, largest key and least key."""

    number: tl.tensor
    mass: tl.tensor
    largest: tl.tensor
    least: tl.tensor


class Shape(NamedTuple):
    """How a row is cut and sampled, what its workspace holds and where, in words of 32 bits.

    W mask words, in tiles for the sums and in parts for the filter; ``slots`` candidates at most. Of more than
    ``capacity`` some are kept for certain; of more than ``room`` the full row is processed. A sample has some of so
    many ``runs`` of a row, evenly apart: ``sample_size`` tokens, which are a ``share`` of all.
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
    runs: tl.tensor
    sample_size: tl.tensor
    share: tl.tensor


class Listed(NamedTuple):
    """Lists of edited tokens, which have values in place of their logits.

    So many a row, each shared by so many programs; and programs over all rows.
    """

    tokens_ptr: tl.tensor
    spans_ptr: tl.tensor
    stride_span: tl.tensor
    lists: tl.tensor
    pieces: tl.tensor
    programs: tl.tensor


class RowSums(NamedTuple):
    """Sums over a row, all float64.

    ``mass`` in units of the largest probability; ``below`` the mass times the distance from the largest logit;
    ``finite`` the number of finite logits, ``squares`` the squares of their deviations.
    """

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
    """Raw logits of a row, of their dtype; -inf beyond its end."""
    here = scores.ptr + row * scores.stride_row + token.to(tl.int64) * scores.stride_token
    return tl.load(here, mask=inside, other=float("-inf"))


@triton.jit
def folded(x, row, word, lane, token, inside, scores, form):
    """Raw logits of a row, float32, after the chain."""
    maps = scores.maps
    # Between maps the logits are rounded to the dtype whose largest number is said; to float32 for a sample.
    dtype: tl.constexpr = tl.float32 if form.MAX == FLOAT32_MAX else scores.ptr.dtype.element_ty
    x = fold_logits(
        x, Tokens(row, word, lane, token, inside), maps, scores.V, scores.W, dtype, form.OPS, form.MAX
    )  # fmt: skip
    if len(form.OPS) > 0:
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def folded_logits(row, word, lane, token, inside, scores, form):
    """Logits of a row after the chain, float32; -inf beyond its end."""
    x = raw_scores(row, token, inside, scores).to(tl.float32)
    return folded(x, row, word, lane, token, inside, scores, form)


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
def scaled_logits(row, word, lane, token, inside, scores, form):
    """Logits of a row after the chain and the temperature, float32; -inf beyond its end."""
    return scaled(folded_logits(row, word, lane, token, inside, scores, form), row, scores.maps)


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
    """Which tokens of a row are kept; ``BANDED`` where ``centre`` and ``farthest`` say anything."""
    key = key_of(x)
    found = valid & ((key > kept.cutoff) | ((key == kept.cutoff) & (rank >= kept.rank)))
    if BANDED:
        found = found & (key_of(-tl.abs(x - kept.centre)) >= kept.farthest)
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
    tl.store(work + KEPT_AT, kept.cutoff)
    tl.store(work + KEPT_AT + 1, kept.rank)
    store_float(work + KEPT_AT + 2, kept.centre)
    tl.store(work + KEPT_AT + 3, kept.farthest)


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


# -- Candidates -------------------------------------------------------------------------------------------------------


@triton.jit
def is_candidate(x, least, banded, centre, BANDED: tl.constexpr):
    """Whether scaled logits are candidates; the filter, which sees raw ones, collects a few more."""
    test = x
    if BANDED:
        test = tl.where(banded, -tl.abs(x - centre), x)
    return (test < least) == 0


@triton.jit
def is_certain(x, work):
    """Whether raw logits of a row are kept for certain."""
    return (x >= load_float(work + RAW_CERTAIN_AT)) & (x <= load_float(work + RAW_CERTAIN_AT + 1))


# Launches differ in these from step to step; no kernel is compiled for their values. They are arguments of their own,
# and become named tuples in the kernel: Triton specialises what stands in a tuple, whatever it is told.
MAPS = [
    "temperature_ptr", "bits_ptr", "planes_ptr", "biases_ptr", "row_values_ptr", "numbers_ptr",
    "stride_temperature", "stride_set", "stride_bits_row", "stride_plane", "stride_values_row",
]  # fmt: skip
MAP_STRIDES = [name for name in MAPS if name.startswith("stride")]
UNALIGNED = [*MAPS, "work_ptr", "tokens_ptr", "seeds_ptr", "positions_ptr", "listed_ptr", "spans_ptr"]
STEPWISE = [
    *MAP_STRIDES, "stride_work", "stride_seed", "stride_position", "stride_span", "lists", "pieces", "list_programs",
    "W", "tiles", "parts", "slots", "sums_at", "parts_at", "pairs_at", "capacity", "room", "runs", "sample_size",
    "share",
]  # fmt: skip
