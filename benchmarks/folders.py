"""Where figures are kept: measurements of one's own in an ignored folder, published ones in the repository.

build/benchmarks/<run>/<device>.csv     what ``make bench`` writes; a folder for each run
benchmarks/results/<device>.csv         what documents show; only ``python -m benchmarks publish`` writes it
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCAL = ROOT / "build" / "benchmarks"
PUBLISHED = ROOT / "benchmarks" / "results"


def new_run(commit: str) -> str:
    """A name for a run that begins now."""
    return f"{datetime.now():%Y-%m-%d-%H%M}-{commit}"


def newest_run(local: Path = LOCAL) -> Path | None:
    """The folder of the run that ended last; None where nothing has been measured."""
    runs = [path for path in local.glob("*/") if any(path.glob("*.csv"))]
    return max(runs, key=lambda path: max(each.stat().st_mtime for each in path.glob("*.csv")), default=None)
