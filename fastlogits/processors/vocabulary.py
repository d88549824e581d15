"""Processors that hold a run to a part of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from fastlogits.checks import is_integer, whole_number
from fastlogits.processors.base import StagedProcessor
from fastlogits.stages import AllowFrom
from fastlogits.token_mask import TokenMask, checked_ids, checked_set


class OnlyTokensFrom(StagedProcessor):
    """Allow only tokens that occur in a source text: keywords are extracted, not invented.

    Each row has its own set, built on the device at the first call of a run.

    Args:
        source_ids: token ids of the source, ``(L,)`` or ``(1, L)`` for all rows or ``(R, L)`` for one row each, as a
            tensor or as lists of any lengths; or ``"prompt"``, the prompt of the run, as far as ``input_ids`` show it.
        extra: a ``TokenMask`` or token ids that are allowed too, such as a comma.
        eos_token_id: the id or ids that end the text, always allowed; ``()`` if nothing may end it.
        exclude: a ``TokenMask`` or token ids of the source that don't count, such as padding.
        copies: how many neighbouring rows of the scores share a row of the source, an integer of at least 1: the
            number of beams times that of returned sequences. ``"prompt"`` needs no such number.

    Raises:
        ValueError: ids that are not integers or are negative; ``copies`` below 1; on a call, ids outside the
            vocabulary, a source of several rows that aren't as many as those of the scores (``R * copies``), or, for
            ``"prompt"``, a run whose start isn't known, or ``input_ids`` of other rows than the scores.

    Example:
        >>> processor = OnlyTokensFrom([3, 1], eos_token_id=0)
        >>> processor(torch.tensor([[5, 7]]), torch.zeros(1, 5))
        tensor([[0., 0., -inf, 0., -inf]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        source_ids: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | Literal["prompt"],
        extra: TokenMask | Iterable[int] | torch.Tensor = (),
        *,
        eos_token_id: int | Sequence[int],
        exclude: TokenMask | Iterable[int] | torch.Tensor = (),
        copies: int = 1,
    ) -> None:
        self.source_ids = _checked_source(source_ids)
        self.extra = checked_set("extra", extra)
        self.eos_token_id = checked_ids(
            "eos_token_id",
            [eos_token_id] if is_integer(eos_token_id) else eos_token_id,  # type: ignore[list-item,arg-type]
        )
        self.exclude = checked_set("exclude", exclude)
        self.copies = whole_number("copies", copies, 1)

    def stage(self) -> AllowFrom:
        """A mask of its own for each row."""
        return AllowFrom(self.source_ids, self.extra, self.eos_token_id, self.exclude, self.copies)


def _checked_source(source_ids: object) -> torch.Tensor | Literal["prompt"]:
    """Ids as int64 ``(R, L)`` on the host, rows padded with -1."""
    if isinstance(source_ids, str):
        if source_ids != "prompt":
            raise ValueError(f"source_ids must be token ids or 'prompt', got {source_ids!r}; tokenize the text first")
        return "prompt"
    if isinstance(source_ids, torch.Tensor):
        if source_ids.ndim not in (1, 2):
            raise ValueError(f"source_ids must be of shape (L,) or (R, L), got {tuple(source_ids.shape)}")
        rows = list(source_ids.reshape(-1, source_ids.shape[-1]))
    else:
        nested = list(source_ids) if isinstance(source_ids, Iterable) else None
        if nested is None:
            raise ValueError(f"source_ids must be token ids or 'prompt', got {source_ids!r}")
        rows = nested if nested and not is_integer(nested[0]) else [nested]
    checked = [torch.tensor(checked_ids("source_ids", row), dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(checked, batch_first=True, padding_value=-1)
