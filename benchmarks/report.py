"""What people read: tables, the plot and the verdicts."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.results import Result, Results, slug
from benchmarks.targets import verdicts
from benchmarks.workloads import (
    ADD,
    CLONE,
    COPY,
    EMPTY,
    FAST,
    FAST_,
    FAST_DEVICE,
    FAST_DEVICE_,
    FILL,
    FILL_,
    FIRST_STEP,
    LOOP,
    TRANSFORMERS,
    WORKLOADS,
    device_name,
)

_METRICS = {"gpu_us": "GPU time (graph replay)", "host_us": "host time of an eager call", "cpu_us": "wall time"}
_YARDSTICKS = (CLONE, COPY, ADD, EMPTY)
_OURS = (FAST, FAST_, FAST_DEVICE, FAST_DEVICE_)
_PLOTTED_VOCAB = 128256
# Columns of a terminal in which four batch sizes fit with their ratios.
_WIDE = 125

_BLUE, _SKY, _GREY, _ORANGE = "#0b5fa5", "#5aa9e6", "#7a7a7a", "#d9730d"
# A colour for whose code it is, a broken line for out of place, so that in place and out of place pair up.
_LINES: dict[str, dict[str, object]] = {
    FAST_: {"color": _BLUE, "marker": "o", "linewidth": 2.4},
    FAST: {"color": _BLUE, "marker": "o", "linewidth": 1.6, "linestyle": "--", "markerfacecolor": "white"},
    FAST_DEVICE_: {"color": _SKY, "marker": "s", "linewidth": 1.6},
    FAST_DEVICE: {"color": _SKY, "marker": "s", "linewidth": 1.2, "linestyle": "--", "markerfacecolor": "white"},
    FILL_: {"color": _GREY, "marker": "^", "linewidth": 1.4},
    FILL: {"color": _GREY, "marker": "^", "linewidth": 1.2, "linestyle": "--", "markerfacecolor": "white"},
    TRANSFORMERS: {"color": _ORANGE, "marker": "D", "linewidth": 1.6, "linestyle": "--", "markerfacecolor": "white"},
}


def print_tables(results: Results, console: Console) -> None:
    """One table per workload, metric and number of ids: contenders down, batch sizes across."""

    def table_of(result: Result) -> tuple[str, str, str, str]:
        case = result.case
        return device_name(case.device), result.workload, result.metric, case.set_name

    for (device, workload, metric, set_name), group in groupby(_sorted(results), key=table_of):
        members = list(group)
        baseline: str | None = WORKLOADS[workload].baseline
        batches = sorted({result.case.batch for result in members})
        if console.width < _WIDE or not any(result.contender == baseline for result in members):
            baseline = None
        title = f"{workload}, {set_name}: {_METRICS[metric]}, us"
        table = Table(
            title=f"{title} (times faster than {baseline})\n{device}" if baseline else f"{title}\n{device}",
            title_justify="left",
            title_style="bold",
        )
        table.add_column("vocab", justify="right", no_wrap=True)
        table.add_column("contender", no_wrap=True)
        for batch in batches:
            table.add_column(f"batch {batch}", justify="right", no_wrap=True)
        for vocab, rows in groupby(members, key=lambda result: result.case.vocab):
            table.add_section()
            cells: dict[str, dict[int, Text]] = {}
            for result in rows:
                cells.setdefault(result.contender, {})[result.case.batch] = _cell(results, result, baseline)
            for i, (contender, by_batch) in enumerate(cells.items()):
                style = "bold" if contender in _OURS else "dim" if contender in _YARDSTICKS else ""
                across = [by_batch.get(batch, Text("")) for batch in batches]
                table.add_row("" if i else str(vocab), contender, *across, style=style)
        console.print(table)


def print_verdicts(results: Results, console: Console) -> None:
    """Each target with what was measured where it is hardest to meet."""
    found = verdicts(results)
    if not found:
        return
    table = Table(title="Targets, each where it is hardest to meet", title_justify="left", title_style="bold")
    for heading in ("target", "measured", ""):
        table.add_column(heading)
    for verdict in found:
        word = Text("met", "green") if verdict.met else Text("missed", "bold red")
        table.add_row(verdict.target, verdict.measured, word)
    console.print(table)


def draw(results: Results, device: torch.device, folder: Path) -> list[Path]:
    """Draw speed-ups over the loop at the first step by batch size, as SVG and PNG.

    Returns:
        The files written; none where the run has no time of the loop.
    """
    shown = [
        result
        for result in results.all
        if result.case.device == device and result.workload == FIRST_STEP and result.contender in _LINES
        if results.ratio(result, LOOP) is not None
    ]
    if not shown:
        return []
    vocabs = {result.case.vocab for result in shown}
    vocab = _PLOTTED_VOCAB if _PLOTTED_VOCAB in vocabs else max(vocabs)
    shown = [result for result in shown if result.case.vocab == vocab]
    metrics = list(dict.fromkeys(result.metric for result in shown))
    sizes = sorted({result.case.ids for result in shown})
    figure = Figure(figsize=(4.9 * len(sizes) + 0.4, 3.6 * len(metrics) + 1.4), layout="constrained")
    panels = figure.subplots(len(metrics), len(sizes), squeeze=False, sharex=True)
    for panel_row, metric in zip(panels, metrics, strict=True):
        for panel, ids in zip(panel_row, sizes, strict=True):
            chosen = [result for result in shown if result.metric == metric and result.case.ids == ids]
            _draw_panel(panel, results, chosen)
            panel.set_title(f"{ids} ids, {_METRICS[metric]}", fontsize=10)
        panel_row[0].set_ylabel("times faster than the loop")
    for panel in panels[-1]:
        panel.set_xlabel("batch size")
    handles = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    order = [name for name in (*_LINES, LOOP) if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"Forbidding tokens at the first step: {device_name(device)}\n"
        f"float32 logits, vocabulary {vocab:,}; solid: in place, as the loop is; broken: into a new tensor",
        fontsize=11,
    )
    paths = [folder / f"{slug(device)}-first-step.{form}" for form in ("svg", "png")]
    # Neither file changes where its content doesn't.
    with mpl.rc_context({"svg.hashsalt": "fastlogits"}):
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=130, metadata={"Software": None})
    return paths


def _sorted(results: Results) -> list[Result]:
    """Results by device, workload, metric, ids and vocabulary; contenders and batch sizes stay in their order."""
    devices = list(dict.fromkeys(result.case.device for result in results.all))
    workloads = list(dict.fromkeys(result.workload for result in results.all))
    metrics = list(_METRICS)

    def order(result: Result) -> tuple[int, int, int, bool, int, int]:
        case = result.case
        return (
            devices.index(case.device), workloads.index(result.workload), metrics.index(result.metric),
            case.is_half, 0 if case.is_half else case.ids, case.vocab,
        )  # fmt: skip

    return sorted(results.all, key=order)


def _cell(results: Results, result: Result, baseline: str | None) -> Text:
    if result.timing is None:
        return Text(result.remark, "bold red" if result.remark == "wrong" else "dim")
    us = result.timing.median
    text = Text(f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}")
    ratio = None if baseline is None else results.ratio(result, baseline)
    if ratio is None:
        return text
    if result.contender == baseline or result.contender in _YARDSTICKS:
        return text.append(" " * 10)
    faster = 1 / ratio
    shown = "< 0.01" if faster < 0.01 else f"{faster:.2f}" if faster < 1 else f"{faster:.1f}" if faster < 10 else ""
    return text.append(f"{shown or format(faster, ',.0f'):>8} x", "cyan")


def _draw_panel(panel: Axes, results: Results, chosen: list[Result]) -> None:
    for contender, style in _LINES.items():
        points = [
            (r.case.batch, 1 / ratio) for r in chosen if r.contender == contender if (ratio := results.ratio(r, LOOP))
        ]
        if points:
            panel.plot(*zip(*points, strict=True), label=contender, markersize=6, **style)  # type: ignore[arg-type]
    panel.axhline(1, color="black", linewidth=1, linestyle=":", label=LOOP)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    batches = sorted({result.case.batch for result in chosen})
    panel.set_xticks(batches, [str(batch) for batch in batches])
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} x"))
    panel.grid(which="major", color="#dddddd", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
