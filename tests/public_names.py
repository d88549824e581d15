"""The half of ``fastlogits/__init__.py`` that type checkers read, written from the table that the other half reads.

Run ``python -m tests.public_names`` after a change of that table.
"""

from pathlib import Path

import fastlogits

PATH = Path(fastlogits.__file__)
BEGIN, END = "if TYPE_CHECKING:\n", "\n__version__"
LONGEST_LINE = 120


def generated(text: str) -> str:
    """The text of ``fastlogits/__init__.py`` with an import for each public name."""
    before, rest = text.split(BEGIN, 1)
    after = rest[rest.index(END) :]
    homes = sorted((home, name) for name, home in fastlogits._HOME.items())
    return f"{before}{BEGIN}{''.join(imported(home, name) for home, name in homes)}{after}"


def imported(home: str, name: str) -> str:
    line = f"    from fastlogits.{home} import {name} as {name}\n"
    if len(line) <= LONGEST_LINE + 1:
        return line
    return f"    from fastlogits.{home} import (\n        {name} as {name},\n    )\n"


if __name__ == "__main__":
    PATH.write_text(generated(PATH.read_text()))
