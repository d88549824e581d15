"""Values of a row that torch computes for a fold: a few small operations on tokens and positions, none on the scores.

A stage that needs one, as a bias that grows with the step of the row, names a ``RowValue``. The fold computes all of
its values before its kernels, which read them beside the logits. So nothing else stands between the stages around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlogits.plan.position import Index, prompt_of

if TYPE_CHECKING:
    from fastlogits.plan.run import Run


class CallRows(NamedTuple):
    """The rows of a call, without their scores: what a function of a ``RowValues`` is given."""

    input_ids: torch.Tensor
    """Tokens so far, int32 or int64 ``[B, L]``; behind a row's own length, anything."""
    B: int
    V: int
    device: torch.device
    """Where the scores are, and the values have to be."""
    cache_position: Index
    """Index of the token whose logits these are: on the host, or on the device ``[]`` or ``[B]``."""
    prompt_length: Index
    """Tokens of the prompt, of the same forms; 0 where the run's start isn't known."""
    run: Run | None = None
    """The run of the call; None where nothing tells of one."""

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor,
        scores: torch.Tensor,
        cache_position: Index,
        prompt_length: Index,
        run: Run | None = None,
    ) -> CallRows:
        """The rows of some scores ``[B, V]``."""
        B, V = scores.shape
        return cls(input_ids, B, V, scores.device, cache_position, prompt_length, run)

    @property
    def length(self) -> Index:
        """Tokens so far: an integer, or ``[1, 1]`` or ``[B, 1]``."""
        return as_column(self.cache_position) + 1

    @property
    def step(self) -> Index:
        """The step of the run, 0 for its first generated token; of the forms of ``length``."""
        return self.length - as_column(self.prompt_length)

    @property
    def prompt(self) -> torch.Tensor:
        """The prompt's tokens ``[B, N]``; behind a row's own, -1."""
        return prompt_of(self.input_ids, self.prompt_length)

    def generated(self) -> torch.Tensor:
        """Which columns of ``input_ids`` hold generated tokens, bool ``[L]`` or ``[B, L]``."""
        column = torch.arange(self.input_ids.shape[1], device=self.device)
        return (column >= as_column(self.prompt_length)) & (column < self.length)

    def last(self, back: int = 1) -> torch.Tensor:
        """The last token of each row ``[B, 1]``, or the one that is ``back - 1`` before it; -1 where there is none."""
        ids, position = self.input_ids, self.cache_position
        if isinstance(position, int):
            end = min(position + 1, ids.shape[1])
            return ids[:, end - back, None] if end >= back else ids.new_full((ids.shape[0], 1), -1)
        at = position.clamp(max=ids.shape[1] - 1).reshape(-1, 1).expand(ids.shape[0], 1) + 1 - back
        # Behind the one that stands for no token.
        padded = torch.nn.functional.pad(ids, (1, 0), value=-1)
        return padded.gather(1, (at + 1).clamp(min=0).long())


@dataclass(frozen=True, eq=False)
class RowValues:
    """A function that computes some values of each row of a call; ``values[i]`` is one of them, for a stage.

    Args:
        function: takes a ``CallRows``, and returns a tensor ``[B, count]`` on its device, or ``[B]`` for one value. It
            makes a few small operations of torch, never waits for the device, and may be captured in a CUDA graph.
        description: what it computes, in a few words.
        count: how many values it computes.
        positioned: whether it asks which step of the run it is in.
        keeps_notes: whether it carries something from call to call; of functions that are ``positioned``.

    Example:
        >>> from fastlogits.plan.stages import RowBias
        >>> last = RowValues(lambda rows: 0.5 * rows.last(), "half of the last token", positioned=False)
        >>> RowBias((3,), last[0]).describe()
        'add half of the last token to 1 token'
    """

    function: Callable[[CallRows], torch.Tensor]
    description: str
    count: int = 1
    positioned: bool = True
    keeps_notes: bool = False

    def __getitem__(self, index: int) -> RowValue:
        return RowValue(self, range(self.count)[index])


@dataclass(frozen=True, eq=False)
class RowValue:
    """One value of each row.

    Args:
        of: what computes it, for all stages of a fold that name it or another of the same.
        index: which of those it is.
    """

    of: RowValues
    index: int = 0

    def describe(self) -> str:
        """In a few words, for ``explain()``."""
        return self.of.description if self.of.count == 1 else f"{self.of.description} ({self.index + 1})"


def as_column(index: Index) -> Index:
    """An index of all rows or of each, so that it broadcasts with ``[B, L]``."""
    return index if isinstance(index, int) else index.reshape(-1, 1)
