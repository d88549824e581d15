"""Masks that are known beforehand, without anything else: gated by step, merged, in place where that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from fastlogits_kernels.pointwise.mask import Bans, mask_tokens, mask_tokens_, takes_bits
from fastlogits_kernels.runtime.recent import hold, is_capturing, recent

from fastlogits.checks import check_rows
from fastlogits.compilers import constant
from fastlogits.plan.allowed import AllowedRows
from fastlogits.plan.position import Index, split
from fastlogits.plan.run import Run, known
from fastlogits.plan.stages import AllowFrom, Ban, Member, Stage
from fastlogits.token_mask import TokenMask, fitted

_ALWAYS = torch.iinfo(torch.int32).max


def is_plain_mask(stage: Stage) -> bool:
    """Whether a stage is a mask known beforehand, whose gate, if it has one, only closes."""
    if not isinstance(stage, Ban):
        return isinstance(stage, AllowFrom)
    when = stage.when
    closes = when is None or (when.of == "step" and when.start is None and when.period == 1)
    return closes and isinstance(stage.tokens, (TokenMask, tuple))


class _MaskTables:
    """What masks read, for one vocabulary size and device."""

    def __init__(self, bans: Sequence[Ban], vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        # Bans behind the same gate are one set; gates that close sooner come first.
        gates: dict[tuple[int, TokenMask | None], TokenMask] = {}
        for stage in bans:
            tokens = stage.mask(vocab_size)
            blank = None if stage.blank is None else fitted("blank", stage.blank, vocab_size)
            stop = _ALWAYS if stage.when is None or stage.when.stop is None else min(_ALWAYS, stage.when.stop)
            gate = (stop, blank)
            if len(tokens):
                gates[gate] = gates[gate] | tokens if gate in gates else tokens
        self._gates = sorted(gates.items(), key=lambda item: item[0][0])
        self.has_blanks = any(blank is not None for (_, blank), _ in self._gates)

    @cached_property
    def _by_step(self) -> list[tuple[int, Bans]]:
        """Where the step is known on the host, what is banned below each window: one set that needs no gate."""
        found: list[tuple[int, Bans]] = []
        for i, ((window, _), merged) in enumerate(self._gates):
            for _, later in self._gates[i + 1 :]:
                merged = merged | later
            if not found or found[-1][0] != window:
                found.append((window, self._bans([merged])))
        return found

    @cached_property
    def gated(self) -> Bans | None:
        """What is banned where the step is known on the device only: a set for each gate; None where nothing is."""
        if not self._gates:
            return None
        windows = torch.tensor([window for (window, _), _ in self._gates], dtype=torch.int32, device=self.device)
        blanks = None
        if self.has_blanks:
            none = TokenMask.from_ids([], self.vocab_size)
            blanks = self._sets([none if blank is None else blank for (_, blank), _ in self._gates])
        return self._bans([mask for _, mask in self._gates])._replace(windows=windows, blanks=blanks)

    def build(self) -> None:
        """Build now what else the first call that asks for it builds."""
        _ = self._by_step, self.gated

    def at_step(self, step: int) -> Bans | None:
        """What is banned at one step, without gates; None where nothing is."""
        for window, bans in self._by_step:
            if step < window:
                return bans
        return None

    def _bans(self, masks: list[TokenMask]) -> Bans:
        # Writing ids one by one beats a pass over the row: always on the CPU, and on the GPU for up to one token in
        # eight, measured on an H200.
        few = self.device.type == "cpu" or len(masks[0]) <= self.vocab_size // 8
        return Bans(self._sets(masks), masks[0].ids(self.device) if few and len(masks) == 1 else None)

    def _sets(self, masks: list[TokenMask]) -> torch.Tensor:
        packed = takes_bits(self.device)
        return torch.stack([mask.bits() if packed else mask.row() for mask in masks]).to(self.device)


class Masks:
    """Masks alone, without the arithmetic of a fold: mask . mask = mask (or), and one write of the logits.

    Args:
        members: the masks, of stages that ``is_plain_mask`` accepts.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        stages = [member.stage for member in members]
        self._bans = [stage for stage in stages if isinstance(stage, Ban)]
        allows = [stage for stage in stages if isinstance(stage, AllowFrom)]
        self._allowed = AllowedRows(allows) if allows else None
        self._needs_position = any(stage.needs_position for stage in stages)
        self._kept: dict[tuple[int, torch.device], _MaskTables] = {}
        self._captured: list[_MaskTables] = []
        self._last: _MaskTables | None = None

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None = None, in_place: bool = False
    ) -> torch.Tensor:
        """Mask the scores of one step."""
        device = scores.device
        tables = None if torch.compiler.is_compiling() else self._last
        if (
            tables is None
            or scores.ndim != 2
            or scores.shape[1] != tables.vocab_size
            or device != tables.device
            or not scores.is_floating_point()
        ):
            tables = self._tables(scores)
        if is_capturing(device):
            hold(self._captured, tables)
        if self._needs_position and input_ids.device != device:
            raise ValueError(f"input_ids is on {input_ids.device}, but scores are on {device}")
        if not self._needs_position:
            bans = tables.at_step(0)
        else:
            if tables.has_blanks and input_ids.shape[0] != scores.shape[0]:
                check_rows(next(each.name for each in self._members if _has_blank(each.stage)), input_ids, scores)
            bans = _bans(known(run, self._members), tables, input_ids, scores)
        if self._allowed is not None:
            allowed = self._allowed(input_ids, scores, run)
            bans = (bans or Bans())._replace(allowed=allowed)
        if bans is None:
            return scores
        if in_place:
            mask_tokens_(scores, bans)
            return scores
        return mask_tokens(scores, bans)

    def _tables(self, scores: torch.Tensor) -> _MaskTables:
        if scores.ndim != 2 or not scores.is_floating_point():
            raise ValueError(
                f"scores must be floating-point of shape (B, V), got {scores.dtype} of {tuple(scores.shape)}"
            )
        key = (scores.shape[1], scores.device)
        compiling = torch.compiler.is_compiling()
        self._make_tables(*key, compiling)
        tables = self._kept.get(key)
        while tables is None:  # other threads have made many meanwhile
            self._make_tables(*key, compiling)
            tables = self._kept.get(key)
        if not compiling:
            self._last = tables
        return tables

    @constant
    def _make_tables(self, vocab_size: int, device: torch.device, whole: bool) -> None:
        key = (vocab_size, device)
        tables = recent(self._kept, key, lambda: _MaskTables(self._bans, *key))
        if whole:
            tables.build()


def _has_blank(stage: Stage) -> bool:
    return isinstance(stage, Ban) and stage.blank is not None


def _bans(run: Run, tables: _MaskTables, input_ids: torch.Tensor, scores: torch.Tensor) -> Bans | None:
    """What is banned at a call, as far as it doesn't depend on the row's allowed set."""
    if not run.on_device and not tables.has_blanks:
        cache_position, prompt_length = run.locate(input_ids, scores)
        return tables.at_step(cache_position + 1 - prompt_length)  # type: ignore[arg-type]
    kept = run.kept_for(tables)
    B = scores.shape[0]
    if B in kept:
        return kept[B]  # type: ignore[no-any-return]
    if tables.gated is None:
        return None
    bans = _at_position(tables.gated, input_ids, *run.locate(input_ids, scores))
    if run.is_fixed and not tables.has_blanks:
        # Nothing here changes from call to call but the contents of the tensors.
        kept.clear()
        kept[B] = bans
    return bans


def _at_position(bans: Bans, input_ids: torch.Tensor, cache_position: Index, prompt_length: Index) -> Bans:
    """``bans`` with the position that its gates compare, on the host or on the device."""
    cache_offset, cache = split(cache_position)
    prompt_offset, prompt = split(prompt_length)
    ids = None if bans.blanks is None else input_ids
    return Bans(
        bans.sets, bans.tokens, None, bans.windows, bans.blanks, ids, cache, prompt, cache_offset, prompt_offset
    )
