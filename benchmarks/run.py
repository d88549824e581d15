"""One run: each case of each workload checked, then timed, all contenders in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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
    """What is measured, and what came of it.

    Args:
        budget_s: seconds to spend on a case, by metric.
        peers: other packages to measure beside ours.
        only_ours: whether to leave out all but fastlogits, and its yardsticks.
    """

    budget_s: dict[str, float]
    peers: Sequence[Peer] = ()
    only_ours: bool = False
    results: Results = field(default_factory=Results)
    wrong: list[str] = field(default_factory=list)
    """What fastlogits computed wrong."""
    failed: list[str] = field(default_factory=list)
    """What others did."""
    bandwidths: dict[torch.device, float] = field(default_factory=dict)
    """Bytes per second of the devices' memory, as a copy moves them."""

    def measure(self, name: str, workload: Workload, case: Case) -> list[Result]:
        """Check all contenders of a case, time those that are right, and return what was added to the results."""
        if case.device not in self.bandwidths:
            self.bandwidths[case.device] = bandwidth(case.device)
        before = len(self.results.all)
        contenders = self._contenders(name, workload, case)
        original = random_scores(case)
        expected = workload.expected(case, original)
        # All work on the same tensor, so that none finds its input warmer than another does.
        scores = original.clone()
        remarks, peaks = {}, {}
        for contender in contenders:
            scores.copy_(original)
            problem = problem_of(contender, scores, original, expected, workload.rounds)
            if problem is not None:
                remarks[contender.name] = problem
            elif not contender.yardstick:
                peaks[contender.name] = peak_bytes(contender.bind(scores), case.device)
        inputs = [scores, *(original.clone() for _ in range(rotating_inputs(case) - 1))]
        roof_us = workload.moves(case) / self.bandwidths[case.device] * 1e6
        for metric in workload.metrics(case):
            bunches: dict[str, Bunch] = {}
            uncaptured = {}
            for contender in contenders:
                if contender.name in remarks:
                    continue
                if metric != "gpu_us":
                    bunches[contender.name] = WallBunch(contender.bind(scores), case.device)
                    continue
                try:
                    replays = ReplayBunch([contender.bind(each) for each in inputs])
                except NotCapturableError:
                    uncaptured[contender.name] = "no graph"
                    continue
                scores.copy_(original)
                found = replays.once()
                if contender.yardstick or _is_right(contender, original, found, expected, workload.rounds):
                    bunches[contender.name] = replays
                else:
                    remarks[contender.name] = "differs from plain torch as a replayed graph"
            timings = interleaved(bunches, self.budget_s[metric])
            for contender in contenders:
                remark = remarks.get(contender.name) or uncaptured.get(contender.name)
                timing, peak = timings.get(contender.name), peaks.get(contender.name)
                roof = None if contender.yardstick else roof_us
                kind = (name, case, contender.name, contender.in_place, metric)
                self.results.add(Result(*kind, timing, _remark(remark), peak, roof))
            for peer in self.peers:
                reason = peer.missing() if peer.takes(name, case) else None
                if reason is not None:
                    self.results.add(Result(name, case, peer.name, False, metric, None, reason))
        place = f"{name}, {case.device}, {case.size}, {case.set_name}, {case.kind}"
        for contender in contenders:
            if contender.name in remarks:
                problems = self.wrong if contender.name in OURS else self.failed
                problems.append(f"{place}: {contender.name} {remarks[contender.name]}")
        return self.results.all[before:]

    def _contenders(self, name: str, workload: Workload, case: Case) -> list[Contender]:
        contenders = workload.contenders(case)
        if case.cold:
            contenders = [contender for contender in contenders if not contender.in_place]
        if self.only_ours:
            return [contender for contender in contenders if contender.yardstick or contender.name in OURS]
        present = [peer for peer in self.peers if peer.takes(name, case) and peer.missing() is None]
        return contenders + [contender for peer in present for contender in peer.contenders(name, case)]


def _remark(problem: str | None) -> str:
    """A problem in a word for tables, its first line behind it."""
    if problem is None or problem == "no graph":
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
    except Exception as error:  # whatever a contender breaks with, the others are still to be measured
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
    """Whether a result is the expected one: in every bit, or, where it ``rounds``, but for what rounding explains.

    That is a unit or two in the last places, and a token in a hundred thousand that a threshold keeps or drops.
    """
    if contender.agrees is not None:
        return contender.agrees(scores, found, expected)
    if not rounds or found.shape != expected.shape or found.dtype != expected.dtype:
        return _same(found, expected)
    wrong = ~torch.isclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    return int(wrong.sum()) <= found.numel() // 100_000
