"""The filter: it reads the logits once, writes the fill value, and collects the candidates of each row."""

from __future__ import annotations

from fastlogits_kernels._triton import tl, triton
from fastlogits_kernels.selection.row import (
    BRACKET,
    COUNT_AT,
    FEW,
    FREE,
    HIGH_AT,
    HIGHEST,
    LOWEST,
    PART_COUNT_AT,
    PART_LARGEST_AT,
    PART_MASS_AT,
    PART_WORDS,
    REACH_AT,
    STATE_AT,
    STEPWISE,
    TOP_AT,
    UNALIGNED,
    Listed,
    Maps,
    Sample,
    Samples,
    Scores,
    Shape,
    collect,
    collect_plain,
    folded,
    key_of,
    let_next_launch,
    load_float,
    load_seed,
    noise_of_words,
    number_of,
    row_scores,
    scaled,
    wait_for_launch,
    weight_of,
)

_KEPT_W = tl.constexpr(16)  # so many words of a part are looked at at a time where rows are kept
_LISTED = tl.constexpr(512)  # so many tokens of a list are looked at at a time


@triton.jit
def _keep_for_certain(
    row, part, state, low, out_ptr, stride_out, stride_out_token, scores, maps, samples, work, shape,
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
        inside = token < scores.V
        x = row_scores(row, token, inside, scores)
        x = folded(x, row, word, lane, token, inside, scores, maps, OPS, MAX)
        divided = scaled(x, row, maps)
        sure = inside & (divided >= high)
        if MAY_BE_FREE:
            sure = inside & (sure | (state == FREE))
        if out_ptr is not None:
            here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
            tl.store(here, tl.where(sure, divided, FILL).to(out_ptr.dtype.element_ty), mask=inside)
        if BRACKETED:
            if state == BRACKET:
                near = inside & ((x < low) == 0) & (sure == 0)
                collect(near, x, token, work + COUNT_AT, work + shape.pairs_at, shape.slots, PORTABLE)
                count += sure.to(tl.int32)
                largest = tl.maximum(largest, tl.where(sure, key_of(divided), LOWEST))
                mass += tl.where(sure, weight_of(divided, load_float(work + TOP_AT)), 0)
        if samples.seeds_ptr is not None:
            seed, position = load_seed(row, samples)
            key = key_of(divided - tl.log(noise_of_words(part * BLOCK_W + start, seed, position, _KEPT_W)))
            better = sure & (key > best)
            best = tl.where(better, key, best)
            which = tl.where(better, token, which)
    summary = work + shape.parts_at + PART_WORDS * part
    if BRACKETED:
        if state == BRACKET:
            tl.store(summary + PART_COUNT_AT, tl.sum(count))
            tl.store(summary + PART_LARGEST_AT, tl.max(largest))
            tl.store((summary + PART_MASS_AT).to(tl.pointer_type(tl.int64)), tl.sum(mass))
    if samples.seeds_ptr is not None:
        key = tl.max(best)
        tl.store(summary, key)
        tl.store(summary + 1, tl.min(tl.where(best == key, which, HIGHEST)))


@triton.jit
def _filter_list(
    row, index, listed, values_ptr, banned_ptr, work, shape,
    ROOM: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Collect the candidates of a list of tokens that have values in place of their logits."""
    span_ptr = listed.spans_ptr + row * listed.stride_span + 2 * index
    first, count = tl.load(span_ptr), tl.load(span_ptr + 1)
    wait_for_launch(PDL)
    low, up = load_float(work + REACH_AT), load_float(work + REACH_AT + 1)
    for start in range(0, tl.where(tl.load(work + STATE_AT) == FEW, count, 0), _LISTED):
        entry = start + tl.arange(0, _LISTED)
        place = row * ROOM + ((first + entry) & (ROOM - 1))
        token = tl.load(listed.tokens_ptr + place, mask=entry < count, other=0)
        x = tl.load(values_ptr + place, mask=entry < count, other=0.0)
        banned = (tl.load(banned_ptr + (token >> 5), mask=entry < count, other=0) >> (token & 31)) & 1
        candidate = (entry < count) & (banned == 0) & ((x < low) == 0) & ((x > up) == 0)
        collect(candidate, x, token, work + COUNT_AT, work + shape.pairs_at, shape.slots, PORTABLE)


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def filter_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    listed_ptr, spans_ptr, stride_span, lists, all_lists,
    # outputs
    out_ptr, work_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, BANDED: tl.constexpr, BRACKETED: tl.constexpr,
    MAY_BE_FREE: tl.constexpr, BLOCK_W: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The fill value for a part of a row, what is kept for certain, and its candidates collected.

    Where tokens that have values in place of their logits come as lists, the first programs look through these, and
    the others pass such tokens over.
    """
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    samples = Samples(seeds_ptr, positions_ptr, stride_seed, stride_position)
    listed = Listed(listed_ptr, spans_ptr, stride_span, lists, all_lists)
    shape = Shape(
        W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, Sample(runs, sample_size, share)
    )  # fmt: skip
    let_next_launch(PDL)
    program = tl.program_id(0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, shape.W)
    # Of a chain that replaces such logits and bans others; in its first map stand the set of the edited tokens and the
    # room for them, in its second the set of the banned ones.
    LISTED: tl.constexpr = listed.tokens_ptr is not None
    if LISTED and (program < listed.all_lists):
        row = (program // listed.lists).to(tl.int64)
        _filter_list(
            row, program % listed.lists, listed, maps.planes_ptr,
            maps.bits_ptr + OPS[5] * maps.stride_set + row * maps.stride_bits_row, work_ptr + row * stride_work, shape,
            OPS[2] + 1, PORTABLE, PDL,
        )  # fmt: skip
    else:
        program -= listed.all_lists
        row = (program // shape.parts).to(tl.int64)
        part = program % shape.parts
        work = work_ptr + row * stride_work
        word = part * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
        lane = tl.arange(0, 32)[None, :]
        token = word * 32 + lane
        inside = token < V
        x = row_scores(row, token, inside, scores)
        if not LISTED:
            x = folded(x, row, word, lane, token, inside, scores, maps, OPS, MAX)
        wait_for_launch(PDL)
        state = tl.load(work + STATE_AT)
        low, up = load_float(work + REACH_AT), load_float(work + REACH_AT + 1)
        if (MAY_BE_FREE and (state == FREE)) or (BRACKETED and (state == BRACKET)):
            _keep_for_certain(
                row, part, state, low, out_ptr, stride_out, stride_out_token, scores, maps, samples, work, shape,
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
                    sets_ptr = maps.bits_ptr + row * maps.stride_bits_row
                    collect_plain(
                        near, x, token, sets_ptr + OPS[1] * maps.stride_set, sets_ptr + OPS[5] * maps.stride_set,
                        work + COUNT_AT, work + shape.pairs_at, shape.slots, PORTABLE,
                    )  # fmt: skip
                else:
                    collect(near, x, token, work + COUNT_AT, work + shape.pairs_at, shape.slots, PORTABLE)
