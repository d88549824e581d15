"""Which tokens may still be drawn, how likely they are, and what one processor changed about that."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Likely = tuple[tuple[int, float], ...]
"""Token ids with their probabilities, the most likely first."""

Moved = tuple[tuple[int, float, float], ...]
"""Token ids with their probabilities before and after a processor, the largest difference first."""

_ROUNDING = 4.0
"""How many roundings of a score may stand between two values that count as the same."""


@dataclass(frozen=True)
class Change:
    """What one processor did to one row. A candidate is a token whose score is above the dtype's lowest number.

    A candidate whose score changed was raised or lowered. Where other candidates kept their score, its score says
    which: a penalty lowers some tokens beside many that stay. Where the scores of all changed, as by a temperature,
    its probability among the candidates that stayed says which, since only the distances of scores count.

    Args:
        number: place of the processor in the list, from 0.
        processor: its class name.
        row: the row of its result.
        removed: number of candidates that it removed.
        added: number of candidates that it added.
        changed: number of candidates that stayed with another score.
        left: number of candidates after it.
        kept_mass: total probability, before it, of the candidates that stayed.
        kept_of_start: total probability, before all processors, of the candidates that are left.
        removed_likeliest: the most likely candidates that it removed, with their probabilities before it.
        top_before: the most likely tokens before it.
        top_after: the most likely tokens after it.
        raised: number of candidates that it raised.
        lowered: number of candidates that it lowered.
        moved_most: of these, the ones whose probability changed most, with their probabilities before and after it.
    """

    number: int
    processor: str
    row: int
    removed: int
    added: int
    changed: int
    left: int
    kept_mass: float
    kept_of_start: float
    removed_likeliest: Likely
    top_before: Likely
    top_after: Likely
    raised: int = 0
    lowered: int = 0
    moved_most: Moved = ()


class Candidates:
    """Scores ``[B, V]``, which of their tokens are candidates, and the probabilities of these."""

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores
        self.rows = scores.shape[0]
        self.are = scores > torch.finfo(scores.dtype).min
        masked = scores.double().masked_fill(~self.are, float("-inf"))
        self.probabilities = masked.softmax(-1).nan_to_num(0.0)  # a row without candidates has no probabilities

    def first(self, rows: int) -> Candidates:
        """The same for the first rows."""
        return Candidates(self.scores[:rows])

    def likeliest(self, row: int, count: int, among: torch.Tensor | None = None) -> Likely:
        """The most likely candidates of a row, or of some of them; ties by token id."""
        among = self.are[row] if among is None else among
        probabilities = self.probabilities[row]
        tokens = _largest(probabilities, among, count)
        return tuple(zip(tokens.tolist(), probabilities[tokens].tolist(), strict=True))

    def rank(self, row: int, token: int) -> int | None:
        """The place of a token among the candidates of a row, from 1, ties by token id; None if it is none of them."""
        if not 0 <= token < self.scores.shape[1] or not self.are[row, token]:
            return None
        scores = self.scores[row].masked_fill(~self.are[row], float("-inf"))
        before = int((scores > scores[token]).sum()) + int((scores[:token] == scores[token]).sum())
        return before + 1


def _largest(values: torch.Tensor, among: torch.Tensor, count: int) -> torch.Tensor:
    """Where the largest of some values ``[V]`` are, at most ``count``; ties by index. Sorts few of them."""
    masked = values.masked_fill(~among, -1.0)
    least = masked.topk(min(count, len(masked))).values[-1:]
    found = ((masked >= least) & among).nonzero().squeeze(1)
    return found[masked[found].sort(descending=True, stable=True).indices[:count]]


class Moves:
    """Which candidates of a row a processor raised and lowered; see ``Change``.

    Args:
        before: the candidates before it.
        after: the candidates after it.
        row: the row.
    """

    def __init__(self, before: Candidates, after: Candidates, row: int) -> None:
        was, now = before.scores[row].double(), after.scores[row].double()
        stayed = before.are[row] & after.are[row]
        changed = stayed & (was != now)
        self.changed = int(changed.sum())
        if not self.changed:
            self.raised = self.lowered = torch.zeros_like(stayed)
        elif (stayed & ~changed & (was != 0)).any():  # a temperature leaves a score of 0 as it is
            self.raised, self.lowered = changed & (now > was), changed & (now < was)
        else:
            outside = float("-inf")
            grown = now - now.masked_fill(~stayed, outside).logsumexp(-1)
            grown -= was - was.masked_fill(~stayed, outside).logsumexp(-1)
            eps = torch.finfo(after.scores.dtype).eps
            same = _ROUNDING * eps * torch.maximum(was.abs(), now.abs()).clamp(min=1.0)
            self.raised, self.lowered = stayed & (grown > same), stayed & (grown < -same)


def change_of(
    number: int, name: str, row: int, start: Candidates, before: Candidates, after: Candidates, top: int
) -> tuple[Change, Moves]:
    """What a processor did to a row, and to which of its candidates.

    Args:
        number: place of the processor in the list, from 0.
        name: its class name.
        row: the row.
        start: the candidates before all processors.
        before: the candidates before it.
        after: the candidates after it.
        top: how many of the most likely tokens to note.
    """
    was, now = before.are[row], after.are[row]
    removed = was & ~now
    moves = Moves(before, after, row)
    then, since = before.probabilities[row], after.probabilities[row]
    moved = _largest((since - then).abs(), moves.raised | moves.lowered, top)
    change = Change(
        number=number,
        processor=name,
        row=row,
        removed=int(removed.sum()),
        added=int((now & ~was).sum()),
        changed=moves.changed,
        left=int(now.sum()),
        kept_mass=float(then[now].sum()),
        kept_of_start=float(start.probabilities[row, now].sum()),
        removed_likeliest=before.likeliest(row, top, removed),
        top_before=before.likeliest(row, top),
        top_after=after.likeliest(row, top),
        raised=int(moves.raised.sum()),
        lowered=int(moves.lowered.sum()),
        moved_most=tuple(zip(moved.tolist(), then[moved].tolist(), since[moved].tolist(), strict=True)),
    )
    return change, moves
