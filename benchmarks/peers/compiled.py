"""transformers' processors under ``torch.compile``; compiling takes longer than all else, so only where asked for."""

from __future__ import annotations

import torch
import transformers.generation.logits_process as theirs

from benchmarks.inputs import Case, history
from benchmarks.peers.peer import Peer
from benchmarks.processors import CHAINS, TRUNCATIONS
from benchmarks.timing import Call
from benchmarks.workloads import Contender


def _contenders(name: str, case: Case) -> list[Contender]:
    made = {**CHAINS, **TRUNCATIONS}[name]

    def bind(scores: torch.Tensor) -> Call:
        ids = history(case.batch, case.vocab, case.device)
        processors = made(theirs, ids, case.vocab)

        def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            for processor in processors:
                scores = processor(ids, scores)
            return scores

        compiled = torch.compile(process, dynamic=False)
        return lambda: compiled(ids, scores)

    return [Contender("transformers, compiled", bind)]


COMPILED = Peer(
    "compiled", "torch", (*CHAINS, *TRUNCATIONS), _contenders, devices=("cpu", "cuda"), by_default=False
)  # fmt: skip
