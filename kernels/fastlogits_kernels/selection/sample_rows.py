"""A token of each row where no rule drops anything: two launches, of which the first reads the logits once.

    sample_parts    the best sample of each part of a row
    sample_rows     the best of these

A program makes the first 16 bits of the noise of all its tokens. What the largest logit of each octet comes to at least
bounds what the noise of a token may be that wins, so that nearly all are ruled out by one comparison for an octet. The
few others are collected, and only they ask for the rest of their noise and for logarithms. A program looks at its part
alone: so a row's token depends on no guess, and where many pass they are looked at one by one.
"""

from __future__ import annotations

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.bounds import scale_and_offset
from fastlogits_kernels.selection.filter import raw_or_folded, tokens_of
from fastlogits_kernels.selection.refine import best_of, store_token
from fastlogits_kernels.selection.row import (
    HIGHEST,
    LINE,
    LOWEST,
    MAP_STRIDES,
    OCTET,
    UNALIGNED,
    Maps,
    Samples,
    Scores,
    all_kept,
    coarse_of,
    coarse_words,
    collect_winners,
    inverse_of,
    is_greedy,
    least_coarse,
    least_sample,
    let_next_launch,
    load_candidates,
    load_seed,
    row_logits,
    scaled,
    store_kept,
    wait_for_launch,
)

# The workspace of a row: a line with what is kept, then its parts. Of a part: how many tokens were collected, the key
# of its best sample and that one's token, and what was collected.
COLLECTED = 64
"""Tokens of a part that are looked at together; of more than that all are looked at."""
_COLLECTED = tl.constexpr(COLLECTED)
PART_WORDS = tl.constexpr(4 + 2 * COLLECTED)
_PAIRS_AT = tl.constexpr(4)
_CHUNK = tl.constexpr(256)

STEPWISE = [*MAP_STRIDES, "stride_seed", "stride_position", "stride_work", "W", "parts"]


@triton.jit
def _most_noise(x, largest, token, words):
    """The first bits of the noise of those tokens of an octet that have its largest logit: the least of them."""
    return tl.min(tl.where(x == largest[:, None], coarse_of(token, words).to(tl.int32), 65535), 1)


@triton.jit(do_not_specialize=STEPWISE, do_not_specialize_on_alignment=UNALIGNED)
def sample_parts_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    seeds_ptr, positions_ptr, stride_seed, stride_position,
    # output
    work_ptr,
    # shapes
    V, W, parts,
    # strides
    stride_row, stride_token, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, PORTABLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The best sample of a part of a row."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    samples = Samples(seeds_ptr, positions_ptr, stride_seed, stride_position)
    let_next_launch(PDL)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    scores = Scores(scores_ptr, stride_row, stride_token, V, W)
    here = work_ptr + row * stride_work + LINE + PART_WORDS * part
    octet, token = tokens_of(part, 0, BLOCK, HALVES)
    other = token + OCTET // 2
    x = raw_or_folded(row, octet, token, scores, maps, OPS, MAX, len(OPS) == 0)
    y = x
    if HALVES == 2:
        y = raw_or_folded(row, octet, other, scores, maps, OPS, MAX, len(OPS) == 0)
    greedy = tl.full([], False, tl.int1)
    if temperature_ptr is not None:
        greedy = is_greedy(temperature_ptr + row * maps.stride_temperature)
    tl.store(here, 0)
    best, which = tl.full([], LOWEST, tl.int32), tl.full([], HIGHEST, tl.int32)
    found = tl.full([], 0, tl.int32)
    seed, position = load_seed(row, samples)
    if greedy:
        found += _COLLECTED + 1
    else:
        words = coarse_words(octet, seed, position)
        largest = tl.max(x.to(tl.float32), 1)
        if HALVES == 2:
            largest = tl.maximum(largest, tl.max(y.to(tl.float32), 1))
        coarse = _most_noise(x.to(tl.float32), largest, token, words)
        if HALVES == 2:
            coarse = tl.minimum(coarse, _most_noise(y.to(tl.float32), largest, other, words))
        inverse = inverse_of(row, maps)
        scale, offset = scale_and_offset(tl.max(least_sample(largest * inverse, coarse)), inverse)
        tl.debug_barrier()
        least = least_coarse(words)
        collect_winners(
            x, token, words, least, scale, offset, None, None, V, here,
            here + _PAIRS_AT, _COLLECTED, PORTABLE,
        )  # fmt: skip
        if HALVES == 2:
            collect_winners(
                y, other, words, least, scale, offset, None, None, V, here,
                here + _PAIRS_AT, _COLLECTED, PORTABLE,
            )  # fmt: skip
        tl.debug_barrier()
        found += tl.load(here, volatile=True)
        if found <= _COLLECTED:
            pairs = (here + _PAIRS_AT).to(tl.pointer_type(tl.int64))
            some, valid, which_of = load_candidates(pairs, found, _COLLECTED)
            best, which = best_of(scaled(some, row, maps), valid, which_of, seed, position, greedy)
    # Where they were too many, and where the largest logit is asked for, all of the part.
    for start in range(0, tl.where(found > _COLLECTED, BLOCK, 0), _CHUNK):
        each = part * BLOCK + start + tl.arange(0, _CHUNK)
        inside = each < V
        z = row_logits(row, each >> 5, each & 31, each, inside, scores, maps, OPS, MAX)
        top, first = best_of(z, inside, each, seed, position, greedy)
        which = tl.where(top > best, first, which)
        best = tl.maximum(top, best)
    tl.store(here + 1, best)
    tl.store(here + 2, which)


@triton.jit(do_not_specialize=["parts", "stride_work"], do_not_specialize_on_alignment=["work_ptr", "tokens_ptr"])
def sample_rows_kernel(work_ptr, tokens_ptr, parts, stride_work, PARTS: tl.constexpr, PDL: tl.constexpr):
    """The best of the parts of a row: its token, and that all of it was kept."""
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    part = tl.arange(0, PARTS)
    wait_for_launch(PDL)
    here = work + LINE + PART_WORDS * part
    key = tl.load(here + 1, mask=part < parts, other=LOWEST)
    which = tl.load(here + 2, mask=part < parts, other=HIGHEST)
    store_token(tokens_ptr + row, tl.min(tl.where(key == tl.max(key), which, HIGHEST)))
    store_kept(work, all_kept())
