"""Log-probability and rank of a token in each row, and the likeliest tokens with theirs, of logits that nobody writes.

    logprobs[b] = x[b, tokens[b]] - log(sum over v of exp(x[b, v]))
    ranks[b] = how many v have x[b, v] >= x[b, tokens[b]]
    top_tokens[b] = the ``count`` tokens with the largest x[b], the lowest id first on ties;   top_logprobs[b] = theirs

where x is the logits, or what a chain, a temperature and the rules of a selection have made of them: those are applied
while the row is read, so the processed distribution is written nowhere. Two launches. In the first a program takes a
tile of a row: its largest logit, its mass, how many are at least as large as the token's, and the largest of each group
of neighbouring tokens. In the second, one program a row adds up the tiles in their order, and looks for the likeliest
tokens: they lie in the ``count`` groups whose largest are the largest, since in every other group each token has that
many before it. Nothing depends on the batch, and nothing on the order in which programs run.

Bytes moved: one read of the logits, 12 bytes for each 2048 of them and 4 for each group, of which there are at most
2048, and for the likeliest tokens one read more of ``count`` groups. Rows that want nothing are not read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.pointwise.fold import Chain, find_sets
from fastlogits_kernels.pointwise.search import NOTHING, Call, TokenSets
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import Launcher, launch_key, row_stride, tl, triton
from fastlogits_kernels.runtime.library import register
from fastlogits_kernels.selection import launch
from fastlogits_kernels.selection.kept import launch_kept_bits
from fastlogits_kernels.selection.launch import Selection, kept_in, launch_select
from fastlogits_kernels.selection.launchers import maps_of
from fastlogits_kernels.selection.masses import launch_masses, log_of, reference_log_mass
from fastlogits_kernels.selection.row import (
    LOWEST,
    MAP_STRIDES,
    MAPS,
    MINUS_INFINITY,
    TILE_W,
    Form,
    Maps,
    Scores,
    folded_logits,
    inverse_of,
    is_kept,
    key_of,
    load_kept,
    number_of,
    rank_of,
    scaled,
    store_float,
)
from fastlogits_kernels.selection.tiles import Tile, joined, tile_of
from fastlogits_kernels.truncate.cpu import row_tails

MOST = 32
"""How many of the likeliest tokens the kernels look for; for more of them a sort is no slower."""

_MOST_GROUPS = 2048
# The workspace of a row, in words of 32 bits: the token's logit; of each tile its key, its mass, how many tokens are as
# likely, and its largest logit before the temperature; the key of each group.
_TILES_AT = tl.constexpr(1)
_TILE_WORDS = tl.constexpr(4)


class Report(NamedTuple):
    """Log-probabilities around some tokens."""

    logprobs: torch.Tensor
    """Of the tokens, float32 ``[B]``."""
    ranks: torch.Tensor
    """How many tokens are at least as likely, int64 ``[B]``: 1 for the likeliest."""
    top_tokens: torch.Tensor
    """The likeliest tokens, the lowest id first on ties, int64 ``[B, n]``."""
    top_logprobs: torch.Tensor
    """Theirs, float32 ``[B, n]``."""


class KeptRows(NamedTuple):
    """What a selection keeps of each row, where only its result is known."""

    rows: torch.Tensor
    """The four fields of ``Kept`` of each row, side by side: int32 ``[B, 4]`` of any row stride."""
    lowest_ties: bool
    """Whether of tokens that tie the lowest ids are kept, rather than the largest."""
    banded: bool
    """Whether centre and nearness say anything."""
    masses: torch.Tensor | None = None
    """The largest logit and the log-mass of what is kept, float32 ``[B, 2]``, as ``launch_masses`` has them. None
    for the sums over tiles; NaN for rows to which these belong."""


# -- The kernels -----------------------------------------------------------------------------------------------------

_UNALIGNED = [
    *MAPS, "tokens_ptr", "kept_ptr", "masses_ptr", "counts_ptr", "work_ptr", "logprobs_ptr", "ranks_ptr",
    "top_tokens_ptr", "top_logprobs_ptr",
]  # fmt: skip
_STEPWISE = [*MAP_STRIDES, "W", "tiles", "count", "groups"]
_STEPWISE += ["stride_of_tokens", "stride_kept", "stride_counts", "stride_work"]


@triton.jit
def _count_of_row(row, counts_ptr, stride_counts, count):
    """How many of the likeliest tokens a row wants; below 0 where it wants nothing at all."""
    wanted = count
    if counts_ptr is not None:
        wanted = tl.minimum(tl.load(counts_ptr + row * stride_counts).to(tl.int32), count)
    return wanted


@triton.jit
def _sampled_from(
    row, token, inside, scores, form, kept_ptr, stride_kept, LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr
):  # fmt: skip
    """Logits of a row as they are sampled from, and before the temperature: -inf where nothing is kept."""
    raw = folded_logits(row, token >> 5, token & 31, token, inside, scores, form)
    x = scaled(raw, row, scores.maps)
    if kept_ptr is not None:
        kept = load_kept(kept_ptr + row * stride_kept)
        stays = is_kept(x, inside, rank_of(token, LOWEST_TIES), kept, BANDED)
        x, raw = tl.where(stays, x, float("-inf")), tl.where(stays, raw, float("-inf"))
    return x, raw


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def tiles_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    tokens_ptr, kept_ptr, counts_ptr,
    # output
    work_ptr,
    # shapes
    V, W, tiles,
    # strides
    stride_row, stride_token, stride_of_tokens, stride_kept, stride_counts, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr,
    GROUP: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """What the second launch has to know of a tile of a row."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    TILE: tl.constexpr = TILE_W * 32
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    tile = program % tiles
    scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
    if _count_of_row(row, counts_ptr, stride_counts, 0) >= 0:
        # [TILE // 32, 32]: a row of it is a word of each mask.
        token = (tile * TILE_W + tl.arange(0, TILE_W)[:, None]) * 32 + tl.arange(0, 32)[None, :]
        inside = token < V
        x, raw = _sampled_from(row, token, inside, scores, Form(OPS, MAX), kept_ptr, stride_kept, LOWEST_TIES, BANDED)
        # After the tile's loads, lest those wait for the id.
        own_token = tl.load(tokens_ptr + row * stride_of_tokens)
        known = (own_token >= 0) & (own_token < V)
        own_token = tl.where(known, own_token, 0).to(tl.int32)
        own, _raw = _sampled_from(
            row, own_token, known, scores, Form(OPS, MAX), kept_ptr, stride_kept, LOWEST_TIES, BANDED
        )  # fmt: skip
        own = tl.where(known, own, float("nan"))
        largest = tl.max(tl.reshape(tl.where(inside, key_of(x), LOWEST), [TILE // GROUP, GROUP]), 1)
        # As integers, whose sum doesn't depend on how the threads of a program share a tile.
        of_tile = tile_of(raw, inverse_of(row, maps), False)
        work = work_ptr + row * stride_work
        here = work + _TILES_AT + _TILE_WORDS * tile
        tl.store(here, tl.max(largest))
        store_float(here + 1, of_tile.mass)
        tl.store(here + 2, tl.sum(tl.where(inside & (x >= own), 1, 0)))
        store_float(here + 3, of_tile.top)
        if tile == 0:
            store_float(work, own)
        if GROUPED:
            group = tl.arange(0, TILE // GROUP)
            tl.store(work + _TILES_AT + _TILE_WORDS * tiles + tile * (TILE // GROUP) + group, largest)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def report_kernel(
    # inputs
    scores_ptr,
    temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
    stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    kept_ptr, masses_ptr, counts_ptr, work_ptr,
    # outputs
    logprobs_ptr, ranks_ptr, top_tokens_ptr, top_logprobs_ptr,
    # shapes
    V, W, tiles, count, groups,
    # strides
    stride_row, stride_token, stride_kept, stride_counts, stride_work,
    # constants
    OPS: tl.constexpr, MAX: tl.constexpr, LOWEST_TIES: tl.constexpr, BANDED: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The report of a row, from its tiles and the likeliest of its groups."""
    maps = Maps(
        temperature_ptr, bits_ptr, planes_ptr, biases_ptr, row_values_ptr, numbers_ptr,
        stride_temperature, stride_set, stride_bits_row, stride_plane, stride_values_row,
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    work = work_ptr + row * stride_work
    wanted = _count_of_row(row, counts_ptr, stride_counts, count)
    tile = tl.arange(0, TILES)
    here = work + _TILES_AT + _TILE_WORDS * tile
    there = tile < tl.where(wanted >= 0, tiles, 0)
    top = number_of(tl.max(tl.load(here, mask=there, other=LOWEST)))
    masses = tl.load(here + 1, mask=there, other=0).to(tl.float32, bitcast=True)
    raw_tops = tl.load(here + 3, mask=there, other=MINUS_INFINITY).to(tl.float32, bitcast=True)
    each, _below = joined(Tile(raw_tops, masses, tl.zeros_like(masses)), tl.max(raw_tops), inverse_of(row, maps))
    log_mass = log_of(tl.sum(each), top, tl.sum((masses != masses).to(tl.int32)) == 0)
    if masses_ptr is not None:
        # Of what is kept, where that isn't all.
        its_top, its_mass = tl.load(masses_ptr + 2 * row), tl.load(masses_ptr + 2 * row + 1)
        log_mass = tl.where(its_mass == its_mass, its_mass, log_mass)
        top = tl.where(its_mass == its_mass, its_top, top)
    own = tl.load(work, mask=wanted >= 0, other=0).to(tl.float32, bitcast=True)
    rank = tl.sum(tl.load(here + 2, mask=there, other=0))
    tl.store(logprobs_ptr + row, tl.where(wanted >= 0, own - top - log_mass, float("nan")))
    tl.store(ranks_ptr + row, rank.to(tl.int64))

    if SLOTS > 0:
        scores = Scores(scores_ptr, stride_row, stride_token, V, W, maps)
        # The groups, by their largest token: between two that tie, the one of the lower ids.
        group = tl.arange(0, GROUPS)
        here = work + _TILES_AT + _TILE_WORDS * tiles + group
        keys = tl.load(here, mask=group < tl.where(wanted > 0, groups, 0), other=LOWEST)
        slot = tl.arange(0, SLOTS)
        picked = tl.full([SLOTS], -1, tl.int32)
        for i in range(tl.minimum(wanted, groups)):
            which = tl.min(tl.where(keys == tl.max(keys), group, 0x7FFFFFFF))
            picked = tl.where(slot == i, which, picked)
            keys = tl.where(group == which, LOWEST, keys)
        # Their tokens, [SLOTS, GROUP].
        token = picked[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (picked[:, None] >= 0) & (token < V)
        token = tl.where(inside, token, 0)
        x, _raw = _sampled_from(row, token, inside, scores, Form(OPS, MAX), kept_ptr, stride_kept, LOWEST_TIES, BANDED)
        keys = tl.where(inside, key_of(x), LOWEST)
        tops = tl.full([SLOTS], LOWEST, tl.int32)
        ids = tl.full([SLOTS], -1, tl.int32)
        for i in range(wanted):
            best = tl.max(keys)
            which = tl.min(tl.where(keys == best, token, 0x7FFFFFFF))
            tops = tl.where(slot == i, best, tops)
            ids = tl.where(slot == i, which, ids)
            keys = tl.where(token == which, LOWEST, keys)
        at = row * count + slot
        logprobs = tl.where(ids >= 0, number_of(tops) - top - log_mass, float("nan"))
        tl.store(top_tokens_ptr + at, ids.to(tl.int64), mask=slot < count)
        tl.store(top_logprobs_ptr + at, logprobs, mask=slot < count)


# -- The host --------------------------------------------------------------------------------------------------------

_tiles_launcher = Launcher(tiles_kernel, num_warps=4, enable_fp_fusion=False)
# Four warps, one for each scheduler of a multiprocessor: a search that goes on for as many rounds as tokens are wanted
# waits for its warps at each.
_report_launcher = Launcher(report_kernel, num_warps=4, enable_fp_fusion=False)

_MAX = (torch.float32, torch.float16, torch.bfloat16)
_FLOAT32_MAX = torch.finfo(torch.float32).max
_NO_CHAIN = Chain()


_OPERATION = Operation("report")


def takes(logits: torch.Tensor, count: int) -> bool:
    """Whether the kernels report on these logits."""
    return _OPERATION.takes(logits, launch.FORCE_KERNEL) and logits.dtype in _MAX and count <= MOST


def launch_report(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    count: int,
    counts: torch.Tensor | None = None,
    chain: Chain | None = None,
    found: TokenSets | None = None,
    temperature: torch.Tensor | None = None,
    kept: KeptRows | None = None,
) -> Report:
    """A report of each row of ``logits`` ``[B, V]``: two launches, without waiting.

    Args:
        logits: float32, float16 or bfloat16 of any strides, taken as float32; never written.
        tokens: int64 ``[B]``; one outside the vocabulary is reported with NaN and rank 0.
        count: for how many of the likeliest tokens there is room, at most ``MOST`` and V.
        counts: int32 ``[B]``: how many of them each row wants; where below 0, the row is not read. What a row doesn't
            want is NaN, rank 0, token -1. None where all rows want ``count``.
        chain: what is done to the logits before; None for nothing.
        found: the sets of the chain.
        temperature: what they are divided by then, ``[B]`` or of no dimensions, as for ``select_tokens``.
        kept: what is kept of them then; None for all.
    """
    B, V = logits.shape
    device = logits.device
    report = Report(
        torch.empty(B, dtype=torch.float32, device=device),
        torch.empty(B, dtype=torch.int64, device=device),
        torch.empty((B, count), dtype=torch.int64, device=device),
        torch.empty((B, count), dtype=torch.float32, device=device),
    )
    if not B:
        return report
    chain = chain or _NO_CHAIN
    W = words(V)
    tiles = triton.cdiv(W, TILE_W.value)
    group_words = min(TILE_W.value, triton.next_power_of_2(triton.cdiv(W, _MOST_GROUPS)))
    groups = tiles * (TILE_W.value // group_words)
    slots = 0 if not count else 8 if count <= 8 else MOST
    words_of_row = _TILES_AT.value + _TILE_WORDS.value * tiles + (groups if count else 0)
    work = torch.empty((B, words_of_row), dtype=torch.int32, device=device)
    maps = maps_of(chain, found, temperature, logits)
    rows, lowest_ties, banded, masses = (None, False, False, None) if kept is None else kept
    key = (
        *launch_key(logits), chain.form, None if temperature is None else temperature.dtype, tokens.dtype,
        counts is None or counts.dtype, rows is None, masses is None, lowest_ties, banded, slots,
    )  # fmt: skip
    shared = (chain.flat, _FLOAT32_MAX, lowest_ties, banded, group_words * 32)
    stride_kept = 0 if rows is None else rows.stride(0)
    _tiles_launcher(key, B * tiles, (
        logits, *maps, tokens, rows, counts, work, V, W, tiles,
        *logits.stride(), row_stride(tokens), stride_kept, row_stride(counts), words_of_row,
        *shared, count > 0,
    ))  # fmt: skip
    _report_launcher(key, B, (
        logits, *maps, rows, masses, counts, work, *report, V, W, tiles, count, groups,
        *logits.stride(), stride_kept, row_stride(counts), words_of_row,
        *shared, triton.next_power_of_2(groups), triton.next_power_of_2(tiles), slots,
    ))  # fmt: skip
    return report


@_OPERATION.falls_back
def select_and_report(
    logits: torch.Tensor,
    selection: Selection,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    count: int,
    temperature: torch.Tensor | None = None,
    chain: Chain | None = None,
    call: Call = NOTHING,
    counts: torch.Tensor | None = None,
    kept_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Report]:
    """The tokens of ``select_tokens``, and a report on them in the distribution that they were sampled from.

    Args:
        logits: see ``select_tokens``.
        selection: see there.
        seeds: see there.
        positions: see there.
        count: see ``launch_report``.
        temperature: see ``select_tokens``.
        chain: see there.
        call: see there.
        counts: see ``launch_report``.
        kept_bits: see ``select_tokens``.
    """
    if not (takes(logits, count) and launch.takes_scores(logits)):
        tokens, processed = launch.reference_tokens(
            logits, selection, seeds, positions, temperature, chain, call, kept_bits
        )  # fmt: skip
        return tokens, report(processed, tokens, count, counts)
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if not logits.numel():
        return tokens, launch_report(logits, tokens, count, counts)
    found = None if chain is None else find_sets(logits, chain, call)
    work = launch_select(
        logits, selection, chain, found, temperature=temperature, seeds=seeds, positions=positions, tokens=tokens
    )
    if kept_bits is not None:
        launch_kept_bits(logits, selection, work, kept_bits, chain, found, temperature)
    masses = launch_masses(logits, selection, work, chain or _NO_CHAIN, found, temperature)
    kept = KeptRows(kept_in(work), selection.lowest_ties, selection.banded, masses)
    return tokens, launch_report(logits, tokens, count, counts, chain, found, temperature, kept)


# -- The reference, and the path of the CPU --------------------------------------------------------------------------


def _likeliest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the largest scores of each row ``[B, count]``, the lowest first on ties."""
    if not count:
        return torch.empty((len(scores), 0), dtype=torch.int64, device=scores.device)
    if scores.device.type != "cpu" or not len(scores) or count >= scores.shape[1]:
        return scores.sort(descending=True, stable=True).indices[:, :count].contiguous()
    nothing, V = float("-inf"), scores.shape[1]
    values, ends = row_tails(scores, count + 1, False)
    # Where fewer are above -inf, the lowest ids at -inf follow: they are among as many ids, and as many again.
    low = scores[:, : 2 * count]
    ids = torch.arange(low.shape[1]).expand_as(low)
    tokens = torch.cat((ends.where(values != nothing, V), ids.where(low == nothing, V)), 1)
    tokens, order = tokens.sort()
    ranked = torch.cat((values, low.new_full(low.shape, nothing)), 1).gather(1, order)
    tokens = tokens.gather(1, ranked.sort(descending=True, stable=True).indices[:, :count])
    # Of what ties with the smallest, some may be missing; NaN ties with all.
    unsure = (~((values[:, 0] < values[:, 1]) | (values[:, 0] == nothing))).nonzero().squeeze(1)
    if len(unsure):
        tokens[unsure] = scores[unsure].sort(descending=True, stable=True).indices[:, :count]
    return tokens


def reference_report(
    scores: torch.Tensor, tokens: torch.Tensor, count: int, counts: torch.Tensor | None = None
) -> Report:
    """Log-probabilities of ``log_softmax(scores)``; NaN for a row that has none.

    Args:
        scores: ``[B, V]``, taken as float32.
        tokens: see ``launch_report``.
        count: how many of the likeliest tokens, at most V.
        counts: see ``launch_report``.
    """
    scores = scores.float()
    known = (tokens >= 0) & (tokens < scores.shape[1])
    own = scores.gather(1, torch.where(known, tokens, 0).unsqueeze(1))
    own = torch.where(known.unsqueeze(1), own, float("nan"))
    # In this order, or logits far from 0 would lose what makes them differ.
    top = scores.amax(-1, keepdim=True)
    log_mass = reference_log_mass(scores, top)
    top_tokens = _likeliest(scores, count)
    top_logprobs = scores.gather(1, top_tokens) - top - log_mass
    report = Report((own - top - log_mass).squeeze(1), (scores >= own).sum(1), top_tokens, top_logprobs)
    if counts is None:
        return report
    nothing = counts < 0
    beyond = torch.arange(count, device=scores.device) >= counts.unsqueeze(1)
    return Report(
        report.logprobs.masked_fill(nothing, float("nan")),
        report.ranks.masked_fill(nothing, 0),
        report.top_tokens.masked_fill(beyond, -1),
        report.top_logprobs.masked_fill(beyond, float("nan")),
    )


@_OPERATION.falls_back
def _report(logits: torch.Tensor, tokens: torch.Tensor, count: int, counts: torch.Tensor | None = None) -> Report:
    if takes(logits, count):
        return launch_report(logits, tokens, count, counts)
    return reference_report(logits, tokens, count, counts)


def _fake_report(scores: torch.Tensor, tokens: torch.Tensor, count: int, *_: object) -> tuple[torch.Tensor, ...]:
    B = scores.shape[0]
    logprobs, top_logprobs = (scores.new_empty(shape, dtype=torch.float32) for shape in ((B,), (B, count)))
    return logprobs, tokens.new_empty(B), tokens.new_empty((B, count)), top_logprobs


register(
    "report(Tensor scores, Tensor tokens, int count, Tensor? counts=None) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: tuple(_report(*arguments)),
    _fake_report,
)


def report(logits: torch.Tensor, tokens: torch.Tensor, count: int, counts: torch.Tensor | None = None) -> Report:
    """Log-probabilities of logits as they are given, see ``launch_report`` and ``reference_report``."""
    if torch.compiler.is_compiling():
        return Report(*torch.ops.fastlogits.report(logits, tokens, count, counts))
    return _report(logits, tokens, count, counts)
