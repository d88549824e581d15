"""New examples for all property tests, for as long as is wanted.

    python -m tests.campaign.fuzz MINUTES [pytest's arguments]

Each round runs them with a seed of its own. Without other arguments half of the time goes to the machines of
``test_machines.py``, which look farthest. It ends at the first failure, and says how to see that again.
"""

import argparse
import os
import secrets
import sys
import time
from pathlib import Path

os.environ["FASTLOGITS_FUZZ"] = "1"  # read by conftest.py

import pytest
from hypothesis import is_hypothesis_test
from hypothesis.statistics import collector

HERE = Path(__file__).parents[1]
MACHINES = [str(HERE / "campaign" / "test_machines.py")]
QUIET = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Rounds:
    """What pytest is told of its time, and what it tells of its cases."""

    def __init__(self, seconds: float, least: int = 1) -> None:
        self.until = time.monotonic() + seconds
        self.least, self.count, self.examples = least, 0, 0
        self.failed: list[str] = []

    @property
    def is_over(self) -> bool:
        return bool(self.failed) or (self.count >= self.least and time.monotonic() > self.until)

    def pytest_collection_modifyitems(self, items) -> None:
        items[:] = [item for item in items if is_hypothesis_test(getattr(item, "obj", None))]

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with collector.with_value(self._count):
            return (yield)

    def pytest_runtest_protocol(self, item) -> None:
        if self.is_over:
            item.session.shouldstop = "the time is up"

    def _count(self, statistics) -> None:  # what hypothesis tells ``--hypothesis-show-statistics``
        phases = [value for key, value in statistics.items() if key.endswith("-phase")]
        self.examples += sum(len(phase["test-cases"]) for phase in phases)


def main(minutes: str, *arguments: str, least: int = 1) -> int:
    """Run rounds, so many at least, until the time is up or a test fails; whether one did."""
    rounds = Rounds(60 * float(minutes), least)
    spent = {True: 0.0, False: 0.0}  # on the machines alone, and on all
    while not rounds.is_over:
        seed, machines = secrets.randbits(32), spent[True] <= spent[False]
        chosen = list(arguments) or (MACHINES if machines else [str(HERE)])
        start = time.monotonic()
        code = pytest.main([*QUIET, f"--hypothesis-seed={seed}", *chosen], plugins=[rounds])
        spent[machines] += time.monotonic() - start
        rounds.count += 1
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
            return int(code)
    machines_of = sys.modules.get("tests.campaign.test_machines")
    steps = {} if machines_of is None else machines_of.STEPS
    done = ", ".join(f"{number:,} steps of the {name} machine" for name, number in steps.items())
    print(f"{rounds.examples:,} examples in {rounds.count} rounds; {done or 'no machine'}")
    for test in rounds.failed:
        print(f"failed; see it again with\n  FASTLOGITS_FUZZ=1 python -m pytest --hypothesis-seed={seed} '{test}'")
    return bool(rounds.failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("minutes")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of pytest")
    options = parser.parse_args()
    sys.exit(main(options.minutes, *options.arguments))
