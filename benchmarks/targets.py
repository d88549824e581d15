"""The targets of fastlogits, and whether a run met them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.processors import CLASSES
from benchmarks.results import Result, Results
from benchmarks.workloads import (
    ADD,
    CLONE,
    COPY,
    EMPTY,
    FAST,
    FAST_,
    FAST_DEVICE,
    FAST_DEVICE_,
    FIRST_STEP,
    LATER_STEP,
    LOOP,
    THEIRS,
    TRANSFORMERS,
)

_CHAIN_6, _CHAIN_9 = "chain 6", "chain 9"
_OUT_OF_PLACE, _IN_PLACE = (FAST, FAST_DEVICE), (FAST_, FAST_DEVICE_)


@dataclass(frozen=True)
class Verdict:
    """A target, its worst measurement, and whether that meets it."""

    target: str
    measured: str
    met: bool


@dataclass(frozen=True)
class _Target:
    """The worst case of some contenders, as a ratio to another one's time, stays at or below a limit."""

    text: str
    metric: str
    contenders: Sequence[str]
    against: str
    limit: float
    workloads: Sequence[str] = (FIRST_STEP,)
    where: Callable[[Result], bool] = lambda result: True
    speed_up: bool = False

    def verdict(self, results: Results) -> Verdict | None:
        """None if the run measured nothing of it."""
        ratios = [
            (ratio, result)
            for result in results.all
            if result.metric == self.metric and result.workload in self.workloads
            if result.contender in self.contenders and self.where(result) and not result.case.cold
            if (ratio := results.ratio(result, self.against)) is not None
        ]
        if not ratios:
            return None
        ratio, worst = max(ratios, key=lambda pair: pair[0])
        shown = f"{1 / ratio:.1f} x faster" if self.speed_up else f"{ratio:.2f} x"
        times = f"{_us(results.time(worst, worst.contender))} / {_us(results.time(worst, self.against))} us"
        return Verdict(self.text, f"{shown} ({times}) {_place(worst)}", ratio <= self.limit)


# What a graph replay adds to the empty kernel's time, where that is 5.0 us and the target 6.
_IN_PLACE_MARGIN_US = 1.0


def _in_place_gpu(results: Results, text: str, half: bool) -> Verdict | None:
    times = [
        (result.timing.median, result)
        for result in results.all
        if result.metric == "gpu_us" and result.workload == FIRST_STEP and result.contender in _IN_PLACE
        if result.case.batch <= 64 and result.case.vocab <= 128256
        if result.case.is_half == half and result.timing is not None
    ]
    if not times:
        return None
    us, worst = max(times, key=lambda pair: pair[0])
    empty = results.time(worst, EMPTY)
    limit = 6.0 if empty is None else empty + _IN_PLACE_MARGIN_US
    return Verdict(text, f"{us:.2f} us, empty kernel {_us(empty)} us {_place(worst)}", us <= limit)


# What a few launches may take where the logits are few.
_FEW_LOGITS_US = 15.0


def _chain_of_few_logits(results: Results) -> Verdict | None:
    times = [
        (result.timing.median, result)
        for result in results.all
        if (result.workload, result.metric, result.contender) == (_CHAIN_6, "gpu_us", FAST)
        if result.case.batch <= 8 and result.case.vocab <= 128256 and result.timing is not None
    ]
    if not times:
        return None
    us, worst = max(times, key=lambda pair: pair[0])
    return Verdict("GPU time of chain 6, batch 1 and 8: <= 15 us", f"{us:.2f} us {_place(worst)}", us <= _FEW_LOGITS_US)


def _is_large(result: Result) -> bool:
    return (result.case.batch, result.case.vocab) in ((64, 128256), (256, 151936))


def _is_8_x_128256(ids: int) -> Callable[[Result], bool]:
    return lambda result: (result.case.batch, result.case.vocab, result.case.ids) == (8, 128256, ids)


_TARGETS = (
    _Target("GPU time out of place <= 1.15 x copy_", "gpu_us", _OUT_OF_PLACE, COPY, 1.15),
    _Target("host time out of place <= 3 x add_", "host_us", _OUT_OF_PLACE, ADD, 3),
    _Target("host time in place <= 3 x add_", "host_us", _IN_PLACE, ADD, 3),
    _Target(
        "CPU in place, 10 ids: >= 5 x faster than the loop",
        "cpu_us", [FAST_], LOOP, 1 / 5, where=_is_8_x_128256(10), speed_up=True,
    ),
    _Target(
        "CPU in place, 1000 ids: >= 100 x faster than the loop",
        "cpu_us", [FAST_], LOOP, 1 / 100, where=_is_8_x_128256(1000), speed_up=True,
    ),
    _Target(
        "CPU out of place <= 1.5 x clone()",
        "cpu_us", [FAST], CLONE, 1.5,
        where=lambda result: (result.case.batch, result.case.vocab) == (8, 128256),
    ),
    _Target(
        "CPU never slower than transformers, first step",
        "cpu_us", [FAST, FAST_], TRANSFORMERS, 1,
    ),
    _Target("GPU time of chain 6 <= 1.7 x copy_", "gpu_us", [FAST], COPY, 1.7, [_CHAIN_6], _is_large),
    _Target("host time of chain 6 <= 6 x add_", "host_us", [FAST], ADD, 6, [_CHAIN_6]),
    _Target(
        "CPU chain 9: >= 5 x faster than transformers",
        "cpu_us", [FAST], THEIRS, 1 / 5, [_CHAIN_9], speed_up=True,
    ),
    _Target(
        "CPU: no class slower than that of transformers",
        "cpu_us", [FAST], THEIRS, 1, list(CLASSES), lambda result: result.case.batch in (1, 8, 64),
    ),
    _Target(
        "CPU never slower than transformers, later steps",
        "cpu_us", [FAST], TRANSFORMERS, 1, workloads=[LATER_STEP],
    ),
)  # fmt: skip


def verdicts(results: Results) -> list[Verdict]:
    """All targets that the run says something about."""
    found = [
        _in_place_gpu(results, "GPU time in place, to 64 x 128256: empty kernel + 1 us", half=False),
        _in_place_gpu(results, "the same with half the vocabulary", half=True),
        _chain_of_few_logits(results),
        *(target.verdict(results) for target in _TARGETS),
    ]
    return [verdict for verdict in found if verdict is not None]


def _us(us: float | None) -> str:
    return "?" if us is None else f"{us:.2f}" if us < 100 else f"{us:.0f}"


def _place(result: Result) -> str:
    return f"{result.workload}: {result.contender}, {result.case.size}, {result.case.set_name}"
