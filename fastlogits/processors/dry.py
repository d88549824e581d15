"""A penalty on tokens that would go on repeating what the sequence already holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from fastlogits_kernels.history import LONGEST

from fastlogits.checks import finite_number, whole_number
from fastlogits.plan.stages import LowerRepetitions
from fastlogits.processors.base import StagedProcessor
from fastlogits.token_mask import TokenMask, checked_set


class DRYLogitsProcessor(StagedProcessor):
    r"""Don't repeat yourself: penalise tokens that would extend a repetition, the more the longer it is.

    Where the last ``n`` tokens of the sequence, prompt included, stand at an earlier place too, the score of the token
    that follows there is lowered by ``multiplier * base ** (n - allowed_length)``, provided that ``n`` is at least
    ``allowed_length``. The longest such match counts, up to 50 tokens. No match holds a sequence breaker, and breakers
    themselves are never penalised. Source: p-e-w, text-generation-webui, pull request 5677.

    Args:
        multiplier: a finite number of at least 0, the penalty of a match of ``allowed_length`` tokens; 0.8 is usual.
        base: growth of the penalty per token, a finite number of at least 1.
        allowed_length: tokens of the shortest match that is penalised, an integer of at least 0.
        sequence_breakers: a ``TokenMask`` or token ids. The original's default of newline, colon, quote and asterisk
            is ``TokenMask.matching(tokenizer, r'[\s\S]*[\n:"*]\s*', how="fullmatch")``, which finds all tokens that
            end with one of them.
        range_: how many of the last tokens are looked at, an integer of at least 0; 0 for all.

    Raises:
        ValueError: an argument out of range; on a call, a breaker outside the vocabulary, or ``input_ids`` of other
            rows than the scores.

    Example:
        >>> processor = DRYLogitsProcessor(1.0, base=2.0)
        >>> processor(torch.tensor([[1, 2, 3, 0, 1, 2]]), torch.zeros(1, 4))
        tensor([[ 0.,  0.,  0., -1.]])
        >>> processor(torch.tensor([[0, 1, 2, 3, 0, 1, 2]]), torch.zeros(1, 4))
        tensor([[ 0.,  0.,  0., -2.]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        multiplier: float,
        base: float = 1.75,
        allowed_length: int = 2,
        sequence_breakers: TokenMask | Iterable[int] | torch.Tensor = (),
        range_: int = 0,
    ) -> None:
        self.multiplier = float(finite_number("multiplier", multiplier, 0))
        self.base = float(finite_number("base", base, 1))
        self.allowed_length = whole_number("allowed_length", allowed_length)
        self.sequence_breakers = checked_set("sequence_breakers", sequence_breakers)
        self.range_ = whole_number("range_", range_)
        try:
            self.base**LONGEST
        except OverflowError:
            raise ValueError(f"base must have a finite {LONGEST}th power, got {base!r}") from None

    def stage(self) -> LowerRepetitions:
        """A bias that the history makes."""
        penalties = tuple(
            self.multiplier * self.base ** (n - self.allowed_length) if n >= max(1, self.allowed_length) else 0.0
            for n in range(LONGEST + 1)
        )
        return LowerRepetitions(penalties, self.sequence_breakers, self.range_ or None)
