"""The command line: ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.report import draw, print_tables, print_verdicts
from benchmarks.results import Result, Results, append_csv
from benchmarks.timing import Bunch, NotCapturableError, ReplayBunch, WallBunch, interleaved
from benchmarks.workloads import COLD, WORKLOADS, Case, Contender, Workload, random_scores, rotating_inputs

_BATCHES, _QUICK_BATCHES = (1, 8, 64, 256), (1, 8)
_VOCABS, _QUICK_VOCABS = (32000, 128256, 151936), (128256,)
_BUDGET_S = {"cpu_us": 2.0, "gpu_us": 0.6, "host_us": 0.8}
_QUICK_BUDGET_S = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report and return the exit status: 1 where a contender computed something wrong."""
    options = _parse(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    results, problems = Results(), []
    cases = [
        (name, workload, case)
        for device in options.device
        for name, workload in WORKLOADS.items()
        if _is_chosen(options, name)
        for case in _cases(options, torch.device(device), workload)
        if workload.contenders(case)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # What is imported by now stays: with that out of its way, the collection that each capture begins with is short.
    gc.collect()
    gc.freeze()
    try:
        with Progress(*columns, console=console, transient=True) as progress, torch.no_grad():
            task = progress.add_task("", total=len(cases))
            for name, workload, case in cases:
                progress.update(task, description=f"{case.device} {name}: {case.size}, {case.set_name}")
                problems += _measure(results, name, workload, case, options.quick)
                progress.advance(task)
    finally:
        gc.unfreeze()
    print_tables(results, console)
    print_verdicts(results, console)
    if not options.no_csv:
        options.out.mkdir(parents=True, exist_ok=True)
        for device in map(torch.device, options.device):
            for path in (append_csv(results, device, options.out), *draw(results, device, options.out)):
                console.print(f"wrote {path}", soft_wrap=True)
    for problem in problems:
        console.print(f"WRONG, not timed: {problem}", style="bold red", markup=False, soft_wrap=True)
    return 1 if problems else 0


def _measure(results: Results, name: str, workload: Workload, case: Case, quick: bool) -> list[str]:
    """Check all contenders of a case, time those that are right, and return what is wrong with the others."""
    original = random_scores(case)
    expected = workload.expected(case, original)
    # All work on the same tensor, so that none finds its input warmer than another does.
    scores = original.clone()
    place = f"{name}, {case.device}, {case.size}, {case.set_name}"
    contenders = workload.contenders(case)
    problems = {}
    for contender in contenders:
        scores.copy_(original)
        problem = _problem(contender, scores, original, expected, workload.rounds)
        if problem is not None:
            problems[contender.name] = f"{place}: {contender.name} {problem}"
    inputs = [scores]
    if workload.rotates:
        inputs += [original.clone() for _ in range(rotating_inputs(case) - 1)]
    for metric in workload.metrics(case):
        bunches: dict[str, Bunch] = {}
        uncaptured = set()
        for contender in contenders:
            if contender.name in problems:
                continue
            if metric != "gpu_us":
                bunches[contender.name] = WallBunch(contender.bind(scores), case.device)
                continue
            try:
                replays = ReplayBunch([contender.bind(each) for each in inputs])
            except NotCapturableError:
                uncaptured.add(contender.name)
                continue
            scores.copy_(original)
            if contender.yardstick or _is_right(replays.once(), expected, workload.rounds):
                bunches[contender.name] = replays
            else:
                problems[contender.name] = f"{place}: {contender.name} differs from plain torch as a replayed graph"
        timings = interleaved(bunches, _QUICK_BUDGET_S if quick else _BUDGET_S[metric])
        for contender in contenders:
            remark = "wrong" if contender.name in problems else "no graph" if contender.name in uncaptured else ""
            timing = timings.get(contender.name)
            results.add(Result(name, case, contender.name, contender.in_place, metric, timing, remark))
    return list(problems.values())


def _problem(
    contender: Contender, scores: torch.Tensor, original: torch.Tensor, expected: torch.Tensor, rounds: bool
) -> str | None:
    """What is wrong with a contender's result, if anything."""
    if contender.yardstick:
        return None
    try:
        processed = contender.bind(scores)()
    except Exception as error:  # whatever a contender breaks with, the others are still to be measured
        return f"raised {type(error).__name__}: {error}"
    if not _is_right(processed, expected, rounds):
        return "differs from plain torch"
    if not contender.in_place and not _same(scores, original):
        return "wrote its input"
    if contender.in_place and processed is not scores:
        return "is not in place"
    return None


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal in every bit."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first.view(torch.int32), second.view(torch.int32))


def _is_right(found: torch.Tensor, expected: torch.Tensor, rounds: bool) -> bool:
    """Whether a result is the expected one: in every bit, or, where it ``rounds``, but for what rounding explains.

    That is a unit or two in the last places, and a token in a hundred thousand that a threshold keeps or drops.
    """
    if not rounds or found.shape != expected.shape or found.dtype != expected.dtype:
        return _same(found, expected)
    wrong = ~torch.isclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    return int(wrong.sum()) <= found.numel() // 100_000


def _is_chosen(options: argparse.Namespace, name: str) -> bool:
    if options.workload:
        return any(fnmatchcase(name, pattern) for pattern in options.workload)
    return (options.cold or name != COLD) and (WORKLOADS[name].quick or not options.quick)


def _cases(options: argparse.Namespace, device: torch.device, workload: Workload) -> list[Case]:
    if not workload.takes_ids:
        return [Case(device, batch, vocab, 0) for vocab in options.vocab for batch in options.batch]
    sizes = options.ids or ["10", "1000", *(["half"] if device.type == "cuda" and not options.quick else [])]
    return [
        Case(device, batch, vocab, vocab // 2 if ids == "half" else int(ids))
        for ids in sizes
        for vocab in options.vocab
        for batch in options.batch
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    present = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    whole = partial(_at_least_1, "must be an integer of at least 1")
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measure fastlogits beside what people use.")
    parser.add_argument("--device", nargs="+", choices=present, default=present, help="default: all present")
    parser.add_argument("--batch", nargs="+", type=whole, help=f"batch sizes; default: {_BATCHES}")
    parser.add_argument("--vocab", nargs="+", type=whole, help=f"vocabulary sizes; default: {_VOCABS}")
    parser.add_argument("--ids", nargs="+", type=_set_size, help="numbers of tokens to forbid, or 'half' of them")
    parser.add_argument(
        "--workload",
        nargs="+",
        metavar="NAME",
        help="only these: 'chain 9' '*Warper'; default: all that apply",
    )
    parser.add_argument("--quick", action="store_true", help="one vocabulary, two batch sizes, few rounds")
    parser.add_argument("--cold", action="store_true", help="on CUDA, also with inputs that are not in the L2")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--no-csv", action="store_true", help="only print: append no rows, draw no plot")
    options = parser.parse_args(arguments)
    for pattern in options.workload or ():
        if not any(fnmatchcase(name, pattern) for name in WORKLOADS):
            parser.error(f"--workload: nothing is called {pattern!r}; there are {', '.join(map(repr, WORKLOADS))}")
    options.batch = options.batch or (_QUICK_BATCHES if options.quick else _BATCHES)
    options.vocab = options.vocab or (_QUICK_VOCABS if options.quick else _VOCABS)
    most = max((int(ids) for ids in options.ids or ["1000"] if ids != "half"), default=0)
    if most > min(options.vocab):
        parser.error(f"--ids: {most} tokens can't be taken from a vocabulary of {min(options.vocab)}")
    return options


def _at_least_1(message: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{message}, got {text!r}")
    return int(text)


def _set_size(text: str) -> str:
    return text if text == "half" else str(_at_least_1("must be an integer of at least 1 or 'half'", text))


if __name__ == "__main__":
    sys.exit(main())
