"""Log-probabilities of given tokens under the distribution that is sampled, with gradients: launches and operations.

Bytes moved, forward: one read of the logits where nothing is dropped; what a selection moves where rules act (one read,
two where they need sums over the row), two reads more of rows that it processes as a whole; with token ids, nothing but
the logits of these. Backward: one read and one write; with token ids, one write.

Rows are processed some at a time, so that a selection's workspace takes at most a fiftieth of the logits' memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from fastlogits_kernels.pointwise.fold import Chain
from fastlogits_kernels.rules import CODES, RULES, TIES, Rule
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.launcher import Launcher, is_collecting, launch_key, row_stride, triton
from fastlogits_kernels.runtime.library import NAMESPACE, library, register
from fastlogits_kernels.runtime.recent import recent
from fastlogits_kernels.selection import launch
from fastlogits_kernels.selection.launchers import LARGEST
from fastlogits_kernels.selection.layout import Selection, takes_rules
from fastlogits_kernels.selection.masses import BLOCK, weighs_certain
from fastlogits_kernels.training.gradient import gradient_kernel, listed_gradient_kernel
from fastlogits_kernels.training.reference import Task, reference_gradient_, reference_logprobs
from fastlogits_kernels.training.rows import (
    LISTED,
    PACKED,
    SELECTED,
    TILE,
    TILE_WORDS,
    WHOLE,
    WORDS,
    given_kernel,
    join_kernel,
    selected_kernel,
    tile_kernel,
)
from fastlogits_kernels.training.sets import GivenSets

OPERATION = Operation("logprobs")
_NAMES = tuple(RULES)
_NO_CHAIN = Chain()
_WORDS: int = WORDS.value
_TILE: int = TILE.value
# Of the logits' memory, what workspaces take at most; but room for so many rows in any case.
SHARE = 0.018
_LEAST_ROWS = 256
_LANES = 2
"""Streams on which parts of the rows take turns: while one of them decides, another one reads."""
# Tokens of a program of the backward pass: 16 bytes a thread, twice.
_PART = 2048
_LIST_BLOCK = 256

_tile_launcher = Launcher(tile_kernel, num_warps=4, enable_fp_fusion=False)
_join_launcher = Launcher(join_kernel, num_warps=4, enable_fp_fusion=False)
_selected_launcher = Launcher(selected_kernel, num_warps=4, enable_fp_fusion=False)
_given_launcher = Launcher(given_kernel, num_warps=4, enable_fp_fusion=False)
_gradient_launcher = Launcher(gradient_kernel, num_warps=4, enable_fp_fusion=False)
_listed_launcher = Launcher(listed_gradient_kernel, num_warps=4, enable_fp_fusion=False)


class Rows(NamedTuple):
    """Results of some rows."""

    logprobs: torch.Tensor
    """float32 ``[N]``."""
    entropy: torch.Tensor | None
    """float32 ``[N]``."""
    outside: torch.Tensor
    """bool ``[N]``: which targets wouldn't have been kept."""
    record: torch.Tensor
    """int32 ``[N, WORDS]``: what the backward pass needs."""

    @classmethod
    def empty(cls, N: int, entropy: bool, device: torch.device) -> Rows:
        """Room for the results of N rows."""
        return cls(
            torch.empty(N, dtype=torch.float32, device=device),
            torch.empty(N, dtype=torch.float32, device=device) if entropy else None,
            torch.empty(N, dtype=torch.bool, device=device),
            torch.empty((N, _WORDS), dtype=torch.int32, device=device),
        )

    def rows(self, begin: int, end: int) -> Rows:
        """Those of some of the rows."""
        return Rows(*(None if each is None else each[begin:end] for each in self))  # type: ignore[arg-type]


def takes(logits: torch.Tensor, task: Task, V: int | None = None) -> bool:
    """Whether the kernels do what is asked of these logits, or of a vocabulary of ``V`` of which they are a part."""
    return (
        OPERATION.takes(logits, launch.FORCE_KERNEL)
        and logits.dtype in LARGEST
        and (logits.shape[-1] if V is None else V) > 1
        and (task.kept is not None or takes_rules(task.rules))
    )


# -- Rows as views ---------------------------------------------------------------------------------------------------


def _views(logits: torch.Tensor) -> list[torch.Tensor]:
    """``logits`` ``[..., V]`` as tensors ``[n, V]`` of one stride between their rows, without a copy."""
    if logits.ndim == 2:
        return [logits]
    try:
        return [logits.view(-1, logits.shape[-1])]
    except RuntimeError:
        return [view for part in logits.unbind(0) for view in _views(part)]


def rows_in_parts(logits: torch.Tensor, most: int | None = None) -> Iterator[tuple[torch.Tensor, int, int]]:
    """Some rows of ``logits`` at a time, ``most`` at most, with the numbers of their first and of the next."""
    at = 0
    for view in _views(logits):
        each = len(view) if most is None else most
        for begin in range(0, len(view), max(1, each)):
            part = view[begin : begin + each]
            if len(part):
                yield part, at + begin, at + begin + len(part)
        at += len(view)


# -- The selection of a trainer --------------------------------------------------------------------------------------

_selections: dict[Any, Selection] = {}


def _selection_of(rules: Sequence[Rule], V: int, device: torch.device) -> Selection:
    """The rules as the kernels take them."""

    def make() -> Selection:
        return Selection(rules, V, device, many_rows=True)

    if any(isinstance(rule.value, torch.Tensor) for rule in rules):
        return make()
    return recent(_selections, (tuple(rules), V, device), make)


def _rows_at_once(logits: torch.Tensor, selection: Selection) -> int:
    """Rows of a part: the workspaces of all lanes together take a small share of the logits' memory.

    There are as many parts for each lane, of about as many rows.
    """
    bytes_of_row = 4 * selection.layouts[logits.element_size()].words_of_row
    most = max(_LEAST_ROWS, int(SHARE * logits.numel() * logits.element_size() / bytes_of_row))
    N = math.prod(logits.shape[:-1])
    if most >= N:
        return N
    turns = triton.cdiv(N, _LANES * max(1, most // _LANES))
    return int(triton.cdiv(N, _LANES * turns))


_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


@contextmanager
def _lanes(device: torch.device, parts: int) -> Iterator[Callable[[int], AbstractContextManager[Any]]]:
    """Where each of some parts of the rows is launched, by its number; what follows waits for all of them."""
    if device.type != "cuda" or parts < 2 or is_collecting():
        yield lambda _: nullcontext()
        return
    here = torch.cuda.current_stream(device)
    if device not in _streams:
        _streams[device] = [torch.cuda.Stream(device) for _ in range(_LANES - 1)]
    beside = _streams[device]
    for stream in beside:
        stream.wait_stream(here)
    streams = [here, *beside]
    try:
        yield lambda number: torch.cuda.stream(streams[number % len(streams)])
    finally:
        for stream in beside:
            here.wait_stream(stream)


# -- Forward ---------------------------------------------------------------------------------------------------------


def _part_of(per_row: torch.Tensor | None, begin: int, end: int) -> torch.Tensor | None:
    return per_row[begin:end] if per_row is not None and per_row.ndim else per_row


def dtypes_of(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """The dtypes of tensors, None for those that are none."""
    return tuple([None if each is None else each.dtype for each in tensors])


def launch_tiles(logits: torch.Tensor, task: Task, entropy: bool, offset: int = 0) -> torch.Tensor:
    """What the tiles of each row come to, float32 ``[N, tiles, 3]``; the first begins ``offset`` tokens before it."""
    N, V = logits.shape
    tiles = triton.cdiv(offset + V, _TILE)
    sums = torch.empty((N, tiles, TILE_WORDS.value), dtype=torch.float32, device=logits.device)
    temperature, targets = task.temperature, task.targets
    key = (
        *launch_key(logits),
        *dtypes_of(temperature, targets),
        entropy,
        index_key(task, targets),
        *integer_key(offset),
    )
    _tile_launcher(key, N * tiles, (
        logits, temperature, row_stride(temperature), targets, sums, V, tiles, offset, task.ignore_index,
        *logits.stride(), targets.stride(0), entropy, _TILE,
    ))  # fmt: skip
    return sums


def integer_key(number: int) -> tuple[bool, bool]:
    """What Triton knows of an integer below 2 ** 31."""
    return number == 1, number % 16 == 0


def _launch_whole(logits: torch.Tensor, task: Task, into: Rows) -> None:
    N, V = logits.shape
    entropy = into.entropy is not None
    sums = launch_tiles(logits, task, entropy)
    tiles = sums.shape[1]
    temperature, targets = task.temperature, task.targets
    key = (*launch_key(logits), *dtypes_of(temperature, targets), entropy, index_key(task, targets))
    _join_launcher(key, N, (
        logits, temperature, row_stride(temperature), targets, sums,
        into.logprobs, into.entropy, into.outside, into.record,
        V, tiles, task.ignore_index, *logits.stride(), targets.stride(0), triton.next_power_of_2(tiles),
    ))  # fmt: skip


def index_key(task: Task, targets: torch.Tensor) -> tuple[Any, ...]:
    """What Triton specialises of what isn't in ``launch_key``."""
    index = task.ignore_index
    return index == 1, index % 16 == 0, -(2**31) <= index < 2**31, targets.data_ptr() % 16, targets.stride(0) == 1


def _launch_selected(logits: torch.Tensor, task: Task, selection: Selection, into: Rows) -> None:
    work = launch.launch_select(logits, selection, temperature=task.temperature)
    layout = selection.layouts[logits.element_size()]
    temperature, targets = task.temperature, task.targets
    entropy = into.entropy is not None
    key = (
        *launch_key(logits), selection.form, *dtypes_of(temperature, targets), entropy, index_key(task, targets),
    )  # fmt: skip
    certain = weighs_certain(selection) and not entropy
    _selected_launcher(key, len(logits), (
        logits, temperature, row_stride(temperature), targets, work,
        into.logprobs, into.entropy, into.outside, into.record,
        logits.shape[1], *layout.shape, task.ignore_index, *logits.stride(), targets.stride(0), work.stride(0),
        selection.lowest_ties, selection.banded, certain, entropy, layout.PARTS, BLOCK, _TILE,
    ))  # fmt: skip


def sets_of(kept: GivenSets, V: int) -> tuple[tuple[Any, ...], tuple[int, ...], tuple[int, ...]]:
    """Pointers of given sets, their strides, and their shape: how many ids at most, and of which tokens."""
    ids, counts, offsets, bits, first, vocab = kept
    most = ids.shape[1] if ids is not None and ids.ndim == 2 else 0
    strides = (0 if ids is None or ids.ndim == 1 else ids.stride(0), row_stride(counts), row_stride(bits))
    return (ids, counts, offsets, bits), strides, (most, first, V if vocab is None else vocab)


def _launch_given(logits: torch.Tensor, task: Task, into: Rows) -> None:
    assert task.kept is not None
    temperature, targets = task.temperature, task.targets
    sets, strides, shape = sets_of(task.kept, logits.shape[1])
    entropy = into.entropy is not None
    key = (*launch_key(logits), *dtypes_of(temperature, targets, *sets), entropy, index_key(task, targets))
    _given_launcher(key, len(logits), (
        logits, temperature, row_stride(temperature), targets, *sets,
        into.logprobs, into.entropy, into.outside, into.record,
        logits.shape[1], *shape, task.ignore_index, *logits.stride(), targets.stride(0), *strides, entropy, BLOCK,
        _TILE,
    ))  # fmt: skip


@OPERATION.falls_back
def _forward(logits: torch.Tensor, task: Task, entropy: bool) -> Rows:
    N = len(task.targets)
    if not takes(logits, task):
        return _reference(logits, task, entropy)
    device = logits.device
    found = Rows.empty(N, entropy, device)
    V = logits.shape[-1]
    selection = None if task.kept is not None else _selection_of(task.rules, V, device)
    if selection is not None and not selection.kinds:  # no rule drops anything
        selection = None
    parts = list(rows_in_parts(logits, None if selection is None else _rows_at_once(logits, selection)))
    with _lanes(device, 1 if selection is None else len(parts)) as lane:
        for number, (part, begin, end) in enumerate(parts):
            its, into = task.rows(begin, end), found.rows(begin, end)
            with lane(number):
                if task.kept is not None:
                    _launch_given(part, its, into)
                elif selection is None:
                    _launch_whole(part, its, into)
                else:
                    own = _selection_of(its.rules, V, device) if selection.rows else selection
                    _launch_selected(part, its, own, into)
    return found


def _reference(logits: torch.Tensor, task: Task, entropy: bool) -> Rows:
    found: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]] = []
    for part, begin, end in rows_in_parts(logits):
        found.append(reference_logprobs(part, task.rows(begin, end), entropy))
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    empty = torch.empty(0, dtype=dtype, device=logits.device)
    columns = list(zip(*found, strict=True)) or [(empty,), (empty,), (empty.bool(),)]
    record = torch.zeros((len(task.targets), _WORDS), dtype=torch.int32, device=logits.device)
    entropies = torch.cat(columns[1]) if entropy else None
    return Rows(torch.cat(columns[0]), entropies, torch.cat(columns[2]), record)


# -- Backward --------------------------------------------------------------------------------------------------------


class Incoming(NamedTuple):
    """Gradients of log-probabilities and entropies, and the record of the forward pass."""

    grads: torch.Tensor
    entropy_grads: torch.Tensor | None
    record: torch.Tensor

    def rows(self, begin: int, end: int) -> Incoming:
        """Those of some of the rows."""
        return Incoming(*(None if each is None else each[begin:end] for each in self))  # type: ignore[arg-type]


def _launch_gradient(
    logits: torch.Tensor, task: Task, came: Incoming, out: torch.Tensor, vocab: int | None = None
) -> None:
    """Launch the gradient of ``logits``, a part of ``vocab`` tokens where that is given."""
    N, V = logits.shape
    temperature, targets = task.temperature, task.targets
    kept = task.kept or GivenSets()
    sets, strides, shape = sets_of(kept, V)
    source, lowest_ties, banded = _source(task, vocab or V)
    grads, entropy_grads, record = came
    key = (
        *launch_key(logits, out), *dtypes_of(temperature, targets, grads, entropy_grads, *sets), source, lowest_ties,
        banded, index_key(task, targets), grads.stride(0) == 1,
    )  # fmt: skip
    entropy_stride = row_stride(entropy_grads)
    values = own_values = None
    if source == LISTED.value:
        assert kept.ids is not None
        values = torch.empty(kept.ids.shape, dtype=torch.float32, device=logits.device)
        own_values = torch.empty(N, dtype=torch.float32, device=logits.device)
        listed = (
            logits, temperature, row_stride(temperature), targets, grads, entropy_grads, record, *sets[:3],
            values, own_values, out, V, *shape, task.ignore_index,
            *logits.stride(), *out.stride(), targets.stride(0), grads.stride(0), entropy_stride, *strides[:2],
        )  # fmt: skip
        _listed_launcher((*key, False), N, (*listed, False, _LIST_BLOCK))
    parts = triton.cdiv(V, _PART)
    _gradient_launcher(key, N * parts, (
        logits, temperature, row_stride(temperature), targets, grads, entropy_grads, record, *sets, out,
        V, parts, *shape, task.ignore_index,
        *logits.stride(), *out.stride(), targets.stride(0), grads.stride(0), entropy_stride, *strides,
        source, lowest_ties, banded, _PART,
    ))  # fmt: skip
    if source == LISTED.value:
        _listed_launcher((*key, True), N, (*listed, True, _LIST_BLOCK))


def _source(task: Task, V: int) -> tuple[int, bool, bool]:
    """How rows know what is kept, whether the lowest ids of ties are, and whether bands are."""
    if task.kept is not None:
        return (PACKED if task.kept.bits is not None else LISTED).value, False, False
    rules = [rule for rule in task.rules if not _is_idle(rule, V)]
    if not rules:
        return WHOLE.value, False, False
    lowest = any(rule.ties == "lowest" for rule in rules if rule.spec.takes_ties)
    return SELECTED.value, lowest, any(rule.spec.goal == "distance" for rule in rules)


def _is_idle(rule: Rule, V: int) -> bool:
    from fastlogits_kernels.rules import is_idle

    return is_idle(rule, V)


@OPERATION.falls_back
def _backward_(logits: torch.Tensor, task: Task, came: Incoming, out: torch.Tensor) -> None:
    """Write the gradient of ``logits`` ``[..., V]`` to ``out``, which may be these."""
    kernels = takes(logits, task)
    for (part, begin, end), into in zip(rows_in_parts(logits), _views_like(out, logits), strict=True):
        its, given = task.rows(begin, end), came.rows(begin, end)
        if kernels:
            _launch_gradient(part, its, given, into)
        else:
            reference_gradient_(given.grads, given.entropy_grads, part, its, into)


def _views_like(out: torch.Tensor, logits: torch.Tensor) -> list[torch.Tensor]:
    """``out`` as tensors of as many rows as ``rows_in_parts`` has of the logits."""
    if out is logits:
        return [part for part, _, _ in rows_in_parts(logits)]
    flat = out.view(-1, out.shape[-1])
    return [flat[begin:end] for _, begin, end in rows_in_parts(logits)]


# -- Operations ------------------------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor? temperature, int[] kinds, float[] values, Tensor? by_row, int ties, Tensor? ids, Tensor? counts, "
    "Tensor? offsets, Tensor? bits, int ignore_index"
)


def flattened(task: Task) -> tuple[Any, ...]:
    """What is asked, as arguments of the operations behind logits and targets.

    A rule with a value for each row has NaN for its number; the values of all these stand in one tensor.
    """
    rows = [rule.value.double() for rule in task.rules if isinstance(rule.value, torch.Tensor)]
    values = [math.nan if isinstance(rule.value, torch.Tensor) else float(rule.value) for rule in task.rules]
    kinds = [CODES[rule.kind] for rule in task.rules]
    ties = TIES.index(task.rules[0].ties) if task.rules else 0
    by_row = torch.stack(rows) if rows else None
    sets = (task.kept or GivenSets())[:4]
    return (task.temperature, kinds, values, by_row, ties, *sets, task.ignore_index)


def _task(targets: torch.Tensor, *flat: Any) -> Task:
    temperature, kinds, values, by_row, ties, ids, counts, offsets, bits, ignore_index = flat
    rows = iter(() if by_row is None else by_row)
    rules: list[Rule] = []
    for kind, value in zip(kinds, values, strict=True):
        spec = RULES[_NAMES[kind]]
        each = next(rows).to(torch.int64 if spec.integer else torch.float32) if math.isnan(value) else value
        rules.append(Rule(spec.name, each, ties=TIES[ties]))
    kept = None if ids is None and bits is None else GivenSets(ids, counts, offsets, bits)
    return Task(targets, temperature, rules, kept, ignore_index)


def _run_forward(logits: torch.Tensor, targets: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    *flat, entropy = rest
    found = _forward(logits.detach(), _task(targets, *flat), entropy)
    entropies = found.logprobs.new_empty(0) if found.entropy is None else found.entropy
    return found.logprobs, entropies, found.outside, found.record


def _fake_forward(logits: torch.Tensor, targets: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    N = targets.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    entropies = logits.new_empty((N if rest[-1] else 0,), dtype=dtype)
    return (
        logits.new_empty((N,), dtype=dtype), entropies, logits.new_empty((N,), dtype=torch.bool),
        logits.new_empty((N, _WORDS), dtype=torch.int32),
    )  # fmt: skip


def _run_backward(
    grads: torch.Tensor, entropy_grads: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor,
    record: torch.Tensor, *flat: Any,
) -> torch.Tensor:  # fmt: skip
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_(logits.detach(), _task(targets, *flat), Incoming(grads, entropy_grads, record), out)
    return out


def _fake_backward(grads: Any, entropy_grads: Any, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


register(
    f"logprobs(Tensor logits, Tensor targets, {_ARGUMENTS}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_forward,
    _fake_forward,
)
register(
    "logprobs_backward(Tensor grads, Tensor? entropy_grads, Tensor logits, Tensor targets, Tensor record, "
    f"{_ARGUMENTS}) -> Tensor",
    _run_backward,
    _fake_backward,
)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, targets, temperature, kinds, values, by_row, ties, *sets, ignore_index, entropy = inputs
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(logits, targets, output[3], temperature, by_row, *sets)
    ctx.given = (kinds, values, ties, ignore_index, entropy)


def _differentiate(ctx: Any, grads: torch.Tensor, entropy_grads: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    logits, targets, record, temperature, by_row, *sets = ctx.saved_tensors
    kinds, values, ties, ignore_index, entropy = ctx.given
    gradient = torch.ops.fastlogits.logprobs_backward(
        grads, entropy_grads if entropy else None, logits, targets, record, temperature, kinds, values, by_row, ties,
        *sets, ignore_index,
    )  # fmt: skip
    return (gradient, *(None,) * 12)


def _differentiate_twice(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("logprobs has no second derivatives: its gradient is a constant to torch")


class _Constant(torch.autograd.Function):
    """A gradient that depends on the logits, as far as torch is to know: so it is no use to differentiate it."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient."""
        return gradient.view_as(gradient)

    backward = staticmethod(_differentiate_twice)


def once_only(gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A gradient of some logits; where a graph of it is made, one that raises if it is differentiated."""
    return _Constant.apply(gradient, logits) if torch.is_grad_enabled() else gradient


torch.library.register_autograd(f"{NAMESPACE}::logprobs", _differentiate, setup_context=_set_up, lib=library)
torch.library.register_autograd(f"{NAMESPACE}::logprobs_backward", _differentiate_twice, lib=library)


class _InPlace(torch.autograd.Function):
    """The same, whose gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, task: Task, entropy: bool) -> tuple[torch.Tensor, ...]:
        """Log-probabilities, entropies and what is outside."""
        found = _forward(logits.detach(), task, entropy)
        ctx.save_for_backward(logits, found.record)
        ctx.task, ctx.entropy = task, entropy
        ctx.mark_non_differentiable(found.outside)
        entropies = found.logprobs.new_empty(0) if found.entropy is None else found.entropy
        return found.logprobs, entropies, found.outside

    @staticmethod
    def backward(ctx: Any, *came: Any) -> tuple[Any, ...]:
        """The gradient of the logits, in their memory."""
        logits, record = ctx.saved_tensors
        out = logits.detach()
        _backward_(out, ctx.task, Incoming(came[0], came[1] if ctx.entropy else None, record), out)
        return once_only(out, logits), None, None


def logprobs(
    logits: torch.Tensor, task: Task, entropy: bool = False, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Log-probabilities ``[N]`` of the targets of ``logits``, entropies if asked for, and which targets are outside.

    Differentiable with respect to the logits.

    Args:
        logits: float32, float16, bfloat16 or, on the CPU, float64, ``[N, V]`` or ``[B, T, V]`` with B * T = N; any
            strides.
        task: what is asked.
        entropy: whether entropies are.
        in_place: whether the gradient takes the place of the logits, which nobody may read any more then.
    """
    if in_place and not torch.compiler.is_compiling():
        found, entropies, outside = _InPlace.apply(logits, task, entropy)
    else:
        found, entropies, outside, _ = torch.ops.fastlogits.logprobs(logits, task.targets, *flattened(task), entropy)
    return found, entropies if entropy else None, outside
