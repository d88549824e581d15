"""A penalty on tokens that would go on repeating what the sequence already holds."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from fastlogits_kernels.runtime.launcher import to_device
from torch.nn.functional import pad

from fastlogits.checks import check_rows, finite_number, whole_number
from fastlogits.plan.stages import Rows
from fastlogits.processors.base import StagedProcessor
from fastlogits.token_mask import TokenMask, TokenSet, checked_set, fitted

# Longer repetitions count as this long, as in the original: penalties grow exponentially.
_LONGEST = 50


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
            self.base**_LONGEST
        except OverflowError:
            raise ValueError(f"base must have a finite {_LONGEST}th power, got {base!r}") from None

    def stage(self) -> Rows:
        """A bias that the history makes."""
        penalties = [
            self.multiplier * self.base ** (n - self.allowed_length) if n >= max(1, self.allowed_length) else 0.0
            for n in range(_LONGEST + 1)
        ]
        description = f"lower what follows the last {max(1, self.allowed_length)} or more tokens elsewhere"
        description += f", by {self.multiplier:g} times {self.base:g} to the power of what is more"
        return Rows("bias", _Repetitions(penalties, self.sequence_breakers, self.range_), description)


class _Repetitions:
    """Finds what the end of each row repeats, and lowers what followed it.

    Args:
        penalties: of matches of 0 to 50 tokens; none is lower than the one before.
        breakers: tokens that are in no match.
        range_: how many of the last tokens count; 0 for all.
    """

    def __init__(self, penalties: list[float], breakers: TokenSet, range_: int) -> None:
        self._penalties, self._breakers, self._range = penalties, breakers, range_
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        V = scores.shape[1]
        ids = input_ids[:, -min(self._range, input_ids.shape[1]) :]
        L = ids.shape[1]
        check_rows("DRYLogitsProcessor", input_ids, scores)
        if L < 2:
            return scores
        wide = torch.promote_types(scores.dtype, torch.float32)
        key = (V, scores.device, wide)
        tables = self._tables.get(key)
        if tables is None:
            is_breaker = fitted("sequence_breakers", self._breakers, V).row(scores.device)
            penalties = to_device(torch.tensor(self._penalties, dtype=wide), scores.device)
            tables = self._tables[key] = (penalties, is_breaker)
        penalties, is_breaker = tables

        longest = min(_LONGEST, L - 1)
        tail = ids[:, -longest:]
        # A breaker matches nothing, and so ends every match. Nor does what lies before the first token.
        tail = tail.masked_fill(is_breaker[tail.clamp(0, V - 1).long()] & (tail < V), -1)  # [B, longest]
        earlier = pad(ids[:, :-1], (longest - 1, 0), value=-2).unfold(1, longest, 1)  # [B, L - 1, longest]
        follower = ids[:, 1:]
        if scores.is_cpu:
            # Few places match at all, and here nothing waits for their number.
            row, column = (ids[:, :-1] == tail[:, -1:]).nonzero(as_tuple=True)
            earlier, tail, follower = earlier[row, column], tail[row], follower[row, column]
        else:
            row = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
            tail = tail.unsqueeze(1)
        # A match is as long as its first difference is far from the end.
        distance = torch.arange(longest - 1, -1, -1, dtype=torch.uint8, device=ids.device)
        matched = distance.where(earlier != tail, longest).amin(-1).long()
        inside = (follower >= 0) & (follower < V)
        token = follower.where(inside, 0).long()
        penalty = penalties[matched].masked_fill(is_breaker[token] | ~inside, 0)
        processed = scores.clone(memory_format=torch.contiguous_format)
        at = (row * V + token).flatten()
        lowered = (processed.view(-1)[at] - penalty.flatten()).to(scores.dtype)
        processed.view(-1).scatter_reduce_(0, at, lowered, "amin")
        return processed
