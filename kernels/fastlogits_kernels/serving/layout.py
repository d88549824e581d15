"""The requests of a serving step as tables on the device, and what they do to their logits, in torch.

Every request has a slot: a record of its numbers and lists, packed masks, and its history. Each row of a step names a
slot. Rows of draft tokens share one: the row at local position ``j`` sees the history, the draft tokens of the
``j - 1`` rows before it, and its own; rows of one request are neighbours.

The kernels that read the same tables are in ``slot_sets``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastlogits_kernels.rules import RULES as TABLE
from fastlogits_kernels.rules import TINY_TEMPERATURE, RuleKind
from fastlogits_kernels.runtime.bits import unpack_bits
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
LISTS = tl.constexpr(LOGPROBS.value + 1)  # where each list begins, and how long it is
N_LISTS = 8
RECORD = tl.constexpr(LISTS.value + 2 * N_LISTS)  # words before the lists

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
WORDS = tl.constexpr(5)  # sequences: the last token, how many precede it, and those from the end; padded to one width
WIDTH = tl.constexpr(6)  # of no tokens; its length is that width
DRY = tl.constexpr(7)  # float32 penalty of a repetition of 0, 1, ... tokens

# The packed masks of a slot.
MASKS = 3
BREAKER_PLANE, FIRST_PLANE, BAN_PLANE = range(MASKS)  # what is in use more often stands nearer to the record

LONGEST = 50
"""Longer repetitions count as this long."""

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


class Rows(NamedTuple):
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
    """Whether bad words are only looked for in the output."""


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


# -- In torch, row by row: the reference, and the path of the CPU ------------------------------------------------------


class _Record:
    """A record as torch reads it."""

    def __init__(self, words: torch.Tensor) -> None:
        self.words = words.cpu()
        self.numbers = self.words.view(torch.float32)
        self.flags = int(self.words[FLAGS.value])

    def number(self, at: Any) -> int:
        return int(self.words[at.value])

    def float32(self, at: Any) -> torch.Tensor:
        return self.numbers[at.value]

    def place(self, which: Any) -> tuple[int, int]:
        begin, count = self.words[LISTS.value + 2 * which.value :][:2].tolist()
        return begin, count

    def listed(self, which: Any) -> torch.Tensor:
        begin, count = self.place(which)
        return self.words[begin : begin + count]

    def has(self, flag: Any) -> bool:
        return bool(self.flags & flag.value)

    @property
    def biases(self) -> tuple[torch.Tensor, torch.Tensor]:
        begin, count = self.place(BIASES)
        return self.words[begin : begin + count].long(), self.numbers[begin + count : begin + 2 * count]

    @property
    def bad_words(self) -> list[list[int]]:
        rows: list[list[int]] = self.listed(WORDS).view(-1, max(1, self.place(WIDTH)[1])).tolist()
        return rows

    @property
    def dry(self) -> torch.Tensor:
        begin, count = self.place(DRY)
        return self.numbers[begin : begin + count]


def reference_slots(
    scores: torch.Tensor, slots: Slots, rows: Rows, semantics: Semantics, draws: bool
) -> tuple[torch.Tensor, Numbers]:
    """What the requests make of ``scores`` ``[B, V]`` before temperature and rules, float32, and their numbers.

    Where a token is drawn, rows of no request get -inf everywhere, and are greedy; else what is not edited is as it
    was, and edited scores are rounded to the dtype of the scores.
    """
    if scores.device.type != "cpu":  # row by row, each element would be waited for
        of_slots: Any = [table.cpu() for table in slots]
        of_rows: Any = [None if index is None else index.cpu() for index in rows]
        x, numbers = reference_slots(scores.cpu(), Slots(*of_slots), Rows(*of_rows), semantics, draws)
        return x.to(scores.device), Numbers(*(each.to(scores.device) for each in numbers))
    B = scores.shape[0]
    x = scores.float().clone(memory_format=torch.contiguous_format)
    numbers = Numbers.empty(B, torch.device("cpu"))
    rules = numbers.rules
    for kind, value in OFF.items():
        rules[kind].fill_(value)
    numbers.temperature.fill_(0.0 if draws else 1.0)
    slot_of = rows.slots.tolist()
    for row in range(B):
        slot = slot_of[row]
        record = _Record(slots.records[slot]) if 0 <= slot < len(slots.records) else None
        if record is None or not record.has(ACTIVE):
            if draws:
                x[row] = float("-inf")
            continue
        ids, length = _seen(slots, rows, row, slot)
        prompt = int(slots.prompts[slot])
        _apply(x[row], record, slots.masks[slot], ids, prompt, length - prompt, semantics, rows, row)
        if not draws:
            x[row] = x[row].to(scores.dtype)
        temperature = record.float32(TEMPERATURE)
        numbers.temperature[row] = temperature
        if temperature >= TINY_TEMPERATURE:
            numbers.values[1:, row] = record.words[RULES.value : RULES.value + len(RULE_KINDS)]
        numbers.counts[row] = record.words[LOGPROBS.value]
        numbers.longs[0, row] = record.words[SEED.value : SEED.value + 2].clone().view(torch.int64)[0]
        numbers.longs[1, row] = length
    return x, numbers


def _seen(slots: Slots, rows: Rows, row: int, slot: int) -> tuple[torch.Tensor, int]:
    """The tokens that a row sees, int64 within 32 bits, and the length of its sequence, which may be longer."""
    known = min(max(int(slots.lengths[slot]), 0), slots.history.shape[1])
    local = 0 if rows.local_position is None else min(max(int(rows.local_position[row]), 0), row)
    length = known + local if rows.cache_position is None else int(rows.cache_position[row]) + 1
    ids = slots.history[slot, : min(max(length - local, 0), known)].long()
    if local and rows.draft_ids is not None:
        ids = torch.cat((ids, rows.draft_ids[row - local + 1 : row + 1].long()))
    return torch.where(ids == ids.int(), ids, -1), length


def _apply(
    x: torch.Tensor,
    record: _Record,
    masks: torch.Tensor,
    ids: torch.Tensor,
    prompt: int,
    step: int,
    semantics: Semantics,
    rows: Rows,
    row: int,
) -> None:
    """Edit and ban the tokens of one row ``[V]``, in place."""
    V = x.shape[0]
    forced = record.listed(FORCED)
    if 0 <= step < len(forced):
        x.fill_(float("-inf"))
        x[forced[step].long()] = 0.0
        return

    def biased() -> None:
        tokens, values = record.biases
        x[tokens] += values

    def repeated() -> None:
        penalty = record.float32(REPETITION)
        if penalty != 1:
            tokens = _inside(ids[max(prompt, 0) :] if record.has(OUTPUT_REPETITION) else ids, V).unique()
            old = x[tokens]
            x[tokens] = torch.where(old < 0, old * penalty, old / penalty)

    def counted() -> None:
        tokens, counts = _inside(ids[max(prompt, 0) :] if record.has(OUTPUT_COUNTS) else ids, V).unique(
            return_counts=True
        )
        x[tokens] -= counts * record.float32(FREQUENCY)
        x[tokens] -= record.float32(PRESENCE)

    for change in (counted, repeated, biased) if semantics.bias_last else (biased, repeated, counted):
        change()
    if len(record.dry):
        _lower_repetitions(x, record, masks, ids)

    if rows.bitmask is None:
        if record.has(NEEDS_BITMASK):
            x.fill_(float("-inf"))
    elif record.has(BITMASK):
        x[~unpack_bits(rows.bitmask[row].cpu(), V)] = float("-inf")
    if record.has(BAN_MASK):
        x[unpack_bits(masks[BAN_PLANE], V)] = float("-inf")
    banned = [record.listed(BANS)]
    if step < record.number(MIN_TOKENS):
        banned.append(record.listed(STOPS))
    if step < record.number(FIRST_WINDOW):
        banned.append(record.listed(FIRSTS))
        if record.has(FIRST_MASK):
            x[unpack_bits(masks[FIRST_PLANE], V)] = float("-inf")
    x[torch.cat(banned).long()] = float("-inf")
    size = record.number(NGRAM)
    if size and len(ids) >= size:
        grams = ids.unfold(0, size, 1)
        repeats = (grams[:, :-1] == ids[len(ids) - size + 1 :]).all(1)
        x[_inside(grams[repeats, -1], V)] = float("-inf")
    text = ids[max(prompt, 0) :] if semantics.words_in_output else ids
    for last, count, *prefix in record.bad_words:
        if count <= len(text) and text[len(text) - count :].tolist() == prefix[:count][::-1]:
            x[last] = float("-inf")


def _lower_repetitions(x: torch.Tensor, record: _Record, masks: torch.Tensor, ids: torch.Tensor) -> None:
    V, L = x.shape[0], len(ids)
    is_breaker = unpack_bits(masks[BREAKER_PLANE], V) if record.has(BREAKER_MASK) else torch.zeros(V, dtype=torch.bool)
    breaks = is_breaker[ids.clamp(0, V - 1)] & (ids >= 0) & (ids < V)
    penalties = record.dry
    lowered: dict[int, int] = {}
    text, broken = ids.tolist(), breaks.tolist()
    for at in (ids[:-1] == ids[-1:]).nonzero().flatten().tolist() if L > 1 else ():
        matched = 0
        while matched < min(LONGEST, at + 1) and text[at - matched] == text[L - 1 - matched]:
            if broken[L - 1 - matched]:
                break
            matched += 1
        token = text[at + 1]
        if 0 <= token < V and not broken[at + 1]:
            lowered[token] = max(lowered.get(token, 0), matched)
    for token, matched in lowered.items():
        x[token] -= penalties[matched]


def _inside(ids: torch.Tensor, V: int) -> torch.Tensor:
    return ids[(ids >= 0) & (ids < V)]


def reference_swap(table: torch.Tensor, a: int, b: int) -> None:
    """Exchange two rows of ``table`` ``[S, N]``."""
    kept = table[a].clone()
    table[a] = table[b]
    table[b] = kept


def reference_append(slots: Slots, of: torch.Tensor, tokens: torch.Tensor) -> None:
    """Add each token to the history of its slot, in their order, as far as there is room."""
    limit = slots.history.shape[1]
    for slot, token in zip(of.tolist(), tokens.tolist(), strict=True):
        if token >= 0 and 0 <= slot < len(slots.records) and int(slots.records[slot, FLAGS.value]) & ACTIVE.value:
            length = int(slots.lengths[slot])
            if length < limit:
                slots.history[slot, length] = token if token < 2**31 else -1
                slots.lengths[slot] = length + 1
