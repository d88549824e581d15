"""A set of token ids, computed once and kept in the form that each use reads fastest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from fastlogits_kernels.runtime.bits import pack_bits, unpack_bits, words
from fastlogits_kernels.runtime.launcher import table_on
from fastlogits_kernels.runtime.recent import hold, is_capturing, recent

from fastlogits.checks import device_of, whole_number
from fastlogits.token_text import kept_with, token_texts

TokenSet: TypeAlias = "TokenMask | tuple[int, ...]"
"""A mask, or token ids whose vocabulary is not known before the first scores are seen."""


class TokenMask:
    """An immutable set of tokens of a vocabulary; combine with ``|``, ``&`` and ``~``.

    A mask made from a tokenizer fits logits of any width, because models pad their vocabulary. A token that the
    tokenizer doesn't know is neither in such a mask nor in its complement. Any other mask fits only its own vocabulary
    size.

    Args:
        row: bool ``[V]``, True for the tokens of the set.
        any_width: whether the logits may be wider or narrower than ``V``.

    Raises:
        ValueError: ``row`` is not a one-dimensional bool tensor.

    Example:
        >>> even = TokenMask.from_ids(range(0, 10, 2), vocab_size=10)
        >>> low = TokenMask.from_ids([0, 1, 2], vocab_size=10)
        >>> list(even & ~low)
        [4, 6, 8]
    """

    def __init__(self, row: torch.Tensor, *, any_width: bool = False) -> None:
        if row.ndim != 1 or row.dtype != torch.bool:
            raise ValueError(f"row must be a bool tensor of shape (V,), got {row.dtype} of shape {tuple(row.shape)}")
        self._row = row.detach().cpu().clone()
        self._any_width = any_width
        self._forms: dict[tuple[Any, ...], torch.Tensor] = {}

    @classmethod
    def from_ids(cls, ids: Iterable[int] | torch.Tensor, vocab_size: int) -> TokenMask:
        """The tokens with these ids, each in ``0 .. vocab_size - 1``; duplicates count once.

        Raises:
            ValueError: an id is not an integer, is negative or is outside the vocabulary.
        """
        return _from_checked("ids", checked_ids("ids", ids), vocab_size)

    @classmethod
    def from_strings(cls, tokenizer: Any, strings: str | Iterable[str]) -> TokenMask:
        """The tokens whose whole text is one of ``strings``, with or without a space before it.

        ``"1"`` finds ``"1"``, ``" 1"`` and the byte token of 1; ``" 1"`` finds only ``" 1"``.

        Raises:
            ValueError: one of the texts is no single token; a tokenizer may split it into several.
        """
        wanted = [strings] if isinstance(strings, str) else list(strings)
        texts = token_texts(tokenizer)
        missing = set(wanted) - set(texts) - {text[1:] for text in texts if text and text[0] == " "}
        if missing:
            raise ValueError(
                f"strings must each be the text of one token, but {sorted(missing)} are not; the tokenizer splits "
                "them into several tokens, so use matching() with a pattern for the first of these"
            )
        either = {*wanted, *(f" {string}" for string in wanted)}
        return cls(torch.tensor([text in either for text in texts]), any_width=True)

    @classmethod
    def matching(
        cls,
        tokenizer: Any,
        pattern: str | re.Pattern[str],
        *,
        how: Literal["match", "search", "fullmatch"] = "match",
    ) -> TokenMask:
        r"""The tokens whose text matches a regular expression; kept per tokenizer and pattern.

        Texts carry their leading space (see ``fastlogits.token_text``), so ``r"\s*\d"`` finds every token that begins
        with a digit, also those with a space, of several digits, or of a byte. Special tokens have no text.

        ``re`` may backtrack without end, and its own process can't stop it. So a pattern with more than one repetition
        or alternative is matched in another Python process, which gets ten seconds.

        The masks of the 64 patterns used last are kept with the tokenizer.

        Args:
            tokenizer: a tokenizer of transformers or a ``tokenizers.Tokenizer``.
            pattern: a regular expression of Python's ``re``, or one compiled with flags.
            how: ``"match"`` at the beginning of the text, ``"search"`` anywhere in it, or ``"fullmatch"``.

        Raises:
            ValueError: the pattern is no regular expression of text, or takes more than ten seconds; or ``how`` is none
                of the three.
            RuntimeError: no Python process can be started.
        """
        if how not in ("match", "search", "fullmatch"):
            raise ValueError(f"how must be 'match', 'search' or 'fullmatch', got {how!r}")
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error
        if not isinstance(compiled.pattern, str):
            raise ValueError(f"pattern must be a regular expression of text, not of bytes, got {pattern!r}")
        texts = token_texts(tokenizer)

        def make() -> TokenMask:
            if _is_linear(compiled.pattern):
                test = getattr(compiled, how)
                return cls.from_predicate(tokenizer, lambda text: test(text) is not None)
            return cls(torch.tensor(_matched_apart(compiled, how, texts), dtype=torch.bool), any_width=True)

        masks: dict[Any, TokenMask] = kept_with(tokenizer).masks
        return recent(masks, (compiled, how), make, _MOST_MASKS)

    @classmethod
    def from_predicate(cls, tokenizer: Any, predicate: Callable[[str], bool]) -> TokenMask:
        """The tokens for whose text ``predicate`` is true; special tokens have no text and are never in it."""
        row = [text is not None and bool(predicate(text)) for text in token_texts(tokenizer)]
        return cls(torch.tensor(row, dtype=torch.bool), any_width=True)

    @classmethod
    def from_bitmask(cls, bitmask: torch.Tensor, vocab_size: int | None = None) -> TokenMask:
        """The tokens that one row of a grammar engine's bitmask allows: those whose bit is 1.

        Args:
            bitmask: int32 ``[W]`` or ``[1, W]``; bit ``i`` of word ``w`` is token ``32 * w + i``.
            vocab_size: at most ``32 * W``, which is the default.

        Raises:
            ValueError: another dtype or shape, or a vocabulary of another number of words.
        """
        row = bitmask.squeeze(0) if bitmask.ndim == 2 else bitmask
        if row.dtype != torch.int32 or row.ndim != 1:
            raise ValueError(
                f"bitmask must be int32 of shape (W,) or (1, W), got {bitmask.dtype} of {tuple(bitmask.shape)}"
            )
        size = 32 * row.shape[0] if vocab_size is None else vocab_size
        if words(size) != row.shape[0]:
            raise ValueError(f"vocab_size {size} takes {words(size)} words of 32 bits, bitmask has {row.shape[0]}")
        return cls(unpack_bits(row.cpu(), size))

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the vocabulary of the mask."""
        return self._row.shape[0]

    def bits(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Packed words int32 ``[ceil(V / 32)]``; bit ``i`` of word ``w`` is token ``32 * w + i``. Don't write to it."""
        return self._form("bits", device, torch.int32, lambda: pack_bits(self._row))

    def ids(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.int64) -> torch.Tensor:
        """Token ids in ascending order, an integer ``[N]``. Don't write to it."""
        return self._form("ids", device, dtype, lambda: self._row.nonzero().flatten().to(dtype))

    def row(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool) -> torch.Tensor:
        """Bool ``[V]``; with a floating ``dtype``, 0 outside the set and -inf in it, to be added. Don't write to it."""
        if not dtype.is_floating_point:
            return self._form("row", device, dtype, lambda: self._row.to(dtype))
        zeros = torch.zeros(self.vocab_size, dtype=dtype)
        return self._form("row", device, dtype, lambda: zeros.masked_fill_(self._row, float("-inf")))

    def fit(self, vocab_size: int) -> TokenMask:
        """This mask for logits of ``vocab_size`` tokens.

        Raises:
            ValueError: the mask has another vocabulary size and was not made from a tokenizer.
        """
        if vocab_size == self.vocab_size:
            return self
        if not self._any_width:
            raise ValueError(
                f"the mask has a vocabulary of {self.vocab_size} tokens, but {vocab_size} are needed here; "
                f"build it with vocab_size={vocab_size}"
            )
        row = torch.nn.functional.pad(self._row[:vocab_size], (0, max(0, vocab_size - self.vocab_size)))
        return TokenMask(row, any_width=True)

    def _form(
        self, form: str, device: torch.device | str, dtype: torch.dtype, make: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        try:
            key = (form, torch.device(device), dtype)
            made = self._forms.get(key)
            if made is None:
                made = self._forms[key] = make().to(device)
        except Exception:
            device_of("device", device)  # raises if the device is at fault
            raise
        return made

    def _combined(self, other: object, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> TokenMask:
        """A mask of the two rows, combined at one width."""
        if not isinstance(other, TokenMask):
            return NotImplemented  # type: ignore[no-any-return]
        if self._any_width and other._any_width:
            size = max(self.vocab_size, other.vocab_size)
        else:
            size = other.vocab_size if self._any_width else self.vocab_size
        row = combine(self.fit(size)._row, other.fit(size)._row)
        return TokenMask(row, any_width=self._any_width and other._any_width)

    def __or__(self, other: object) -> TokenMask:
        return self._combined(other, torch.logical_or)

    def __and__(self, other: object) -> TokenMask:
        return self._combined(other, torch.logical_and)

    def __invert__(self) -> TokenMask:
        return TokenMask(~self._row, any_width=self._any_width)

    def __len__(self) -> int:
        return int(self._row.sum())

    def __iter__(self) -> Any:
        return iter(self.ids().tolist())

    def __contains__(self, token_id: object) -> bool:
        try:
            number = index(token_id)  # type: ignore[arg-type]
        except TypeError:
            if isinstance(token_id, (torch.Tensor, np.ndarray)):
                raise TypeError(f"one token id at a time, an integer, got {token_id!r}") from None
            return False
        return 0 <= number < self.vocab_size and bool(self._row[number])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TokenMask):
            return NotImplemented
        return self._any_width == other._any_width and torch.equal(self._row, other._row)

    def __hash__(self) -> int:
        return hash((self.vocab_size, tuple(self)))

    def __repr__(self) -> str:
        return f"TokenMask({len(self)} of {self.vocab_size} tokens)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": {}}


# Patterns may come from requests, so only so many masks are kept with a tokenizer.
_MOST_MASKS = 64
# How long a pattern may take for all tokens of a tokenizer. It seldom takes a tenth of a second.
_SECONDS = 10
_MATCH = """
import json, re, sys
pattern, flags, how, texts = json.load(sys.stdin)
test = getattr(re.compile(pattern, flags), how)
json.dump([text is not None and test(text) is not None for text in texts], sys.stdout)
"""


def _is_linear(pattern: str) -> bool:
    """Whether a pattern has at most one choice, so that it can't backtrack for long."""
    return sum(map(pattern.count, "*+?{|")) <= 1


def _matched_apart(pattern: re.Pattern[str], how: str, texts: list[str | None]) -> list[bool]:
    """Which texts match, found by another process: it can be ended, which no thread can."""
    given = json.dumps([pattern.pattern, int(pattern.flags), how, texts]).encode()
    # Isolated, so that it imports nothing of the user's.
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCH]
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=_SECONDS, check=True)
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"pattern {pattern.pattern!r} takes more than {_SECONDS} s over the {len(texts)} tokens: it backtracks "
            "without end, as with a repetition inside another; write it without, or use from_predicate()"
        ) from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"pattern {pattern.pattern!r} must be matched by a Python process of its own, but {sys.executable!r} "
            f"could not be run ({error}); use from_predicate()"
        ) from error
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def checked_ids(argument: str, ids: Iterable[int] | torch.Tensor) -> tuple[int, ...]:
    """Distinct token ids in their order, as Python integers.

    Raises:
        ValueError: an id is not an integer or is negative; the message names ``argument``.
    """
    if isinstance(ids, torch.Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{argument} must be integer token ids, got a tensor of {ids.dtype}")
        ids = ids.flatten().tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise ValueError(f"{argument} must be token ids or a TokenMask, got {ids!r}")
    distinct: dict[int, None] = {}
    for token_id in ids:
        if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
            raise ValueError(f"{argument} must be integer token ids, got {token_id!r} among them")
        if token_id < 0:
            raise ValueError(f"{argument} must be token ids of at least 0, got {token_id} among them")
        distinct[int(token_id)] = None
    return tuple(distinct)


_ids: dict[tuple[torch.device, tuple[int, ...]], torch.Tensor] = {}
_captured_ids: list[torch.Tensor] = []
_MOST_IDS = 256


def ids_on(device: torch.device, ids: tuple[int, ...]) -> torch.Tensor:
    """Token ids int64 ``[N]`` on a device, kept there for the 256 used last. Don't write to it."""
    made = recent(_ids, (device, ids), lambda: table_on(torch.tensor(ids), device), _MOST_IDS)
    if is_capturing(device):
        hold(_captured_ids, made)
    return made


def checked_set(argument: str, tokens: TokenMask | Iterable[int] | torch.Tensor) -> TokenSet:
    """``tokens`` itself if it is a mask, else checked ids."""
    return tokens if isinstance(tokens, TokenMask) else checked_ids(argument, tokens)


def fitted(argument: str, tokens: TokenSet, vocab_size: int, *, lenient: bool = False) -> TokenMask:
    """``tokens`` as a mask for logits of ``vocab_size`` tokens; ``lenient`` drops ids that are outside it.

    Raises:
        ValueError: an id is outside the vocabulary, or the mask has another one; the message names ``argument``.
    """
    if not isinstance(tokens, TokenMask):
        known = [token for token in tokens if 0 <= token < vocab_size] if lenient else tokens
        return _from_checked(argument, known, vocab_size)
    try:
        return tokens.fit(vocab_size)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None


def _from_checked(argument: str, ids: Sequence[int], vocab_size: int) -> TokenMask:
    vocab_size = whole_number("vocab_size", vocab_size)
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{argument}: token id {token_id} is outside the vocabulary of {vocab_size} tokens "
                f"(0 to {vocab_size - 1})"
            )
    row = torch.zeros(vocab_size, dtype=torch.bool)
    row[list(ids)] = True
    return TokenMask(row)
