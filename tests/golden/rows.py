"""Rows whose kept sets and tokens must never change: not between versions, GPUs, back ends or batches.

    python -m tests.golden.rows            # compare with what is kept, and print what differs
    python -m tests.golden.rows --write    # keep what comes out now: only where the definition has changed on purpose

The logits are made of integers by splitmix64 and of sums of few bits, so they are the same in every numpy. What is kept
of a row is the SHA-256 of its packed bits; tokens are as they are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fastlogits as fl

TABLE = Path(__file__).with_name("rows.json")
ROWS = 8
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


class Case(NamedTuple):
    """Some rows, and what is done to them."""

    seed: int
    vocab: int
    kind: str
    dtype: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        options = ", ".join(f"{name} {value}" for name, value in self.options.items())
        return f"{self.kind} {self.dtype} of {self.vocab}: {options}"


_OPTIONS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 1.0, "typical_p": 0.8},
    {"temperature": 0.9, "top_k": 3},
    {"temperature": 0.9, "top_k": 700, "ties": "lowest"},
    {"temperature": 1.0, "epsilon": 3e-4, "eta": 3e-4},
    {"temperature": 1.0, "top_n_sigma": 1.0, "top_a": 0.2},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "order": "vllm"},
    {"temperature": 0.0},
)


def cases() -> list[Case]:
    """All of them."""
    shapes = (
        (997, "bell", "float32"),
        (32000, "steep", "float32"),
        (4096, "bell", "bfloat16"),
        (1024, "tied", "float32"),
    )
    return [
        Case(100 * i + j, vocab, kind, dtype, options)
        for i, (vocab, kind, dtype) in enumerate(shapes)
        for j, options in enumerate(_OPTIONS)
    ]


def _bits(seed: int, count: int) -> np.ndarray[Any, Any]:
    """64 random bits for each of many numbers: splitmix64."""
    with np.errstate(over="ignore"):
        z = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(1 << 20)) * _GOLDEN_RATIO
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def logits_of(case: Case) -> torch.Tensor:
    """The logits ``[ROWS, V]``: exact multiples of small powers of two."""
    bits = _bits(case.seed, ROWS * case.vocab)
    sums = sum(((bits >> np.uint64(16 * part)) & np.uint64(0xFFF)).astype(np.int64) for part in range(4))
    scores = (sums - 2 * 0xFFF).astype(np.float32) / 1024  # bell-shaped, about -8 to 8
    if case.kind == "steep":
        scores = scores * np.abs(scores)
    elif case.kind == "tied":
        scores = np.round(scores)
    rows = torch.from_numpy(scores.reshape(ROWS, case.vocab))
    return rows.to(getattr(torch, case.dtype))


def outcome(case: Case, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What is drawn of each row, and what each keeps."""
    logits = logits_of(case).to(device)
    seeds = torch.arange(ROWS, device=device) * 7919 + case.seed
    positions = torch.arange(ROWS, device=device) * 3
    tokens = fl.sample(logits, seeds=seeds, positions=positions, **case.options).tokens.tolist()
    found = {"case": case.name, "tokens": tokens}
    if case.options["temperature"]:
        found["kept"] = [_digest(row) for row in kept_of(logits, case)]
    return found


def kept_of(logits: torch.Tensor, case: Case) -> torch.Tensor:
    """Which tokens the rules keep, bool ``[ROWS, V]``: the support of the processed distribution."""
    params = fl.SamplingParams(**case.options)
    from fastlogits_kernels.truncate.dispatch import truncate

    scaled = logits.float() / case.options["temperature"]
    return truncate(scaled, params.rules).isfinite() if params.rules else torch.ones_like(logits, dtype=torch.bool)


def _digest(kept: torch.Tensor) -> str:
    return hashlib.sha256(np.packbits(kept.cpu().numpy()).tobytes()).hexdigest()[:16]


def main() -> int:
    """Compare or write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    found = [outcome(case, asked.device) for case in cases()]
    if asked.write:
        TABLE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    kept = json.loads(TABLE.read_text())
    wrong = [now["case"] for now, before in zip(found, kept, strict=True) if now != before]
    print("\n".join(wrong) or f"all {len(found) * ROWS} rows as they were")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
