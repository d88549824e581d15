"""What a step of sampling returns. It imports no transformers, which serving doesn't need."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from fastlogits_kernels.selection.logprobs import Report

Distribution: TypeAlias = Literal["raw", "processed"]
"""Whose log-probabilities are meant: of the logits as they are given, or of the distribution that is sampled."""


class Sample(NamedTuple):
    """The tokens of one step, and what was asked about them."""

    tokens: torch.Tensor
    """int64 ``[B]``."""
    logprobs: torch.Tensor | None
    """Log-probability of each token, float32 ``[B]``; NaN in a row of NaN, of +inf or of nothing but -inf."""
    ranks: torch.Tensor | None
    """How many tokens are at least as likely as it, int64 ``[B]``: 1 for the likeliest."""
    top_tokens: torch.Tensor | None
    """The likeliest tokens of each row, the lowest id first on ties, int64 ``[B, n]``."""
    top_logprobs: torch.Tensor | None
    """Their log-probabilities, float32 ``[B, n]``."""

    @classmethod
    def of(cls, tokens: torch.Tensor, found: Report | None, top_logprobs: int) -> Sample:
        """Tokens with the report on them, if there is one. It covers ``top_logprobs`` of the likeliest tokens."""
        if found is None:
            return cls(tokens, None, None, None, None)
        if not top_logprobs:
            return cls(tokens, found.logprobs, found.ranks, None, None)
        return cls(tokens, found.logprobs, found.ranks, found.top_tokens, found.top_logprobs)
