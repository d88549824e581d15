"""Where the GPU time of a call goes, kernel by kernel, by the profiler.

    python -m benchmarks phases --workload 'draw T k p' 'serving*'
    python -m benchmarks phases --workload serving --size 64x128256 --dtype bfloat16

Kernels of a call overlap from Hopper on, where one begins before the last one ends: so they may add up to more than
the call takes by graph replay, which is shown beside them. Everything is appended to a file in
``build/benchmarks/phases``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.folders import LOCAL
from benchmarks.inputs import GAUSS, LOGITS, Case, device_name, random_scores, size_of
from benchmarks.results import environment, read_rows, slug, write_rows
from benchmarks.timing import Call, NotCapturableError, ReplayBunch, interleaved
from benchmarks.workloads import OURS, WORKLOADS, is_named

RESULTS = LOCAL / "phases"
_CALLS = 20


class Phase(NamedTuple):
    """A kernel or a copy of a call."""

    kernel: str
    launches: float
    """In a call."""
    us: float
    """Microseconds of all of them in a call."""


def phases_of(call: Call, calls: int = _CALLS) -> list[Phase]:
    """The kernels and copies of a call, the longest first; none where the profiler isn't allowed to look."""
    for _ in range(2):  # the first recording starts the profiler, which loses events
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
    found = [
        Phase(event.key, event.count / calls, event.self_device_time_total / calls)
        for event in profile.key_averages()
        if event.self_device_time_total
    ]
    return sorted(found, key=lambda phase: -phase.us)


def _replayed_us(call: Call) -> float | None:
    try:
        return interleaved({"call": ReplayBunch([call])}, 0.2)["call"].median
    except NotCapturableError:
        return None


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and append to the file of the device; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks phases", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workload", nargs="+", metavar="NAME", required=True, help="such as 'draw T k p' 'serving*'")
    parser.add_argument("--size", nargs="+", type=size_of, default=[(1, 128256), (64, 128256)], metavar="BxV")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--logits", default=GAUSS, choices=list(LOGITS))
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    names = [name for name in WORKLOADS if is_named(name, options.workload)]
    if not names:
        parser.error(f"--workload: nothing is called {options.workload}; there are {', '.join(map(repr, WORKLOADS))}")
    console = Console()
    if not torch.cuda.is_available():
        console.print("kernels are timed on a GPU, and there is none here")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[dict[str, Any]] = []
    for name in names:
        for batch, vocab in options.size:
            ids = 10 if WORKLOADS[name].takes_ids else 0
            case = Case(device, batch, vocab, ids, options.logits, getattr(torch, options.dtype))
            rows += _measured(name, case, console)
    path = options.out / f"{slug(device_name(device))}.csv"
    if rows:
        write_rows(path, [*read_rows(path), *rows])
        console.print(f"appended to {path}", markup=False)
    return 0


def _measured(name: str, case: Case, console: Console) -> list[dict[str, Any]]:
    contenders = [each for each in WORKLOADS[name].contenders(case) if each.name in OURS]
    rows: list[dict[str, Any]] = []
    for contender in contenders:
        call = contender.bind(random_scores(case))
        for _ in range(3):
            call()
        phases, replayed = phases_of(call), _replayed_us(call)
        title = f"{name}, {contender.name}, {case.size} {case.dtype_name} {case.logits}"
        table = Table("kernel", "launches", "us", title=title, title_justify="left")
        for phase in phases:
            table.add_row(phase.kernel, f"{phase.launches:g}", f"{phase.us:.1f}")
        total = sum(phase.us for phase in phases)
        shown = "not capturable" if replayed is None else f"{replayed:.1f} us by graph replay"
        table.caption = f"together {total:.1f} us; {shown}"
        console.print(table)
        about = {
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"), **environment(),
            "device": device_name(case.device), "workload": name, "contender": contender.name, "batch": case.batch,
            "vocab": case.vocab, "dtype": case.dtype_name, "logits": case.logits,
            "replayed_us": "" if replayed is None else f"{replayed:.2f}",
        }  # fmt: skip
        rows += [about | {"kernel": e.kernel, "launches": f"{e.launches:g}", "us": f"{e.us:.2f}"} for e in phases]
    return rows
