"""The results of a run: one per contender, size and metric, and the CSV file that they are appended to."""

from __future__ import annotations

import csv
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from fastlogits_kernels.runtime.launcher import HAS_TRITON, triton

from benchmarks.inputs import Case, device_name
from benchmarks.timing import Timing

_ONE_RUN = timedelta(days=1)


@dataclass(frozen=True)
class Result:
    """One time, or why there is none.

    Args:
        metric: "gpu_us", "host_us" or "cpu_us".
        timing: None if the contender computed something wrong or can't be timed this way.
        remark: the reason then; the part before a colon is for tables.
        peak_bytes: most bytes that the call has allocated at once; None if nothing counts them.
        limit_us: the memory-bandwidth limit: the time to move the workload's bytes at the bandwidth measured in the
            run; None for yardsticks.
    """

    workload: str
    case: Case
    contender: str
    in_place: bool
    metric: str
    timing: Timing | None
    remark: str = ""
    peak_bytes: int | None = None
    limit_us: float | None = None


@dataclass(frozen=True)
class Record:
    """One row of a results file: a result, and what it was measured with."""

    timestamp: str
    commit: str
    python: str
    torch: str
    triton: str
    transformers: str
    device: str
    threads: int
    workload: str
    contender: str
    batch: int
    vocab: int
    ids: int
    logits: str
    dtype: str
    cache: str
    in_place: bool
    metric: str
    median: float | None
    p10: float | None
    p90: float | None
    peak_bytes: int | None
    limit_us: float | None
    remark: str

    @property
    def what(self) -> tuple[object, ...]:
        """What a later measurement of the same thing has in common with it."""
        return (
            self.device, self.workload, self.contender, self.batch, self.vocab, self.ids, self.logits, self.dtype,
            self.cache, self.metric,
        )  # fmt: skip


COLUMNS = tuple(column.name for column in fields(Record))
"""The columns of every results file."""


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
        """This result's time divided by another contender's."""
        other = self.time(result, contender)
        return None if other is None or result.timing is None else result.timing.median / other


def slug(device: str) -> str:
    """A device's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def environment() -> dict[str, Any]:
    """The columns of a results file for the code and the packages, without the device."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else "",
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def commit() -> str:
    """The commit measured, short; ``FASTLOGITS_COMMIT`` says it where there is no git."""
    if "FASTLOGITS_COMMIT" in os.environ:
        return os.environ["FASTLOGITS_COMMIT"]
    # Results of an earlier run don't change what is measured.
    status = ["status", "--porcelain", "--", ":/", ":!results", ":!../README.md"]
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+dirty" if _git(*status) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def records_of(results: Sequence[Result]) -> list[Record]:
    """Results as rows of their device's file, without contenders that aren't installed."""
    timestamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return [
        Record(timestamp=timestamp, **environment(), **_fields(result))
        for result in results
        if not result.remark.startswith("not installed")
    ]


def append_csv(records: Sequence[Record], path: Path) -> None:
    """Append rows to a file, which begins with the columns.

    Raises:
        ValueError: the file has other columns.
    """
    if path.exists():
        _check_columns(path)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: _cell(getattr(record, name)) for name in COLUMNS} for record in records)


def read_csv(path: Path) -> list[Record]:
    """The rows of a file.

    Raises:
        ValueError: the file has other columns.
    """
    _check_columns(path)
    with path.open(newline="") as file:
        return [Record(**{name: _READ[name](text) for name, text in row.items()}) for row in csv.DictReader(file)]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file of these rows, which all have the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, whatever its columns; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_folder(folder: Path) -> list[Record]:
    """The rows of all files in a folder, each file's in their order."""
    return [record for path in sorted(folder.glob("*.csv")) for record in read_csv(path)]


def newest(records: Iterable[Record]) -> list[Record]:
    """Of all measurements of the same thing the last one; none of more than a day before the device's last.

    What is older is of other code, and not to be shown beside what is new.
    """
    last = {record.what: record for record in records}.values()
    ends: dict[str, datetime] = {}
    for record in last:
        ends[record.device] = max(ends.get(record.device, _when(record)), _when(record))
    return [record for record in last if ends[record.device] - _when(record) <= _ONE_RUN]


def _when(record: Record) -> datetime:
    return datetime.fromisoformat(record.timestamp)


def _check_columns(path: Path) -> None:
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path} has other columns than this version writes; move it away")


def _number(text: str) -> float | None:
    return float(text) if text else None


_READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(COLUMNS, str),
    **dict.fromkeys(("threads", "batch", "vocab", "ids"), int),
    **dict.fromkeys(("median", "p10", "p90", "limit_us"), _number),
    "peak_bytes": lambda text: int(text) if text else None,
    "in_place": lambda text: text == "True",
}


def _cell(value: object) -> object:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else value


def _fields(result: Result) -> dict[str, Any]:
    case, timing = result.case, result.timing
    return {
        "device": device_name(case.device),
        "workload": result.workload,
        "contender": result.contender,
        "batch": case.batch,
        "vocab": case.vocab,
        "ids": case.ids,
        "logits": case.logits,
        "dtype": case.dtype_name,
        "cache": "cold" if case.cold else "warm",
        "in_place": result.in_place,
        "metric": result.metric,
        "median": None if timing is None else timing.median,
        "p10": None if timing is None else timing.p10,
        "p90": None if timing is None else timing.p90,
        "peak_bytes": result.peak_bytes,
        "limit_us": result.limit_us,
        "remark": result.remark,
    }


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
