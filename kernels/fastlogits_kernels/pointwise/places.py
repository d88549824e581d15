"""What a search finds, in torch: where the tokens are, not bits. The reference, and the path of the CPU."""

from __future__ import annotations

from typing import Any

import torch

from fastlogits_kernels.history import LONGEST
from fastlogits_kernels.pointwise.columns import fill_columns
from fastlogits_kernels.pointwise.search import (
    ALLOWED,
    DECAY,
    ENDINGS,
    GATE,
    GENERATED,
    HISTORY,
    PROMPT,
    RANGE,
    REPEATED,
    REPEATED_FROM,
    REPETITIONS,
    ROWS,
    STATIC,
    STEP,
    SUMS,
    VALUE,
    Call,
    Repetitions,
    Search,
    Sequences,
    Task,
)
from fastlogits_kernels.runtime.bits import unpack_bits


class Places:
    """Tokens of a set, as torch reads and writes them in ``[B, V]``; made by one of the class methods."""

    def __init__(self, form: str, at: Any, values: torch.Tensor | None) -> None:
        self._form, self._at = form, at
        self.values = values
        """Values of the tokens, in the shape in which ``take`` gives their elements."""

    @classmethod
    def columns(cls, tokens: torch.Tensor, values: torch.Tensor | None = None) -> Places:
        """Distinct tokens of the vocabulary, int64 ``[N]``, for all rows; values ``[B, N]``."""
        return cls("columns", tokens, values)

    @classmethod
    def pairs(
        cls, rows: torch.Tensor, tokens: torch.Tensor, V: int, values: torch.Tensor | None = None
    ) -> Places | None:
        """Rows, tokens and their values, int64 ``[N]``; tokens outside the vocabulary don't count."""
        if not tokens.shape[0]:
            return None
        if not _all_known(tokens, V):
            known = (tokens >= 0) & (tokens < V)
            rows, tokens = rows[known], tokens[known]
            values = None if values is None else values[known]
        return cls("pairs", (rows, tokens), values)

    @classmethod
    def dense(cls, mask: torch.Tensor) -> Places:
        """Many tokens of each row, bool ``[B, V]`` or ``[1, V]``, which get one value: they aren't taken."""
        return cls("dense", mask, None)

    @classmethod
    def slices(cls, starts: list[int], stops: list[int], V: int) -> Places:
        """The same where they are neighbours, by the ends in each row, which may be outside the vocabulary."""
        ends = [(max(0, start), min(V, stop)) for start, stop in zip(starts, stops, strict=True)]
        return cls("slices", [(row, *each) for row, each in enumerate(ends) if each[0] < each[1]], None)

    @classmethod
    def of_rows(cls, tokens: torch.Tensor, V: int, values: torch.Tensor | None = None) -> Places | None:
        """Tokens of each row, int64 ``[B, K]``, and their values; those outside the vocabulary don't count."""
        if not tokens.numel():
            return None
        if _all_known(tokens, V):
            return cls("rows", tokens, values)
        rows, columns = ((tokens >= 0) & (tokens < V)).nonzero(as_tuple=True)
        return cls("pairs", (rows, tokens[rows, columns]), None if values is None else values[rows, columns])

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens' elements of ``x`` ``[B, V]``, or ``[1, V]`` for all rows."""
        if self._form == "mask":
            return x
        if self._form == "columns":
            return x.index_select(1, self._at)
        if self._form == "rows":
            return (x if x.shape[0] == self._at.shape[0] else x.expand(self._at.shape[0], -1)).gather(1, self._at)
        rows, tokens = self._at
        return x[0, tokens] if x.shape[0] == 1 else x[rows, tokens]

    def put(self, x: torch.Tensor, values: torch.Tensor | float) -> torch.Tensor:
        """``x`` with the tokens' elements written, in place but for a mask; a token there twice has one value."""
        if self._form == "mask":
            return torch.where(self._at, values, x)
        if self._form == "dense":
            x.masked_fill_(self._at, values)
        elif self._form == "slices":
            for row, start, stop in self._at:
                x[row, start:stop] = values
        elif self._form == "rows":
            x.scatter_(1, self._at, values)
        elif self._form == "pairs":
            x[self._at] = values
        elif isinstance(values, torch.Tensor):
            x.index_copy_(1, self._at, values)
        else:
            fill_columns(x, self._at, values)
        return x

    def as_mask(self, x: torch.Tensor) -> Places:
        """The same as a mask of ``x``, where a derivative is asked for: that of a token there twice counts once."""
        mask = self.put(torch.zeros_like(x, dtype=torch.bool), True)
        values = self.values
        if values is not None:
            values = self.put(torch.zeros_like(x, dtype=values.dtype), values)
        return Places("mask", mask, values)

    def value_of_rows(self, value: torch.Tensor | float) -> torch.Tensor | float:
        """A value of all rows, or of each ``[B or 1, 1]``, in a shape that goes with the elements taken."""
        if isinstance(value, float) or self._form != "pairs":
            return value
        return value[0] if value.shape[0] == 1 else value[self._at[0], 0]


def _all_known(tokens: torch.Tensor, V: int) -> bool:
    low, high = tokens.aminmax()
    return int(low) >= 0 and int(high) < V


def _index(offset: int, tensor: torch.Tensor | None) -> int | torch.Tensor:
    """A position of all rows, or of each ``[B or 1, 1]``."""
    return offset if tensor is None else (tensor + offset).reshape(-1, 1)


def _length(call: Call) -> int | torch.Tensor:
    return _index(call.cache_offset + 1, call.cache_position)


def _prompt_length(call: Call) -> int | torch.Tensor:
    return _index(call.prompt_offset, call.prompt_length)


def gate_is_open(search: Search, gate: int, call: Call) -> bool | torch.Tensor:
    """Whether a gate is open: for all rows, or for each, bool ``[B or 1, 1]``."""
    if gate < 0:
        return True
    length = _length(call)
    step = length - _prompt_length(call)
    if isinstance(step, int) and isinstance(length, int):
        return search.gates[gate].is_open(step, length)
    of, start, stop, period, phase = search.gates[gate]
    index = step if of == STEP else length
    is_open: bool | torch.Tensor = (index >= start) & (index < stop) & ((index - phase) % period == 0)
    return is_open


_OF_ROWS = (GATE.value, DECAY.value, VALUE.value)
"""Tasks that find a value of each row rather than tokens."""


def find_row_value(search: Search, plane: int, call: Call) -> float | torch.Tensor:
    """A value of all rows, or of each: floating-point ``[B or 1, 1]``, a growth in float64."""
    task = next(task for task in search.tasks if task.plane == plane and task.kind in _OF_ROWS)
    if task.kind == VALUE.value:
        assert call.values is not None
        return call.values[:, task.a : task.a + 1]
    if task.kind == GATE.value:
        is_open = gate_is_open(search, task.gate, call)
        return float(is_open) if isinstance(is_open, bool) else is_open.float()
    start, factor = search.texts.decays[task.a]
    times = _length(call) - start
    if isinstance(times, int):
        return factor**times - 1.0 if times > 0 else 0.0
    return torch.tensor(factor, dtype=torch.float64, device=times.device) ** times.clamp(min=0) - 1.0


def find_places(
    search: Search,
    which: int,
    x: torch.Tensor,
    call: Call,
) -> list[Places]:
    """Where the tokens of one set are in ``x`` ``[B, V]``; at a call."""
    found = [_find(search, task, x, call) for task in search.tasks if task.set == which and task.kind not in _OF_ROWS]
    return [places for places in found if places is not None]


def _find(
    search: Search,
    task: Task,
    x: torch.Tensor,
    call: Call,
) -> Places | None:
    kind, V = task.kind, x.shape[1]
    if kind == STATIC.value:
        return _find_static(search, task, x, call)
    if kind == ROWS.value:
        if task.a not in search.places:
            search.places[task.a] = Places.of_rows(search.texts.rows[task.a], V)
        return search.places[task.a]  # type: ignore[no-any-return]
    if kind == ALLOWED.value:
        allowed = call.allowed
        assert allowed is not None
        return Places.dense(~(allowed if allowed.dtype == torch.bool else unpack_bits(allowed, V)))
    if kind == RANGE.value:
        start, stop = (_end_of_range(search, end, call) for end in (task.a, task.b))
        if x.is_cpu:  # where reading the ends waits for nothing
            return Places.slices(_of_each_row(start, x.shape[0]), _of_each_row(stop, x.shape[0]), V)
        token = torch.arange(V, device=x.device)
        return Places.dense(((token >= start) & (token < stop)).expand(x.shape))
    input_ids = call.input_ids
    assert input_ids is not None
    if kind in (ENDINGS.value, SUMS.value):
        return _find_sequences(search.texts.sequences[task.a], x, input_ids, call)
    if kind in (REPEATED.value, REPEATED_FROM.value):
        text = None if kind == REPEATED.value else search.operands.sources[task.b]  # type: ignore[index]
        in_prompt = kind == REPEATED.value and task.b == PROMPT.value
        return _find_repeated(task.a, text, V, input_ids, call, in_prompt)
    if kind == REPETITIONS.value:
        return _find_repetitions(search.texts.repetitions[task.a], x, input_ids, call)
    return _find_history(search, task, x, input_ids, call)


def _find_static(search: Search, task: Task, x: torch.Tensor, call: Call) -> Places | None:
    is_open = gate_is_open(search, task.gate, call)
    ids = search.texts.listed[task.a]
    if task.b >= 0 and is_open is not True:
        input_ids = call.input_ids
        assert input_ids is not None
        column = torch.arange(input_ids.shape[1], device=x.device)
        generated = (column >= _prompt_length(call)) & (column < _length(call))
        blank = torch.isin(input_ids, search.texts.listed[task.b])
        is_open = is_open | (blank | ~generated).all(1, keepdim=True)
    if isinstance(is_open, bool):
        return Places.columns(ids) if is_open else None
    return Places.of_rows(torch.where(is_open, ids, -1).expand(x.shape[0], -1), x.shape[1])


def _find_history(search: Search, task: Task, x: torch.Tensor, input_ids: torch.Tensor, call: Call) -> Places | None:
    B, V = x.shape
    length = _length(call)
    start: int | torch.Tensor = _prompt_length(call) if task.a == GENERATED.value else 0
    stop = _prompt_length(call) if task.a == PROMPT.value else length
    if task.b >= 0:
        assert search.operands.starts is not None
        start = search.operands.starts[task.b].reshape(-1, 1).clamp(min=start)
    ids = input_ids.long()
    if isinstance(start, int) and isinstance(stop, int):
        if start > 0 or stop < ids.shape[1]:
            ids = ids[:, max(0, start) : max(0, stop)]
    else:
        column = torch.arange(ids.shape[1], device=ids.device)
        ids = ids.masked_fill((column < start) | (column >= stop) | (column >= length), -1)
    if task.kind == HISTORY.value:
        return Places.of_rows(ids, V)
    column_of = torch.where((ids >= 0) & (ids < V), ids, V)
    counts = torch.zeros(B, V + 1, device=ids.device)
    counts.scatter_add_(1, column_of, torch.ones_like(ids, dtype=torch.float32))
    return Places.of_rows(ids, V, counts.gather(1, column_of))


def _end_of_range(search: Search, end: int, call: Call) -> int | torch.Tensor:
    """Where a range begins or ends: for all rows, or for each ``[B, 1]``."""
    if end < 0:
        return search.texts.ends[-1 - end]
    assert call.values is not None
    return call.values[:, end : end + 1]


def _of_each_row(end: int | torch.Tensor, B: int) -> list[int]:
    """An end of a range in each row."""
    return [end] * B if isinstance(end, int) else [int(each) for each in end.flatten().tolist()]


def _find_repeated(
    size: int, text: torch.Tensor | None, V: int, input_ids: torch.Tensor, call: Call, in_prompt: bool
) -> Places | None:
    """Tokens that complete an n-gram of a text, or of the sequence; of its prompt, where generated tokens begin it."""
    B, L = input_ids.shape
    length = _length(call)
    source = input_ids if text is None else text
    if isinstance(length, int):
        length = min(length, L)
        if length < size - 1:
            return None
        prefix = input_ids[:, length - size + 1 : length]
        source = source[:, :length] if text is None else source
        inside = None
    elif input_ids.shape[1] < size - 1:
        return None
    else:
        length = length.clamp(max=L).expand(B, 1)
        at = length - size + 1 + torch.arange(size - 1, device=length.device)
        prefix = torch.where(at >= 0, input_ids.long().gather(1, at.clamp(min=0)), -2)  # no text holds that
        inside = length >= size - 1
        if text is None:
            inside = inside & (torch.arange(L, device=length.device) < length)[:, size - 1 :]
    windows = source.shape[1] - size + 1
    if windows <= 0:
        return None
    if in_prompt:
        prompt_length = _prompt_length(call)
        last_of_window = torch.arange(size - 1, source.shape[1], device=source.device)
        generated = _length(call) - prompt_length >= size - 1
        here = (last_of_window < prompt_length) & generated
        inside = here if inside is None else inside & here
    matches = inside
    for j in range(size - 1):
        same = source[:, j : j + windows] == prefix[:, j : j + 1]
        matches = same if matches is None else matches & same
    last = source[:, size - 1 :]
    if matches is None:
        return Places.of_rows(last.long(), V)
    rows, columns = matches.expand(last.shape).nonzero(as_tuple=True)
    return Places.pairs(rows, last[rows, columns].long(), V)


def _find_sequences(sequences: Sequences, x: torch.Tensor, input_ids: torch.Tensor, call: Call) -> Places | None:
    """Last tokens of the sequences whose other tokens end the history; with biases, all last tokens and their sums."""
    B, V = x.shape
    length = _length(call)
    totals = None if sequences.begin is None else sequences.begin.to(x.dtype).expand(B, -1).clone()
    rows, tokens = [], []
    for prefixes, last, heads, biases in sequences.groups:
        P = prefixes.shape[1]
        if isinstance(length, int):
            if min(length, input_ids.shape[1]) < P:
                continue
            ends = input_ids[:, length - P : length]
        elif input_ids.shape[1] < P:
            continue
        else:
            column = (length - P + torch.arange(P, device=input_ids.device)).expand(B, P)
            ends = torch.where(column >= 0, input_ids.long().gather(1, column.clamp(min=0)), -1)
        matches = (ends.unsqueeze(1) == prefixes).all(-1)  # [B, K]
        row, which = matches.nonzero(as_tuple=True)
        if not row.shape[0]:
            continue
        if totals is None:
            rows.append(row)
            tokens.append(last[which])
        else:
            totals.index_add_(1, heads, torch.where(matches, biases, 0.0).to(x.dtype))
    if totals is not None:
        return Places.columns(sequences.last, totals)
    return Places.pairs(torch.cat(rows), torch.cat(tokens), V) if rows else None


def _find_repetitions(repetitions: Repetitions, x: torch.Tensor, input_ids: torch.Tensor, call: Call) -> Places | None:
    """Tokens that would extend what the history repeats, with the largest penalty of each."""
    V, device, length = x.shape[1], x.device, _length(call)
    range_, is_breaker, penalties = repetitions
    if isinstance(length, int):
        seen = max(0, min(length, input_ids.shape[1]))
        input_ids = input_ids[:, max(0, seen - range_) : seen]
    B, L = input_ids.shape
    if L < 2:
        return None
    back = torch.arange(min(LONGEST, L - 1), device=device)
    # Few places hold the last token at all.
    if isinstance(length, int):
        tail = input_ids.flip(1)[:, : back.shape[0]]  # from the end; [B, N]
        row, at = (input_ids[:, :-1] == tail[:, :1]).nonzero(as_tuple=True)
        before = at
    else:
        ends = length.clamp(0, L).expand(B, 1)
        begin = (ends - range_).clamp(min=0)
        tail = input_ids.gather(1, (ends - 1 - back).clamp(min=0))
        column = torch.arange(L - 1, device=device)
        inside = (column >= begin) & (column < ends - 1)
        row, at = ((input_ids[:, :-1] == tail[:, :1]) & inside).nonzero(as_tuple=True)
        before = at - begin[row, 0]
    matches = input_ids[row.unsqueeze(1), (at.unsqueeze(1) - back).clamp(min=0)] == tail[row]  # [M, N]
    matches &= (before.unsqueeze(1) >= back) & ~_holds(is_breaker, tail)[row]
    # A match is as long as its first difference is far from the end.
    matched = back.where(~matches, back.shape[0]).amin(1)
    token = input_ids[row, at + 1].long()
    penalty = torch.tensor(penalties, dtype=torch.promote_types(x.dtype, torch.float32), device=device)[matched]
    counts = (token >= 0) & (token < V) & (penalty > 0) & ~_holds(is_breaker, token)
    # Of a token that follows several matches, the longest counts.
    where, of = (row[counts] * V + token[counts]).unique(return_inverse=True)
    largest = penalty.new_zeros(where.shape[0]).scatter_reduce_(0, of, penalty[counts], "amax")
    return Places.pairs(where // V, where % V, V, largest)


def _holds(row: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Whether a set, bool ``[V]``, holds tokens."""
    V = row.shape[0]
    held: torch.Tensor = row[tokens.clamp(0, V - 1).long()] & (tokens >= 0) & (tokens < V)
    return held
