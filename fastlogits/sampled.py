"""What a step of sampling returns. It imports no transformers, which serving doesn't need."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from fastlogits_kernels.selection.logprobs import Report

from fastlogits.kept_tokens import KeptTokens

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

    @property
    def kept(self) -> KeptTokens | None:
        """The tokens that the truncations kept of each row; None where ``return_kept`` didn't ask for them."""
        return getattr(self, "_kept", None)

    @classmethod
    def of(
        cls, tokens: torch.Tensor, found: Report | None, top_logprobs: int, kept: KeptTokens | None = None
    ) -> Sample:
        """Tokens with the report on them, if there is one. It covers ``top_logprobs`` of the likeliest tokens."""
        logprobs = ranks = top_tokens = top = None
        if found is not None:
            logprobs, ranks = found.logprobs, found.ranks
            if top_logprobs:
                top_tokens, top = found.top_tokens, found.top_logprobs
        if kept is None:
            return cls(tokens, logprobs, ranks, top_tokens, top)
        sample = _SampleOfKept(tokens, logprobs, ranks, top_tokens, top)
        sample._kept = kept
        return sample


class _SampleOfKept(Sample):
    """A sample that says what was kept; as a tuple it has no more fields than others."""

    _kept: KeptTokens

    def _replace(self, **changed: Any) -> _SampleOfKept:
        """The same with other fields; what was kept stays."""
        sample = _SampleOfKept(*Sample(*self)._replace(**changed))
        sample._kept = self._kept
        return sample
