"""What people read in the terminal: tables and verdicts."""

from __future__ import annotations

from itertools import groupby

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.inputs import device_name
from benchmarks.results import Result, Results
from benchmarks.targets import verdicts
from benchmarks.workloads import OURS, WORKLOADS, YARDSTICKS

METRICS = {"gpu_us": "GPU time (graph replay)", "host_us": "host time of an eager call", "cpu_us": "wall time"}
# Columns of a terminal in which four batch sizes fit with their ratios.
_WIDE = 125
_LIMIT = "memory-bandwidth limit"


def described(device: torch.device) -> str:
    """A device for people, with its threads where they count."""
    return device_name(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")


def print_tables(results: Results, console: Console) -> None:
    """One table per workload, metric, number of ids and kind of logits: contenders down, batch sizes across."""

    def table_of(result: Result) -> tuple[torch.device, str, str, str, str]:
        case = result.case
        return case.device, result.workload, result.metric, case.set_name, case.kind

    for (device, workload, metric, set_name, kind), group in groupby(_sorted(results), key=table_of):
        members = list(group)
        baseline: str | None = WORKLOADS[workload].baseline
        batches = sorted({result.case.batch for result in members})
        if console.width < _WIDE or not any(result.contender == baseline for result in members):
            baseline = None
        title = f"{workload}, {set_name}, {kind}: {METRICS[metric]}, us"
        table = Table(
            title=f"{title} (times faster than {baseline})\n{described(device)}" if baseline else f"{title}\n{device}",
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
                if result.limit_us is not None and metric != "host_us":
                    limit = Text(_us(result.limit_us) + (" " * 10 if baseline else ""))
                    cells.setdefault(_LIMIT, {})[result.case.batch] = limit
            cells |= {_LIMIT: cells.pop(_LIMIT)} if _LIMIT in cells else {}
            for i, (contender, by_batch) in enumerate(cells.items()):
                style = "bold" if contender in OURS else "dim" if contender in (*YARDSTICKS, _LIMIT) else ""
                across = [by_batch.get(batch, Text("")) for batch in batches]
                table.add_row("" if i else str(vocab), contender, *across, style=style)
        console.print(table)
        for remark in dict.fromkeys(f"{r.contender}: {r.remark}" for r in members if ": " in r.remark):
            console.print(remark, style="dim", markup=False, soft_wrap=True)


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


def _sorted(results: Results) -> list[Result]:
    """Results by device, workload, metric, ids and vocabulary; contenders and batch sizes stay in their order."""
    devices = list(dict.fromkeys(result.case.device for result in results.all))
    workloads = list(dict.fromkeys(result.workload for result in results.all))
    metrics = list(METRICS)

    def order(result: Result) -> tuple[object, ...]:
        case = result.case
        return (
            devices.index(case.device), workloads.index(result.workload), metrics.index(result.metric),
            case.is_half, 0 if case.is_half else case.ids, case.kind, case.vocab,
        )  # fmt: skip

    return sorted(results.all, key=order)


def _us(us: float) -> str:
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def _cell(results: Results, result: Result, baseline: str | None) -> Text:
    if result.timing is None:
        word = result.remark.partition(":")[0]
        return Text(word, "bold red" if word == "wrong" else "dim")
    text = Text(_us(result.timing.median))
    ratio = None if baseline is None else results.ratio(result, baseline)
    if ratio is None:
        return text
    if result.contender == baseline or result.contender in YARDSTICKS:
        return text.append(" " * 10)
    faster = 1 / ratio
    shown = "< 0.01" if faster < 0.01 else f"{faster:.2f}" if faster < 1 else f"{faster:.1f}" if faster < 10 else ""
    return text.append(f"{shown or format(faster, ',.0f'):>8} x", "cyan" if faster >= 1 else "red")
