"""The algebra: what a processor is, to a plan. A stage holds parameters; it knows no kernel and no scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fastlogits.token_mask import TokenMask, TokenSet


@dataclass(frozen=True, eq=False)
class Stage:
    """What one processor does to the logits."""

    kind: ClassVar[str]
    """The law it obeys: stages of kind ``"mask"`` merge; an ``"opaque"`` one is a barrier."""

    @property
    def needs_position(self) -> bool:
        """Whether it asks which step of the run it is in."""
        return False

    def describe(self) -> str:
        """Its parameters in a few words, for ``explain()``."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Ban(Stage):
    """Tokens that get -inf: always, or while its gate is open.

    Args:
        tokens: the banned tokens.
        window: steps for which the gate stays open; None for always.
        blank: tokens that leave the gate open when all tokens generated so far are among them.
        argument: what the processor calls ``tokens``, for error messages.
    """

    kind = "mask"
    tokens: TokenSet
    window: int | None = None
    blank: TokenSet | None = None
    argument: str = "tokens"

    @property
    def needs_position(self) -> bool:
        return self.window is not None

    def describe(self) -> str:
        until = "" if self.blank is None else f", then until a token outside {_count(self.blank)} blank"
        when = "always" if self.window is None else f"while step < {self.window}{until}"
        return f"ban {_count(self.tokens)} {when}"


@dataclass(frozen=True, eq=False)
class AllowFrom(Stage):
    """All tokens get -inf but those of a source text, one set per row.

    Args:
        source: token ids ``(L,)`` or ``(R, L)``, padded with -1; or ``"prompt"``, the prompt of the run.
        extra: tokens allowed whatever the source holds.
        eos: tokens that end the text, allowed likewise.
        exclude: tokens of the source that don't count.
    """

    kind = "mask"
    source: torch.Tensor | Literal["prompt"]
    extra: TokenSet
    eos: tuple[int, ...]
    exclude: TokenSet

    @property
    def needs_position(self) -> bool:
        return isinstance(self.source, str)

    def describe(self) -> str:
        source = "the prompt" if isinstance(self.source, str) else f"a source of shape {tuple(self.source.shape)}"
        return f"allow the tokens of {source}, {_count(self.extra)} extra, {len(self.eos)} to end with"


@dataclass(frozen=True, eq=False)
class Opaque(Stage):
    """A processor that says nothing of itself: it runs as it is, in its place."""

    kind = "opaque"
    processor: Any

    def describe(self) -> str:
        return "unknown to fastlogits: runs as it is"


def _count(tokens: TokenSet) -> str:
    of = f" of {tokens.vocab_size}" if isinstance(tokens, TokenMask) else ""
    return f"{len(tokens)}{of} {'token' if len(tokens) == 1 and not of else 'tokens'}"
