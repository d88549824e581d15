"""What the campaigns leave behind: a CSV file each, of which every row says on what it was found."""

from collections.abc import Mapping
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
