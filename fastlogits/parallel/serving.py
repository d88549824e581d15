"""The steps of a ``BatchProcessor`` whose logits are split over ranks."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.serving.layout import StepRows
from fastlogits_kernels.serving.steps import Step, process_rows, sample_rows

from fastlogits.parallel.group import Agreement, Group, Shards
from fastlogits.parallel.sampling import packed, unpacked
from fastlogits.sampled import Distribution, Sample


class _Form(NamedTuple):
    """What steps have in common that are computed in the same way."""

    rows: int
    width: int
    dtype: torch.dtype
    bitmask: int | None
    """Words of a row of it."""
    drafts: bool
    positioned: bool
    asked: Hashable
    """What the call wants."""

    def told(self) -> tuple[tuple[str, Hashable], ...]:
        """What has to be the same on all ranks."""
        return (
            ("number of rows of logits", self.rows), ("dtype of logits", str(self.dtype)),
            ("draft_ids", self.drafts), ("cache_position", self.positioned),
            ("kind of call", self.asked),
        )  # fmt: skip


class SplitStep:
    """The steps of a batch of requests, of whose logits each rank has a part of the vocabulary.

    All ranks have the same requests in the same slots. The ranks deal out the rows of the logits, process some rows
    each, and exchange the results: tokens, or the parts of the processed logits. Where there are draft tokens, or fewer
    rows than ranks, each rank gets all rows.

    Args:
        group: the ranks.
        step: the steps of one process.
        settings: of the batch, with their names: what has to be the same on all ranks.
    """

    def __init__(self, group: Any, step: Step, settings: tuple[tuple[str, Hashable], ...]) -> None:
        self.group = Group.of(group).of_vocabulary(step.V)
        self._step = step
        self._agree = Agreement(self.group)
        self._known: dict[_Form, Shards] = {}
        told = self.group.told(dict(settings))
        self._agree.check([{"form": each} for each in told])

    def seed(self, mine: int) -> int:
        """What rank 0 has drawn, for the seeds of requests that bring none."""
        drawn: int = self.group.told(mine)[0]
        return drawn

    def refuse(self, error: Exception) -> None:
        """Tell the others that this rank refuses its arguments; see ``Agreement``."""
        self._agree.refuse(error)

    def sample(self, logits: torch.Tensor, rows: StepRows, logprobs: Distribution | None, count: int) -> Sample:
        """The token of each row, and what was asked about it: on all ranks the same."""
        shards, own = self._ready(logits, rows, ("sample", logprobs))
        mine, their_rows = self._whole(logits, rows, shards, own)
        tokens, found = sample_rows(self._step, mine, their_rows, logprobs, count)
        sample = Sample.of(tokens, found, count)
        return sample if own is None else unpacked(self.group.results(packed(sample), len(logits)), sample)

    def process(self, logits: torch.Tensor, rows: StepRows, out: torch.Tensor) -> torch.Tensor:
        """Write this rank's part of the processed logits to ``out``, which may be ``logits``; -inf for padding."""
        shards, own = self._ready(logits, rows, "process")
        mine, their_rows = self._whole(logits, rows, shards, own)
        mine = process_rows(self._step, mine, their_rows, mine)
        if own is None:
            return out.copy_(self.group.part(mine, shards))
        return out.copy_(self.group.returned_rows(mine, len(logits), shards))

    def _ready(self, logits: torch.Tensor, rows: StepRows, asked: Hashable) -> tuple[Shards, slice | None]:
        """Which tokens each rank has, and this rank's rows; None where each rank gets all of them.

        Raises:
            ValueError: the arguments aren't alike on all ranks.
        """
        B, width = logits.shape
        form = _Form(
            B, width, logits.dtype, None if rows.bitmask is None else rows.bitmask.shape[1],
            rows.draft_ids is not None, rows.cache_position is not None, asked,
        )  # fmt: skip
        shards = self._known.get(form)
        if shards is None:
            shards = self.group.shards(width)
            bitmask = None if form.bitmask is None else self._kind_of_bitmask(form.bitmask, shards)
            self._agree((*form.told(), ("bitmask", bitmask)))
            if bitmask not in (None, "whole", "part"):
                raise ValueError(
                    f"bitmask must have the {words(shards.vocab_size)} words of the whole vocabulary, or those of this "
                    f"rank's part where all parts begin at a multiple of 32, got {bitmask}, where the parts begin at "
                    f"{shards.starts}"
                )
            self._known[form] = shards
        deals = self.group.size < B and not form.drafts
        return shards, self.group.rows_of(self.group.rank, B) if deals else None

    def _kind_of_bitmask(self, found: int, shards: Shards) -> str:
        if found >= words(shards.vocab_size):
            return "whole"
        own = words(shards.widths[self.group.rank]), words(shards.sizes[self.group.rank])
        aligned = all(start % 32 == 0 for start in shards.starts if start < shards.vocab_size)
        return "part" if found in own and aligned else f"{found} words of it"

    def _whole(
        self, logits: torch.Tensor, rows: StepRows, shards: Shards, own: slice | None
    ) -> tuple[torch.Tensor, StepRows]:
        """Whole rows of the logits, all or this rank's, in memory of their own; and what belongs to them."""
        bitmask = rows.bitmask
        if bitmask is not None and bitmask.shape[1] < words(shards.vocab_size):
            bitmask = self._whole_bitmask(bitmask, shards)
        if own is None:
            return self.group.whole_rows(logits, shards), rows._replace(bitmask=bitmask)
        at = None if rows.cache_position is None else rows.cache_position[own]
        some = StepRows(rows.slots[own], at, None if bitmask is None else bitmask[own])
        return self.group.dealt_rows(logits, shards), some

    def _whole_bitmask(self, part: torch.Tensor, shards: Shards) -> torch.Tensor:
        counts = [words(width) for width in shards.widths]
        wide = torch.nn.functional.pad(part, (0, max(counts) - part.shape[1]))
        parts = self.group.all_gather(wide)
        return torch.cat([each[:, : words(size)] for each, size in zip(parts, shards.sizes, strict=True)], 1)
