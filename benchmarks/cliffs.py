"""Where a selection takes much longer than its neighbours: every rule, alone and in pairs, on logits of many kinds.

    python -m benchmarks cliffs                          # on a GPU: float32, 8 rows, 128256 tokens
    python -m benchmarks cliffs --vocab 32000 --alone    # each rule by itself
    python -m benchmarks cliffs --dtype bfloat16

GPU time by graph replay, after a temperature of 0.7. What takes more than three times as long as top-p on gauss of the
same size is listed, and everything is written to ``build/benchmarks/cliffs``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from fastlogits_kernels.rules import RULES, Rule
from fastlogits_kernels.selection import launch
from rich.console import Console
from rich.table import Table

from benchmarks.folders import LOCAL
from benchmarks.inputs import FLAT, GAUSS, MIXTURE, ZIPF, Case, device_name, random_scores
from benchmarks.results import environment, read_rows, slug, write_rows
from benchmarks.timing import ReplayBunch, interleaved

RESULTS = LOCAL / "cliffs"
VALUES = {
    "top_k": 50, "top_p": 0.9, "min_p": 0.05, "top_a": 0.2, "typical": 0.9, "epsilon": 3e-4, "eta": 3e-4, "top_h": 0.5,
    "top_n_sigma": 1.0,
}  # fmt: skip
"""A usual value of each rule."""
CLIFF = 3.0
"""More than so many times top-p on gauss is too much."""
TEMPERATURE = 0.7

Kind = Callable[[Case], torch.Tensor]


def _of_inputs(kind: str) -> Kind:
    return lambda case: random_scores(Case(case.device, case.batch, case.vocab, logits=kind))


def _ties(case: Case) -> torch.Tensor:
    return _of_inputs(GAUSS)(case).bfloat16().float()


def _spike(case: Case) -> torch.Tensor:
    scores = _of_inputs(FLAT)(case) * 0.1
    scores[:, case.vocab // 3] = 12.0
    return scores


def _half_banned(case: Case) -> torch.Tensor:
    scores = _of_inputs(GAUSS)(case)
    scores[:, ::2] = -math.inf
    return scores


LOGITS: dict[str, Kind] = {
    **{kind: _of_inputs(kind) for kind in (GAUSS, ZIPF, FLAT, MIXTURE)},
    "ties": _ties, "spike": _spike, "half -inf": _half_banned,
}  # fmt: skip
"""Gauss, zipf, flat and mixture as elsewhere; gauss rounded to bfloat16; one likely token over a flat tail; every other
token banned."""


def rule_sets(alone: bool) -> list[tuple[str, ...]]:
    """The rules of each call, in their order."""
    return [*((kind,) for kind in RULES), *(() if alone else itertools.combinations(RULES, 2))]


def _call(scores: torch.Tensor, kinds: Sequence[str]) -> Callable[[], torch.Tensor]:
    selection = launch.Selection([Rule(kind, VALUES[kind]) for kind in kinds], scores.shape[1], scores.device)
    temperature, out = torch.tensor(TEMPERATURE, device=scores.device), torch.empty_like(scores)
    return lambda: launch.launch_select(scores, selection, out=out, temperature=temperature)


def _compile(sets: Sequence[tuple[str, ...]], vocab: int, dtype: torch.dtype) -> None:
    for kinds in sets:
        _call(torch.zeros(1, vocab, dtype=dtype, device="cuda"), kinds)()
    torch.cuda.synchronize()


def _compile_all(sets: Sequence[tuple[str, ...]], vocab: int, dtype: torch.dtype) -> None:
    """Fill the cache on disk, in as many processes as there are cores."""
    workers = min(len(sets), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_compile, args=(sets[i::workers], vocab, dtype)) for i in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def measured(case: Case, alone: bool, budget_s: float) -> list[dict[str, str]]:
    """Microseconds of each set of rules on each kind of logits, and how many times top-p on gauss that is."""
    sets = rule_sets(alone)
    _compile_all(sets, case.vocab, case.dtype)
    us: dict[tuple[str, str], float] = {}
    for name, make in LOGITS.items():
        scores = make(case).to(case.dtype)
        for kinds in sets:
            bunch = ReplayBunch([_call(scores, kinds)])
            us[" ".join(kinds), name] = interleaved({name: bunch}, budget_s)[name].median
    yardstick = us["top_p", GAUSS]
    return [
        {"rules": rules, "logits": logits, "us": f"{each:.1f}", "ratio": f"{each / yardstick:.2f}"}
        for (rules, logits), each in us.items()
    ]


def main(arguments: Sequence[str]) -> int:
    """Measure, print what takes too long, and keep everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks cliffs", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--alone", action="store_true", help="each rule by itself, no pairs")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of each measurement; default: %(default)s")
    parser.add_argument("--out", type=Path, help="CSV file; by default of the GPU's name, in build/benchmarks/cliffs")
    asked = parser.parse_args(arguments)
    console = Console()
    if not torch.cuda.is_available():
        console.print("cliffs are looked for on a GPU, and there is none here")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    case = Case(device, asked.batch, asked.vocab, dtype=getattr(torch, asked.dtype))
    rows = measured(case, asked.alone, asked.budget)
    where = {"batch": asked.batch, "vocab": asked.vocab, "dtype": asked.dtype}
    table = Table(title=f"more than {CLIFF:g} x top-p on gauss, {asked.batch} x {asked.vocab} {asked.dtype}")
    for heading in ("rules", "logits", "us", "ratio"):
        table.add_column(heading, justify="left" if heading in ("rules", "logits") else "right")
    cliffs = [row for row in rows if float(row["ratio"]) > CLIFF]
    for row in sorted(cliffs, key=lambda row: -float(row["ratio"])):
        table.add_row(*(row[heading] for heading in ("rules", "logits", "us", "ratio")))
    console.print(table)
    console.print(f"{len(cliffs)} of {len(rows)}")
    path = asked.out or RESULTS / f"{slug(device_name(device))}.csv"
    kept = [row for row in read_rows(path) if any(row[key] != str(where[key]) for key in where)]
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_rows(path, [*kept, *({"when": when, **environment(), **where, **row} for row in rows)])
    return 0
