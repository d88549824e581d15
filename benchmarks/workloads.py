"""What is measured: workloads, each with its contenders, its inputs and the result that they must have."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers.generation.logits_process as theirs
from fastlogits_kernels._triton import HAS_TRITON, triton
from transformers import SuppressTokensAtBeginLogitsProcessor

import fastlogits
from benchmarks import serving
from benchmarks.processors import (
    CHAINS,
    CLASSES,
    DOUBLED,
    DRAWS,
    HISTORY,
    ON_THE_HOST,
    STATEFUL,
    WRITING,
    ZIPF,
    Made,
    history,
)
from benchmarks.timing import Call
from fastlogits import SuppressFirstTokens
from fastlogits.demo.article_loop import ArticleLoop

LOOP = "article loop"
TRANSFORMERS = "transformers SuppressTokensAtBegin"
THEIRS = "transformers"
FILL = "torch masked_fill"
FILL_ = "torch masked_fill_"
FAST = "fastlogits"
FAST_ = "fastlogits in place"
FAST_DEVICE = "fastlogits, device position"
FAST_DEVICE_ = "fastlogits in place, device position"
FAST_COPIED_ = "copy_(), then fastlogits in place"
CLONE, COPY, ADD, EMPTY = "clone()", "copy_()", "add_(1)", "empty Triton kernel"

FIRST_STEP, COLD, LATER_STEP = "first step", "first step, cold inputs", "later step"

_PROMPT_LENGTH = 512
# A set of this many ids or more is measured in place only, and not by the loop, which would launch a kernel for each.
_MANY_IDS = 10_000
# Fewer logits than these would take hundreds of rotating inputs to outgrow an L2, and time little but the launch.
_LEAST_COLD = 2**19
# transformers sorts 256 rows for seconds on a CPU; what is asked there ends here.
_MOST_ON_CPU = 64 * 128256
# After the first step no contender touches the logits, so a larger batch has nothing to tell.
_MOST_LATER = 8


@dataclass(frozen=True)
class Case:
    """One size on one device; the logits are float32 ``[batch, vocab]``. Workloads of no set of ids have 0 ``ids``."""

    device: torch.device
    batch: int
    vocab: int
    ids: int

    @property
    def is_half(self) -> bool:
        """Whether half the vocabulary is forbidden, a number of ids that differs by vocabulary."""
        return self.ids >= _MANY_IDS and self.ids == self.vocab // 2

    @property
    def set_name(self) -> str:
        """The set of tokens, for people."""
        if not self.ids:
            return f"history {HISTORY}"
        return "half the vocabulary" if self.is_half else f"{self.ids} ids"

    @property
    def size(self) -> str:
        """The shape of the logits, for people."""
        return f"{self.batch} x {self.vocab}"


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    Args:
        name: for people and for the results.
        bind: given scores ``[B, V]``, the call that processes them.
        in_place: whether the call writes its input.
        yardstick: whether it does another job, for scale; its result is not checked.
    """

    name: str
    bind: Callable[[torch.Tensor], Call]
    in_place: bool = False
    yardstick: bool = False


@dataclass(frozen=True)
class Workload:
    """A job, the ways to do it and the times to take.

    Args:
        contenders: those of a case; none where the workload doesn't hold for the case.
        expected: given the case and scores, the result in plain torch.
        metrics: what is timed in a case.
        baseline: the contender to whose time the others are set in tables.
        rotates: whether the inputs rotate, together larger than the L2.
        takes_ids: whether it is measured for several numbers of ids.
        quick: whether a quick run holds it.
        rounds: whether results are right that differ from the expected ones by rounding.
    """

    contenders: Callable[[Case], list[Contender]]
    expected: Callable[[Case, torch.Tensor], torch.Tensor]
    metrics: Callable[[Case], tuple[str, ...]]
    baseline: str = LOOP
    rotates: bool = False
    takes_ids: bool = True
    quick: bool = True
    rounds: bool = False


@triton.jit
def _empty_kernel(x_ptr):  # type: ignore[no-untyped-def]
    pass


def token_ids(case: Case) -> torch.Tensor:
    """The tokens to forbid, distinct, int64 ``[ids]``: few are neighbours, as digits are, many lie anywhere."""
    if case.ids <= 10:
        return torch.arange(case.ids) + min(15, case.vocab - case.ids)
    return torch.randperm(case.vocab, generator=torch.Generator().manual_seed(case.ids))[: case.ids]


def random_scores(case: Case) -> torch.Tensor:
    """Logits N(0, 3), float32 ``[batch, vocab]``."""
    generator = torch.Generator().manual_seed(case.batch * case.vocab)
    return (torch.randn(case.batch, case.vocab, generator=generator) * 3).to(case.device)


def rotating_inputs(case: Case) -> int:
    """How many inputs of a case outgrow its GPU's L2 twice over."""
    l2_bytes = torch.cuda.get_device_properties(case.device).L2_cache_size
    return 2 + 2 * l2_bytes // (case.batch * case.vocab * 4)


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models or [platform.processor() or platform.machine()])[0]


def _processor(
    name: str,
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    input_ids: torch.Tensor,
    in_place: bool = False,
) -> Contender:
    return Contender(name, lambda scores: partial(processor, input_ids, scores), in_place)


def _yardsticks(case: Case) -> list[Contender]:
    def bind_copy(scores: torch.Tensor) -> Call:
        return partial(torch.empty_like(scores).copy_, scores)

    def bind_empty(scores: torch.Tensor) -> Call:
        def call() -> torch.Tensor:
            _empty_kernel[1,](scores)
            return scores

        return call

    yardsticks = [
        Contender(CLONE, lambda scores: scores.clone, yardstick=True),
        Contender(COPY, bind_copy, yardstick=True),
        Contender(ADD, lambda scores: partial(scores.add_, 1), in_place=True, yardstick=True),
    ]
    if case.device.type == "cuda" and HAS_TRITON:
        yardsticks.append(Contender(EMPTY, bind_empty, yardstick=True))
    return yardsticks


def _first_step(case: Case) -> list[Contender]:
    # In-place contenders forbid again what is forbidden already: what the logits are doesn't change the time.
    device = case.device
    ids = token_ids(case)
    row = torch.zeros(case.vocab, dtype=torch.bool)
    row[ids] = True
    row = row.to(device)
    listed: list[int] = ids.tolist()
    input_ids = torch.zeros(case.batch, _PROMPT_LENGTH, dtype=torch.int64, device=device)
    suppress = SuppressFirstTokens(listed)
    fast = suppress.for_run(prompt_length=_PROMPT_LENGTH)
    contenders = [
        _processor(LOOP, ArticleLoop(listed, _PROMPT_LENGTH), input_ids, in_place=True),
        _processor(TRANSFORMERS, SuppressTokensAtBeginLogitsProcessor(listed, _PROMPT_LENGTH, str(device)), input_ids),
        Contender(FILL, lambda scores: partial(scores.masked_fill, row, float("-inf"))),
        Contender(FILL_, lambda scores: partial(scores.masked_fill_, row, float("-inf")), in_place=True),
        _processor(FAST, fast, input_ids),
        _processor(FAST_, fast.apply_, input_ids, in_place=True),
    ]
    if device.type == "cuda":
        # One captured graph serves prefill and decode only where the position is read on the device.
        prompt_length = torch.full((case.batch,), _PROMPT_LENGTH, device=device)
        placed = suppress.for_run(prompt_length=prompt_length, cache_position=prompt_length - 1)
        contenders.append(_processor(FAST_DEVICE, placed, input_ids))
        contenders.append(_processor(FAST_DEVICE_, placed.apply_, input_ids, in_place=True))
    if case.ids >= _MANY_IDS:
        contenders = [contender for contender in contenders if contender.in_place and contender.name != LOOP]
    return contenders + _yardsticks(case)


def _cold(case: Case) -> list[Contender]:
    if case.device.type != "cuda" or case.ids >= _MANY_IDS or case.batch * case.vocab < _LEAST_COLD:
        return []
    return [contender for contender in _first_step(case) if not contender.in_place]


def _later_step(case: Case) -> list[Contender]:
    if case.ids >= _MANY_IDS or case.batch > _MOST_LATER:
        return []
    listed: list[int] = token_ids(case).tolist()
    input_ids = torch.zeros(case.batch, _PROMPT_LENGTH + 1, dtype=torch.int64, device=case.device)
    suppress = SuppressTokensAtBeginLogitsProcessor(listed, _PROMPT_LENGTH, str(case.device))
    fast = SuppressFirstTokens(listed).for_run(prompt_length=_PROMPT_LENGTH)
    return [
        _processor(LOOP, ArticleLoop(listed, _PROMPT_LENGTH), input_ids),
        _processor(TRANSFORMERS, suppress, input_ids),
        _processor(FAST, fast, input_ids),
    ]


def _forbidden(case: Case, scores: torch.Tensor) -> torch.Tensor:
    row = torch.zeros(case.vocab, dtype=torch.bool)
    row[token_ids(case)] = True
    return torch.where(row.to(scores.device), float("-inf"), scores)


def _unchanged(case: Case, scores: torch.Tensor) -> torch.Tensor:
    return scores.clone()


def _bind_processors(name: str, made: Made, ours: bool, case: Case, scores: torch.Tensor) -> Call:
    input_ids = history(case.batch, case.vocab, case.device)
    if name in ZIPF:
        scores = -1.5 * (scores.argsort(-1).argsort(-1) + 1.0).log()
    if name in DOUBLED:
        scores = torch.cat((scores, scores.flip(-1)))
    if name in WRITING and not ours:
        scores = scores.clone()
    module: Any = fastlogits if ours else theirs
    processors = made(module, input_ids, case.vocab)
    process = processors[0] if len(processors) == 1 else module.LogitsProcessorList(processors)
    return partial(process, input_ids, scores)


def _processors(name: str, made: Made) -> Workload:
    """Some of transformers' processors, from its module and from ours."""

    def contenders(case: Case) -> list[Contender]:
        largest = case.batch * case.vocab > _MOST_ON_CPU
        if largest and (case.device.type == "cpu" or name in CLASSES):
            return []
        return [
            Contender(THEIRS, partial(_bind_processors, name, made, False, case)),
            Contender(FAST, partial(_bind_processors, name, made, True, case)),
            *_yardsticks(case),
        ]

    def expected(case: Case, scores: torch.Tensor) -> torch.Tensor:
        return _bind_processors(name, made, False, case, scores)()

    metrics = _host_metric if name in STATEFUL or name in ON_THE_HOST else _all_metrics
    return Workload(contenders, expected, metrics, baseline=THEIRS, takes_ids=False, quick=name in CHAINS, rounds=True)


def _draw(dtype: torch.dtype) -> Workload:
    """A token of each row: transformers' warpers, softmax and multinomial, and a sampler."""

    def theirs_of(case: Case, scores: torch.Tensor) -> Call:
        ids, scores = history(case.batch, case.vocab, case.device), scores.to(dtype)
        process = theirs.LogitsProcessorList(CHAINS["T k p"](theirs, ids, case.vocab))
        return lambda: process(ids, scores.float()).softmax(-1).multinomial(1).squeeze(1)

    def ours_of(case: Case, scores: torch.Tensor) -> Call:
        seeds = torch.arange(case.batch, device=case.device)
        sampler, scores = fastlogits.Sampler(temperature=0.7, top_k=50, top_p=0.9), scores.to(dtype)
        return lambda: sampler(scores, seeds, seeds).tokens

    def contenders(case: Case) -> list[Contender]:
        if case.device.type == "cpu" and case.batch * case.vocab > _MOST_ON_CPU:
            return []
        return [
            Contender(THEIRS, partial(theirs_of, case), yardstick=True),  # other tokens, of the same distribution
            Contender(FAST, partial(ours_of, case)),
            *_yardsticks(case),
        ]

    def expected(case: Case, scores: torch.Tensor) -> torch.Tensor:
        seeds = torch.arange(case.batch)
        options = {"seeds": seeds, "positions": seeds, "temperature": 0.7, "top_k": 50, "top_p": 0.9}
        return fastlogits.sample(scores.to(dtype).cpu(), **options).tokens.to(case.device)  # type: ignore[arg-type]

    return Workload(contenders, expected, _all_metrics, baseline=THEIRS, takes_ids=False)


def _serving(draws: bool, zipf: bool) -> Workload:
    """A step of a batch in which every request has its own parameters, to processed logits or to tokens."""

    def given(scores: torch.Tensor) -> torch.Tensor:
        return -1.5 * (scores.argsort(-1).argsort(-1) + 1.0).log() if zipf else scores

    def to_new(case: Case, scores: torch.Tensor) -> Call:
        made, scores = serving.step(case.batch, case.vocab, case.device), given(scores)
        if draws:
            return lambda: made.batch.sample(scores, made.slots, bitmask=made.bitmask).tokens
        return lambda: made.batch.apply(scores, made.slots, bitmask=made.bitmask)

    def copied_first(case: Case, scores: torch.Tensor) -> Call:
        made, scores = serving.step(case.batch, case.vocab, case.device), given(scores)
        work = torch.empty_like(scores)
        return lambda: made.batch.apply_(work.copy_(scores), made.slots, bitmask=made.bitmask)

    def contenders(case: Case) -> list[Contender]:
        if case.device.type == "cpu" and case.batch * case.vocab > _MOST_ON_CPU:
            return []
        found = [Contender(FAST, partial(to_new, case))]
        if not draws:
            found.append(Contender(FAST_COPIED_, partial(copied_first, case)))
        return [*found, *_yardsticks(case)]

    def expected(case: Case, scores: torch.Tensor) -> torch.Tensor:
        return (serving.tokens if draws else serving.processed)(given(scores))

    return Workload(contenders, expected, _all_metrics, baseline=COPY, takes_ids=False, quick=False, rounds=True)


def _all_metrics(case: Case) -> tuple[str, ...]:
    if case.device.type == "cpu":
        return ("cpu_us",)
    # Many ids are a question to the memory, not to the host.
    return ("gpu_us",) if case.ids >= _MANY_IDS else ("gpu_us", "host_us")


def _host_metric(case: Case) -> tuple[str, ...]:
    return ("cpu_us",) if case.device.type == "cpu" else ("host_us",)


WORKLOADS: dict[str, Workload] = {
    FIRST_STEP: Workload(_first_step, _forbidden, _all_metrics),
    COLD: Workload(_cold, _forbidden, lambda case: ("gpu_us",), rotates=True),
    LATER_STEP: Workload(_later_step, _unchanged, _host_metric, baseline=TRANSFORMERS),
    **{name: _processors(name, made) for name, made in CHAINS.items()},
    **{name: _draw(dtype) for name, dtype in DRAWS.items()},
    "serving": _serving(draws=False, zipf=False),
    "serving zipf": _serving(draws=False, zipf=True),
    "serving tokens": _serving(draws=True, zipf=False),
    "serving tokens zipf": _serving(draws=True, zipf=True),
    **{name: _processors(name, made) for name, made in CLASSES.items()},
}
"""All workloads by name, in the order in which they run."""
