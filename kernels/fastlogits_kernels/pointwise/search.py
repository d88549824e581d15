"""Find which tokens of each row a chain of maps speaks of: histories, n-grams, sequences, repetitions, gated masks.

Each set is a row of packed words (see ``bits``), and is the union of what its tasks find. A task may write values as
well, into a plane of float32 that is written at the tokens of its set only, or give the row a single value.

Bytes moved: the sets are written once, 1/32 of a float32 ``[B, V]`` each; the history is read once a task and split.
A program owns some words of one set of one row, which it clears and then fills. The same in torch is in ``places``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch

from fastlogits_kernels.history import (
    LONGEST,
    UNROLLED,
    OwnWords,
    Text,
    ends_with,
    holds,
    holds_all,
    index_at,
    is_mine,
    mark,
    mark_endings,
    mark_repeated,
    mark_text,
    match_length,
    own_count,
    splits_of,
    token_at,
    word_at,
)
from fastlogits_kernels.runtime.bits import pack_bits
from fastlogits_kernels.runtime.bits import words as words_of
from fastlogits_kernels.runtime.launcher import Launcher, form_of, row_stride, tl, triton

# Kinds of tasks; each is followed by the meaning of ``a`` and ``b``.
STATIC = tl.constexpr(0)  # the set that is row a of the masks; with b >= 0 also until a token outside row b comes
ROWS = tl.constexpr(1)  # the row's own set in block a of the rows
ALLOWED = tl.constexpr(2)  # what the row's allowed set lacks
HISTORY = tl.constexpr(3)  # tokens of the sequence: span a, from the starts of row b on
COUNTS = tl.constexpr(4)  # the same, counted into plane ``plane``
REPEATED = tl.constexpr(5)  # tokens that would repeat an a-gram of span b of the sequence: all of it, or the prompt
REPEATED_FROM = tl.constexpr(6)  # tokens that would repeat an a-gram of block b of the sources
ENDINGS = tl.constexpr(7)  # last tokens of the sequences at table[a] whose other tokens end the history
SUMS = tl.constexpr(8)  # the same, values added up into plane ``plane``
GATE = tl.constexpr(9)  # row value ``plane``: 1 where the gate is open, else 0
DECAY = tl.constexpr(10)  # row value ``plane``: numbers[b] ** (length - table[a]) - 1 beyond that length, else 0
VALUE = tl.constexpr(11)  # row value ``plane``: column a of the given values
RANGE = tl.constexpr(12)  # tokens from a to below b: columns of the given values, or table[-1 - a] where a < 0
# Tokens that would extend a repetition of 0, 1, ... tokens, and into plane ``plane`` its penalty at numbers[b]; of the
# last table[a] tokens, and without the breakers that are row table[a + 1] of the masks.
REPETITIONS = tl.constexpr(13)

# Spans of a history.
ALL = tl.constexpr(0)
PROMPT = tl.constexpr(1)
GENERATED = tl.constexpr(2)

STEP, LENGTH = 0, 1
NO_START, NO_STOP = -(2**31), 2**31 - 1


class Task(NamedTuple):
    """One contribution to a set; ``gate`` is a row of the gates, or -1 where it is always open."""

    kind: int
    set: int
    gate: int = -1
    a: int = 0
    b: int = -1
    plane: int = -1


class Gate(NamedTuple):
    """Open where ``start <= index < stop`` and ``index - phase`` is a multiple of ``period``."""

    of: int
    start: int
    stop: int
    period: int
    phase: int

    def is_open(self, step: int, length: int) -> bool:
        """Whether it is open, given positions on the host."""
        index = length if self.of == LENGTH else step
        return self.start <= index < self.stop and (index - self.phase) % self.period == 0


class Call(NamedTuple):
    """What a call tells a chain besides its scores; all tensors are on the device of the scores."""

    input_ids: torch.Tensor | None = None
    """Tokens so far, int32 or int64 ``[B, L]``; None where no task reads them."""
    allowed: torch.Tensor | None = None
    """The allowed set of each row, packed int32 ``[B or 1, W]`` or bool; None where no task reads it."""
    cache_offset: int = 0
    """Index of the newest token; where that differs by row, what is added to ``cache_position``."""
    prompt_offset: int = 0
    """Tokens of the prompt, likewise beside ``prompt_length``."""
    cache_position: torch.Tensor | None = None
    """Integers ``[]`` or ``[B]``."""
    prompt_length: torch.Tensor | None = None
    """Integers ``[]`` or ``[B]``."""
    values: torch.Tensor | None = None
    """What was computed for each row, float64 ``[B, N]`` and contiguous; None where a chain asks for nothing."""
    mates: torch.Tensor | None = None
    """Logits ``[B, V]`` that a chain mixes into those that it maps; None where it mixes none."""


NOTHING = Call()
"""For chains that ask for nothing."""


_STEPWISE = ["B", "W", "L", "source_length", "splits", "stride_ids_row", "stride_id", "stride_allowed", "stride_cache"]
_STEPWISE += ["stride_prompt", "cache_offset", "prompt_offset"]
_UNALIGNED = ["ids_ptr", "masks_ptr", "rows_ptr", "sources_ptr", "starts_ptr", "gates_ptr", "table_ptr", "numbers_ptr"]
_UNALIGNED += ["allowed_ptr", "cache_position_ptr", "prompt_length_ptr", "values_ptr"]
_UNALIGNED += ["bits_ptr", "planes_ptr", "row_values_ptr", "rounds_like_ptr"]

# Where the fields of a task stand in the flat tuple that the kernel is compiled for, and those of a gate in the table.
TASK_KIND, TASK_SET, TASK_GATE, TASK_A, TASK_B, TASK_PLANE = (tl.constexpr(i) for i in range(len(Task._fields)))
TASK_SIZE = tl.constexpr(len(Task._fields))
_OF, _START, _STOP, _PERIOD, _PHASE = (tl.constexpr(i) for i in range(len(Gate._fields)))
_GATE_SIZE = tl.constexpr(len(Gate._fields))

_LONGEST = tl.constexpr(LONGEST)


class _Row(NamedTuple):
    """The row of a program and where it stands; and the sizes by which tasks find what belongs to it."""

    row: tl.tensor
    step: tl.tensor
    length: tl.tensor
    prompt_length: tl.tensor
    B: tl.tensor
    W: tl.tensor


class _Reads(NamedTuple):
    """What tasks read besides the text: see ``Operands``. The allowed set and the given values are those of the row."""

    masks_ptr: tl.tensor
    rows_ptr: tl.tensor
    sources_ptr: tl.tensor
    starts_ptr: tl.tensor
    gates_ptr: tl.tensor
    table_ptr: tl.tensor
    numbers_ptr: tl.tensor
    allowed_ptr: tl.tensor
    values_ptr: tl.tensor
    source_length: tl.tensor


@triton.jit
def _is_open(gates_ptr, gate: tl.constexpr, here):
    is_open = here.step == here.step
    if gate >= 0:
        gate_ptr = gates_ptr + gate * _GATE_SIZE
        index = tl.where(tl.load(gate_ptr + _OF) == 0, here.step, here.length)
        in_window = (index >= tl.load(gate_ptr + _START)) & (index < tl.load(gate_ptr + _STOP))
        is_open = in_window & ((index - tl.load(gate_ptr + _PHASE)) % tl.load(gate_ptr + _PERIOD) == 0)
    return is_open


@triton.jit
def _end_of_range(reads, END: tl.constexpr, V):
    """Where a range of a row begins or ends, as a token of the vocabulary or V."""
    end = tl.load(reads.values_ptr + END) if END >= 0 else tl.load(reads.table_ptr + (-1 - END))
    return tl.minimum(tl.maximum(end, 0), V).to(tl.int32)


@triton.jit
def _first_bits(count):
    """Words whose lowest bits are set, as many as ``count`` says: all of them from 32 on."""
    return tl.where(count >= 32, -1, ~(-1 << (tl.maximum(count, 0) & 31)))


@triton.jit
def _begin_set(set_ptr, text, reads, here, words, s: tl.constexpr, TASKS: tl.constexpr, BLOCK: tl.constexpr):
    """Clear the words of a program, or begin with the masks that hold for them."""
    for start in range(0, own_count(words), BLOCK):
        word = word_at(words, start + tl.arange(0, BLOCK))
        inside = word < words.W
        value = tl.zeros([BLOCK], tl.int32)
        for t in tl.static_range(0, len(TASKS), TASK_SIZE):
            if TASKS[t + TASK_SET] == s:
                if TASKS[t + TASK_KIND] == STATIC:
                    is_open = _is_open(reads.gates_ptr, TASKS[t + TASK_GATE], here)
                    if TASKS[t + TASK_B] >= 0:
                        blank_ptr = reads.masks_ptr + TASKS[t + TASK_B] * here.W
                        is_open |= holds_all(blank_ptr, text, here.prompt_length, here.length, words.V)
                    mask_word = tl.load(reads.masks_ptr + TASKS[t + TASK_A] * here.W + word, mask=inside, other=0)
                    value |= tl.where(is_open, mask_word, 0)
                if TASKS[t + TASK_KIND] == ROWS:
                    rows_start = (TASKS[t + TASK_A] * here.B + here.row) * here.W
                    value |= tl.load(reads.rows_ptr + rows_start + word, mask=inside, other=0)
                if TASKS[t + TASK_KIND] == ALLOWED:
                    value |= ~tl.load(reads.allowed_ptr + word, mask=inside, other=0)
                if TASKS[t + TASK_KIND] == RANGE:
                    first = _end_of_range(reads, TASKS[t + TASK_A], words.V)
                    stop = _end_of_range(reads, TASKS[t + TASK_B], words.V)
                    value |= _first_bits(stop - word * 32) & ~_first_bits(first - word * 32)
        tl.store(set_ptr + word, value, mask=inside)


@triton.jit
def _count(set_ptr, plane_ptr, text, start, stop, words, BLOCK: tl.constexpr):
    """Mark the tokens of a part of a text, and write to the plane how often each occurs."""
    for i in range(start, stop, BLOCK):
        at = i + tl.arange(0, BLOCK)
        token = token_at(text, at, at < stop)
        tl.store(plane_ptr + token, 0.0, mask=is_mine(token, words))
    tl.debug_barrier()
    for i in range(start, stop, BLOCK):
        at = i + tl.arange(0, BLOCK)
        token = token_at(text, at, at < stop)
        mine = is_mine(token, words)
        mark(set_ptr, token, mine)
        tl.atomic_add(plane_ptr + token, 1.0, mask=mine, sem="relaxed")


@triton.jit
def _lower_repetitions(set_ptr, plane_ptr, text, breakers_ptr, penalties_ptr, words, BLOCK: tl.constexpr):
    """Mark the tokens that would extend a repetition, and write to the plane the largest penalty of each."""
    last = token_at(text, text.length - 1, text.length > 0)
    for i in range(0, text.length - 1, BLOCK):
        at = i + tl.arange(0, BLOCK)
        inside = at + 1 < text.length
        matches = inside & (token_at(text, at, inside) == last)
        token = token_at(text, at + 1, matches)
        tl.store(plane_ptr + token, 0.0, mask=matches & is_mine(token, words))
    tl.debug_barrier()
    # Penalties are not negative: as integers their bits are in the same order.
    bits_ptr = plane_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    for i in range(0, text.length - 1, BLOCK):
        at = i + tl.arange(0, BLOCK)
        token = token_at(text, at + 1, at + 1 < text.length)
        mine = is_mine(token, words)
        matched = match_length(text, at, mine, 0, breakers_ptr, words.V, _LONGEST)
        penalty = tl.load(penalties_ptr + matched, mask=mine, other=0.0).to(tl.float32)
        found = mine & (penalty > 0) & (holds(breakers_ptr, token, words.V) == 0)
        mark(set_ptr, token, found)
        tl.atomic_max(bits_ptr + token, penalty.to(tl.int32, bitcast=True), mask=found, sem="relaxed")


@triton.jit
def _write_sums(plane_ptr, table_ptr, numbers_ptr, text, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Write to the plane what the sequences of a table add to their last tokens: a lane for each of those."""
    width = tl.load(table_ptr + 1)
    tokens = tl.load(table_ptr + 2)
    heads = table_ptr + 3
    for k in range(0, tokens, BLOCK):
        entry = k + tl.arange(0, BLOCK)
        known = entry < tokens
        token = tl.load(heads + entry * 3, mask=known, other=0)
        begin = tl.load(heads + entry * 3 + 1, mask=known, other=0)
        many = tl.load(heads + entry * 3 + 2, mask=known, other=0)
        total = tl.load(numbers_ptr + entry, mask=known, other=0).to(tl.float32).to(DTYPE).to(tl.float32)
        for j in range(tl.max(many, 0)):
            counts = known & (j < many)
            found = ends_with(text, heads + tokens * 3 + (begin + j) * width, counts, width, 0)
            value = tl.load(numbers_ptr + tokens + begin + j, mask=counts, other=0).to(tl.float32)
            total += tl.where(found, value.to(DTYPE).to(tl.float32), 0.0)
            total = total.to(DTYPE).to(tl.float32)
        tl.store(plane_ptr + token, total, mask=known)


@triton.jit
def _run_task(
    set_ptr, plane_ptr, text, reads, here, words,
    t: tl.constexpr, TASKS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add to the words of a program what one task finds in the text."""
    kind: tl.constexpr = TASKS[t + TASK_KIND]
    a: tl.constexpr = TASKS[t + TASK_A]
    b: tl.constexpr = TASKS[t + TASK_B]
    if (kind == HISTORY) | (kind == COUNTS):
        start = 0
        stop = text.length
        if a == PROMPT:
            stop = tl.minimum(here.prompt_length, text.length)
        if a == GENERATED:
            start = tl.maximum(here.prompt_length, 0)
        if b >= 0:
            start = tl.maximum(start, tl.load(reads.starts_ptr + b * here.B + here.row))
        if kind == COUNTS:
            _count(set_ptr, plane_ptr, text, start, stop, words, BLOCK)
        else:
            mark_text(set_ptr, text, start, stop, words, BLOCK)
    if kind == REPEATED:
        length = text.length
        if b == PROMPT:
            # All that begins the n-gram must have been generated.
            length = tl.where(here.step >= a - 1, tl.minimum(here.prompt_length, text.length), 0)
        mark_repeated(set_ptr, text, Text(text.ptr, text.stride, length), a, words, a <= UNROLLED, BLOCK)
    if kind == REPEATED_FROM:
        source_ptr = reads.sources_ptr + (b * here.B + here.row) * reads.source_length
        source = Text(source_ptr, 1, reads.source_length)
        mark_repeated(set_ptr, text, source, a, words, a <= UNROLLED, BLOCK)
    if kind == ENDINGS:
        table_ptr = reads.table_ptr + a
        count, width = tl.load(table_ptr), tl.load(table_ptr + 1)
        mark_endings(set_ptr, text, 0, table_ptr + 2, count, width, words, BLOCK)
    if kind == SUMS:
        if words.split == 0:
            _write_sums(plane_ptr, reads.table_ptr + a, reads.numbers_ptr + b, text, DTYPE, BLOCK)
    if kind == REPETITIONS:
        seen = tl.maximum(text.length, 0)
        begin = seen - tl.minimum(tl.load(reads.table_ptr + a), seen)
        recent = Text(text.ptr + begin.to(tl.int64) * text.stride, text.stride, seen - begin)
        breakers_ptr = reads.masks_ptr + tl.load(reads.table_ptr + a + 1) * here.W
        _lower_repetitions(set_ptr, plane_ptr, recent, breakers_ptr, reads.numbers_ptr + b, words, BLOCK)


@triton.jit
def _power(base, exponent):
    """``base ** exponent`` in the precision of the base, by repeated squaring; 1 for exponents below 1."""
    left = tl.maximum(exponent, 0)
    power = base * 0.0 + 1.0
    while left > 0:
        power = tl.where(left % 2 == 1, power * base, power)
        base *= base
        left //= 2
    return power


@triton.jit
def _write_row_values(values_ptr, reads, here, TASKS: tl.constexpr):
    """Write the values of a row."""
    for t in tl.static_range(0, len(TASKS), TASK_SIZE):
        if TASKS[t + TASK_KIND] == GATE:
            is_open = _is_open(reads.gates_ptr, TASKS[t + TASK_GATE], here)
            tl.store(values_ptr + TASKS[t + TASK_PLANE], is_open.to(tl.float32))
        if TASKS[t + TASK_KIND] == DECAY:
            times = here.length - tl.load(reads.table_ptr + TASKS[t + TASK_A])
            power = _power(tl.load(reads.numbers_ptr + TASKS[t + TASK_B]), times)
            tl.store(values_ptr + TASKS[t + TASK_PLANE], tl.where(times > 0, power - 1.0, 0.0).to(tl.float32))
        if TASKS[t + TASK_KIND] == VALUE:
            value = tl.load(reads.values_ptr + TASKS[t + TASK_A]).to(tl.float32)
            tl.store(values_ptr + TASKS[t + TASK_PLANE], value)


@triton.jit(do_not_specialize=_STEPWISE, do_not_specialize_on_alignment=_UNALIGNED)
def _token_sets_kernel(
    # inputs
    ids_ptr, masks_ptr, rows_ptr, sources_ptr, starts_ptr, gates_ptr, table_ptr, numbers_ptr, allowed_ptr,
    cache_position_ptr, prompt_length_ptr, values_ptr,
    # outputs
    bits_ptr, planes_ptr, row_values_ptr, rounds_like_ptr,
    # shapes
    B, V, W, L, source_length, splits,
    # strides
    stride_ids_row, stride_id, stride_allowed, stride_cache, stride_prompt,
    # position
    cache_offset, prompt_offset,
    # constants
    TASKS: tl.constexpr, SETS: tl.constexpr, ROW_VALUES: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    split = program % splits
    which = (program // splits) % SETS
    row = (program // (splits * SETS)).to(tl.int64)

    cache_row_ptr = None if cache_position_ptr is None else cache_position_ptr + row * stride_cache
    prompt_row_ptr = None if prompt_length_ptr is None else prompt_length_ptr + row * stride_prompt
    length = index_at(cache_row_ptr, cache_offset) + 1
    prompt_length = index_at(prompt_row_ptr, prompt_offset)
    here = _Row(row, length - prompt_length, length, prompt_length, B, W)
    ids_row_ptr = None if ids_ptr is None else ids_ptr + row * stride_ids_row
    seen = tl.minimum(length, L)  # of what is in the history
    text = Text(ids_row_ptr, stride_id, seen)
    words = OwnWords(split, splits, W, V)
    reads = _Reads(
        masks_ptr, rows_ptr, sources_ptr, starts_ptr, gates_ptr, table_ptr, numbers_ptr,
        None if allowed_ptr is None else allowed_ptr + row * stride_allowed,
        None if values_ptr is None else values_ptr + row * VALUES, source_length,
    )  # fmt: skip

    for s in tl.static_range(SETS):
        if which == s:
            set_ptr = bits_ptr + (s * B + row) * W
            _begin_set(set_ptr, text, reads, here, words, s, TASKS, BLOCK)
            tl.debug_barrier()
            for t in tl.static_range(0, len(TASKS), TASK_SIZE):
                if TASKS[t + TASK_SET] == s:
                    plane_ptr = None
                    if TASKS[t + TASK_PLANE] >= 0:
                        plane_ptr = planes_ptr + (tl.full([], TASKS[t + TASK_PLANE], tl.int64) * B + row) * V
                    _run_task(
                        set_ptr, plane_ptr, text, reads, here, words,
                        t, TASKS, rounds_like_ptr.dtype.element_ty, BLOCK,
                    )  # fmt: skip
    if ROW_VALUES > 0:
        if (which == 0) & (split == 0):
            _write_row_values(row_values_ptr + row * ROW_VALUES, reads, here, TASKS)


class Operands(NamedTuple):
    """What tasks read besides the history. All tensors are on one device; those that no task reads are None."""

    masks: torch.Tensor | None = None
    """Packed token sets, int32 ``[M, W]``."""
    rows: torch.Tensor | None = None
    """Packed token sets of each row, int32 ``[K, B, W]``."""
    sources: torch.Tensor | None = None
    """Texts, int32 ``[K, B, L]``, padded with -1."""
    starts: torch.Tensor | None = None
    """Leading tokens of a history that don't count, int32 ``[K, B]``."""
    gates: torch.Tensor | None = None
    """Gates, int32 ``[G, 5]``."""
    table: torch.Tensor | None = None
    """Sequences, as ``endings`` and ``sums`` lay them out, lengths, and fixed ends of ranges, int32."""
    numbers: torch.Tensor | None = None
    """Biases of the sequences, factors of growth and penalties of repetitions, float64."""


class Sequences(NamedTuple):
    """Sequences of a ``SUMS`` or ``ENDINGS`` task, sorted by their last tokens where they have biases."""

    last: torch.Tensor
    """The distinct last tokens, int64 ``[T]``."""
    groups: list[tuple[torch.Tensor, ...]]
    """Of neighbours of one length: prefixes ``[K, P]``; last tokens, their index among ``last`` and biases, ``[K]``."""
    begin: torch.Tensor | None = None
    """What each distinct last token begins with, float32 ``[T]``; None where there are no biases."""

    @classmethod
    def of(
        cls, sequences: list[tuple[int, ...]], biases: list[float] | None, begin: dict[int, float], device: torch.device
    ) -> Sequences:
        """The sequences in the order in which their biases are added up; ``begin`` is 0 where it says nothing."""
        last = sorted({ids[-1] for ids in sequences})
        index = {token: i for i, token in enumerate(last)}
        groups: list[tuple[torch.Tensor, ...]] = []
        for _, group in groupby(
            zip(sequences, biases or [0.0] * len(sequences), strict=True), lambda each: len(each[0])
        ):
            some, values = zip(*group, strict=True)
            groups.append(
                (
                    torch.tensor([ids[:-1] for ids in some], dtype=torch.int64, device=device),
                    torch.tensor([ids[-1] for ids in some], device=device),
                    torch.tensor([index[ids[-1]] for ids in some], device=device),
                    torch.tensor(values, dtype=torch.float32, device=device),
                )
            )
        at_first = None if biases is None else torch.tensor([begin.get(token, 0.0) for token in last], device=device)
        return cls(torch.tensor(last, device=device), groups, at_first)


class Repetitions(NamedTuple):
    """What a ``REPETITIONS`` task lowers, as torch reads it."""

    range_: int
    """How many of the last tokens are looked at."""
    breakers: torch.Tensor
    """Tokens that no match holds, bool ``[V]``."""
    penalties: tuple[float, ...]
    """Of repetitions of 0, 1, ... tokens; none is lower than the one before."""


class Texts(NamedTuple):
    """What tasks read in torch, instead of the packed forms of ``Operands``."""

    listed: list[torch.Tensor]
    """Token ids of each mask, int64 ``[N]``."""
    rows: list[torch.Tensor]
    """Texts whose tokens are the sets of each block of the rows, int64 ``[B, L]``, padded with -1."""
    sequences: dict[int, Sequences]
    """The sequences at each offset of the table."""
    decays: dict[int, tuple[int, float]]
    """Start and factor of the growth whose start is at each offset of the table."""
    ends: dict[int, int]
    """The fixed end of a range at each offset of the table."""
    repetitions: dict[int, Repetitions]
    """What is lowered whose range is at each offset of the table."""


@dataclass(eq=False)
class Search:
    """Tasks and what they read, for one vocabulary, batch size and device."""

    tasks: list[Task] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)
    sets: int = 0
    planes: int = 0
    row_values: int = 0
    values: int = 0
    """How many values of each row are given."""
    operands: Operands = field(default_factory=Operands)
    texts: Texts = field(default_factory=lambda: Texts([], [], {}, {}, {}, {}))

    def __post_init__(self) -> None:
        self.flat = tuple(number for task in self.tasks for number in task)
        # Searches of one form share their compiled kernel, whatever they read.
        self.form = form_of((self.flat, self.sets, self.row_values, self.values))
        self.is_static = all(
            task.kind == GATE.value or (task.kind == STATIC.value and task.b < 0) for task in self.tasks
        )
        self._static: dict[tuple[bool, ...], StaticSets] = {}
        self.places: dict[int, Any] = {}
        """Where torch has found the tokens of each block of the rows, which stay."""

    def static(self, call: Call, V: int) -> StaticSets:
        """What is found where gated masks are all that there is, and positions are those of the host."""
        length = call.cache_offset + 1
        step = length - call.prompt_offset
        open_gates = tuple([gate.is_open(step, length) for gate in self.gates])
        found = self._static.get(open_gates)
        if found is None:
            found = self._static[open_gates] = self._with_gates(open_gates, V)
        return found

    def _with_gates(self, open_gates: tuple[bool, ...], V: int) -> StaticSets:
        masks = self.operands.masks
        device = None if masks is None else masks.device
        bits = torch.zeros(self.sets, 1, words_of(V), dtype=torch.int32, device=device)
        row_values = torch.zeros(1, self.row_values, dtype=torch.float32, device=device) if self.row_values else None
        full, forced = set(), set()
        for task in self.tasks:
            if task.gate >= 0 and not open_gates[task.gate]:
                continue
            if task.kind == GATE.value:
                assert row_values is not None
                row_values[0, task.plane] = 1.0
                forced.add(task.plane)
            else:
                assert masks is not None
                bits[task.set, 0] |= masks[task.a]
                full.add(task.set)
        return StaticSets(TokenSets(bits, None, row_values), frozenset(full), frozenset(forced))


class Listed(NamedTuple):
    """The tokens that have values of their own in place of their logits, once more as lists."""

    tokens: torch.Tensor
    """int32 ``[B, ROOM]``, each beside its value."""
    spans: torch.Tensor
    """int32 ``[B, N, 2]``: where each of N lists begins, and its length."""
    lists: int
    """How many of the N there are."""
    pieces: int
    """How many programs share a list."""


class TokenSets(NamedTuple):
    """What was found."""

    bits: torch.Tensor | None
    """Packed sets, int32 ``[S, B, W]``; ``[S, 1, W]`` where all rows share them; None where there are none."""
    planes: torch.Tensor | None = None
    """Values float32 ``[P, B, V]``, written at the tokens of their sets only."""
    row_values: torch.Tensor | None = None
    """Values float32 ``[B, N]``, or ``[1, N]``."""
    listed: Listed | None = None


class StaticSets(NamedTuple):
    """What was found on the host."""

    found: TokenSets
    full: frozenset[int]
    """Sets that hold anything."""
    forced: frozenset[int]
    """Row values that are 1."""


def endings(sequences: list[tuple[int, ...]]) -> list[int]:
    """The table of an ``ENDINGS`` task: count, width, then last token, length of the prefix and prefix from its end."""
    width = 2 + max((len(ids) - 1 for ids in sequences), default=0)
    found = [len(sequences), width]
    for ids in sequences:
        prefix = list(reversed(ids[:-1]))
        found += [ids[-1], len(prefix), *prefix, *[-1] * (width - 2 - len(prefix))]
    return found


def sums(sequences: list[tuple[int, ...]]) -> list[int]:
    """The table of a ``SUMS`` task, given sequences sorted by their last tokens: a head for each of those first."""
    heads: list[list[int]] = []
    for i, ids in enumerate(sequences):
        if not heads or heads[-1][0] != ids[-1]:
            heads.append([ids[-1], i, 0])
        heads[-1][2] += 1
    count, width, *rest = endings(sequences)
    return [count, width, len(heads), *(number for head in heads for number in head), *rest]


# Positions of the history, words of a set and sequences are taken in blocks of this many.
_BLOCK = 1024
# A few programs for each multiprocessor hide each other's waits; more would only read the history again.
_PROGRAMS = 256

_token_sets_launcher = Launcher(_token_sets_kernel, num_warps=8)


def planes_of(search: Search, scores: torch.Tensor, call: Call) -> torch.Tensor | None:
    """Room for the planes of a search, float32 ``[P, B, V]``; the first one holds the logits that are mixed in."""
    mates = call.mates
    if mates is not None and search.planes == 1 and mates.dtype == torch.float32 and mates.is_contiguous():
        return mates.unsqueeze(0)
    if not search.planes:
        return None
    planes = torch.empty(search.planes, *scores.shape, dtype=torch.float32, device=scores.device)
    if mates is not None:
        planes[0].copy_(mates)
    return planes


def launch_token_sets(scores: torch.Tensor, search: Search, call: Call) -> TokenSets:
    """Run a search in one launch, for ``scores`` ``[B, V]`` of which only shape, dtype and device are used."""
    device = scores.device
    B, V = scores.shape
    W = words_of(V)
    sets = search.sets
    found = torch.empty(sets, B, W, dtype=torch.int32, device=device)
    planes = planes_of(search, scores, call)
    row_values = torch.empty(B, search.row_values, dtype=torch.float32, device=device) if search.row_values else None
    input_ids, allowed, cache_offset, prompt_offset, cache_position, prompt_length, values, _ = call
    if input_ids is None:
        L, stride_ids_row, stride_id, ids_dtype = 0, 0, 0, None
    else:
        L = input_ids.shape[1]
        stride_ids_row, stride_id = input_ids.stride()
        ids_dtype = input_ids.dtype
    if allowed is not None and allowed.dtype == torch.bool:
        allowed = pack_bits(allowed)
    masks, rows, sources, starts, gates, table, numbers = search.operands
    splits = splits_of(W, _PROGRAMS // (B * sets))
    key = (
        device, scores.dtype, V, search.form, ids_dtype, allowed is None,
        cache_position is None or cache_position.dtype, prompt_length is None or prompt_length.dtype,
    )  # fmt: skip
    _token_sets_launcher(key, B * sets * splits, (
        input_ids, masks, rows, sources, starts, gates, table, numbers, allowed, cache_position, prompt_length,
        values, found, planes, row_values, scores,
        B, V, W, L, 0 if sources is None else sources.shape[2], splits,
        stride_ids_row, stride_id, 0 if allowed is None or allowed.shape[0] == 1 else allowed.stride(0),
        row_stride(cache_position), row_stride(prompt_length),
        cache_offset, prompt_offset,
        search.flat, sets, search.row_values, search.values, _BLOCK,
    ))  # fmt: skip
    return TokenSets(found, planes, row_values)
