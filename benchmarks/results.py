"""What a run yields: one result per contender, size and metric, and the CSV file that they are appended to."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from fastlogits_kernels._triton import HAS_TRITON, triton

from benchmarks.timing import Timing
from benchmarks.workloads import ADD, COPY, LOOP, Case, device_name

COLUMNS = (
    "timestamp", "commit", "python", "torch", "triton", "transformers", "device", "threads",
    "workload", "contender", "batch", "vocab", "ids", "dtype", "in_place",
    "metric", "median", "p10", "p90", "ratio_to_loop", "ratio_to_copy", "ratio_to_add",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One time, or why there is none.

    Args:
        metric: "gpu_us", "host_us" or "cpu_us".
        timing: None where the contender computed something wrong or can't be timed this way.
        remark: the reason then, in a word or two for the table.
    """

    workload: str
    case: Case
    contender: str
    in_place: bool
    metric: str
    timing: Timing | None
    remark: str = ""


class Results:
    """The results of a run, in order, and the lookups that reports need."""

    def __init__(self, results: Iterable[Result] = ()) -> None:
        self.all: list[Result] = []
        self._found: dict[tuple[str, Case, str, str], Result] = {}
        for result in results:
            self.add(result)

    def add(self, result: Result) -> None:
        """Append one."""
        self.all.append(result)
        self._found[result.workload, result.case, result.metric, result.contender] = result

    def time(self, like: Result, contender: str) -> float | None:
        """Median of another contender in the same workload, size and metric, in microseconds."""
        found = self._found.get((like.workload, like.case, like.metric, contender))
        return None if found is None or found.timing is None else found.timing.median

    def ratio(self, result: Result, contender: str) -> float | None:
        """How often another contender's time goes into this one's."""
        other = self.time(result, contender)
        return None if other is None or result.timing is None else result.timing.median / other


def slug(device: torch.device) -> str:
    """The device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def commit() -> str:
    """The commit measured, short; ``FASTLOGITS_COMMIT`` says it where there is no git."""
    if "FASTLOGITS_COMMIT" in os.environ:
        return os.environ["FASTLOGITS_COMMIT"]
    # Results of an earlier run don't change what is measured.
    status = ["status", "--porcelain", "--", ":/", ":!results"]
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+dirty" if _git(*status) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append_csv(results: Results, device: torch.device, folder: Path) -> Path:
    """Append the times taken on a device to its file.

    Raises:
        ValueError: the file has other columns.
    """
    path = folder / f"{slug(device)}.csv"
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if tuple(header) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes; move it away")
    run = {
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "",
        "transformers": transformers.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": "float32",
    }
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        for result in results.all:
            if result.case.device == device and result.timing is not None:
                writer.writerow({**run, **_fields(results, result, result.timing)})
    return path


def _fields(results: Results, result: Result, timing: Timing) -> dict[str, object]:
    ratios = {"loop": LOOP, "copy": COPY, "add": ADD}
    found = {name: results.ratio(result, contender) for name, contender in ratios.items()}
    return {
        "workload": result.workload,
        "contender": result.contender,
        "batch": result.case.batch,
        "vocab": result.case.vocab,
        "ids": result.case.ids,
        "in_place": result.in_place,
        "metric": result.metric,
        "median": f"{timing.median:.3f}",
        "p10": f"{timing.p10:.3f}",
        "p90": f"{timing.p90:.3f}",
        **{f"ratio_to_{name}": "" if ratio is None else f"{ratio:.5f}" for name, ratio in found.items()},
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
