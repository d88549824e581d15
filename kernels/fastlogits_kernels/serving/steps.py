"""Steps of a batch of requests: processed logits, or a token of each row; and what comes after, histories that grow.

After one search for what the requests ask for, the fold is the same for all: a map that replaces the edited logits, and
one that bans. It is part of the selection's launches, which read the logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import torch

from fastlogits_kernels.draw import draw
from fastlogits_kernels.pointwise import fold
from fastlogits_kernels.pointwise.fold import Chain, Op
from fastlogits_kernels.pointwise.search import Listed
from fastlogits_kernels.rules import Rule, RuleKind, Ties
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.launcher import Launch, launch_together
from fastlogits_kernels.selection.keep import keep_launch, launch_keep
from fastlogits_kernels.selection.kept import bits_of_scores, launch_kept_bits
from fastlogits_kernels.selection.launch import (
    Selection,
    kept_in,
    launches_of,
    reference_distribution,
)
from fastlogits_kernels.selection.launchers import Tensors
from fastlogits_kernels.selection.logprobs import KeptRows, Report, launch_report, report, takes
from fastlogits_kernels.selection.masses import launch_masses
from fastlogits_kernels.serving import search
from fastlogits_kernels.serving.history import cover_launch, launch_accept, launch_append, launch_swap
from fastlogits_kernels.serving.layout import Numbers, Semantics, Slots, StepRows
from fastlogits_kernels.serving.prepared import PreparedSteps, StepTensors, signature
from fastlogits_kernels.serving.reference import (
    reference_accept,
    reference_append,
    reference_slots,
    reference_swap,
)
from fastlogits_kernels.serving.search import BANNED, EDITED, RANKS, Sizes, slot_sets_launch

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
        self.prepared = PreparedSteps(device)
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
    _launch_step(step.workspace, scores, rows, out, None)
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
    work = _launch_step(made, scores, rows, None, tokens)
    if kept_bits is not None:
        found = made.found(len(tokens))
        launch_kept_bits(scores, made.selection, work, kept_bits, made.chain, found, made.numbers.temperature)
    if logprobs is None:
        return tokens, None
    counts = made.numbers.counts[: len(tokens)]
    if logprobs == "raw":
        return tokens, report(scores, tokens, count, counts)
    return tokens, _report_processed(made, scores, tokens, work, count, counts)


def _report_processed(
    made: _Workspace,
    scores: torch.Tensor,
    tokens: torch.Tensor,
    work: torch.Tensor,
    count: int,
    counts: torch.Tensor,
) -> Report:
    """A report on tokens in what they were drawn from, by what the selection has left in its workspace."""
    selection, found, temperature = made.selection, made.found(len(tokens)), made.numbers.temperature
    if not takes(scores, count):
        processed = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        launch_keep(scores, processed, selection, kept_in(work), made.chain, found, temperature)
        return report(processed, tokens, count, counts)
    masses = launch_masses(scores, selection, work, made.chain, found, temperature)
    left = KeptRows(kept_in(work), selection.lowest_ties, selection.banded, masses)
    return launch_report(scores, tokens, count, counts, made.chain, found, temperature, left)


def _launch_step(
    made: _Workspace, scores: torch.Tensor, rows: StepRows, out: torch.Tensor | None, tokens: torch.Tensor | None
) -> torch.Tensor:
    """Process the logits of a step into ``out``, or sample its ``tokens``; returns the workspace of the selection."""
    in_place = out is scores
    # In place, nothing may be written before what each row keeps is known.
    to = None if in_place else out
    words = made.selection.layouts[scores.element_size()].words_of_row
    # One overload, which is parsed faster than torch.empty.
    work = torch.empty_strided((scores.shape[0], words), (words, 1), dtype=torch.int32, device=scores.device)
    known = signature(scores, rows, to, in_place)
    if made.prepared(known, work, tokens):
        return work
    given = StepTensors(scores, rows, work, to, tokens, kept_in(work) if in_place else None)
    launch_together(_launches(made, given, given))
    made.prepared.saw(known, given, partial(_launches, made, given))
    return work


def _launches(made: _Workspace, step: StepTensors, given: StepTensors) -> list[Launch]:
    """The launches of a step; ``given`` is what the kernels are given of its tensors."""
    selection, chain, numbers = made.selection, made.chain, made.numbers
    scores, draws, found = step.scores, step.tokens is not None, made.found(len(step.scores))
    longs: tuple[Any, Any] = (numbers.longs[0], numbers.longs[1]) if draws else (None, None)
    listed = cast("Listed", found.listed)
    tensors = Tensors(
        scores, step.work, step.out, step.tokens, numbers.temperature, *longs, found.bits, found.planes, None,
        listed.tokens, listed.spans, tuple(selection.rows),
    )  # fmt: skip
    brought = tensors._replace(scores=given.scores, work=given.work, out=given.out, tokens=given.tokens)
    covers = [cover_launch(made.tables, step.rows.slots, given.rows.slots)] if made.tables.indices.by_step else []
    launches = [
        *covers,
        slot_sets_launch(made, scores, step.rows, draws, given.scores, given.rows),
        *launches_of(selection, chain, found, tensors, brought),
    ]
    if step.kept is not None:
        kept: Any = (given.scores, given.kept, given.scores)
        stride = step.kept.stride(0)
        launches.append(keep_launch(scores, scores, selection, stride, chain, found, numbers.temperature, kept))
    return launches


@_OPERATION.falls_back
def append_tokens(tables: Slots, of: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add each token to the history of its slot, in their order, as far as there is room: one launch."""
    if not _takes(tables.records):
        reference_append(tables, of, tokens)
    elif len(of):
        launch_append(tables, of, tokens)


@_OPERATION.falls_back
def accept_drafts(
    tables: Slots, of: torch.Tensor, tokens: torch.Tensor, drafts: torch.Tensor, appends: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a step that count, int64 ``[B]``, and the drafts that each row's request keeps, int32 ``[B]``.

    Rows that don't count have -1. What counts is appended to the histories where ``appends``: one launch.
    """
    if not _takes(tables.records):
        return reference_accept(tables, of, tokens, drafts, appends)
    return launch_accept(tables, of, tokens, drafts, appends)


@_OPERATION.falls_back
def swap_slots(table: torch.Tensor, a: int, b: int) -> None:
    """Exchange two rows of ``table``, int32 ``[S, N]``: one launch, which reads and writes both once."""
    if _takes(table):
        launch_swap(table, a, b)
    else:
        reference_swap(table, a, b)
