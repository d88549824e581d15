"""Find which tokens of each row a chain of logits maps speaks of: histories, n-grams, sequences, gated masks.

Each set is a row of packed words (see ``bits``), and is the union of what its tasks find. A task may count or sum as
well, into a plane of float32 values that is written at the tokens of its set only, or give the row a single value.

Bytes moved: the sets are written once, 1/32 of a float32 ``[B, V]`` each; the history is read once a task and split.
Nothing is sorted, and nothing is as long as the vocabulary but the sets. A program owns a range of words of one set
of one row, which it clears and then fills, so that no program waits for another. The same in torch is in
``token_places``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import torch

from fastlogits_kernels.runtime.bits import pack_bits, words
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


class Position(NamedTuple):
    """Where each row stands: offsets on the host, to which integer tensors ``[]`` or ``[B]`` may be added."""

    cache_offset: int = 0
    prompt_offset: int = 0
    cache_position: torch.Tensor | None = None
    prompt_length: torch.Tensor | None = None
    values: torch.Tensor | None = None
    """What was computed for each row there, float64 ``[B, N]`` and contiguous; None where a chain asks for nothing."""


_STEPWISE = ["B", "W", "L", "source_length", "splits", "stride_ids_row", "stride_id", "stride_allowed", "stride_cache"]
_STEPWISE += ["stride_prompt", "cache_offset", "prompt_offset"]
_UNALIGNED = ["ids_ptr", "masks_ptr", "rows_ptr", "sources_ptr", "starts_ptr", "gates_ptr", "table_ptr", "numbers_ptr"]
_UNALIGNED += ["allowed_ptr", "cache_position_ptr", "prompt_length_ptr", "values_ptr"]
_UNALIGNED += ["bits_ptr", "planes_ptr", "row_values_ptr"]


@triton.jit
def blank_so_far(blank_ptr, ids_ptr, start, stop, L, W, stride_id):
    """Whether all tokens of a row from ``start`` to ``stop`` are in a packed set; true of none."""
    i = start
    blank = start <= stop
    while blank & (i < stop) & (i < L):
        token = tl.load(ids_ptr + i.to(tl.int64) * stride_id).to(tl.int32)
        known = (token >= 0) & (token < W * 32)
        blank = ((tl.load(blank_ptr + token // 32, mask=known, other=0) >> (token % 32)) & 1) != 0
        i += 1
    return blank


@triton.jit
def _is_open(gates_ptr, gate: tl.constexpr, step, length):
    is_open = step == step
    if gate >= 0:
        here = gates_ptr + gate * 5
        index = tl.where(tl.load(here) == 0, step, length)
        in_window = (index >= tl.load(here + 1)) & (index < tl.load(here + 2))
        is_open = in_window & ((index - tl.load(here + 4)) % tl.load(here + 3) == 0)
    return is_open


@triton.jit
def _is_mine(token, first, last):
    """Whether a token is one of the vocabulary, in this program's range of words."""
    return (token >= 0) & (token // 32 >= first) & (token // 32 < last)


@triton.jit
def _add_to_set(set_ptr, token, found, first, last):
    """Set the bits of the found tokens that are of this program's range."""
    bit = tl.full(token.shape, 1, tl.int32) << (token % 32).to(tl.int32)
    tl.atomic_or(set_ptr + token // 32, bit, mask=found & _is_mine(token, first, last), sem="relaxed")


@triton.jit
def _token_at(ids_ptr, column, inside, stride_id, V):
    """Tokens of some columns; -1 for those outside the vocabulary, and elsewhere."""
    token = tl.load(ids_ptr + column.to(tl.int64) * stride_id, mask=inside, other=-1)
    return tl.where((token >= 0) & (token < V), token, -1).to(tl.int32)


@triton.jit
def _add_history(
    set_ptr, plane_ptr, ids_ptr, start, stop, first, last, stride_id, V, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the tokens of a part of the history; with ``COUNT``, write to the plane how often each occurs."""
    lane = tl.arange(0, BLOCK)
    if COUNT:
        for i in range(start, stop, BLOCK):
            token = _token_at(ids_ptr, i + lane, i + lane < stop, stride_id, V)
            tl.store(plane_ptr + token, 0.0, mask=_is_mine(token, first, last))
        tl.debug_barrier()
    for i in range(start, stop, BLOCK):
        token = _token_at(ids_ptr, i + lane, i + lane < stop, stride_id, V)
        _add_to_set(set_ptr, token, token >= 0, first, last)
        if COUNT:
            tl.atomic_add(plane_ptr + token, 1.0, mask=_is_mine(token, first, last), sem="relaxed")


# n-grams of up to so many tokens are compared without a loop; longer ones are rare, and would compile for ever.
_UNROLLED = tl.constexpr(16)


@triton.jit
def _is_repeated(text_ptr, column, inside, text_stride, ids_ptr, at, stride_id):
    """Whether some columns of a text hold the token at a place of the history."""
    wanted = tl.load(ids_ptr + at.to(tl.int64) * stride_id)
    return tl.load(text_ptr + column.to(tl.int64) * text_stride, mask=inside, other=-1) == wanted


@triton.jit
def _add_repeated(
    set_ptr, text_ptr, text_length, text_stride, ids_ptr, seen, first, last, stride_id, V,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the tokens of a text that follow there what the history ends with."""
    if seen >= SIZE - 1:
        for i in range(SIZE - 1, text_length, BLOCK):
            column = i + tl.arange(0, BLOCK)
            inside = column < text_length
            found = inside
            if SIZE <= _UNROLLED:
                for j in tl.static_range(1, SIZE):
                    found &= _is_repeated(text_ptr, column - j, inside, text_stride, ids_ptr, seen - j, stride_id)
            else:
                for j in range(1, SIZE):
                    found &= _is_repeated(text_ptr, column - j, inside, text_stride, ids_ptr, seen - j, stride_id)
            token = _token_at(text_ptr, column, found, text_stride, V)
            _add_to_set(set_ptr, token, found, first, last)


@triton.jit
def _ends(here, known, ids_ptr, seen, width, stride_id):
    """Whether the history ends with the prefixes at ``here``: last token, prefix length, prefix from its end."""
    prefix = tl.load(here + 1, mask=known, other=0)
    found = known & (prefix <= seen)
    for j in range(width - 2):
        asks = found & (j < prefix)
        token = tl.load(ids_ptr + (seen - 1 - j + 0 * prefix).to(tl.int64) * stride_id, mask=asks, other=0)
        found &= (token == tl.load(here + 2 + j, mask=asks, other=0)) | (j >= prefix)
    return found


@triton.jit
def _add_endings(set_ptr, table_ptr, ids_ptr, seen, first, last, stride_id, BLOCK: tl.constexpr):
    """Add the last tokens of the sequences of a table whose other tokens end the history."""
    count = tl.load(table_ptr)
    width = tl.load(table_ptr + 1)
    for k in range(0, count, BLOCK):
        entry = k + tl.arange(0, BLOCK)
        here = table_ptr + 2 + entry * width
        found = _ends(here, entry < count, ids_ptr, seen, width, stride_id)
        token = tl.load(here, mask=entry < count, other=-1)
        _add_to_set(set_ptr, token, found, first, last)


@triton.jit
def _write_sums(plane_ptr, table_ptr, numbers_ptr, ids_ptr, seen, stride_id, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
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
            found = _ends(heads + tokens * 3 + (begin + j) * width, counts, ids_ptr, seen, width, stride_id)
            value = tl.load(numbers_ptr + tokens + begin + j, mask=counts, other=0).to(tl.float32)
            total += tl.where(found, value.to(DTYPE).to(tl.float32), 0.0)
            total = total.to(DTYPE).to(tl.float32)
        tl.store(plane_ptr + token, total, mask=known)


@triton.jit
def _end_of_range(values_ptr, table_ptr, END: tl.constexpr, V):
    """Where a range begins or ends in a row whose values are at ``values_ptr``, as a token of the vocabulary or V."""
    end = tl.load(values_ptr + END) if END >= 0 else tl.load(table_ptr + (-1 - END))
    return tl.minimum(tl.maximum(end, 0), V).to(tl.int32)


@triton.jit
def _first_bits(count):
    """Words whose lowest bits are set, as many as ``count`` says: all of them from 32 on."""
    return tl.where(count >= 32, -1, ~(-1 << (tl.maximum(count, 0) & 31)))


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

    length = cache_offset + 1
    if cache_position_ptr is not None:
        length += tl.load(cache_position_ptr + row * stride_cache).to(tl.int32)
    prompt_length = prompt_offset
    if prompt_length_ptr is not None:
        prompt_length += tl.load(prompt_length_ptr + row * stride_prompt).to(tl.int32)
    step = length - prompt_length
    seen = tl.minimum(length, L)  # of what is in the history

    lane = tl.arange(0, BLOCK)
    range_words = (W + splits - 1) // splits
    first = split * range_words
    last = tl.minimum(first + range_words, W)
    if ids_ptr is not None:
        ids_ptr += row * stride_ids_row
    if values_ptr is not None:
        values_ptr += row * VALUES

    for s in tl.static_range(SETS):
        if which == s:
            set_ptr = bits_ptr + (s * B + row) * W
            # Clear the range, or begin with the masks that hold for it.
            for word_start in range(first, last, BLOCK):
                word = word_start + lane
                value = tl.zeros([BLOCK], tl.int32)
                for t in tl.static_range(0, len(TASKS), 6):
                    if TASKS[t + 1] == s:
                        if TASKS[t] == STATIC:
                            is_open = _is_open(gates_ptr, TASKS[t + 2], step, length)
                            if TASKS[t + 4] >= 0:
                                blank_ptr = masks_ptr + TASKS[t + 4] * W
                                is_open |= blank_so_far(blank_ptr, ids_ptr, prompt_length, length, L, W, stride_id)
                            mask_word = tl.load(masks_ptr + TASKS[t + 3] * W + word, mask=word < last, other=0)
                            value |= tl.where(is_open, mask_word, 0)
                        if TASKS[t] == ROWS:
                            rows_start = (TASKS[t + 3] * B + row) * W
                            value |= tl.load(rows_ptr + rows_start + word, mask=word < last, other=0)
                        if TASKS[t] == ALLOWED:
                            value |= ~tl.load(allowed_ptr + row * stride_allowed + word, mask=word < last, other=0)
                        if TASKS[t] == RANGE:
                            start = _end_of_range(values_ptr, table_ptr, TASKS[t + 3], V)
                            stop = _end_of_range(values_ptr, table_ptr, TASKS[t + 4], V)
                            value |= _first_bits(stop - word * 32) & ~_first_bits(start - word * 32)
                tl.store(set_ptr + word, value, mask=word < last)
            tl.debug_barrier()

            for t in tl.static_range(0, len(TASKS), 6):
                if TASKS[t + 1] == s:
                    plane_ptr = bits_ptr  # of no meaning where there are no planes
                    if TASKS[t + 5] >= 0:
                        plane_ptr = planes_ptr + (tl.full([], TASKS[t + 5], tl.int64) * B + row) * V
                    if (TASKS[t] == HISTORY) | (TASKS[t] == COUNTS):
                        start = 0
                        stop = seen
                        if TASKS[t + 3] == PROMPT:
                            stop = tl.minimum(prompt_length, seen)
                        if TASKS[t + 3] == GENERATED:
                            start = tl.maximum(prompt_length, 0)
                        if TASKS[t + 4] >= 0:
                            start = tl.maximum(start, tl.load(starts_ptr + TASKS[t + 4] * B + row))
                        _add_history(
                            set_ptr, plane_ptr, ids_ptr, start, stop, first, last, stride_id, V,
                            TASKS[t] == COUNTS, BLOCK,
                        )  # fmt: skip
                    if TASKS[t] == REPEATED:
                        text_length = seen
                        if TASKS[t + 4] == PROMPT:
                            generated = step >= TASKS[t + 3] - 1
                            text_length = tl.where(generated, tl.minimum(prompt_length, seen), 0)
                        _add_repeated(
                            set_ptr, ids_ptr, text_length, stride_id, ids_ptr, seen, first, last, stride_id, V,
                            TASKS[t + 3], BLOCK,
                        )  # fmt: skip
                    if TASKS[t] == REPEATED_FROM:
                        _add_repeated(
                            set_ptr, sources_ptr + (TASKS[t + 4] * B + row) * source_length, source_length, 1,
                            ids_ptr, seen, first, last, stride_id, V, TASKS[t + 3], BLOCK,
                        )  # fmt: skip
                    if TASKS[t] == ENDINGS:
                        _add_endings(
                            set_ptr, table_ptr + TASKS[t + 3], ids_ptr, seen, first, last, stride_id, BLOCK
                        )  # fmt: skip
                    if TASKS[t] == SUMS:
                        if split == 0:
                            _write_sums(
                                plane_ptr, table_ptr + TASKS[t + 3], numbers_ptr + TASKS[t + 4], ids_ptr, seen,
                                stride_id, rounds_like_ptr.dtype.element_ty, BLOCK,
                            )  # fmt: skip

    if ROW_VALUES > 0:
        if (which == 0) & (split == 0):
            for t in tl.static_range(0, len(TASKS), 6):
                if TASKS[t] == GATE:
                    is_open = _is_open(gates_ptr, TASKS[t + 2], step, length)
                    tl.store(row_values_ptr + row * ROW_VALUES + TASKS[t + 5], is_open.to(tl.float32))
                if TASKS[t] == DECAY:
                    times = length - tl.load(table_ptr + TASKS[t + 3])
                    power = _power(tl.load(numbers_ptr + TASKS[t + 4]), times)
                    value = tl.where(times > 0, power - 1.0, 0.0).to(tl.float32)
                    tl.store(row_values_ptr + row * ROW_VALUES + TASKS[t + 5], value)
                if TASKS[t] == VALUE:
                    value = tl.load(values_ptr + TASKS[t + 3]).to(tl.float32)
                    tl.store(row_values_ptr + row * ROW_VALUES + TASKS[t + 5], value)


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
    """Biases of the sequences and factors of growth, float64."""


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
    texts: Texts = field(default_factory=lambda: Texts([], [], {}, {}, {}))

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

    def static(self, position: Position, V: int) -> StaticSets:
        """What is found where gated masks are all that there is, and positions are those of the host."""
        length = position.cache_offset + 1
        step = length - position.prompt_offset
        open_gates = tuple([gate.is_open(step, length) for gate in self.gates])
        found = self._static.get(open_gates)
        if found is None:
            found = self._static[open_gates] = self._with_gates(open_gates, V)
        return found

    def _with_gates(self, open_gates: tuple[bool, ...], V: int) -> StaticSets:
        masks = self.operands.masks
        device = None if masks is None else masks.device
        bits = torch.zeros(self.sets, 1, words(V), dtype=torch.int32, device=device)
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


class TokenSets(NamedTuple):
    """What was found."""

    bits: torch.Tensor
    """Packed sets, int32 ``[S, B, W]``; ``[S, 1, W]`` where all rows share them."""
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


def launch_token_sets(
    scores: torch.Tensor,
    search: Search,
    input_ids: torch.Tensor | None,
    position: Position,
    allowed: torch.Tensor | None,
) -> TokenSets:
    """Run a search in one launch, for ``scores`` ``[B, V]`` of which only shape, dtype and device are used.

    ``input_ids``, int32 or int64 ``[B, L]``, and ``allowed``, packed int32 ``[B or 1, W]`` or bool, may be None where
    no task reads them.
    """
    device = scores.device
    B, V = scores.shape
    W = words(V)
    sets = search.sets
    found = torch.empty(sets, B, W, dtype=torch.int32, device=device)
    planes = torch.empty(search.planes, B, V, dtype=torch.float32, device=device) if search.planes else None
    row_values = torch.empty(B, search.row_values, dtype=torch.float32, device=device) if search.row_values else None
    if input_ids is None:
        L, stride_ids_row, stride_id, ids_dtype = 0, 0, 0, None
    else:
        L = input_ids.shape[1]
        stride_ids_row, stride_id = input_ids.stride()
        ids_dtype = input_ids.dtype
    cache_offset, prompt_offset, cache_position, prompt_length, values = position
    if allowed is not None and allowed.dtype == torch.bool:
        allowed = pack_bits(allowed)
    masks, rows, sources, starts, gates, table, numbers = search.operands
    splits = max(1, min(W // _BLOCK, _PROGRAMS // (B * sets)))
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
