"""What requests do to their logits, in torch, row by row: the reference of the kernels, and the path of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastlogits_kernels.history import LONGEST
from fastlogits_kernels.rules import TINY_TEMPERATURE
from fastlogits_kernels.runtime.bits import unpack_bits
from fastlogits_kernels.serving.layout import (
    ACTIVE,
    BAN_MASK,
    BAN_PLANE,
    BANS,
    BIASES,
    BITMASK,
    BREAKER_MASK,
    BREAKER_PLANE,
    DRY,
    FIRST_MASK,
    FIRST_PLANE,
    FIRST_WINDOW,
    FIRSTS,
    FLAGS,
    FORCED,
    FREQUENCY,
    LISTS,
    LOGPROBS,
    MIN_TOKENS,
    NEEDS_BITMASK,
    NGRAM,
    OFF,
    OUTPUT_COUNTS,
    OUTPUT_REPETITION,
    PRESENCE,
    REPETITION,
    RULE_KINDS,
    RULES,
    SEED,
    SEQUENCE_WIDTH,
    SEQUENCES,
    STOPS,
    TEMPERATURE,
    Numbers,
    Semantics,
    Slots,
    StepRows,
)


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
    def sequences(self) -> list[list[int]]:
        rows: list[list[int]] = self.listed(SEQUENCES).view(-1, max(1, self.place(SEQUENCE_WIDTH)[1])).tolist()
        return rows

    @property
    def dry(self) -> torch.Tensor:
        begin, count = self.place(DRY)
        return self.numbers[begin : begin + count]


class _Request(NamedTuple):
    """What is known of a row: its record and masks, the tokens that it sees, and where it stands."""

    record: _Record
    masks: torch.Tensor
    ids: torch.Tensor
    prompt: int
    step: int

    def penalised(self, flag: Any, V: int) -> torch.Tensor:
        """The tokens that a penalty is for: those of the output where the flag is set, else all."""
        return _inside(self.output if self.record.has(flag) else self.ids, V)

    @property
    def output(self) -> torch.Tensor:
        return self.ids[max(self.prompt, 0) :]


def reference_slots(
    scores: torch.Tensor, slots: Slots, rows: StepRows, semantics: Semantics, draws: bool
) -> tuple[torch.Tensor, Numbers]:
    """What the requests make of ``scores`` ``[B, V]`` before temperature and rules, float32, and their numbers.

    Where a token is drawn, rows of no request get -inf everywhere, and are greedy; else what is not edited is as it
    was, and edited scores are rounded to the dtype of the scores.
    """
    if scores.device.type != "cpu":  # row by row, each element would be waited for
        of_slots: Any = [table.cpu() for table in slots[:5]]
        of_rows: Any = [None if index is None else index.cpu() for index in rows]
        x, numbers = reference_slots(scores.cpu(), Slots(*of_slots), StepRows(*of_rows), semantics, draws)
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
        request = _Request(record, slots.masks[slot], ids, prompt, length - prompt)
        _apply(x[row], request, semantics, None if rows.bitmask is None else rows.bitmask[row])
        if not draws:
            x[row] = x[row].to(scores.dtype)
        _write_numbers(numbers, row, record, length)
    return x, numbers


def _write_numbers(numbers: Numbers, row: int, record: _Record, length: int) -> None:
    temperature = record.float32(TEMPERATURE)
    numbers.temperature[row] = temperature
    if temperature >= TINY_TEMPERATURE:
        numbers.values[1:, row] = record.words[RULES.value : RULES.value + len(RULE_KINDS)]
    numbers.counts[row] = record.words[LOGPROBS.value]
    numbers.longs[0, row] = record.words[SEED.value : SEED.value + 2].clone().view(torch.int64)[0]
    numbers.longs[1, row] = length


def _seen(slots: Slots, rows: StepRows, row: int, slot: int) -> tuple[torch.Tensor, int]:
    """The tokens that a row sees, int64 within 32 bits, and the length of its sequence, which may be longer."""
    known = min(max(int(slots.lengths[slot]), 0), slots.history.shape[1])
    local = 0 if rows.local_position is None else min(max(int(rows.local_position[row]), 0), row)
    length = known + local if rows.cache_position is None else int(rows.cache_position[row]) + 1
    ids = slots.history[slot, : min(max(length - local, 0), known)].long()
    if local and rows.draft_ids is not None:
        ids = torch.cat((ids, rows.draft_ids[row - local + 1 : row + 1].long()))
    return torch.where(ids == ids.int(), ids, -1), length


def _apply(x: torch.Tensor, request: _Request, semantics: Semantics, bitmask: torch.Tensor | None) -> None:
    """Edit and ban the tokens of one row ``[V]``, in place."""
    forced = request.record.listed(FORCED)
    if 0 <= request.step < len(forced):
        x.fill_(float("-inf"))
        x[forced[request.step].long()] = 0.0
        return
    in_order = (_bias, _penalize, _count, _lower_repetitions)
    for change in (_count, _penalize, _lower_repetitions, _bias) if semantics.bias_last else in_order:
        change(x, request)
    _ban_sets(x, request, bitmask)
    _ban_repeated(x, request)
    _ban_endings(x, request, semantics)


def _bias(x: torch.Tensor, request: _Request) -> None:
    tokens, values = request.record.biases
    x[tokens] += values


def _penalize(x: torch.Tensor, request: _Request) -> None:
    penalty = request.record.float32(REPETITION)
    if penalty != 1:
        tokens = request.penalised(OUTPUT_REPETITION, x.shape[0]).unique()
        old = x[tokens]
        x[tokens] = torch.where(old < 0, old * penalty, old / penalty)


def _count(x: torch.Tensor, request: _Request) -> None:
    tokens, counts = request.penalised(OUTPUT_COUNTS, x.shape[0]).unique(return_counts=True)
    x[tokens] -= counts * request.record.float32(FREQUENCY)
    x[tokens] -= request.record.float32(PRESENCE)


def _ban_sets(x: torch.Tensor, request: _Request, bitmask: torch.Tensor | None) -> None:
    """Ban what a grammar doesn't allow, packed masks, and listed tokens."""
    V, (record, masks, *_) = x.shape[0], request
    if bitmask is None:
        if record.has(NEEDS_BITMASK):
            x.fill_(float("-inf"))
    elif record.has(BITMASK):
        x[~unpack_bits(bitmask.cpu(), V)] = float("-inf")
    if record.has(BAN_MASK):
        x[unpack_bits(masks[BAN_PLANE], V)] = float("-inf")
    x[record.listed(BANS).long()] = float("-inf")
    if request.step < record.number(MIN_TOKENS):
        x[record.listed(STOPS).long()] = float("-inf")
    if request.step < record.number(FIRST_WINDOW):
        x[record.listed(FIRSTS).long()] = float("-inf")
        if record.has(FIRST_MASK):
            x[unpack_bits(masks[FIRST_PLANE], V)] = float("-inf")


def _ban_repeated(x: torch.Tensor, request: _Request) -> None:
    size, ids = request.record.number(NGRAM), request.ids
    if size and len(ids) >= size:
        grams = ids.unfold(0, size, 1)
        repeats = (grams[:, :-1] == ids[len(ids) - size + 1 :]).all(1)
        x[_inside(grams[repeats, -1], x.shape[0])] = float("-inf")


def _ban_endings(x: torch.Tensor, request: _Request, semantics: Semantics) -> None:
    text = request.output if semantics.words_in_output else request.ids
    for last, count, *prefix in request.record.sequences:
        if count <= len(text) and text[len(text) - count :].tolist() == prefix[:count][::-1]:
            x[last] = float("-inf")


def _lower_repetitions(x: torch.Tensor, request: _Request) -> None:
    penalties = request.record.dry
    if not len(penalties):
        return
    lowered: dict[int, int] = {}
    for token, matched in _matches(request, x.shape[0]):
        lowered[token] = max(lowered.get(token, 0), matched)
    for token, matched in lowered.items():
        x[token] -= penalties[matched]


def _matches(request: _Request, V: int) -> Iterator[tuple[int, int]]:
    """The tokens that follow what the text ends with, and how long each match is."""
    record, masks, ids, *_ = request
    L = len(ids)
    is_breaker = unpack_bits(masks[BREAKER_PLANE], V) if record.has(BREAKER_MASK) else torch.zeros(V, dtype=torch.bool)
    breaks = is_breaker[ids.clamp(0, V - 1)] & (ids >= 0) & (ids < V)
    text, broken = ids.tolist(), breaks.tolist()
    for at in (ids[:-1] == ids[-1:]).nonzero().flatten().tolist() if L > 1 else ():
        matched = 0
        while matched < min(LONGEST, at + 1) and text[at - matched] == text[L - 1 - matched]:
            if broken[L - 1 - matched]:
                break
            matched += 1
        token = text[at + 1]
        if 0 <= token < V and not broken[at + 1]:
            yield token, matched


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


def reference_accept(
    slots: Slots, of: torch.Tensor, tokens: torch.Tensor, drafts: torch.Tensor, appends: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that count, -1 elsewhere, and how many drafts the request of each row keeps; appends the former."""
    count, flags = len(slots.records), slots.records[:, FLAGS.value].tolist()
    active = [0 <= slot < count and bool(flags[slot] & ACTIVE.value) for slot in of.tolist()]
    kept, counts = accepted(of.tolist(), tokens.tolist(), drafts.tolist(), active)
    found = torch.tensor(kept, dtype=torch.int64, device=of.device)
    if appends:
        reference_append(slots, of, found)
    return found, torch.tensor(counts, dtype=torch.int32, device=of.device)


def accepted(of: list[int], tokens: list[int], drafts: list[int], active: list[bool]) -> tuple[list[int], list[int]]:
    """The tokens that count, -1 elsewhere, and how many drafts the request of each row keeps.

    Rows of one slot are neighbours. A draft is kept while it and all before it equal what the rows before them drew.
    """
    kept, counts, first = [-1] * len(of), [0] * len(of), 0
    for row, slot in enumerate(of):
        follows = row > 0 and max(of[row - 1], -1) == max(slot, -1)
        first = first if follows else row
        fits = not follows or (kept[row - 1] >= 0 and kept[row - 1] == drafts[row])
        if active[row] and fits and tokens[row] >= 0:
            kept[row] = tokens[row]
            counts[first : row + 1] = [row - first] * (row - first + 1)
        else:
            counts[row] = counts[first]
    return kept, counts
