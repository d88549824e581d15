"""A serving batch for a very long time: requests come and go, and each gets the tokens that it would get alone.

    python -m tests.campaign.soak --device cuda --steps 1000000
    python -m tests.campaign.soak --device cpu --steps 200000
    torchrun --nproc-per-node 2 -m tests.campaign.soak --device cpu --steps 72000       # the logits split over ranks

Logits depend on a request and on how many tokens it has, so that a request's tokens are always the same ones: whoever
shares the batch, whether draft tokens were accepted, whether it was moved or taken up again. Steps of four shapes take
turns: two plain ones, one of draft tokens, of which as many are kept as were guessed, and one that goes back and has to
draw what stands there. On a GPU each shape is one captured graph, in which logits are made and tokens are appended too.

Now and then a request is looked at: its processed logits are, bit by bit, those of a batch of its own, and so are all
its tokens. At the end the first requests come again. Memory may not grow once the first tenth is over.
"""

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import torch
import torch.distributed as dist
from fastlogits_kernels.runtime.bits import pack_bits
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.inputs import device_name
from benchmarks.results import read_rows, slug, write_rows
from fastlogits import BatchProcessor, RequestParams
from tests.campaign.record import RESULTS, dated
from tests.serving.test_batch import random_params

_BANK = 61  # different logits and bitmasks
_SAME = 4  # steps with the same logits: what has just come is likely again, so that histories matter
_DRAFTS = 2  # draft tokens of a request in a step
_FIRST = 8  # requests that come again at the end
SLACK = 32 * 2**20  # bytes by which a process may grow: what its allocators have not given back
_STAGE = 4  # of so many stretches each has a request taken up again


class Size(NamedTuple):
    """How large everything is."""

    slots: int
    vocab: int
    longest: int
    few: int
    """Rows of the smaller plain step."""
    many: int
    """Rows of the larger one."""
    drafting: int
    """Requests of a step of draft tokens."""
    back: int
    """Rows of a step that goes back."""
    stretches: int
    """Stretches of one shape between two looks at a request."""


SIZES = {
    "cuda": Size(slots=32, vocab=1024, longest=512, few=4, many=16, drafting=8, back=8, stretches=100),
    "cpu": Size(slots=5, vocab=67, longest=96, few=1, many=2, drafting=1, back=1, stretches=20),
}


@dataclass
class Request:
    """What the host knows of a request without waiting for the device."""

    params: RequestParams
    prompt: list[int]
    salt: int
    most: int
    """The tokens that it has at most."""


def columns_of(group: Any, vocab: int) -> slice:
    """The tokens of which this process has the logits; all, without a group."""
    if group is None:
        return slice(None)
    each = -(-vocab // group.size())
    return slice(group.rank() * each, (group.rank() + 1) * each)


class Batch:
    """A batch of requests, and the logits and bitmasks that they meet."""

    def __init__(self, size: Size, device: torch.device, slots: int, rows: int, group: Any = None) -> None:
        generator = torch.Generator().manual_seed(size.vocab)
        self.device, self.columns = device, columns_of(group, size.vocab)
        self.processor = BatchProcessor(slots, size.vocab, device, max_length=size.longest, max_rows=rows, group=group)
        self.tables = self.processor._slots
        self.salts = torch.zeros(slots, dtype=torch.int64, device=device)
        self.logits = (torch.randn(_BANK, size.vocab, generator=generator) * 5).to(device)  # guesses come true
        self.bitmasks = pack_bits(torch.rand(_BANK, size.vocab, generator=generator) < 0.6).to(device)
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)
        """Tokens drawn another time that were not the same."""

    def add(self, request: Request, output: Sequence[int] = (), slot: int | None = None) -> int:
        """Let a request in."""
        slot = self.processor.add(request.params, request.prompt, output, slot)
        self.salts[slot] = request.salt
        return slot

    def tokens(self, slot: int) -> list[int]:
        """All tokens of a request; waits for the device."""
        found: list[int] = self.tables.history[slot, : int(self.tables.lengths[slot])].tolist()
        return found

    def meet(self, slots: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and bitmasks of rows of so many tokens."""
        which = (self.salts[slots.clamp(min=0)] + lengths // _SAME) % _BANK
        return self.logits[which], self.bitmasks[which]

    def lengths(self, slots: torch.Tensor) -> torch.Tensor:
        """How many tokens each row's request has."""
        return self.tables.lengths[slots.clamp(min=0)].long()

    def processed(self, slot: int) -> torch.Tensor:
        """The logits of a request's next step."""
        slots = torch.tensor([slot], device=self.device)
        logits, bitmask = self.meet(slots, self.lengths(slots))
        return self.processor.apply(logits[:, self.columns], slots, bitmask=bitmask)[0]

    def plain(self, slots: torch.Tensor) -> None:
        """Draw and append a token for each row."""
        logits, bitmask = self.meet(slots, self.lengths(slots))
        self.processor.append(slots, self.processor.sample(logits[:, self.columns], slots, bitmask=bitmask).tokens)

    def draft(self, slots: torch.Tensor) -> None:
        """Guess the likeliest tokens, and append those that are drawn up to the first wrong guess."""
        each = 1 + _DRAFTS
        local = torch.arange(len(slots), device=self.device) % each
        logits, bitmask = self.meet(slots, self.lengths(slots) + local)
        guesses = logits.argmax(-1).roll(1)
        tokens = self.processor.sample(
            logits[:, self.columns], slots, bitmask=bitmask, draft_ids=guesses, local_position=local
        ).tokens
        right = (tokens.roll(1) == guesses) | (local == 0)
        follows = right.view(-1, each).cumprod(1).flatten().bool()
        self.processor.append(slots, torch.where(follows, tokens, -1))

    def back(self, slots: torch.Tensor) -> None:
        """Go back by some tokens, and draw again what was drawn there."""
        lengths, by = self.lengths(slots), 1 + torch.arange(len(slots), device=self.device) % 5
        at = (lengths - by).clamp(min=0)
        logits, bitmask = self.meet(slots, at)
        tokens = self.processor.sample(logits[:, self.columns], slots, at - 1, bitmask=bitmask).tokens
        held = slots.clamp(min=0)
        drawn = (slots >= 0) & (lengths - by >= self.tables.prompts[held])
        self.wrong += (drawn & (self.tables.history[held, at] != tokens)).sum()


class Shape(NamedTuple):
    """A kind of step: its rows on the device, and how to run it."""

    rows_each: int
    advance: int
    """Tokens by which a request may grow in a step."""
    slots: torch.Tensor
    run: Callable[[], None]


class Found(NamedTuple):
    """What a soak has seen."""

    steps: int
    requests: int
    looks: int
    again: int
    """Requests that came again at the end."""
    seconds: float
    rss_start: int
    rss_end: int
    allocated_start: int
    allocated_end: int


def _shapes(batch: Batch, size: Size) -> list[Shape]:
    kinds = [
        (batch.plain, size.few, 1, 1), (batch.plain, size.many, 1, 1),
        (batch.draft, size.drafting, 1 + _DRAFTS, 1 + _DRAFTS), (batch.back, size.back, 1, 0),
    ]  # fmt: skip
    shapes = []
    for step, requests, each, advance in kinds:
        slots = torch.full((requests * each,), -1, dtype=torch.int64, device=batch.device)
        run = _captured(step, slots) if batch.device.type == "cuda" else lambda step=step, slots=slots: step(slots)
        shapes.append(Shape(each, advance, slots, run))
    return shapes


def _captured(step: Callable[[torch.Tensor], None], slots: torch.Tensor) -> Callable[[], None]:
    """A step as a graph; captured with rows of no request, which change nothing."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(slots)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(slots)
    return graph.replay


def memory_of(device: torch.device) -> tuple[int, int]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    return psutil.Process().memory_info().rss, allocated


class Soak:
    """The long run.

    Args:
        device: where.
        size: how large.
        seed: of all that is chosen at random.
        group: of the processes that have a part of the logits each.
    """

    def __init__(self, device: torch.device, size: Size, seed: int = 0, group: Any = None) -> None:
        self.size, self.device, self.rng, self.group = size, device, random.Random(seed), group
        rows = max(size.slots, size.many, size.drafting * (1 + _DRAFTS))
        self.batch = Batch(size, device, size.slots, rows, group)
        self.shapes = _shapes(self.batch, size)
        self.present: dict[int, Request] = {}
        self.first: list[tuple[Request, list[int] | None]] = []
        self.steps = self.requests = self.looks = 0

    def run(
        self,
        steps: int,
        progressed: Callable[[int], object] = lambda steps: None,
        seconds: float = float("inf"),
    ) -> Found:
        """So many steps, or a few more; fewer, where the seconds are over before.

        Raises:
            AssertionError: a request got something else than it gets alone, or memory has grown.
        """
        start, before = time.perf_counter(), None
        stretch = 0
        while self.steps < steps and not self._anywhere(time.perf_counter() - start > seconds):
            if before is None and (self.steps >= steps // 10 or time.perf_counter() - start > seconds / 10):
                before = memory_of(self.device)
            self._change()
            self._go()
            stretch += 1
            if self.present and stretch % self.size.stretches == 0:
                self._look(self.rng.choice(list(self.present)), taken_up=stretch // self.size.stretches % _STAGE == 0)
            progressed(self.steps)
        for slot in list(self.present):
            self._retire(slot)
        again = self._again()
        assert not int(self.batch.wrong), "other tokens, drawn again"
        after = memory_of(self.device)
        before = before or after
        assert after[0] <= before[0] + SLACK, f"the process has grown from {before[0]} to {after[0]} bytes"
        assert after[1] <= before[1], f"the device's memory has grown from {before[1]} to {after[1]} bytes"
        took = time.perf_counter() - start
        return Found(self.steps, self.requests, self.looks, again, took, before[0], after[0], before[1], after[1])

    def _anywhere(self, is_so: bool) -> bool:
        """Whether something is so in any of the processes."""
        if self.group is None:
            return is_so
        flag = torch.tensor([is_so], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flag)

    def _change(self) -> None:
        """Let requests come, go and change places."""
        rng, slots = self.rng, self.size.slots
        while len(self.present) < slots // 2 or (len(self.present) < slots and rng.random() < 0.5):
            prompt = [rng.randrange(self.size.vocab) for _ in range(rng.randint(0, self.size.longest // 8))]
            request = Request(random_params(rng, self.size.vocab), prompt, rng.randrange(_BANK), len(prompt))
            free = [slot for slot in range(slots) if slot not in self.present]
            self.present[self.batch.add(request, slot=rng.choice(free))] = request
            self.requests += 1
            if len(self.first) < _FIRST:
                self.first.append((request, None))
        if rng.random() < 0.2:
            self._retire(rng.choice(list(self.present)))
        if rng.random() < 0.3:
            a, b = rng.sample(range(slots), 2)
            if a in self.present and b not in self.present:
                self.batch.processor.move(a, b)
            else:
                self.batch.processor.swap(a, b)
            kept = self.batch.salts[a].clone()
            self.batch.salts[a] = self.batch.salts[b]
            self.batch.salts[b] = kept
            both = self.present.pop(a, None), self.present.pop(b, None)
            self.present |= {slot: each for slot, each in ((b, both[0]), (a, both[1])) if each is not None}

    def _go(self) -> None:
        """Some steps of one shape, on requests that have room for them."""
        shape = self.rng.choice(self.shapes)
        times = self.rng.randint(16, 64) // max(1, shape.advance)
        grows = shape.advance * times
        for slot, request in list(self.present.items()):
            if request.most + grows > self.size.longest:
                self._retire(slot)
        most = len(shape.slots) // shape.rows_each
        chosen = self.rng.sample(list(self.present), min(most, len(self.present)))
        rows = [slot for slot in chosen for _ in range(shape.rows_each)]
        shape.slots.copy_(torch.tensor(rows + [-1] * (len(shape.slots) - len(rows))))
        for slot in chosen:
            self.present[slot].most += grows
        for _ in range(times):
            shape.run()
        self.steps += times

    def _retire(self, slot: int) -> None:
        request = self.present.pop(slot)
        for i, (first, tokens) in enumerate(self.first):
            if first is request and tokens is None:
                self.first[i] = request, self.batch.tokens(slot)
        self.batch.processor.remove(slot)

    def _look(self, slot: int, taken_up: bool) -> None:
        """Compare a request with itself in a batch of its own; then it may go out, and come in again."""
        request, tokens = self.present[slot], self.batch.tokens(slot)
        output = tokens[len(request.prompt) :]
        alone = Batch(self.size, self.device, 1, 1)
        assert alone.add(request, output) == 0
        found, expected = self.batch.processed(slot), alone.processed(0)[self.batch.columns]
        assert torch.equal(found.nan_to_num(nan=77.0), expected.nan_to_num(nan=77.0)), f"other logits: {request}"
        assert self._drawn_alone(request, len(tokens)) == tokens, f"other tokens: {request}"
        assert not int(self.batch.wrong), "other tokens, drawn again"
        request.most = len(tokens)
        if taken_up:
            self.batch.processor.remove(slot)
            self.batch.add(request, output, slot)
        self.looks += 1

    def _drawn_alone(self, request: Request, length: int) -> list[int]:
        """The tokens of a request in a batch of its own."""
        alone = Batch(self.size, self.device, 1, 1)
        row = torch.tensor([alone.add(request)], device=self.device)
        for _ in range(length - len(request.prompt)):
            alone.plain(row)
        return alone.tokens(0)

    def _again(self) -> int:
        """The first requests once more, together, in the batch that has been through all this."""
        ended = [(request, tokens) for request, tokens in self.first if tokens is not None]
        slots = [self.batch.add(request) for request, _ in ended[: self.size.slots]]
        lacking = [len(tokens) - len(request.prompt) for request, tokens in ended[: len(slots)]]
        for step in range(max(lacking)):
            rows = [slot if step < count else -1 for slot, count in zip(slots, lacking, strict=True)]
            self.batch.plain(torch.tensor(rows, device=self.device))
        for slot, (request, tokens) in zip(slots, ended, strict=False):
            assert self.batch.tokens(slot) == tokens, f"other tokens at the end: {request}"
            self.batch.processor.remove(slot)
        return len(slots)


def group_of(kind: str) -> Any:
    """The processes that torchrun has started, each with a GPU of its own, or on the CPU; None where it hasn't."""
    if "RANK" not in os.environ:
        return None
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return dist.group.WORLD


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=SIZES, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no more steps after so many")
    parser.add_argument("--seed", type=int, default=0, help="of all that is chosen at random; 0")
    given = parser.parse_args(arguments)
    console, device, group = Console(), torch.device(given.device), group_of(given.device)
    ranks = 1 if group is None else group.size()
    is_first = group is None or not group.rank()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("steps"), *columns, console=console, disable=not is_first) as progress:
        task = progress.add_task("steps", total=given.steps)
        soak = Soak(device, SIZES[given.device], given.seed, group)
        found = soak.run(given.steps, lambda steps: progress.update(task, completed=steps), given.seconds)
    if group is not None:
        dist.destroy_process_group()
    if not is_first:
        return 0
    name = "soak" if ranks == 1 else "soak-ranks"
    path = RESULTS / f"{name}-{slug(device_name(device))}.csv"
    row = {**found._asdict(), "seconds": f"{found.seconds:.1f}"}
    size = dict(zip(("slots", "vocab", "longest"), soak.size, strict=False))
    run: dict[str, Any] = {"device": device_name(device), "seed": given.seed, **({"ranks": ranks} if ranks > 1 else {})}
    write_rows(path, [*read_rows(path), dated({**run, **size, **row})])
    table = Table("", "", title=f"{device_name(device)}: {found.steps} steps", title_justify="left", show_header=False)
    for name, value in row.items():
        table.add_row(
            name.replace("_", " "), f"{value / 2**20:.1f} MiB" if "start" in name or "end" in name else f"{value}"
        )
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
