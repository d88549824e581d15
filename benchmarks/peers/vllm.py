"""vLLM's Triton kernel for top-k and top-p, which works in place on float32; the division before it makes the copy."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.inputs import Case
from benchmarks.peers.peer import Peer
from benchmarks.timing import Call
from benchmarks.workloads import Contender

_MODULE = "vllm.v1.sample.ops.topk_topp_triton"
_RULES = {"T k p": (50, 0.9), "T p": (None, 0.9), "T large k": (2000, None)}


def _contenders(name: str, case: Case) -> list[Contender]:
    from importlib import import_module

    apply: Any = import_module(_MODULE).apply_top_k_top_p_triton
    top_k, top_p = _RULES[name]

    def bind(scores: torch.Tensor) -> Call:
        made: dict[str, Any] = {"device": case.device}
        k = None if top_k is None else torch.full((case.batch,), top_k, dtype=torch.int32, **made)
        p = None if top_p is None else torch.full((case.batch,), top_p, **made)
        return lambda: apply(scores / 0.7, k, p)

    return [Contender("vLLM Triton", bind)]


VLLM = Peer("vLLM", _MODULE, tuple(_RULES), _contenders)
