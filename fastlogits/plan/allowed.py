"""The tokens that each row may use, where a source text says so: built once a run, or once for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastlogits_kernels.pointwise.mask import takes_bits
from fastlogits_kernels.pointwise.pack_ids import pack_ids
from fastlogits_kernels.runtime.bits import unpack_bits
from fastlogits_kernels.runtime.recent import hold, is_capturing, recent

from fastlogits.checks import check_rows
from fastlogits.plan.position import Index, prompt_of
from fastlogits.plan.run import Run
from fastlogits.plan.stages import AllowFrom
from fastlogits.token_mask import fitted


@dataclass(frozen=True, eq=False)
class _Tables:
    """What an ``AllowFrom`` reads, for one vocabulary size and device: words int32 ``[W]`` and ids ``[R, L]``."""

    source: torch.Tensor | None
    always: torch.Tensor
    counted: torch.Tensor
    copies: int

    @classmethod
    def of(cls, stage: AllowFrom, vocab_size: int, device: torch.device) -> _Tables:
        source = None
        if isinstance(stage.source, torch.Tensor):
            if stage.source.numel() and stage.source.max() >= vocab_size:
                raise ValueError(
                    f"source_ids: token id {stage.source.max()} is outside the vocabulary of {vocab_size} tokens"
                )
            source = stage.source.to(device)
        always = fitted("extra", stage.extra, vocab_size) | fitted("eos_token_id", stage.eos, vocab_size)
        return cls(
            source, always.bits(device), ~fitted("exclude", stage.exclude, vocab_size).bits(device), stage.copies
        )

    def rows(
        self, input_ids: torch.Tensor, scores: torch.Tensor, vocab_size: int, prompt_length: Index
    ) -> torch.Tensor:
        """Words int32 ``[B or 1, W]`` of the allowed tokens; launches only, so that a new run waits for nothing."""
        if self.source is None:
            check_rows("OnlyTokensFrom", input_ids, scores)
            return pack_ids(prompt_of(input_ids, prompt_length), vocab_size) & self.counted | self.always
        R, B, copies = self.source.shape[0], scores.shape[0], self.copies
        if R != 1 and R * copies != B:
            raise ValueError(
                f"source_ids must have 1 row, or one for each {'row' if copies == 1 else f'{copies} rows'} of scores, "
                f"got {R} rows for {B} rows of scores; with beams or returned sequences give OnlyTokensFrom the number "
                "of rows that share one of the source, as copies=num_beams * num_return_sequences"
            )
        rows = pack_ids(self.source, vocab_size) & self.counted | self.always
        return rows if R == 1 or copies == 1 else rows.repeat_interleave(copies, 0)


class AllowedRows:
    """Tokens that all of some stages allow: packed words int32 ``[B or 1, W]``, on the CPU bool ``[B or 1, V]``."""

    def __init__(self, stages: Sequence[AllowFrom]) -> None:
        self._stages = stages
        self._of_run = any(stage.needs_position for stage in stages)
        self._tables: dict[tuple[int, torch.device], list[_Tables]] = {}
        self._kept: dict[tuple[object, ...], torch.Tensor] = {}
        self._captured: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, run: Run | None) -> torch.Tensor:
        """The rows for a call."""
        B, V = scores.shape
        device = scores.device
        of_run = run if self._of_run else None
        kept = self._kept if of_run is None else of_run.kept_for(self)

        def make() -> torch.Tensor:
            stages = self._stages
            tables = recent(self._tables, (V, device), lambda: [_Tables.of(stage, V, device) for stage in stages])
            prompt_length = 0 if of_run is None else of_run.locate(input_ids, scores)[1]
            rows = tables[0].rows(input_ids, scores, V, prompt_length)
            for table in tables[1:]:
                rows = rows & table.rows(input_ids, scores, V, prompt_length)
            return rows if takes_bits(device) else unpack_bits(rows, V)

        key = (B, V, device)
        rows = kept.get(key)
        if rows is None:
            rows = recent(kept, key, make)
        if is_capturing(device):
            hold(self._captured, rows)
        return rows
