"""What the campaigns leave behind: a CSV file each, of which every row says on what it was found."""

import csv
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.results import environment

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "campaign"
"""A folder below the measurements, whose files have other columns."""


def dated(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the time, the commit and the versions before it."""
    return {"timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"), **environment(), **row}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A file of these rows, which all have the same columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
