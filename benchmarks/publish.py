"""Publish a run: its rows take the place of those of the same devices, then plots and documents are made of them.

    python -m benchmarks publish                          the runs that there are
    python -m benchmarks publish 2026-11-27-1310-724ff48  one of them
    python -m benchmarks publish RUN --force              though it lacks figures that documents show

A run that was stopped early would otherwise empty tables without a word.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.folders import LOCAL, PUBLISHED
from benchmarks.results import Record, append_csv, newest, read_csv

_SHOWN = 12
"""Missing figures that are named."""


def main(arguments: Sequence[str]) -> int:
    """Publish, and say what was done."""
    parser = argparse.ArgumentParser("python -m benchmarks publish", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", help="a folder in build/benchmarks; without it, they are listed")
    parser.add_argument("--force", action="store_true", help="also where published figures would be lost")
    parser.add_argument("--local", type=Path, default=LOCAL, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--published", type=Path, default=PUBLISHED, metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.run is None:
        runs = sorted(path.name for path in options.local.glob("*/") if any(path.glob("*.csv")))
        print("nothing published; name one of these runs:" if runs else f"there is no run in {options.local}")
        print("\n".join(f"  {run}" for run in runs))
        return 0
    folder = options.local / options.run
    files = sorted(folder.glob("*.csv"))
    if not files:
        parser.error(f"there is no run {options.run} in {options.local}: python -m benchmarks publish lists them")
    lost = [each for file in files for each in lost_figures(read_csv(file), options.published / file.name)]
    if lost and not options.force:
        print(f"not published: {len(lost)} published figures are not in this run (--force publishes it all the same):")
        for each in lost[:_SHOWN]:
            print(f"  {each}")
        if len(lost) > _SHOWN:
            print(f"  and {len(lost) - _SHOWN} more")
        return 1
    for file in files:
        target = options.published / file.name
        options.published.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        append_csv(read_csv(file), target)
        print(f"published {target}")
    return 0


def lost_figures(run: Sequence[Record], published: Path) -> list[str]:
    """What a device's published file shows, and a run of it lacks."""
    if not published.exists():
        return []
    has = {record.what for record in run if record.median is not None}
    shown = [record for record in newest(read_csv(published)) if record.median is not None]
    return [
        f"{each.workload}, {each.batch} x {each.vocab}, {each.logits} {each.dtype}, {each.metric}: {each.contender}"
        for each in shown
        if each.what not in has
    ]
