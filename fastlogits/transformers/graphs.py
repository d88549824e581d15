"""The steps that are kept for calls to come, and which call may use one that is there."""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import torch

from fastlogits.plan.plan import Plan
from fastlogits.token_mask import TokenMask

if TYPE_CHECKING:
    from fastlogits.transformers.step import Step

MOST = 4
"""How many steps are kept, each with its cache; the one that was used longest ago makes room."""


class Graphs:
    """The steps of a process, by model and kind of call.

    One call uses them at a time, since graphs share their memory; another one meanwhile does without.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, Hashable], Step] = {}
        self._known: dict[int, weakref.finalize[[int], Any]] = {}
        self._refused: dict[tuple[int, Hashable], str] = {}
        self._busy = threading.Lock()
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Event | None = None

    @contextmanager
    def reserved(self, device: torch.device) -> Iterator[bool]:
        """Reserve them for a call on a device; False where another call has them."""
        if not self._busy.acquire(blocking=False):
            yield False
            return
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                if self._last is not None:
                    # The call before may have been on another stream, with steps that went beyond the end.
                    torch.cuda.current_stream().wait_event(self._last)
                try:
                    yield True
                finally:
                    if device.type == "cuda":
                        self._last = torch.cuda.current_stream().record_event()
        finally:
            self._busy.release()

    def get(self, model: Any, key: Hashable) -> Step | None:
        """The step that is kept for a kind of call of a model."""
        step = self._kept.pop((id(model), key), None)
        if step is not None:
            self._kept[id(model), key] = step
        return step

    def keep(self, model: Any, key: Hashable, step: Step) -> None:
        """Keep a step for as long as its model lives, and is used."""
        self._know(model)
        self._kept[id(model), key] = step
        while len(self._kept) > MOST:
            self._kept.pop(next(iter(self._kept))).release()

    def refused(self, model: Any, key: Hashable) -> str | None:
        """Why a kind of step of a model can't be captured, as far as that is known."""
        return self._refused.get((id(model), key))

    def refuse(self, model: Any, key: Hashable, reason: str) -> None:
        """Take note of why a kind of step of a model can't be captured."""
        self._know(model)
        self._refused[id(model), key] = reason

    def capture(self, step: Step, model: Any, call: Callable[..., Any]) -> None:
        """Capture a step, in the memory that all graphs share.

        Raises:
            Exception: it can't be captured; then there is no graph at all.
        """
        device = step.tokens.device
        graphs = [each.graph for each in self._kept.values() if each.graph is not None and each.tokens.device == device]
        if not graphs or self._stream is None or self._stream.device != device:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        try:
            step.capture(model, call, graphs[0].pool() if graphs else None, self._stream)
        except BaseException:
            for each in self._kept.values():  # nobody knows what has become of the memory that they share
                each.release()
            raise

    def drop(self, model: Any = None) -> None:
        """Drop what is kept: all, or that of a model."""
        self._drop(None if model is None else id(model))

    def _know(self, model: Any) -> None:
        if id(model) not in self._known:
            self._known[id(model)] = weakref.finalize(model, self._drop, id(model))

    def _drop(self, which: int | None) -> None:
        for key in [key for key in self._kept if which in (None, key[0])]:
            step = self._kept.pop(key, None)
            if step is not None:
                step.release()
        for key in [key for key in self._refused if which in (None, key[0])]:
            self._refused.pop(key, None)
        for number in [number for number in self._known if which in (None, number)]:
            known = self._known.pop(number, None)
            if known is not None:
                known.detach()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Step]:
        return iter(list(self._kept.values()))


GRAPHS = Graphs()


# -- What makes two calls one kind ---------------------------------------------------------------------------------


class _Itself:
    """A thing that equals nothing else; it is kept, so that nothing else gets its id."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._thing is other._thing

    def __hash__(self) -> int:
        return id(self._thing)


def kind_of(value: Any) -> Hashable:
    """What is equal for values that a captured step may take for each other."""
    if value is None or isinstance(value, (str, int, float, bool, torch.dtype, torch.device, TokenMask)):
        return type(value), value
    if isinstance(value, functools.partial):
        return kind_of(value.func), kind_of(value.args), kind_of(value.keywords)
    if isinstance(value, types.MethodType):
        return kind_of(value.__func__), _Itself(value.__self__)
    if isinstance(value, types.FunctionType):  # one that a stage makes anew does what it did
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:  # a cell that is still empty
            return _Itself(value)
        return value.__code__, kind_of(value.__defaults__), kind_of(cells)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(kind_of(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(kind_of, value))
    if isinstance(value, dict):
        return type(value), tuple((name, kind_of(each)) for name, each in value.items())
    if isinstance(value, torch.Tensor) and value.numel() < 2**16:  # once for each call, this may wait for the GPU
        return value.dtype, tuple(value.shape), tuple(value.flatten().tolist())
    return _Itself(value)


def kind_of_plan(plan: Plan) -> Hashable:
    """What plans have in common that do the same to the same logits."""
    return tuple(kind_of(member.stage) for part in plan.inner_parts for member in part.members)


def state_of(model: Any) -> Hashable:
    """What a captured forward pass takes for granted of a model: where its weights are, and how it is set."""
    at = [(tensor.data_ptr(), tensor.dtype) for tensor in model.parameters()]
    at += [(tensor.data_ptr(), tensor.dtype) for tensor in model.buffers()]
    adapters = []
    for module in model.modules():
        with suppress(Exception):  # adapters of PEFT: switched without a change of weights
            adapters += [(repr(module.active_adapters), bool(module.disable_adapters), bool(module.merged))]
    config = model.config
    attention = tuple(
        str(getattr(each, "_attn_implementation", None)) for each in (config, config.get_text_config(decoder=True))
    )
    return tuple(at), tuple(adapters), bool(model.training), attention
