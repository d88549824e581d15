"""Tokens from parts of the vocabulary: what a rank sends of its part, and the token from what all have sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastlogits_kernels.parallel.best import best_kernel, winner_kernel
from fastlogits_kernels.parallel.front import (
    FRONT_WORDS,
    SENT_WORDS,
    front_kernel,
    join_fronts_kernel,
    pick_kernel,
    pivots_kernel,
    survivors_kernel,
    weigh_kernel,
)
from fastlogits_kernels.parallel.layout import RECORDS, capacity_of, words_of
from fastlogits_kernels.parallel.pack import pack_kernel
from fastlogits_kernels.parallel.union import union_kept_kernel, union_kernel
from fastlogits_kernels.pointwise.fold import NO_SETS, Chain, find_sets
from fastlogits_kernels.pointwise.search import NOTHING, Call, TokenSets
from fastlogits_kernels.rules import Rule, is_idle
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import Launch, Launcher, launch_key, launch_together, row_stride, triton
from fastlogits_kernels.selection.launch import launch_select
from fastlogits_kernels.selection.launchers import LARGEST, Tensors, maps_of, overlaps, sample_launches
from fastlogits_kernels.selection.layout import SAMPLE_BLOCK, Selection, takes_rules
from fastlogits_kernels.training.logprobs import integer_key
from fastlogits_kernels.training.rows import TILE, TILE_WORDS
from fastlogits_kernels.training.shards import SHARED_AT, Exchange, Place, slots_on

MOST_SENT = 4096
"""Entries of a row that all ranks send together, at most, or that may be records of a part: all are in registers."""
# Candidates that are packed at a time: most rows have no more.
_BLOCK = 512
_NO_CHAIN = Chain()

_pack, _best = Launcher(pack_kernel, num_warps=4, enable_fp_fusion=False), Launcher(best_kernel, num_warps=1)
# From Hopper on a launch begins while the one before it still runs.
_early_pack = Launcher(pack_kernel, num_warps=4, enable_fp_fusion=False, launch_pdl=True)
_early_best = Launcher(best_kernel, num_warps=1, launch_pdl=True)
_winner = Launcher(winner_kernel, num_warps=1)
_WARPS = (4, 8, 16)
_union = {warps: Launcher(union_kernel, num_warps=warps, enable_fp_fusion=False) for warps in _WARPS}
_kept = {warps: Launcher(union_kept_kernel, num_warps=warps, enable_fp_fusion=False) for warps in _WARPS}
_early_union = {
    warps: Launcher(union_kernel, num_warps=warps, enable_fp_fusion=False, launch_pdl=True) for warps in _WARPS
}
_pivots = Launcher(pivots_kernel, num_warps=4, enable_fp_fusion=False)
# The rare branch of many survivors would take three times the registers, and it may spill.
_survivors = Launcher(survivors_kernel, num_warps=4, maxnreg=96, enable_fp_fusion=False)
_early_survivors = Launcher(survivors_kernel, num_warps=4, maxnreg=96, enable_fp_fusion=False, launch_pdl=True)
_front = {warps: Launcher(front_kernel, num_warps=warps, enable_fp_fusion=False) for warps in _WARPS}
_early_front = {
    warps: Launcher(front_kernel, num_warps=warps, enable_fp_fusion=False, launch_pdl=True) for warps in _WARPS
}
_join_fronts = Launcher(join_fronts_kernel, num_warps=4, enable_fp_fusion=False)
_weigh = Launcher(weigh_kernel, num_warps=4, enable_fp_fusion=False)
_early_weigh = Launcher(weigh_kernel, num_warps=4, enable_fp_fusion=False, launch_pdl=True)
_pick = Launcher(pick_kernel, num_warps=1, enable_fp_fusion=False)


def sent_of(rules: Sequence[Rule], V: int, ranks: int) -> int | None:
    """How many entries of a row each rank sends, where the rules keep few tokens of all whatever the logits are.

    So they do if a fixed number of the most likely tokens is taken before anything is added up. None where they don't,
    or where more is asked of tokens that tie than their records say.
    """
    acting = [rule for rule in rules if not is_idle(rule, V)]
    at = next((i for i, rule in enumerate(acting) if rule.kind != "min_p"), len(acting))
    if at == len(acting) or not takes_rules(rules):
        return None
    first, rest = acting[at], acting[at + 1 :]
    if first.spec.goal != "count" or isinstance(first.value, torch.Tensor):
        return None
    # A rule that takes some of those that tie leaves others that count for the next one.
    cut = next((i for i, rule in enumerate(rest) if rule.spec.goal == "mass"), len(rest))
    if any(rule.spec.goal == "entropy" for rule in rest) or any(rule.spec.sums for rule in rest[cut + 1 :]):
        return None
    sent = capacity_of(fewest_of(rules, V))
    return sent if sent * triton.next_power_of_2(ranks) <= MOST_SENT else None


def fewest_of(rules: Sequence[Rule], V: int) -> int:
    """How many of the most likely tokens rules that ``sent_of`` takes look at."""
    acting = [rule for rule in rules if not is_idle(rule, V)]
    count = next(rule for rule in acting if rule.spec.goal == "count")
    return max(int(count.value), *(rule.min_tokens_to_keep for rule in acting))


def keep_the_first(rules: Sequence[Rule], V: int) -> bool:
    """Whether rules keep the first tokens in the order of their logits, as the largest logit and sums of the row say.

    The sums are those of the whole row, so no rule may come before one that asks for them; and no rule may keep a
    fixed number of tokens, nor a band.
    """
    acting = [rule for rule in rules if not is_idle(rule, V)]
    return (
        bool(acting)
        and takes_rules(rules)
        and all(rule.spec.goal in ("none", "mass") and rule.min_tokens_to_keep <= 1 for rule in acting)
        and all(rule.spec.sums <= 1 for rule in acting)
        and not any(rule.spec.sums for rule in acting[1:])
    )


def _chain_of(logits: torch.Tensor, chain: Chain | None, call: Call) -> tuple[Chain, TokenSets | None]:
    """The chain before a step, and the sets that a call of it finds."""
    if chain is None:
        return _NO_CHAIN, None
    return chain, find_sets(logits, chain, call)


class Begun(NamedTuple):
    """A step of which a rank has done its own part."""

    sent: torch.Tensor
    """What it sends."""
    finish: Callable[[torch.Tensor, Exchange], torch.Tensor]
    """The token of each row, from what all ranks have sent; what is handed over adds up tensors of all ranks."""


class _OneExchange:
    """A step whose tokens are found from what all ranks have sent."""

    sent: Callable[..., torch.Tensor]
    tokens: Callable[..., torch.Tensor]

    def begin(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor | None,
        *inputs: Any,
    ) -> Begun:
        """Launch what a rank does before the exchange; the arguments are those of ``sent``."""
        sent = self.sent(logits, seeds, positions, temperature, *inputs)
        return Begun(sent, lambda all_sent, _: self.tokens(all_sent, seeds, positions, temperature))


class TopShards(_OneExchange):
    """Samples from parts of a vocabulary by rules that keep few tokens of all.

    Args:
        rules: the rules; ``sent_of`` takes them.
        sent: what it says.
        V: tokens of the vocabulary.
        own: tokens of this rank's part.
        first: the first of them.
        device: where the logits are.
    """

    def __init__(self, rules: Sequence[Rule], sent: int, V: int, own: int, first: int, device: torch.device) -> None:
        count = next(rule for rule in rules if rule.spec.goal == "count" and not is_idle(rule, V))
        # What none of the most likely tokens of the part is, none of those of the vocabulary is.
        self._local = Selection((count._replace(value=fewest_of(rules, V)),), own, device, unrounded=True)
        self._all = Selection(rules, V, device)
        self._sent, self._V, self._first = sent, V, first

    def sent(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor | None,
        chain: Chain | None = None,
        call: Call = NOTHING,
        samples: bool = True,
    ) -> torch.Tensor:
        """What this rank sends of its part ``[B, own]``, int32 ``[B, words]``: some four launches, and one.

        Where nobody ``samples`` from it, NaN is sent as any other logit.
        """
        B, own = logits.shape
        chain, found = _chain_of(logits, chain, call)
        work = launch_select(logits, self._local, chain, found, temperature=temperature)
        packed = torch.empty(B, words_of(self._sent), dtype=torch.int32, device=logits.device)
        layout = self._local.layouts[logits.element_size()]
        early = overlaps(logits.device)
        key = (
            *launch_key(logits), chain.form, self._sent, self._local.lowest_ties, samples,
            *(None if each is None else each.dtype for each in (temperature, seeds, positions)),
        )  # fmt: skip
        (_early_pack if early else _pack)(key, B, (
            logits, *maps_of(chain, found, temperature, logits), seeds, positions, row_stride(seeds),
            row_stride(positions), work, packed, own, words(own), self._first, layout.shape.pairs_at,
            *logits.stride(), work.stride(0), packed.stride(0),
            chain.flat, LARGEST[torch.float32], self._local.lowest_ties, self._sent, _BLOCK, samples, early,
        ))  # fmt: skip
        return packed

    def rows_at_once(self, itemsize: int, bytes_of_workspace: int) -> int:
        """Of how many rows ``sent`` takes no more than so many bytes for its workspace; at least one."""
        return max(1, bytes_of_workspace // (4 * self._local.layouts[itemsize].words_of_row))

    @property
    def lowest_ties(self) -> bool:
        """Whether of tokens that tie the lowest ids are kept first."""
        return self._all.lowest_ties

    def _size_of_union(self, ranks: int) -> tuple[int, int, tuple[torch.Tensor, ...]]:
        """Entries of a row that all have sent, the warps for them, and the parameters that rows have of their own."""
        slots = self._sent * triton.next_power_of_2(ranks)
        warps = 4 if slots <= 512 else 8 if slots <= 1024 else 16
        return slots, warps, tuple([row.contiguous() for row in self._all.rows])

    def kept(self, sent: torch.Tensor) -> torch.Tensor:
        """What is kept of each row, int32 ``[B, 3]``, from what all have sent, ``[ranks, B, words]``: two launches.

        See ``union_kept_kernel``. No rule may keep a band.
        """
        ranks, B, _ = sent.shape
        selection = self._all
        kept = torch.empty(B, 3, dtype=torch.int32, device=sent.device)
        slots, warps, rows = self._size_of_union(ranks)
        key = (sent.device, slots, self._sent, selection.form, self._V, tuple(row.dtype for row in rows))
        for tied in (False, True):
            _kept[warps]((*key, tied), B, (
                sent, (selection.numbers, *rows), kept, self._V, ranks, sent.stride(1), sent.stride(0),
                selection.kinds, selection.leasts, selection.places, selection.lowest_ties,
                self._sent, slots, triton.next_power_of_2(ranks), tied,
            ))  # fmt: skip
        return kept

    def tokens(
        self,
        sent: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor | None,
    ) -> torch.Tensor:
        """The token of each row, int64 ``[B]``, from what all ranks have sent, ``[ranks, B, words]``: two launches."""
        ranks, B, _ = sent.shape
        selection = self._all
        tokens = torch.empty(B, dtype=torch.int64, device=sent.device)
        slots, warps, rows = self._size_of_union(ranks)
        key = (
            sent.device, slots, self._sent, selection.form, self._V,
            *(None if each is None else each.dtype for each in (temperature, seeds, positions)),
            tuple(row.dtype for row in rows),
        )  # fmt: skip
        stride = 0 if temperature is None or temperature.ndim == 0 else temperature.stride(0)
        early = overlaps(sent.device)
        for tied in (False, True):
            launchers = _early_union if tied and early else _union
            launchers[warps]((*key, tied), B, (
                sent, (selection.numbers, *rows), temperature, stride, seeds, positions, row_stride(seeds),
                row_stride(positions), tokens, self._V, ranks, sent.stride(1), sent.stride(0),
                selection.kinds, selection.leasts, selection.places, selection.banded, selection.lowest_ties,
                self._sent, slots, triton.next_power_of_2(ranks), tied, early,
            ))  # fmt: skip
        return tokens


class BestShards(_OneExchange):
    """Samples from parts of a vocabulary where no rule drops anything.

    Args:
        own: tokens of this rank's part.
        first: the first of them, a multiple of eight.
        device: where the logits are.
    """

    def __init__(self, own: int, first: int, device: torch.device) -> None:
        self._selection = Selection((), own, device)
        self._first = first

    def sent(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor | None,
        chain: Chain | None = None,
        call: Call = NOTHING,
    ) -> torch.Tensor:
        """What this rank sends of its part ``[B, own]``, int64 ``[B]``: two launches."""
        B, own = logits.shape
        chain, found = _chain_of(logits, chain, call)
        bits, planes, row_values, _ = found or NO_SETS
        words_of_row = self._selection.words_to_sample
        work = torch.empty(B, words_of_row, dtype=torch.int32, device=logits.device)
        best = torch.empty(B, dtype=torch.int64, device=logits.device)
        # Tokens only say what is wanted: the rows' winners are found elsewhere.
        tensors = Tensors(logits, work, None, best, temperature, seeds, positions, bits, planes, row_values)
        parts = -(-own // SAMPLE_BLOCK)
        early = overlaps(logits.device)
        most = triton.next_power_of_2(parts)
        reads, _ = sample_launches(self._selection, chain, found, tensors, tensors, self._first)
        find = Launch(_early_best if early else _best, (logits.device, most), B, (
            work, best, parts, words_of_row, most, early,
        ))  # fmt: skip
        launch_together([reads, find])
        return best

    def tokens(self, sent: torch.Tensor, *_: Any) -> torch.Tensor:
        """The token of each row, int64 ``[B]``, from what all ranks have sent, ``[ranks, B]``: one launch."""
        ranks, B = sent.shape
        tokens = torch.empty(B, dtype=torch.int64, device=sent.device)
        most = triton.next_power_of_2(ranks)
        _winner((sent.device, most), B, (sent, tokens, ranks, B, most))
        return tokens


class FrontShards:
    """Samples from parts of a vocabulary by rules that ``keep_the_first`` tokens, however many.

    Args:
        rules: the rules.
        place: which tokens the ranks have; ``fits`` says whether there is room for that.
        device: where the logits are.
    """

    def __init__(self, rules: Sequence[Rule], place: Place, device: torch.device) -> None:
        self._selection = Selection(rules, place.V, device)
        self._place = place
        self._weighs = any(rule.spec.sums for rule in rules if not is_idle(rule, place.V))

    @staticmethod
    def bytes_sent(place: Place) -> int:
        """Bytes that a rank sends of each row, in both exchanges."""
        first: int = SENT_WORDS.value
        second: int = SHARED_AT.value + 2 * place.shared + RECORDS
        return 4 * first + 8 * second

    @staticmethod
    def fits(place: Place) -> bool:
        """Whether the records of a part, and those of all parts, are found in registers."""
        return bool(RECORDS * triton.next_power_of_2(max(place.tiles, place.ranks)) <= MOST_SENT)

    def begin(
        self,
        logits: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        temperature: torch.Tensor | None,
        chain: Chain | None = None,
        call: Call = NOTHING,
    ) -> Begun:
        """Find the records of this rank's part ``[B, width]``: three launches.

        To finish takes as many, and an exchange; two launches where no rule adds up probabilities.
        """
        (B, width), device, place = logits.shape, logits.device, self._place
        selection, early = self._selection, overlaps(logits.device)
        chain, found = _chain_of(logits, chain, call)
        tiles = torch.empty((B, place.tiles, TILE_WORDS.value), dtype=torch.float32, device=device)
        pivots = torch.empty((B, place.tiles), dtype=torch.int64, device=device)
        bounds = torch.empty((B, place.tiles), dtype=torch.float32, device=device)
        survivors = torch.empty((B, place.tiles * RECORDS, 2), dtype=torch.int32, device=device)
        counts = torch.empty(B, dtype=torch.int32, device=device)
        sent = torch.empty((B, SENT_WORDS.value), dtype=torch.int32, device=device)
        request = (seeds, positions, row_stride(seeds), row_stride(positions))
        inputs = (logits, *maps_of(chain, found, temperature, logits))
        shape, where = (width, words(width), place.tiles, place.offset), place.slots[place.rank]
        dtypes = tuple(None if each is None else each.dtype for each in (temperature, seeds, positions))
        key = (*launch_key(logits), chain.form, selection.lowest_ties, *integer_key(place.offset), *dtypes)
        constants = (chain.flat, LARGEST[torch.float32], selection.lowest_ties)
        programs, most = B * place.tiles, triton.next_power_of_2(place.tiles)
        _pivots(key, programs, (
            *inputs, *request, tiles, pivots, bounds, counts, *shape, place.first, *logits.stride(),
            *constants, TILE.value, early,
        ))  # fmt: skip
        (_early_survivors if early else _survivors)((*key, most), programs, (
            *inputs, *request, tiles, pivots, bounds, survivors, counts, *shape, place.first, *logits.stride(),
            *constants, most, TILE.value, early,
        ))  # fmt: skip
        warps = 4 if most <= 16 else 8 if most <= 32 else 16
        row_temperature = (temperature, row_stride(temperature))
        (_early_front if early else _front)[warps]((device, selection.lowest_ties, most, *dtypes), B, (
            *row_temperature, *request, survivors, counts, tiles, sent, place.tiles, *where, sent.stride(0),
            selection.lowest_ties, most, early,
        ))  # fmt: skip

        def finish(all_sent: torch.Tensor, add: Exchange) -> torch.Tensor:
            told, slots = all_sent.view(torch.float32), slots_on(place, device)
            strides = all_sent.stride()[:2]
            ranks, shared = triton.next_power_of_2(place.ranks), place.shared and triton.next_power_of_2(place.shared)
            front = torch.empty((B, FRONT_WORDS.value), dtype=torch.int32, device=device)
            sums = None
            if self._weighs:
                width_of_sums = SHARED_AT.value + 2 * place.shared + RECORDS
                sums = torch.empty((B, width_of_sums), dtype=torch.int64, device=device)
            _join_fronts((*key, self._weighs, ranks, most, shared), B, (
                *inputs, *request, tiles, all_sent, told, slots, front, sums,
                *shape, *where, place.ranks, place.shared, place.V, *logits.stride(), *strides,
                *constants, ranks, most, shared, TILE.value, early,
            ))  # fmt: skip
            if sums is not None:
                (_early_weigh if early else _weigh)(key, B * place.tiles, (
                    *inputs, tiles, front, sums, *shape, place.first, place.shared, *logits.stride(),
                    *constants, TILE.value, early,
                ))  # fmt: skip
                sums = add(sums)
            tokens = torch.empty(B, dtype=torch.int64, device=device)
            rows = tuple([row.contiguous() for row in selection.rows])
            _pick((device, selection.form, self._weighs, ranks, *dtypes, tuple(row.dtype for row in rows)), B, (
                (selection.numbers, *rows), *row_temperature, *request, told, slots, front, sums, tokens,
                place.V, place.ranks, place.shared, *strides, selection.kinds, selection.places, ranks,
            ))  # fmt: skip
            return tokens

        return Begun(sent, finish)
