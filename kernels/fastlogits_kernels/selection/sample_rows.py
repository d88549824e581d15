"""Sample a token of each row where no rule drops anything: two launches, which read the logits once.

    sample_parts    the best perturbed logit of each part of a row
    sample_rows     the best of these

Few tokens can win, so few ask for their whole noise: see the README beside. A program processes its part alone, so that
a row's token depends on no guess. Where too many tokens of a part may win, all of the part are perturbed.
"""

from __future__ import annotations

from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.collect import Collection, Excluded, collect_winners, load_candidates
from fastlogits_kernels.selection.filter import Part, logits_of_part, tokens_of
from fastlogits_kernels.selection.noise import (
    best_of,
    coarse_of,
    coarse_words,
    least_coarse,
    least_perturbed,
    load_request,
    store_token,
    win_test,
)
from fastlogits_kernels.selection.row import (
    HIGHEST,
    LINE,
    LOWEST,
    MAP_STRIDES,
    OCTET,
    UNALIGNED,
    Form,
    Maps,
    Sampling,
    Scores,
    all_kept,
    inverse_of,
    let_next_launch,
    scaled,
    scaled_logits,
    store_kept,
    wait_for_launch,
)

ROOM = 64
"""Tokens of a part that are collected; where more pass, all of the part are looked at."""
_ROOM = tl.constexpr(ROOM)
# The workspace of a row: a line with what is kept, then its parts. Of a part: how many tokens were collected, the key
# of its best perturbed logit, that one's token, and what was collected.
_COUNT_AT = tl.constexpr(0)
_KEY_AT = tl.constexpr(1)
_TOKEN_AT = tl.constexpr(2)
_PAIRS_AT = tl.constexpr(4)
PART_WORDS = tl.constexpr(4 + 2 * ROOM)
_CHUNK = tl.constexpr(256)

STEPWISE = [*MAP_STRIDES, "stride_seed", "stride_position", "stride_work", "W", "parts", "first"]


@triton.jit
def _coarse_of_largest(x, largest, token, words):
    """The first bits of the noise of those tokens of an octet that have its largest logit: the least of them."""
    return tl.min(tl.where(x == largest[:, None], coarse_of(token, words).to(tl.int32), 65535), 1)


@triton.jit
def _collect_part(
    row, x, y, octet, token, first, request, scores, here, HALVES: tl.constexpr, PORTABLE: tl.constexpr
):  # fmt: skip
    """Collect the tokens of a part that may win: ``x`` and ``y`` are the halves of its octets. Returns how many."""
    other = token + OCTET // 2
    words = coarse_words(octet + first // OCTET, request.seed, request.position)
    largest = tl.max(x.to(tl.float32), 1)
    if HALVES == 2:
        largest = tl.maximum(largest, tl.max(y.to(tl.float32), 1))
    coarse = _coarse_of_largest(x.to(tl.float32), largest, token, words)
    if HALVES == 2:
        coarse = tl.minimum(coarse, _coarse_of_largest(y.to(tl.float32), largest, other, words))
    inverse = inverse_of(row, scores.maps)
    test = win_test(tl.max(least_perturbed(largest * inverse, coarse)), inverse)
    tl.debug_barrier()
    least = least_coarse(words)
    to = Collection(here + _COUNT_AT, here + _PAIRS_AT, _ROOM)
    collect_winners(x, token, scores.V, words, least, test, Excluded(None, None), to, PORTABLE)
    if HALVES == 2:
        collect_winners(y, other, scores.V, words, least, test, Excluded(None, None), to, PORTABLE)
    tl.debug_barrier()
    return tl.load(here + _COUNT_AT, volatile=True)


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
    V, W, parts, first,
    # strides
    stride_row, stride_token, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr, HALVES: tl.constexpr, PORTABLE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The best perturbed logit of a part of a row, and its token.

    The row may be a piece of the vocabulary that begins at the token ``first``, a multiple of eight.
    """
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    sampling = Sampling(seeds_ptr, positions_ptr, stride_seed, stride_position)
    let_next_launch(PDL)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    here = work_ptr + row * stride_work + LINE + PART_WORDS * part
    octet, token = tokens_of(Part(part, BLOCK, HALVES, len(OPS) == 0, -1, -1))
    x = logits_of_part(row, Part(part, BLOCK, HALVES, len(OPS) == 0, -1, -1), octet, token, scores, Form(OPS, MAX))
    y = x
    if HALVES == 2:
        other = token + OCTET // 2
        y = logits_of_part(row, Part(part, BLOCK, HALVES, len(OPS) == 0, -1, -1), octet, other, scores, Form(OPS, MAX))
    request = load_request(row, sampling, maps)
    tl.store(here + _COUNT_AT, 0)
    best, which = tl.full([], LOWEST, tl.int32), tl.full([], HIGHEST, tl.int32)
    found = tl.full([], 0, tl.int32)
    if request.greedy:
        found += _ROOM + 1
    else:
        found += _collect_part(row, x, y, octet, token, first, request, scores, here, HALVES, PORTABLE)
        if found <= _ROOM:
            some, valid, which_of = load_candidates((here + _PAIRS_AT).to(tl.pointer_type(tl.int64)), found, _ROOM)
            best, which = best_of(scaled(some, row, maps), valid, which_of + first, request)
    # Where they were too many, and where the largest logit is asked for, all of the part.
    for start in range(0, tl.where(found > _ROOM, BLOCK, 0), _CHUNK):
        each = part * BLOCK + start + tl.arange(0, _CHUNK)
        inside = each < V
        z = scaled_logits(row, each >> 5, each & 31, each, inside, scores, Form(OPS, MAX))
        top, lowest = best_of(z, inside, each + first, request)
        which = tl.where(top > best, lowest, which)
        best = tl.maximum(top, best)
    tl.store(here + _KEY_AT, best)
    tl.store(here + _TOKEN_AT, which)


@triton.jit
def best_of_parts(work, parts, PARTS: tl.constexpr):
    """The largest key of a row's parts, and the token that has it, the lowest one of several."""
    part = tl.arange(0, PARTS)
    here = work + LINE + PART_WORDS * part
    keys = tl.load(here + _KEY_AT, mask=part < parts, other=LOWEST)
    which = tl.load(here + _TOKEN_AT, mask=part < parts, other=HIGHEST)
    best = tl.max(keys)
    return best, tl.min(tl.where(keys == best, which, HIGHEST))


@triton.jit(do_not_specialize=["parts", "stride_work"], do_not_specialize_on_alignment=["work_ptr", "tokens_ptr"])
def sample_rows_kernel(work_ptr, tokens_ptr, parts, stride_work, PARTS: tl.constexpr, PDL: tl.constexpr):
    """The token of a row, the best of its parts; all of the row is kept."""
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    wait_for_launch(PDL)
    _best, token = best_of_parts(work, parts, PARTS)
    store_token(tokens_ptr + row, token)
    store_kept(work, all_kept())
