"""Processors for the first steps of a run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch

from fastlogits.checks import whole_number
from fastlogits.processors.base import StagedProcessor
from fastlogits.stages import Ban, When
from fastlogits.token_mask import TokenMask, checked_set


class SuppressFirstTokens(StagedProcessor):
    r"""Forbid some tokens during the first steps of each run: "don't begin the answer with a digit".

    A run is one call of ``generate``; its first step follows the prompt, however much history the prompt holds. The
    step is read from cache positions and never counted; see ``fastlogits.Position``.

    Args:
        mask_or_ids: a ``TokenMask``, or token ids; none at all is allowed, with a warning.
        window: number of steps, at least 1, for which they are forbidden.
        blank: a ``TokenMask`` or token ids that don't end the ban. Some tokenizers begin an answer with a bare space;
            with that token blank, the ban holds after the window too until the first token that is not blank. On the
            GPU such a ban is looked up at every step, since the host doesn't know when it ends.

    Raises:
        ValueError: ids that are not integers or are negative; ``window`` below 1; on a call, ids outside the
            vocabulary, a mask of another vocabulary, or a run whose start isn't known.

    Example:
        >>> from fastlogits import LogitsProcessorList
        >>> processors = LogitsProcessorList([SuppressFirstTokens([1, 2])])
        >>> processors(torch.tensor([[5, 7]]), torch.zeros(1, 4), prompt_length=2)
        tensor([[0., -inf, -inf, 0.]])
        >>> processors(torch.tensor([[5, 7, 0]]), torch.zeros(1, 4), prompt_length=2)
        tensor([[0., 0., 0., 0.]])
    """

    supports_continuous_batching = False
    _argument = "mask_or_ids"

    def __init__(
        self,
        mask_or_ids: TokenMask | Iterable[int] | torch.Tensor,
        window: int = 1,
        *,
        blank: TokenMask | Iterable[int] | torch.Tensor | None = None,
    ) -> None:
        self.tokens = checked_set(self._argument, mask_or_ids)
        self.window = whole_number("window", window, 1)
        self.blank = None if blank is None else checked_set("blank", blank)
        if not len(self.tokens):
            warnings.warn(f"{self._argument} is empty: {type(self).__name__} does nothing", stacklevel=2)

    def stage(self) -> Ban:
        """A mask behind a gate that closes with the window."""
        return Ban(self.tokens, When("step", stop=self.window), self.blank, self._argument)


class SuppressSpecificBOSTokenLogitsProcessor(SuppressFirstTokens):
    """Forbid some tokens as the first generated token, under the name and constructor by which it was published.

    The published class loops over the ids, writes its input and needs a global variable set before each run; here
    only the import changes.

    Args:
        bad_bos_token_id_list: token ids, or a ``TokenMask``.

    Raises:
        ValueError: see ``SuppressFirstTokens``.

    Example:
        >>> from fastlogits import LogitsProcessorList
        >>> processors = LogitsProcessorList([SuppressSpecificBOSTokenLogitsProcessor([1, 2])])
        >>> processors(torch.tensor([[5, 7]]), torch.zeros(1, 4), prompt_length=2)
        tensor([[0., -inf, -inf, 0.]])
    """

    _argument = "bad_bos_token_id_list"

    def __init__(self, bad_bos_token_id_list: TokenMask | Iterable[int] | torch.Tensor) -> None:
        super().__init__(bad_bos_token_id_list)
        self.bad_bos_token_id_list = bad_bos_token_id_list
