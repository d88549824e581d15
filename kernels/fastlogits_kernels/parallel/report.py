"""Log-probability and rank of a token in each row, and the likeliest tokens with theirs, from parts of a vocabulary.

The report of ``selection/logprobs.py`` on logits as they are given, bit for bit, by two small exchanges: those of
``training/shards.py``, where a row is added up that is kept as a whole. Beside the largest logits each rank tells the
likeliest tokens of its part, of which the likeliest of all are some. Once the token's logit is known to all, each rank
counts its logits that are at least as large; the numbers are added up with the masses.

Bytes moved: two reads of the part's logits where the likeliest tokens are wanted, else one; and those tiles once more
that have any logit as large as the token's. Sent by a rank: 24 bytes of each row, 8 for each of the likeliest tokens,
then 32 and 16 for each shared tile.
"""

from __future__ import annotations

import torch

from fastlogits_kernels.parallel.layout import NOBODY
from fastlogits_kernels.runtime.launcher import Launcher, launch_key, tl, triton
from fastlogits_kernels.selection.logprobs import Report, launch_report
from fastlogits_kernels.selection.row import Maps, Scores, key_of, number_of, raw_scores
from fastlogits_kernels.training.logprobs import launch_tiles
from fastlogits_kernels.training.reference import Task
from fastlogits_kernels.training.rows import TILE, TILE_WORDS
from fastlogits_kernels.training.shards import (
    NO_TOKEN,
    OUTSIDE_AT,
    SHARED_AT,
    TOLD_WORDS,
    Exchange,
    Part,
    Place,
    View,
    joined_sums,
    launch_sums,
    launch_told,
    load_told,
    room_for_sums,
    slots_on,
)

_HEAD: int = TOLD_WORDS.value // 2  # words of 64 bits before the likeliest tokens: what is told of a row
_TILE: int = TILE.value


@triton.jit(do_not_specialize=["first", "stride_packed"], do_not_specialize_on_alignment=["packed_ptr"])
def pack_likeliest_kernel(
    # inputs
    scores_ptr, tokens_ptr,
    # output
    packed_ptr,
    # shapes
    V, count, wanted, first,
    # strides
    stride_row, stride_token, stride_packed,
    # constants
    SLOTS: tl.constexpr,
):  # fmt: skip
    """The likeliest tokens of a part as numbers of 64 bits, of which the largest is the likeliest, the lowest id first.

    Of ``count`` tokens; beyond them nobody.
    """
    maps = Maps(None, None, None, None, None, None, 0, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, 0, maps)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    token = tl.load(tokens_ptr + row * count + slot, mask=slot < count, other=0)
    key = key_of(raw_scores(row, token, slot < count, scores).to(tl.float32))
    packed = (key.to(tl.int64) << 32) + (0x7FFFFFFF - token - first)
    tl.store(packed_ptr + row * stride_packed + slot, tl.where(slot < count, packed, NOBODY), mask=slot < wanted)


@triton.jit(
    do_not_specialize=["tiles", "ranks", "stride_rank", "stride_told", "all_tokens"],
    do_not_specialize_on_alignment=["told_ptr"],
)
def above_kernel(
    # inputs
    scores_ptr, tiles_ptr, told_ptr, slots_ptr,
    # output
    above_ptr,
    # shapes
    V, tiles, offset, ranks, all_tokens,
    # strides
    stride_row, stride_token, stride_rank, stride_told,
    # constants
    RANKS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """How many logits of a tile are at least as large as the token's."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    part = Part(tiles, offset, -1, -1, ranks, slots_ptr, stride_rank, stride_told)
    own = load_told(row, told_ptr, part, all_tokens, RANKS).own
    # Most tiles have none, and are not read. Beside NaN the largest logit says nothing.
    none = tl.load(tiles_ptr + (row * tiles + tile) * TILE_WORDS) < own
    token = tile * TILE + tl.arange(0, TILE) - offset
    inside = (token >= 0) & (token < tl.where(none, 0, V))
    here = scores_ptr + row * stride_row + token.to(tl.int64) * stride_token
    x = tl.load(here, mask=inside, other=float("-inf")).to(tl.float32)
    tl.store(above_ptr + row * tiles + tile, tl.sum((inside & (x >= own)).to(tl.int32)))


@triton.jit(
    do_not_specialize=["ranks", "shared", "all_tokens", "stride_rank", "stride_told", "wanted"],
    do_not_specialize_on_alignment=["told_ptr", "sums_ptr", "packed_ptr"],
)
def report_of_parts_kernel(
    # inputs
    told_ptr, slots_ptr, sums_ptr, packed_ptr,
    # outputs
    logprobs_ptr, ranks_ptr, top_tokens_ptr, top_logprobs_ptr,
    # shapes
    ranks, shared, all_tokens, wanted,
    # strides
    stride_rank, stride_told,
    # constants
    RANKS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The report of a row from what all have told, and the sums of all."""
    maps = Maps(None, None, None, None, None, None, 0, 0, 0, 0, 0)
    part = Part(0, 0, -1, -1, ranks, slots_ptr, stride_rank, stride_told)
    row = tl.program_id(0).to(tl.int64)
    told = load_told(row, told_ptr, part, all_tokens, RANKS)
    here = sums_ptr + row * (SHARED_AT + 2 * shared)
    sums, log_mass = joined_sums(row, told, here, shared, maps)
    tl.store(logprobs_ptr + row, told.own - sums.top - log_mass)
    tl.store(ranks_ptr + row, tl.load(here + OUTSIDE_AT))
    if SLOTS > 0:
        slot = tl.arange(0, SLOTS)
        rank = tl.arange(0, RANKS)
        # Words of 64 bits: two of those that are told.
        there = packed_ptr + rank[:, None].to(tl.int64) * (stride_rank // 2) + row * (stride_told // 2) + slot[None, :]
        packed = tl.load(there, mask=(rank[:, None] < ranks) & (slot[None, :] < wanted), other=NOBODY)
        best = tl.full([SLOTS], NOBODY, tl.int64)
        for i in range(wanted):
            largest = tl.max(tl.reshape(packed, [RANKS * SLOTS]))
            best = tl.where(slot == i, largest, best)
            packed = tl.where(packed == largest, NOBODY, packed)
        token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
        logprob = number_of((best >> 32).to(tl.int32)) - sums.top - log_mass
        tl.store(top_tokens_ptr + row * wanted + slot, token, mask=slot < wanted)
        tl.store(top_logprobs_ptr + row * wanted + slot, logprob, mask=slot < wanted)


# -- The host --------------------------------------------------------------------------------------------------------

_pack = Launcher(pack_likeliest_kernel, num_warps=1)
_above = Launcher(above_kernel, num_warps=4)
_report = Launcher(report_of_parts_kernel, num_warps=1, enable_fp_fusion=False)


def report_of_part(
    logits: torch.Tensor, tokens: torch.Tensor, count: int, place: Place, gather: Exchange, add: Exchange
) -> Report:
    """A report of each row of which this rank has a part; the same on all ranks.

    Eight launches, five without the likeliest tokens; no waiting.

    Args:
        logits: float32, float16 or bfloat16 ``[B, width]`` of any strides, taken as float32; never written.
        tokens: int64 ``[B]``, ids of the whole vocabulary.
        count: how many of the likeliest tokens, at most ``MOST`` and V.
        place: which tokens the ranks have, at least one each.
        gather: the tensors of all ranks, ``[ranks, *shape]``.
        add: the sum of the tensors of all ranks.
    """
    B, device = len(logits), logits.device
    ranks, slots = triton.next_power_of_2(place.ranks), triton.next_power_of_2(count) if count else 0
    task = Task(tokens, None, (), None, NO_TOKEN)
    tiles = launch_tiles(logits, task, False, place.offset)
    view = View(logits, task, slice(0, B), tiles)
    sent = torch.empty((B, _HEAD + count), dtype=torch.int64, device=device)
    launch_told(view, place, _told_of(sent))
    key = launch_key(logits)
    if count:
        local = min(count, place.width)
        likeliest = launch_report(logits, tokens - place.first, local).top_tokens
        _pack((*key, slots, *_specialised(local, count)), B, (
            logits, likeliest, sent[:, _HEAD:], place.width, local, count, place.first, *logits.stride(),
            sent.stride(0), slots,
        ))  # fmt: skip
    sent = gather(sent)
    told, table = _told_of(sent), slots_on(place, device)
    above = torch.empty((B, place.tiles), dtype=torch.int32, device=device)
    _above((*key, ranks, *_specialised(place.offset)), B * place.tiles, (
        logits, tiles, told, table, above, place.width, place.tiles, place.offset, place.ranks, place.V,
        *logits.stride(), *told.stride()[:2], ranks, _TILE,
    ))  # fmt: skip
    sums = room_for_sums(B, place, device)
    launch_sums(view, place, False, told, sums, above)
    sums = add(sums)
    report = Report(
        torch.empty(B, dtype=torch.float32, device=device), torch.empty(B, dtype=torch.int64, device=device),
        torch.empty((B, count), dtype=torch.int64, device=device),
        torch.empty((B, count), dtype=torch.float32, device=device),
    )  # fmt: skip
    _report((device, ranks, slots), B, (
        told, table, sums, sent[:, :, _HEAD:], *report, place.ranks, place.shared, place.V, count,
        *told.stride()[:2], ranks, slots,
    ))  # fmt: skip
    return report


def bytes_of_report(place: Place, count: int) -> int:
    """Bytes that a rank sends of each row in both exchanges."""
    told: int = TOLD_WORDS.value
    return place.sent - 4 * told + 8 * (_HEAD + count)


def _told_of(sent: torch.Tensor) -> torch.Tensor:
    """What is told of rows, float32 ``[..., TOLD_WORDS]``, at the beginning of what is sent of each."""
    return sent.view(torch.float32)[..., : TOLD_WORDS.value]


def _specialised(*numbers: int) -> tuple[bool, ...]:
    return tuple(each for number in numbers for each in (number == 1, number % 16 == 0))
