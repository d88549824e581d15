"""Logits that are split over GPUs: equal to one GPU with all of them, then times.

    torchrun --nproc-per-node 4 -m benchmarks.parallel
    torchrun --nproc-per-node 2 -m benchmarks.parallel --tiny --device cpu     with gloo, in seconds

Every rank draws the same logits and takes its part of them. Samplers, serving steps and processors of the parts are
compared with those of all logits, bit for bit, also captured and replayed on other logits. Rows with ties, NaN,
infinities and a single token are among them. Then come the times of a step, beside a copy, the exchanges alone, one GPU
with all logits, and gathering all logits first: those of the slowest rank, by graph replay on GPUs. All kernels are
compiled first, side by side.

The exit status is 1 where something is wrong, or where an operation has lost its kernels and torch runs instead.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from fastlogits_kernels.parallel.launch import FrontShards
from fastlogits_kernels.parallel.report import bytes_of_report
from fastlogits_kernels.runtime.launcher import Launch, collected
from fastlogits_kernels.training.shards import SENT_IN_TORCH, Place

import fastlogits as fl
from benchmarks.folders import LOCAL
from benchmarks.inputs import device_name
from benchmarks.session import Session
from fastlogits import warm_up as warming
from fastlogits.parallel import sampling

KPT: dict[str, Any] = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
RAW = "T, raw logprobs"
NUCLEUS = "T p"
TIMED: dict[str, dict[str, Any]] = {
    "T k p": KPT, NUCLEUS: {"temperature": 0.7, "top_p": 0.9}, "T": {"temperature": 0.7},
    RAW: {"temperature": 0.7, "logprobs": "raw", "top_logprobs": 5},
}  # fmt: skip
"""What is timed: one exchange of candidates, two of records, one of a token, and two more for a report."""
BY_ROW, NUCLEUS_BY_ROW = "T by row, k", "T by row, p by row, min-p"
CHECKED: dict[str, dict[str, Any]] = {
    "T k p": KPT, "T": {"temperature": 0.7}, BY_ROW: {"top_k": 50},
    "k p min-p, lowest ties, vllm": {"top_k": 40, "top_p": 0.6, "min_p": 0.02, "ties": "lowest", "order": "vllm"},
    "greedy": {"temperature": 0.0}, NUCLEUS: TIMED[NUCLEUS],
    NUCLEUS_BY_ROW: {"min_p": 0.01},
    RAW: TIMED[RAW], "T k p raw logprobs": {**KPT, "logprobs": "raw", "top_logprobs": 5},
    "T p raw logprobs": {"temperature": 0.7, "top_p": 0.9, "logprobs": "raw", "top_logprobs": 5},
    "T k p processed logprobs": {**KPT, "logprobs": "processed", "top_logprobs": 5},
}  # fmt: skip
"""Samplers that are checked, in bfloat16."""
IN_FLOAT32 = ("T k p", "T", NUCLEUS)
"""Those that are checked in float32 too."""
_ROWS = 9
_SLOTS, _REQUESTS, _MAX_LENGTH = 16, 12, 64
_HISTORY = 200
_CANDIDATES = 128
"""That a rank sends of each row for top-k 50."""
_TIMEOUT = timedelta(seconds=150)
_LEAD_IN, _WARM = 5, 3


class Size(NamedTuple):
    """How much is checked and timed.

    Args:
        vocab: of what is checked.
        timed: rows and vocabulary of what is timed.
        processed: with so many rows a list of processors is timed too.
        rounds: of which the median is kept.
        turns: calls of a round.
    """

    vocab: int
    timed: tuple[tuple[int, int], ...]
    processed: int
    rounds: int
    turns: int


LARGE = Size(128256, ((64, 128256), (1, 128256), (8, 128256), (256, 151936)), 64, 9, 60)
TINY = Size(1024, ((4, 1024), (1, 1024)), 4, 2, 1)


class Ranks:
    """This process's place among the ranks, and the logits of a run.

    Args:
        device: with its index, if it has one.
        size: how much is checked and timed.
        deadline: seconds after which nothing more is begun.
    """

    def __init__(self, device: torch.device, size: Size, deadline: float) -> None:
        self.device = device
        self.size = size
        self.is_cuda = device.type == "cuda"
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.group = fl.Group()
        self.session = Session(device, deadline, self.rank == 0, self.anywhere)

    def anywhere(self, is_so: bool) -> bool:
        """Whether something is so on any rank; all of them ask at the same places."""
        flag = torch.tensor([is_so], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def logits(self, rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
        """``[rows, vocab]``, normal with deviation 3, the same on all ranks."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(rows, vocab, generator=generator) * 3).to(dtype).to(self.device)

    def hard_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """Rows that are equal, coarse, of three tokens, of none, with NaN, of two infinities, and with many ties."""
        V = self.size.vocab
        x = self.logits(_ROWS, V, dtype, 3)
        x[1] = 0.0
        x[2] = (x[2] * 2).round() / 2
        x[3:5] = float("-inf")
        x[3, [5, V // 2, V - 1]] = 1.0
        x[5, 423], x[5, 77] = float("nan"), float("inf")
        x[6, [3, V - 9]] = float("inf")
        x[7, 100 : V // 2] = 2.5
        return x

    def part(self, logits: torch.Tensor) -> torch.Tensor:
        """This rank's columns."""
        each = -(-logits.shape[1] // self.count)
        return logits[:, self.rank * each : (self.rank + 1) * each].contiguous()

    def place(self, part: torch.Tensor) -> Place:
        """Which tokens the ranks have of parts."""
        shards = self.group.shards(part.shape[1])
        return Place.of(shards.starts, shards.sizes, self.rank)

    def arange(self, rows: int) -> torch.Tensor:
        """Whole numbers int64 ``[rows]``: seeds, positions, slots."""
        return torch.arange(rows, device=self.device)

    def history(self, rows: int) -> torch.Tensor:
        """Token ids int64 ``[rows, 200]`` of few tokens, so that n-grams repeat."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 64, (rows, _HISTORY), generator=generator).to(self.device)

    def options(self, name: str) -> dict[str, Any]:
        """Those of a sampler that is checked."""
        rows = torch.linspace(0, 2, _ROWS, device=self.device)
        by_row = {BY_ROW: {"temperature": rows}, NUCLEUS_BY_ROW: {"temperature": rows, "top_p": rows / 2}}
        return {**CHECKED[name], **by_row.get(name, {})}

    def processors(self) -> fl.LogitsProcessorList:
        """Processors that map each logit by itself, so that they act on parts."""
        V = self.size.vocab
        return fl.LogitsProcessorList([
            fl.RepetitionPenaltyLogitsProcessor(1.2), fl.NoRepeatNGramLogitsProcessor(3),
            fl.SuppressTokensLogitsProcessor([5, 6, V - 1]), fl.LogitBiasLogitsProcessor({V // 2: 4.0}),
        ])  # fmt: skip


def is_same(a: Any, b: Any) -> bool:
    """Whether two results are equal bit for bit, where NaN equals NaN."""
    if a is None or b is None:
        return a is b
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    return len(a) == len(b) and all(map(is_same, a, b))


# -- Compiled first --------------------------------------------------------------------------------------------------


def compile_all(ranks: Ranks) -> None:
    """Compile all that checks launch: each rank a share of it, since Python takes long; the others find it on disk."""
    launches: list[Launch] = []

    def collect(some: Sequence[Launch]) -> list[Any]:
        launches.extend(some)
        return []

    with patch.object(warming, "prepare", collect):
        _warm_up(ranks)
    # The backward pass runs in this thread, which collects its launches; what the ranks exchange means nothing yet.
    with torch.autograd.set_multithreading_enabled(False), collected() as trained:
        for _, logits, targets, options in _trained(ranks, ranks.hard_logits(torch.bfloat16)):
            _logprobs_of(logits, targets, options)
            _logprobs_of(ranks.part(logits), targets, {**options, "group": ranks.group})
    launches += trained
    ranks.session.compile(launches[ranks.rank :: ranks.count])
    dist.barrier()
    ranks.session.compile(launches)


def _warm_up(ranks: Ranks) -> None:
    V, device, seeds = ranks.size.vocab, ranks.device, ranks.arange(_ROWS)
    groups: tuple[dict[str, Any], ...] = ({}, {"group": ranks.group})
    for more in groups:
        for name, dtype in _samplers():
            sampler = fl.Sampler(**ranks.options(name), **more)
            sampler.warm_up(V, dtype, batch=_ROWS, device=device, seeds=seeds, positions=seeds)
        for options in (KPT, TIMED["T"], TIMED[NUCLEUS]):
            sampler = fl.Sampler(ranks.processors(), **options, **more)
            sampler.warm_up(V, torch.bfloat16, batch=_ROWS, device=device, seeds=seeds)
    batch = fl.BatchProcessor(_SLOTS, V, device, max_length=_MAX_LENGTH, max_logprobs=3)
    batch.warm_up(torch.bfloat16, calls=("sample", "apply", "apply_"), logprobs="processed", bitmask=False)


# -- Checks ----------------------------------------------------------------------------------------------------------


def _samplers() -> Iterator[tuple[str, torch.dtype]]:
    yield from ((name, torch.bfloat16) for name in CHECKED)
    yield from ((name, torch.float32) for name in IN_FLOAT32)


def check_sampler(ranks: Ranks, name: str, dtype: torch.dtype) -> None:
    """A sampler of parts against one of all logits; on a GPU also captured, and replayed on other logits."""
    logits, options = ranks.hard_logits(dtype), ranks.options(name)
    seeds, positions = ranks.arange(_ROWS) * 3 + 1, ranks.arange(_ROWS)
    one, split = fl.Sampler(**options), fl.Sampler(**options, group=ranks.group)
    part = ranks.part(logits)
    with patch.multiple(sampling, LEAST_DEALT=0, LEAST_WEIGHED=0):
        same = [is_same(split(part, seeds, positions), one(logits, seeds, positions))]
    if ranks.is_cuda:
        graph, captured = _captured(lambda: split(part, seeds, positions))
        for seed in (1, 2):
            other = ranks.logits(_ROWS, ranks.size.vocab, dtype, seed)
            part.copy_(ranks.part(other))
            seeds += 1
            graph.replay()
            torch.cuda.synchronize()
            same.append(is_same(captured, one(other, seeds, positions)))
    ranks.session.check(all(same), f"{name}, {str(dtype).removeprefix('torch.')}, by {_way_of(split)}: {same}")


def _way_of(sampler: Any) -> str:
    """What the ranks exchange: what they selected of their parts, or rows."""
    (way,) = sampler._split._ways.values()
    return "parts" if way.parts else "rows"


def _captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def check_processors(ranks: Ranks) -> None:
    """Processors that act on parts, before a sampler and alone."""
    logits, ids, seeds = (
        ranks.logits(_ROWS, ranks.size.vocab, torch.bfloat16),
        ranks.history(_ROWS),
        ranks.arange(_ROWS),
    )
    part = ranks.part(logits)
    for name in ("T k p", "T", NUCLEUS):
        sampler = fl.Sampler(ranks.processors(), **TIMED[name], group=ranks.group)
        with patch.object(sampling, "LEAST_WEIGHED", 0):
            split = sampler(part, seeds, _HISTORY, ids)
        one = fl.Sampler(ranks.processors(), **TIMED[name])(logits, seeds, _HISTORY, ids)
        ranks.session.check(is_same(split, one), f"processors, {name}, by {_way_of(sampler)}")
    processed = fl.process(part, ranks.processors(), ids, group=ranks.group)
    ranks.session.check(is_same(processed, ranks.part(ranks.processors()(ids, logits))), "process, on parts")


def check_process(ranks: Ranks) -> None:
    """Processors that need whole rows."""
    V = ranks.size.vocab
    processors = fl.LogitsProcessorList([fl.RepetitionPenaltyLogitsProcessor(1.2), fl.TopPLogitsWarper(0.9)])
    ids = torch.randint(0, V, (_ROWS, 20), generator=torch.Generator().manual_seed(1)).to(ranks.device)
    logits = ranks.logits(_ROWS, V, torch.float32)
    processed = fl.process(ranks.part(logits), processors, ids, group=ranks.group)
    ranks.session.check(is_same(processed, ranks.part(processors(ids, logits))), "process, whole rows")


def check_serving(ranks: Ranks) -> None:
    """A batch of parts against one of all logits."""
    more = {"max_length": _MAX_LENGTH, "max_logprobs": 3}
    whole, split = _batches(ranks, _SLOTS, ranks.size.vocab, more)
    for batch in (whole, split):
        for i in range(_REQUESTS):
            batch.add(_request(i), [1, 2, 3, i])
    slots = ranks.arange(_REQUESTS)
    logits = ranks.logits(_REQUESTS, ranks.size.vocab, torch.bfloat16)
    part = ranks.part(logits)
    of_parts = split.sample(part, slots, logprobs="processed")
    ranks.session.check(is_same(of_parts, whole.sample(logits, slots, logprobs="processed")), "serving, sample")
    applied = split.apply(part, slots)
    ranks.session.check(is_same(applied, ranks.part(whole.apply(logits, slots))), "serving, apply")


def _batches(ranks: Ranks, slots: int, vocab: int, more: dict[str, Any]) -> tuple[fl.BatchProcessor, fl.BatchProcessor]:
    """Of all logits, and of parts."""
    whole = fl.BatchProcessor(slots, vocab, ranks.device, **more)
    return whole, fl.BatchProcessor(slots, vocab, ranks.device, group=ranks.group, **more)


def _request(i: int) -> fl.RequestParams:
    return fl.RequestParams(
        temperature=0.7, top_k=[50, None, 3][i % 3], top_p=[0.9, 1.0][i % 2], repetition_penalty=1.2, seed=i,
        logprobs=2, no_repeat_ngram_size=2, banned_token_ids=[5, 6],
    )  # fmt: skip


def check_logprobs(ranks: Ranks) -> None:
    """Log-probabilities of parts and their gradients, in two small exchanges, against those of all logits."""
    for name, logits, targets, options in _trained(ranks, ranks.hard_logits(torch.bfloat16)):
        right, gradient = _logprobs_of(logits, targets, options)
        found, own = _logprobs_of(ranks.part(logits), targets, {**options, "group": ranks.group})
        close = torch.allclose(own.float(), ranks.part(gradient).float(), 0.02, 1e-5, equal_nan=True)
        ranks.session.check(is_same(found, right) and close, f"logprobs of parts, {name}")


def _trained(ranks: Ranks, logits: torch.Tensor) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """What is trained on: its name, logits, targets and options."""
    targets = ranks.arange(len(logits)) * 7
    yield "T, entropy", logits, targets, {"temperature": 0.7, "entropy": True}
    kept = fl.sample(logits, seeds=0, positions=0, top_k=50, return_kept=64).kept
    yield "T, kept ids", logits, targets, {"temperature": 0.7, "kept": kept}
    yield "T k p", logits, targets, KPT


def _logprobs_of(logits: torch.Tensor, targets: torch.Tensor, options: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    """Log-probabilities, and the gradient of their sum."""
    leaf = logits.detach().requires_grad_()
    found = fl.logprobs(leaf, targets, **options)
    numbers = (found,) if isinstance(found, torch.Tensor) else (found.logprobs, found.entropy)
    (gradient,) = torch.autograd.grad(numbers[0].sum(), leaf)
    return [each.detach() for each in numbers if each is not None], gradient


# -- Times -----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What is timed: its name, a call, and the bytes that a rank sends in it."""

    what: str
    call: Callable[[], object]
    sent: int = 0


class Split(NamedTuple):
    """Logits of one size: all, this rank's part, and how parts are put together."""

    logits: torch.Tensor
    part: torch.Tensor
    gather: Callable[[], torch.Tensor]
    deal: Callable[[], torch.Tensor]

    @property
    def gathered(self) -> int:
        """Bytes that a rank sends where all have all logits."""
        return self.part.numel() * self.part.element_size()

    def dealt(self, ranks: int) -> int:
        """Bytes that it sends where each has some rows; with no more rows than ranks these are gathered."""
        return self.gathered if len(self.part) <= ranks else self.gathered * (ranks - 1) // ranks


def time_size(ranks: Ranks, rows: int, vocab: int) -> None:
    """All steps with logits of this size."""
    logits = ranks.logits(rows, vocab, torch.bfloat16)
    part = ranks.part(logits)
    shards = ranks.group.shards(part.shape[1])
    split = Split(
        logits, part, lambda: ranks.group.whole_rows(part, shards), lambda: ranks.group.dealt_rows(part, shards)
    )
    for step in _steps(ranks, split):
        what = f"{rows} x {vocab}: {step.what}"
        ranks.session.attempt(what, _time, ranks, step, rows, vocab)


def _steps(ranks: Ranks, split: Split) -> Iterator[Step]:
    yield from _exchanges(ranks, split)
    for name in TIMED:
        yield from _sampling(ranks, split, name)
    rows = len(split.logits)
    if rows == ranks.size.processed:
        yield from _processing(ranks, split)
    if rows > 1:
        yield from _serving(ranks, split)
        yield from _training(ranks, split)


def _exchanges(ranks: Ranks, split: Split) -> Iterator[Step]:
    out = torch.empty_like(split.logits)
    small = torch.zeros(_small(split) // 4, dtype=torch.int32, device=ranks.device)
    yield Step("copy_ (whole logits)", lambda: out.copy_(split.logits))
    yield Step("read (amax of a part)", lambda: split.part.amax(1))
    yield Step("exchange of 1 KB a row", lambda: ranks.group.all_gather(small), _small(split))
    yield Step("exchange of rows", split.deal, split.gathered * (ranks.count - 1) // ranks.count)
    yield Step("gather, reorder", split.gather, split.gathered)


def _small(split: Split) -> int:
    """Bytes of the candidates of all rows."""
    return 4 * (4 + 2 * _CANDIDATES) * len(split.logits)


def _sampling(ranks: Ranks, split: Split, name: str) -> Iterator[Step]:
    rows = len(split.logits)
    seeds, positions = ranks.arange(rows), ranks.arange(rows) + 5
    one, parts = fl.Sampler(**TIMED[name]), fl.Sampler(**TIMED[name], group=ranks.group)
    both = name in (RAW, NUCLEUS) and ranks.is_cuda  # both ways are timed, whatever the number of rows
    if both:
        with patch.multiple(sampling, LEAST_DEALT=0, LEAST_WEIGHED=0):
            parts(split.part, seeds, positions)
    place = ranks.place(split.part)
    dealt = split.dealt(ranks.count)
    sent = {
        "T k p": _small(split), "T": 8 * rows, NUCLEUS: rows * FrontShards.bytes_sent(place) if both else dealt,
        RAW: rows * (8 + bytes_of_report(place, 5)),
    }[name]  # fmt: skip
    yield Step(f"{name}: one GPU alone", lambda: one(split.logits, seeds, positions).tokens)
    yield Step(f"{name}: gather, then one GPU", lambda: one(split.gather(), seeds, positions).tokens, split.gathered)
    yield Step(f"{name}: split", lambda: parts(split.part, seeds, positions).tokens, sent)
    if both:
        with patch.multiple(sampling, LEAST_DEALT=1 << 60, LEAST_WEIGHED=1 << 60):
            dealing = fl.Sampler(**TIMED[name], group=ranks.group)
            dealing(split.part, seeds, positions)
        yield Step(f"{name}: dealt", lambda: dealing(split.part, seeds, positions).tokens, dealt)


def _processing(ranks: Ranks, split: Split) -> Iterator[Step]:
    rows = len(split.logits)
    seeds, ids = ranks.arange(rows), ranks.history(rows)
    one = fl.Sampler(ranks.processors(), **KPT)
    parts = fl.Sampler(ranks.processors(), **KPT, group=ranks.group)
    what = "penalty, 3-grams, bans, T k p:"
    yield Step(f"{what} gather", lambda: one(split.gather(), seeds, _HISTORY, ids).tokens, split.gathered)
    yield Step(f"{what} split", lambda: parts(split.part, seeds, _HISTORY, ids).tokens, _small(split))


def _serving(ranks: Ranks, split: Split) -> Iterator[Step]:
    rows, vocab = split.logits.shape
    whole, parts = _batches(ranks, rows, vocab, {"max_length": _MAX_LENGTH})
    for batch in (whole, parts):
        for i in range(rows):
            batch.add(fl.RequestParams(**KPT, seed=i, repetition_penalty=1.1), [1, 2, i % vocab])
    slots = ranks.arange(rows)
    yield Step("serving: gather, then one GPU", lambda: whole.sample(split.gather(), slots).tokens, split.gathered)
    yield Step("serving: split", lambda: parts.sample(split.part, slots).tokens, split.dealt(ranks.count))


def _training(ranks: Ranks, split: Split) -> Iterator[Step]:
    rows = len(split.logits)
    place = ranks.place(split.part)
    few = rows * (place.sent if ranks.is_cuda else SENT_IN_TORCH)
    ruled = few + _small(split) if ranks.is_cuda else split.dealt(ranks.count)
    for name, logits, targets, options in _trained(ranks, split.logits):

        def one(logits: Any = logits, targets: Any = targets, options: Any = options) -> object:
            return fl.logprobs(logits, targets, **options)

        def parts(targets: Any = targets, options: Any = options) -> object:
            return fl.logprobs(split.part, targets, group=ranks.group, **options)

        yield Step(f"logprobs {name}: one GPU alone", one)
        yield Step(f"logprobs {name}: split", parts, ruled if name == "T k p" else few)


def _time(ranks: Ranks, step: Step, rows: int, vocab: int) -> None:
    """Time a step: of each round the slowest rank's. All ranks make as many calls."""
    bunch = _replayed(ranks, step.call) if ranks.is_cuda else _called(ranks, step.call)
    mine = torch.tensor([bunch() for _ in range(ranks.size.rounds)], device=ranks.device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    slowest: list[float] = mine.tolist()
    deciles = statistics.quantiles(slowest, n=10, method="inclusive")
    us = statistics.median(slowest)
    ranks.session.rows.append({
        "what": step.what, "rows": rows, "vocab": vocab, "dtype": "bfloat16", "ranks": ranks.count,
        "us": f"{us:.1f}", "p10": f"{deciles[0]:.1f}", "p90": f"{deciles[-1]:.1f}", "bytes_sent": step.sent,
    })  # fmt: skip
    ranks.session.say(f"{rows:4} x {vocab} {step.what:38} {us:9.1f} us   sends {step.sent / 1024:9.1f} KB")


def _replayed(ranks: Ranks, call: Callable[[], object]) -> Callable[[], float]:
    """Microseconds of a call by replays of a graph that holds it."""
    for _ in range(_WARM):
        call()
    torch.cuda.synchronize()
    graph, out = _captured(call)
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    turns = ranks.size.turns

    def bunch(kept: object = out) -> float:  # the graph writes there
        for _ in range(_LEAD_IN):
            graph.replay()
        begin.record()
        for _ in range(turns):
            graph.replay()
        end.record()
        end.synchronize()
        elapsed_ms: float = begin.elapsed_time(end)
        return elapsed_ms * 1e3 / turns

    return bunch


def _called(ranks: Ranks, call: Callable[[], object]) -> Callable[[], float]:
    """Microseconds of a call by the clock."""
    call()
    turns = ranks.size.turns

    def bunch() -> float:
        start = time.perf_counter_ns()
        for _ in range(turns):
            call()
        return (time.perf_counter_ns() - start) / turns / 1e3

    return bunch


# -- The run ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, write on the first rank, and return the exit status: 1 where something is wrong on any rank."""
    options = _parse(arguments)
    device = _own_device(options.device)
    size = TINY if options.tiny else LARGE
    with _process_group(device):
        ranks = Ranks(device, size, options.deadline)
        ranks.session.say(f"{ranks.count} ranks on {device_name(device)}, torch {torch.__version__}")
        for what, part, *given in _parts(ranks):
            ranks.session.attempt(what, part, ranks, *given)
        return ranks.session.finish(f"{device_name(device)} x{ranks.count}", options.out)


def _parts(ranks: Ranks) -> Iterator[tuple[Any, ...]]:
    """What is done, in order: its name, and what to call besides the ranks."""
    if ranks.is_cuda:
        yield "compile", compile_all
    for name, dtype in _samplers():
        yield f"check {name} {dtype}", check_sampler, name, dtype
    for check in (check_processors, check_serving, check_process, check_logprobs):
        yield check.__name__.replace("_", " "), check
    for rows, vocab in ranks.size.timed:
        yield f"time {rows} x {vocab}", time_size, rows, vocab


def _own_device(kind: str) -> torch.device:
    """The GPU of this rank, or the CPU."""
    if kind != "cuda":
        return torch.device(kind)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """The group that is there, or torchrun's for as long as it is needed."""
    if dist.is_initialized():
        yield
        return
    is_cuda = device.type == "cuda"
    dist.init_process_group("nccl" if is_cuda else "gloo", timeout=_TIMEOUT, device_id=device if is_cuda else None)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    said = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="torchrun --nproc-per-node N -m benchmarks.parallel", description=said)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=kind, choices=["cuda", "cpu"], help="default: %(default)s")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which nothing more is begun")
    parser.add_argument("--tiny", action="store_true", help="a few short rows, to see that it runs")
    parser.add_argument("--out", type=Path, default=LOCAL / "parallel", metavar="DIR", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ and not dist.is_initialized():
        parser.error("the ranks must be started by torchrun, got a process of its own: no RANK is set")
    return options


if __name__ == "__main__":
    sys.exit(main())
