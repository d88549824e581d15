"""FlashInfer's sampling kernels: probabilities where ours are logits, and tokens of its own noise."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.inputs import Case
from benchmarks.peers.peer import Peer
from benchmarks.timing import Call
from benchmarks.workloads import DRAWS, Contender, drawn_from

_MASKED = {"T k p": (50, 0.9), "T p": (None, 0.9), "T large k": (2000, None)}


def _sampling() -> Any:
    import flashinfer.sampling

    return flashinfer.sampling


def _as_probabilities(scores: torch.Tensor, found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether probabilities are those of the expected logits, but for a token in a hundred thousand at an edge."""
    wrong = (found - expected.softmax(-1)).abs() > 1e-4
    kept = (found > 0) != (expected > float("-inf"))
    # Far in the tail a probability may round to nothing.
    kept &= expected.softmax(-1) > 1e-30
    return int((wrong | kept).sum()) <= found.numel() // 100_000


def _contenders(name: str, case: Case) -> list[Contender]:
    sampling = _sampling()
    if name in DRAWS:
        options = DRAWS[name]

        def bind_draw(scores: torch.Tensor) -> Call:
            temperature = torch.full((case.batch,), options["temperature"], device=case.device)

            def draw() -> torch.Tensor:
                if "top_k" in options:
                    heated = scores / temperature.unsqueeze(1)
                    k, p = int(options["top_k"]), options["top_p"]
                    return sampling.top_k_top_p_sampling_from_logits(heated, k, p)  # type: ignore[no-any-return]
                probabilities = sampling.softmax(scores.float(), temperature)
                if "top_p" in options:
                    return sampling.top_p_sampling_from_probs(probabilities, options["top_p"])  # type: ignore[no-any-return]
                return sampling.sampling_from_probs(probabilities)  # type: ignore[no-any-return]

            return draw

        return [Contender("FlashInfer", bind_draw, agrees=drawn_from(name))]
    top_k, top_p = _MASKED[name]

    def bind(scores: torch.Tensor) -> Call:
        temperature = torch.full((case.batch,), 0.7, device=case.device)

        def call() -> torch.Tensor:
            found: Any = scores
            if top_k is not None:
                found = sampling.top_k_mask_logits(scores / 0.7, top_k)
                if top_p is None:
                    return found  # type: ignore[no-any-return]
                return sampling.top_p_renorm_probs(sampling.softmax(found), top_p)  # type: ignore[no-any-return]
            return sampling.top_p_renorm_probs(sampling.softmax(found, temperature), top_p)  # type: ignore[no-any-return]

        return call

    if top_p is None:
        return [Contender("FlashInfer", bind)]
    return [Contender("FlashInfer, probabilities", bind, agrees=_as_probabilities)]


FLASHINFER = Peer("FlashInfer", "flashinfer.sampling", (*_MASKED, *DRAWS), _contenders)
