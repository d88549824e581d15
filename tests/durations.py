"""Which tests are slow, as measured: the CPU seconds of each test in ``durations.csv``. A plugin of pytest.

    make test                              # the slowest tests start first
    make test-fast                         # -m "not slow": of each test as many cases as fit into ``FAST_S``
    make test ARGS=--measure-durations     # measure again; with ARGS="--measure-durations FILE ..." those files alone
    make test ARGS="--part 2/4"            # the second of four parts, where a machine is had for minutes only

A test of many cases is slow in part: some of its cases, evenly spaced, belong to the fast selection. CPU seconds are
counted, those of child processes too, because they depend little on what else the machine does.
"""

import argparse
import csv
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

TABLE = Path(__file__).with_name("durations.csv")
ROOT = TABLE.parents[1]
FAST_S = 0.5
"""What the cases of one test may take in the fast selection, in CPU seconds."""
FIRST_S = 2.0
"""Tests of which a case takes this long start before all others, so that no process is left with one at the end."""
_LISTED_S = 0.5
_A_TEST_S = 0.03
"""What any test takes, listed or not: its fixtures, and what is told of it."""
_PROPERTY = "cpu seconds"


class Measured(NamedTuple):
    """What a test took: all its cases together."""

    cases: int
    seconds: float

    @property
    def of_a_case(self) -> float:
        return self.seconds / self.cases


def name_of(nodeid: str) -> str:
    """The name of a test without that of its case."""
    return nodeid.partition("[")[0]


def read_table() -> dict[str, Measured]:
    """The table by the names of the tests; a test that isn't listed takes next to nothing."""
    with TABLE.open(newline="") as file:
        return {row["test"]: Measured(int(row["cases"]), float(row["seconds"])) for row in csv.DictReader(file)}


def write_table(table: dict[str, Measured]) -> None:
    """The tests that take long enough, by name."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("test", "cases", "seconds"))
        for name, measured in sorted(table.items()):
            if measured.seconds >= _LISTED_S and (ROOT / name.partition("::")[0]).exists():
                writer.writerow((name, measured.cases, f"{measured.seconds:.1f}"))


def in_fast_selection(index: int, cases: int, measured: Measured) -> bool:
    """Whether the case of this index, of so many that there are, belongs to the fast selection.

    >>> [in_fast_selection(index, 6, Measured(6, 3 * FAST_S)) for index in range(6)]
    [True, False, False, True, False, False]
    """
    kept = min(cases, int(FAST_S / measured.of_a_case))
    return index * kept // cases != (index - 1) * kept // cases


def part_of(text: str) -> tuple[int, int]:
    """Which part, and of how many.

    >>> part_of("2/4")
    (2, 4)
    """
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal() and 1 <= int(part) <= int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 2/4, got {text!r}")
    return int(part), int(count)


def dealt(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """The part, from 1 on, of each file: the heaviest first, each to the part that has the least so far.

    >>> dealt({"a": 3.0, "b": 2.0, "c": 2.0}, 2)
    {'a': 1, 'b': 2, 'c': 2}
    """
    parts = [0.0] * count
    found: dict[str, int] = {}
    for name in sorted(weights, key=lambda name: (-weights[name], name)):
        lightest = parts.index(min(parts))
        parts[lightest] += weights[name]
        found[name] = lightest + 1
    return found


# -- What pytest calls ------------------------------------------------------------------------------------------------


def pytest_addoption(parser) -> None:
    parser.addoption("--measure-durations", action="store_true", help="write what the tests take to durations.csv")
    parser.addoption("--part", type=part_of, metavar="I/N", help="only one of N parts that take about as long")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items) -> None:
    table = read_table()
    names = [name_of(item.nodeid) for item in items]
    cases, seen = Counter(names), Counter[str]()
    of_files: defaultdict[str, float] = defaultdict(float)
    for item, name in zip(items, names, strict=True):
        if name in table:
            if not in_fast_selection(seen[name], cases[name], table[name]):
                item.add_marker(pytest.mark.slow)
            if table[name].of_a_case >= FIRST_S:
                of_files[name.partition("::")[0]] += table[name].of_a_case
            seen[name] += 1

    if config.getoption("--part"):
        part, count = config.getoption("--part")
        weights: Counter[str] = Counter(name.partition("::")[0] for name in names)
        files = {file: _A_TEST_S * tests for file, tests in weights.items()}
        for name in dict.fromkeys(names):  # in one order, so that each process adds up to the same
            if name in table:
                files[name.partition("::")[0]] += table[name].seconds
        of = dealt(files, count)
        chosen = [of[name.partition("::")[0]] == part for name in names]
        config.hook.pytest_deselected(items=[item for item, is_in in zip(items, chosen, strict=True) if not is_in])
        items[:] = [item for item, is_in in zip(items, chosen, strict=True) if is_in]

    def order(item) -> float:
        name = name_of(item.nodeid)
        is_first = name in table and table[name].of_a_case >= FIRST_S
        # Those of one file stay together: they may share what is expensive to set up.
        return -of_files[name.partition("::")[0]] if is_first else 0.0

    if hasattr(config, "workerinput"):  # one of several processes
        items.sort(key=order)


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    item.user_properties.append((_PROPERTY, _cpu_seconds()))
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    finally:
        begin = dict(item.user_properties)[_PROPERTY]
        item.user_properties[:] = [*item.user_properties[:-1], (_PROPERTY, _cpu_seconds() - begin)]


class _Measuring:
    """Collects what the tests took, in the process that hears of all of them."""

    def __init__(self) -> None:
        self.found: dict[str, Measured] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call":
            before = self.found.get(name_of(report.nodeid), Measured(0, 0.0))
            seconds = dict(report.user_properties)[_PROPERTY]
            self.found[name_of(report.nodeid)] = Measured(before.cases + 1, before.seconds + seconds)

    def pytest_sessionfinish(self) -> None:
        files = {name.partition("::")[0] for name in self.found}
        kept = {name: each for name, each in read_table().items() if name.partition("::")[0] not in files}
        write_table(kept | self.found)


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "slow: not in the fast selection; durations.csv says it of most tests")
    if config.getoption("--measure-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Measuring())


def pytest_terminal_summary(terminalreporter, config) -> None:
    if config.option.markexpr != "not slow":
        return
    table = read_table()
    slow = {name: each for name, each in table.items() if each.seconds > FAST_S}
    wholly = sorted(name for name, each in slow.items() if each.of_a_case > FAST_S)
    terminalreporter.section("left out of the fast selection, see tests/durations.csv")
    for name in wholly:
        terminalreporter.line(f"{slow[name].seconds:6.1f} s  {name}")
    terminalreporter.line(f"and some cases of {len(slow) - len(wholly)} other tests; `make test` runs all")
