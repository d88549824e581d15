"""Processors that forbid tokens by their ids: always, at the first steps, or if a source text lacks them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from transformers.generation import logits_process as theirs

from fastlogits.checks import is_integer, whole_number
from fastlogits.plan.stages import AllowFrom, Ban, When
from fastlogits.processors.base import StagedProcessor
from fastlogits.processors.length import ids_of
from fastlogits.token_mask import TokenMask, checked_ids, checked_set


class SuppressTokensLogitsProcessor(StagedProcessor, theirs.SuppressTokensLogitsProcessor):
    """Forbid tokens at every step.

    Args:
        suppress_tokens: token ids, of which those outside the vocabulary are ignored; or a ``TokenMask``.
        device: device on which the ids are kept.

    Raises:
        ValueError: on a call, a mask of another vocabulary.

    Example:
        >>> SuppressTokensLogitsProcessor([1])(None, torch.zeros(1, 3))
        tensor([[0., -inf, 0.]])
    """

    _vocab_size: int | None = None

    def __init__(self, suppress_tokens: Iterable[int], device: str = "cpu") -> None:
        super().__init__(suppress_tokens, device)
        self._vocab_size = _vocab_size_of(suppress_tokens)

    def stage(self) -> Ban:
        """A mask."""
        return Ban(_as_given(self, self.suppress_tokens), argument="suppress_tokens", lenient=True)


class SuppressTokensAtBeginLogitsProcessor(StagedProcessor, theirs.SuppressTokensAtBeginLogitsProcessor):
    """Forbid tokens at the first step: where the sequence has the length at which generation begins.

    Args:
        begin_suppress_tokens: token ids, of which those outside the vocabulary are ignored; or a ``TokenMask``.
        begin_index: the length; ``set_begin_index`` changes it.
        device: device on which the ids are kept.

    Raises:
        ValueError: on a call, a mask of another vocabulary.

    Example:
        >>> SuppressTokensAtBeginLogitsProcessor([1], 2)(torch.tensor([[5, 7]]), torch.zeros(1, 3))
        tensor([[0., -inf, 0.]])
    """

    _vocab_size: int | None = None

    def __init__(self, begin_suppress_tokens: Iterable[int], begin_index: int, device: str = "cpu") -> None:
        super().__init__(begin_suppress_tokens, begin_index, device)
        self._vocab_size = _vocab_size_of(begin_suppress_tokens)

    def stage(self) -> Ban:
        """A mask at one length."""
        if self.begin_index is None:
            return Ban(())
        begin = int(self.begin_index)
        when = When("length", begin, begin + 1)
        tokens = _as_given(self, self.begin_suppress_tokens)
        return Ban(tokens, when, argument="begin_suppress_tokens", lenient=True)


def _vocab_size_of(tokens: object) -> int | None:
    """The vocabulary of a mask; None of token ids, and of a mask for any."""
    return tokens.vocab_size if isinstance(tokens, TokenMask) and not tokens._any_width else None


def _as_given(processor: object, ids: torch.Tensor) -> TokenMask | tuple[int, ...]:
    """Token ids of a processor; as a mask of its vocabulary if a mask was given."""
    vocab_size, found = getattr(processor, "_vocab_size", None), ids_of(ids)
    return found if vocab_size is None else TokenMask.from_ids(found, vocab_size)


class AllowedTokensLogitsProcessor(StagedProcessor):
    """Forbid all tokens except some: ``allowed_token_ids`` of serving engines.

    Args:
        allowed_token_ids: a ``TokenMask`` or token ids, at least one.

    Raises:
        ValueError: no ids, or ids that are not integers or are negative; on a call, ids outside the vocabulary, or a
            mask of another vocabulary.

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
    """Forbid the tokens that end the text or stop it during the first steps of each run.

    Args:
        min_tokens: number of tokens to generate first, an integer of at least 0.
        stop_token_ids: token ids, including those that end the text.

    Raises:
        ValueError: a number or an id that is not an integer or is negative; on a call, ids outside the vocabulary, or
            a run whose start isn't known.

    Example:
        >>> run = MinTokensLogitsProcessor(2, [0, 1]).for_run(prompt_length=1)
        >>> run(torch.tensor([[5, 7]]), torch.zeros(1, 3))
        tensor([[-inf, -inf, 0.]])
    """

    supports_continuous_batching = False

    def __init__(self, min_tokens: int, stop_token_ids: Iterable[int] | torch.Tensor) -> None:
        self.min_tokens = whole_number("min_tokens", min_tokens)
        self.stop_token_ids = checked_ids("stop_token_ids", stop_token_ids)
        if not self.stop_token_ids:
            warnings.warn("stop_token_ids is empty: MinTokensLogitsProcessor does nothing", stacklevel=2)

    def stage(self) -> Ban:
        """A mask during the first steps."""
        return Ban(self.stop_token_ids, When("step", stop=self.min_tokens), argument="stop_token_ids")


class SuppressFirstTokens(StagedProcessor):
    r"""Forbid some tokens during the first steps of each run: "don't begin the answer with a digit".

    A run is one call of ``generate``. Its first step follows the prompt, whatever the prompt holds. The step comes
    from cache positions, not from a count of calls; see ``fastlogits.Position``.

    Args:
        mask_or_ids: a ``TokenMask``, or token ids; an empty set is allowed, with a warning.
        window: number of steps for which the tokens are forbidden, at least 1.
        blank: a ``TokenMask`` or token ids that don't end the ban. Some tokenizers begin an answer with a space of its
            own. If that token is blank, the ban goes on after the window until the first token that is not blank. The
            GPU then checks the ban at every step, since the host doesn't know when it ends.

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
    """Forbid some tokens as the first generated token, under the name and constructor of the published class.

    The published class loops over the ids, writes its input and needs a global variable that is set before each run.
    To use this one, change the import only.

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


class OnlyTokensFrom(StagedProcessor):
    """Allow only tokens that occur in a source text: keywords are extracted, not invented.

    Each row has its own set, which is built on the device at the first call of a run.

    Args:
        source_ids: token ids of the source: ``(L,)`` or ``(1, L)`` for all rows, or ``(R, L)`` with one source for each
            row, as a tensor or as lists of any lengths; or ``"prompt"``, the prompt of the run in ``input_ids``.
        extra: a ``TokenMask`` or token ids that are allowed too, such as a comma.
        eos_token_id: the id or ids that end the text, always allowed; ``()`` if nothing may end it.
        exclude: a ``TokenMask`` or token ids of the source that don't count, such as padding.
        copies: how many neighbouring rows of the scores share a row of the source, an integer of at least 1: the
            number of beams times the number of returned sequences. ``"prompt"`` doesn't need it.

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
