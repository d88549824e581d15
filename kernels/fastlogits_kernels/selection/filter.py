"""The filter: it reads the logits once, writes the fill value, and collects the candidates of each row."""

from __future__ import annotations

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.row import (
    BRACKET,
    COUNT_AT,
    FEW,
    FREE,
    LOWEST,
    OCTET,
    OFFSET_AT,
    PART_COUNT_AT,
    PART_LARGEST_AT,
    PART_MASS_AT,
    PART_WORDS,
    REACH_AT,
    SCALE_AT,
    STATE_AT,
    STEPWISE,
    SURE_AT,
    TOP_AT,
    UNALIGNED,
    Listed,
    Maps,
    Sample,
    Samples,
    Scores,
    Shape,
    coarse_of,
    coarse_words,
    collect,
    collect_near,
    collect_winners,
    folded,
    key_of,
    least_coarse,
    let_next_launch,
    load_float,
    load_seed,
    may_win,
    raw_scores,
    scaled,
    wait_for_launch,
    weight_of,
)

_KEPT = tl.constexpr(64)  # so many octets of a part are looked at at a time where rows are kept
_LISTED = tl.constexpr(512)  # so many tokens of a list are looked at at a time


@triton.jit
def _keep_for_certain(
    row, part, state, low, up, out_ptr, stride_out, stride_out_token, scores, maps, samples, work, shape,
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, MAY_BE_FREE: tl.constexpr, BRACKETED: tl.constexpr,
    WEIGHED: tl.constexpr, BLOCK: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Keep what is kept for certain of a part of a row, all of it or what is above its candidates, and sum it up.

    To sample, those of it that may win are collected with the candidates. Few tokens at a time: most rows don't come
    here, and what this takes of registers all programs have to spare.
    """
    first, last = load_float(work + SURE_AT), load_float(work + SURE_AT + 1)
    top = load_float(work + TOP_AT)
    count = tl.zeros([_KEPT, OCTET], tl.int32)
    largest = tl.full([_KEPT, OCTET], float("-inf"), tl.float32)
    mass = count.to(tl.int64)
    for start in range(0, BLOCK // OCTET, _KEPT):
        octet = part * (BLOCK // OCTET) + start + tl.arange(0, _KEPT)[:, None]
        token = octet * OCTET + tl.arange(0, OCTET)[None, :]
        inside = token < scores.V
        x = raw_scores(row, token, inside, scores).to(tl.float32)
        x = folded(x, row, token >> 5, token & 31, token, inside, scores, maps, OPS, MAX)
        sure = inside & (x >= first) & (x <= last)
        if MAY_BE_FREE:
            sure = inside & (sure | (state == FREE))
        divided = x
        if out_ptr is not None or WEIGHED:
            divided = scaled(x, row, maps)
        if out_ptr is not None:
            here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
            tl.store(here, tl.where(sure, divided, FILL).to(out_ptr.dtype.element_ty), mask=inside)
        if BRACKETED:
            if state == BRACKET:
                chosen = inside & ((x < low) == 0) & ((x > up) == 0) & (sure == 0)
                if samples.seeds_ptr is not None:
                    seed, position = load_seed(row, samples)
                    coarse = coarse_of(token, coarse_words(octet, seed, position))
                    scale, offset = load_float(work + SCALE_AT), load_float(work + OFFSET_AT)
                    chosen = chosen | (sure & may_win(coarse, x, scale, offset))
                collect(chosen, x, token, work + COUNT_AT, work + shape.pairs_at, shape.slots, PORTABLE)
                count += sure.to(tl.int32)
                largest = tl.maximum(largest, tl.where(sure, x, float("-inf")))
                if WEIGHED:
                    mass += tl.where(sure, weight_of(divided, top), 0)
    if BRACKETED:
        if state == BRACKET:
            summary = work + shape.parts_at + PART_WORDS * part
            number = tl.sum(count)
            tl.store(summary + PART_COUNT_AT, number)
            most = key_of(scaled(tl.max(largest), row, maps))
            tl.store(summary + PART_LARGEST_AT, tl.where(number > 0, most, LOWEST))
            weight = tl.sum(mass) if WEIGHED else tl.full([], 0, tl.int64)
            tl.store((summary + PART_MASS_AT).to(tl.pointer_type(tl.int64)), weight)


@triton.jit
def _filter_list(
    row, index, listed, values_ptr, banned_ptr, samples, work, shape,
    ROOM: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Collect the candidates of a list of tokens that have values in place of their logits."""
    span_ptr = listed.spans_ptr + row * listed.stride_span + 2 * index
    first, count = tl.load(span_ptr), tl.load(span_ptr + 1)
    wait_for_launch(PDL)
    state = tl.load(work + STATE_AT)
    asks = state == FEW
    if samples.seeds_ptr is not None:
        asks = asks | (state == FREE)
    low, up = load_float(work + REACH_AT), load_float(work + REACH_AT + 1)
    for start in range(0, tl.where(asks, count, 0), _LISTED):
        entry = start + tl.arange(0, _LISTED)
        place = row * ROOM + ((first + entry) & (ROOM - 1))
        token = tl.load(listed.tokens_ptr + place, mask=entry < count, other=0)
        x = tl.load(values_ptr + place, mask=entry < count, other=0.0)
        banned = (tl.load(banned_ptr + (token >> 5), mask=entry < count, other=0) >> (token & 31)) & 1
        candidate = ((x < low) == 0) & ((x > up) == 0)
        if samples.seeds_ptr is not None:
            if state == FREE:
                seed, position = load_seed(row, samples)
                coarse = coarse_of(token, coarse_words(token >> 3, seed, position))
                candidate = may_win(coarse, x, load_float(work + SCALE_AT), load_float(work + OFFSET_AT))
        candidate = candidate & (entry < count) & (banned == 0)
        collect(candidate, x, token, work + COUNT_AT, work + shape.pairs_at, shape.slots, PORTABLE)


@triton.jit
def tokens_of(part, half, BLOCK: tl.constexpr, HALVES: tl.constexpr):
    """The tokens of a part of a row, by octets: all of them, or half of each."""
    each: tl.constexpr = OCTET // HALVES
    octet = part * (BLOCK // OCTET) + tl.arange(0, BLOCK // OCTET)[:, None]
    return octet, octet * OCTET + half * each + tl.arange(0, each)[None, :]


@triton.jit
def raw_or_folded(
    row, octet, token, scores, maps, OPS: tl.constexpr, MAX: tl.constexpr, RAW: tl.constexpr
):  # fmt: skip
    """Logits as they are given, or folded."""
    inside = token < scores.V
    x = raw_scores(row, token, inside, scores)
    if not RAW:
        x = folded(
            x.to(tl.float32), row, octet >> 2, token & 31, token, inside, scores, maps, OPS, MAX
        )  # fmt: skip
    return x


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
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, BRACKETED: tl.constexpr,
    WEIGHED: tl.constexpr, MAY_BE_FREE: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, RAW: tl.constexpr,
    PORTABLE: tl.constexpr, PDL: tl.constexpr,
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
            maps.bits_ptr + OPS[5] * maps.stride_set + row * maps.stride_bits_row, samples,
            work_ptr + row * stride_work, shape, OPS[2] + 1, PORTABLE, PDL,
        )  # fmt: skip
    else:
        program -= listed.all_lists
        row = (program // shape.parts).to(tl.int64)
        part = program % shape.parts
        work = work_ptr + row * stride_work
        edited_ptr, banned_ptr = None, None
        if LISTED:
            sets_ptr = maps.bits_ptr + row * maps.stride_bits_row
            edited_ptr, banned_ptr = sets_ptr + OPS[1] * maps.stride_set, sets_ptr + OPS[5] * maps.stride_set
        elif RAW and len(OPS) > 0:
            # A chain that only bans tokens: the few that pass are held against its set.
            edited_ptr = maps.bits_ptr + row * maps.stride_bits_row + OPS[1] * maps.stride_set
            banned_ptr = edited_ptr
        octet, token = tokens_of(part, 0, BLOCK, HALVES)
        x = raw_or_folded(row, octet, token, scores, maps, OPS, MAX, RAW)
        other = token + OCTET // 2
        y = x
        if HALVES == 2:
            y = raw_or_folded(row, octet, other, scores, maps, OPS, MAX, RAW)
        wait_for_launch(PDL)
        state = tl.load(work + STATE_AT)
        low, up = load_float(work + REACH_AT), load_float(work + REACH_AT + 1)
        KEEPS_ALL: tl.constexpr = MAY_BE_FREE and out_ptr is not None
        SAMPLES: tl.constexpr = MAY_BE_FREE and samples.seeds_ptr is not None
        if (KEEPS_ALL and (state == FREE)) or (BRACKETED and (state == BRACKET)):
            _keep_for_certain(
                row, part, state, low, up, out_ptr, stride_out, stride_out_token, scores, maps, samples, work, shape,
                OPS, MAX, FILL, MAY_BE_FREE, BRACKETED, WEIGHED, BLOCK, PORTABLE,
            )  # fmt: skip
        else:
            if out_ptr is not None:
                here = out_ptr + row * stride_out + token.to(tl.int64) * stride_out_token
                # Not of that dtype at once: the interpreter of Triton before 3.9 has no constants of bfloat16.
                fill = tl.full(token.shape, FILL, tl.float32).to(out_ptr.dtype.element_ty)
                tl.store(here, fill, mask=token < V)
            if state == FEW:
                collect_near(
                    x, token, low, up, edited_ptr, banned_ptr, V, work + COUNT_AT, work + shape.pairs_at, shape.slots,
                    PORTABLE,
                )  # fmt: skip
                if HALVES == 2:
                    collect_near(
                        y, other, low, up, edited_ptr, banned_ptr, V, work + COUNT_AT, work + shape.pairs_at,
                        shape.slots, PORTABLE,
                    )  # fmt: skip
            if SAMPLES:
                if state == FREE:
                    seed, position = load_seed(row, samples)
                    words = coarse_words(octet, seed, position)
                    least = least_coarse(words)
                    scale, offset = load_float(work + SCALE_AT), load_float(work + OFFSET_AT)
                    collect_winners(
                        x, token, words, least, scale, offset, edited_ptr, banned_ptr, V, work + COUNT_AT,
                        work + shape.pairs_at, shape.slots, PORTABLE,
                    )  # fmt: skip
                    if HALVES == 2:
                        collect_winners(
                            y, other, words, least, scale, offset, edited_ptr, banned_ptr, V, work + COUNT_AT,
                            work + shape.pairs_at, shape.slots, PORTABLE,
                        )  # fmt: skip
