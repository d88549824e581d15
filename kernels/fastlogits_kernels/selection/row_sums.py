"""Sums over a row of logits, tile by tile, and a sample of it: what the bounds need where a rule asks for mass."""

from __future__ import annotations

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.row import (
    LOG2_E,
    MINUS_INFINITY,
    NEEDS_SUMS,
    ONE,
    RUN,
    STEPWISE,
    SUM_WORDS,
    TILE_W,
    UNALIGNED,
    Form,
    Maps,
    RowSums,
    Scores,
    Shape,
    exp,
    folded_logits,
    inverse_of,
    is_active,
    is_greedy,
    let_next_launch,
    rule_value,
    scaled,
    store_float,
    wait_for_launch,
)
from fastlogits_kernels.selection.tiles import Tile, joined, tile_of

_CHUNK = tl.constexpr(512)  # tokens of a sample that a program takes
# The sums of a tile: its largest logit, its mass, mass times distance from there, and of the finite logits their
# number, mean and squares of deviations.
_TILE_TOP_AT, _TILE_MASS_AT, _TILE_BELOW_AT, _TILE_FINITE_AT, _TILE_MEAN_AT, _TILE_SQUARES_AT = (
    tl.constexpr(i) for i in range(6)
)
# The sums of a row, as RowSums has them.
_MASS_AT, _BELOW_AT, _FINITE_AT, _SQUARES_AT = (tl.constexpr(i) for i in range(4))


@triton.jit
def sums_asked(row, V, values, maps, KINDS: tl.constexpr, PLACES: tl.constexpr, GREEDY: tl.constexpr):
    """Which sums over a row anything reads: 1 for its mass, 2 for its entropy too, 3 for its deviation too, 0 for none.

    The first rule that may drop something says which. Temperatures by row make some rows greedy, where ``GREEDY`` says
    so; no rule is asked there.
    """
    asked = tl.full([], 0, tl.int32)
    cut = tl.full([], False, tl.int1)
    for i in tl.static_range(len(KINDS)):
        active = is_active(rule_value(row, values, PLACES[i]), V, KINDS[i], PLACES[i] >= 0)
        if NEEDS_SUMS[KINDS[i]] > 0:
            asked = tl.where(active & (cut == 0), NEEDS_SUMS[KINDS[i]], asked)
        cut = cut | active
    if GREEDY:
        asked = tl.where(is_greedy(maps.temperature_ptr + row * maps.stride_temperature), 0, asked)
    return asked


@triton.jit
def _load_floats(ptr, mask):
    return tl.load(ptr, mask=mask, other=0).to(tl.float32, bitcast=True)


@triton.jit
def load_sums(row, sums_ptr, tiles, asked, maps, SUMS: tl.constexpr, TILES: tl.constexpr):
    """The largest scaled logit of a row and its sums, from those of its tiles; 0 for what wasn't ``asked`` for."""
    tile = tl.arange(0, TILES)
    here = sums_ptr + SUM_WORDS * tile
    there = tile < tiles
    tops = tl.load(here + _TILE_TOP_AT, mask=there, other=MINUS_INFINITY).to(tl.float32, bitcast=True)
    masses = _load_floats(here + _TILE_MASS_AT, there)
    raw_top = tl.max(tops)
    inverse = inverse_of(row, maps)
    amounts, _below = joined(Tile(tops, masses, masses), raw_top, inverse)
    mass = tl.where(tl.sum((masses != masses).to(tl.int32)) > 0, float("nan"), tl.sum(amounts).to(tl.float64) / ONE)
    below, count, squares = (tl.full([], 0.0, tl.float64),) * 3
    if SUMS >= 2:
        if asked >= 2:
            belows = _load_floats(here + _TILE_BELOW_AT, there)
            apart = tl.where(tops > float("-inf"), (raw_top - tops) * inverse, 0.0)
            share = tl.where(tops > float("-inf"), exp(-apart), 0.0).to(tl.float64)
            below = tl.sum((belows + apart * masses).to(tl.float64) * share)
    if SUMS >= 3:
        if asked >= 3:
            counts = _load_floats(here + _TILE_FINITE_AT, there).to(tl.float64)
            means = _load_floats(here + _TILE_MEAN_AT, there).to(tl.float64)
            each = _load_floats(here + _TILE_SQUARES_AT, there).to(tl.float64)
            count = tl.sum(counts)
            off = means - tl.sum(counts * means) / tl.maximum(count, 1.0)
            squares = tl.sum(each + counts * off * off)
    return scaled(raw_top, row, maps), RowSums(mass, below, count, squares)


@triton.jit
def load_row_sums(ptr, mask):
    """The sums of a row as its workspace has them."""
    here = ptr.to(tl.pointer_type(tl.float64))
    return RowSums(
        tl.load(here + _MASS_AT, mask=mask, other=0.0), tl.load(here + _BELOW_AT, mask=mask, other=0.0),
        tl.load(here + _FINITE_AT, mask=mask, other=0.0), tl.load(here + _SQUARES_AT, mask=mask, other=0.0),
    )  # fmt: skip


@triton.jit
def store_row_sums(ptr, sums):
    """Put the sums of a row into its workspace."""
    here = ptr.to(tl.pointer_type(tl.float64))
    tl.store(here + _MASS_AT, sums.mass)
    tl.store(here + _BELOW_AT, sums.below)
    tl.store(here + _FINITE_AT, sums.finite)
    tl.store(here + _SQUARES_AT, sums.squares)


@triton.jit
def sampled(row, flat, shape, scores, form, SAMPLE: tl.constexpr):
    """The folded logits of some runs of a row, spread evenly over all of it; -inf beyond the sample's end."""
    token = (flat // RUN) * shape.runs // (SAMPLE // RUN) * RUN + flat % RUN
    inside = (flat < shape.sample_size) & (token < scores.V)
    return folded_logits(row, token >> 5, token & 31, token, inside, scores, form)


@triton.jit
def _sum_tile(row, tile, inverse, asked, scores, form, here, SUMS: tl.constexpr):
    """Write the sums of a tile of a row."""
    word = tile * TILE_W + tl.arange(0, TILE_W)[:, None]
    lane = tl.arange(0, 32)[None, :]
    token = word * 32 + lane
    x = folded_logits(row, word, lane, token, token < scores.V, scores, form)
    of = tile_of(x, inverse, BELOW=False)
    store_float(here + _TILE_TOP_AT, of.top)
    store_float(here + _TILE_MASS_AT, of.mass)
    if SUMS >= 2:
        if asked >= 2:
            off = (x - tl.where(of.top > float("-inf"), of.top, 0.0)) * inverse
            p = tl.exp2(off * LOG2_E)
            store_float(here + _TILE_BELOW_AT, tl.sum(tl.where(p > 0, p * -off, 0.0)))
    if SUMS >= 3:
        if asked >= 3:
            x = x * inverse
            finite = tl.abs(x) < float("inf")
            count = tl.sum(finite.to(tl.float32))
            mean = tl.sum(tl.where(finite, x, 0.0)) / tl.maximum(count, 1.0)
            off = tl.where(finite, x - mean, 0.0)
            store_float(here + _TILE_FINITE_AT, count)
            store_float(here + _TILE_MEAN_AT, mean)
            store_float(here + _TILE_SQUARES_AT, tl.sum(off * off))


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def sums_kernel(
    # inputs
    scores_ptr, values,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    # output
    work_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share,
    # strides
    stride_row, stride_token, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, KINDS: tl.constexpr, PLACES: tl.constexpr, SUMS: tl.constexpr,
    GREEDY: tl.constexpr, SAMPLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of the row's sample, and the sums of one tile: so they don't depend on how the row is split."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    shape = Shape(W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share)
    # Nothing is known of the launch before but that it ends; the next one reads what all before it have written.
    wait_for_launch(PDL)
    let_next_launch(PDL)
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    work = work_ptr + row * stride_work
    inverse = inverse_of(row, maps)
    for start in range(tile * _CHUNK, sample_size, tiles * _CHUNK):
        flat = start + tl.arange(0, _CHUNK)
        store_float(work + pairs_at + flat, sampled(row, flat, shape, scores, Form(OPS, MAX), SAMPLE) * inverse)
    asked = sums_asked(row, V, values, maps, KINDS, PLACES, GREEDY)
    if asked > 0:
        _sum_tile(row, tile, inverse, asked, scores, Form(OPS, MAX), work + sums_at + SUM_WORDS * tile, SUMS)
