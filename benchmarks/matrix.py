"""The versions that the tests pass with: ``python -m benchmarks.matrix``, a row of a results file for each combination.

Each row gets an environment of its own under ``.venv-matrix``, made once. The file has the versions that pip resolved.
It also says if the tests of a row didn't end in time.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.results import read_rows, write_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "matrix.csv"
_PACKAGES = ("torch", "transformers", "triton")
_FIELDS = ("python", *_PACKAGES, "tests", "outcome")
_NEEDED = (
    "accelerate", "hypothesis", "matplotlib", "pandas", "psutil", "pytest", "pytest-benchmark", "pytest-xdist", "rich",
    "tokenizers",
)  # fmt: skip
# One file for each part that depends on versions: dynamo, kernels in the interpreter, the plan, generate.
_PART = (
    "plan/test_plan.py", "plan/test_compile.py", "kernels/pointwise", "kernels/runtime/test_backend.py",
    "processors/test_first_tokens.py", "transformers/test_first_step.py",
)  # fmt: skip
_ALL = "all"
_SPREAD = ("-n", "auto", "--maxprocesses=8", "--dist", "worksteal")  # as in the Makefile


class Row(NamedTuple):
    """A combination: a Python, and versions of packages; an empty one is pip's choice."""

    python: str
    torch: str
    transformers: str
    triton: str = ""
    also: str = ""
    """A requirement that another package has."""

    @property
    def versions(self) -> tuple[str, ...]:
        """Of the packages, in their order."""
        return self.torch, self.transformers, self.triton

    @property
    def name(self) -> str:
        """The folder of its environment."""
        versions = zip(_PACKAGES, self.versions, strict=True)
        return "-".join([f"py{self.python}", *(f"{name}{version}" for name, version in versions if version)])


ROWS = (
    Row("3.11", "2.11.0", "5.23.0", "3.6.0", "numpy<2.3"),  # the interpreter of this Triton takes no newer one
    Row("3.11", "2.13.0", "4.57.6", "3.9.0"),
    Row("3.11", "2.13.0", "5.0.0", "3.9.0"),
    Row("3.10", "2.13.0", "5.20.2"),  # the last transformers for Python 3.10
    Row("3.13", "2.14.1", "5.24.0"),
)


def environment(row: Row) -> Path:
    """The Python of a row's environment, made where it isn't there yet.

    Raises:
        CalledProcessError: pip can't install the row.
    """
    folder = ROOT / ".venv-matrix" / row.name
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    interpreter = os.environ.get(f"PYTHON{row.python.replace('.', '')}", f"python{row.python}")
    subprocess.run([interpreter, "-m", "venv", str(folder)], check=True)
    versions = zip(_PACKAGES, row.versions, strict=True)
    wanted = [f"{name}=={version}" if version else name for name, version in versions]
    subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", *wanted, *filter(None, [row.also]), *_NEEDED], check=True
    )
    (folder / "ready").touch()
    return python


def run(row: Row, parts: list[str], limit: float) -> dict[str, str]:
    """Run tests in a row's environment, and say what came of them."""
    python = environment(row)
    ask = f"from importlib.metadata import version; print(*map(version, {_PACKAGES!r}))"
    versions = subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    files = [] if parts == [_ALL] else [f"tests/{part}" for part in parts]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *_SPREAD, *files]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=limit
        )
        last = (done.stdout.strip() or done.stderr.strip() or "nothing was printed").splitlines()[-1]
        outcome = re.sub(r" in [\d.]+s.*| \d+ warnings?,?|,(?= \d+ warn)", "", last).strip("= ,")
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        failed = sum(line.count("F") for line in printed.splitlines() if re.match(r"^[.FEsx]+( |$)", line))
        outcome = f"not finished after {limit:.0f} s, {failed} failed until then"
    return dict(zip(_FIELDS, (row.python, *versions, " ".join(parts), outcome), strict=True))


def write(found: dict[str, str]) -> None:
    """Put a row into the results file, in place of an older one of the same versions."""
    same = ("python", *_PACKAGES)
    rows = [row for row in read_rows(RESULTS) if any(row[key] != found[key] for key in same)] + [found]
    write_rows(RESULTS, sorted(rows, key=lambda row: [row[key] for key in same]))


def markdown() -> str:
    """The results file as a table of a document."""
    rows = read_rows(RESULTS)
    if not rows:
        return "Not run yet."
    lines = [f"| {' | '.join(_FIELDS)} |", "|---" * len(_FIELDS) + "|"]
    part = " ".join(_PART)
    shown = [row | {"tests": "a part" if row["tests"] == part else row["tests"]} for row in rows]
    beside = f"A part: {', '.join(f'`tests/{each}`' for each in _PART)}."
    return "\n".join([beside, "", *lines, *(f"| {' | '.join(row[key] for key in _FIELDS)} |" for row in shown)])


def main() -> int:
    """Run the rows that the command line names, by default all."""
    parser = argparse.ArgumentParser("python -m benchmarks.matrix", description="Run the tests with other versions.")
    parser.add_argument("--rows", default="", help="only rows whose name holds this text")
    parser.add_argument("--tests", nargs="+", default=_PART, help="parts of the tests, or all; default: %(default)s")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for the tests of a row")
    parser.add_argument("--clean", action="store_true", help="remove each environment after its row")
    options = parser.parse_args()
    table, good = Table(*_FIELDS), True
    for row in ROWS:
        if options.rows not in row.name:
            continue
        found = run(row, list(options.tests), options.limit)
        write(found)
        table.add_row(*found.values())
        good = good and "passed" in found["outcome"] and "failed" not in found["outcome"]
        if options.clean:
            shutil.rmtree(ROOT / ".venv-matrix" / row.name)
    Console().print(table)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
