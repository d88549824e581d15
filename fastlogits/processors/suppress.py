"""Processors that forbid tokens by their ids."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers.generation import logits_process as theirs

from fastlogits.checks import whole_number
from fastlogits.processors.base import StagedProcessor
from fastlogits.processors.length import ids_of
from fastlogits.stages import Ban, When
from fastlogits.token_mask import TokenMask, checked_ids, checked_set


class SuppressTokensLogitsProcessor(StagedProcessor, theirs.SuppressTokensLogitsProcessor):
    """Forbid tokens at every step.

    Args:
        suppress_tokens: token ids; those outside the vocabulary are ignored.
        device: where a tensor is made of the ids.

    Example:
        >>> SuppressTokensLogitsProcessor([1])(None, torch.zeros(1, 3))
        tensor([[0., -inf, 0.]])
    """

    def stage(self) -> Ban:
        """A mask."""
        return Ban(ids_of(self.suppress_tokens), lenient=True)


class SuppressTokensAtBeginLogitsProcessor(StagedProcessor, theirs.SuppressTokensAtBeginLogitsProcessor):
    """Forbid tokens where the sequence has one length, that at which generation begins.

    Args:
        begin_suppress_tokens: token ids; those outside the vocabulary are ignored.
        begin_index: the length; ``set_begin_index`` changes it.
        device: where a tensor is made of the ids.

    Example:
        >>> SuppressTokensAtBeginLogitsProcessor([1], 2)(torch.tensor([[5, 7]]), torch.zeros(1, 3))
        tensor([[0., -inf, 0.]])
    """

    def stage(self) -> Ban:
        """A mask at one length."""
        if self.begin_index is None:
            return Ban(())
        begin = int(self.begin_index)
        return Ban(ids_of(self.begin_suppress_tokens), When("length", begin, begin + 1), lenient=True)


class AllowedTokensLogitsProcessor(StagedProcessor):
    """Forbid all tokens but some: ``allowed_token_ids`` as serving engines have it.

    Args:
        allowed_token_ids: a ``TokenMask`` or token ids, at least one.

    Raises:
        ValueError: ids that are not integers or are negative, or none; on a call, ids outside the vocabulary, or a
            mask of another one.

    Example:
        >>> AllowedTokensLogitsProcessor([1])(None, torch.zeros(1, 3))
        tensor([[-inf, 0., -inf]])
    """

    supports_continuous_batching = True

    def __init__(self, allowed_token_ids: TokenMask | Iterable[int] | torch.Tensor) -> None:
        self.allowed_token_ids = checked_set("allowed_token_ids", allowed_token_ids)
        if not len(self.allowed_token_ids):
            raise ValueError("allowed_token_ids must hold at least one token, got none: nothing could be generated")

    def stage(self) -> Ban:
        """A mask of all other tokens."""
        return Ban(self.allowed_token_ids, argument="allowed_token_ids", inverted=True)


class MinTokensLogitsProcessor(StagedProcessor):
    """Forbid the tokens that end the text, or stop it, for the first steps of each run.

    Args:
        min_tokens: number of tokens to generate first, an integer of at least 0.
        stop_token_ids: token ids, those that end the text among them.

    Raises:
        ValueError: a number that is not an integer or is negative; ids likewise; on a call, ids outside the
            vocabulary, or a run whose start isn't known.

    Example:
        >>> run = MinTokensLogitsProcessor(2, [0, 1]).for_run(prompt_length=1)
        >>> run(torch.tensor([[5, 7]]), torch.zeros(1, 3))
        tensor([[-inf, -inf, 0.]])
    """

    supports_continuous_batching = False

    def __init__(self, min_tokens: int, stop_token_ids: Iterable[int] | torch.Tensor) -> None:
        self.min_tokens = whole_number("min_tokens", min_tokens)
        self.stop_token_ids = checked_ids("stop_token_ids", stop_token_ids)

    def stage(self) -> Ban:
        """A mask during the first steps."""
        return Ban(self.stop_token_ids, When("step", stop=self.min_tokens), argument="stop_token_ids")
