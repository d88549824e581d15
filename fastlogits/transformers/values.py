"""The numbers of a list in tensors: what a captured draw reads of them, and what a later call may put in their place.

Kernels are compiled, and a graph is captured, for the form of a list: which maps there are, over which tokens, and
which rules. Temperatures, penalties, biases, the lengths at which something begins or ends, k and p, and how much of
each row is padding are read from tensors. Two lists of one form can share a graph.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from fastlogits.plan.plan import Plan
from fastlogits.plan.stages import (
    Ban,
    Bias,
    Decay,
    Force,
    Given,
    History,
    Penalize,
    Repeated,
    Scale,
    Stage,
    Truncate,
    When,
)
from fastlogits.sampling import FusedDraw
from fastlogits.transformers.graphs import kind_of


class Values(NamedTuple):
    """What a draw reads of its list."""

    form: Hashable
    """Equal for lists whose tensors mean the same."""
    tensors: tuple[torch.Tensor, ...]
    """The numbers, on the device."""

    def put_into(self, captured: Values) -> None:
        """Give a captured draw of the same form these numbers."""
        for mine, theirs in zip(self.tensors, captured.tensors, strict=True):
            theirs.copy_(mine)


def values_of(draw: FusedDraw, plan: Plan, logits: torch.Tensor) -> Values | None:
    """The numbers that a draw of its own reads, for logits of such a shape; None where it reads others besides."""
    operands = draw.operands(logits)
    if operands is None:
        return None
    fold, selection = operands
    # Selections of the same numbers share them; here they are to be written.
    selection.numbers = selection.numbers.clone()
    tensors = [selection.numbers, *selection.rows]
    form: list[Any] = [_form_of(member.stage) for part in plan.inner_parts for member in part.members]
    form += [selection.form, *((tuple(row.shape), row.dtype) for row in selection.rows)]
    if fold is not None:
        chain = fold.chain_for(logits)
        search = chain.search
        read = search.operands._replace(masks=None)
        read_tensors = [chain.kernel_numbers(logits.device), *(each for each in read if each is not None)]
        form += [chain.form, search.form, len(search.gates), tuple(each is None for each in search.operands)]
        form += [(tuple(each.shape), each.dtype) for each in read_tensors]
        tensors += read_tensors
    return Values(tuple(form), tuple(tensors))


def _form_of(stage: Stage) -> Hashable:
    """What a stage is but for its numbers."""
    if isinstance(stage, Truncate):
        return Truncate
    if isinstance(stage, Scale):
        return Scale, stage.keeps_bans
    if isinstance(stage, Penalize):
        return Penalize, _source_of(stage.tokens), stage.keeps_bans
    if isinstance(stage, Bias):
        signs = tuple((value == 0, value == -math.inf) for value in (stage.value, stage.counted))
        extra = kind_of(stage.extra), stage.rounds_once
        return Bias, _source_of(stage.tokens), signs, _gate_of(stage.when), stage.keeps_bans, extra
    if isinstance(stage, Ban):
        blank = kind_of(stage.blank)
        return Ban, _source_of(stage.tokens), _gate_of(stage.when), blank, stage.lenient, stage.inverted
    if isinstance(stage, Decay):
        return Decay, kind_of(stage.tokens)
    if isinstance(stage, Force):
        return Force, kind_of(stage.tokens), _gate_of(stage.when)
    return kind_of(stage)


def _source_of(source: Any) -> Hashable:
    """Which tokens a stage speaks of, but for a text that is in a tensor."""
    if isinstance(source, History):
        ignore = source.ignore
        return History, source.span, tuple(ignore.shape) if isinstance(ignore, torch.Tensor) else ignore == 0
    if isinstance(source, Given):
        return Given, tuple(source.ids.shape)
    if isinstance(source, Repeated):
        return Repeated, source.size, source.span, None if source.text is None else tuple(source.text.ids.shape)
    return kind_of(source)


def _gate_of(when: When | None) -> Hashable:
    """What a gate compares, but for the lengths."""
    return None if when is None else (when.of, when.start is None, when.stop is None, when.period, when.phase)
