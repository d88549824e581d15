"""The text of each token of a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary


class _Known:
    """What was computed from one tokenizer."""

    def __init__(self) -> None:
        self.texts: list[str | None] | None = None
        self.special: set[int] = set()
        self.masks: dict[Any, Any] = {}
        """Masks of patterns."""


_kept: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()

# Any letter does: decoded before a token, it keeps decoders from stripping the space that the token begins with.
_ANCHOR = "a"

UNREADABLE = "\ufffd"
"""What stands for bytes that are no text by themselves."""
_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = {chr(code): code for code in _PRINTED}
_BYTES |= {chr(256 + number): code for number, code in enumerate(sorted(set(range(256)) - set(_PRINTED)))}
"""The byte for which a character stands in a byte-level vocabulary."""


def token_texts(tokenizer: Any) -> list[str | None]:
    r"""Text of each token id, ``None`` for special tokens and for ids without a token.

    A token's text is what it adds in the middle of a text: ``"▁1"`` of SentencePiece and ``"Ġ1"`` of a byte-level
    tokenizer are ``" 1"``, the byte token ``"<0x31>"`` and WordPiece's ``"##1"`` are ``"1"``. A space that belongs to
    no token (WordPiece puts one between words) is left out. Bytes that are no text by themselves are ``"\ufffd"``.

    Args:
        tokenizer: a tokenizer of transformers, fast, slow or of mistral-common, or a ``tokenizers.Tokenizer``.

    Raises:
        TypeError: it is no tokenizer, but its name, for instance.
    """
    if not hasattr(tokenizer, "get_vocab"):
        load = f"AutoTokenizer.from_pretrained({tokenizer!r})" if isinstance(tokenizer, str) else "AutoTokenizer"
        raise TypeError(f"tokenizer must be a tokenizer of transformers, got {tokenizer!r}: {load} loads one")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = 1 + max([*vocabulary.values(), len(tokenizer) - 1 if hasattr(tokenizer, "__len__") else -1])
    known, special = kept_with(tokenizer), _special_ids(tokenizer)
    texts = known.texts
    if texts is None or len(texts) != size or known.special != special:  # new, or tokens were added or became special
        known.masks = {}
        known.texts = texts = _read(tokenizer, vocabulary, size, special)
        known.special = special
    return texts


def token_names(tokenizer: Any) -> dict[int, str]:
    """Names of the tokens that are no text by themselves, by id.

    A special token has its own. A token whose bytes are only part of a character is called after them, such as
    ``<F0 9F>``, unless its vocabulary doesn't tell them.
    """
    texts = token_texts(tokenizer)
    names = {}
    for name, token_id in tokenizer.get_vocab().items():
        text = texts[token_id]
        shown = name if text is None else _bytes_of(name) if UNREADABLE in text else None
        if shown is not None:
            names[token_id] = shown
    return names


def _bytes_of(name: str) -> str | None:
    """The bytes that a vocabulary's name of a token stands for; None where it doesn't tell.

    SentencePiece names a byte ``<0xF0>``. A byte-level vocabulary writes a byte as the character of that number, and
    those that can't be printed, in their order, as the characters from 256 on.
    """
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
        return f"<{name[3:5]}>"
    codes = [_BYTES.get(character) for character in name]
    return None if None in codes or not codes else f"<{' '.join(f'{code:02X}' for code in codes)}>"


def kept_with(tokenizer: Any) -> _Known:
    """What was computed from a tokenizer. It is kept as long as the tokenizer lives, if that has weak references."""
    try:
        return _kept.setdefault(tokenizer, _Known())
    except TypeError:  # tokenizers.Tokenizer before 0.23
        return _Known()


def _read(tokenizer: Any, vocabulary: dict[str, int], size: int, special: set[int]) -> list[str | None]:
    texts: list[str | None] = [None] * size
    decode = _decoder(tokenizer)
    found = _by_id(tokenizer, size, special) if decode is None else _by_name(decode, vocabulary, special)
    for token_id, text in found:
        texts[token_id] = text
    return texts


def _by_name(decode: Any, vocabulary: dict[str, int], special: set[int]) -> Iterator[tuple[int, str]]:
    anchor = decode([_ANCHOR])
    for token, token_id in vocabulary.items():
        if token_id in special:
            continue
        text = decode([_ANCHOR, token])
        # A decoder that rewrites the anchor itself (it merges repeats, say) leaves only the token on its own.
        text = text[len(anchor) :] if text.startswith(anchor) else decode([token])
        # A space before the very piece is the decoder's, put between words; a piece's own space is marked in it.
        yield token_id, token if text == f" {token}" else text


def _by_id(tokenizer: Any, size: int, special: set[int]) -> Iterator[tuple[int, str]]:
    """Texts from ids, where a vocabulary gives one name to all tokens whose bytes are no text, as mistral-common's."""
    # Special tokens are left out here, since mistral-common shows the marks of SentencePiece where they are kept.
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    before = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    start = len(decode(before))
    for token_id in range(size):
        if token_id not in special:
            yield token_id, decode([*before, token_id])[start:]


def _special_ids(tokenizer: Any) -> set[int]:
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
    else:
        added = getattr(tokenizer, "added_tokens_decoder", None)
    special = {token_id for token_id, token in added.items() if token.special} if isinstance(added, Mapping) else set()
    special |= set(getattr(tokenizer, "all_special_ids", ()))
    unknown = getattr(tokenizer, "unk_token_id", None)  # mistral-common doesn't count it among the special ones
    return special if unknown is None else special | {unknown}


def _decoder(tokenizer: Any) -> Any:
    """A function from a list of tokens to their text; None where only ids can be decoded."""
    if not hasattr(tokenizer, "convert_tokens_to_string"):
        if not hasattr(tokenizer, "decoder"):
            return None
        return tokenizer.decoder.decode if tokenizer.decoder is not None else " ".join
    try:
        tokenizer.convert_tokens_to_string([_ANCHOR])
    except NotImplementedError:
        return None
    return tokenizer.convert_tokens_to_string
