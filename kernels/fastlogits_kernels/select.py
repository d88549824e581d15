"""Fold, truncate and draw: find the few tokens of a row that count, then settle among them.

    x = fold(scores) / temperature;  for rule in rules: drop what it drops;  out = x or the fill, or a token

Three launches. The first takes from a sample of each row a bound that hardly any token below can survive. The second
reads the logits, writes the fill value everywhere, and puts by the tokens above the bound. The third, one program a
row, applies the rules to these few, by bisection on the bits of the logits, and writes the survivors or draws one of
them. Where a rule that speaks of probabilities may come first, a launch before these adds up the rows that ask for it,
and takes the sample of each, which many programs do sooner than one.

The second launch doesn't divide by the temperature: it holds the logits against a range that the first one has put
before the division, a little too wide, and the third divides the few that pass and looks at them exactly. Of a serving
step it passes the tokens over that have values in place of their logits, and takes these from their lists.

Where more tokens stay than can be put by, the sample gives a second bound, above which all are kept: the second launch
writes them, or draws the best of them, and adds them up; only what lies between the bounds is put by. Of a flat row
that may still be thousands, through which the last launch goes block by block.

A bound is a guess that the last launch verifies: where too many tokens are above it, or a rule would keep one below,
or drop one that was kept, its program works on the whole row instead, with the same arithmetic. So the result never
depends on the guess, on the batch around a row, or on the order in which tokens were put by: probabilities are added up
as integers of 2 ** -37 of the largest one, and the sums over a row, of which there is one for each tile, in the order
of the tiles.

Bytes moved: one read and one write of the logits (no write for a token), a read more for the sums, and what is put by:
in most rows next to nothing, at most a sixth of the logits. The workspace has room for that, and a tenth besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from fastlogits_kernels._backend import Operation
from fastlogits_kernels._library import register
from fastlogits_kernels._recent import hold, is_capturing, recent
from fastlogits_kernels._triton import Launcher, empty_out, form_of, row_stride, table_on, triton
from fastlogits_kernels.bits import words
from fastlogits_kernels.draw import draw
from fastlogits_kernels.fold import NO_SETS, NOWHERE, Chain, chain_of, find_sets, reference_fold, set_strides
from fastlogits_kernels.selection import (
    ALIVE_AT,
    FEW_SLOTS,
    MANY_SLOTS,
    PART_WORDS,
    SOME_SLOTS,
    SUM_WORDS,
    SUMS_AT,
    TILE_W,
)
from fastlogits_kernels.settle import settle_kernel
from fastlogits_kernels.sweep import bound_kernel, sums_kernel, sweep_kernel
from fastlogits_kernels.token_sets import Position, TokenSets
from fastlogits_kernels.truncate import Rule, truncate

_KINDS = {"top_k": 0, "top_p": 1, "min_p": 2, "typical": 3, "epsilon": 4, "eta": 5, "top_h": 6, "top_n_sigma": 7}


class _Launchers(NamedTuple):
    """Of the four kernels."""

    sums: Launcher
    bound: Launcher
    sweep: Launcher
    settle: Launcher

    @classmethod
    def of(cls, **early: bool) -> _Launchers:
        return cls(
            Launcher(sums_kernel, num_warps=4, enable_fp_fusion=False),
            # Two programs of a multiprocessor at once.
            Launcher(bound_kernel, num_warps=16, enable_fp_fusion=False, maxnreg=64, **early),
            # Twelve at once: more registers are for the few rows that are kept as a whole.
            Launcher(sweep_kernel, num_warps=4, enable_fp_fusion=False, maxnreg=40, **early),
            # Two programs of a multiprocessor at once: what spills then is the way of rows settled as a whole.
            Launcher(settle_kernel, num_warps=8, enable_fp_fusion=False, maxnreg=128, **early),
        )


_launchers = _Launchers.of()
# From Hopper on a launch begins while the one before it still runs, and waits where it reads what that has written.
_early = _Launchers.of(launch_pdl=True)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether launches on a device may overlap."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    from triton.backends.nvidia.compiler import CUDAOptions

    return hasattr(CUDAOptions, "launch_pdl")


OPERATION = Operation("select")
FORCE_KERNEL = False
"""Take the kernels for tensors on the CPU too; for tests, with Triton's interpreter."""

_MAX = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_MAX_RULES = 8
_NO_ROWS = [None] * _MAX_RULES
_SAMPLE = 8192
_BITS = 20
_BLOCK_W = 32
_SUMS_OF = {"top_p": 1, "epsilon": 1, "eta": 2, "typical": 2, "top_n_sigma": 3}


def takes_rules(rules: Sequence[Rule]) -> bool:
    """Whether the kernels take these rules; what they don't take is rare, and torch's."""
    return (
        len(rules) <= _MAX_RULES
        # What a rule fills with another value counts for the next one.
        and (len(rules) <= 1 or all(rule.filter_value == -math.inf for rule in rules))
        and len({rule.ties for rule in rules if rule.kind in ("top_k", "top_p")}) <= 1
        and sum(rule.kind == "typical" for rule in rules) <= 1
        # Where next to nothing is dropped, all depends on how the smallest probabilities are rounded.
        and not any(_is_number(rule) and rule.kind == "top_p" and rule.value > 1 - 1e-6 for rule in rules)
        and not any(_is_number(rule) and rule.kind == "min_p" and 0 < rule.value < 1e-30 for rule in rules)
    )


def takes_scores(scores: torch.Tensor) -> bool:
    """Whether the kernels take these scores."""
    return (
        OPERATION.takes(scores, FORCE_KERNEL)
        and scores.ndim == 2
        and scores.shape[1] > 1
        and scores.dtype in _MAX
        and not scores.requires_grad
    )


def _is_number(rule: Rule) -> bool:
    return not isinstance(rule.value, torch.Tensor)


class _Layout(NamedTuple):
    """How a row of a vocabulary is cut and sampled, and what its workspace holds, in words of 32 bits."""

    W: int
    tiles: int
    parts: int
    slots: int
    """Candidates that a row may have."""
    few: int
    """Candidates beyond which a rule takes what it keeps for certain for kept."""
    runs: int
    sampled: int
    parts_at: int
    pairs_at: int
    words_of_row: int
    TILES: int
    PARTS: int

    @classmethod
    def of(cls, V: int, sums: bool) -> _Layout:
        W = words(V)
        tiles, parts = -(-W // TILE_W.value), -(-W // _BLOCK_W)
        # Of a flat row a sample leaves open what becomes of a sixteenth. With room for those that a search puts by of
        # them again, this is up to a quarter of what the logits of a large vocabulary take.
        slots = max(SOME_SLOTS.value, V // 12 // 128 * 128)
        few = min(MANY_SLOTS.value, max(SOME_SLOTS.value, V // 50 // 128 * 128))
        parts_at = SUMS_AT.value + SUM_WORDS.value * tiles
        pairs_at = parts_at + PART_WORDS.value * parts
        pairs = slots + MANY_SLOTS.value * (slots > MANY_SLOTS.value)
        return cls(
            W, tiles, parts, slots, few, max(V, _SAMPLE) // 8, min(V, _SAMPLE), parts_at, pairs_at,
            pairs_at + max(2 * pairs, _SAMPLE * sums), triton.next_power_of_2(tiles), triton.next_power_of_2(parts),
        )  # fmt: skip


class Selection:
    """Rules as the kernels take them.

    Args:
        rules: the rules.
        V: tokens of the vocabulary.
        device: where the logits are.
        normalise: whether what stays is normalised, as ``log_softmax`` does it.
    """

    def __init__(self, rules: Sequence[Rule], V: int, device: torch.device, normalise: bool = False) -> None:
        self.given = tuple(rules)
        rules = [rule for rule in rules if not _is_idle(rule, V)]
        self.rows = [rule.value for rule in rules if isinstance(rule.value, torch.Tensor)]
        numbers = [1.0 if isinstance(rule.value, torch.Tensor) else float(rule.value) for rule in rules]
        self.values = _numbers_on(device, *numbers)
        flat: list[int] = []
        per_row = self.sums = 0
        self.may_be_free = True
        for index, rule in enumerate(rules):
            tensor = isinstance(rule.value, torch.Tensor)
            flat += [_KINDS[rule.kind], rule.min_tokens_to_keep, per_row if tensor else -1 - index]
            per_row += tensor
            if self.may_be_free:  # nothing may have been dropped before it
                self.sums = max(self.sums, _SUMS_OF.get(rule.kind, 0))
            self.may_be_free = self.may_be_free and tensor
        self.rules = tuple(flat)
        self.fill = rules[0].filter_value if rules else -math.inf
        self.first = any(rule.ties == "lowest" for rule in rules if rule.kind in ("top_k", "top_p"))
        self.banded = any(rule.kind == "typical" for rule in rules)
        self.normalise = normalise
        counted = [rule.value for rule in rules if _is_number(rule) and rule.kind == "top_k"]
        # A sample lets through some four times as many as a rule keeps, where these are few.
        self.few = FEW_SLOTS.value if counted and min(counted) <= FEW_SLOTS.value // 6 else SOME_SLOTS.value
        self.layout = _Layout.of(V, self.sums > 0)
        # Where no rule keeps more than can be put by, none has to be taken for kept.
        self.bracketed = not normalise and not (counted and min(counted) <= 0.6 * self.layout.few)
        self.form = form_of((self.rules, self.fill, self.first, normalise, self.bracketed, self.few))
        self.handle = next(_handles)
        _selections[self.handle] = self


_numbers: dict[tuple[torch.device, tuple[float, ...]], torch.Tensor] = {}
_captured_numbers: list[torch.Tensor] = []
_MOST_NUMBERS = 256


def _numbers_on(device: torch.device, *numbers: float) -> torch.Tensor:
    def make() -> torch.Tensor:
        return table_on(torch.tensor([*numbers, 0.0], dtype=torch.float64), device)

    made = recent(_numbers, (device, numbers), make, _MOST_NUMBERS)
    if is_capturing(device):  # a selection may be made for one call
        hold(_captured_numbers, made)
    return made


def _is_idle(rule: Rule, V: int) -> bool:
    """Whether a rule of one parameter for all rows drops nothing."""
    value = rule.value
    if isinstance(value, torch.Tensor):
        return False
    return {"top_k": value >= V, "min_p": value <= 0, "top_p": value >= 1, "top_n_sigma": value == math.inf}.get(
        rule.kind, False
    )


_handles = count()
_selections: WeakValueDictionary[int, Selection] = WeakValueDictionary()
_NO_CHAIN = Chain()


def launch_select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None = None,
    found: TokenSets | None = None,
    out: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write what the rules keep of ``scores`` to ``out``, or a token of each row to ``tokens``: up to four launches.

    Returns what is alive of each row, int32 ``[B, 4]``, as settle.py says it.
    """
    B, V = scores.shape
    chain = chain or _NO_CHAIN
    W, tiles, parts, slots, few, runs, sampled, parts_at, pairs_at, words_of_row, TILES, PARTS = selection.layout
    work = torch.empty((B, words_of_row), dtype=torch.int32, device=scores.device)
    stride_row, stride_token = scores.stride()
    stride_out, stride_out_token = (0, 0) if out is None else out.stride()
    bits, planes, row_values, listed = found or NO_SETS
    rows = [*(row.contiguous() for row in selection.rows), *_NO_ROWS][:_MAX_RULES]
    strides = (
        0 if temperature is None or temperature.ndim == 0 else temperature.stride(0),
        *set_strides(found, W),
        row_stride(seeds), row_stride(positions),
    )  # fmt: skip
    key = (
        scores.device, scores.dtype, V, chain.form, selection.form,
        scores.data_ptr() % 16, stride_row == 1, stride_row % 16, stride_row >> 31, stride_token,
        None if out is None else (
            out.data_ptr() % 16, out.dtype, stride_out == 1, stride_out % 16, stride_out >> 31, stride_out_token
        ),
        None if temperature is None else temperature.dtype,
        None if seeds is None or positions is None else (seeds.dtype, positions.dtype),
        tuple(row.dtype for row in selection.rows),
    )  # fmt: skip
    given = (scores, temperature, bits, planes, chain.biases, row_values, chain.kernel_numbers(scores.device))
    top = _MAX[scores.dtype if tokens is None else torch.float32]
    greedy = tokens is not None and temperature is not None
    portable = not scores.is_cuda or torch.version.hip is not None
    early = overlaps(scores.device)
    launchers = _early if early else _launchers
    if selection.sums:
        launchers.sums(key, B * tiles, (
            *given, selection.values, *rows,
            work,
            V, W, tiles, runs, sampled, pairs_at,
            stride_row, stride_token, words_of_row, *strides[:5],
            chain.flat, top, selection.rules, selection.sums, greedy, _SAMPLE, early,
        ))  # fmt: skip
    # The first launch waits for whatever was there before.
    bound_launcher = launchers.bound if selection.sums else _launchers.bound
    bound_launcher(key, B, (
        *given, selection.values, *rows,
        work,
        V, W, tiles, runs, sampled, pairs_at, sampled / V, 0.95 * few, 0.95 * slots,
        stride_row, stride_token, words_of_row, *strides[:5],
        chain.flat, top, selection.rules, selection.sums, selection.normalise, selection.bracketed,
        greedy, _SAMPLE, _BITS, TILES, early,
    ))  # fmt: skip
    tokens_of, spans, lists = listed or (None, None, 0)
    launchers.sweep(key, B * (lists + parts), (
        *given, seeds, positions, tokens_of, spans,
        out, work,
        V, W, slots, parts, B * lists, lists, parts_at, pairs_at,
        stride_row, stride_token, stride_out, stride_out_token, words_of_row, *strides,
        0 if spans is None else spans.stride(0),
        chain.flat, top, selection.fill, selection.banded, selection.bracketed, selection.may_be_free, _BLOCK_W,
        portable, early,
    ))  # fmt: skip
    setup = (
        selection.first, selection.banded, top, selection.sums, selection.bracketed, portable, selection.fill,
        selection.few,
    )  # fmt: skip
    launchers.settle(key, B, (
        *given, selection.values, *rows, seeds, positions, work,
        out, tokens,
        V, W, slots, parts, parts_at, pairs_at,
        stride_row, stride_token, stride_out, stride_out_token, words_of_row, *strides,
        chain.flat, top, selection.rules, selection.normalise, selection.sums, setup, PARTS, early,
    ))  # fmt: skip
    return work[:, ALIVE_AT.value : ALIVE_AT.value + 4]


def select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None = None,
    input_ids: torch.Tensor | None = None,
    position: Position = NOWHERE,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scores`` ``[B, V]`` folded, and what the rules keep of them: a new contiguous tensor.

    Args:
        scores: float32, float16 or bfloat16 of any strides; never written.
        selection: the rules.
        chain: what is done to the logits before; None for nothing.
        input_ids: what the chain reads.
        position: likewise.
        allowed: likewise.
    """
    if torch.compiler.is_compiling():
        handle = -1 if chain is None else chain.handle
        return torch.ops.fastlogits.select(  # type: ignore[no-any-return]
            scores, selection.handle, handle, input_ids, allowed, *position
        )
    return _select(scores, selection, chain, input_ids, position, allowed)


@OPERATION.falls_back
def _select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None,
    input_ids: torch.Tensor | None,
    position: Position,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    if not OPERATION.takes(scores, FORCE_KERNEL):
        return reference_select(scores, selection, chain, input_ids, position, allowed)
    out = empty_out(scores)
    if scores.numel():
        found = None if chain is None else find_sets(scores, chain, input_ids, position, allowed)
        launch_select(scores, selection, chain, found, out=out)
    return out


def _call(
    scores: torch.Tensor,
    selection: int,
    chain: int = -1,
    input_ids: torch.Tensor | None = None,
    allowed: torch.Tensor | None = None,
    *position: Any,
) -> torch.Tensor:
    maps = None if chain < 0 else chain_of(chain)
    return _select(scores, _selections[selection], maps, input_ids, Position(*position), allowed)


register(
    "select(Tensor scores, int selection, int chain=-1, Tensor? input_ids=None, Tensor? allowed=None, "
    "SymInt cache_offset=0, SymInt prompt_offset=0, Tensor? cache_position=None, Tensor? prompt_length=None) -> Tensor",
    _call,
    lambda scores, *inputs: scores.new_empty(scores.shape),
)


def reference_select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None,
    input_ids: torch.Tensor | None,
    position: Position,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    """The same in torch, one after the other."""
    x = truncate(_folded(scores, chain, input_ids, position, allowed), selection.given)
    return x.log_softmax(-1) if selection.normalise else x


def reference_tokens(
    logits: torch.Tensor,
    selection: Selection,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None,
    chain: Chain | None,
    input_ids: torch.Tensor | None,
    position: Position,
    allowed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as ``select_tokens`` draws them, and the distribution that they were drawn from, float32 ``[B, V]``."""
    x, greedy = _folded(logits.float(), chain, input_ids, position, allowed), None
    if temperature is None:
        x = truncate(x, selection.given)
    else:
        x, greedy = reference_distribution(x, temperature, selection.given)
    return draw(x, seeds.expand(len(x)), positions.expand(len(x)), greedy), x


def reference_distribution(
    x: torch.Tensor, temperature: torch.Tensor, rules: Sequence[Rule]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rules leave of ``x`` ``[B, V]`` divided by temperatures, and which rows are greedy, bool ``[B]``.

    Those are the rows of another temperature than a positive finite one: they stay as they are.
    """
    sampled = ((temperature > 0) & (temperature < math.inf)).expand(len(x))
    heated = x / torch.where(sampled, temperature, 1.0).unsqueeze(1)
    return torch.where(sampled.unsqueeze(1), truncate(heated, rules) if rules else heated, x), ~sampled


def _folded(
    scores: torch.Tensor,
    chain: Chain | None,
    input_ids: torch.Tensor | None,
    position: Position,
    allowed: torch.Tensor | None,
) -> torch.Tensor:
    return scores if chain is None else reference_fold(scores, None, chain, input_ids, position, allowed)


@OPERATION.falls_back
def select_tokens(
    logits: torch.Tensor,
    selection: Selection,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None = None,
    chain: Chain | None = None,
    input_ids: torch.Tensor | None = None,
    position: Position = NOWHERE,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token drawn from what the rules keep of each row of ``logits`` ``[B, V]``, int64 ``[B]``.

    Args:
        logits: float32, float16 or bfloat16 of any strides, taken as float32; never written.
        selection: the rules.
        seeds: int64 ``[B]``, or of no dimensions.
        positions: likewise.
        temperature: what the logits are divided by, ``[B]`` or of no dimensions; rows of another than a positive finite
            number are greedy. None for 1.
        chain: what is done to the logits before; None for nothing.
        input_ids: what the chain reads.
        position: likewise.
        allowed: likewise.
    """
    if not OPERATION.takes(logits, FORCE_KERNEL):
        tokens, _ = reference_tokens(
            logits, selection, seeds, positions, temperature, chain, input_ids, position, allowed
        )  # fmt: skip
        return tokens
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.numel():
        found = None if chain is None else find_sets(logits, chain, input_ids, position, allowed)
        launch_select(
            logits, selection, chain, found, temperature=temperature, seeds=seeds, positions=positions, tokens=tokens
        )
    return tokens
