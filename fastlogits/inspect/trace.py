"""What each processor of a list did to the candidates of each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastlogits.checks import whole_number
from fastlogits.inspect.candidates import Candidates, Change, Likely, change_of
from fastlogits.inspect.members import checked_scores, fresh_members, listed, single_plans
from fastlogits.plan.run import Run
from fastlogits.token_text import token_texts

if TYPE_CHECKING:
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


class Trace(Sequence[Change]):
    """The changes, by processor and row. ``print`` it, or let rich or a notebook show it.

    Args:
        changes: the changes.
        texts: the text of each token id; None to show ids.
        scores: the scores after all processors ``(B, V)``.
    """

    def __init__(self, changes: Sequence[Change], texts: Sequence[str | None] | None, scores: torch.Tensor) -> None:
        self._changes = tuple(changes)
        self._texts = texts
        self.scores = scores

    def __getitem__(self, index: Any) -> Any:
        return self._changes[index]

    def __len__(self) -> int:
        return len(self._changes)

    def text(self, token: int) -> str:
        """A token for people: its text in quotes, or its id if it has no text."""
        known = self._texts[token] if self._texts is not None and token < len(self._texts) else None
        return str(token) if known is None else repr(known)

    def __str__(self) -> str:
        rows = [_HEADINGS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)

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

        figure = Figure(figsize=(15, 4.5), layout="constrained")
        counts, left, mass, tokens = figure.subplots(1, 4)
        names = [short_name(change.processor) for change in chosen]
        places = range(1, len(names) + 1)
        for shift, what in enumerate(("removed", "raised", "lowered"), -1):
            at = [place + 0.27 * shift for place in places]
            counts.bar(at, [getattr(change, what) for change in chosen], 0.25, label=what)
        counts.set_yscale("symlog")
        counts.set_ylim(bottom=0)
        counts.set_title(f"row {row}: tokens removed, raised, lowered")
        counts.legend(frameon=False, fontsize="small")
        for each in sorted({change.row for change in self._changes}):
            of_row = [change for change in self._changes if change.row == each]
            at = [change.number + 1 for change in of_row]
            left.plot(at, [change.left for change in of_row], marker="o", label=f"row {each}")
            mass.plot(at, [change.kept_of_start for change in of_row], marker="o")
        left.set(yscale="symlog", title="candidates left")
        mass.set(ylim=(0, 1.05), title="mass of them at the start")
        left.legend(frameon=False)
        stages = [chosen[0].top_before, *(change.top_after for change in chosen)]
        for token in dict.fromkeys(token for stage in stages for token, _ in stage):
            found = [dict(stage).get(token, float("nan")) for stage in stages]
            tokens.plot(range(len(stages)), found, marker="o", label=self.text(token).replace("$", r"\$"))
        tokens.set(title=f"row {row}: its most likely tokens", ylim=(0, None))
        tokens.legend(frameon=False, fontsize="small")
        for panel in (counts, left):
            panel.yaxis.set_major_formatter("{x:,.0f}")
        for panel in (counts, left, mass):
            panel.set_xticks(list(places), names, rotation=30, ha="right", rotation_mode="anchor")
        tokens.set_xticks([0, *places], ["start", *names], rotation=30, ha="right", rotation_mode="anchor")
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
    texts = None if tokenizer is None else names_of_tokens(tokenizer)
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


def _digits(probability: float) -> str:
    """A probability, so that a small one tells something too."""
    return f"{probability:.1e}" if 0 < probability < 5e-4 else f"{probability:.3f}"


def short_name(name: str) -> str:
    """A class name without the ending that all of them have."""
    return name.removesuffix("LogitsProcessor").removesuffix("LogitsWarper")


def names_of_tokens(tokenizer: Any) -> list[str | None]:
    """The text of each token; the name of special ones."""
    texts = token_texts(tokenizer)
    names: dict[int, str] = {token: name for name, token in tokenizer.get_vocab().items()}
    return [names.get(token) if text is None else text for token, text in enumerate(texts)]
