"""Fold, truncate and sample: find the few tokens of a row that count, then decide among them.

    x = fold(scores) / temperature;  for rule in rules: drop what it drops;  out = x or the fill, or a token

Four to six launches:

    row_sums     where a rule that speaks of probabilities may come first: adds up each row, and takes its sample
    bounds       from a sample of each row, a bound that hardly any token below can survive; of many tokens that stay
                 also one above which all are kept, or of a band its two edges
    filter       reads the logits, writes the fill value everywhere, keeps what is kept for certain, and collects the
                 tokens between the bounds, the candidates
    refine       one program a row: applies the rules to the candidates, in registers; where rules may leave more than
                 a thousand, another launch for rows with thousands
    refine_rows  the same for rows with more candidates, or with candidates that don't suffice: block by block

Where no rule drops anything and a token is drawn, two launches do: see ``sample_rows``.

The filter makes one test for the 16 bytes of a row that a thread holds, and hardly any thread passes it. It doesn't
divide by the temperature: it holds the logits against a range that ``bounds`` has put before the division, a little too
wide, and ``refine`` divides the few that pass and looks at them exactly. Of a serving step it passes the tokens over
that have values in place of their logits, and takes these from their lists. A row that is drawn from as it is, beside
others that are not, has for candidates the tokens whose noise lets them win: see ``may_win``.

A bound is a guess that the last launches verify: where too many tokens are above it, or a rule would keep one below, or
drop one that was kept, the whole row is looked at, with the same arithmetic. So the result never depends on the guess,
on the batch around a row, or on the order in which tokens were collected: probabilities are added up as integers of
2 ** -37 of the largest one, and the sums over a row, of which there is one for each tile, in the order of the tiles.

Bytes moved: one read and one write of the logits (no write for a token), a read more for the sums, and the candidates:
in most rows next to nothing, at most a sixth of the logits. The workspace has room for that, and a tenth besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from fastlogits_kernels.draw import draw
from fastlogits_kernels.pointwise.fold import (
    BAN,
    NO_SETS,
    NOWHERE,
    Chain,
    chain_of,
    find_sets,
    reference_fold,
    set_strides,
)
from fastlogits_kernels.pointwise.search import Position, TokenSets
from fastlogits_kernels.rules import CODES, TINY_TEMPERATURE, Rule, is_idle
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.driver import Given
from fastlogits_kernels.runtime.launcher import (
    Launch,
    Launcher,
    Relaunches,
    empty_out,
    form_of,
    is_collecting,
    launch_key,
    launch_together,
    row_stride,
    table_on,
    triton,
)
from fastlogits_kernels.runtime.library import register
from fastlogits_kernels.runtime.recent import hold, is_capturing, recent
from fastlogits_kernels.selection.bounds import bounds_kernel
from fastlogits_kernels.selection.filter import filter_kernel
from fastlogits_kernels.selection.refine import refine_kernel
from fastlogits_kernels.selection.refine_rows import refine_rows_kernel
from fastlogits_kernels.selection.row import (
    KEPT_AT,
    LINE,
    PART_WORDS,
    RULE_WORDS,
    RULES_AT,
    RUN,
    SUM_WORDS,
    TILE_W,
    Listed,
    Maps,
    Sampling,
    Shape,
)
from fastlogits_kernels.selection.row_sums import sums_kernel
from fastlogits_kernels.selection.sample_rows import PART_WORDS as SAMPLE_PART_WORDS
from fastlogits_kernels.selection.sample_rows import sample_parts_kernel, sample_rows_kernel
from fastlogits_kernels.truncate.dispatch import truncate


class _Launchers(NamedTuple):
    """Of the kernels; of one for each number of slots."""

    sums: Launcher
    bounds: Launcher
    filter: Launcher
    refine: dict[int, Launcher]
    rows: Launcher
    sample_parts: Launcher
    sample_rows: Launcher

    def refining(self, slots: int) -> Launcher:
        """The launcher for so many slots."""
        return next(launcher for most, launcher in self.refine.items() if slots <= most)

    @classmethod
    def of(cls, **early: bool) -> _Launchers:
        return cls(
            Launcher(sums_kernel, num_warps=4, enable_fp_fusion=False),
            # Two programs of a multiprocessor at once.
            Launcher(bounds_kernel, num_warps=16, enable_fp_fusion=False, maxnreg=64, **early),
            # Ten at once: more registers are for the few rows that are kept as a whole.
            Launcher(filter_kernel, num_warps=4, enable_fp_fusion=False, maxnreg=48, **early),
            {
                slots: Launcher(refine_kernel, num_warps=warps, enable_fp_fusion=False, maxnreg=128, **early)
                for slots, warps in _WARPS.items()
            },
            # What happens between its passes all warps do alike, and what a pass does is shared by many.
            Launcher(refine_rows_kernel, num_warps=16, enable_fp_fusion=False, **early),
            Launcher(sample_parts_kernel, num_warps=4, enable_fp_fusion=False, maxnreg=128),
            Launcher(sample_rows_kernel, num_warps=4, enable_fp_fusion=False, **early),
        )


# Candidates that are refined in registers: of rules that keep few, of most, of those that keep many; by as many warps.
# A turn of a search is a sum over all threads, which takes longer the more warps there are.
_FEW, _SOME, _MANY = 512, 1024, 4096
_WARPS = {_FEW: 4, _SOME: 8, _MANY: 16}

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


def is_portable(device: torch.device) -> bool:
    """Whether kernels for a device do without PTX."""
    return device.type != "cuda" or torch.version.hip is not None


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs that take a multiprocessor each run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


OPERATION = Operation("select")
FORCE_KERNEL = False
"""Take the kernels for tensors on the CPU too; for tests, with Triton's interpreter."""

_MAX = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16)}
_SAMPLE = 8192
_BITS = 20
_BLOCK_BYTES = 4096
# Tokens of a part of a row that is sampled from as it is. Of more logits than that a program has too much to do for its
# part alone: a guess for the whole row, which takes two launches more, rules more out.
_SAMPLE_BLOCK = 4096
_MOST_SAMPLED = 2**24
# Of so many rows what is kept for certain is told apart sooner: multiprocessors are idle, and a search of many
# candidates would take longer.
_FEW_ROWS = 16
# Candidates that a search of whole rows collects at most, and tokens of a block there.
ROOM = 4096
ROW_BLOCK = 2048


def takes_rules(rules: Sequence[Rule]) -> bool:
    """Whether the kernels take these rules; what they don't take is rare, and torch's."""
    return (
        # What a rule fills with another value counts for the next one.
        (len(rules) <= 1 or all(rule.filter_value == -math.inf for rule in rules))
        and len({rule.ties for rule in rules if rule.spec.takes_ties}) <= 1
        # One centre is kept of what distances are.
        and sum(rule.spec.goal == "distance" for rule in rules) <= 1
        and not any(_is_number(rule) and rule.spec.keeps_nearly_all(rule.value) for rule in rules if not _off(rule))  # type: ignore[arg-type]
    )


def _off(rule: Rule) -> bool:
    return _is_number(rule) and rule.spec.off_as_number and bool(rule.value == rule.spec.range.off)


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


def _whole_lines(words: int) -> int:
    line: int = LINE.value
    return -(-words // line) * line


class _Layout(NamedTuple):
    """How a row of a vocabulary is cut and sampled, and what its workspace holds."""

    shape: Shape
    words_of_row: int
    few: int
    """Candidates beyond which a rule takes what it keeps for certain for kept."""
    TILES: int
    PARTS: int

    @classmethod
    def of(cls, V: int, rules: int, sums: bool, block: int) -> _Layout:
        W = words(V)
        tiles, parts = -(-W // TILE_W.value), -(-V // block)
        # Of a flat row a sample leaves open what becomes of a sixteenth. With room for those that a search collects of
        # them again, this is up to a quarter of what the logits of a large vocabulary take.
        slots = max(_SOME, V // 12 // 128 * 128)
        few = min(ROOM, max(_SOME, V // 50 // 128 * 128))
        sums_at = RULES_AT.value + RULE_WORDS.value * rules
        parts_at = sums_at + SUM_WORDS.value * tiles
        pairs_at = parts_at + PART_WORDS.value * parts
        pairs = slots + ROOM * (slots > ROOM)
        sample = min(V, _SAMPLE)
        shape: Any = Shape(
            W, tiles, parts, slots, sums_at, parts_at, pairs_at, 0.95 * few, 0.95 * slots,
            max(V, _SAMPLE) // RUN.value, sample, sample / V,
        )  # fmt: skip
        return cls(
            shape, _whole_lines(pairs_at + max(2 * pairs, _SAMPLE * sums)), few, triton.next_power_of_2(tiles),
            triton.next_power_of_2(parts),
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
        rules = [rule for rule in rules if not is_idle(rule, V)]
        rows = [rule.value for rule in rules if isinstance(rule.value, torch.Tensor)]
        numbers = [1.0 if isinstance(rule.value, torch.Tensor) else float(rule.value) for rule in rules]
        self.rows = rows
        self.numbers = _numbers_on(device, *numbers)
        places: list[int] = []
        per_row = self.sums = 0
        self.may_be_uncut = True
        for index, rule in enumerate(rules):
            by_row = isinstance(rule.value, torch.Tensor)
            places.append(per_row if by_row else -1 - index)
            per_row += by_row
            if self.may_be_uncut:  # nothing may have been dropped before it
                self.sums = max(self.sums, rule.spec.sums)
            self.may_be_uncut = self.may_be_uncut and by_row
        self.kinds = tuple(CODES[rule.kind] for rule in rules)
        self.leasts = tuple(rule.min_tokens_to_keep for rule in rules)
        self.places = tuple(places)
        self.fill = rules[0].filter_value if rules else -math.inf
        self.lowest_ties = any(rule.ties == "lowest" for rule in rules if rule.spec.takes_ties)
        self.banded = any(rule.spec.goal == "distance" for rule in rules)
        self.normalise = normalise
        # Whether what is kept for certain has to be weighed.
        self.weighed = any(1 <= rule.spec.sums < 3 for rule in rules)
        counted = [rule.value for rule in rules if _is_number(rule) and rule.spec.goal == "count"]
        fewest = min(counted, default=math.inf)
        # A sample lets through some four times as many as a rule keeps, where these are few.
        few = _FEW if fewest <= _FEW // 6 else _SOME
        # How many candidates are refined in registers, launch after launch.
        if fewest <= 0.6 * _SOME or not rules:
            self.slots: tuple[int, ...] = (few,)
        else:
            self.slots = (_MANY,) if fewest <= _MANY else (_SOME, _MANY)
        # Programs of the filter look at as many bytes each, whatever the logits are.
        self.layouts = {size: _Layout.of(V, len(rules), self.sums > 0, _BLOCK_BYTES // size) for size in (2, 4)}
        # Where no rule keeps more than can be collected, none has to be taken for kept.
        self.bracketed = not normalise and not fewest <= 0.6 * self.layouts[4].few
        self.form = form_of((
            self.kinds, self.leasts, self.places, self.fill, self.lowest_ties, normalise, self.bracketed, self.slots
        ))  # fmt: skip
        self.launches = 3 + len(self.slots) + (self.sums > 0)
        """How many kernels a call launches."""
        self.words_to_sample = _whole_lines(LINE.value + SAMPLE_PART_WORDS.value * -(-V // _SAMPLE_BLOCK))
        """Words of a row of the workspace where tokens are drawn and no rule drops anything."""
        self.relaunches: dict[tuple[Any, ...], Relaunches] = {}
        """The launches of calls that have come more than once, laid out."""
        self._seen: set[tuple[Any, ...]] = set()
        self.handle = next(_handles)
        _selections[self.handle] = self

    def saw(self, key: tuple[Any, ...], lay_out: Callable[[], Relaunches | None]) -> None:
        """Lay out the launches of a call that comes for the second time; of one for the first time take a note."""
        if key not in self._seen:
            if len(self._seen) >= _MOST_CALLS:
                self._seen.clear()
                self.relaunches.clear()
            self._seen.add(key)
            return
        made = lay_out()
        if made is not None:
            self.relaunches[key] = made


_numbers: dict[tuple[torch.device, tuple[float, ...]], torch.Tensor] = {}
_captured_numbers: list[torch.Tensor] = []
_MOST_NUMBERS = 256
# Batch sizes and layouts whose calls are laid out at a time, a few kilobytes each.
_MOST_CALLS = 256


def _numbers_on(device: torch.device, *numbers: float) -> torch.Tensor:
    def make() -> torch.Tensor:
        return table_on(torch.tensor([*numbers, 0.0], dtype=torch.float64), device)

    made = recent(_numbers, (device, numbers), make, _MOST_NUMBERS)
    if is_capturing(device):  # a selection may be made for one call
        hold(_captured_numbers, made)
    return made


_handles = count()
_selections: WeakValueDictionary[int, Selection] = WeakValueDictionary()
_NO_CHAIN = Chain()
_NO_TENSORS = (None, None, None, None, None)


def maps_of(chain: Chain, found: TokenSets | None, temperature: torch.Tensor | None, scores: torch.Tensor) -> Maps:
    """What a chain and a temperature bring to the kernels, for scores ``[B, V]``."""
    bits, planes, row_values, _ = found or NO_SETS
    stride = 0 if temperature is None or temperature.ndim == 0 else temperature.stride(0)
    values: Any = (
        temperature, bits, planes, chain.biases, row_values, chain.kernel_numbers(scores.device),
        stride, *set_strides(found, words(scores.shape[1])),
    )  # fmt: skip
    return Maps(*values)


class _Tensors(NamedTuple):
    """What a call brings: tensors, or what stands for their addresses."""

    scores: Any
    work: Any
    out: Any = None
    tokens: Any = None
    temperature: Any = None
    seeds: Any = None
    positions: Any = None
    bits: Any = None
    planes: Any = None
    row_values: Any = None
    listed: Any = None
    spans: Any = None
    rows: tuple[Any, ...] = ()
    """Values of rules, one tensor for each that has one for each row."""

    def stand_ins(self) -> tuple[_Tensors, int]:
        """What stands for each of the tensors in launches that are laid out, and how many there are."""
        numbers = count()
        single: dict[str, Any] = {
            name: None if each is None else Given(next(numbers))
            for name, each in zip(self._fields[:-1], self[:-1], strict=True)
        }
        return _Tensors(**single, rows=tuple([Given(next(numbers)) for _ in self.rows])), next(numbers)


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
    """Write what the rules keep of ``scores`` to ``out``, or a token of each row to ``tokens``: two to six launches.

    Returns the workspace, int32 ``[B, words]``: ``kept_in`` says what is kept of each row.
    """
    chain = chain or _NO_CHAIN
    shape = scores.shape
    index = scores.get_device()
    if _only_samples(scores, selection, found, tokens, seeds):
        words_of_row = selection.words_to_sample
    else:
        words_of_row = selection.layouts[scores.element_size()].words_of_row
    # One overload, which is parsed faster than torch.empty.
    work = torch.empty_strided((shape[0], words_of_row), (words_of_row, 1), dtype=torch.int32, device=scores.device)
    address = scores.data_ptr()
    out_address = 0 if out is None else out.data_ptr()
    # All that the arguments depend on but for addresses; a chain's number is never another one's.
    key: tuple[Any, ...] = (
        shape, scores.stride(), scores.dtype, index, address % 16, chain.handle, tokens is None,
        None if out is None else (out.dtype, out.stride(), out_address % 16),
        None if temperature is None else (temperature.dtype, temperature.stride(), temperature.get_device()),
        None if seeds is None else (seeds.dtype, seeds.stride(), seeds.get_device()),
        None if positions is None else (positions.dtype, positions.stride(), positions.get_device()),
    )  # fmt: skip
    pointers = [address, work.data_ptr()]
    if out is not None:
        pointers.append(out_address)
    if tokens is not None:
        pointers.append(tokens.data_ptr())
    if temperature is not None:
        pointers.append(temperature.data_ptr())
    if seeds is not None:
        pointers.append(seeds.data_ptr())
    if positions is not None:
        pointers.append(positions.data_ptr())
    sets: tuple[Any, Any, Any, Any, Any] = _NO_TENSORS
    if found is not None:
        tokens_of, spans, lists = found.listed or (None, None, 0)
        sets = (found.bits, found.planes, found.row_values, tokens_of, spans)
        pointers += [each.data_ptr() for each in sets if each is not None]
        key += (lists, *(None if each is None else (each.shape, each.stride()) for each in sets))
    rows: tuple[torch.Tensor, ...] = ()
    if selection.rows:
        rows = tuple([row.contiguous() for row in selection.rows])
        pointers += [row.data_ptr() for row in rows]
        key += tuple([(row.dtype, row.get_device()) for row in rows])
    relaunches = selection.relaunches.get(key)
    if relaunches is not None and relaunches(index, pointers):
        return work
    tensors = _Tensors(scores, work, out, tokens, temperature, seeds, positions, *sets, rows)
    launch_together(_launches(selection, chain, found, tensors, tensors))
    if is_collecting():
        if _draws_all(selection, found, tokens, seeds):  # how depends on the number of rows: rehearse both
            _rehearse_other(selection, chain, found, tensors)
    elif relaunches is None:
        selection.saw(key, lambda: _laid_out(selection, chain, found, tensors))
    return work


def kept_in(work: torch.Tensor) -> torch.Tensor:
    """What is kept of each row, int32 ``[B, 4]``, of the workspace that ``launch_select`` returned: see ``Kept``."""
    return work[:, KEPT_AT.value : KEPT_AT.value + 4]


def _laid_out(selection: Selection, chain: Chain, found: TokenSets | None, tensors: _Tensors) -> Relaunches | None:
    """The launches of such a call through the driver, if they can be made so."""
    index = tensors.scores.get_device()
    for each in (*tensors[:-1], *tensors.rows):
        if each is not None and each.get_device() != index:  # pinned memory, of which Triton asks whether it is
            return None
    stand_ins, given = tensors.stand_ins()
    return Relaunches.of(_launches(selection, chain, found, tensors, stand_ins), given)


def _launches(
    selection: Selection, chain: Chain, found: TokenSets | None, tensors: _Tensors, given: _Tensors
) -> list[Launch]:
    """The launches of a call with some tensors; ``given`` is what their kernels are given of them."""
    sampling = _only_samples(tensors.scores, selection, found, tensors.tokens, tensors.seeds)
    return (_sample_launches if sampling else _select_launches)(selection, chain, found, tensors, given)


def _rehearse_other(selection: Selection, chain: Chain, found: TokenSets | None, tensors: _Tensors) -> None:
    """Collect the launches of a draw from all tokens that another number of rows would make."""
    scores = tensors.scores
    sampling = _only_samples(scores, selection, found, tensors.tokens, tensors.seeds)
    words_of_row = selection.layouts[scores.element_size()].words_of_row if sampling else selection.words_to_sample
    other = tensors._replace(work=tensors.work.new_empty(len(scores), words_of_row))
    launch_together((_select_launches if sampling else _sample_launches)(selection, chain, found, other, other))


def _select_launches(
    selection: Selection, chain: Chain, found: TokenSets | None, tensors: _Tensors, given: _Tensors
) -> list[Launch]:
    """Those of a selection from candidates."""
    scores, out, temperature = tensors.scores, tensors.out, tensors.temperature
    seeds, positions, drawn = tensors.seeds, tensors.positions, tensors.tokens is not None
    B, V = scores.shape
    itemsize = scores.element_size()
    shape, words_of_row, _few, TILES, PARTS = selection.layouts[itemsize]
    maps = _maps(chain, found, tensors, given)
    if B <= _FEW_ROWS:
        shape = shape._replace(capacity=min(shape.capacity, 0.85 * _SOME))
    cut = tuple(shape)
    values = (selection.numbers, *given.rows)
    sampling: Any = Sampling(given.seeds, given.positions, row_stride(seeds), row_stride(positions))
    spans, lists = tensors.spans, 0 if found is None or found.listed is None else found.listed[2]
    listed: Any = Listed(given.listed, given.spans, 0 if spans is None else spans.stride(0), lists, B * lists)
    stride_row, stride_token = scores.stride()
    stride_out, stride_out_token = (0, 0) if out is None else out.stride()
    key = (
        *launch_key(scores, out), chain.form, selection.form,
        None if temperature is None else temperature.dtype,
        None if seeds is None or positions is None else (seeds.dtype, positions.dtype),
        tuple(row.dtype for row in tensors.rows), lists > 0,
    )  # fmt: skip
    largest = _MAX[scores.dtype if not drawn else torch.float32]
    greedy = drawn and temperature is not None
    fits = out is not None and out.dtype == torch.float16 and temperature is not None
    portable = is_portable(scores.device)
    early = overlaps(scores.device)
    launchers = _early if early else _launchers
    # A thread that draws has all tokens of an octet: of float32 logits, or such as are folded, two times 16 bytes.
    # Logits are looked at as they are given, where a chain does nothing, only bans tokens, or comes as lists.
    raw = lists > 0 or not chain.flat or (len(chain.flat) == 4 and chain.flat[0] == BAN.value)
    edited = chain.ops[0].set if raw and chain.ops else -1
    banned = chain.ops[1].set if lists else edited
    list_room = chain.ops[0].a + 1 if lists else 0
    halves = 2 if drawn and selection.may_be_uncut and not (raw and itemsize == 2) else 1
    launches: list[Launch] = []
    if selection.sums:
        launches.append(Launch(launchers.sums, key, B * shape.tiles, (
            given.scores, values, *maps, given.work, V, *cut, stride_row, stride_token, words_of_row,
            chain.flat, largest, selection.kinds, selection.places, selection.sums, greedy, _SAMPLE, early,
        )))  # fmt: skip
    # The first launch waits for whatever was there before.
    launches.append(Launch(launchers.bounds if selection.sums else _launchers.bounds, key, B, (
        given.scores, values, *maps, *sampling, given.work, V, *cut, stride_row, stride_token, words_of_row,
        chain.flat, largest, selection.kinds, selection.leasts, selection.places, selection.sums, selection.normalise,
        selection.bracketed, greedy, fits, _SAMPLE, _BITS, TILES, early,
    )))  # fmt: skip
    launches.append(Launch(launchers.filter, key, B * (lists + shape.parts), (
        given.scores, *maps, *sampling, *listed, given.out, given.work, V, *cut,
        stride_row, stride_token, stride_out, stride_out_token, words_of_row,
        chain.flat, largest, selection.fill, selection.bracketed, selection.weighed, selection.may_be_uncut,
        _BLOCK_BYTES // itemsize, halves, raw, edited, banned, list_room, portable, early,
    )))  # fmt: skip
    more_than = -1
    for slots in selection.slots:
        # Logits of 16 bits tie a lot.
        slots = max(slots, _SOME) if scores.dtype != torch.float32 else slots
        launches.append(Launch(launchers.refining(slots), (*key, slots), B, (
            *maps, *sampling, given.work, given.out, given.tokens, V, *cut, stride_out, stride_out_token, words_of_row,
            selection.kinds, selection.leasts, selection.sums, selection.normalise, selection.banded,
            selection.lowest_ties, slots, more_than, PARTS, early,
        )))  # fmt: skip
        more_than = slots
    launches.append(Launch(launchers.rows, key, min(B, multiprocessors(scores.device)), (
        given.scores, *maps, *sampling, given.work, given.out, given.tokens, V, *cut, B, len(selection.kinds), more_than,
        stride_row, stride_token, stride_out, stride_out_token, words_of_row,
        chain.flat, largest, selection.fill, selection.normalise, selection.lowest_ties, portable, ROW_BLOCK, ROOM,
        PARTS, early,
    )))  # fmt: skip
    return launches


def _maps(chain: Chain, found: TokenSets | None, tensors: _Tensors, given: _Tensors) -> Maps:
    """What a chain and a temperature bring to the kernels that are given ``given``."""
    return maps_of(chain, found, tensors.temperature, tensors.scores)._replace(
        temperature_ptr=given.temperature, bits_ptr=given.bits, planes_ptr=given.planes,
        row_values_ptr=given.row_values,
    )  # fmt: skip


def _only_samples(scores: torch.Tensor, selection: Selection, found: TokenSets | None, tokens: Any, seeds: Any) -> bool:
    """Whether tokens are drawn part by part."""
    return scores.numel() <= _MOST_SAMPLED and _draws_all(selection, found, tokens, seeds)


def _draws_all(selection: Selection, found: TokenSets | None, tokens: Any, seeds: Any) -> bool:
    """Whether tokens are drawn where no rule drops anything, and no token has a value from a list."""
    if selection.kinds or tokens is None or seeds is None:
        return False
    return found is None or found.listed is None or not found.listed[2]


def _sample_launches(
    selection: Selection, chain: Chain, found: TokenSets | None, tensors: _Tensors, given: _Tensors
) -> list[Launch]:
    """The same where no rule drops anything: two launches."""
    scores, temperature, seeds, positions = tensors.scores, tensors.temperature, tensors.seeds, tensors.positions
    B, V = scores.shape
    parts = -(-V // _SAMPLE_BLOCK)
    words_of_row = selection.words_to_sample
    raw16 = scores.element_size() == 2 and not chain.flat
    early = overlaps(scores.device)
    launchers = _early if early else _launchers
    key = (
        *launch_key(scores), chain.form, None if temperature is None else temperature.dtype, seeds.dtype,
        positions.dtype,
    )  # fmt: skip
    return [
        Launch(launchers.sample_parts, key, B * parts, (
            given.scores, *_maps(chain, found, tensors, given), given.seeds, given.positions, row_stride(seeds),
            row_stride(positions), given.work, V, words(V), parts, *scores.stride(), words_of_row,
            chain.flat, _MAX[torch.float32], _SAMPLE_BLOCK, 1 if raw16 else 2, is_portable(scores.device), early,
        )),
        Launch(launchers.sample_rows, (scores.device, triton.next_power_of_2(parts)), B, (
            given.work, given.tokens, parts, words_of_row, triton.next_power_of_2(parts), early,
        )),
    ]  # fmt: skip


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

    Those are the rows of another temperature than a finite one of at least 1e-30: they stay as they are.
    """
    sampled = ((temperature >= TINY_TEMPERATURE) & (temperature < math.inf)).expand(len(x))
    scaled = x / torch.where(sampled, temperature, 1.0).unsqueeze(1)
    return torch.where(sampled.unsqueeze(1), truncate(scaled, rules) if rules else scaled, x), ~sampled


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
