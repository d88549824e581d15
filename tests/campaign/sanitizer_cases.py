"""Every kernel on shapes at which it might go wrong, in one process: what ``sanitizer`` runs under each of its tools.

    python -m tests.campaign.sanitizer_cases --device cuda --check
    python -m tests.campaign.sanitizer_cases --device cuda --cases fold select-3x1000

With ``--check`` each allocation stands between guard zones, which nobody may write, and results are those of torch on
the CPU. Without it, tensors have the bounds that they have anyway, so that a tool sees an access beyond them.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
from fastlogits_kernels import synthid
from fastlogits_kernels.draw import reference_draw
from fastlogits_kernels.parallel.launch import BestShards, FrontShards, TopShards, keep_the_first, sent_of
from fastlogits_kernels.parallel.report import report_of_part
from fastlogits_kernels.pointwise import dense, fold
from fastlogits_kernels.pointwise.bitmask import launch_bitmask_, reference_bitmask_
from fastlogits_kernels.pointwise.dense import DenseEdits
from fastlogits_kernels.pointwise.mask import Bans, launch_mask_tokens, reference_mask_tokens
from fastlogits_kernels.pointwise.pack_ids import launch_pack_ids, reference_pack_ids
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime.bits import pack_bits, words
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.selection import launch, logprobs
from fastlogits_kernels.serving import layout, steps
from fastlogits_kernels.serving.layout import RECORD
from fastlogits_kernels.training import logprobs as trainer
from fastlogits_kernels.training.kept import ids_of_bits
from fastlogits_kernels.training.reference import Task
from fastlogits_kernels.training.ruled_shards import fixed_number_of, ruled_logprobs_of_part
from fastlogits_kernels.training.shards import Exchange, Place, logprobs_of_part
from fastlogits_kernels.truncate.reference import reference_truncate
from torch.overrides import TorchFunctionMode

import fastlogits as fl
from fastlogits import BatchProcessor, RequestParams
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.row_values import RowValues
from fastlogits.plan.run import Run
from fastlogits.plan.stages import (
    Ban,
    BanRange,
    Bias,
    Clean,
    Decay,
    Force,
    ForceRows,
    History,
    LowerRepetitions,
    Member,
    Penalize,
    Repeated,
    RowBias,
    Scale,
    SequenceBias,
    When,
)
from tests import interpreter
from tests.oracle import check_truncation

SHAPES = [(0, 1000), (1, 1), (3, 31), (3, 32), (257, 33), (3, 1000), (1, 151936), (3, 262144)]
FAR = 2**30
"""Elements between the rows of a far case, the last of which begins beyond 2**31."""
_HISTORY = 40
_ZONE = 512  # bytes before and behind an allocation; a multiple of what torch aligns to
_MARK = 0xA5
_T = TypeVar("_T")


class Guards(TorchFunctionMode):
    """Whatever is allocated on a device stands between zones that nobody may write, and holds nothing of use."""

    _EMPTY = (torch.empty, torch.empty_like, torch.Tensor.new_empty)
    _FILLED = (torch.zeros, torch.full)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._type = device.type
        self._zones: list[tuple[torch.Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in (*self._EMPTY, *self._FILLED) or made.device.type != self._type or not made.numel():
            return made
        if not made.is_contiguous():
            return made
        size = made.numel() * made.element_size()
        buffer = torch.full((size + 2 * _ZONE,), _MARK, dtype=torch.uint8, device=made.device)
        inner = buffer[_ZONE : _ZONE + size].view(made.dtype).view(made.shape)
        if func in self._FILLED:
            inner.copy_(made)
        self._zones.append((buffer, size))
        return inner

    def check(self) -> None:
        """Fail where a zone has been written."""
        for buffer, size in self._zones:
            zones = torch.cat((buffer[:_ZONE], buffer[_ZONE + size :]))
            assert bool((zones == _MARK).all()), f"written beside an allocation of {size} bytes"


class Outcome(NamedTuple):
    """What a kernel has made, and what it should have made."""

    found: torch.Tensor
    wanted: Callable[[], torch.Tensor]
    rules: tuple[Rule, ...] | None = None
    """Truncations, whose cut-off is a matter of rounding; then ``wanted`` is what they were given."""
    tolerance: float = 0.0

    def check(self) -> None:
        """Fail unless it is that."""
        found, wanted = self.found.cpu(), self.wanted()
        if self.rules is not None:
            check_truncation(wanted, self.rules, found)
        else:
            tolerance = self.tolerance if found.is_floating_point() else 0
            torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@dataclass
class Given:
    """The inputs of a case, the same ones each time: made on the CPU, and put where the kernels are."""

    B: int
    V: int
    device: torch.device
    strided: bool = False
    far: bool = False
    beside: list[Callable[[], bool]] = field(default_factory=list)
    """Whether what lies beside strided scores is as it was."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1000 * self.V + self.B)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor on the device."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device).copy_(tensor)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Random integers, int64, on the CPU."""
        return torch.randint(low, high, shape, generator=self.generator)

    def sets(self, *shape: int) -> torch.Tensor:
        """Random packed sets of tokens, on the CPU."""
        return pack_bits(torch.rand(*shape, self.V, generator=self.generator) < 0.3)

    def values(self) -> torch.Tensor:
        """Logits ``[B, V]``, on the CPU."""
        values = torch.randn(self.B, self.V, generator=self.generator) * 3
        return values.half() if self.far else values

    def scores(self, values: torch.Tensor) -> torch.Tensor:
        """Logits on the device, in the layout of the case."""
        if self.far:
            wide = torch.empty((self.B - 1) * FAR + self.V, dtype=values.dtype, device=self.device)
            return wide.as_strided(values.shape, (FAR, 1)).copy_(values)
        if not self.strided:
            return self.put(values)
        wide = torch.full((self.B, self.V + 24), 7.0, dtype=values.dtype, device=self.device)
        wide[:, 9 : 9 + self.V] = values
        self.beside.append(lambda: bool((wide[:, :9] == 7).all() & (wide[:, 9 + self.V :] == 7).all()))
        return wide[:, 9 : 9 + self.V]


def _bans(given: Given) -> tuple[Bans, Bans]:
    B = given.B
    bans = Bans(
        sets=given.sets(2), allowed=~given.sets(B), windows=torch.tensor([2, 4], dtype=torch.int32),
        blanks=given.sets(2), input_ids=given.integers(-1, given.V + 2, B, _HISTORY),
        cache_position=given.integers(10, _HISTORY, B), prompt_length=given.integers(9, 12, B),
    )  # fmt: skip
    return bans, Bans(*(given.put(each) if isinstance(each, torch.Tensor) else each for each in bans))


def mask_tokens(given: Given) -> list[Outcome]:
    """Gates and allowed rows, to another tensor and in place."""
    values, (bans, put) = given.values(), _bans(given)
    scores = given.scores(values)
    out = torch.empty(values.shape, dtype=values.dtype, device=given.device)
    launch_mask_tokens(scores, out, put)
    launch_mask_tokens(scores, scores, put)
    return [Outcome(found, lambda: reference_mask_tokens(values, None, bans)) for found in (out, scores)]


def mask_listed_tokens(given: Given) -> list[Outcome]:
    """A few tokens in place."""
    values, tokens = given.values(), torch.arange(0, given.V, 3)
    scores = given.scores(values)
    launch_mask_tokens(scores, scores, Bans(tokens=given.put(tokens)))
    return [Outcome(scores, lambda: reference_mask_tokens(values, None, Bans(tokens=tokens)))]


def pack_ids(given: Given) -> list[Outcome]:
    """Ids within the vocabulary and outside it."""
    ids = given.integers(-3, given.V + 5, given.B, 600)
    bits = torch.zeros((given.B, words(given.V)), dtype=torch.int32, device=given.device)
    launch_pack_ids(given.put(ids), bits, given.V)
    return [Outcome(bits, lambda: reference_pack_ids(ids, given.V))]


def bitmask(given: Given) -> list[Outcome]:
    """Rows by index, some of which don't exist; a mask that ends before the vocabulary."""
    B, values = given.B, given.values()
    mask = given.sets(B)[:, : max(1, words(given.V) - 1)].contiguous()
    rows, mask_rows = torch.arange(B + 2).flip(0) - 1, torch.arange(B + 2) - 1
    scores, wanted = given.scores(values), values.clone()
    launch_bitmask_(scores, given.put(mask), given.V, given.put(rows), given.put(mask_rows))

    def reference() -> torch.Tensor:
        reference_bitmask_(wanted, mask, given.V, rows, mask_rows)
        return wanted

    return [Outcome(scores, reference)]


def _stages(V: int) -> list[Any]:
    few = tuple(range(0, V, max(1, V // 7)))
    sequences = (((0,), 0.5), ((1 % V, 2 % V), -1.0), ((V - 1, 0, V - 1), 2.0))
    last = RowValues(lambda rows: rows.last() % V, "the last token")[0]
    late = RowValues(lambda rows: rows.step + 0 * rows.last() > 10**6, "late")[0]
    return [
        Bias(Repeated(2, span="prompt"), 0.5), Bias(History("prompt"), 0.5, extra=few), RowBias(few, last),
        BanRange(last, V - 1), BanRange(V // 2, last), ForceRows(few[:1], late),
        Penalize(History(), 2.0), Ban(few, When("step", stop=3)), Ban(Repeated(2)), Scale(0.5), SequenceBias(sequences),
        Bias(History("generated", 1), 0.5, 0.25), Decay(few, 5, 2.0), Force(few[:1], When("step", 10**6)), Clean(),
        LowerRepetitions((0.0, *(n / 4 for n in range(50))), few[1:2], 20),
    ]  # fmt: skip


def folded(given: Given) -> list[Outcome]:
    """A map of every kind, and the search for their tokens."""
    values, ids = given.values(), given.integers(0, min(given.V, 5), given.B, _HISTORY)
    launch = Pointwise([Member("stage", stage) for stage in _stages(given.V)])
    lengths = given.integers(0, 30, given.B)
    found = launch(given.put(ids), given.scores(values), Run(given.put(lengths), _HISTORY - 1))

    def reference() -> torch.Tensor:
        with forced(False):
            return Pointwise(launch.members)(ids, values, Run(lengths, _HISTORY - 1))

    return [Outcome(found, reference)]


def _select(given: Given, rules: tuple[Rule, ...]) -> list[Outcome]:
    values = given.values()
    selection = launch.Selection(rules, given.V, given.device)
    return [Outcome(launch.select(given.scores(values), selection), lambda: values, rules)]


def _drawn(given: Given, rules: tuple[Rule, ...]) -> list[Outcome]:
    values, seeds = given.values(), given.integers(-(2**62), 2**62, given.B)
    temperature = torch.full((given.B,), 0.7)
    temperature[::2] = 0.0
    selection = launch.Selection(rules, given.V, given.device)
    positions = seeds + 1
    put = [given.put(each) for each in (seeds, positions, temperature)]
    tokens, found = logprobs.select_and_report(given.scores(values), selection, put[0], put[1], min(5, given.V), put[2])

    def reference() -> torch.Tensor:
        greedy = temperature == 0
        divided = values / torch.where(greedy, 1.0, temperature).unsqueeze(1)
        return reference_draw(reference_truncate(divided, rules), seeds, positions, greedy)

    # Rounding at the cut-off may leave another token in, which changes the report a little and hardly ever the draw.
    return [Outcome(tokens, reference), Outcome(found.ranks > 0, lambda: torch.ones(given.B, dtype=torch.bool))]


_KEPT = (Rule("top_k", 20), Rule("top_p", 0.9))
_FIRST = (Rule("top_p", 0.9), Rule("min_p", 0.01))
_RULES = {
    "": _KEPT,
    "_nucleus": (Rule("top_p", 0.5), Rule("min_p", 0.001)),
    "_typical": (Rule("typical", 0.9),),
    "_eta": (Rule("eta", 0.002), Rule("epsilon", 1e-4)),
    "_sigma": (Rule("top_n_sigma", 1.0),),
    "_h": (Rule("top_h", 0.5),),
    "_lowest": (Rule("top_k", 3, ties="lowest"),),
}


_TRAINED: dict[str, dict[str, Any]] = {
    "whole": {},
    "rules": {"top_k": 20, "top_p": 0.9},
    "nucleus": {"top_p": 0.5},
    "bits": {"kept": "bits"},
    "ids": {"kept": "ids"},
}


def reported(given: Given) -> list[Outcome]:
    """Log-probabilities, ranks and the likeliest tokens."""
    values, count = given.values(), min(5, given.V)
    tokens, counts = given.integers(-1, given.V + 1, given.B), given.integers(-1, count + 1, given.B).int()
    found = logprobs.launch_report(given.scores(values), given.put(tokens), count, given.put(counts))
    return [
        Outcome(each, lambda i=i: logprobs.reference_report(values, tokens, count, counts)[i], tolerance=1e-4)
        for i, each in enumerate(found)
    ]  # fmt: skip


def _requests(V: int) -> list[RequestParams]:
    some = list(range(0, V, max(1, V // 9)))
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "presence_scope": "all"}
    asked = [
        {**penalties, "dry_multiplier": 1.0, "dry_breakers": some[:1], "temperature": 0.7, "logprobs": 2},
        {"logit_bias": dict.fromkeys(some, 0.5), "no_repeat_ngram_size": 2, "bad_words": [[1, 0], some], "top_k": 5},
        {"allowed_token_ids": some, "bitmask": True, "min_tokens": 99, "stop_token_ids": some[:1], "temperature": 0},
        {"first_tokens_suppressed": range(V // 2), "first_window": 99, "top_p": 0.9, "min_p": 0.01, "logprobs": 0},
        {"forced_tokens": [0, 1], **penalties},
    ]
    return [RequestParams(**each, seed=seed) for seed, each in enumerate(asked, -2)]


def _batch(given: Given, device: torch.device) -> BatchProcessor:
    batch = BatchProcessor(
        6, given.V, device, max_length=_HISTORY, max_rows=max(1, given.B), max_listed=256, max_logprobs=2
    )
    generator = torch.Generator().manual_seed(given.V)
    for slot, params in enumerate(_requests(given.V)):
        ids = torch.randint(0, min(given.V, 6), (_HISTORY,), generator=generator).tolist()
        batch.add(params, ids[: 5 * slot], ids[5 * slot : 25 + slot], slot=slot)
    return batch


def served(given: Given) -> list[Outcome]:
    """A step of requests that ask for everything, with draft tokens: processed in place and not, and drawn."""
    B, values = given.B, given.values()
    # Two rows of a request, as far as these go; the last slot has none, as a GPU may be told.
    slots, local = torch.tensor([0, 3, 1, 4, 2, -1])[torch.arange(B) // 2 % 6], torch.arange(B) % 2
    drafts, mask = given.integers(0, min(given.V, 6), B), given.sets(B)
    named = {"bitmask": mask, "draft_ids": drafts, "local_position": local}
    alone = _batch(given, torch.device("cpu"))
    batch = _batch(given, given.device)
    scores = given.scores(values)
    put, put_named = given.put(slots), {name: given.put(each) for name, each in named.items()}
    processed = batch.apply(scores, put, **put_named)
    sample = batch.sample(scores, put, **put_named, logprobs="processed")
    batch.apply_(scores, put, **put_named)

    def reference() -> torch.Tensor:
        with forced(False):
            return alone.apply(values, slots, **named)

    def tokens() -> torch.Tensor:
        with forced(False):
            return alone.sample(values, slots, **named, logprobs="processed").tokens

    return [
        Outcome(processed, reference, tolerance=1e-4), Outcome(scores, reference, tolerance=1e-4),
        Outcome(sample.tokens, tokens),
    ]  # fmt: skip


def histories(given: Given) -> list[Outcome]:
    """Appended tokens, more than there is room for, drafts that are accepted, and slots that change places."""
    of = given.integers(-1, 6, max(1, given.B))
    rows, drafts = of.sort().values, given.integers(-1, min(given.V, 6), len(of))
    tokens = given.integers(-1, min(given.V, 6), len(of))
    batches = [_batch(given, device) for device in (given.device, torch.device("cpu"))]
    batch, alone = batches

    def known(batch: BatchProcessor) -> torch.Tensor:
        """What slots hold; what lies between their lists and beyond their histories is anything."""
        records, history, lengths = batch._slots.records, batch._slots.history, batch._slots.lengths
        inside = torch.arange(history.shape[1], device=history.device) < lengths.unsqueeze(1)
        return torch.cat((records[:, : RECORD.value], torch.where(inside, history, 0)), 1)

    def change(batch: BatchProcessor, put: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        steps.append_tokens(batch._slots, put(of), put(tokens))
        steps.accept_drafts(batch._slots, put(rows), put(tokens), put(drafts), True)
        batch.swap(0, 3)
        batch.move(4, 5)
        return known(batch)

    def reference() -> torch.Tensor:
        with forced(False):
            return change(alone, lambda tensor: tensor)

    return [Outcome(change(batch, given.put), reference)]


def tournament(given: Given) -> list[Outcome]:
    """SynthID's depths."""
    values, N, D = given.values(), 64, 7
    table = given.integers(0, 2, N).to(torch.uint8)
    arguments = (table, given.integers(-(2**62), 2**62, given.B, D), given.integers(0, 2, given.B, 1).bool())
    found = synthid.launch_synthid(given.scores(values), *map(given.put, arguments), 0x5DEECE66D)
    wanted = lambda: synthid.reference_synthid(values, *arguments, 0x5DEECE66D)  # noqa: E731
    return [Outcome(found, wanted, tolerance=1e-3)]


def edited_densely(given: Given) -> list[Outcome]:
    """An engine's sums, scales, bitmask and biases, in place; two rows share those of a request where they can."""
    repeat = 2 if given.B % 2 == 0 else 1
    values, rows = given.values(), given.B // repeat
    numbers = [torch.rand(rows, given.V, generator=given.generator) + 0.5 for _ in range(3)]
    edits = DenseEdits(numbers[0], numbers[1], given.sets(given.B), numbers[2])
    scores = given.scores(values)
    dense.edit_densely_(scores, DenseEdits(*map(given.put, edits)), repeat)

    def reference() -> torch.Tensor:
        with forced(False):
            return dense.edit_densely_(values.clone(), edits, repeat)

    return [Outcome(scores, reference, tolerance=1e-5)]


def kept_sets(given: Given) -> list[Outcome]:
    """What truncations kept, as bits and as ids with room for some; greedy rows keep everything."""
    values, seeds = given.values(), given.integers(0, 2**62, given.B)
    temperature = torch.full((given.B,), 0.7)
    temperature[1::2] = 0.0
    room = max(1, given.V // 3)

    def sampled(logits: torch.Tensor, put: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        of: list[torch.Tensor] = []
        for form in ("bits", room):
            kept = fl.sample(
                logits, seeds=put(seeds), positions=put(seeds), temperature=put(temperature), top_k=20, top_p=0.9,
                return_kept=form,
            ).kept  # fmt: skip
            assert kept is not None
            if kept.bits is not None:
                of.append(kept.bits)
            else:
                assert kept.ids is not None and kept.counts is not None  # noqa: PT018
                inside = torch.arange(room, device=kept.ids.device) < kept.counts.unsqueeze(1)
                of += [kept.counts, torch.where(inside & (kept.counts <= room).unsqueeze(1), kept.ids, 0)]
        return of

    found = sampled(given.scores(values), given.put)

    def reference(i: int) -> torch.Tensor:
        with forced(False):
            return sampled(values, lambda tensor: tensor)[i]

    return [Outcome(each, lambda i=i: reference(i)) for i, each in enumerate(found)]


def parts(given: Given, rules: tuple[Rule, ...]) -> list[Outcome]:
    """Tokens from three parts of the vocabulary, as three ranks would exchange them."""
    values, seeds = given.values(), given.integers(0, 2**62, given.B)
    positions, temperature = seeds % 1000, torch.full((given.B,), 0.7)
    temperature[::3] = 0.0
    put = [given.put(each) for each in (seeds, positions, temperature)]
    scores = given.scores(values)
    starts, sizes = _parts_of(given)
    columns = scores.split(sizes, 1)

    def step_of(rank: int) -> TopShards | BestShards | FrontShards:
        first, own = starts[rank], sizes[rank]
        sent = sent_of(rules, given.V, len(sizes))
        if sent is not None:
            return TopShards(rules, sent, given.V, own, first, given.device)
        if rules:
            assert keep_the_first(rules, given.V)
            return FrontShards(rules, Place.of(starts, sizes, rank), given.device)
        return BestShards(own, first, given.device)

    def run(rank: int, gather: Exchange, add: Exchange) -> torch.Tensor:
        begun = step_of(rank).begin(columns[rank], *put)
        return begun.finish(gather(begun.sent), add)

    found = torch.stack(exchanged(run, len(sizes)))

    def reference() -> torch.Tensor:
        with forced(False):
            options = {rule.kind: rule.value for rule in rules}
            drawn = fl.sample(values, seeds=seeds, positions=positions, temperature=temperature, **options)
        return drawn.tokens.expand(len(sizes), -1)

    return [Outcome(found, reference)]


class _LaterError(Exception):
    """An exchange waits for what another rank sends."""


def exchanged(
    run: Callable[[int, Exchange, Exchange], _T], ranks: int, sent: list[list[torch.Tensor]] | None = None
) -> list[_T]:
    """What some ranks come to, in one process: they run again and again, each as far as the others have sent.

    Args:
        run: what rank does what, with a gathering exchange and an adding one.
        ranks: how many.
        sent: an empty list, to hold what each rank has sent.
    """
    sent = [] if sent is None else sent
    sent += [[] for _ in range(ranks)]
    found: dict[int, _T] = {}

    def exchange(rank: int, numbers: Iterator[int], join: Exchange) -> Exchange:
        def joined(mine: torch.Tensor) -> torch.Tensor:
            number = next(numbers)
            if number == len(sent[rank]):
                sent[rank].append(mine.clone())
            if any(len(each) <= number for each in sent):
                raise _LaterError
            return join(torch.stack([each[number] for each in sent]))

        return joined

    while len(found) < ranks:
        for rank in range(ranks):
            numbers = itertools.count()
            exchanges = [exchange(rank, numbers, join) for join in (lambda all_: all_, lambda all_: all_.sum(0))]
            with suppress(_LaterError):
                found[rank] = run(rank, *exchanges)
    return [found[rank] for rank in range(ranks)]


def _parts_of(given: Given) -> tuple[list[int], list[int]]:
    """Where three parts of the vocabulary begin, and their sizes."""
    each = -(-given.V // 24) * 8
    starts = list(range(0, given.V, each))
    return starts, [min(each, given.V - first) for first in starts]


def reported_by_parts(given: Given) -> list[Outcome]:
    """Raw log-probabilities, ranks and the likeliest tokens, as three ranks would exchange them."""
    values, count = given.values(), min(5, given.V)
    tokens = given.integers(0, given.V, given.B)
    scores, put = given.scores(values), given.put(tokens)
    starts, sizes = _parts_of(given)

    def run(rank: int, gather: Exchange, add: Exchange) -> logprobs.Report:
        part = scores[:, starts[rank] : starts[rank] + sizes[rank]]
        return report_of_part(part, put, count, Place.of(starts, sizes, rank), gather, add)

    return [
        Outcome(each, lambda i=i: logprobs.reference_report(values, tokens, count, None)[i], tolerance=1e-4)
        for found in exchanged(run, len(starts))
        for i, each in enumerate(found)
    ]  # fmt: skip


def trained_on_parts(given: Given, options: dict[str, Any]) -> list[Outcome]:
    """Log-probabilities of targets and entropies, as three ranks would exchange them."""
    values, targets = given.values(), given.integers(0, given.V, given.B)
    targets[1::4] = -100
    kept = None
    if options.get("kept"):
        sets = given.sets(given.B)
        kept = fl.KeptTokens(given.V, bits=sets)
        if options["kept"] == "ids":
            with forced(False):
                kept = fl.KeptTokens(given.V, *ids_of_bits(sets, given.V, given.V))
    named = {name: value for name, value in options.items() if name != "kept"}
    rules = fl.SamplingParams(**named).rules
    if rules and not given.B:  # such a call isn't made
        return []
    of_kept = None if kept is None else kept.to(given.device).flat(given.B)
    task = Task(given.put(targets), given.put(torch.tensor(0.8)), rules, of_kept, -100)
    scores = given.scores(values)
    starts, sizes = _parts_of(given)

    def run(rank: int, gather: Exchange, add: Exchange) -> trainer.Rows:
        part, place = scores[:, starts[rank] : starts[rank] + sizes[rank]], Place.of(starts, sizes, rank)
        step = fixed_number_of(part, task, place, min(sizes)) if rules else None
        if step is None:
            assert not rules
            return logprobs_of_part(part, task, place, True, gather, add)
        return ruled_logprobs_of_part(part, task, place, step, True, gather, add)

    def reference(i: int) -> torch.Tensor:
        with forced(False):
            return fl.logprobs(values, targets, temperature=0.8, entropy=True, kept=kept, **named)[i]

    # Rounding at the cut-off may leave another token in, which weighs little.
    return [
        Outcome(found[i], lambda i=i: reference(i), tolerance=2e-3)
        for found in exchanged(run, len(starts))
        for i in range(2)
    ]  # fmt: skip


def trained(given: Given, options: dict[str, Any]) -> list[Outcome]:
    """Log-probabilities of targets, entropies, and the gradient of both."""
    values, targets = given.values(), given.integers(0, given.V, given.B)
    targets[1::4] = -100
    sets = given.sets(given.B)
    weights = torch.rand(2, given.B, generator=given.generator)

    def run(logits: torch.Tensor, put: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        kept: Any = None
        if options.get("kept") == "bits":
            kept = put(sets)
        elif options.get("kept") == "ids":
            with forced(False):
                ids, counts = ids_of_bits(sets, given.V, given.V)
            kept = fl.KeptTokens(given.V, ids=put(ids), counts=put(counts))
        named = {name: value for name, value in options.items() if name != "kept"}
        leaf = logits.detach().requires_grad_()
        with patch.object(trainer, "_LEAST_ROWS", 2), patch.object(trainer, "SHARE", 0):  # in parts
            found = fl.logprobs(leaf, put(targets), temperature=0.8, entropy=True, kept=kept, **named)
            (put(weights[0]) * found.logprobs + put(weights[1]) * found.entropy).sum().backward()
        return [found.logprobs.detach(), found.entropy.detach(), leaf.grad]

    found = run(given.scores(values), given.put)

    def reference(i: int) -> torch.Tensor:
        with forced(False):
            return run(values, lambda tensor: tensor)[i]

    # Rounding at the cut-off may leave another token in, which weighs little.
    return [Outcome(each, lambda i=i: reference(i), tolerance=2e-3) for i, each in enumerate(found)]


def long_histories(given: Given) -> list[Outcome]:
    """Histories with an index of what occurs in them: brought up to date where tokens are appended, or by a step."""
    generator = torch.Generator().manual_seed(given.V)
    asked = [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "presence_scope": "all"}, {"no_repeat_ngram_size": 3},
        {"dry_multiplier": 0.7, "dry_allowed_length": 1, "dry_breakers": (2,)},
        {"presence_penalty": 0.4, "no_repeat_ngram_size": 2}, {"repetition_penalty": 0.8, "repetition_scope": "output"},
    ]  # fmt: skip
    slots = max(len(asked), given.B)
    text = torch.randint(0, min(given.V, 9), (slots, 150), generator=generator).int()
    lengths = (60 + 20 * (torch.arange(slots) % 5)).int()
    values, tokens = given.values(), torch.randint(0, min(given.V, 9), (slots,), generator=generator)
    of = torch.arange(slots)

    def run(logits: torch.Tensor, device: torch.device, put: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        history = put(text), put(lengths), put(lengths)
        theirs = BatchProcessor(slots, given.V, device, history=history, history_grows=True)
        ours = BatchProcessor(slots, given.V, device, max_length=200)
        for slot in range(slots):
            params = fl.RequestParams(**asked[slot % len(asked)], seed=1)
            theirs.add(params, slot=slot)
            ours.add(params, text[slot, : lengths[slot]].tolist(), slot=slot)
        steps.append_tokens(ours._slots, put(of), put(tokens))
        return torch.stack([batch.apply(logits, put(of)[: len(logits)]).cpu() for batch in (ours, theirs)])

    with patch.multiple(layout, SPAN_BLOCK=4, _SHORT=16, _FEWEST_HASHES=16):
        found = run(given.scores(values), given.device, given.put)

    def reference() -> torch.Tensor:
        with forced(False):
            return run(values, torch.device("cpu"), lambda tensor: tensor)

    return [Outcome(found, reference, tolerance=1e-4)]


class Operation(NamedTuple):
    """Some launches, and which shapes they take."""

    run: Callable[[Given], list[Outcome]]
    least_vocab: int = 1


OPERATIONS: dict[str, Operation] = {
    "mask_tokens": Operation(mask_tokens),
    "mask_listed_tokens": Operation(mask_listed_tokens),
    "pack_ids": Operation(pack_ids),
    "bitmask": Operation(bitmask),
    "fold": Operation(folded),
    **{
        f"{name}{kind}": Operation(lambda given, make=make, rules=rules: make(given, rules), 2)
        for name, make in (("select", _select), ("draw", _drawn))
        for kind, rules in _RULES.items()
    },
    "draw_all": Operation(lambda given: _drawn(given, ()), 2),
    "report": Operation(reported, 2),
    "slots": Operation(served, 10),
    "histories": Operation(histories, 10),
    "long_histories": Operation(long_histories, 10),
    "synthid": Operation(tournament, 2),
    "edit_densely": Operation(edited_densely),
    "kept": Operation(kept_sets, 2),
    **{
        f"parts{kind}": Operation(lambda given, rules=rules: parts(given, rules), 32)
        for kind, rules in (("", _KEPT), ("_best", ()), ("_front", _FIRST))
    },
    **{
        f"train_{kind}": Operation(lambda given, options=options: trained(given, options), 2)
        for kind, options in _TRAINED.items()
    },
    "parts_report": Operation(reported_by_parts, 32),
    **{
        f"train_parts_{kind}": Operation(lambda given, options=_TRAINED[kind]: trained_on_parts(given, options), least)
        for kind, least in (("whole", 32), ("rules", 1000), ("bits", 32), ("ids", 32))
    },
}
_FAR_OPERATIONS = ("mask_tokens", "bitmask", "fold", "select")


class Case(NamedTuple):
    """One operation on one shape."""

    name: str
    operation: str
    B: int
    V: int
    strided: bool = False
    far: bool = False
    """Whether its rows lie so far apart that the last of them begins beyond 2**31 elements."""


CASES = [
    Case(f"{name}-{B}x{V}", name, B, V, strided=number % 2 == 1)
    for name, operation in OPERATIONS.items()
    for number, (B, V) in enumerate(SHAPES)
    if operation.least_vocab <= V
] + [Case(f"{name}-far", name, 3, 1000, far=True) for name in _FAR_OPERATIONS]


class forced:  # noqa: N801
    """Whether tensors on the CPU go to the kernels too."""

    def __init__(self, kernels: bool) -> None:
        self._kernels, self._modules = kernels, (dense, fold, launch, steps)

    def __enter__(self) -> None:
        self._before = [module.FORCE_KERNEL for module in self._modules]
        for module in self._modules:
            module.FORCE_KERNEL = self._kernels

    def __exit__(self, *error: object) -> None:
        for module, before in zip(self._modules, self._before, strict=True):
            module.FORCE_KERNEL = before


def run_case(case: Case, device: torch.device, check: bool) -> None:
    """Launch the kernels of a case.

    Args:
        case: the case.
        device: a GPU; or the CPU, where Triton interprets.
        check: whether allocations are guarded, and results compared.

    Raises:
        AssertionError: a result is wrong, or something beside it was written.
    """
    assert HAS_TRITON, "needs Triton"
    guards = Guards(device)
    with forced(True):
        if not check:
            OPERATIONS[case.operation].run(Given(case.B, case.V, device, case.strided, case.far))
        else:
            given = Given(case.B, case.V, device, case.strided, case.far)
            with guards:
                outcomes = OPERATIONS[case.operation].run(given)
    if device.type == "cuda":
        torch.cuda.synchronize()
    if check:
        guards.check()
        assert all(unchanged() for unchanged in given.beside), "written beside strided scores"
        for outcome in outcomes:
            outcome.check()


def chosen(names: Sequence[str] | None) -> list[Case]:
    """Cases by their names, or all of some operations; without names, all."""
    if names is None:
        return CASES
    unknown = set(names) - {case.name for case in CASES} - set(OPERATIONS)
    if unknown:
        raise ValueError(f"no such cases: {', '.join(sorted(unknown))}")
    return [case for case in CASES if case.name in names or case.operation in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status. A line is printed for each case: "done" or "left out", and its name."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign.sanitizer_cases", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--cases", nargs="+", metavar="NAME")
    parser.add_argument("--check", action="store_true", help="guard allocations, and compare results with torch")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after so many no other case begins")
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        interpreter.speed_up()
    start, failed = time.perf_counter(), False
    for case in chosen(given.cases):
        if time.perf_counter() - start > given.seconds:
            print(f"left out {case.name}", flush=True)
            continue
        try:
            run_case(case, torch.device(given.device), given.check)
        except AssertionError as error:
            failed = True
            print(f"failed {case.name}: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        print(f"done {case.name}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
