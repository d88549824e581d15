"""Device functions over the text of a row: which tokens it holds, repeats and ends with.

A text is a history of any strides whose length may be known on the device only, with or without draft tokens behind it;
or another row of token ids. A set is a row of packed words (see ``bits``), of which each program fills some of its own,
so that no program waits for another. The searches of lists and of serving steps are made of these functions.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.runtime.launcher import tl, triton

LONGEST = 50
"""Longer repetitions count as this long: penalties of DRY grow exponentially."""

# n-grams of up to so many tokens are compared without a loop; longer ones are rare, and would compile for ever.
UNROLLED = tl.constexpr(16)

WORDS_EACH = 1024
"""Words of a program, about: each program reads the whole text, so that more of them don't get done sooner."""


class Text(NamedTuple):
    """Token ids of a row, ``length`` in all. With drafts the first ``stored`` are at ``ptr``, the others are drafts.

    Unless ``narrow`` is None, ids are taken as int32, and as -1 where that doesn't hold them; else they are compared as
    they are. No function returns a text: of a constant that is returned, Triton makes a tensor.
    """

    ptr: tl.tensor
    stride: tl.tensor
    length: tl.tensor
    stored: tl.tensor = None
    drafts_ptr: tl.tensor = None
    stride_draft: tl.tensor = None
    narrow: tl.constexpr = None


class OwnWords(NamedTuple):
    """The words of a set that a program fills: they are dealt to ``splits`` programs in turn, 8 at a time.

    Tokens that occur often have neighbouring ids: a range of them would give one program most of the work. ``splits``
    is a power of two, and ``split`` the program's number. The set has ``W`` words, and V tokens have bits.
    """

    split: tl.tensor
    splits: tl.tensor
    W: tl.tensor
    V: tl.tensor


def splits_of(W: int, most: int) -> int:
    """How many programs share a set of W words: a power of two, at most ``most``, with some ``WORDS_EACH`` each."""
    return 1 << (max(1, min(-(-W // WORDS_EACH), most)).bit_length() - 1)


@triton.jit
def index_at(ptr, offset):
    """A position: an offset, to which the number at a pointer is added where that isn't None."""
    if ptr is not None:
        offset += tl.load(ptr).to(tl.int32)
    return offset


@triton.jit
def narrow(token):
    """Token ids as int32; what it doesn't hold is no token of any vocabulary, and becomes -1."""
    return tl.where(token == token.to(tl.int32), token, -1).to(tl.int32)


@triton.jit
def token_at(text, i, inside):
    """Ids at some places of a text; -1 where they are not inside. What is inside lies within the text."""
    if text.drafts_ptr is None:
        token = tl.load(text.ptr + i.to(tl.int64) * text.stride, mask=inside, other=-1)
        if text.narrow is not None:
            token = narrow(token)
    else:
        drafted = inside & (i >= text.stored)
        here = text.ptr + i.to(tl.int64) * text.stride
        stored = narrow(tl.load(here, mask=inside & (i < text.stored), other=-1))
        here = text.drafts_ptr + (i - text.stored) * text.stride_draft
        token = tl.where(drafted, narrow(tl.load(here, mask=drafted, other=-1)), stored)
    return token


@triton.jit
def own_count(words):
    """How many places the words of a program have; behind the last word of the set some may be empty."""
    groups = (words.W + 7) >> 3
    return (groups - words.split + words.splits - 1) // words.splits * 8


@triton.jit
def word_at(words, place):
    """The word of each place."""
    return ((place >> 3) * words.splits + words.split) * 8 + (place & 7)


@triton.jit
def is_mine(token, words):
    """Whether ids are tokens of the vocabulary that have bits in a program's words."""
    return (token >= 0) & (token < words.V) & (((token >> 8) & (words.splits - 1)) == words.split)


@triton.jit
def mark(set_ptr, token, found):
    """Set the bits of the found tokens, which are in this program's words."""
    bit = tl.full(token.shape, 1, tl.int32) << (token & 31).to(tl.int32)
    tl.atomic_or(set_ptr + (token >> 5), bit, mask=found, sem="relaxed")


@triton.jit
def holds(set_ptr, token, limit):
    """Whether a set holds tokens; ids that are negative, or from the limit on, it doesn't."""
    asks = (token >= 0) & (token < limit)
    word = tl.load(set_ptr + (token >> 5), mask=asks, other=0)
    return ((word >> (token & 31).to(tl.int32)) & 1) != 0


@triton.jit
def holds_all(set_ptr, text, start, stop, limit):
    """Whether a set holds all tokens of a text from ``start`` to before ``stop``; true of none."""
    i = tl.maximum(start, 0)
    held = start <= stop
    while held & (i < stop) & (i < text.length):
        held = holds(set_ptr, token_at(text, i, i >= 0), limit)
        i += 1
    return held


@triton.jit
def mark_text(set_ptr, text, start, stop, words, BLOCK: tl.constexpr):
    """Mark the tokens of a part of a text."""
    for i in range(start, stop, BLOCK):
        at = i + tl.arange(0, BLOCK)
        token = token_at(text, at, at < stop)
        mark(set_ptr, token, is_mine(token, words))


@triton.jit
def mark_repeated(set_ptr, text, source, size, words, UNROLL: tl.constexpr, BLOCK: tl.constexpr):
    """Mark the tokens that would complete an n-gram of ``size`` tokens which a source holds; none where size is 0."""
    there_are = (size > 0) & (text.length >= size - 1)
    for i in range(size - 1, tl.where(there_are, source.length, size - 1), BLOCK):
        at = i + tl.arange(0, BLOCK)
        inside = at < source.length
        found = inside
        if UNROLL:
            for j in tl.static_range(1, size):
                found &= token_at(source, at - j, inside) == token_at(text, text.length - j, text.length >= j)
        else:
            for j in range(1, size):
                found &= token_at(source, at - j, inside) == token_at(text, text.length - j, text.length >= j)
        token = token_at(source, at, found)
        mark(set_ptr, token, found & is_mine(token, words))


@triton.jit
def ends_with(text, entry_ptr, known, width, least):
    """Whether a text ends with the prefixes of some sequences, none of which begins before place ``least``.

    A sequence has ``width`` numbers: its last token, how many precede it, and those, from the end.
    """
    prefix = tl.load(entry_ptr + 1, mask=known, other=0)
    found = known & (text.length - prefix >= tl.where(prefix > 0, least, 0))
    for j in range(width - 2):
        asks = found & (j < prefix)
        wanted = token_at(text, text.length - 1 - j, text.length > j)
        found &= (tl.load(entry_ptr + 2 + j, mask=asks, other=0) == wanted) | (j >= prefix)
    return found


@triton.jit
def mark_endings(set_ptr, text, least, table_ptr, count, width, words, BLOCK: tl.constexpr):
    """Mark the last tokens of the sequences of a table whose other tokens end the text."""
    for k in range(0, count, BLOCK):
        entry = k + tl.arange(0, BLOCK)
        known = entry < count
        here = table_ptr + entry * width
        token = tl.load(here, mask=known, other=-1)
        mark(set_ptr, token, ends_with(text, here, known & is_mine(token, words), width, least))


@triton.jit
def match_length(text, at, starts, known, breakers_ptr, limit, MOST: tl.constexpr):
    """How many tokens up to some places equal those that the text ends with, at most ``MOST``.

    Asked of the places where ``starts`` is true, which lie before the last token; 0 elsewhere. There ``known`` tokens
    match for certain. A match holds no breaker, and ids from the limit on are none.
    """
    matches = starts
    matched = tl.where(starts, known, 0)
    n = tl.full([], 0, tl.int32) + known
    while (n < MOST) & (tl.max(matches.to(tl.int32)) > 0):
        wanted = token_at(text, text.length - 1 - n, text.length > n)
        matches &= tl.where(holds(breakers_ptr, wanted, limit), at < 0, at >= n)
        matches &= token_at(text, at - n, matches) == wanted
        matched += matches.to(tl.int32)
        n += 1
    return matched
