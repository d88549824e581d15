"""The text of each token of a tokenizer."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary


class _Known:
    """What was computed from one tokenizer."""

    def __init__(self) -> None:
        self.texts: list[str | None] | None = None
        self.masks: dict[Any, Any] = {}
        """Masks of patterns."""


_kept: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()

# Any letter does: decoded before a token, it keeps decoders from stripping the space that the token begins with.
_ANCHOR = "a"


def token_texts(tokenizer: Any) -> list[str | None]:
    r"""Text of each token id, ``None`` for special tokens and for ids without a token.

    A token's text is what it adds in the middle of a text: ``"▁1"`` of SentencePiece and ``"Ġ1"`` of a byte-level
    tokenizer are ``" 1"``, the byte token ``"<0x31>"`` and WordPiece's ``"##1"`` are ``"1"``. A space that belongs to
    no token (WordPiece puts one between words) is left out. Bytes that are no text by themselves are ``"\ufffd"``.

    Args:
        tokenizer: a tokenizer of transformers, fast or slow, or a ``tokenizers.Tokenizer``.

    Raises:
        TypeError: it is no tokenizer, but its name, for instance.
    """
    if not hasattr(tokenizer, "get_vocab"):
        load = f"AutoTokenizer.from_pretrained({tokenizer!r})" if isinstance(tokenizer, str) else "AutoTokenizer"
        raise TypeError(f"tokenizer must be a tokenizer of transformers, got {tokenizer!r}: {load} loads one")
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    known = kept_with(tokenizer)
    texts = known.texts
    if texts is None or len(texts) != size:  # new, or tokens were added
        known.texts = texts = _read(tokenizer, vocabulary, size)
    return texts


def kept_with(tokenizer: Any) -> _Known:
    """What was computed from a tokenizer. It is kept as long as the tokenizer lives, if that has weak references."""
    try:
        return _kept.setdefault(tokenizer, _Known())
    except TypeError:  # tokenizers.Tokenizer before 0.23
        return _Known()


def _read(tokenizer: Any, vocabulary: dict[str, int], size: int) -> list[str | None]:
    texts: list[str | None] = [None] * size
    special, decode = _special_ids(tokenizer), _decoder(tokenizer)
    anchor = decode([_ANCHOR])
    for token, token_id in vocabulary.items():
        if token_id in special:
            continue
        text = decode([_ANCHOR, token])
        # A decoder that rewrites the anchor itself (it merges repeats, say) leaves only the token on its own.
        text = text[len(anchor) :] if text.startswith(anchor) else decode([token])
        # A space before the very piece is the decoder's, put between words; a piece's own space is marked in it.
        texts[token_id] = token if text == f" {token}" else text
    return texts


def _special_ids(tokenizer: Any) -> set[int]:
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
    else:
        added = tokenizer.added_tokens_decoder
    special = {token_id for token_id, token in added.items() if token.special}
    return special | set(getattr(tokenizer, "all_special_ids", ()))


def _decoder(tokenizer: Any) -> Any:
    """A function from a list of tokens to their text."""
    if hasattr(tokenizer, "convert_tokens_to_string"):
        return tokenizer.convert_tokens_to_string
    return tokenizer.decoder.decode if tokenizer.decoder is not None else " ".join
