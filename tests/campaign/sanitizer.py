"""Every kernel under compute-sanitizer, on a GPU: memory beyond its bounds, races, uninitialised reads, barriers.

    python -m tests.campaign.sanitizer
    python -m tests.campaign.sanitizer --tools memcheck --cases fold select --seconds 60

The cases are dealt to processes, those of an operation to one, and the processes to all GPUs that are visible. First
they run without a tool: that compiles the kernels, holds results to torch, and looks at guard zones around each
allocation. Then each tool runs them, in a process with the compiled kernels of the first and an allocation of its own
for each tensor; no operation waits for the kernels of another. A process that has used up its seconds begins no other
case; what it left out is told, and stands in the results file. So does it where a tool has crashed and was begun once
more. Before all that, each tool is shown a kernel that is wrong on purpose (``sanitizer_control``): where it finds
nothing there, it is blind, and what it says of the others is worth nothing.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.inputs import device_name
from benchmarks.results import slug, write_rows
from tests.campaign.record import RESULTS, ROOT, dated
from tests.campaign.sanitizer_cases import Case, chosen

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
GUARDS = "guards"
"""The run without a tool."""
_PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
_LAUNCH_S = 120  # Python has to import torch before it launches anything
_DEADLINE_S = 60  # for the case that runs when the seconds are over, and for the tool's own end
_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) errors?")
_HAZARDS = re.compile(r"RACECHECK SUMMARY: (\d+) hazards? displayed(?: \((\d+) errors?, (\d+) warnings?\))?")
_STOPPED = re.compile(
    r"Target application (?:returned an error|terminated)|Error: .*(?:did not|didn't) (?:terminate|launch)"
)
_LINE = re.compile(r"^(done|failed|left out) (\S+?)(?::|$)(.*)$", re.MULTILINE)


class Setting(NamedTuple):
    """What all processes have in common."""

    program: str
    """compute-sanitizer."""
    version: str
    device: torch.device
    logs: Path
    """The folder of their logs."""


class Verdict(NamedTuple):
    """What a tool says of all that a process has done."""

    errors: int | None
    """Errors, or hazards of racecheck; None where there is no summary, so that nothing is known."""
    stopped: bool
    """Whether it says that the process itself failed."""
    first: str
    """The first thing that it complains of."""


def read_log(text: str) -> Verdict:
    """The summaries of a log of compute-sanitizer, one for each process that it has watched, added up."""
    summaries = [int(found) for found in _ERRORS.findall(text)]
    summaries += [int(found[0]) for found in _HAZARDS.findall(text)]
    told = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    complaints = [
        line for line in told if line and "SUMMARY" not in line and not line.startswith(("COMPUTE-SANITIZER", "at "))
    ]
    return Verdict(sum(summaries) if summaries else None, bool(_STOPPED.search(text)), (complaints or [""])[0])


class Seen(NamedTuple):
    """What a process of cases has printed."""

    done: list[str]
    failed: dict[str, str]
    left_out: list[str]


def read_cases(text: str) -> Seen:
    """The cases that a process says it has done, or not."""
    seen = Seen([], {}, [])
    for what, name, why in _LINE.findall(text):
        if what == "failed":
            seen.failed[name] = why.strip()
        else:
            (seen.done if what == "done" else seen.left_out).append(name)
    return seen


def _under(tool: str, setting: Setting, log: Path) -> list[str]:
    """What a command line begins with to run under a tool."""
    options = ["--tool", tool, "--launch-timeout", str(_LAUNCH_S), "--print-limit", "100", "--log-file", str(log)]
    return [setting.program, *options]


def _environment(tool: str | None, number: int = 0) -> dict[str, str]:
    """The environment of process ``number``, which sees one of the GPUs that are visible."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % count]
    if tool is not None:
        # Each tensor is then an allocation of the driver, with its own bounds, as new as the tensor.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return environment


def command_of(tool: str | None, setting: Setting, log: Path, cases: Sequence[Case], seconds: float) -> list[str]:
    """The command line of a process: cases under a tool, or checked without one."""
    driver = [sys.executable, "-m", "tests.campaign.sanitizer_cases"]
    driver += ["--device", setting.device.type, "--seconds", str(seconds)]
    names = ["--cases", *(case.name for case in cases)]
    return [*driver, "--check", *names] if tool is None else [*_under(tool, setting, log), *driver, *names]


def sees(tool: str, setting: Setting) -> bool:
    """Whether a tool finds what is wrong on purpose."""
    log = setting.logs / f"{tool}-control.log"
    log.unlink(missing_ok=True)
    command = [*_under(tool, setting, log), sys.executable, "-m", "tests.campaign.sanitizer_control", tool]
    environment, limit = _environment(tool), _LAUNCH_S + _DEADLINE_S
    try:
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return False
    return bool(log.exists() and read_log(log.read_text()).errors)


class Process:
    """Cases in a process of their own, whose output goes to a file."""

    def __init__(self, tool: str | None, setting: Setting, cases: Sequence[Case], seconds: float, number: int = 0):
        self.tool, self.cases = GUARDS if tool is None else tool, [case.name for case in cases]
        self.log, self._out = (setting.logs / f"{self.tool}-{number}.{kind}" for kind in ("log", "out"))
        self.log.unlink(missing_ok=True)
        self._limit = seconds + _LAUNCH_S + _DEADLINE_S
        self._start = time.perf_counter()
        self.seconds = 0.0
        self.again = False
        """Whether it is begun once more, after the tool has crashed."""
        with self._out.open("w") as out:
            self._process = subprocess.Popen(
                command_of(tool, setting, self.log, cases, seconds),
                cwd=ROOT, env=_environment(tool, number), stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def is_over(self) -> bool:
        """Whether it has ended; one that has run too long is ended."""
        over = self._process.poll() is not None
        self.seconds = time.perf_counter() - self._start
        if not over and self.seconds > self._limit:
            os.killpg(self._process.pid, signal.SIGKILL)  # the tool, and what it watches
            self._process.wait()
        return over

    @property
    def status(self) -> int | None:
        """Its exit status."""
        return self._process.returncode

    @property
    def crashed(self) -> bool:
        """Whether the tool has died of itself before it said what it has found."""
        killed = self.status is not None and self.status < 0 and self.status != -signal.SIGKILL
        return killed and (not self.log.exists() or read_log(self.log.read_text()).errors is None)

    @property
    def seen(self) -> Seen:
        """What it has said of its cases so far."""
        return read_cases(self._out.read_text())

    @property
    def tail(self) -> str:
        """The end of its output."""
        return self._out.read_text()[-2000:]


def _run(
    dealt: Sequence[Sequence[Case]], tools: Sequence[str], setting: Setting, seconds: float, at_once: int,
    console: Console,
) -> dict[str, list[Process]]:  # fmt: skip
    """Run cases without a tool, and then under each, so many processes at once; the processes of each."""
    waiting: deque[tuple[str | None, int]] = deque((None, number) for number in range(len(dealt)))
    begun: dict[str, list[Process]] = {name: [] for name in (GUARDS, *tools)}
    running: list[tuple[str | None, int, Process]] = []
    again: set[tuple[str, int]] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=None) for name in begun}
        while waiting or running:
            while waiting and len(running) < at_once:
                tool, number = waiting.popleft()
                process = Process(tool, setting, dealt[number], 10 * seconds if tool is None else seconds, number)
                process.again = (process.tool, number) in again
                begun[process.tool].append(process)
                running.append((tool, number, process))
            time.sleep(0.2)
            over = [each for each in running if each[2].is_over()]
            running = [each for each in running if each not in over]
            for tool, number, process in over:
                if tool is not None and process.crashed and not process.again:
                    again.add((tool, number))
                    begun[tool].remove(process)
                    waiting.append((tool, number))
            # What is compiled runs before what is not: the longest to compile would otherwise keep all others waiting.
            waiting.extendleft((name, number) for tool, number, _ in over if tool is None for name in tools)
            for name, processes in begun.items():
                seen = [each.seen for each in processes]
                total = sum(len(each.cases) for each in processes)
                progress.update(tasks[name], total=total, completed=sum(len(e.done) + len(e.failed) for e in seen))
    return begun


def row_of(tool: str, processes: Sequence[Process], setting: Setting, blind: bool = False) -> dict[str, object]:
    """What all processes of a tool have found, as a row of the results file."""
    seen = [each.seen for each in processes]
    done = [name for each in seen for name in each.done]
    failed = {name: why for each in seen for name, why in each.failed.items()}
    asked = [name for each in processes for name in each.cases]
    missing = [name for name in asked if name not in done and name not in failed]
    verdicts = [read_log(each.log.read_text() if each.log.exists() else "") for each in processes]
    first = next((f"{name}: {why}" for name, why in failed.items()), "")
    errors: int | None = len(failed)
    if tool != GUARDS:
        known = [each.errors for each in verdicts if each.errors is not None]
        errors = sum(known) if len(known) == len(verdicts) else None
        first = first or next((each.first for each in verdicts if each.errors), "")
    ended_badly = [each for each in processes if each.status != 0 and not each.seen.failed]
    if blind:
        first = f"blind: {tool} finds nothing in a kernel that is wrong on purpose"
    elif ended_badly and not first:
        first = f"status {ended_badly[0].status}: {' '.join(ended_badly[0].tail.split())[-300:]}"
    clean = errors == 0 and not (failed or ended_badly or blind or any(each.stopped for each in verdicts))
    return dated(
        {
            "gpu": device_name(setting.device), "sanitizer": setting.version, "tool": tool, "done": len(done),
            "left_out": len(missing), "errors": "unknown" if errors is None else errors,
            "outcome": "clean" if clean else "not clean", "seconds": f"{max(each.seconds for each in processes):.1f}",
            "first": first, "cases_left_out": " ".join(missing),
            "begun_again": sum(each.again for each in processes),
        }
    )  # fmt: skip


def _table(rows: Sequence[Mapping[str, object]]) -> Table:
    columns = ("tool", "done", "left_out", "errors", "outcome", "seconds", "first")
    table = Table(*columns, title=str(rows[0]["gpu"]), title_justify="left")
    for row in rows:
        table.add_row(*(str(row[column])[:80] for column in columns), style="" if row["outcome"] == "clean" else "red")
    return table


def _dealt(cases: Sequence[Case], count: int) -> list[list[Case]]:
    """Cases for so many processes: those of an operation, which share their kernels, stay together."""
    by_operation: dict[str, list[Case]] = {}
    for case in cases:
        by_operation.setdefault(case.operation, []).append(case)
    dealt: list[list[Case]] = [[] for _ in range(min(count, len(by_operation)))]
    for i, some in enumerate(by_operation.values()):
        dealt[i % len(dealt)] += some
    return dealt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 1 where anything is not clean."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.sanitizer", description=__doc__.partition("\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="cases or operations; all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each process of a tool; 60")
    parser.add_argument("--processes", type=int, default=16, help="at once; 16")
    parser.add_argument("--program", help="compute-sanitizer, where it is not on the path")
    parser.add_argument("--logs", type=Path, default=Path("build/sanitizer"), help="where the logs go")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the script itself")
    given = parser.parse_args(arguments)
    console, device = Console(), torch.device(given.device)
    program = next(filter(None, map(shutil.which, filter(None, (given.program, *_PLACES)))), None)
    if program is None or (device.type == "cuda" and not torch.cuda.is_available()):
        parser.error("needs a GPU, and compute-sanitizer of the CUDA toolkit: give its path as --program")
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"Version (\S+)", told)
    setting = Setting(program, version[1] if version else "unknown", device, given.logs)
    given.logs.mkdir(parents=True, exist_ok=True)

    with ThreadPoolExecutor() as pool:
        seeing = dict(zip(given.tools, pool.map(lambda tool: sees(tool, setting), given.tools), strict=True))
    dealt = _dealt(chosen(given.cases), given.processes)
    begun = _run(dealt, given.tools, setting, given.seconds, given.processes, console)
    rows = [row_of(tool, begun[tool], setting, not seeing.get(tool, True)) for tool in begun]
    write_rows(RESULTS / f"sanitizer-{slug(device_name(device))}.csv", rows)
    console.print(_table(rows))
    console.print(f"logs: {given.logs}", markup=False)
    return int(any(row["outcome"] != "clean" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
