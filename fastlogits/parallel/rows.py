"""Which plans take the rows of a batch one by one, so that each rank can process some of them."""

from __future__ import annotations

from typing import Any

import torch

from fastlogits.plan.position import Index
from fastlogits.plan.stages import (
    Ban,
    BanRange,
    Bias,
    Clean,
    Decay,
    Force,
    History,
    LowerRepetitions,
    Member,
    Normalise,
    Penalize,
    Repeated,
    Scale,
    SequenceBias,
    Stage,
    Truncate,
    values_of,
)
from fastlogits.token_mask import TokenMask

_OF_EACH_ROW = (
    Ban, BanRange, Bias, Clean, Decay, Force, LowerRepetitions, Normalise, Penalize, Scale, SequenceBias, Truncate,
)  # fmt: skip


def takes_some_rows(members: list[Member]) -> bool:
    """Whether processors do the same to a row whatever rows stand beside it, and hold nothing for each row.

    Others get all rows: those that fastlogits doesn't know, that mix rows, or that have a source for each row.
    """
    return all(_takes_some_rows(member.stage) for member in members)


def _takes_some_rows(stage: Stage) -> bool:
    if not isinstance(stage, _OF_EACH_ROW) or values_of(stage):
        return False
    if isinstance(stage, Truncate):
        return not any(isinstance(rule.value, torch.Tensor) for rule in stage.rules)
    tokens: Any = getattr(stage, "tokens", ())
    if isinstance(tokens, History):
        return not isinstance(tokens.ignore, torch.Tensor)
    if isinstance(tokens, Repeated):
        return tokens.text is None
    return isinstance(tokens, (TokenMask, tuple))


def some_rows(value: Any, rows: slice, B: int) -> Any:
    """What belongs to some rows: a part of a tensor with an entry for each of B rows; anything else as it is."""
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim and len(value) == B else value


def some_index(index: Index | None, rows: slice, B: int) -> Index | None:
    """Positions of some rows."""
    found: Index | None = some_rows(index, rows, B)
    return found
