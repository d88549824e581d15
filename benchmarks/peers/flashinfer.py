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
    """Whether each row's probabilities are those of the expected logits, but for a ten-thousandth of its mass.

    Where no token stands out, sums in another order move a threshold past several tokens, of next to no mass.
    """
    return found.shape == expected.shape and bool(((found - expected.softmax(-1)).abs().sum(-1) <= 1e-4).all())


def _contenders(name: str, case: Case) -> list[Contender]:
    sampling = _sampling()
    if name in DRAWS:
        options: Any = DRAWS[name]

        def bind_draw(scores: torch.Tensor) -> Call:
            temperature = torch.full((case.batch,), options["temperature"], device=case.device)
            seeds = torch.arange(case.batch, device=case.device)
            # Without these it takes them from torch's generator on the host, which no graph can hold.
            noise = {"seed": seeds, "offset": seeds}

            def draw() -> torch.Tensor:
                if "top_k" not in options and "top_p" in options:
                    probabilities = sampling.softmax(scores, temperature)
                    return sampling.top_p_sampling_from_probs(probabilities, options["top_p"], **noise)  # type: ignore[no-any-return]
                scaled = scores / temperature.unsqueeze(1)
                if "top_k" in options:
                    # A number, not a tensor: only then does it draw from the top k alone.
                    k, p = int(options["top_k"]), options["top_p"]
                    return sampling.top_k_top_p_sampling_from_logits(scaled, k, p, **noise)  # type: ignore[no-any-return]
                return sampling.sampling_from_logits(scaled, **noise)  # type: ignore[no-any-return]

            return draw

        return [Contender("FlashInfer", bind_draw, agrees=drawn_from(name))]
    top_k, top_p = _MASKED[name]
    if top_p is None:
        return [Contender("FlashInfer", lambda scores: lambda: sampling.top_k_mask_logits(scores / 0.7, top_k))]

    def bind(scores: torch.Tensor) -> Call:
        temperature = torch.full((case.batch,), 0.7, device=case.device)

        def call() -> torch.Tensor:
            found: Any = sampling.softmax(scores, temperature)
            if top_k is not None:
                found = sampling.top_k_renorm_probs(found, top_k)
            return sampling.top_p_renorm_probs(found, top_p)  # type: ignore[no-any-return]

        return call

    return [Contender("FlashInfer, probabilities", bind, agrees=_as_probabilities)]


FLASHINFER = Peer("FlashInfer", "flashinfer.sampling", (*_MASKED, *DRAWS), _contenders)
