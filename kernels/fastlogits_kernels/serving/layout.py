"""Requests as tables on the device: a slot for each, with a record of numbers and lists, packed masks and a history.

Each row of a step names a slot. Rows of draft tokens share one: the row at local position ``j`` sees the history, the
draft tokens of the ``j - 1`` rows before it, and its own. Rows of one request are neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlogits_kernels.history import LONGEST as LONGEST
from fastlogits_kernels.rules import RULES as TABLE
from fastlogits_kernels.rules import RuleKind
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import tl

# -- The record of a slot, in words of 32 bits ----------------------------------------------------------------------

LENGTH = tl.constexpr(0)  # tokens of the history
PROMPT = tl.constexpr(1)  # those of them that are the prompt
FLAGS = tl.constexpr(2)
NGRAM = tl.constexpr(3)  # tokens of an n-gram that may not repeat; 0 for none
MIN_TOKENS = tl.constexpr(4)
FIRST_WINDOW = tl.constexpr(5)
SEED = tl.constexpr(6)  # and the word after it
TEMPERATURE = tl.constexpr(8)  # this and what follows are float32
REPETITION = tl.constexpr(9)
PRESENCE = tl.constexpr(10)
FREQUENCY = tl.constexpr(11)
RULES = tl.constexpr(12)  # the parameter of each rule, in the order of the table; of some an integer
LOGPROBS = tl.constexpr(RULES.value + len(TABLE))  # for how many tokens they are wanted; -1 for none at all
INDEXED = tl.constexpr(LOGPROBS.value + 1)  # tokens of the history that the index covers
GRAM = tl.constexpr(LOGPROBS.value + 2)  # of so many tokens in a row the index has hashes; 0 for none
LISTS = tl.constexpr(LOGPROBS.value + 3)  # where each list begins, and how long it is
N_LISTS = 8
RECORD = tl.constexpr(LISTS.value + 2 * N_LISTS)  # words before the lists

LONGEST_GRAM = tl.constexpr(4)
"""The most tokens of which a hash is made."""

# Flags.
ACTIVE = tl.constexpr(1)
BAN_MASK = tl.constexpr(2)  # the request has packed bans
FIRST_MASK = tl.constexpr(4)  # packed bans for its first steps
BREAKER_MASK = tl.constexpr(8)  # packed breakers of repetitions
BITMASK = tl.constexpr(16)  # it obeys the step's bitmask
OUTPUT_REPETITION = tl.constexpr(32)  # its repetition penalty leaves the prompt out
OUTPUT_COUNTS = tl.constexpr(64)  # its presence and frequency penalties do so
TALLIED = tl.constexpr(128)  # it has one of these penalties
NEEDS_BITMASK = tl.constexpr(256)  # in a step without a bitmask it may have no token

# Lists.
BIASES = tl.constexpr(0)  # distinct token ids, then as many float32 values
BANS = tl.constexpr(1)  # token ids
STOPS = tl.constexpr(2)  # token ids
FIRSTS = tl.constexpr(3)  # token ids
FORCED = tl.constexpr(4)  # the token of each step
SEQUENCES = tl.constexpr(5)  # of each: the last token, how many precede it, and those from the end; padded to one width
SEQUENCE_WIDTH = tl.constexpr(6)  # of no tokens; its length is that width
DRY = tl.constexpr(7)  # float32 penalty of a repetition of 0, 1, ... tokens

# The packed masks of a slot.
MASKS = 3
BREAKER_PLANE, FIRST_PLANE, BAN_PLANE = range(MASKS)  # what is in use more often stands nearer to the record

RULE_KINDS: tuple[RuleKind, ...] = tuple(TABLE)
"""The rules whose parameters a record holds, in this order, whatever the order in which they act."""
INTEGERS = tuple(spec.integer for spec in TABLE.values())
"""Which of these parameters are integers."""
OFF: dict[RuleKind, float] = {
    name: min(spec.range.off, 2**31 - 1) if spec.integer else spec.range.off for name, spec in TABLE.items()
}
"""What turns each rule off in a record."""


def bits_of(value: float) -> int:
    """The bits of a float32 number."""
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


# -- The index of a slot --------------------------------------------------------------------------------------------

SPANS = tl.constexpr(32)
COUNT_PLANES = tl.constexpr(4)
"""Bits of a count; each time that they overflow, the token is put on the list of carries."""
CARRY = tl.constexpr(2**COUNT_PLANES.value)
"""How many occurrences an entry of that list stands for."""
SPAN_BLOCK = 1024
"""Spans are a multiple of so many tokens, which a program compares at once."""
_SHORT = 4 * SPAN_BLOCK
"""Histories of no more tokens are read: that takes a few turns of a loop."""
_FEWEST_HASHES = 2048
_MOST_HASHES = 2**17


class IndexSizes(NamedTuple):
    """Where the parts of an index are, in words of 32 bits, and how large they are; no spans where there is none."""

    V: int
    """Tokens of the vocabulary."""
    W: int
    """Words of a set."""
    hash_bits: int
    span: int
    """Tokens of a span."""
    carries: int
    """Room for carries; 0 where no counts are kept."""

    @classmethod
    def of(cls, V: int, L: int) -> IndexSizes:
        """Those for a vocabulary and the longest history, within the memory that it takes: first bits, then counts."""
        W, span = words(V), SPAN_BLOCK * -(-L // (SPANS.value * SPAN_BLOCK))
        left = L - W
        if L <= _SHORT or left < _FEWEST_HASHES:
            return cls(V, 0, 0, 0, 0)
        counts = COUNT_PLANES.value * W + 1 + (L >> COUNT_PLANES.value)
        has_counts = left - counts >= _FEWEST_HASHES
        hashes = min(left - counts if has_counts else left, _MOST_HASHES)
        return cls(V, W, hashes.bit_length() - 1, span, L >> COUNT_PLANES.value if has_counts else 0)

    @property
    def planes_at(self) -> int:
        """Where the counts begin: after the bits and the spans."""
        return self.W + (1 << self.hash_bits) if self.W else 0

    @property
    def total(self) -> int:
        """All words."""
        counts = COUNT_PLANES.value * self.W + 1 + self.carries if self.carries else 0
        return self.planes_at + counts


class HistoryIndex(NamedTuple):
    """The indices of all slots; none where ``memory`` is None."""

    memory: torch.Tensor | None
    """int32 ``[S, total]``, rows as far apart as those of the records."""
    sizes: IndexSizes
    by_step: bool = False
    """Whether each step brings them up to date, since the histories are an engine's."""

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """What kernels take of the sizes: where counts begin, how far a hash is shifted, span, carries."""
        sizes = self.sizes
        return sizes.planes_at, 32 - sizes.hash_bits, sizes.span, sizes.carries


NO_INDEX = HistoryIndex(None, IndexSizes(0, 0, 0, 0, 0))


class Slots(NamedTuple):
    """The tables of all slots."""

    records: torch.Tensor
    """int32 ``[S, R]`` of any row stride."""
    masks: torch.Tensor
    """int32 ``[S, 3, W]``, rows as far apart as those of the records."""
    history: torch.Tensor
    """Token ids, int32 or int64 ``[S, L]`` of any row stride; those outside the vocabulary count for nothing."""
    lengths: torch.Tensor
    """How many of them there are, ``[S]``."""
    prompts: torch.Tensor
    """How many of them are the prompt, ``[S]``."""
    indices: HistoryIndex = NO_INDEX
    """What is known of them, so that a step needn't read them."""


class StepRows(NamedTuple):
    """The rows of a step. Index tensors are int32 or int64 ``[B]``; all on one device."""

    slots: torch.Tensor
    """The slot of each row; a row of none is left alone."""
    cache_position: torch.Tensor | None = None
    """Index of the last token that the row sees; None takes it from the lengths."""
    bitmask: torch.Tensor | None = None
    """Packed tokens that a grammar allows, int32 ``[B, M]``; tokens beyond it are not allowed. None for no mask."""
    draft_ids: torch.Tensor | None = None
    """The token that each row was fed with."""
    local_position: torch.Tensor | None = None
    """How many draft tokens the row sees."""


class Semantics(NamedTuple):
    """What all requests of a batch have in common."""

    bias_last: bool = False
    """Whether penalties come before the biases, and additive ones before the repetition penalty."""
    words_in_output: bool = False
    """Whether banned sequences are only looked for in the output."""


class Numbers(NamedTuple):
    """What the sample takes for each row."""

    values: torch.Tensor
    """Temperatures, then the parameters of the rules, 32 bits each: int32 ``[1 + rules, B]``."""
    counts: torch.Tensor
    """For how many of the likeliest tokens log-probabilities are wanted, int32 ``[B]``; -1 for none at all."""
    longs: torch.Tensor
    """int64 ``[2, B]``: seeds, then the positions that the tokens will take."""

    @property
    def temperature(self) -> torch.Tensor:
        """float32 ``[B]``; 0 for greedy rows. Rows of no request have 1, or 0 where a token is drawn."""
        return self.values[0].view(torch.float32)

    @property
    def rules(self) -> dict[RuleKind, torch.Tensor]:
        """The parameter of each rule, ``[B]``: what turns it off in greedy rows and in rows of no request."""
        return {
            kind: self.values[1 + i] if INTEGERS[i] else self.values[1 + i].view(torch.float32)
            for i, kind in enumerate(RULE_KINDS)
        }

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Numbers:
        """Room for so many rows."""
        return cls(
            torch.zeros(1 + len(RULE_KINDS), rows, dtype=torch.int32, device=device),
            torch.full((rows,), -1, dtype=torch.int32, device=device),
            torch.zeros(2, rows, dtype=torch.int64, device=device),
        )
