"""Steps of a batch of requests: processed logits, or a token of each row; and what comes after, histories that grow.

After one search for what the requests ask for, the fold is the same for all: a map that replaces the edited logits, and
one that bans. It is part of the selection's launches, which read the logits.
"""

from __future__ import annotations

from typing import Literal

import torch

from fastlogits_kernels.draw import draw
from fastlogits_kernels.pointwise import fold
from fastlogits_kernels.pointwise.fold import Chain, Op
from fastlogits_kernels.rules import Rule, RuleKind, Ties
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.selection.keep import launch_keep
from fastlogits_kernels.selection.kept import bits_of_scores, launch_kept_bits
from fastlogits_kernels.selection.launch import (
    Selection,
    kept_in,
    launch_select,
    reference_distribution,
)
from fastlogits_kernels.selection.logprobs import KeptRows, Report, launch_report, report, takes
from fastlogits_kernels.selection.masses import launch_masses
from fastlogits_kernels.serving import search
from fastlogits_kernels.serving.history import launch_append, launch_swap
from fastlogits_kernels.serving.layout import Numbers, Semantics, Slots, StepRows
from fastlogits_kernels.serving.reference import reference_append, reference_slots, reference_swap
from fastlogits_kernels.serving.search import BANNED, EDITED, RANKS, Sizes, launch_slot_sets

_OPERATION = Operation("slots")
FORCE_KERNEL = False
"""Take the kernels for tensors on the CPU too; for tests, with Triton's interpreter."""


class Step:
    """What the steps of a batch have in common, made once: all that a captured graph reads and writes.

    Args:
        tables: the slots.
        rows: rows that a step may have.
        V: tokens of the vocabulary.
        rules: truncations, in the order in which they act.
        ties: which tokens that tie at a cut-off they keep.
        semantics: what else all requests have in common.
        listed: words of a slot's lists.
    """

    def __init__(
        self,
        tables: Slots,
        rows: int,
        V: int,
        rules: tuple[RuleKind, ...],
        ties: Ties,
        semantics: Semantics,
        listed: int,
    ) -> None:
        self.slots, self.kinds, self.ties, self.semantics = tables, rules, ties, semantics
        self.V, self.sizes = V, Sizes.of(tables, rows, V, listed)
        # On a GPU now: what is allocated while a graph is captured lives with that graph.
        self._made = _Workspace(self) if tables.records.is_cuda else None

    @property
    def bytes_per_row(self) -> int:
        """Memory of a row, besides that of the truncations: its sets and its edits."""
        return self.sizes.bytes_per_row

    def rules(self, numbers: Numbers) -> list[Rule]:
        """The truncations with the numbers of each row."""
        values = numbers.rules
        return [Rule(kind, values[kind], ties=self.ties) for kind in self.kinds]

    @property
    def workspace(self) -> _Workspace:
        """What the kernels write."""
        if self._made is None:
            self._made = _Workspace(self)
        return self._made


class _Workspace(search.Workspace):
    """What the kernels of a step write: the search, and then a selection over what the search's chain makes."""

    def __init__(self, step: Step) -> None:
        super().__init__(step.slots, step.sizes, step.semantics)
        device = step.slots.records.device
        self.selection = Selection(step.rules(self.numbers), step.V, device)
        portable = device.type != "cuda" or torch.version.hip is not None
        replace = fold.REPLACE if portable else fold.REPLACE_PTX
        self.chain = Chain([
            Op(replace.value, EDITED.value, step.sizes.room - 1, RANKS.value), Op(fold.BAN.value, BANNED.value)
        ])  # fmt: skip


def _takes(scores: torch.Tensor) -> bool:
    return _OPERATION.takes(scores, FORCE_KERNEL)


def _reference(
    step: Step, scores: torch.Tensor, rows: StepRows, draws: bool
) -> tuple[torch.Tensor, torch.Tensor, Numbers]:
    """Scores after temperature and rules, float32, and which rows are greedy."""
    x, numbers = reference_slots(scores, step.slots, rows, step.semantics, draws)
    return *reference_distribution(x, numbers.temperature, step.rules(numbers)), numbers


def _fitted(processed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits that the dtype holds: float16 ones are scaled where a row's largest would overflow."""
    if dtype != torch.float16:
        return processed
    most = processed.amax(-1, keepdim=True).abs().clamp(min=65504.0)
    return torch.where(most.isfinite(), processed * (65504.0 / most), processed)


@_OPERATION.falls_back
def process_rows(step: Step, scores: torch.Tensor, rows: StepRows, out: torch.Tensor) -> torch.Tensor:
    """Write the processed ``scores`` ``[B, V]`` to ``out``, which may be ``scores`` itself; returns ``out``."""
    if not scores.numel():
        return out
    if not _takes(scores):
        processed, _, _ = _reference(step, scores, rows, False)
        return out.copy_(_fitted(processed, out.dtype))
    made = step.workspace
    found = launch_slot_sets(made, scores, rows, False)
    temperature = made.numbers.temperature
    # In place, nothing may be written before what each row keeps is known.
    to = None if out is scores else out
    work = launch_select(scores, made.selection, made.chain, found, out=to, temperature=temperature)
    if to is None:
        launch_keep(scores, out, made.selection, kept_in(work), made.chain, found, temperature)
    return out


@_OPERATION.falls_back
def sample_rows(
    step: Step,
    scores: torch.Tensor,
    rows: StepRows,
    logprobs: Literal["raw", "processed"] | None = None,
    count: int = 0,
    kept_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Report | None]:
    """A token of each row, int64 ``[B]``, and a report on it in the logits as they are or as they are drawn from.

    There is room for ``count`` of the likeliest tokens. What is kept is written to ``kept_bits``: see
    ``select_tokens``.
    """
    if not _takes(scores):
        processed, greedy, numbers = _reference(step, scores, rows, True)
        tokens = draw(processed, numbers.longs[0], numbers.longs[1], greedy)
        if kept_bits is not None:
            kept_bits.copy_(bits_of_scores(processed))
        if logprobs is None:
            return tokens, None
        return tokens, report(scores if logprobs == "raw" else processed, tokens, count, numbers.counts)
    tokens = torch.empty(len(scores), dtype=torch.int64, device=scores.device)
    if not scores.numel():
        return tokens, None if logprobs is None else report(scores, tokens, count)
    made = step.workspace
    numbers, selection = made.numbers, made.selection
    found = launch_slot_sets(made, scores, rows, True)
    work = launch_select(
        scores, selection, made.chain, found, temperature=numbers.temperature, seeds=numbers.longs[0],
        positions=numbers.longs[1], tokens=tokens,
    )  # fmt: skip
    if kept_bits is not None:
        launch_kept_bits(scores, selection, work, kept_bits, made.chain, found, numbers.temperature)
    if logprobs is None:
        return tokens, None
    counts = numbers.counts[: len(tokens)]
    if logprobs == "raw":
        return tokens, report(scores, tokens, count, counts)
    if not takes(scores, count):
        processed = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        launch_keep(scores, processed, selection, kept_in(work), made.chain, found, numbers.temperature)
        return tokens, report(processed, tokens, count, counts)
    masses = launch_masses(scores, selection, work, made.chain, found, numbers.temperature)
    left = KeptRows(kept_in(work), selection.lowest_ties, selection.banded, masses)
    return tokens, launch_report(scores, tokens, count, counts, made.chain, found, numbers.temperature, left)


@_OPERATION.falls_back
def append_tokens(tables: Slots, of: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add each token to the history of its slot, in their order, as far as there is room: one launch."""
    if not _takes(tables.records):
        reference_append(tables, of, tokens)
    elif len(of):
        launch_append(tables, of, tokens)


@_OPERATION.falls_back
def swap_slots(table: torch.Tensor, a: int, b: int) -> None:
    """Exchange two rows of ``table``, int32 ``[S, N]``: one launch, which reads and writes both once."""
    if _takes(table):
        launch_swap(table, a, b)
    else:
        reference_swap(table, a, b)
