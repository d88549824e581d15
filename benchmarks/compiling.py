"""How long a first call compiles, in fresh processes: with an empty cache, then with a full one.

    python -m benchmarks compile                    # the main workloads, on a GPU
    python -m benchmarks compile --workload serving 'draw *' --dtype bfloat16

The clock starts when the process is ready: packages imported, the GPU running, the logits made. It stops when the first
call of fastlogits has its result. What Triton compiles for itself in an empty cache counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.folders import LOCAL
from benchmarks.inputs import Case, device_name, random_scores
from benchmarks.results import environment, read_rows, slug, write_rows
from benchmarks.workloads import OURS, WORKLOADS, is_named

ROOT = Path(__file__).parents[1]
RESULTS = LOCAL / "compile"
_LONGEST_S = 600
_IDS = 10


class First(NamedTuple):
    """The times of a first call."""

    cold_s: float
    """With an empty cache."""
    cached_s: float
    """With that cache, in another process."""
    kernels: int
    """Kernels in that cache."""


def first_calls(name: str, case: Case, turns: int = 1) -> dict[str, First]:
    """The medians of some turns for each of our contenders. A turn is two fresh processes.

    Raises:
        RuntimeError: a process failed; the message says what it printed last.
    """
    found: dict[str, First] = {}
    for contender in WORKLOADS[name].contenders(case):
        if contender.name not in OURS:
            continue
        each = []
        for _ in range(turns):
            with tempfile.TemporaryDirectory(prefix="fastlogits-cache-") as cache:
                cold, cached = (_in_a_process(name, contender.name, case, cache) for _ in range(2))
                # A file of machine code for each: of NVIDIA's GPUs, or of AMD's.
                kernels = sum(len(list(Path(cache).rglob(kind))) for kind in ("*.cubin", "*.hsaco"))
                each.append(First(cold, cached, kernels))
        found[contender.name] = First(
            statistics.median(one.cold_s for one in each),
            statistics.median(one.cached_s for one in each),
            each[-1].kernels,
        )
    return found


def _in_a_process(name: str, contender: str, case: Case, cache: str) -> float:
    given = [name, contender, str(case.device), case.batch, case.vocab, case.ids, case.logits, case.dtype_name]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiling", json.dumps(given)],
        cwd=ROOT, env={**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=_LONGEST_S,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing printed"])[-1]
        raise RuntimeError(f"{name}, {contender}, {case.size}: the process of a first call failed: {last}")
    return float(done.stdout.strip().splitlines()[-1])


def _first_call(
    name: str, contender: str, device: str, batch: int, vocab: int, ids: int, logits: str, dtype: str
) -> float:
    """Seconds of the first call of this process."""
    case = Case(torch.device(device), batch, vocab, ids, logits, getattr(torch, dtype))
    scores = random_scores(case)
    (chosen,) = [each for each in WORKLOADS[name].contenders(case) if each.name == contender]
    _wait(case.device)
    start = time.perf_counter()
    # Binding makes the processors: their tables are part of the wait.
    chosen.bind(scores)()
    _wait(case.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str]) -> int:
    """Measure, print, and append to the file of the device.

    Returns:
        The exit status: 1 where a process failed.
    """
    parser = argparse.ArgumentParser("python -m benchmarks compile", description="Seconds that a first call compiles.")
    parser.add_argument("--workload", nargs="+", metavar="NAME", help="'chain 9' 'draw *'; default: the main ones")
    parser.add_argument("--device", default="cuda", help="default: cuda; a CPU compiles nothing")
    parser.add_argument(
        "--batch", type=int, default=8, help="default: %(default)s; changes nothing of what is compiled"
    )
    parser.add_argument("--vocab", type=int, default=128256, help="default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--turns", type=int, default=1, help="of which the median is kept; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            "--device must be a GPU that torch can use, got 'cuda' where there is none: nothing is compiled here"
        )
    device, patterns = torch.device(options.device), options.workload
    names = [
        name
        for name, workload in WORKLOADS.items()
        if (workload.main if patterns is None else is_named(name, patterns))
    ]
    if not names:
        parser.error(f"--workload: nothing is called {patterns}; there are {', '.join(map(repr, WORKLOADS))}")
    status = 0
    rows: list[dict[str, Any]] = []
    print(
        f"{'workload':24} {'by':24} {'kernels':>7} {'cold':>8} {'cached':>8}   {device_name(device)}, {_cores()} cores"
    )
    for name in names:
        ids = _IDS if WORKLOADS[name].takes_ids else 0
        case = Case(device, options.batch, options.vocab, ids, dtype=getattr(torch, options.dtype))
        try:
            found = first_calls(name, case, options.turns)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        for contender, first in found.items():
            print(
                f"{name:24} {contender:24} {first.kernels:7} {first.cold_s:6.2f} s {first.cached_s:6.2f} s", flush=True
            )
            rows.append(_row(name, contender, case, first, options.turns))
    path = options.out / f"{slug(device_name(device))}.csv"
    if rows:
        write_rows(path, [*read_rows(path), *rows])
        print(f"appended to {path}")
    return status


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _row(name: str, contender: str, case: Case, first: First, turns: int) -> dict[str, Any]:
    """A row of a results file."""
    about = {key: value for key, value in environment().items() if key != "threads"}
    return {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **about, "device": device_name(case.device), "cores": _cores(),
        "workload": name, "contender": contender, "batch": case.batch, "vocab": case.vocab, "dtype": case.dtype_name,
        "turns": turns, "kernels": first.kernels, "cold_s": f"{first.cold_s:.3f}", "cached_s": f"{first.cached_s:.3f}",
    }  # fmt: skip


if __name__ == "__main__":
    print(_first_call(*json.loads(sys.argv[1])))
