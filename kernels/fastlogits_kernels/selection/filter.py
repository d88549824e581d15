"""The filter: it reads the logits once, writes the fill value, and collects the candidates of each row."""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.collect import Collection, Excluded, collect, collect_between, collect_winners
from fastlogits_kernels.selection.noise import WinTest, coarse_of, coarse_words, least_coarse, load_seed, may_win
from fastlogits_kernels.selection.row import (
    BRACKET,
    COLLECTED,
    COUNT_AT,
    LOWEST,
    OCTET,
    OFFSET_AT,
    PART_COUNT_AT,
    PART_LARGEST_AT,
    PART_MASS_AT,
    PART_WORDS,
    RAW_CERTAIN_AT,
    RAW_RANGE_AT,
    SCALE_AT,
    STATE_AT,
    STEPWISE,
    TOP_AT,
    UNALIGNED,
    UNCUT,
    Form,
    Listed,
    Maps,
    Output,
    Sampling,
    Scores,
    Shape,
    folded,
    folded_logits,
    key_of,
    let_next_launch,
    load_float,
    raw_scores,
    scaled,
    wait_for_launch,
    weight_of,
)

_KEPT = tl.constexpr(64)  # octets of a part that are processed at a time where some are kept for certain
_LISTED = tl.constexpr(512)  # tokens of a list that are processed at a time


class Part(NamedTuple):
    """A part of a row, ``BLOCK`` tokens, whose octets a thread holds at once or in two ``HALVES``; see ``Form``.

    Folded logits, or ``RAW`` ones. ``EDITED`` and ``BANNED`` are sets of tokens that are then no candidates, or -1.
    """

    index: tl.tensor
    BLOCK: tl.constexpr
    HALVES: tl.constexpr
    RAW: tl.constexpr
    EDITED: tl.constexpr
    BANNED: tl.constexpr


@triton.jit
def tokens_of(part):
    """The octets of a part of a row, and their tokens: all of them, or the first half of each octet."""
    each: tl.constexpr = OCTET // part.HALVES
    octet = part.index * (part.BLOCK // OCTET) + tl.arange(0, part.BLOCK // OCTET)[:, None]
    return octet, octet * OCTET + tl.arange(0, each)[None, :]


@triton.jit
def logits_of_part(row, part, octet, token, scores, form):
    """Raw logits of their dtype, or folded ones."""
    inside = token < scores.V
    x = raw_scores(row, token, inside, scores)
    if not part.RAW:
        x = folded(x.to(tl.float32), row, octet >> 2, token & 31, token, inside, scores, form)
    return x


@triton.jit
def _collection(work, shape):
    """Where a row's candidates are collected."""
    return Collection(work + COUNT_AT, work + shape.pairs_at, shape.slots)


@triton.jit
def _load_win_test(work):
    return WinTest(load_float(work + SCALE_AT), load_float(work + OFFSET_AT))


@triton.jit
def _store_summary(part, number, largest, mass, row, maps, work, shape):
    """How many tokens of a part are kept for certain, their largest key and their mass."""
    summary = work + shape.parts_at + PART_WORDS * part
    tl.store(summary + PART_COUNT_AT, number)
    largest_key = key_of(scaled(largest, row, maps))
    tl.store(summary + PART_LARGEST_AT, tl.where(number > 0, largest_key, LOWEST))
    tl.store((summary + PART_MASS_AT).to(tl.pointer_type(tl.int64)), mass)


@triton.jit
def _keep_for_certain(
    row, part, state, scores, form, sampling, out, work, shape,
    MAY_BE_UNCUT: tl.constexpr, BRACKETED: tl.constexpr, WEIGHED: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Keep what is kept for certain of a part of a row, all of it or what is above its candidates, and sum it up.

    To sample, the tokens of it that may win are collected with the candidates. Few tokens at a time: most rows don't
    come here, and all programs must hold the registers that this takes.
    """
    low, up = load_float(work + RAW_RANGE_AT), load_float(work + RAW_RANGE_AT + 1)
    first, last = load_float(work + RAW_CERTAIN_AT), load_float(work + RAW_CERTAIN_AT + 1)
    top = load_float(work + TOP_AT)
    count = tl.zeros([_KEPT, OCTET], tl.int32)
    largest = tl.full([_KEPT, OCTET], float("-inf"), tl.float32)
    mass = count.to(tl.int64)
    for start in range(0, part.BLOCK // OCTET, _KEPT):
        octet = part.index * (part.BLOCK // OCTET) + start + tl.arange(0, _KEPT)[:, None]
        token = octet * OCTET + tl.arange(0, OCTET)[None, :]
        inside = token < scores.V
        x = folded_logits(row, token >> 5, token & 31, token, inside, scores, form)
        certain = inside & (x >= first) & (x <= last)
        if MAY_BE_UNCUT:
            certain = inside & (certain | (state == UNCUT))
        divided = x
        if out.ptr is not None or WEIGHED:
            divided = scaled(x, row, scores.maps)
        if out.ptr is not None:
            here = out.ptr + row * out.stride_row + token.to(tl.int64) * out.stride_token
            tl.store(here, tl.where(certain, divided, out.fill).to(out.ptr.dtype.element_ty), mask=inside)
        if BRACKETED:
            if state == BRACKET:
                chosen = inside & ((x < low) == 0) & ((x > up) == 0) & (certain == 0)
                if sampling.seeds_ptr is not None:
                    seed, position = load_seed(row, sampling)
                    coarse = coarse_of(token, coarse_words(octet, seed, position))
                    chosen = chosen | (certain & may_win(coarse, x, _load_win_test(work)))
                collect(chosen, x, token, _collection(work, shape), PORTABLE)
                count += certain.to(tl.int32)
                largest = tl.maximum(largest, tl.where(certain, x, float("-inf")))
                if WEIGHED:
                    mass += tl.where(certain, weight_of(divided, top), 0)
    if BRACKETED:
        if state == BRACKET:
            all_mass = tl.sum(mass) if WEIGHED else tl.full([], 0, tl.int64)
            _store_summary(part.index, tl.sum(count), tl.max(largest), all_mass, row, scores.maps, work, shape)


@triton.jit
def _filter_list(
    row, index, listed, values_ptr, banned_ptr, sampling, work, shape,
    LIST_ROOM: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Collect the candidates of a piece of a list of edited tokens, which have values in place of their logits."""
    piece = index % listed.pieces
    span_ptr = listed.spans_ptr + row * listed.stride_span + 2 * (index // listed.pieces)
    first, count = tl.load(span_ptr), tl.load(span_ptr + 1)
    wait_for_launch(PDL)
    state = tl.load(work + STATE_AT)
    asks = state == COLLECTED
    if sampling.seeds_ptr is not None:
        asks = asks | (state == UNCUT)
    low, up = load_float(work + RAW_RANGE_AT), load_float(work + RAW_RANGE_AT + 1)
    for start in range(piece * _LISTED, tl.where(asks, count, 0), listed.pieces * _LISTED):
        entry = start + tl.arange(0, _LISTED)
        place = row * LIST_ROOM + ((first + entry) & (LIST_ROOM - 1))
        token = tl.load(listed.tokens_ptr + place, mask=entry < count, other=0)
        x = tl.load(values_ptr + place, mask=entry < count, other=0.0)
        banned = (tl.load(banned_ptr + (token >> 5), mask=entry < count, other=0) >> (token & 31)) & 1
        candidate = ((x < low) == 0) & ((x > up) == 0)
        if sampling.seeds_ptr is not None:
            if state == UNCUT:
                seed, position = load_seed(row, sampling)
                coarse = coarse_of(token, coarse_words(token >> 3, seed, position))
                candidate = may_win(coarse, x, _load_win_test(work))
        candidate = candidate & (entry < count) & (banned == 0)
        collect(candidate, x, token, _collection(work, shape), PORTABLE)


@triton.jit
def _set_of_row(row, maps, SET: tl.constexpr):
    """The bits of a set in a row."""
    return maps.bits_ptr + row * maps.stride_bits_row + SET * maps.stride_set


@triton.jit
def _filter_part(
    row, part, scores, form, sampling, out, work, shape,
    MAY_BE_UNCUT: tl.constexpr, BRACKETED: tl.constexpr, WEIGHED: tl.constexpr, PORTABLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write the fill value for a part of a row, or what is kept for certain, and collect its candidates."""
    excluded = Excluded(None, None)
    if part.EDITED >= 0:
        excluded = Excluded(_set_of_row(row, scores.maps, part.EDITED), _set_of_row(row, scores.maps, part.BANNED))
    octet, token = tokens_of(part)
    x = logits_of_part(row, part, octet, token, scores, form)
    other = token + OCTET // 2
    y = x
    if part.HALVES == 2:
        y = logits_of_part(row, part, octet, other, scores, form)
    wait_for_launch(PDL)
    state = tl.load(work + STATE_AT)
    KEEPS_ALL: tl.constexpr = MAY_BE_UNCUT and out.ptr is not None
    SAMPLES: tl.constexpr = MAY_BE_UNCUT and sampling.seeds_ptr is not None
    if (KEEPS_ALL and (state == UNCUT)) or (BRACKETED and (state == BRACKET)):
        _keep_for_certain(
            row, part, state, scores, form, sampling, out, work, shape, MAY_BE_UNCUT, BRACKETED, WEIGHED, PORTABLE
        )
    else:
        to = _collection(work, shape)
        if out.ptr is not None:
            here = out.ptr + row * out.stride_row + token.to(tl.int64) * out.stride_token
            # Not of that dtype at once: the interpreter of Triton before 3.9 has no constants of bfloat16.
            fill = tl.full(token.shape, out.fill, tl.float32).to(out.ptr.dtype.element_ty)
            tl.store(here, fill, mask=token < scores.V)
        if state == COLLECTED:
            low, up = load_float(work + RAW_RANGE_AT), load_float(work + RAW_RANGE_AT + 1)
            collect_between(x, token, scores.V, low, up, excluded, to, PORTABLE)
            if part.HALVES == 2:
                collect_between(y, other, scores.V, low, up, excluded, to, PORTABLE)
        if SAMPLES:
            if state == UNCUT:
                seed, position = load_seed(row, sampling)
                words = coarse_words(octet, seed, position)
                least = least_coarse(words)
                test = _load_win_test(work)
                collect_winners(x, token, scores.V, words, least, test, excluded, to, PORTABLE)
                if part.HALVES == 2:
                    collect_winners(y, other, scores.V, words, least, test, excluded, to, PORTABLE)


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def filter_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    listed_ptr, spans_ptr, stride_span, lists, pieces, list_programs,
    # outputs
    out_ptr, work_ptr,
    # shapes
    V, W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share,
    # strides
    stride_row, stride_token, stride_out, stride_out_token, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, FILL: tl.constexpr, BRACKETED: tl.constexpr,
    WEIGHED: tl.constexpr, MAY_BE_UNCUT: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, RAW: tl.constexpr,
    EDITED: tl.constexpr, BANNED: tl.constexpr, LIST_ROOM: tl.constexpr, PORTABLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The fill value for a part of a row, what is kept for certain, and its candidates collected.

    Where edited tokens come as lists, the first programs process these, and the others skip such tokens. ``EDITED`` and
    ``BANNED`` are their set and that of the banned tokens, which no raw logit of a candidate may be in; -1 for none.
    """
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    sampling = Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position)
    listed = Listed(listed_ptr, spans_ptr, stride_span, lists, pieces, list_programs)
    out = Output(out_ptr, stride_out, stride_out_token, None, FILL)
    shape = Shape(W, tiles, parts, slots, sums_at, parts_at, pairs_at, capacity, room, runs, sample_size, share)
    let_next_launch(PDL)
    program = tl.program_id(0)
    LISTED: tl.constexpr = listed_ptr is not None
    if LISTED and (program < list_programs):
        each = lists * pieces
        row = (program // each).to(tl.int64)
        _filter_list(
            row, program % each, listed, planes_ptr, _set_of_row(row, maps, BANNED), sampling,
            work_ptr + row * stride_work, shape, LIST_ROOM, PORTABLE, PDL,
        )  # fmt: skip
    else:
        program -= list_programs
        row = (program // parts).to(tl.int64)
        _filter_part(
            row, Part(program % parts, BLOCK, HALVES, RAW, EDITED, BANNED), scores, Form(OPS, MAX), sampling, out,
            work_ptr + row * stride_work, shape,
            MAY_BE_UNCUT, BRACKETED, WEIGHED, PORTABLE, PDL,
        )  # fmt: skip
