"""The workloads: their inputs, contenders, expected results and bytes.

A workload is one entry of ``WORKLOADS``. The contenders of other packages are in ``benchmarks.peers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeAlias, cast

import torch
import transformers.generation.logits_process as theirs
from fastlogits_kernels.runtime.bits import pack_bits, unpack_bits, words
from fastlogits_kernels.runtime.launcher import HAS_TRITON, triton
from transformers import SuppressTokensAtBeginLogitsProcessor

import fastlogits
import fastlogits.sampled
from benchmarks import long_histories, serving
from benchmarks.inputs import FLAT, GAUSS, LEAST_BATCH, MANY_IDS, MIXTURE, ZIPF, Case, history, token_ids
from benchmarks.processors import (
    CHAINS,
    CLASSES,
    DOUBLED,
    ON_THE_HOST,
    STATEFUL,
    TRUNCATIONS,
    WRITING,
    Made,
)
from benchmarks.timing import Call
from fastlogits import SuppressFirstTokens
from fastlogits.demo.article_loop import ArticleLoop
from fastlogits.sampling import SamplingOptions

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
YARDSTICKS = (CLONE, COPY, ADD, EMPTY)
OURS = (FAST, FAST_, FAST_DEVICE, FAST_DEVICE_, FAST_COPIED_)

FIRST_STEP, LATER_STEP, BITMASK = "first step", "later step", "bitmask"

_PROMPT_LENGTH = 512
# transformers sorts 256 rows for seconds on a CPU, so no more logits than these are measured there.
_MOST_ON_CPU = 64 * 128256
# Rows whose sampled tokens are compared with those of the CPU.
_ROWS_ON_CPU = 16
# After the first step no contender touches the logits, so that larger batches show nothing new.
_MOST_LATER = 8

Agrees: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], bool]
"""Given the scores, what a contender returned and the expected result: whether the contender is right."""


@dataclass(frozen=True)
class Contender:
    """One way to do the job.

    Args:
        name: for people and for the results.
        bind: given scores ``[B, V]``, the call that processes them.
        in_place: whether the call writes its input.
        yardstick: whether it does another job, for scale; its result is not checked.
        agrees: how its result is checked if it has another form; None for equality with the expected one.
    """

    name: str
    bind: Callable[[torch.Tensor], Call]
    in_place: bool = False
    yardstick: bool = False
    agrees: Agrees | None = None


def _read_and_write(case: Case) -> float:
    return 2 * case.nbytes


def is_named(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of some patterns, such as ``chain *``, fits the name of a workload."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Workload:
    """A job, the ways to do it and the times to take.

    Args:
        contenders: the contenders of a case; none if the workload doesn't apply to the case.
        expected: given the case and scores, the result in plain torch.
        metrics: what is timed in a case.
        baseline: the contender that tables compare the others with.
        takes_ids: whether it is measured for several numbers of ids.
        quick: whether a quick run includes it.
        main: whether a main run includes it.
        rounds: whether results may differ from the expected ones by rounding.
        inputs: the kinds of logits that it is measured on, names of ``LOGITS``.
        dtypes: their dtypes.
        moves: the bytes that a case must move; by default one read and one write of the logits.
    """

    contenders: Callable[[Case], list[Contender]]
    expected: Callable[[Case, torch.Tensor], torch.Tensor]
    metrics: Callable[[Case], tuple[str, ...]]
    baseline: str = LOOP
    takes_ids: bool = True
    quick: bool = True
    main: bool = True
    rounds: bool = False
    inputs: Sequence[str] = (GAUSS,)
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    moves: Callable[[Case], float] = _read_and_write

    def kinds(self, batch: int) -> list[tuple[str, torch.dtype]]:
        """Logits that a batch size can be measured on."""
        inputs = [logits for logits in self.inputs if batch >= LEAST_BATCH.get(logits, 1)]
        return [(logits, dtype) for dtype in self.dtypes for logits in inputs]


@triton.jit
def _empty_kernel(x_ptr):  # type: ignore[no-untyped-def]
    pass


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
        # On its own tensor: what it adds up would round the logits of the others to ties.
        Contender(ADD, lambda scores: partial(scores.clone().add_, 1), in_place=True, yardstick=True),
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
    if case.ids >= MANY_IDS:
        contenders = [contender for contender in contenders if contender.in_place and contender.name != LOOP]
    return contenders + _yardsticks(case)


def _later_step(case: Case) -> list[Contender]:
    if case.ids >= MANY_IDS or case.batch > _MOST_LATER:
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
    if name in DOUBLED:
        scores = torch.cat((scores, scores.flip(-1)))
    if name in WRITING and not ours:
        scores = scores.clone()
    module: Any = fastlogits if ours else theirs
    processors = made(module, input_ids, case.vocab)
    process = processors[0] if len(processors) == 1 else module.LogitsProcessorList(processors)
    return partial(process, input_ids, scores)


def _processors(name: str, made: Made, inputs: Sequence[str] = (GAUSS,)) -> Workload:
    """Some of transformers' processors, from its module and from ours."""
    is_class = name in CLASSES

    def contenders(case: Case) -> list[Contender]:
        largest = case.batch * case.vocab > _MOST_ON_CPU
        if largest and (case.device.type == "cpu" or is_class):
            return []
        return [
            Contender(THEIRS, partial(_bind_processors, name, made, False, case)),
            Contender(FAST, partial(_bind_processors, name, made, True, case)),
            *_yardsticks(case),
        ]

    def expected(case: Case, scores: torch.Tensor) -> torch.Tensor:
        return _bind_processors(name, made, False, case, scores)()

    metrics = _host_metric if name in STATEFUL or name in ON_THE_HOST else _all_metrics
    return Workload(
        contenders, expected, metrics, THEIRS,
        takes_ids=False, quick=not is_class, main=not is_class, rounds=True, inputs=inputs,
    )  # fmt: skip


DRAWS: dict[str, SamplingOptions] = {
    "draw T k p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "draw T p": {"temperature": 0.7, "top_p": 0.9},
    "draw T": {"temperature": 0.7},
}
"""A token of each row after these."""
_WARPERS = {"temperature": "TemperatureLogitsWarper", "top_k": "TopKLogitsWarper", "top_p": "TopPLogitsWarper"}


def warped(name: str, scores: torch.Tensor) -> torch.Tensor:
    """The logits that are sampled: transformers' warpers on float32 scores."""
    ids = torch.zeros(scores.shape[0], 1, dtype=torch.int64, device=scores.device)
    warpers = [getattr(theirs, _WARPERS[option])(value) for option, value in DRAWS[name].items()]
    found: torch.Tensor = theirs.LogitsProcessorList(warpers)(ids, scores.float())
    return found


def drawn_from(name: str, same: bool = False) -> Agrees:
    """Whether the warpers keep each sampled token; which one it is depends on the noise.

    Args:
        name: of the workload.
        same: whether the noise is ours, so that the first rows must have the tokens of the CPU.
    """

    def agrees(scores: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> bool:
        if found.shape != scores.shape[:1]:
            return False
        kept = warped(name, scores).gather(1, found.long().unsqueeze(1)).isfinite().all()
        return bool(kept) and not (same and not torch.equal(found[: len(expected)], expected))

    return agrees


def _draw(name: str) -> Workload:
    """Sampling: transformers' warpers, softmax and multinomial, and a sampler."""
    params = fastlogits.SamplingParams(**DRAWS[name])

    def theirs_of(case: Case, scores: torch.Tensor) -> Call:
        return lambda: warped(name, scores).softmax(-1).multinomial(1).squeeze(1)

    def ours_of(case: Case, scores: torch.Tensor) -> Call:
        seeds = torch.arange(case.batch, device=case.device)
        sampler = fastlogits.Sampler(params=params)
        return lambda: sampler(scores, seeds, seeds).tokens

    def contenders(case: Case) -> list[Contender]:
        if case.device.type == "cpu" and case.batch * case.vocab > _MOST_ON_CPU:
            return []
        return [
            Contender(THEIRS, partial(theirs_of, case), agrees=drawn_from(name)),
            Contender(FAST, partial(ours_of, case), agrees=drawn_from(name, same=True)),
            *_yardsticks(case),
        ]

    def expected(case: Case, scores: torch.Tensor) -> torch.Tensor:
        # A row has the same token in any batch, so that the first rows suffice.
        rows = scores[:_ROWS_ON_CPU].cpu()
        seeds = torch.arange(len(rows))
        return fastlogits.sample(rows, seeds=seeds, positions=seeds, params=params).tokens.to(case.device)

    return Workload(
        contenders, expected, _all_metrics, THEIRS,
        takes_ids=False, inputs=(GAUSS, ZIPF, MIXTURE, FLAT) if name == "draw T p" else (GAUSS, ZIPF),
        dtypes=(torch.float32, torch.bfloat16), moves=lambda case: case.nbytes,
    )  # fmt: skip


def grammar(case: Case) -> torch.Tensor:
    """A grammar's bitmask, int32 ``[B, ceil(V / 32)]``: half of the tokens are allowed, others in each row."""
    generator = torch.Generator().manual_seed(case.batch)
    return pack_bits(torch.rand(case.batch, case.vocab, generator=generator) < 0.5).to(case.device)


def _bitmask(case: Case) -> list[Contender]:
    bitmask = grammar(case)
    banned = ~unpack_bits(bitmask, case.vocab)

    def ours_of(scores: torch.Tensor) -> Call:
        def call() -> torch.Tensor:
            fastlogits.apply_token_bitmask_inplace(scores, bitmask)
            return scores

        return call

    return [
        Contender(FILL_, lambda scores: partial(scores.masked_fill_, banned, float("-inf")), in_place=True),
        Contender(FAST_, ours_of, in_place=True),
        *_yardsticks(case),
    ]


def _allowed(case: Case, scores: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~unpack_bits(grammar(case), case.vocab), float("-inf"))


def _bitmask_bytes(case: Case) -> float:
    # The mask is read, and half of the logits are written.
    return case.batch * words(case.vocab) * 4 + case.nbytes / 2


def _serving(draws: bool) -> Workload:
    """A step of a batch in which every request has its own parameters, to processed logits or to tokens."""

    def to_new(case: Case, scores: torch.Tensor) -> Call:
        made = serving.step(case.batch, case.vocab, case.device)
        if draws:
            return lambda: made.batch.sample(scores, made.slots, bitmask=made.bitmask).tokens
        return lambda: made.batch.apply(scores, made.slots, bitmask=made.bitmask)

    def copied_first(case: Case, scores: torch.Tensor) -> Call:
        made = serving.step(case.batch, case.vocab, case.device)
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
        return (serving.tokens if draws else serving.processed)(scores)

    return Workload(
        contenders, expected, _all_metrics, COPY,
        takes_ids=False, quick=False, rounds=True, inputs=(GAUSS, MIXTURE),
        moves=(lambda case: case.nbytes) if draws else _read_and_write,
    )  # fmt: skip


def _is_near(scores: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the first rows are as expected, up to rounding."""
    return torch.allclose(found[: len(expected)].cpu(), expected, rtol=1e-5, atol=1e-5)


def _has_tokens(scores: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the first rows have the expected tokens."""
    return torch.equal(found[: len(expected)].cpu(), expected)


def _long_history(length: int, listed: bool) -> Workload:
    """Penalties, n-grams, bad words and DRY over histories of so many tokens, by a list or a batch."""

    def of_list(case: Case, scores: torch.Tensor) -> Call:
        ids = long_histories.text(case.batch, case.vocab, length).to(case.device)
        chain = long_histories.processors(case.vocab, length).for_run(prompt_length=length - length // 4)
        return partial(chain, ids, scores)

    def of_batch(case: Case, scores: torch.Tensor) -> Call:
        batch, slots = long_histories.step(case.batch, case.vocab, length, case.device)
        return lambda: batch.sample(scores, slots).tokens

    def contenders(case: Case) -> list[Contender]:
        if case.device.type == "cpu" or case.batch != long_histories.ROWS:
            return []
        bind, agrees = (of_list, _is_near) if listed else (of_batch, _has_tokens)
        return [Contender(FAST, partial(bind, case), agrees=agrees), *_yardsticks(case)]

    def expected(case: Case, scores: torch.Tensor) -> torch.Tensor:
        return (long_histories.processed if listed else long_histories.tokens_of)(scores, length)

    return Workload(
        contenders, expected, _all_metrics, COPY, takes_ids=False, quick=False,
        moves=_read_and_write if listed else lambda case: case.nbytes,
    )  # fmt: skip


def _serving_logprobs(distribution: fastlogits.sampled.Distribution, most: int) -> Workload:
    """A step of a batch with log-probabilities of the token that is drawn, and of so many of the likeliest."""

    def of_batch(case: Case, scores: torch.Tensor) -> Call:
        made = serving.step(case.batch, case.vocab, case.device, most)

        def call() -> torch.Tensor:
            out = made.batch.sample(scores, made.slots, bitmask=made.bitmask, logprobs=distribution)
            return cast("torch.Tensor", out.logprobs if out.top_logprobs is None else out.top_logprobs)

        return call

    def contenders(case: Case) -> list[Contender]:
        if case.device.type == "cpu" and case.batch * case.vocab > _MOST_ON_CPU:
            return []
        return [Contender(FAST, partial(of_batch, case), agrees=_is_near), *_yardsticks(case)]

    def expected(case: Case, scores: torch.Tensor) -> torch.Tensor:
        made = serving.step(case.batch, case.vocab, torch.device("cpu"), most)
        out = made.batch.sample(scores.cpu(), made.slots, bitmask=made.bitmask, logprobs=distribution)
        return cast("torch.Tensor", out.logprobs if out.top_logprobs is None else out.top_logprobs)

    return Workload(
        contenders, expected, _all_metrics, COPY, takes_ids=False, quick=False, moves=lambda case: 2 * case.nbytes
    )  # fmt: skip


def _all_metrics(case: Case) -> tuple[str, ...]:
    if case.device.type == "cpu":
        return ("cpu_us",)
    if case.cold:
        return ("gpu_us",)
    # Many ids are a question to the memory, not to the host.
    return ("gpu_us",) if case.ids >= MANY_IDS else ("gpu_us", "host_us")


def _host_metric(case: Case) -> tuple[str, ...]:
    return ("cpu_us",) if case.device.type == "cpu" else () if case.cold else ("host_us",)


_KINDS: tuple[fastlogits.sampled.Distribution, ...] = ("raw", "processed")

WORKLOADS: dict[str, Workload] = {
    FIRST_STEP: Workload(_first_step, _forbidden, _all_metrics),
    LATER_STEP: Workload(_later_step, _unchanged, _host_metric, baseline=TRANSFORMERS),
    **{name: _processors(name, made) for name, made in CHAINS.items()},
    **{name: _processors(name, made, (GAUSS, ZIPF, MIXTURE, FLAT)) for name, made in TRUNCATIONS.items()},
    **{name: _draw(name) for name in DRAWS},
    "serving": _serving(draws=False),
    "serving tokens": _serving(draws=True),
    **{f"serving {kind} logprobs, top {most}": _serving_logprobs(kind, most) for kind in _KINDS for most in (0, 5, 20)},
    **{f"serving, {length} tokens": _long_history(length, listed=False) for length in long_histories.LENGTHS},
    **{f"list, {length} tokens": _long_history(length, listed=True) for length in long_histories.LENGTHS},
    **{name: _processors(name, made) for name, made in CLASSES.items()},
}
"""All workloads by name, in the order in which they run."""

if "apply_token_bitmask_inplace" in fastlogits.__all__:
    WORKLOADS[BITMASK] = Workload(
        _bitmask, _allowed, _all_metrics, FILL_, takes_ids=False, dtypes=(torch.float32, torch.bfloat16),
        moves=_bitmask_bytes,
    )  # fmt: skip
