"""Plots of the results files, as SVG and PNG. Any machine can draw them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TypeVar

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.documents import MEANS
from benchmarks.inputs import GAUSS
from benchmarks.results import Record, newest, read_folder, slug
from benchmarks.tables import METRICS
from benchmarks.workloads import (
    COPY,
    EMPTY,
    FAST,
    FAST_,
    FAST_DEVICE,
    FAST_DEVICE_,
    FILL,
    FILL_,
    LOOP,
    OURS,
    THEIRS,
    TRANSFORMERS,
    WORKLOADS,
    YARDSTICKS,
)

_Key = TypeVar("_Key")

_VOCAB, _LARGEST, _BATCH = 128256, 151936, 64
_COLUMNS = 4
_HEADLINE = {
    "chain 5": "five processors: repetition penalty, first tokens, temperature, top-k, top-p",
    "T k p": "temperature, top-k, top-p",
    "draw T k p": "temperature, top-k, top-p, and a token drawn",
}
"""The jobs of the picture that comes first, and what they are called there."""
_OURS, _THEIRS, _YARDSTICK = "#0b5fa5", "#d9730d", "#7a7a7a"
_OTHERS = ("#2a8c4a", "#8a3ffc", "#b5338a", "#5aa9e6", "#a08000", "#00767a", "#c0392b")
_COLOURS = {"ours": _OURS, "theirs": _THEIRS, "others": "#2a8c4a", "yardstick": "#b0b0b0"}
_SHORT = {
    COPY: "a copy of the logits",
    FAST: "fastlogits",
    FAST_: "fastlogits in place",
    FAST_DEVICE: "fastlogits, position on the GPU",
    FAST_DEVICE_: "fastlogits in place, position on the GPU",
    LOOP: "a loop over the tokens",
    FILL: "torch's masked_fill",
    FILL_: "torch's masked_fill in place",
    TRANSFORMERS: "transformers, first tokens",
}
_TITLE = 44
"""Characters of a line of a panel's title."""
_MARKS, _DECADES = 3, 5
"""The fewest marks of an axis; the powers of ten from which on only these are marked."""


def draw_all(folder: Path) -> list[Path]:
    """Plot a folder's files into the folder: up to five plots for each device and metric.

    Returns:
        The files written.
    """
    records = [record for record in newest(read_folder(folder)) if record.median is not None]
    written: list[Path] = []
    for device in dict.fromkeys(record.device for record in records):
        for metric in METRICS:
            chosen = [r for r in records if r.device == device and r.metric == metric and r.cache == "warm"]
            for name, draw in _PLOTS.items():
                figure = draw(chosen) if metric != "host_us" or draw in (headline, speed_up) else None
                if figure is not None:
                    figure.suptitle(f"{figure.get_suptitle()}\n{device}, {METRICS[metric]}", fontsize=11)
                    written += _save(figure, folder / f"{slug(device)}-{name}-{metric.removesuffix('_us')}")
    return written


def speed_up(records: Sequence[Record]) -> Figure | None:
    """Times faster than a workload's baseline, by batch size; one panel for each workload and kind of logits.

    A baseline that does another job, such as a copy, says nothing of that kind: such workloads have no panel.
    """
    panels = {}
    for key, group in _grouped(records, lambda r: (r.workload, r.ids, r.logits, r.dtype)).items():
        workload = WORKLOADS.get(key[0])
        if workload is None or not workload.main or workload.baseline in YARDSTICKS:
            continue
        shown = [r for r in group if r.vocab == _VOCAB]
        shown += [r for r in group if r.vocab == _LARGEST and r.batch not in {each.batch for each in shown}]
        base = {r.batch: r.median or 0.0 for r in shown if r.contender == workload.baseline}
        lines = {
            name: [(r.batch, base[r.batch] / (r.median or 1.0)) for r in line if r.batch in base]
            for name, line in _grouped(shown, lambda r: r.contender).items()
            if name != workload.baseline and name not in YARDSTICKS
        }
        lines = {name: points for name, points in lines.items() if len(points) > 1}
        if lines:
            panels[_panel_title(key)] = (lines, workload.baseline)
    if not panels:
        return None
    batches = {batch for lines, _ in panels.values() for points in lines.values() for batch, _ in points}
    figure, axes = _grid(len(panels))
    figure.suptitle(
        f"Times faster by batch size, vocabulary {_VOCAB:,} (or {_LARGEST:,}): higher is better\n"
        "The dotted line is what the others are compared with: what is below it is slower"
    )
    for axis, (title, (lines, baseline)) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            _line(axis, name, points)
        axis.axhline(1, color="black", linewidth=1, linestyle=":")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("batch size")
        axis.set_ylabel(f"times faster than\n{_SHORT.get(baseline, baseline)}", fontsize=8)
        _log_axis(axis.xaxis, batches, at=batches)
        _log_axis(axis.yaxis, {1.0, *(ratio for points in lines.values() for _, ratio in points)}, unit=" x")
    return _legend(figure, axes)


def against_memory_limit(records: Sequence[Record]) -> Figure | None:
    """Time against the memory-bandwidth limit: the time to move a workload's bytes, measured in the same run."""
    shown = [
        r for r in records
        if r.limit_us and r.contender not in YARDSTICKS and r.workload in WORKLOADS and WORKLOADS[r.workload].main
    ]  # fmt: skip
    if not shown:
        return None
    figure, (axis,) = _grid(1, size=(8.0, 6.0))
    title = "Time of one step against the memory-bandwidth limit: lower is better"
    if any((r.median or 0) < (r.limit_us or 0) for r in shown):
        title += "\nBelow the limit: in place, a step touches only some of the logits; or they were in the cache"
    figure.suptitle(title)
    for group, colour in (("theirs", _THEIRS), ("others", _OTHERS[0]), ("ours", _OURS)):
        of_group = [r for r in shown if _group(r.contender) == group]
        if of_group:
            axis.scatter(
                [r.limit_us or 0 for r in of_group], [r.median or 0 for r in of_group],
                s=14, alpha=0.7, color=colour, label={"ours": "fastlogits", "theirs": THEIRS}.get(group, group),
            )  # fmt: skip
    ends = [min(r.limit_us or 1 for r in shown), max(r.limit_us or 1 for r in shown)]
    axis.plot(ends, ends, color="black", linewidth=1, label="the limit: the step's bytes, at the speed of memory")
    empty = [r.median for r in records if r.contender == EMPTY and r.median]
    if empty:
        axis.axhline(min(empty), color=_YARDSTICK, linewidth=1, linestyle=":", label="an empty kernel")
    axis.set(xlabel="memory-bandwidth limit, microseconds", ylabel="measured, microseconds")
    _log_axis(axis.xaxis, ends)
    _log_axis(axis.yaxis, {*ends, *empty, *(r.median or 1 for r in shown)})
    return _legend(figure, [axis])


def by_length(records: Sequence[Record]) -> Figure | None:
    """The times of chains of several lengths as bars."""
    return _bars(records, {name: MEANS[name] for name in WORKLOADS if re.fullmatch(r"chain \d+", name)}, least=3)


def by_vocabulary(records: Sequence[Record]) -> Figure | None:
    """Cost against the size of the vocabulary, a panel for each workload that was measured at several."""
    panels = {}
    for key, group in _grouped(records, lambda r: (r.workload, r.ids, r.logits, r.dtype, r.batch)).items():
        workload = WORKLOADS.get(key[0])
        if workload is None or not workload.main or key[4] not in (8, _BATCH):
            continue
        lines = {
            name: sorted((r.vocab, r.median or 0.0) for r in line)
            for name, line in _grouped(group, lambda r: r.contender).items()
            if name not in YARDSTICKS or name == COPY
        }
        if any(len(points) > 2 for points in lines.values()):
            panels[f"{_panel_title(key[:4])}\nbatch size {key[4]}"] = lines
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    figure.suptitle("Time of one step by vocabulary: lower is better")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            _line(axis, name, points)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="tokens of the vocabulary", ylabel="microseconds")
        vocabularies = {vocab for points in lines.values() for vocab, _ in points}
        _log_axis(axis.xaxis, vocabularies, at=vocabularies)
        _log_axis(axis.yaxis, {time for points in lines.values() for _, time in points})
    return _legend(figure, axes)


def headline(records: Sequence[Record]) -> Figure | None:
    """The times of a few jobs as bars."""
    return _bars(records, _HEADLINE)


def _bars(records: Sequence[Record], jobs: Mapping[str, str], least: int = 1) -> Figure | None:
    """Times as bars, on gauss logits of float32, at the size that most was measured at.

    Args:
        records: what was measured.
        jobs: the workloads, and what they are called.
        least: how many of them must have been measured.
    """
    shown = [r for r in records if (r.logits, r.dtype, r.ids) == (GAUSS, "float32", 0) and r.workload in jobs]
    shown = [r for r in shown if r.contender not in YARDSTICKS or r.contender == COPY]
    sizes = _grouped([r for r in shown if r.batch > 1], lambda r: (r.batch, r.vocab))
    if not sizes:
        return None
    size = (_BATCH, _VOCAB) if (_BATCH, _VOCAB) in sizes else max(sizes, key=lambda each: len(sizes[each]))
    found = _grouped(sizes[size], lambda r: r.workload)
    bars = {jobs[job]: sorted(found[job], key=lambda r: -(r.median or 0)) for job in jobs if job in found}
    if len(bars) < least:
        return None
    figure = Figure(figsize=(8.6, 0.34 * sum(map(len, bars.values())) + 0.5 * len(bars) + 1.2), layout="constrained")
    axis = figure.subplots()
    _draw_bars(axis, bars)
    figure.suptitle(f"Time of one step on logits of {size[0]} x {size[1]:,}: lower is better")
    return figure


def _draw_bars(axis: Axes, bars: Mapping[str, Sequence[Record]]) -> None:
    """A group of horizontal bars for each job, each with its time behind it."""
    y, places, names = 0.0, [], []
    longest = max(r.median or 0 for group in bars.values() for r in group)
    for job, group in bars.items():
        axis.text(0, y, job, fontsize=9, fontweight="bold", va="center")
        for record in group:
            y += 1
            time = record.median or 0.0
            colour = _COLOURS["yardstick" if record.contender in YARDSTICKS else _group(record.contender)]
            axis.barh(y, time, height=0.72, color=colour)
            axis.text(time + longest * 0.01, y, f"{time:,.0f} us", fontsize=8, va="center")
            places.append(y)
            names.append(_SHORT.get(record.contender, record.contender))
        y += 1.4
    axis.set_yticks(places, names, fontsize=8)
    axis.set_ylim(y - 0.8, -0.8)
    axis.set_xlim(0, longest * 1.12)
    axis.set_xlabel("microseconds")
    axis.spines[["top", "right"]].set_visible(False)


_PLOTS: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
    "headline": headline,
    "speed-up": speed_up,
    "memory-limit": against_memory_limit,
    "chain-length": by_length,
    "vocabulary": by_vocabulary,
}


def _grouped(records: Iterable[Record], key: Callable[[Record], _Key]) -> dict[_Key, list[Record]]:
    found: dict[_Key, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return found


def _panel_title(key: Sequence[object]) -> str:
    workload, ids, logits, dtype = key
    kinds = [f"{logits} logits"] if len(WORKLOADS[str(workload)].inputs) > 1 else []
    kinds += [str(dtype)] if len(WORKLOADS[str(workload)].dtypes) > 1 else []
    parts = (MEANS.get(str(workload), str(workload)) + (f": {ids:,}" if ids else "")).split(", ")
    job = fill(", ".join(part.replace(" ", "\u00a0") for part in parts), _TITLE)  # broken after commas only
    return "\n".join([job, ", ".join(kinds)] if kinds else [job])


def _group(contender: str) -> str:
    theirs = contender.startswith(("transformers", "article"))
    return "ours" if contender in OURS else "theirs" if theirs else "others"


def _grid(count: int, size: tuple[float, float] | None = None) -> tuple[Figure, list[Axes]]:
    across = min(_COLUMNS, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=size or (max(7.0, 3.6 * across + 0.6), 2.8 * down + 1.4), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(which="major", color="#dddddd", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[:count]


def _line(axis: Axes, name: str, points: Sequence[tuple[float, float]]) -> None:
    group = _group(name)
    if name in YARDSTICKS:
        colour, width = _YARDSTICK, 1.0
    elif group == "ours":
        colour, width = (_OURS, 2.0) if name in (FAST, FAST_) else ("#5aa9e6", 1.2)
    elif name.startswith(THEIRS):
        colour, width = _THEIRS, 1.6
    else:
        colour, width = _OTHERS[sum(map(ord, name)) % len(_OTHERS)], 1.4
    dashed = "--" if "in place" in name or name.endswith("_") else "-"
    xs, ys = zip(*sorted(points), strict=True)
    axis.plot(xs, ys, dashed, marker="o", markersize=4, color=colour, linewidth=width, label=_SHORT.get(name, name))


def _log_axis(axis: Axis, values: Collection[float], unit: str = "", at: Collection[float] = ()) -> None:
    """A logarithmic axis with at least three marks, whose labels are written out.

    Args:
        axis: which one.
        values: what it shows.
        unit: what follows each label.
        at: where the marks are; nothing for 1, 2, 5, 10 and so on.
    """
    marks = sorted(at) if at else _marks(min(values), max(values))
    while len(marks) < _MARKS:
        marks.append(marks[-1] * 2)
    ends = (marks[0] / 1.15, marks[-1] * 1.15)
    axis.axes.set(**{"xscale": "log", "xlim": ends} if isinstance(axis, XAxis) else {"yscale": "log", "ylim": ends})
    axis.set_ticks(marks, [f"{mark:,.10g}{unit}" for mark in marks], fontsize=8)
    axis.set_minor_locator(NullLocator())


def _marks(low: float, high: float) -> list[float]:
    """Round numbers from one below to one above: 1, 2, 5, 10 and so on, or only the tens where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
    steps = (1, 2, 5) if len(powers) < _DECADES else (1,)
    marks = [10.0**power * step for power in powers for step in steps]
    first = max(place for place, mark in enumerate(marks) if mark <= low)
    last = min(place for place, mark in enumerate(marks) if mark >= high)
    return marks[first : max(last, first + _MARKS - 1) + 1]


def _legend(figure: Figure, axes: Sequence[Axes]) -> Figure:
    handles: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    columns = max(2, int(figure.get_figwidth() // 2.6))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    return figure


def _save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_name(f"{path.name}.{form}") for form in ("svg", "png")]
    # Neither file changes where its content doesn't.
    with mpl.rc_context({"svg.hashsalt": "fastlogits"}):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=110, metadata={"Software": None})
    return paths
