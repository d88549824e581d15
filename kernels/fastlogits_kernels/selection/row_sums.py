"""Sums over a row of logits, tile by tile, and a sample of it: what the bounds need where a rule speaks of mass."""

from __future__ import annotations

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.row import (
    LOG2_E,
    MINUS_INFINITY,
    NEEDS_SUMS,
    RUN,
    STEPWISE,
    SUM_WORDS,
    TILE_W,
    UNALIGNED,
    Maps,
    RowSums,
    Sample,
    Scores,
    Shape,
    exp,
    folded,
    inverse_of,
    is_active,
    is_greedy,
    let_next_launch,
    row_scores,
    rule_value,
    scaled,
    store_float,
    wait_for_launch,
)

_CHUNK = tl.constexpr(512)  # tokens of a sample that a program takes


@triton.jit
def sums_asked(row, V, values, maps, KINDS: tl.constexpr, PLACES: tl.constexpr, GREEDY: tl.constexpr):
    """Which sums over a row anything reads: 1 for its mass, 2 for its entropy too, 3 for its deviation too, 0 for none.

    Those that the first rule which may drop something speaks of. Temperatures by row make some rows greedy, where
    ``GREEDY`` says so; no rule is asked there.
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
def load_sums(sums_ptr, tiles, asked, SUMS: tl.constexpr, TILES: tl.constexpr):
    """The largest logit of a row, and its sums: the tiles', added up in their order.

    Masses are in units of the largest probability, distances those from the largest logit. What wasn't ``asked`` for
    is 0.
    """
    tile = tl.arange(0, TILES)
    here = sums_ptr + SUM_WORDS * tile
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
    return top, RowSums(mass, below, count, squares)


@triton.jit
def load_row_sums(ptr, mask):
    """The sums of a row as its workspace has them."""
    there = ptr.to(tl.pointer_type(tl.float64))
    return RowSums(
        tl.load(there, mask=mask, other=0.0), tl.load(there + 1, mask=mask, other=0.0),
        tl.load(there + 2, mask=mask, other=0.0), tl.load(there + 3, mask=mask, other=0.0),
    )  # fmt: skip


@triton.jit
def store_row_sums(ptr, sums):
    """Put the sums of a row into its workspace."""
    there = ptr.to(tl.pointer_type(tl.float64))
    tl.store(there, sums.mass)
    tl.store(there + 1, sums.below)
    tl.store(there + 2, sums.finite)
    tl.store(there + 3, sums.squares)


@triton.jit
def sampled(row, flat, sample, scores, maps, OPS: tl.constexpr, MAX: tl.constexpr, SAMPLE: tl.constexpr):
    """Of the undivided logits of a row some runs, spread evenly over all of them; -inf beyond the sample's end."""
    token = (flat // RUN) * sample.runs // (SAMPLE // RUN) * RUN + flat % RUN
    inside = (flat < sample.size) & (token < scores.V)
    x = row_scores(row, token, inside, scores)
    return folded(x, row, token >> 5, token & 31, token, inside, scores, maps, OPS, MAX)


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
    """A chunk of the row's sample, and sums over a tile by itself: so they don't depend on how the row is split."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    shape = Shape(
        W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, Sample(runs, sample_size, share)
    )  # fmt: skip
    # Nothing is known of the launch before but that it ends; the next one reads what all before it have written.
    wait_for_launch(PDL)
    let_next_launch(PDL)
    program = tl.program_id(0)
    row = (program // shape.tiles).to(tl.int64)
    tile = program % shape.tiles
    scores = Scores(scores_ptr, stride_row, stride_token, V, shape.W)
    work = work_ptr + row * stride_work
    inverse = inverse_of(row, maps)
    for start in range(tile * _CHUNK, shape.sample.size, shape.tiles * _CHUNK):
        flat = start + tl.arange(0, _CHUNK)
        store_float(
            work + shape.pairs_at + flat, sampled(row, flat, shape.sample, scores, maps, OPS, MAX, SAMPLE) * inverse
        )
    asked = sums_asked(row, V, values, maps, KINDS, PLACES, GREEDY)
    if asked > 0:
        word = tile * TILE_W + tl.arange(0, TILE_W)[:, None]
        lane = tl.arange(0, 32)[None, :]
        token = word * 32 + lane
        inside = token < V
        x = row_scores(row, token, inside, scores)
        x = folded(x, row, word, lane, token, inside, scores, maps, OPS, MAX)
        here = work + shape.sums_at + SUM_WORDS * tile
        top = tl.max(x)
        off = x - tl.where(top > float("-inf"), top, 0.0)
        p = tl.exp2(off * (inverse * LOG2_E))
        # Of the other logits a product by the reciprocal serves.
        store_float(here, scaled(top, row, maps))
        store_float(here + 1, tl.sum(p))
        if SUMS >= 2:
            if asked >= 2:
                store_float(here + 2, tl.sum(tl.where(p > 0, p * -off, 0.0)) * inverse)
        if SUMS >= 3:
            if asked >= 3:
                x = x * inverse
                finite = tl.abs(x) < float("inf")
                count = tl.sum(finite.to(tl.float32))
                mean = tl.sum(tl.where(finite, x, 0.0)) / tl.maximum(count, 1.0)
                off = tl.where(finite, x - mean, 0.0)
                store_float(here + 3, count)
                store_float(here + 4, mean)
                store_float(here + 5, tl.sum(off * off))
