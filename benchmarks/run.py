"""One run: each case of each workload checked, then timed, all contenders in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from benchmarks.inputs import Case, random_scores, rotating_inputs
from benchmarks.peers import Peer
from benchmarks.results import Result, Results
from benchmarks.timing import Bunch, NotCapturableError, ReplayBunch, WallBunch, bandwidth, interleaved, peak_bytes
from benchmarks.workloads import OURS, Contender, Workload

BUDGET_S = {"cpu_us": 2.0, "gpu_us": 0.6, "host_us": 0.8}
"""Seconds to spend on all contenders of a case."""
SHORT_BUDGET_S = {"cpu_us": 0.2, "gpu_us": 0.2, "host_us": 0.15}


@dataclass
class Run:
    """What is measured, and the results.

    Args:
        budget_s: seconds to spend on a case, by metric.
        peers: other packages to measure beside ours.
        only_ours: whether to measure only fastlogits and its yardsticks.
    """

    budget_s: dict[str, float]
    peers: Sequence[Peer] = ()
    only_ours: bool = False
    results: Results = field(default_factory=Results)
    wrong: list[str] = field(default_factory=list)
    """Wrong results of fastlogits."""
    failed: list[str] = field(default_factory=list)
    """Wrong results of others."""
    bandwidths: dict[torch.device, float] = field(default_factory=dict)
    """Bytes per second of the devices' memory, as a copy moves them."""

    def measure(self, name: str, workload: Workload, case: Case) -> list[Result]:
        """Check all contenders of a case, time those that are right, and return what was added to the results."""
        if case.device not in self.bandwidths:
            self.bandwidths[case.device] = bandwidth(case.device)
        before = len(self.results.all)
        contenders = self._contenders(name, workload, case)
        test = _Test(workload, case)
        for contender in contenders:
            test.check(contender)
        limit_us = workload.moves(case) / self.bandwidths[case.device] * 1e6
        for metric in workload.metrics(case):
            timings = interleaved(test.bunches(contenders, metric), self.budget_s[metric])
            for contender in contenders:
                remark = test.problems.get(contender.name) or (
                    _NO_GRAPH if metric == "gpu_us" and contender.name in test.uncapturable else None
                )
                timing, peak = timings.get(contender.name), test.peaks.get(contender.name)
                limit = None if contender.yardstick else limit_us
                kind = (name, case, contender.name, contender.in_place, metric)
                self.results.add(Result(*kind, timing, _remark(remark), peak, limit))
            self._note_missing_peers(name, case, metric)
        place = f"{name}, {case.device}, {case.size}, {case.set_name}, {case.kind}"
        for by, problem in test.problems.items():
            (self.wrong if by in OURS else self.failed).append(f"{place}: {by} {problem}")
        return self.results.all[before:]

    def _note_missing_peers(self, name: str, case: Case, metric: str) -> None:
        for peer in self.peers:
            reason = peer.missing() if peer.takes(name, case) else None
            if reason is not None:
                self.results.add(Result(name, case, peer.name, False, metric, None, reason))

    def _contenders(self, name: str, workload: Workload, case: Case) -> list[Contender]:
        contenders = workload.contenders(case)
        if case.cold:
            contenders = [contender for contender in contenders if not contender.in_place]
        if self.only_ours:
            return [contender for contender in contenders if contender.yardstick or contender.name in OURS]
        present = [peer for peer in self.peers if peer.takes(name, case) and peer.missing() is None]
        return contenders + [contender for peer in present for contender in peer.contenders(name, case)]


_NO_GRAPH = "no graph"


class _Test:
    """A case, with what was found wrong with its contenders."""

    def __init__(self, workload: Workload, case: Case) -> None:
        self._workload, self._case = workload, case
        self._original = random_scores(case)
        self._expected = workload.expected(case, self._original)
        # All work on the same tensor, so that none finds its input warmer than another does.
        self._scores = self._original.clone()
        self.problems: dict[str, str] = {}
        """By contender: what is wrong with its result."""
        self.peaks: dict[str, int | None] = {}
        self.uncapturable: set[str] = set()

    @cached_property
    def _inputs(self) -> list[torch.Tensor]:
        return [self._scores, *(self._original.clone() for _ in range(rotating_inputs(self._case) - 1))]

    def check(self, contender: Contender) -> None:
        self._scores.copy_(self._original)
        problem = problem_of(contender, self._scores, self._original, self._expected, self._workload.rounds)
        if problem is not None:
            self.problems[contender.name] = problem
        elif not contender.yardstick:
            self.peaks[contender.name] = peak_bytes(contender.bind(self._scores), self._case.device)

    def bunches(self, contenders: Sequence[Contender], metric: str) -> dict[str, Bunch]:
        """What to time: the contenders that are right, and can be timed this way."""
        found = {}
        for contender in contenders:
            if contender.name in self.problems:
                continue
            bunch = self._replays(contender) if metric == "gpu_us" else self._calls(contender)
            if bunch is not None:
                found[contender.name] = bunch
        return found

    def _calls(self, contender: Contender) -> Bunch:
        return WallBunch(contender.bind(self._scores), self._case.device)

    def _replays(self, contender: Contender) -> Bunch | None:
        try:
            replays = ReplayBunch([contender.bind(each) for each in self._inputs])
        except NotCapturableError:
            self.uncapturable.add(contender.name)
            return None
        self._scores.copy_(self._original)
        found = replays.once()
        rounds = self._workload.rounds
        if contender.yardstick or _is_right(contender, self._original, found, self._expected, rounds):
            return replays
        self.problems[contender.name] = "differs from plain torch as a replayed graph"
        return None


def _remark(problem: str | None) -> str:
    """A problem in a word for tables, then its first line."""
    if problem is None or problem == _NO_GRAPH:
        return problem or ""
    return ("failed: " if problem.startswith("raised") else "wrong: ") + problem.splitlines()[0][:120]


def problem_of(
    contender: Contender, scores: torch.Tensor, original: torch.Tensor, expected: torch.Tensor, rounds: bool
) -> str | None:
    """What is wrong with a contender's result, if anything."""
    if contender.yardstick:
        return None
    try:
        processed = contender.bind(scores)()
    except Exception as error:  # whatever it is, the others are still to be measured
        return f"raised {type(error).__name__}: {error}"
    if not _is_right(contender, original, processed, expected, rounds):
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
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    return torch.equal(first.view(bits), second.view(bits))


def _is_right(
    contender: Contender, scores: torch.Tensor, found: torch.Tensor, expected: torch.Tensor, rounds: bool
) -> bool:
    """Whether a result is the expected one: in every bit, or up to rounding where the workload ``rounds``.

    Rounding explains a unit or two in the last place, and one token in a hundred thousand kept or dropped.
    """
    if contender.agrees is not None:
        return contender.agrees(scores, found, expected)
    if not rounds or found.shape != expected.shape or found.dtype != expected.dtype:
        return _same(found, expected)
    wrong = ~torch.isclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    return int(wrong.sum()) <= found.numel() // 100_000
