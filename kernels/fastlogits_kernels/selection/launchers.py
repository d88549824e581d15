"""The launches of a selection: which kernels a call launches, with which arguments."""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch

from fastlogits_kernels.pointwise.fold import BAN, NO_SETS, Chain, set_strides
from fastlogits_kernels.pointwise.search import TokenSets
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.driver import Given
from fastlogits_kernels.runtime.launcher import Launch, Launcher, launch_key, row_stride, triton
from fastlogits_kernels.selection.bounds import bounds_kernel
from fastlogits_kernels.selection.filter import filter_kernel
from fastlogits_kernels.selection.layout import (
    BLOCK_BYTES,
    FEW,
    MANY,
    ROOM,
    SAMPLE,
    SAMPLE_BLOCK,
    SOME,
    Layout,
    Selection,
)
from fastlogits_kernels.selection.refine import refine_kernel
from fastlogits_kernels.selection.refine_rows import refine_rows_kernel
from fastlogits_kernels.selection.row import Listed, Maps, Sampling, Shape
from fastlogits_kernels.selection.row_sums import sums_kernel
from fastlogits_kernels.selection.sample_rows import sample_parts_kernel, sample_rows_kernel


class Launchers(NamedTuple):
    """The launchers of the kernels; of refinements in registers one for each number of slots."""

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
    def of(cls, **early: bool) -> Launchers:
        """New ones, which let the next launch begin early or don't."""
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


# By how many warps so many candidates are refined in registers. A turn of a search is a sum over all threads, which
# takes longer the more warps there are.
_WARPS = {FEW: 4, SOME: 8, MANY: 16}

LAUNCHERS = Launchers.of()
# From Hopper on a launch begins while the one before it still runs, and waits where it reads what that has written.
EARLY = Launchers.of(launch_pdl=True)


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


LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float16, torch.bfloat16)}
"""The largest number of each dtype that the kernels take."""
_BITS = 20  # steps of a search in a sample, which leave a key that is a little too low
# With so few rows tokens are kept for certain sooner: multiprocessors are idle, and a search of many candidates would
# take longer.
_FEW_ROWS = 16
ROW_BLOCK = 2048
"""Tokens of a block where full rows are processed."""


class Tensors(NamedTuple):
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

    def stand_ins(self) -> tuple[Tensors, int]:
        """What stands for each of the tensors in launches that are laid out, and how many there are."""
        numbers = count()
        single: dict[str, Any] = {
            name: None if each is None else Given(next(numbers))
            for name, each in zip(self._fields[:-1], self[:-1], strict=True)
        }
        return Tensors(**single, rows=tuple([Given(next(numbers)) for _ in self.rows])), next(numbers)


def maps_of(chain: Chain, found: TokenSets | None, temperature: torch.Tensor | None, scores: torch.Tensor) -> Maps:
    """What a chain and a temperature bring to the kernels, for scores ``[B, V]``."""
    bits, planes, row_values, _ = found or NO_SETS
    stride = 0 if temperature is None or temperature.ndim == 0 else temperature.stride(0)
    values: Any = (
        temperature, bits, planes, chain.biases, row_values, chain.kernel_numbers(scores.device),
        stride, *set_strides(found, words(scores.shape[1])),
    )  # fmt: skip
    return Maps(*values)


class _Call(NamedTuple):
    """A call of which launches are made, and what its kernels are given alike."""

    selection: Selection
    chain: Chain
    tensors: Tensors
    given: Tensors
    key: tuple[Any, ...]
    maps: Maps
    sampling: Sampling
    listed: Listed
    layout: Layout
    shape: Shape
    early: bool
    launchers: Launchers

    @property
    def scores(self) -> torch.Tensor:
        """The logits."""
        scores: torch.Tensor = self.tensors.scores
        return scores

    @property
    def largest(self) -> float:
        """The largest number of the dtype that a chain rounds to: none where tokens are sampled."""
        rounds = self.tensors.tokens is None and not self.selection.unrounded
        return LARGEST[self.scores.dtype if rounds else torch.float32]

    @property
    def out_strides(self) -> tuple[int, ...]:
        """The strides of the result."""
        out = self.tensors.out
        return (0, 0) if out is None else out.stride()

    @property
    def greedy(self) -> bool:
        """Whether rows may be greedy."""
        return self.tensors.tokens is not None and self.tensors.temperature is not None

    @classmethod
    def of(cls, selection: Selection, chain: Chain, found: TokenSets | None, tensors: Tensors, given: Tensors) -> _Call:
        """A call with some tensors; ``given`` is what its kernels are given of them."""
        scores, seeds, positions, spans = tensors.scores, tensors.seeds, tensors.positions, tensors.spans
        lists, pieces = (0, 1) if found is None or found.listed is None else found.listed[2:]
        stride_span = 0 if spans is None else spans.stride(0)
        sampling: Any = Sampling(given.seeds, given.positions, row_stride(seeds), row_stride(positions))
        listed: Any = Listed(given.listed, given.spans, stride_span, lists, pieces, len(scores) * lists * pieces)
        key = (
            *launch_key(scores, tensors.out), chain.form, selection.form,
            *(None if each is None else each.dtype for each in (tensors.temperature, seeds, positions)),
            tuple(row.dtype for row in tensors.rows), lists > 0,
        )  # fmt: skip
        maps = maps_of(chain, found, tensors.temperature, scores)._replace(
            temperature_ptr=given.temperature, bits_ptr=given.bits, planes_ptr=given.planes,
            row_values_ptr=given.row_values,
        )  # fmt: skip
        layout = selection.layouts[scores.element_size()]
        shape: Any = layout.shape
        if len(scores) <= _FEW_ROWS:
            shape = shape._replace(capacity=min(shape.capacity, 0.85 * SOME))
        early = overlaps(scores.device)
        return cls(
            selection, chain, tensors, given, key, maps, sampling, listed, layout, shape, early,
            EARLY if early else LAUNCHERS,
        )  # fmt: skip


def select_launches(
    selection: Selection, chain: Chain, found: TokenSets | None, tensors: Tensors, given: Tensors
) -> list[Launch]:
    """The launches of a selection; ``given`` is what the kernels are given of the tensors."""
    call = _Call.of(selection, chain, found, tensors, given)
    sums = [_sums_launch(call)] if selection.sums else []
    refinements, tried = _refine_launches(call)
    return [*sums, _bounds_launch(call), _filter_launch(call), *refinements, _rows_launch(call, tried)]


def _sums_launch(call: _Call) -> Launch:
    selection, given, scores, shape = call.selection, call.given, call.scores, call.shape
    return Launch(call.launchers.sums, call.key, len(scores) * shape.tiles, (
        given.scores, (selection.numbers, *given.rows), *call.maps, given.work, scores.shape[1], *shape,
        *scores.stride(), call.layout.words_of_row,
        call.chain.flat, call.largest, selection.kinds, selection.places, selection.sums, call.greedy, SAMPLE,
        call.early,
    ))  # fmt: skip


def _bounds_launch(call: _Call) -> Launch:
    selection, given, scores, out = call.selection, call.given, call.scores, call.tensors.out
    fits = out is not None and out.dtype == torch.float16 and call.tensors.temperature is not None
    # The first launch waits for whatever was there before.
    launcher = call.launchers.bounds if selection.sums else LAUNCHERS.bounds
    return Launch(launcher, call.key, len(scores), (
        given.scores, (selection.numbers, *given.rows), *call.maps, *call.sampling, given.work,
        scores.shape[1], *call.shape, *scores.stride(), call.layout.words_of_row,
        call.chain.flat, call.largest, selection.kinds, selection.leasts, selection.places, selection.sums,
        selection.normalise, selection.bracketed, call.greedy, fits, SAMPLE,
        selection.deviations, _BITS, call.layout.TILES, call.early,
    ))  # fmt: skip


def _filter_launch(call: _Call) -> Launch:
    selection, given, scores, shape, ops = call.selection, call.given, call.scores, call.shape, call.chain.ops
    lists: Any = call.listed.lists
    itemsize = scores.element_size()
    # Raw logits are tested where a chain does nothing, only bans tokens, or replaces those of lists and then bans.
    only_bans = len(ops) == 1 and ops[0].kind == BAN.value
    raw = lists > 0 or not ops or only_bans
    edited = ops[0].set if raw and ops else -1
    banned = ops[1].set if lists else edited
    list_room = ops[0].a + 1 if lists else 0
    # A thread that samples has all tokens of an octet: of float32 logits, and of folded ones, two times 16 bytes.
    samples = call.tensors.tokens is not None and selection.may_be_uncut
    halves = 2 if samples and not (raw and itemsize == 2) else 1
    return Launch(call.launchers.filter, call.key, call.listed.programs + len(scores) * shape.parts, (
        given.scores, *call.maps, *call.sampling, *call.listed, given.out, given.work, scores.shape[1], *shape,
        *scores.stride(), *call.out_strides, call.layout.words_of_row,
        call.chain.flat, call.largest, selection.fill, selection.bracketed, selection.weighed, selection.may_be_uncut,
        BLOCK_BYTES // itemsize, halves, raw, edited, banned, list_room, is_portable(scores.device), call.early,
    ))  # fmt: skip


def _refine_launches(call: _Call) -> tuple[list[Launch], int]:
    """Refinements in registers, and beyond how many candidates a row is left to the next launch."""
    selection, given, scores = call.selection, call.given, call.scores
    launches: list[Launch] = []
    tried = -1
    for slots in selection.slots:
        if scores.dtype != torch.float32:  # logits of 16 bits tie a lot
            slots = max(slots, SOME)
        launches.append(Launch(call.launchers.refining(slots), (*call.key, slots), len(scores), (
            *call.maps, *call.sampling, given.work, given.out, given.tokens, scores.shape[1], *call.shape,
            *call.out_strides, call.layout.words_of_row,
            selection.kinds, selection.leasts, selection.sums, selection.normalise, selection.banded,
            selection.lowest_ties, slots, tried, call.layout.PARTS, call.early,
        )))  # fmt: skip
        tried = slots
    return launches, tried


def _rows_launch(call: _Call, tried: int) -> Launch:
    selection, given, scores, device = call.selection, call.given, call.scores, call.scores.device
    B, V = scores.shape
    return Launch(call.launchers.rows, call.key, min(B, multiprocessors(device)), (
        given.scores, *call.maps, *call.sampling, given.work, given.out, given.tokens, V, *call.shape,
        B, len(selection.kinds), tried, *scores.stride(), *call.out_strides, call.layout.words_of_row,
        call.chain.flat, call.largest, selection.fill, selection.normalise, selection.lowest_ties,
        is_portable(device), ROW_BLOCK, ROOM, call.layout.PARTS, call.early,
    ))  # fmt: skip


def sample_launches(
    selection: Selection, chain: Chain, found: TokenSets | None, tensors: Tensors, given: Tensors, first: int = 0
) -> list[Launch]:
    """The same where no rule drops anything: two launches. The logits may begin at the token ``first``."""
    call = _Call.of(selection, chain, found, tensors, given)
    scores = call.scores
    B, V = scores.shape
    parts = -(-V // SAMPLE_BLOCK)
    words_of_row = selection.words_to_sample
    halves = 1 if scores.element_size() == 2 and not chain.flat else 2
    most_parts = triton.next_power_of_2(parts)
    return [
        Launch(call.launchers.sample_parts, call.key, B * parts, (
            given.scores, *call.maps, *call.sampling, given.work, V, words(V), parts, first, *scores.stride(),
            words_of_row, chain.flat, LARGEST[torch.float32], SAMPLE_BLOCK, halves, is_portable(scores.device),
            call.early,
        )),
        Launch(call.launchers.sample_rows, (scores.device, most_parts), B, (
            given.work, given.tokens, parts, words_of_row, most_parts, call.early,
        )),
    ]  # fmt: skip
