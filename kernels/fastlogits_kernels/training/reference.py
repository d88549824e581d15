"""Log-probabilities of given tokens, and their gradients, in torch: the reference, and the path of the CPU.

Rows are processed some at a time, so that what is allocated beside the logits stays small. Logits of float64 stay so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fastlogits_kernels.rules import Rule
from fastlogits_kernels.selection.launch import reference_distribution
from fastlogits_kernels.selection.masses import reference_below, reference_log_mass, reference_mass
from fastlogits_kernels.training.sets import GivenSets
from fastlogits_kernels.truncate.dispatch import truncate

_LOGITS_AT_ONCE = 1 << 22


class Task(NamedTuple):
    """What is asked of some rows."""

    targets: torch.Tensor
    """int64 ``[N]``."""
    temperature: torch.Tensor | None
    """float32 ``[N]``, or of no dimensions."""
    rules: Sequence[Rule]
    """What truncates; a value by row is ``[N]``."""
    kept: GivenSets | None
    """What is kept in their place."""
    ignore_index: int

    def rows(self, begin: int, end: int) -> Task:
        """The same of some of the rows."""
        some = slice(begin, end)
        temperature = self.temperature
        if temperature is not None and temperature.ndim:
            temperature = temperature[some]
        rules = [
            rule._replace(value=rule.value[some]) if isinstance(rule.value, torch.Tensor) else rule
            for rule in self.rules
        ]
        kept = None if self.kept is None else self.kept.rows(begin, end)
        return Task(self.targets[some], temperature, rules, kept, self.ignore_index)


class ScoredRows(NamedTuple):
    """Some rows as they are sampled from, with their targets; all of their vocabulary, or a part."""

    scores: torch.Tensor
    """Scaled logits, -inf for what is dropped, ``[n, V]``."""
    own: torch.Tensor
    """Those of the targets ``[n, 1]``."""
    known: torch.Tensor
    """Which targets are tokens ``[n, 1]``."""
    outside: torch.Tensor
    """Which of them wouldn't have been kept ``[n, 1]``."""
    divisor: torch.Tensor | None
    """What the logits were divided by ``[n, 1]``."""


class ProcessedRows(NamedTuple):
    """Rows of the whole vocabulary as they are sampled from."""

    of: ScoredRows
    top: torch.Tensor
    log_mass: torch.Tensor

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The logarithms of all probabilities, and these."""
        logarithms = self.of.scores - self.top - self.log_mass
        return logarithms, logarithms.exp()

    def entropy(self) -> torch.Tensor:
        """Entropies ``[n, 1]``."""
        scores, top = self.of.scores, self.top
        if scores.dtype != torch.float64:
            mass, below = reference_mass(scores, top), reference_below(scores, top)
            return reference_entropy(self.log_mass, mass, below)
        _, p = self.probabilities()
        return self.log_mass + torch.where(p > 0, p * (top - scores), p * 0).sum(-1, keepdim=True)


def reference_entropy(log_mass: torch.Tensor, mass: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """Entropies from integers."""
    return log_mass + (below.double() / mass.double()).float()


def scores_of(logits: torch.Tensor, task: Task) -> ScoredRows:
    """Rows ``[n, V]``, or a part of them, as they are sampled from."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    n, V = x.shape
    target = task.targets.unsqueeze(1)
    known = (target >= 0) & (target < V)
    target = torch.where(known, target, 0)
    divisor = None
    rules = () if task.kept is not None else tuple(task.rules)
    if task.temperature is None:
        scaled, greedy = x, None
        processed = truncate(x, rules) if rules else x.clone()
    else:
        processed, greedy = reference_distribution(x, task.temperature, rules)
        divisor = torch.where(greedy, 1.0, task.temperature.expand(n)).to(x.dtype).unsqueeze(1)
        scaled = x / divisor
    if task.kept is not None:
        mask, defined = task.kept.mask(n, V)
        processed = scaled.masked_fill(~mask, -math.inf)
        processed[~defined] = math.nan
    own = scaled.gather(1, target)
    outside = known & (processed.gather(1, target) == -math.inf)
    processed = processed.scatter(1, target, torch.where(known, own, processed.gather(1, target)))
    return ScoredRows(processed, own, known, outside, divisor)


def rows_of(logits: torch.Tensor, task: Task) -> ProcessedRows:
    """Rows ``[n, V]`` of the whole vocabulary as they are sampled from."""
    of = scores_of(logits, task)
    top = of.scores.amax(-1, keepdim=True)
    return ProcessedRows(of, top, reference_log_mass(of.scores, top))


def chunks(logits: torch.Tensor) -> Iterator[tuple[int, int]]:
    """The first and the next row of some rows at a time."""
    N, V = logits.shape
    each = max(1, _LOGITS_AT_ONCE // max(1, V))
    for begin in range(0, N, each):
        yield begin, min(N, begin + each)


def reference_logprobs(
    logits: torch.Tensor, task: Task, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probabilities ``[N]`` of the targets of ``logits`` ``[N, V]``, and entropies if asked for.

    And which targets wouldn't have been kept, bool ``[N]``.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    N = len(logits)
    logprobs = torch.empty(N, dtype=dtype, device=logits.device)
    entropies = torch.empty(N, dtype=dtype, device=logits.device) if entropy else None
    outside = torch.empty(N, dtype=torch.bool, device=logits.device)
    for begin, end in chunks(logits):
        part = task.rows(begin, end)
        rows = rows_of(logits[begin:end], part)
        ignored = part.targets == task.ignore_index
        found = torch.where(rows.of.known, rows.of.own - rows.top - rows.log_mass, math.nan).squeeze(1)
        logprobs[begin:end] = found.masked_fill(ignored, 0.0)
        outside[begin:end] = rows.of.outside.squeeze(1) & ~ignored
        if entropies is not None:
            entropies[begin:end] = rows.entropy().squeeze(1).masked_fill(ignored, 0.0)
    return logprobs, entropies, outside


def reference_gradient_(
    grads: torch.Tensor, entropy_grads: torch.Tensor | None, logits: torch.Tensor, task: Task, out: torch.Tensor
) -> None:
    """Write the gradient of ``logits`` ``[N, V]`` to ``out``, which may be these; see ``gradient.py``."""
    for begin, end in chunks(logits):
        part = task.rows(begin, end)
        rows = rows_of(logits[begin:end], part)
        g = grads[begin:end].to(rows.top.dtype).unsqueeze(1)
        logarithms, p = rows.probabilities()
        share = g.expand_as(p)
        acts = g != 0
        if entropy_grads is not None:
            h = entropy_grads[begin:end].to(p.dtype).unsqueeze(1)
            share = share + h * torch.where(p > 0, logarithms + rows.entropy(), 0.0)
            acts = acts | (h != 0)
        d = 0.0 - p * share
        d.masked_fill_(~rows.of.known, math.nan)
        target = torch.where(rows.of.known, part.targets.unsqueeze(1), 0)
        d.scatter_add_(1, target, g)
        if rows.of.divisor is not None:
            d = d / rows.of.divisor
        acts = acts & (part.targets != task.ignore_index).unsqueeze(1)
        out[begin:end] = torch.where(acts, d, 0.0).to(out.dtype)
