"""What many write by hand where k is small: ``torch.topk``, top-p among these, and a scatter or a draw."""

from __future__ import annotations

import math

import torch

from benchmarks.inputs import Case
from benchmarks.peers.peer import Peer
from benchmarks.timing import Call
from benchmarks.workloads import Contender, drawn_from

_TEMPERATURE = 0.7
_RULES: dict[str, tuple[int, float | None]] = {"T k p": (50, 0.9), "T large k": (2000, None), "draw T k p": (50, 0.9)}
_DRAWS = "draw "


def _contenders(name: str, case: Case) -> list[Contender]:
    k, p = _RULES[name]
    if k > case.vocab:
        return []  # torch.topk refuses it

    def kept(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k likeliest, those that top-p drops at -inf, and their ids."""
        values, ids = (scores.float() / _TEMPERATURE).topk(k)
        if p is not None:
            probabilities = values.softmax(-1)
            before = probabilities.cumsum(-1) - probabilities
            values = values.masked_fill(before >= p, -math.inf)
        return values, ids

    def bind(scores: torch.Tensor) -> Call:
        def call() -> torch.Tensor:
            values, ids = kept(scores)
            return torch.full_like(scores, -math.inf).scatter_(1, ids, values.to(scores.dtype))

        return call

    def bind_draw(scores: torch.Tensor) -> Call:
        def draw() -> torch.Tensor:
            values, ids = kept(scores)
            return ids.gather(1, values.softmax(-1).multinomial(1)).squeeze(1)

        return draw

    if name.startswith(_DRAWS):
        return [Contender(HANDWRITTEN.name, bind_draw, agrees=drawn_from(name))]
    return [Contender(HANDWRITTEN.name, bind)]


HANDWRITTEN = Peer("torch.topk by hand", "torch", tuple(_RULES), _contenders, devices=("cpu", "cuda"))
