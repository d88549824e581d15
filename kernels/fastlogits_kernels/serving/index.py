"""What is known of a long history, so that a step needn't read it: which tokens have occurred, how often, and where.

    seen     a bit for each token that the repetition penalty is for
    counts   how often each token has occurred, for presence and frequency penalties: four bits, and a list of carries
    spans    of each hash of a few tokens in a row, in which of 32 spans of the history it occurs

They lie behind a slot's history, and take no more memory than that does. They cover the first tokens of the history, as
many as the record says. ``append`` and ``accept`` bring them up to date; what they don't cover yet, a step reads. A row
that sees fewer tokens than they cover reads all that it sees.

Bytes moved: a new token costs three or four words, whatever the length of the history.
"""

from __future__ import annotations

from typing import NamedTuple

from fastlogits_kernels.history import OwnWords, Text, is_mine, mark, token_at
from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.serving.layout import (
    COUNT_PLANES,
    FLAGS,
    FREQUENCY,
    GRAM,
    INDEXED,
    LONGEST_GRAM,
    OUTPUT_COUNTS,
    OUTPUT_REPETITION,
    PRESENCE,
    REPETITION,
    TALLIED,
)

_MIX = tl.constexpr(0x9E3779B1)
_MIX_AGAIN = tl.constexpr(0x85EBCA77)


class Index(NamedTuple):
    """The index of one slot, which the first ``covered`` tokens are in; pointers are None where a part isn't kept."""

    seen_ptr: tl.tensor
    spans_ptr: tl.tensor
    planes_ptr: tl.tensor
    carries_ptr: tl.tensor
    covered: tl.tensor
    shift: tl.tensor
    span: tl.tensor


@triton.jit
def hash_at(text, last, size, inside, shift):
    """A hash of the ``size`` tokens of a text that end at some places; ``LONGEST_GRAM`` at most."""
    found = (last * 0).to(tl.uint32)
    for j in tl.static_range(LONGEST_GRAM):
        token = token_at(text, last - j, inside & (last >= tl.where(j < size, j, 2**30))).to(tl.int32)
        found = tl.where(j < size, (found ^ token.to(tl.uint32, bitcast=True)) * _MIX, found)
        found ^= found >> 15
    return ((found * _MIX_AGAIN) >> shift).to(tl.int32)


@triton.jit
def covered_of(record_ptr, asks, stored):
    """How many tokens a row takes from the index: all that are in it, or none if it sees fewer of the history."""
    indexed = tl.load(record_ptr + INDEXED)
    return tl.where(asks & (indexed <= stored), indexed, 0)


@triton.jit
def spans_of(record_ptr, spans_ptr, text, covered, shift):
    """In which spans of the history the last tokens of a text may stand, a bit for each, uint32."""
    gram = tl.load(record_ptr + GRAM)
    known = (covered > 0) & (gram > 0) & (text.length >= gram)
    here = hash_at(text, text.length - 1, gram, known, shift)
    return tl.load(spans_ptr + here, mask=known, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def counts_in(index, token, mine, W):
    """How often tokens have occurred, apart from what was carried."""
    count = token * 0
    for plane in tl.static_range(COUNT_PLANES):
        word = tl.load(index.planes_ptr + plane * W + (token >> 5), mask=mine, other=0)
        count += ((word >> (token & 31)) & 1) << plane
    return count


@triton.jit
def _count(index, token, mine, W, carries):
    """Count tokens, each bit by those that have flipped the one before it, so that equal ones don't meet."""
    bit = tl.full(token.shape, 1, tl.int32) << (token & 31)
    carries_on = mine
    for plane in tl.static_range(COUNT_PLANES):
        before = tl.atomic_xor(index.planes_ptr + plane * W + (token >> 5), bit, mask=carries_on, sem="relaxed")
        carries_on = carries_on & (((before >> (token & 31)) & 1) != 0)
    place = tl.atomic_add(index.carries_ptr + token * 0, bit * 0 + 1, mask=carries_on, sem="relaxed")
    tl.store(index.carries_ptr + 1 + place, token, mask=carries_on & (place < carries))


@triton.jit
def _clear(ptr, count, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        word = start + tl.arange(0, BLOCK)
        tl.store(ptr + word, tl.full([BLOCK], 0, tl.int32), mask=word < count)


@triton.jit
def catch_up(
    record_ptr, text_ptr, length, prompt, grows, index, V, W, carries, BLOCK: tl.constexpr
):  # fmt: skip
    """Bring the index of a slot up to date with the tokens of its history, as far as its request needs one."""
    flags = tl.load(record_ptr + FLAGS)
    gram = tl.load(record_ptr + GRAM)
    repetition = tl.load(record_ptr + REPETITION).to(tl.float32, bitcast=True)
    presence = tl.load(record_ptr + PRESENCE).to(tl.float32, bitcast=True)
    frequency = tl.load(record_ptr + FREQUENCY).to(tl.float32, bitcast=True)
    prompt = tl.maximum(prompt, 0)
    repeats_from = tl.where((flags & OUTPUT_REPETITION) != 0, prompt, 0)
    repeats_from = tl.where(((flags & TALLIED) != 0) & (repetition != 1.0), repeats_from, length)
    counts_from = tl.where((flags & OUTPUT_COUNTS) != 0, prompt, 0)
    counts = ((flags & TALLIED) != 0) & ((presence != 0.0) | (frequency != 0.0))
    counts_from = tl.where(counts, counts_from, length)
    asks = grows & (((flags & TALLIED) != 0) | (gram > 0))

    begin = index.covered
    anew = asks & (begin == 0)
    _clear(index.seen_ptr, tl.where(anew & ((flags & TALLIED) != 0), W, 0), BLOCK)
    _clear(index.spans_ptr, tl.where(anew & (gram > 0), 1 << (32 - index.shift), 0), BLOCK)
    if index.planes_ptr is not None:
        _clear(index.planes_ptr, tl.where(anew & ((flags & TALLIED) != 0), COUNT_PLANES * W + 1, 0), BLOCK)
    tl.debug_barrier()
    # Ids as a step sees them, so that their hashes are the same.
    text = Text(text_ptr, 1, length, None, None, None, True)
    every = OwnWords(0, 1, W, V)
    for start in range(begin, tl.where(asks, length, begin), BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < length
        token = token_at(text, at, inside)
        known = inside & is_mine(token, every)
        mark(index.seen_ptr, token, known & (at >= repeats_from))
        if index.planes_ptr is not None:
            _count(index, token, known & (at >= counts_from), W, carries)
        hashed = inside & (at >= tl.where(gram > 0, gram - 1, length))
        here = index.spans_ptr + hash_at(text, at, gram, hashed, index.shift)
        bit = tl.full([BLOCK], 1, tl.int32) << (at // index.span)
        tl.atomic_or(here, bit, mask=hashed, sem="relaxed")
    tl.store(record_ptr + INDEXED, tl.where(asks, length, 0), mask=grows)
