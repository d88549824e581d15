"""A run that checks results before it takes times: what it has found, and when nothing more is begun."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from fastlogits_kernels.runtime.backend import lost_on
from fastlogits_kernels.runtime.launcher import Launch, prepare

from benchmarks.inputs import device_name
from benchmarks.results import environment, read_rows, slug, write_rows


class Session:
    """What a run has found on a device.

    Args:
        device: with its index, if it has one.
        deadline: seconds after which nothing more is begun.
        prints: whether this process prints and writes; one rank of several does.
        anywhere: whether something is so on any rank. All ranks call it at the same places.

    Attributes:
        failures: what was wrong on this rank; on one that prints, on others too.
        rows: the rows of the results file so far.
    """

    def __init__(
        self,
        device: torch.device,
        deadline: float,
        prints: bool = True,
        anywhere: Callable[[bool], bool] = bool,
    ) -> None:
        self.device = device
        self.failures: list[str] = []
        self.rows: list[dict[str, Any]] = []
        self._deadline = deadline
        self._prints = prints
        self._anywhere = anywhere
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self._start

    def say(self, text: str) -> None:
        """Print a line, with the time."""
        if self._prints:
            print(f"{self.seconds:6.1f} s  {text}", flush=True)

    def is_late(self, what: str) -> bool:
        """Whether nothing more is begun; then ``what`` is said to be left out."""
        late = self._anywhere(self.seconds > self._deadline)
        if late:
            self.say(f"LEFT OUT, it is late: {what}")
        return late

    def check(self, right: bool, what: str) -> None:
        """Note whether something is right, on all ranks."""
        wrong = self._anywhere(not right)
        if wrong and (self._prints or not right):
            self.failures.append(what)
        self.say(f"{'WRONG' if wrong else 'ok   '} {what}")

    def attempt(self, what: str, part: Callable[..., None], *arguments: Any) -> None:
        """Run a part, unless it is late; where it fails the others are worth their figures."""
        if self.is_late(what):
            return
        try:
            part(*arguments)
        except Exception:
            traceback.print_exc()
            self.failures.append(what)
            self.say(f"FAILED {what}")

    def compile(self, launches: list[Launch]) -> None:
        """Compile what some launches need, side by side."""
        outcomes = prepare(launches)
        for launch, error in outcomes:
            if error is not None:
                self.failures.append(f"{launch.launcher.name} is not compiled: {error}")
        self.say(f"compiled {len(outcomes)} kernels")

    def finish(self, name: str, folder: Path) -> int:
        """Write the rows behind those of earlier runs, say what was wrong, and return the exit status."""
        lost = lost_on(self.device)
        self.failures += [f"{operation} has fallen back to torch: {why}" for operation, why in lost.items()]
        failed = self._anywhere(bool(self.failures))
        for failure in self.failures:
            print(f"WRONG: {failure}", flush=True)
        self.say("something is WRONG" if failed else "all is right")
        if self._prints and self.rows:
            path = folder / f"{slug(name)}.csv"
            write_rows(path, [*read_rows(path), *self._records()])
            print(f"wrote {path}", flush=True)
        self._anywhere(failed)  # torchrun ends all ranks where one has left with an error: not before all is written
        return int(failed)

    def _records(self) -> list[dict[str, Any]]:
        about = {"timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"), **environment()}
        return [{**about, "device": device_name(self.device), **row} for row in self.rows]
