"""Another commit's fastlogits beside this one's: the same benchmarks and inputs, in processes that take turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.results import Record, commit, read_folder
from benchmarks.workloads import OURS

ROOT = Path(__file__).parents[1]
_TURNS = 3


def compare(ref: str, arguments: Sequence[str], console: Console, turns: int = _TURNS) -> int:
    """Measure both in turns, and print what became slower or faster.

    The commit is checked out as a worktree of git in a temporary folder. Both sides run these benchmarks. A contender
    that the other commit lacks is named, and has no time.

    Args:
        ref: what git takes for a commit.
        arguments: of the command line; those for the comparison and the results file are left out.
        console: where to print.
        turns: how often each side runs.

    Returns:
        The exit status: 1 where git knows no such commit, or a side found something wrong.
    """
    options = _without(arguments, {"--base": 1, "--out": 1, "--no-csv": 0})
    with tempfile.TemporaryDirectory(prefix="fastlogits-") as made:
        folder = Path(made)
        added = _git("worktree", "add", "--detach", str(folder / "base"), ref)
        if added.returncode:
            console.print(f"--base: {added.stderr.strip()}", style="bold red", markup=False)
            return 1
        try:
            sides = {"base": folder / "base", "here": ROOT}
            commits = {
                "base": _git("-C", str(sides["base"]), "rev-parse", "--short", "HEAD").stdout.strip(),
                "here": commit(),
            }
            for side, root in sides.items():
                (folder / side / "path").mkdir(parents=True, exist_ok=True)
                (folder / side / "path" / "fastlogits").symlink_to(root / "fastlogits")
                (folder / side / "path" / "benchmarks").symlink_to(ROOT / "benchmarks")
            status = 0
            for turn in range(turns):
                # Who goes first changes, so that a machine that warms up or fills up hits both alike.
                for side in sides if turn % 2 == 0 else reversed(sides):
                    console.print(f"turn {turn + 1} of {turns}: {side}, {commits[side]}")
                    out = folder / side / f"turn-{turn}"
                    status |= _run(
                        folder / side / "path", sides[side] / "kernels", commits[side], [*options, "--out", str(out)]
                    )
            found = {side: _medians(folder / side) for side in sides}
        finally:
            _git("worktree", "remove", "--force", str(folder / "base"))
    console.print(_table(found["base"], found["here"], commits))
    return status


def _run(path: Path, kernels: Path, of: str, options: Sequence[str]) -> int:
    """Run the benchmarks on one side's packages; what it prints is shown only where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (path, kernels))), "FASTLOGITS_COMMIT": of}
    command = [sys.executable, "-m", "benchmarks", "--only-ours", *options]
    done = subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr)
    return done.returncode


def _medians(folder: Path) -> dict[tuple[object, ...], list[Record]]:
    found: dict[tuple[object, ...], list[Record]] = {}
    for turn in sorted(folder.glob("turn-*")):
        for record in read_folder(turn):
            if record.contender in OURS and record.median is not None:
                found.setdefault(record.what, []).append(record)
    return found


def _table(
    base: dict[tuple[object, ...], list[Record]], here: dict[tuple[object, ...], list[Record]], commits: dict[str, str]
) -> Table:
    table = Table(title=f"{commits['here']} beside {commits['base']}: medians of the turns, us", title_justify="left")
    for heading in ("workload", "contender", "size", "logits", "metric"):
        table.add_column(heading)
    for heading in ("base", "here", "here / base"):
        table.add_column(heading, justify="right")
    for what, records in here.items():
        first = records[0]
        new = [record.median or 0.0 for record in records]
        old = [record.median or 0.0 for record in base.get(what, [])]
        size = f"{first.batch} x {first.vocab}" + (f", {first.ids} ids" if first.ids else "")
        kind = f"{first.logits} {first.dtype}, {first.cache}"
        cells = (first.workload, first.contender, size, kind, first.metric.removesuffix("_us"))
        if not old:
            table.add_row(*cells, "none", f"{statistics.median(new):.2f}", "")
            continue
        ratio = statistics.median(new) / statistics.median(old)
        # A change that no turn of either side contradicts.
        style = "red" if min(new) > max(old) else "green" if max(new) < min(old) else "dim"
        times = (f"{statistics.median(old):.2f}", f"{statistics.median(new):.2f}")
        table.add_row(*cells, *times, Text(f"{ratio:.3f}", style))
    return table


def _without(arguments: Sequence[str], dropped: dict[str, int]) -> list[str]:
    """Arguments without some options and as many values of each."""
    kept: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        if name not in dropped:
            kept.append(argument)
        elif not equals:
            del rest[: dropped[name]]
    return kept


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
