"""Log-probabilities of a vocabulary that is split over ranks, by two small exchanges.

    each rank: the largest logits of its part           -> told, float32, all of them to all ranks
    each rank: what its part comes to beside the row's  -> sums, int64, added up over the ranks
    each rank: the row, from both

A row that is kept as a whole is added up in tiles of 2048 tokens of the whole vocabulary. A tile that lies in one part
is that rank's. Of a tile that several ranks share, each tells its largest logit first; then its sums beside the
largest one of all are integers, which add up to those of one process. The numbers are ``tile_of``, ``joined`` and
``log_of`` of one process, so that a row comes to the same, bit for bit.

Of a kept set that is given, the largest logit is told and its integers are added up.

Bytes moved: one read of the part's logits, and of at most two tiles once more; with token ids, twice the logits of
these; with packed bits, two reads. Sent by a rank: 24 bytes of each row, and then 32 and 16 for each shared tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from fastlogits_kernels.runtime.launcher import Launcher, launch_key, row_stride, table_on, tl, triton
from fastlogits_kernels.runtime.recent import recent
from fastlogits_kernels.selection.goals import below_of
from fastlogits_kernels.selection.masses import (
    BLOCK,
    KeptSums,
    log_of,
    reference_below,
    reference_log_of,
    reference_mass,
)
from fastlogits_kernels.selection.row import (
    LOWEST,
    Form,
    Kept,
    Maps,
    Scores,
    all_kept,
    folded_logits,
    inverse_of,
    is_greedy,
    key_of,
    number_of,
    scaled,
    weight_of,
)
from fastlogits_kernels.selection.tiles import Tile, amounts_of, joined, tile_of, tile_with
from fastlogits_kernels.training.logprobs import (
    OPERATION,
    Rows,
    dtypes_of,
    index_key,
    integer_key,
    launch_tiles,
    rows_in_parts,
    sets_of,
    takes,
)
from fastlogits_kernels.training.reference import ScoredRows, Task, chunks, reference_entropy, scores_of
from fastlogits_kernels.training.rows import (
    BEGINS_ANYWHERE,
    SETS,
    STEPWISE_SETS,
    TILE,
    TILE_WORDS,
    Own,
    Results,
    Sets,
    entropy_of,
    kept_in_raw,
    load_given,
    span_of,
    store_row,
)
from fastlogits_kernels.training.sets import GivenSets

# -- What is told of a row, in words of 32 bits ----------------------------------------------------------------------

FIRST_TOP_AT = tl.constexpr(0)  # the largest raw logit of the part's first tile, where others share it
LAST_TOP_AT = tl.constexpr(1)  # the same of its last tile
TOP_AT = tl.constexpr(2)  # the largest raw logit of the part, or of what is kept of it
OWN_AT = tl.constexpr(3)  # the target's raw logit, where the part has it
NUMBER_AT = tl.constexpr(4)  # how many tokens of the part are kept, for all that is known; float32 as the others
RECORDS_AT = tl.constexpr(5)  # how many records follow (parallel/front.py); float32 too
TOLD_WORDS = tl.constexpr(6)

# -- What is added up of a row, in words of 64 bits ------------------------------------------------------------------

MASS_AT = tl.constexpr(0)
BELOW_AT = tl.constexpr(1)
BROKEN_AT = tl.constexpr(2)  # 0 where the sums are defined
OUTSIDE_AT = tl.constexpr(3)  # whether a set doesn't have the target; or how many tokens are as likely as it
SHARED_AT = tl.constexpr(4)  # of each shared tile two words

_LEAST = tl.constexpr(-(2**52))  # what a tile that is undefined comes to on a rank, at least
_TILE: int = TILE.value


class Place(NamedTuple):
    """Which tokens of a vocabulary a rank has, and which tiles others share with it."""

    V: int
    """Tokens of the whole vocabulary."""
    first: int
    """The first of the rank's."""
    width: int
    """How many it has."""
    ranks: int
    slots: tuple[tuple[int, int], ...]
    """Of each rank, the numbers of its first and its last tile among those that are shared; -1 for one's own."""
    rank: int

    @classmethod
    def of(cls, starts: Sequence[int], sizes: Sequence[int], rank: int) -> Place:
        """The place of a rank, of parts that follow each other."""
        V = starts[-1] + sizes[-1]
        shared = sorted({start // _TILE for start in starts if start % _TILE and start < V})
        slots = []
        for start, size in zip(starts, sizes, strict=True):
            stop = start + size
            first = shared.index(start // _TILE) if size and start % _TILE else -1
            alone = first >= 0 and start // _TILE == (stop - 1) // _TILE
            last = shared.index(stop // _TILE) if size and stop % _TILE and stop < V and not alone else -1
            slots.append((first, last))
        return cls(V, starts[rank], sizes[rank], len(starts), tuple(slots), rank)

    @property
    def offset(self) -> int:
        """Tokens of the first tile that are before the part."""
        return self.first % _TILE

    @property
    def tiles(self) -> int:
        """Tiles of which the part has any token."""
        return -(-(self.offset + self.width) // _TILE)

    @property
    def shared(self) -> int:
        """Tiles that more than one rank has."""
        return max(max(slots) for slots in self.slots) + 1

    @property
    def sent(self) -> int:
        """Bytes that a rank sends of each row, in both exchanges, where the kernels run."""
        told: int = TOLD_WORDS.value
        sums: int = SHARED_AT.value + 2 * self.shared
        return 4 * told + 8 * sums

    def task(self, task: Task, ignored: int) -> Task:
        """What is asked of the rank's tokens, counted from its first; rows left out have the target ``ignored``."""
        targets = task.targets.long() - self.first
        targets = torch.where(task.targets == task.ignore_index, ignored, targets)
        return task._replace(targets=targets, kept=self.sets(task), ignore_index=ignored)

    def sets(self, task: Task) -> GivenSets | None:
        """The sets of a task, which are of the whole vocabulary, for the logits of this part."""
        return None if task.kept is None else task.kept._replace(first=self.first, vocab=self.V)


# -- The kernels -----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A rank's part of the rows: its tiles, whose first begins ``offset`` tokens before it, and which are shared."""

    tiles: tl.tensor
    offset: tl.tensor
    first_slot: tl.tensor
    last_slot: tl.tensor
    ranks: tl.tensor
    slots_ptr: tl.tensor
    stride_rank: tl.tensor
    stride_told: tl.tensor


class Told(NamedTuple):
    """What all ranks have told of a row: the largest logits of the shared tiles that they have, ``[ranks]``.

    And the largest logit of all, the target's, and whether the row is kept as a whole.
    """

    first_slots: tl.tensor
    last_slots: tl.tensor
    first_tops: tl.tensor
    last_tops: tl.tensor
    raw_top: tl.tensor
    own: tl.tensor
    whole: tl.tensor


@triton.jit
def load_told(row, told_ptr, part, all_tokens, RANKS: tl.constexpr):
    """What all ranks have told of a row."""
    rank = tl.arange(0, RANKS)
    there = rank < part.ranks
    here = told_ptr + rank.to(tl.int64) * part.stride_rank + row * part.stride_told
    nothing = float("-inf")
    number = tl.sum(tl.load(here + NUMBER_AT, mask=there, other=0.0).to(tl.int32))
    return Told(
        tl.load(part.slots_ptr + 2 * rank, mask=there, other=-1),
        tl.load(part.slots_ptr + 2 * rank + 1, mask=there, other=-1),
        tl.load(here + FIRST_TOP_AT, mask=there, other=nothing), tl.load(here + LAST_TOP_AT, mask=there, other=nothing),
        number_of(tl.max(key_of(tl.load(here + TOP_AT, mask=there, other=nothing)))),
        number_of(tl.max(key_of(tl.load(here + OWN_AT, mask=there, other=nothing)))), number >= all_tokens,
    )  # fmt: skip


@triton.jit
def shared_top(told, slot):
    """The largest logit of a tile that ranks share."""
    first = tl.max(tl.where(told.first_slots == slot, told.first_tops, float("-inf")))
    last = tl.max(tl.where(told.last_slots == slot, told.last_tops, float("-inf")))
    return tl.maximum(first, last)


@triton.jit
def load_tile(tile, row, reads, part, scores, form, TILE: tl.constexpr):
    """The folded logits of the rank's part of a tile, if it ``reads`` them."""
    token = tile * TILE + tl.arange(0, TILE) - part.offset
    inside = (token >= 0) & (token < tl.where(reads, scores.V, 0))
    word = tl.where(inside, token >> 5, scores.W)  # none, before the part
    return folded_logits(row, word, token & 31, token, inside, scores, form)


@triton.jit
def load_own_tiles(row, reads, tiles_ptr, part, TILES: tl.constexpr):
    """The sums of the tiles that no other rank has a part of, if it ``reads`` them; nothing for the others."""
    tile = tl.arange(0, TILES)
    here = tiles_ptr + (row * part.tiles + tile) * TILE_WORDS
    there = tile < tl.where(reads, part.tiles, 0)
    there = there & ((tile > 0) | (part.first_slot < 0)) & ((tile < part.tiles - 1) | (part.last_slot < 0))
    return Tile(
        tl.load(here, mask=there, other=float("-inf")), tl.load(here + 1, mask=there, other=0.0),
        tl.load(here + 2, mask=there, other=0.0),
    )  # fmt: skip


@triton.jit
def own_of_part(row, targets_ptr, stride_target, ignore_index, first, scores):
    """The target of a row as ``Own``, ``known`` where the part has it."""
    target = tl.load(targets_ptr + row * stride_target).to(tl.int64)
    ignored = target == ignore_index
    known = (target >= first) & (target < first + scores.V) & (ignored == 0)
    token = tl.where(known, target - first, 0).to(tl.int32)
    raw = folded_logits(row, token >> 5, token & 31, token, known, scores, Form((), 0.0))
    return Own(token, known, ignored, raw, scaled(raw, row, scores.maps))


@triton.jit
def edge_tops(tops, tile, tiles, first_slot, last_slot):
    """The largest logits of a part's first and last tile, of all of its tiles, where others share these."""
    first = tl.max(tl.where((tile == 0) & (first_slot >= 0), tops, float("-inf")))
    return first, tl.max(tl.where((tile == tiles - 1) & (last_slot >= 0), tops, float("-inf")))


@triton.jit
def store_told(here, first_top, last_top, top, own, number, records):
    """Write what is told of a row, all of it: no rank is sent what stood in memory."""
    tl.store(here + FIRST_TOP_AT, first_top)
    tl.store(here + LAST_TOP_AT, last_top)
    tl.store(here + TOP_AT, top)
    tl.store(here + OWN_AT, own)
    tl.store(here + NUMBER_AT, number.to(tl.float32))
    tl.store(here + RECORDS_AT, records.to(tl.float32))


@triton.jit
def store_sums(
    row, whole, mass, below, broken, outside, told, here, shared, part, scores, form,
    BELOW: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a part comes to, and its share of the tiles that others have too, where the row is kept as a ``whole``."""
    tl.store(here + MASS_AT, mass)
    tl.store(here + BELOW_AT, below)
    tl.store(here + BROKEN_AT, broken.to(tl.int64))
    tl.store(here + OUTSIDE_AT, outside.to(tl.int64))
    if SHARED > 0:
        inverse = inverse_of(row, scores.maps)
        slot = tl.arange(0, SHARED)
        amounts, belows = tl.zeros([SHARED], tl.int64), tl.zeros([SHARED], tl.int64)
        for side in tl.static_range(2):
            mine = part.first_slot if side == 0 else part.last_slot
            tile = 0 if side == 0 else part.tiles - 1
            x = load_tile(tile, row, whole & (mine >= 0), part, scores, form, TILE)
            amount, more = amounts_of(x, shared_top(told, mine), inverse, BELOW)
            # So far below 0 that nothing makes up for it, and not so far that ranks overflow together.
            amounts = tl.where(slot == mine, tl.maximum(amount, _LEAST), amounts)
            belows = tl.where(slot == mine, more, belows)
        there = slot < shared
        tl.store(here + SHARED_AT + 2 * slot, amounts, mask=there)
        tl.store(here + SHARED_AT + 2 * slot + 1, belows, mask=there)


_OF_TOLD = ["tiles", "first_slot", "last_slot", "stride_told"]
OF_PART = [*_OF_TOLD, "ranks", "stride_rank", "shared"]
OF_ROW = ["stride_temperature", "stride_target", "first", "all_tokens"]
ANYWHERE = [*BEGINS_ANYWHERE, "told_ptr", "sums_ptr"]


@triton.jit(do_not_specialize=[*OF_ROW, *_OF_TOLD], do_not_specialize_on_alignment=ANYWHERE)
def whole_told_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, tiles_ptr,
    # output
    told_ptr,
    # shapes
    V, tiles, first, first_slot, last_slot,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target, stride_told,
    # constants
    TILES: tl.constexpr,
):  # fmt: skip
    """What is told of a row that is kept as a whole, from its tiles."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, 0, maps)
    row = tl.program_id(0).to(tl.int64)
    own = own_of_part(row, targets_ptr, stride_target, ignore_index, first, scores)
    tile = tl.arange(0, TILES)
    there = tile < tl.where(own.ignored, 0, tiles)
    top = tl.load(tiles_ptr + (row * tiles + tile) * TILE_WORDS, mask=there, other=float("-inf"))
    first_top, last_top = edge_tops(top, tile, tiles, first_slot, last_slot)
    none = tl.full([], 0, tl.int32)
    store_told(told_ptr + row * stride_told, first_top, last_top, tl.max(top), own.raw, none + V, none)


@triton.jit(do_not_specialize=[*OF_ROW, *OF_PART], do_not_specialize_on_alignment=ANYWHERE)
def whole_sums_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, tiles_ptr, above_ptr, told_ptr, slots_ptr,
    # output
    sums_ptr,
    # shapes
    V, tiles, offset, first_slot, last_slot, ranks, shared, all_tokens,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target, stride_rank, stride_told,
    # constants
    BELOW: tl.constexpr, TILES: tl.constexpr, RANKS: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a part comes to of a row that is kept as a whole, from its tiles."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, 0, maps)
    part = Part(tiles, offset, first_slot, last_slot, ranks, slots_ptr, stride_rank, stride_told)
    row = tl.program_id(0).to(tl.int64)
    reads = tl.load(targets_ptr + row * stride_target).to(tl.int64) != ignore_index
    told = load_told(row, told_ptr, part, all_tokens, RANKS)
    of = load_own_tiles(row, reads, tiles_ptr, part, TILES)
    mass, below = joined(of, told.raw_top, inverse_of(row, maps))
    broken = tl.sum((of.mass != of.mass).to(tl.int32))
    above = tl.zeros_like(broken)
    if above_ptr is not None:
        tile = tl.arange(0, TILES)
        above = tl.sum(tl.load(above_ptr + row * tiles + tile, mask=tile < tiles, other=0))
    store_sums(
        row, reads, tl.sum(mass), tl.sum(below), broken, above, told, sums_ptr + row * (SHARED_AT + 2 * shared),
        shared, part, scores, Form((), 0.0), BELOW, SHARED, TILE,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[*OF_ROW, *STEPWISE_SETS, *_OF_TOLD],
    do_not_specialize_on_alignment=[*ANYWHERE, *SETS],
)
def given_told_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, ids_ptr, counts_ptr, offsets_ptr, bits_ptr,
    # output
    told_ptr,
    # shapes
    V, most, first, all_tokens, tiles, offset, first_slot, last_slot,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target, stride_ids, stride_counts, stride_bits, stride_told,
    # constants
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What is told of a row of which a set says what is kept."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, 0, maps)
    sets = Sets(
        ids_ptr, counts_ptr, offsets_ptr, bits_ptr, stride_ids, stride_counts, stride_bits, most, first, all_tokens
    )  # fmt: skip
    part = Part(tiles, offset, first_slot, last_slot, 0, None, 0, 0)
    row = tl.program_id(0).to(tl.int64)
    own = own_of_part(row, targets_ptr, stride_target, ignore_index, first, scores)
    begin, size, whole = row, tl.full([], 0, tl.int32) + V, tl.full([], False, tl.int1)
    if ids_ptr is not None:
        begin, size, whole, overflows = span_of(row, sets)
        size = tl.where(overflows, 0, size)
    size = tl.where(own.ignored, 0, size)
    key, number = tl.where(own.known, key_of(own.raw), LOWEST), tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        x, inside, _token = load_given(start, size, row, begin, sets, scores, BLOCK)
        key = tl.maximum(key, tl.max(tl.where(inside, key_of(x), LOWEST)))
        number += tl.sum(inside.to(tl.int32))
    if bits_ptr is not None:
        # All of this part; whether of the others too, these tell.
        whole = number >= V
    else:
        number = tl.where(whole, tl.zeros_like(number) + V, 0)
    first_top, last_top = tl.full([], float("-inf"), tl.float32), tl.full([], float("-inf"), tl.float32)
    for tile in range(tl.where(whole & (own.ignored == 0), tiles, 0)):
        tile_top = tl.max(load_tile(tile, row, whole, part, scores, Form((), 0.0), TILE))
        key = tl.maximum(key, key_of(tile_top))
        first_top = tl.where((tile == 0) & (first_slot >= 0), tile_top, first_top)
        last_top = tl.where((tile == tiles - 1) & (last_slot >= 0), tile_top, last_top)
    top = tl.where(key == LOWEST, float("-inf"), number_of(key))
    none = tl.full([], 0, tl.int32)
    store_told(told_ptr + row * stride_told, first_top, last_top, top, own.raw, number, none)


@triton.jit(do_not_specialize=[*OF_ROW, *STEPWISE_SETS, *OF_PART], do_not_specialize_on_alignment=[*ANYWHERE, *SETS])
def given_sums_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, ids_ptr, counts_ptr, offsets_ptr, bits_ptr,
    told_ptr, slots_ptr,
    # output
    sums_ptr,
    # shapes
    V, most, first, all_tokens, tiles, offset, first_slot, last_slot, ranks, shared,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target, stride_ids, stride_counts, stride_bits, stride_rank, stride_told,
    # constants
    BELOW: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a part comes to of a row of which a set says what is kept."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, 0, maps)
    sets = Sets(
        ids_ptr, counts_ptr, offsets_ptr, bits_ptr, stride_ids, stride_counts, stride_bits, most, first, all_tokens
    )  # fmt: skip
    part = Part(tiles, offset, first_slot, last_slot, ranks, slots_ptr, stride_rank, stride_told)
    row = tl.program_id(0).to(tl.int64)
    own = own_of_part(row, targets_ptr, stride_target, ignore_index, first, scores)
    told = load_told(row, told_ptr, part, all_tokens, RANKS)
    begin, size, broken = row, tl.full([], 0, tl.int32) + V, tl.full([], 0, tl.int32)
    if ids_ptr is not None:
        begin, size, _whole, overflows = span_of(row, sets)
        broken += overflows.to(tl.int32)
    reads = (own.ignored == 0) & (broken == 0)
    size = tl.where(reads & (told.whole == 0), size, 0)
    top = scaled(told.raw_top, row, maps)
    mass, below = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    found = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        x, inside, token = load_given(start, size, row, begin, sets, scores, BLOCK)
        x = scaled(x, row, maps)
        found += tl.sum((inside & (token == own.token)).to(tl.int32))
        mass += tl.sum(tl.where(inside, weight_of(x, top), 0))
        if BELOW:
            below += tl.sum(below_of(x, top, inside))
    joins = own.known & (found == 0) & (told.whole == 0)
    mass += tl.where(joins & reads, weight_of(own.x, top), 0)
    if BELOW:
        below += tl.where(joins & reads, below_of(own.x, top, joins), 0)
    inverse = inverse_of(row, maps)
    for tile in range(tl.where(reads & told.whole, tiles, 0)):
        shares = ((tile == 0) & (first_slot >= 0)) | ((tile == tiles - 1) & (last_slot >= 0))
        of = tile_of(load_tile(tile, row, shares == 0, part, scores, Form((), 0.0), TILE), inverse, BELOW)
        more, more_below = joined(of, told.raw_top, inverse)
        mass += more
        below += more_below
        broken += (of.mass != of.mass).to(tl.int32)
    store_sums(
        row, reads & told.whole, mass, below, broken, joins, told, sums_ptr + row * (SHARED_AT + 2 * shared),
        shared, part, scores, Form((), 0.0), BELOW, SHARED, TILE,
    )  # fmt: skip


@triton.jit
def load_taken(row, kept_ptr, maps):
    """What rules keep of a row, of which a greedy one keeps all."""
    kept = all_kept()
    kept = Kept(tl.load(kept_ptr + 3 * row), tl.load(kept_ptr + 3 * row + 1), kept.centre, kept.farthest)
    if maps.temperature_ptr is not None:
        if is_greedy(maps.temperature_ptr + row * maps.stride_temperature):
            kept = all_kept()
    return kept


@triton.jit
def joined_sums(row, told, here, shared, maps):
    """What a row comes to, from the sums of all ranks, and the logarithm of its mass."""
    mass, below = tl.load(here + MASS_AT), tl.load(here + BELOW_AT)
    broken = tl.load(here + BROKEN_AT) != 0
    inverse = inverse_of(row, maps)
    for slot in range(shared):
        there = here + SHARED_AT + 2 * slot
        of = tile_with(shared_top(told, slot), tl.load(there), tl.load(there + 1))
        more, more_below = joined(of, told.raw_top, inverse)
        mass += more
        below += more_below
        broken = broken | (of.mass != of.mass)
    sums = KeptSums(told.raw_top, scaled(told.raw_top, row, maps), mass, below)
    return sums, log_of(mass, sums.top, (broken == 0) & (mass > 0))


@triton.jit(
    do_not_specialize=["stride_temperature", "stride_target", "all_tokens", *OF_PART],
    do_not_specialize_on_alignment=ANYWHERE,
)
def finish_kernel(
    # inputs
    temperature_ptr, stride_temperature, targets_ptr, kept_ptr, told_ptr, slots_ptr, sums_ptr,
    # outputs
    logprobs_ptr, entropy_ptr, outside_ptr, record_ptr,
    # shapes
    ranks, shared, all_tokens,
    # numbers
    ignore_index,
    # strides
    stride_target, stride_rank, stride_told,
    # constants
    RANKS: tl.constexpr,
):  # fmt: skip
    """A row from what all have told, and the sums of all."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    part = Part(0, 0, -1, -1, ranks, slots_ptr, stride_rank, stride_told)
    row = tl.program_id(0).to(tl.int64)
    told = load_told(row, told_ptr, part, all_tokens, RANKS)
    target = tl.load(targets_ptr + row * stride_target).to(tl.int64)
    ignored = target == ignore_index
    known = (target >= 0) & (target < all_tokens) & (ignored == 0)
    own = Own(target, known, ignored, told.own, scaled(told.own, row, maps))
    here = sums_ptr + row * (SHARED_AT + 2 * shared)
    sums, log_mass = joined_sums(row, told, here, shared, maps)
    lowest = tl.full([], float("-inf"), tl.float32)
    kept_raw = (lowest, lowest, tl.full([], LOWEST, tl.int32))
    if kept_ptr is not None:
        kept_raw = kept_in_raw(row, load_taken(row, kept_ptr, maps), maps)
    store_row(
        row, own, tl.load(here + OUTSIDE_AT) != 0, kept_raw, sums.raw_top, sums.top, log_mass,
        entropy_of(sums, log_mass), Results(logprobs_ptr, entropy_ptr, outside_ptr, record_ptr),
    )  # fmt: skip


# -- The host --------------------------------------------------------------------------------------------------------

Exchange: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""What the tensors of all ranks are: next to each other, ``[ranks, *shape]``; or added up."""

_whole_told = Launcher(whole_told_kernel, num_warps=4, enable_fp_fusion=False)
_whole_sums = Launcher(whole_sums_kernel, num_warps=4, enable_fp_fusion=False)
_given_told = Launcher(given_told_kernel, num_warps=4, enable_fp_fusion=False)
_given_sums = Launcher(given_sums_kernel, num_warps=4, enable_fp_fusion=False)
_finish = Launcher(finish_kernel, num_warps=1, enable_fp_fusion=False)

_tables: dict[Any, torch.Tensor] = {}
NO_TOKEN = -(2**62)
"""A target that is none of any vocabulary, and of no part of one."""


class View(NamedTuple):
    """Some rows of a part, as they are launched together."""

    logits: torch.Tensor
    task: Task
    rows: slice
    tiles: torch.Tensor | None = None
    """What their tiles come to, where rows are kept as a whole."""


def room_for_sums(N: int, place: Place, device: torch.device) -> torch.Tensor:
    """Room for what N rows come to, int64 ``[N, words]``."""
    return torch.empty((N, SHARED_AT.value + 2 * place.shared), dtype=torch.int64, device=device)


def slots_on(place: Place, device: torch.device) -> torch.Tensor:
    """The slots of all ranks, where kernels read them."""

    def made() -> torch.Tensor:
        return table_on(torch.tensor(place.slots, dtype=torch.int32), device)

    return recent(_tables, (place.slots, device), made)


def _arguments(view: View, place: Place, entropy: bool) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]:
    """The key of a launch, its inputs, and what it is told of kept sets."""
    logits, task = view.logits, view.task
    temperature, targets = task.temperature, task.targets
    sets: tuple[Any, ...] = () if task.kept is None else sets_of(task.kept, place.V)[0]
    key = (
        *launch_key(logits), *dtypes_of(temperature, targets, *sets), task.kept is None, entropy,
        index_key(task, targets), *integer_key(place.offset), triton.next_power_of_2(place.tiles),
    )  # fmt: skip
    return key, (logits, temperature, row_stride(temperature), targets), sets


def launch_told(view: View, place: Place, told: torch.Tensor) -> None:
    """Write what is told of some rows to ``told`` ``[n, TOLD_WORDS]``."""
    logits, task = view.logits, view.task
    first_slot, last_slot = place.slots[place.rank]
    key, inputs, sets = _arguments(view, place, False)
    strides = (*logits.stride(), task.targets.stride(0))
    if task.kept is None:
        _whole_told(key, len(logits), (
            *inputs, view.tiles, told, place.width, place.tiles, place.first, first_slot, last_slot,
            task.ignore_index, *strides, told.stride(0), triton.next_power_of_2(place.tiles),
        ))  # fmt: skip
        return
    _, set_strides, shape = sets_of(task.kept, place.V)
    _given_told(key, len(logits), (
        *inputs, *sets, told, place.width, *shape, place.tiles, place.offset, first_slot, last_slot,
        task.ignore_index, *strides, *set_strides, told.stride(0), BLOCK, _TILE,
    ))  # fmt: skip


def launch_sums(
    view: View,
    place: Place,
    entropy: bool,
    told: torch.Tensor,
    sums: torch.Tensor,
    above: torch.Tensor | None = None,
) -> None:
    """Write what a part comes to of some rows to ``sums``, beside what all ``told``, ``[ranks, n, TOLD_WORDS]``.

    ``above`` int32 ``[n, tiles]`` is added up in place of whether sets have the targets.
    """
    logits, task = view.logits, view.task
    slots = slots_on(place, logits.device)
    key, inputs, sets = _arguments(view, place, entropy)
    ranks, shared = triton.next_power_of_2(place.ranks), place.shared and triton.next_power_of_2(place.shared)
    key = (*key, ranks, shared, above is None)
    strides = (*logits.stride(), task.targets.stride(0))
    if task.kept is None:
        _whole_sums(key, len(logits), (
            *inputs, view.tiles, above, told, slots, sums,
            place.width, place.tiles, place.offset, *place.slots[place.rank], place.ranks, place.shared, place.V,
            task.ignore_index, *strides, *told.stride()[:2],
            entropy, triton.next_power_of_2(place.tiles), ranks, shared, _TILE,
        ))  # fmt: skip
        return
    _, set_strides, shape = sets_of(task.kept, place.V)
    _given_sums(key, len(logits), (
        *inputs, *sets, told, slots, sums, place.width, *shape, place.tiles, place.offset,
        *place.slots[place.rank], place.ranks, place.shared, task.ignore_index, *strides, *set_strides,
        *told.stride()[:2], entropy, BLOCK, ranks, shared, _TILE,
    ))  # fmt: skip


def launch_finish(
    task: Task,
    place: Place,
    told: torch.Tensor,
    sums: torch.Tensor,
    into: Rows,
    kept: torch.Tensor | None = None,
) -> None:
    """Finish all rows; ``kept`` int32 ``[N, 3]`` says what rules keep of them, None that there are no rules."""
    temperature, targets = task.temperature, task.targets
    ranks = triton.next_power_of_2(place.ranks)
    key = (
        targets.device, ranks, *dtypes_of(temperature, targets), into.entropy is None, index_key(task, targets),
        kept is None,
    )  # fmt: skip
    _finish(key, len(targets), (
        temperature, row_stride(temperature), targets, kept, told, slots_on(place, targets.device), sums,
        into.logprobs, into.entropy, into.outside, into.record, place.ranks, place.shared, place.V,
        task.ignore_index, targets.stride(0), *told.stride()[:2], ranks,
    ))  # fmt: skip


@OPERATION.falls_back
def logprobs_of_part(
    logits: torch.Tensor, task: Task, place: Place, entropy: bool, gather: Exchange, add: Exchange
) -> Rows:
    """What rows come to of which this rank has a part; the same on all ranks.

    The record is as the backward pass of the part reads it: int32 of the kernels; or of torch, float32 ``[N, 3]``, the
    largest logit, the log-mass and the entropy.

    Args:
        logits: float32, float16 or bfloat16 ``[..., width]``.
        task: what is asked, without rules; targets and sets are those of the whole vocabulary.
        place: which tokens the ranks have.
        entropy: whether entropies are asked for.
        gather: the tensors of all ranks, ``[ranks, *shape]``.
        add: the sum of the tensors of all ranks.
    """
    if not takes(logits, task, place.V):
        return _reference(logits, task, place, gather, add)
    N, device = len(task.targets), logits.device
    kept = place.sets(task)
    task = task._replace(kept=kept)
    told = torch.empty((N, TOLD_WORDS.value), dtype=torch.float32, device=device)
    views = []
    for part, begin, end in rows_in_parts(logits):
        its = task.rows(begin, end)
        tiles = launch_tiles(part, its, entropy, place.offset) if kept is None else None
        views.append(View(part, its, slice(begin, end), tiles))
        launch_told(views[-1], place, told[begin:end])
    told = gather(told)
    sums = room_for_sums(N, place, device)
    for view in views:
        launch_sums(view, place, entropy, told[:, view.rows], sums[view.rows])
    sums = add(sums)
    found = Rows.empty(N, entropy, device)
    if N:
        launch_finish(task, place, told, sums, found)
    return found


# -- The reference, and the path of the CPU --------------------------------------------------------------------------

SENT_IN_TORCH = 28
"""Bytes that a rank sends of each row, in both exchanges, where torch runs."""


def _scored(logits: torch.Tensor, task: Task) -> Iterator[tuple[slice, ScoredRows]]:
    """Some rows of a part at a time."""
    for part, first, stop in rows_in_parts(logits):
        its = task.rows(first, stop)
        for begin, end in chunks(part):
            yield slice(first + begin, first + end), scores_of(part[begin:end], its.rows(begin, end))


def _reference(logits: torch.Tensor, task: Task, place: Place, gather: Exchange, add: Exchange) -> Rows:
    N, own_task = len(task.targets), place.task(task, NO_TOKEN)
    told = torch.empty((N, 3), dtype=torch.float32, device=logits.device)
    for rows, of in _scored(logits, own_task):
        own = torch.where(of.known, of.own, -math.inf)
        told[rows] = torch.cat((of.scores.amax(-1, keepdim=True), own, of.outside.float()), 1)
    top, own, outside = gather(told).amax(0).split(1, 1)
    sums = torch.empty((N, 2), dtype=torch.int64, device=logits.device)
    for rows, of in _scored(logits, own_task):
        mass, below = (of_part(of.scores, top[rows]) for of_part in (reference_mass, reference_below))
        sums[rows] = torch.cat((mass, below), 1)
    mass, below = add(sums).split(1, 1)
    ignored = (task.targets == task.ignore_index).unsqueeze(1)
    target = task.targets.unsqueeze(1)
    known = (target >= 0) & (target < place.V)
    log_mass = reference_log_of(mass, top)
    entropies = reference_entropy(log_mass, mass, below)
    # A target that is none makes its whole row undefined.
    record = torch.cat((top, torch.where(known, log_mass, math.nan), entropies), 1)
    logprobs = torch.where(known, own - top - log_mass, math.nan).masked_fill(ignored, 0.0)
    return Rows(
        logprobs.squeeze(1), entropies.masked_fill(ignored, 0.0).squeeze(1), ((outside > 0) & ~ignored).squeeze(1),
        record,
    )  # fmt: skip
