"""xgrammar's bitmask kernels."""

from __future__ import annotations

import torch

from benchmarks.inputs import Case
from benchmarks.peers.peer import Peer
from benchmarks.timing import Call
from benchmarks.workloads import BITMASK, Contender, grammar


def _contenders(name: str, case: Case) -> list[Contender]:
    import xgrammar

    bitmask = grammar(case)

    def bind(scores: torch.Tensor) -> Call:
        def call() -> torch.Tensor:
            xgrammar.apply_token_bitmask_inplace(scores, bitmask)
            return scores

        return call

    return [Contender("xgrammar", bind, in_place=True)]


XGRAMMAR = Peer("xgrammar", "xgrammar", (BITMASK,), _contenders, devices=("cpu", "cuda"))
