"""The inputs of the workloads: sizes, logits of several kinds, histories, token sets."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

HISTORY = 1024
"""Tokens of the history."""
MANY_IDS = 10_000
"""Sets of this many ids or more are measured in place only, without the loop, which launches a kernel for each."""

GAUSS, ZIPF, MIXTURE, FLAT = "gauss", "zipf", "mixture", "flat"


@dataclass(frozen=True)
class Case:
    """One size on one device, with one kind of logits.

    Args:
        device: where the logits are.
        batch: their rows.
        vocab: their columns.
        ids: tokens to forbid; 0 for workloads of no set of ids.
        logits: their kind, a name of ``LOGITS``.
        dtype: their dtype.
        cold: whether the calls take turns on inputs that together outgrow the L2.
    """

    device: torch.device
    batch: int
    vocab: int
    ids: int = 0
    logits: str = GAUSS
    dtype: torch.dtype = torch.float32
    cold: bool = False

    @property
    def is_half(self) -> bool:
        """Whether half the vocabulary is forbidden, a number of ids that differs by vocabulary."""
        return self.ids >= MANY_IDS and self.ids == self.vocab // 2

    @property
    def set_name(self) -> str:
        """The set of tokens, for people."""
        if not self.ids:
            return f"history {HISTORY}"
        return "half the vocabulary" if self.is_half else f"{self.ids} ids"

    @property
    def kind(self) -> str:
        """The logits and caches, for people."""
        return f"{self.logits} {self.dtype_name}, {'cold' if self.cold else 'warm'}"

    @property
    def dtype_name(self) -> str:
        """The dtype without its module."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def size(self) -> str:
        """The shape of the logits, for people."""
        return f"{self.batch} x {self.vocab}"

    @property
    def nbytes(self) -> int:
        """Bytes of the logits."""
        return self.batch * self.vocab * self.dtype.itemsize

    @property
    def warm(self) -> Case:
        """The same on one input."""
        return replace(self, cold=False)


def _gauss(B: int, V: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(B, V, generator=generator, device=generator.device) * 3


def _flat(B: int, V: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(B, V, generator=generator, device=generator.device)


def _ranked(B: int, V: int, generator: torch.Generator, exponent: float) -> torch.Tensor:
    ranks = torch.rand(B, V, generator=generator, device=generator.device).argsort(-1)
    return (ranks + 1.0).log_().mul_(-exponent)


def _mixture(B: int, V: int, generator: torch.Generator) -> torch.Tensor:
    logits = _ranked(B, V, generator, 3.0)
    logits[3::4] = _flat(len(logits[3::4]), V, generator)
    return logits


LOGITS: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    GAUSS: _gauss,
    ZIPF: lambda B, V, generator: _ranked(B, V, generator, 1.5),
    MIXTURE: _mixture,
    FLAT: _flat,
}
"""Kinds of logits; ``MEANINGS`` says what they are."""
MEANINGS = {
    GAUSS: "normal with deviation 3",
    ZIPF: "-1.5 ln(rank), as a model's logits fall",
    MIXTURE: "three rows of -3 ln(rank), nearly all of their mass in a few tokens, to each flat row",
    FLAT: "normal with deviation 1, where no token stands out",
}
LEAST_BATCH = {MIXTURE: 4}
"""Rows that a kind of logits needs to be one."""


def random_scores(case: Case) -> torch.Tensor:
    """Logits ``[batch, vocab]`` of the case's kind and dtype, made on its device, the same ones each time."""
    generator = torch.Generator(case.device).manual_seed(case.batch * case.vocab)
    return LOGITS[case.logits](case.batch, case.vocab, generator).to(case.dtype)


def token_ids(case: Case) -> torch.Tensor:
    """The tokens to forbid, distinct, int64 ``[ids]``: a few are neighbours, as digits are; many are anywhere."""
    if case.ids <= 10:
        return torch.arange(case.ids) + min(15, case.vocab - case.ids)
    return torch.randperm(case.vocab, generator=torch.Generator().manual_seed(case.ids))[: case.ids]


def history(batch: int, vocab: int, device: torch.device) -> torch.Tensor:
    """Random tokens int64 ``[B, L]``, most of them more than once in a row."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, min(vocab, 500), (batch, HISTORY), generator=generator).to(device)


def rotating_inputs(case: Case) -> int:
    """How many inputs of a case are twice as large as the GPU's L2; one if it may be warm."""
    if not case.cold:
        return 1
    l2_bytes = torch.cuda.get_device_properties(case.device).L2_cache_size
    return 2 + 2 * l2_bytes // case.nbytes


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models or [platform.processor() or platform.machine()])[0]


def at_least_1(message: str, text: str) -> int:
    """The integer of an argument; an error that begins with ``message`` where it is none, or 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{message}, got {text!r}")
    return int(text)


def size_of(text: str) -> tuple[int, int]:
    """Rows and vocabulary of an argument such as 64x128256."""
    batch, _, vocab = text.partition("x")
    message = "must be such as 64x128256"
    return at_least_1(message, batch), at_least_1(message, vocab)
