"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TypeAlias

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.folders import LOCAL, PUBLISHED, new_run, newest_run
from benchmarks.inputs import FLAT, GAUSS, LOGITS, Case, at_least_1, device_name, size_of
from benchmarks.peers import PEERS
from benchmarks.results import append_csv, commit, records_of, slug
from benchmarks.run import BUDGET_S, SHORT_BUDGET_S, Run
from benchmarks.tables import print_tables, print_verdicts
from benchmarks.workloads import WORKLOADS, Workload, is_named

_BATCHES, _QUICK_BATCHES = (1, 8, 64, 256), (1, 8)
_VOCABS, _QUICK_VOCABS = (32000, 128256, 151936), (128256,)
_MAIN_SIZES = ((1, 128256), (8, 128256), (64, 128256), (256, 151936))
# What a chain costs in vocabularies of other sizes.
_WIDTHS, _OF_ANY_WIDTH = ((64, 32000), (64, 262144)), "chain 9"
# Fewer logits would need hundreds of inputs to outgrow an L2, and the time would be the launch's.
_LEAST_COLD = 2**20


_COMMANDS = {
    "compile": "benchmarks.compiling",
    "publish": "benchmarks.publish",
    "cliffs": "benchmarks.cliffs",
    "phases": "benchmarks.phases",
}
"""The module of each command."""

Entry: TypeAlias = "tuple[str, Workload, Case]"
"""A workload by name, and a case of it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 1 where fastlogits computed something wrong, or a document isn't up to date.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (["plots"], ["report"], ["readme"]):
        return _documents(arguments)
    if arguments and arguments[0] in _COMMANDS:
        status: int = import_module(_COMMANDS[arguments[0]]).main(arguments[1:])
        return status
    options = _parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    if options.base is not None:
        from benchmarks.base import compare

        return compare(options.base, arguments, console)
    return _run(options, console)


def _run(options: argparse.Namespace, console: Console) -> int:
    """Measure, report, and keep what was measured."""
    entries = [
        (name, workload, case)
        for device in options.device
        for name, workload in WORKLOADS.items()
        if _is_chosen(options, name)
        for case in _cases(options, torch.device(device), name)
        if workload.contenders(case.warm)
    ]
    peers = [peer for name, peer in PEERS.items() if name in options.peers and not options.only_ours]
    run = Run(SHORT_BUDGET_S if options.quick or options.main else BUDGET_S, peers, options.only_ours)
    _announce(options, entries, run, console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    start = time.monotonic()
    # Each capture begins with a garbage collection, which is short without what is imported by now.
    gc.collect()
    gc.freeze()
    try:
        with Progress(*columns, console=console, transient=True) as progress, torch.no_grad():
            task = progress.add_task("", total=len(entries))
            for number, (name, workload, case) in enumerate(entries):
                if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
                    console.print(f"stopped after {options.minutes:g} minutes: {len(entries) - number} cases left out")
                    break
                place = f"{case.device} {name}: {case.size}, {case.set_name}, {case.kind}"
                progress.update(task, description=place)
                done = run.measure(name, workload, case)
                if not options.no_csv:
                    options.out.mkdir(parents=True, exist_ok=True)
                    append_csv(records_of(done), options.out / f"{slug(device_name(case.device))}.csv")
                progress.advance(task)
    finally:
        gc.unfreeze()
    print_tables(run.results, console)
    if options.targets:
        print_verdicts(run.results, console)
    for device, speed in run.bandwidths.items():
        console.print(f"{device_name(device)}: a copy moves {speed / 1e9:,.0f} GB/s", highlight=False)
    if not options.no_csv:
        for device in map(torch.device, options.device):
            path = options.out / f"{slug(device_name(device))}.csv"
            console.print(f"wrote {path}; make figures draws it", soft_wrap=True)
    for problem in run.failed:
        console.print(f"not timed: {problem}", markup=False, soft_wrap=True)
    for problem in run.wrong:
        console.print(f"WRONG, not timed: {problem}", style="bold red", markup=False, soft_wrap=True)
    return 1 if run.wrong else 0


_CHECK_S = 0.4
"""What checking a case takes, about; transformers' processors are run for it."""


def _announce(options: argparse.Namespace, entries: Sequence[Entry], run: Run, console: Console) -> None:
    """Say how long it will take, and which peers don't run here."""
    seconds = sum(
        _CHECK_S + sum(run.budget_s[metric] for metric in workload.metrics(case)) for _, workload, case in entries
    )
    console.print(f"{len(entries)} cases, about {max(1, round(seconds / 60))} min", highlight=False)
    for peer in run.peers:
        absent = [device for device in options.device if device not in peer.devices]
        if absent:
            console.print(f"{peer.name}: doesn't run on {', '.join(absent)}", highlight=False)


def _documents(arguments: Sequence[str]) -> int:
    """Draw plots and write the report of the newest run, or fill the documents from what is published."""
    parser = argparse.ArgumentParser(f"python -m benchmarks {arguments[0]}")
    readme = arguments[0] == "readme"
    by_default = PUBLISHED if readme else newest_run() or PUBLISHED
    parser.add_argument("--results", type=Path, default=by_default, metavar="DIR", help="default: %(default)s")
    if readme:
        parser.add_argument("--check", action="store_true", help="only tell whether the documents are up to date")
    options = parser.parse_args(arguments[1:])
    if arguments[0] == "readme":
        from benchmarks.documents import fill

        stale = fill(options.results, write=not options.check)
        for path in stale:
            print(f"{path}: {'not up to date' if options.check else 'filled'}")
        return 1 if options.check and stale else 0
    if arguments[0] == "plots":
        from benchmarks.plots import draw_all

        for path in draw_all(options.results):
            print(f"wrote {path}")
        return 0
    from benchmarks.page import write

    print(f"wrote {write(options.results)}")
    return 0


def _is_chosen(options: argparse.Namespace, name: str) -> bool:
    if options.workload:
        return is_named(name, options.workload)
    workload = WORKLOADS[name]
    return (workload.quick or not options.quick) and (workload.main or not options.main)


def _cases(options: argparse.Namespace, device: torch.device, name: str) -> list[Case]:
    workload = WORKLOADS[name]
    sizes = options.size or [(batch, vocab) for vocab in options.vocab for batch in options.batch]
    if options.main and name == _OF_ANY_WIDTH and not options.chosen:
        sizes = [*sizes, *_WIDTHS]
    cases = [
        Case(device, batch, vocab, ids, logits, dtype)
        for batch, vocab in sizes
        for ids in (_ids(options, device, vocab) if workload.takes_ids else [0])
        for logits, dtype in _kinds(options, workload, batch)
    ]
    if options.cold and device.type == "cuda":
        large = [case for case in cases if case.batch * case.vocab >= _LEAST_COLD]
        cases += [Case(**{**vars(case), "cold": True}) for case in large]
    return cases


def _ids(options: argparse.Namespace, device: torch.device, vocab: int) -> list[int]:
    sizes = options.ids or ["10", "1000", *(["half"] if device.type == "cuda" and not options.quick else [])]
    return [vocab // 2 if ids == "half" else int(ids) for ids in sizes]


def _kinds(options: argparse.Namespace, workload: Workload, batch: int) -> list[tuple[str, torch.dtype]]:
    kinds = [kind for kind in workload.kinds(batch) if not options.logits or kind[0] in options.logits]
    if options.quick and not options.logits:
        kinds = [kind for kind in kinds if kind[0] == GAUSS]
    if options.main and not options.logits:
        # The mixture has flat rows too. Other dtypes are measured once.
        kinds = [(logits, dtype) for logits, dtype in kinds if logits == GAUSS or (
            logits != FLAT and dtype == torch.float32)]  # fmt: skip
    return kinds


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    whole = partial(at_least_1, "must be an integer of at least 1")
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Measure fastlogits beside what people use. Also: plots, report, readme, " + ", ".join(_COMMANDS),
    )
    parser.add_argument("--device", nargs="+", choices=present, default=present, help="default: all present")
    parser.add_argument("--batch", nargs="+", type=whole, help=f"batch sizes; default: {_BATCHES}")
    parser.add_argument("--vocab", nargs="+", type=whole, help=f"vocabulary sizes; default: {_VOCABS}")
    parser.add_argument("--size", nargs="+", type=size_of, help="sizes such as 64x128256, instead of those two")
    parser.add_argument("--ids", nargs="+", type=_set_size, help="numbers of tokens to forbid, or 'half' of them")
    parser.add_argument("--logits", nargs="+", choices=list(LOGITS), help="kinds of logits; default: a workload's own")
    parser.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help="only these: 'chain 9' '*Warper'; default: all that apply",
    )
    by_default = [name for name, peer in PEERS.items() if peer.by_default]
    parser.add_argument(
        "--peers", nargs="*", choices=list(PEERS), default=by_default, help="other packages; default: %(default)s"
    )
    parser.add_argument("--only-ours", action="store_true", help="fastlogits and its yardsticks alone")
    parser.add_argument("--quick", action="store_true", help="one vocabulary, two batch sizes, few rounds")
    parser.add_argument("--main", action="store_true", help="the main workloads at four sizes: minutes on a GPU")
    parser.add_argument("--minutes", type=float, help="stop then, with what is done by then")
    parser.add_argument("--cold", action="store_true", help="on CUDA, also with inputs that are not in the L2")
    parser.add_argument("--base", metavar="REF", help="compare fastlogits with that of another commit, in turns")
    parser.add_argument("--targets", action="store_true", help="also print whether the project's own targets are met")
    parser.add_argument(
        "--out",
        type=Path,
        default=LOCAL / new_run(commit()),
        metavar="DIR",
        help="default: a folder of its own, %(default)s",
    )
    parser.add_argument("--no-csv", action="store_true", help="only print: append no rows")
    options = parser.parse_args(arguments)
    for pattern in options.workload or ():
        if not any(is_named(name, [pattern]) for name in WORKLOADS):
            parser.error(f"--workload: nothing is called {pattern!r}; there are {', '.join(map(repr, WORKLOADS))}")
    options.chosen = bool(options.size or options.batch or options.vocab)
    if options.main and not options.chosen:
        options.size = list(_MAIN_SIZES)
    if options.main and not options.ids:
        options.ids = ["10", "1000"]
    options.batch = options.batch or (_QUICK_BATCHES if options.quick else _BATCHES)
    options.vocab = options.vocab or (_QUICK_VOCABS if options.quick else _VOCABS)
    narrowest = min(vocab for _, vocab in options.size) if options.size else min(options.vocab)
    most = max((int(ids) for ids in options.ids or ["1000"] if ids != "half"), default=0)
    if most > narrowest and any(WORKLOADS[name].takes_ids for name in WORKLOADS if _is_chosen(options, name)):
        parser.error(f"--ids: {most} tokens can't be taken from a vocabulary of {narrowest}")
    return options


def _set_size(text: str) -> str:
    return text if text == "half" else str(at_least_1("must be an integer of at least 1 or 'half'", text))


if __name__ == "__main__":
    sys.exit(main())
