"""What each processor of a list did to the candidates of each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlogits.checks import whole_number
from fastlogits.inspect.candidates import Candidates, Change, Likely, change_of
from fastlogits.inspect.members import checked_scores, fresh_members, listed, single_plans
from fastlogits.plan.run import Run
from fastlogits.token_text import token_names, token_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.table import Table

    from fastlogits.plan.position import Index

_HEADINGS = (
    "processor",
    "row",
    "removed",
    "raised",
    "lowered",
    "left",
    "kept mass",
    "of the start",
    "removed, likeliest first",
    "changed most",
    "top now",
)
_NUMBERS = slice(1, 8)
"""The columns of numbers."""
_MOST_BARS = 12
"""The most series that have bars at a name."""
_FEW = 10
"""Up to so many tokens, an axis counts them one by one."""


class Trace(Sequence[Change]):
    """The changes, by processor and row. ``print`` it, or let rich or a notebook show it.

    Args:
        changes: the changes.
        texts: what tokens are shown as, by id; without one, the id is shown.
        scores: the scores after all processors ``(B, V)``.
    """

    def __init__(self, changes: Sequence[Change], texts: Mapping[int, str], scores: torch.Tensor) -> None:
        self._changes = tuple(changes)
        self._texts = texts
        self.scores = scores

    def __getitem__(self, index: Any) -> Any:
        return self._changes[index]

    def __len__(self) -> int:
        return len(self._changes)

    def text(self, token: int) -> str:
        """A token for people: its text in quotes, its name or bytes if it is no text, or else its id."""
        return self._texts.get(token, str(token))

    def __str__(self) -> str:
        rows = [_HEADINGS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)

    __repr__ = __str__  # so that a prompt of Python shows it too

    def table(self) -> Table:
        """The changes as a table of rich, which must be installed."""
        from rich.table import Table
        from rich.text import Text

        table = Table(*(_HEADINGS))
        for column in table.columns[_NUMBERS]:
            column.justify = "right"
        number = 0
        for change, cells in zip(self._changes, self._cells(between="\n"), strict=True):
            if change.number != number:
                table.add_section()
                number = change.number
            table.add_row(short_name(change.processor), *map(Text, cells[1:]))
        return table

    def __rich__(self) -> Table:
        return self.table()

    def _repr_html_(self) -> str:
        from html import escape

        head = "".join(f"<th>{heading}</th>" for heading in _HEADINGS)
        rows = ("".join(f"<td>{escape(cell)}</td>" for cell in cells) for cells in self._cells())
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def frame(self) -> DataFrame:
        """The changes as a frame of pandas, which must be installed: a row for each processor and row."""
        import pandas as pd

        return pd.DataFrame([vars(change) for change in self._changes])

    def plot(self, path: str | Path | None = None, row: int = 0) -> Figure:
        """The changes as a figure of matplotlib, which must be installed.

        Args:
            path: where to save it, in the format of its ending; None not to.
            row: the row whose changes and most likely tokens are plotted; the other two panels show all rows.

        Raises:
            ValueError: there is no such row.
        """
        chosen = [change for change in self._changes if change.row == row]
        if not chosen:
            most = max((change.row for change in self._changes), default=-1)
            raise ValueError(f"row must be a row that was traced, 0 to {most}, got {row!r}")
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        names = [short_name(change.processor) for change in chosen]
        rows = sorted({change.row for change in self._changes})
        by_row = [(f"row {each}", [change for change in self._changes if change.row == each]) for each in rows]
        layout = ConstrainedLayoutEngine(w_pad=0.15)
        figure = Figure(figsize=(15, 0.45 * len(names) + 2.8), layout=layout)
        counts, left, mass, tokens = figure.subplots(1, 4)
        kinds = ("removed", "raised", "lowered")
        _bars(counts, names, [(kind, [getattr(change, kind) for change in chosen]) for kind in kinds])
        _count_axis(counts, max(getattr(change, kind) for change in chosen for kind in kinds))
        counts.set(title=f"Row {row}: what a processor changes", xlabel="tokens")
        _bars(left, names, [(name, [change.left for change in changes]) for name, changes in by_row])
        _count_axis(left, max(change.left for change in self._changes))
        dots = ", a dot for each row" if len(rows) > _MOST_BARS else ""
        left.set(title=f"Candidates left{dots}", xlabel="tokens")
        _bars(mass, names, [(name, [change.kept_of_start for change in changes]) for name, changes in by_row])
        mass.set(title="What they had at the start", xlabel="share of the probability", xlim=(0, 1.05))
        stages = [chosen[0].top_before, *(change.top_after for change in chosen)]
        likely = [
            (self.text(token).replace("$", r"\$"), [dict(stage).get(token, float("nan")) for stage in stages])
            for token in dict.fromkeys(token for stage in stages for token, _ in stage)
        ]
        _bars(tokens, ["start", *names], likely)
        tokens.set(title=f"Row {row}: its most likely tokens", xlabel="probability", xlim=(0, None))
        for panel in (left, mass):
            panel.tick_params(labelleft=False)
        if path is not None:
            figure.savefig(path)
        return figure

    def _cells(self, between: str = ", ") -> Iterator[tuple[str, ...]]:
        for change in self._changes:
            yield (
                change.processor,
                str(change.row),
                f"{change.removed:,}" + (f" (+{change.added:,})" if change.added else ""),
                f"{change.raised:,}",
                f"{change.lowered:,}",
                f"{change.left:,}",
                f"{change.kept_mass:.4f}",
                f"{change.kept_of_start:.4f}",
                self._words(change.removed_likeliest, between),
                between.join(
                    f"{self.text(token)} {_digits(was)} -> {_digits(now)}" for token, was, now in change.moved_most
                ),
                self._words(change.top_after, between),
            )

    def _words(self, tokens: Likely, between: str) -> str:
        return between.join(f"{self.text(token)} {probability:.3f}" for token, probability in tokens)


def trace(
    processors: Any,
    input_ids: torch.Tensor,
    scores: torch.Tensor,
    tokenizer: Any = None,
    *,
    prompt_length: Index | None = None,
    cache_position: Index | None = None,
    top: int = 3,
) -> Trace:
    """Run processors one by one, and tell what each of them does to the candidates of each row.

    The processors themselves are not changed: copies of them run.

    Args:
        processors: a list of fastlogits or transformers, any iterable of processors, or one processor.
        input_ids: tokens so far, int32 or int64 ``(B, L)``.
        scores: logits ``(B, V)``; never written.
        tokenizer: a tokenizer, to show tokens as text.
        prompt_length: number of tokens of the run's prompt, which first-step processors ask for.
        cache_position: index of the newest token; by default from the length of ``input_ids``.
        top: how many of the most likely tokens to note, at least 1.

    Raises:
        ValueError: scores that are no logits ``(B, V)``; ``top`` below 1; a class or a list among the processors; a
            processor that can't be copied, and so would be used up; or what a processor raises.
        AttributeError: something among them is no processor.
        TypeError: ``tokenizer`` is no tokenizer, but its name, for instance.

    Example:
        >>> from fastlogits import TopKLogitsWarper
        >>> changes = trace([TopKLogitsWarper(2)], torch.tensor([[0]]), torch.tensor([[1.0, 3.0, 2.0]]))
        >>> changes[0].removed, changes[0].left, round(changes[0].kept_mass, 2)
        (1, 2, 0.91)
    """
    top = whole_number("top", top, 1)
    members = fresh_members(listed(processors))
    texts = {} if tokenizer is None else _shown(tokenizer)
    run = Run.of(prompt_length, cache_position)
    start = before = Candidates(checked_scores(scores))
    changes: list[Change] = []
    for number, (member, plan) in enumerate(zip(members, single_plans(members), strict=True)):
        after = Candidates(plan(input_ids, before.scores, run))
        if after.scores.shape != before.scores.shape:
            # A processor that mixes rows, such as guidance: its rows are compared with the first ones before it.
            before, start = before.first(after.scores.shape[0]), start.first(after.scores.shape[0])
        changes += (change_of(number, member.name, row, start, before, after, top)[0] for row in range(after.rows))
        before = after
    return Trace(changes, texts, before.scores)


def _shown(tokenizer: Any) -> dict[int, str]:
    texts = {token: repr(text) for token, text in enumerate(token_texts(tokenizer)) if text is not None}
    return texts | token_names(tokenizer)


def _digits(probability: float) -> str:
    """A probability, so that a small one tells something too."""
    return f"{probability:.1e}" if 0 < probability < 5e-4 else f"{probability:.3f}"


def _bars(axis: Axes, names: Sequence[str], series: Sequence[tuple[str, Sequence[float]]]) -> None:
    """Bars of some named series, one below the other at each name; a dot for each of many."""
    for number, (label, values) in enumerate(series):
        if len(series) > _MOST_BARS:
            axis.plot(values, range(len(names)), "o", color="C0", alpha=0.3)
            continue
        height = 0.8 / len(series)
        shift = (number - (len(series) - 1) / 2) * height
        axis.barh([place + shift for place in range(len(names))], values, 0.95 * height, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)
    if len(series) <= _MOST_BARS:
        axis.legend(
            frameon=False, fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0), borderaxespad=4
        )


def _count_axis(axis: Axes, most: int) -> None:
    """An axis of numbers of tokens: powers of ten, or each number where they are few."""
    if most > _FEW:
        axis.set_xscale("symlog", linthresh=1)
        marks = [0, *(10**power for power in range(1 + len(str(most - 1))))]
    else:
        marks = list(range(max(most, 2) + 1))
    each = 1 if len(marks) < _FEW // 2 else 2  # every other mark has a label where they are many
    axis.set_xticks(marks, [f"{mark:,}" if place % each == 0 else "" for place, mark in enumerate(marks)])
    axis.set_xlim(0, marks[-1])
    axis.minorticks_off()


def short_name(name: str) -> str:
    """A class name without the ending that all of them have."""
    return name.removesuffix("LogitsProcessor").removesuffix("LogitsWarper")
