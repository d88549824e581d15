"""Log-probabilities of a vocabulary that is split over ranks, where rules take a fixed number of the likeliest tokens.

    each rank: the likeliest tokens of its part, and its largest logits -> told to all ranks
    each rank: what the rules keep, from what all have told; and what it has of that -> added up
    each rank: the row, from both

The likeliest tokens are what ``parallel.TopShards`` sends, so every rank finds the same cut-off. Where a rule takes
some of the tokens that one record stands for, the rank that has them finds the last one in its part. Each rank then
weighs what is kept of its part, as integers. Greedy rows are kept as a whole: their tiles are added up as in
``shards.py``.

Bytes moved: three reads of the part's logits. Sent by a rank: what ``TopShards`` sends of each row, and what
``shards.py`` does.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlogits_kernels.parallel.launch import TopShards, fewest_of, sent_of
from fastlogits_kernels.runtime.launcher import Launcher, launch_key, row_stride, tl, triton
from fastlogits_kernels.runtime.recent import recent
from fastlogits_kernels.selection.goals import below_of
from fastlogits_kernels.selection.masses import BLOCK
from fastlogits_kernels.selection.row import (
    HIGHEST,
    Form,
    Kept,
    Maps,
    Scores,
    folded_logits,
    inverse_of,
    is_greedy,
    is_kept,
    key_of,
    rank_of,
    scaled,
    weight_of,
)
from fastlogits_kernels.selection.tiles import joined
from fastlogits_kernels.training.logprobs import (
    SHARE,
    Rows,
    dtypes_of,
    index_key,
    integer_key,
    launch_tiles,
    rows_in_parts,
    takes,
)
from fastlogits_kernels.training.reference import Task
from fastlogits_kernels.training.rows import TILE, TILE_WORDS
from fastlogits_kernels.training.shards import (
    ANYWHERE,
    OF_PART,
    OF_ROW,
    SHARED_AT,
    TOLD_WORDS,
    Exchange,
    Part,
    Place,
    View,
    launch_finish,
    launch_told,
    load_own_tiles,
    load_taken,
    load_told,
    own_of_part,
    room_for_sums,
    slots_on,
    store_sums,
)

_TILE: int = TILE.value
_TOLD: int = TOLD_WORDS.value


@triton.jit
def _last_of_record(row, kept, within, first, scores, BLOCK: tl.constexpr):
    """``kept`` down to the token that is the last to stay ``within`` those that a record of this part stands for.

    These come in the order of falling ids, from the record's own on.
    """
    begin = kept.rank - first
    mine = (within > 1) & (begin >= 0) & (begin < scores.V)
    passed, rank = tl.full([], 0, tl.int32), kept.rank
    for start in range(0, tl.where(mine, begin + 1, 0), BLOCK):
        back = begin - start - tl.arange(0, BLOCK)
        token = tl.maximum(back, 0)
        x = folded_logits(row, token >> 5, token & 31, token, back >= 0, scores, Form((), 0.0))
        ties = (back >= 0) & (key_of(scaled(x, row, scores.maps)) == kept.cutoff)
        place = passed + tl.cumsum(ties.to(tl.int32), 0)
        rank = tl.minimum(rank, tl.min(tl.where(ties & (place == within), token + first, HIGHEST)))
        passed += tl.sum(ties.to(tl.int32))
    return Kept(kept.cutoff, rank, kept.centre, kept.farthest)


@triton.jit(do_not_specialize=[*OF_ROW, *OF_PART], do_not_specialize_on_alignment=[*ANYWHERE, "kept_ptr"])
def ruled_sums_kernel(
    # inputs
    scores_ptr, temperature_ptr, stride_temperature, targets_ptr, tiles_ptr, told_ptr, slots_ptr,
    # outputs
    kept_ptr, sums_ptr,
    # shapes
    V, tiles, offset, first, first_slot, last_slot, ranks, shared, all_tokens,
    # numbers
    ignore_index,
    # strides
    stride_row, stride_token, stride_target, stride_rank, stride_told,
    # constants
    LOWEST_TIES: tl.constexpr, BELOW: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, RANKS: tl.constexpr,
    SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What is kept of a part comes to; and the rank down to which ties stay, as it is for this part."""
    maps = Maps(temperature_ptr, None, None, None, None, None, stride_temperature, 0, 0, 0, 0)
    scores = Scores(scores_ptr, stride_row, stride_token, V, 0, maps)
    part = Part(tiles, offset, first_slot, last_slot, ranks, slots_ptr, stride_rank, stride_told)
    row = tl.program_id(0).to(tl.int64)
    own = own_of_part(row, targets_ptr, stride_target, ignore_index, first, scores)
    told = load_told(row, told_ptr, part, all_tokens, RANKS)
    reads = own.ignored == 0
    whole = tl.full([], False, tl.int1)
    if temperature_ptr is not None:
        whole = is_greedy(temperature_ptr + row * stride_temperature)
    kept = load_taken(row, kept_ptr, maps)
    within = tl.where(reads & (whole == 0), tl.load(kept_ptr + 3 * row + 2), 0)
    kept = _last_of_record(row, kept, within, first, scores, BLOCK)
    if within > 1:
        tl.store(kept_ptr + 3 * row + 1, kept.rank)
    top = scaled(told.raw_top, row, maps)
    mass, below = tl.full([], 0, tl.int64), tl.full([], 0, tl.int64)
    for start in range(0, tl.where(reads & (whole == 0), V, 0), BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < V
        x = folded_logits(row, token >> 5, token & 31, token, inside, scores, Form((), 0.0))
        x = scaled(x, row, maps)
        stays = is_kept(x, inside, rank_of(token + first, LOWEST_TIES), kept, False)
        mass += tl.sum(tl.where(stays, weight_of(x, top), 0))
        if BELOW:
            below += tl.sum(below_of(x, top, stays))
    stays = is_kept(own.x, own.known, rank_of(own.token + first, LOWEST_TIES), kept, False)
    joins = own.known & (stays == 0) & (own.x == own.x)
    mass += tl.where(joins, weight_of(own.x, top), 0)
    if BELOW:
        below += tl.where(joins, below_of(own.x, top, joins), 0)
    # Of a greedy row the tiles.
    of = load_own_tiles(row, reads & whole, tiles_ptr, part, TILES)
    more, more_below = joined(of, told.raw_top, inverse_of(row, maps))
    mass += tl.sum(more)
    below += tl.sum(more_below)
    # NaN is kept whatever the rules are, and beside +inf nothing is defined: both show in the tiles.
    tile = tl.arange(0, TILES)
    here = tiles_ptr + (row * tiles + tile) * TILE_WORDS
    any_mass = tl.load(here + 1, mask=tile < tl.where(reads, tiles, 0), other=0.0)
    broken = tl.sum((any_mass != any_mass).to(tl.int32))
    store_sums(
        row, reads & whole, mass, below, broken, joins, told, sums_ptr + row * (SHARED_AT + 2 * shared),
        shared, part, scores, Form((), 0.0), BELOW, SHARED, TILE,
    )  # fmt: skip


# -- The host --------------------------------------------------------------------------------------------------------

_sums = Launcher(ruled_sums_kernel, num_warps=4, enable_fp_fusion=False)
_steps: dict[Any, TopShards] = {}


def fixed_number_of(logits: torch.Tensor, task: Task, place: Place, least_width: int) -> TopShards | None:
    """What selects the likeliest tokens of a part, where rules take a fixed number of these; None where they don't.

    The same on all ranks, of whose parts the narrowest has ``least_width`` tokens.
    """
    rules = task.rules
    sent = sent_of(rules, place.V, place.ranks)
    if sent is None or not takes(logits, task, place.V) or any(rule.spec.goal == "distance" for rule in rules):
        return None
    if least_width <= fewest_of(rules, place.V):
        return None
    made = (sent, place.V, place.width, place.first, logits.device)
    if any(isinstance(rule.value, torch.Tensor) for rule in rules):
        return TopShards(rules, *made)
    return recent(_steps, (tuple(rules), *made), lambda: TopShards(rules, *made))


def _launch_sums(
    view: View, place: Place, entropy: bool, step: TopShards, told: torch.Tensor, kept: torch.Tensor, sums: torch.Tensor
) -> None:
    logits, task = view.logits, view.task
    temperature, targets = task.temperature, task.targets
    ranks, shared = triton.next_power_of_2(place.ranks), place.shared and triton.next_power_of_2(place.shared)
    tiles = triton.next_power_of_2(place.tiles)
    key = (
        *launch_key(logits), *dtypes_of(temperature, targets), entropy, index_key(task, targets),
        *integer_key(place.offset), tiles, ranks, shared, step.lowest_ties,
    )  # fmt: skip
    _sums(key, len(logits), (
        logits, temperature, row_stride(temperature), targets, view.tiles, told, slots_on(place, logits.device),
        kept, sums, place.width, place.tiles, place.offset, place.first, *place.slots[place.rank], place.ranks,
        place.shared, place.V, task.ignore_index, *logits.stride(), targets.stride(0), *told.stride()[:2],
        step.lowest_ties, entropy, BLOCK, tiles, ranks, shared, _TILE,
    ))  # fmt: skip


def ruled_logprobs_of_part(
    logits: torch.Tensor,
    task: Task,
    place: Place,
    step: TopShards,
    entropy: bool,
    gather: Exchange,
    add: Exchange,
) -> Rows:
    """What rows come to of which this rank has a part; the same on all ranks, but for the ranks of ties in the record.

    Args:
        logits: float32, float16 or bfloat16 ``[..., width]``.
        task: what is asked, with rules; targets are those of the whole vocabulary.
        place: which tokens the ranks have.
        step: what ``fixed_number_of`` returns for the others.
        entropy: whether entropies are asked for.
        gather: the tensors of all ranks, ``[ranks, *shape]``.
        add: the sum of the tensors of all ranks.
    """
    N, device = len(task.targets), logits.device
    room = int(SHARE * logits.numel() * logits.element_size())
    most = max(64, step.rows_at_once(logits.element_size(), room))
    no_seeds = torch.zeros((), dtype=torch.int64, device=device)
    likeliest = []
    for part, begin, end in rows_in_parts(logits, most):
        its = task._replace(rules=()).rows(begin, end)
        likeliest.append(step.sent(part, no_seeds, no_seeds, its.temperature, samples=False))
    told = torch.empty((N, _TOLD), dtype=torch.float32, device=device)
    views = []
    for part, begin, end in rows_in_parts(logits):
        its = task._replace(rules=()).rows(begin, end)
        views.append(View(part, its, slice(begin, end), launch_tiles(part, its, entropy, place.offset)))
        launch_told(views[-1], place, told[begin:end])
    sent = gather(torch.cat((torch.cat(likeliest), told.view(torch.int32)), 1))
    told = sent.view(torch.float32)[..., -_TOLD:]
    kept = step.kept(sent)
    sums = room_for_sums(N, place, device)
    for view in views:
        _launch_sums(view, place, entropy, step, told[:, view.rows], kept[view.rows], sums[view.rows])
    sums = add(sums)
    found = Rows.empty(N, entropy, device)
    launch_finish(task, place, told, sums, found, kept)
    return found
