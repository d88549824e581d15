"""Stages of a part of the vocabulary: what maps each logit by itself needs no logits of other ranks.

A stage of the whole vocabulary becomes one of a part that begins at the token 0. Masks are cut, ids of tokens are
counted from the part's first one, and the history is read likewise. Tokens outside the part become ids that no logits
have: they still stand in the history, where n-grams and sequences are compared with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from fastlogits.plan.stages import (
    AllowFrom,
    Ban,
    BanRange,
    Bias,
    Clean,
    Decay,
    Force,
    History,
    Member,
    Penalize,
    Repeated,
    Scale,
    SequenceBias,
    Stage,
    values_of,
)
from fastlogits.token_mask import TokenMask, TokenSet, fitted

_OUTSIDE = 2**30


class Piece(NamedTuple):
    """The tokens of a part: those from ``start`` to below ``stop`` of a vocabulary of V."""

    start: int
    stop: int
    V: int

    def id_of(self, token: int) -> int:
        """A token's id in the part; a negative one where it isn't in it."""
        if token < 0:
            return token
        return token - self.start if self.has(token) else -_OUTSIDE - token

    def has(self, token: int) -> bool:
        """Whether a token is in the part."""
        return self.start <= token < self.stop

    def ids_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The same for a tensor of ids."""
        inside = (input_ids >= self.start) & (input_ids < self.stop)
        outside = torch.where(input_ids < 0, input_ids, -_OUTSIDE - input_ids)
        return torch.where(inside, input_ids - self.start, outside)

    def mask(self, argument: str, tokens: TokenSet) -> TokenMask:
        """The tokens of a set that are in the part.

        Raises:
            ValueError: the set doesn't fit the vocabulary.
        """
        return TokenMask(fitted(argument, tokens, self.V).row()[self.start : self.stop])

    def indexed(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Ids in the part of tokens that index the vocabulary, as negative ones do from its end.

        Raises:
            ValueError: one of them is outside the vocabulary.
        """
        if not all(-self.V <= token < self.V for token in tokens):
            raise ValueError(f"token ids must be in a vocabulary of {self.V} tokens, got {tuple(tokens)}")
        return tuple(token % self.V - self.start for token in tokens if self.has(token % self.V))


class PartMembers(NamedTuple):
    """Processors as they are for a part."""

    members: list[Member]
    piece: Piece
    reads: bool
    """Whether one of them reads the tokens of the history."""

    def ids(self, input_ids: Any) -> Any:
        """The tokens so far as these processors read them."""
        return self.piece.ids_of(input_ids) if self.reads and isinstance(input_ids, torch.Tensor) else input_ids


def members_of_part(members: Sequence[Member], piece: Piece) -> PartMembers | None:
    """The processors for a part of the vocabulary; None where one of them needs more, or doesn't fit the vocabulary."""
    found: list[Member] = []
    for member in members:
        try:
            stage = _of_part(member.stage, piece)
        except (ValueError, IndexError):  # where all logits are, it says so
            return None
        if stage is None:
            return None
        found.append(member._replace(stage=stage, original=None))
    return PartMembers(found, piece, any(_reads(member.stage) for member in found))


def _reads(stage: Stage) -> bool:
    if isinstance(stage, SequenceBias):
        return stage.needs_history
    if isinstance(stage, AllowFrom):
        return stage.needs_history
    return isinstance(getattr(stage, "tokens", None), (History, Repeated))


def _of_part(stage: Stage, piece: Piece) -> Stage | None:
    """A stage for a part; None where it needs more than the part."""
    if values_of(stage):  # computed from the tokens as they are
        return None
    if isinstance(stage, (Scale, Clean)):
        return stage
    if isinstance(stage, Ban):
        return _ban(stage, piece)
    if isinstance(stage, BanRange):
        start, stop = stage.start, stage.stop
        assert isinstance(start, int)
        assert stop is None or isinstance(stop, int)
        return BanRange(max(0, start - piece.start), None if stop is None else max(0, stop - piece.start))
    if isinstance(stage, Penalize):
        return stage if isinstance(stage.tokens, History) else None
    if isinstance(stage, Bias):
        return _bias(stage, piece)
    if isinstance(stage, SequenceBias):
        return _sequence_bias(stage, piece)
    if isinstance(stage, Decay):
        return replace(stage, tokens=piece.indexed(stage.tokens))
    if isinstance(stage, Force):
        tokens: TokenSet = stage.tokens
        inside = piece.mask(stage.argument, tokens) if isinstance(tokens, TokenMask) else piece.indexed(tokens)
        return replace(stage, tokens=inside)
    if isinstance(stage, AllowFrom):
        return _allow_from(stage, piece)
    return None


def _ban(stage: Ban, piece: Piece) -> Ban | None:
    if stage.blank is not None:
        return None
    if isinstance(stage.tokens, (TokenMask, tuple)):
        mask = TokenMask(stage.mask(piece.V).row()[piece.start : piece.stop])
        return Ban(mask, stage.when, argument=stage.argument)
    if isinstance(stage.tokens, History) or (isinstance(stage.tokens, Repeated) and stage.tokens.text is None):
        return stage
    return None


def _bias(stage: Bias, piece: Piece) -> Bias | None:
    extra = tuple(piece.mask(stage.argument, stage.extra))
    if isinstance(stage.tokens, (TokenMask, tuple)):
        return replace(stage, tokens=piece.mask(stage.argument, stage.tokens), extra=extra)
    return replace(stage, extra=extra) if isinstance(stage.tokens, History) else None


def _sequence_bias(stage: SequenceBias, piece: Piece) -> SequenceBias | None:
    if stage.outside(piece.V):
        return None
    ending_here = [(ids, value) for ids, value in stage.sequences if piece.has(ids[-1])]
    return SequenceBias(tuple((tuple(map(piece.id_of, ids)), value) for ids, value in ending_here))


def _allow_from(stage: AllowFrom, piece: Piece) -> AllowFrom | None:
    if isinstance(stage.source, torch.Tensor):
        if stage.source.numel() and int(stage.source.max()) >= piece.V:
            return None
        source: Any = piece.ids_of(stage.source)
    else:
        source = stage.source
    eos = piece.mask("eos_token_id", stage.eos)
    return replace(
        stage, source=source, extra=piece.mask("extra", stage.extra), eos=tuple(eos),
        exclude=piece.mask("exclude", stage.exclude),
    )  # fmt: skip
