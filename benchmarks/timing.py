"""Timing of calls: by the host's clock or by graph replay, in bunches, with all contenders interleaved."""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

Call: TypeAlias = Callable[[], torch.Tensor]
"""A contender with its tensors; it takes no arguments."""

Bunch: TypeAlias = Callable[[], float]
"""Runs a call as often as a clock needs and returns microseconds per call."""

# Long against the resolution of the clocks. Too short to fill the queue of a GPU, which holds about a thousand launches
# of 4 us or more: then the host would wait.
_BUNCH_US = 1500.0
_MAX_CALLS = 500
_SLOW_US = 10_000.0
_LEAD_IN = 5
_MIN_ROUNDS, _MAX_ROUNDS = 5, 60


class NotCapturableError(RuntimeError):
    """The call waits for the GPU or does something else that a CUDA graph can't hold."""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call, over the rounds."""

    median: float
    p10: float
    p90: float


class WallBunch:
    """Host time of a call: calls in a row, with the device idle before and after them.

    Args:
        call: what to time.
        device: where it works; on CUDA it is not synchronised between calls.
        wait: whether the time ends when the device is done, not when the host is.
    """

    def __init__(self, call: Call, device: torch.device, wait: bool = False) -> None:
        self._call = call
        self._wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
        self._last = self._wait if wait else _nothing
        self._calls = 1
        self._calls = _calls_for(_settled(self))

    def __call__(self) -> float:
        """Time one bunch."""
        call = self._call
        self._wait()
        start = time.perf_counter_ns()
        for _ in range(self._calls):
            call()
        self._last()
        elapsed = time.perf_counter_ns() - start
        self._wait()
        return elapsed / self._calls / 1e3


class ReplayBunch:
    """GPU time of a call: a graph that holds one call, replayed back-to-back between two events.

    Args:
        calls: the same call, each time on other tensors; they are replayed in turn. One suffices if its inputs
            may be warm; otherwise they should outgrow the L2 together.

    Raises:
        NotCapturableError: the call can't be captured.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        calls[0]()  # the first call may wait while it builds what the others use
        if _waits_for_gpu(calls[0]):
            raise NotCapturableError("it waits for the GPU")
        captured = [_capture(call) for call in calls]
        self._graphs = [graph for graph, _ in captured]
        # The outputs are kept, so that no graph writes into another's; and the calls, whose tensors the graphs read.
        self._outputs = [output for _, output in captured]
        self._kept = calls
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._turns = 1
        self._turns = -(-_calls_for(_settled(self)) // len(calls))

    def once(self) -> torch.Tensor:
        """Replay the first call alone and return its output."""
        self._graphs[0].replay()
        return self._outputs[0]

    def __call__(self) -> float:
        """Time one bunch."""
        # The host gets ahead of the GPU while these run, so that no gap between launches is timed.
        for _ in range(_LEAD_IN):
            self._graphs[-1].replay()
        self._start.record()
        for _ in range(self._turns):
            for graph in self._graphs:
                graph.replay()
        self._end.record()
        self._end.synchronize()
        elapsed_ms: float = self._start.elapsed_time(self._end)
        return elapsed_ms * 1e3 / (self._turns * len(self._graphs))


def interleaved(bunches: Mapping[str, Bunch], budget_s: float) -> dict[str, Timing]:
    """Time all contenders in turn, round by round.

    Args:
        bunches: what to time, by name.
        budget_s: seconds to spend; a few rounds are run in any case.
    """
    names = list(bunches)
    rounds: dict[str, list[float]] = {name: [] for name in names}
    # Who runs after whom decides what the caches hold: in shuffled order that evens out.
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(_MAX_ROUNDS):
            if done >= _MIN_ROUNDS and time.perf_counter() - start > budget_s:
                break
            shuffle(names)
            for name in names:
                rounds[name].append(bunches[name]())
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(values) for name, values in rounds.items()}


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy moves, read and write, between tensors that no cache holds."""
    size = 2**28 if device.type == "cuda" else 2**26
    source = torch.zeros(size, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"": WallBunch(lambda: target.copy_(source), device, wait=True)}, 0.2)[""]
    return 2 * source.nbytes / timing.median * 1e6


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Most bytes that a call has allocated at once, beyond what was before; None on the CPU, where nobody counts."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _timing(values: Sequence[float]) -> Timing:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(statistics.median(values), deciles[0], deciles[-1])


def _calls_for(us: float) -> int:
    return max(1, min(_MAX_CALLS, int(_BUNCH_US / max(us, 1e-3))))


def _settled(bunch: Bunch) -> float:
    """What a bunch says once kernels are compiled, tables built and caches warm; a slow one is not asked often."""
    bunch()
    us = bunch()
    for _ in range(3):
        if us > _SLOW_US:
            break
        us = min(us, bunch())
    return us


def _nothing() -> None:
    return None


def _waits_for_gpu(call: Call) -> bool:
    """Whether a call waits for the GPU; asked before a capture, because a failed capture leaves its traces."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return False


def _capture(call: Call) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # as torch asks for, lest the capture hold what only a first call does
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = call()
    except RuntimeError as error:
        raise NotCapturableError(str(error).splitlines()[0]) from error
    return graph, output
