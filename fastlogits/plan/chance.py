"""The random numbers of processors that ask for some: by seeds where a sampler calls them, else a generator's.

Processors that fastlogits doesn't know may take torch's own without asking; of these only ``noted`` and ``again`` know.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from fastlogits_kernels.draw import exponential_noise

_NO_TOKEN = 2**31 - 1
"""No vocabulary is so large: the noise of this id, and of those below it, belongs to no token."""
_BELOW_ONE = 1 - 2.0**-24


class _Source(Protocol):
    """Where the next numbers come from."""

    def __call__(self, rows: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor: ...


class _Current(threading.local):
    """The source of this thread; None for the generators themselves."""

    source: _Source | None = None


_current = _Current()


def numbers(rows: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """A random number for each row, float32 ``[rows, 1]``, from 0 to less than 1.

    Args:
        rows: how many.
        device: where the scores are.
        generator: whose numbers they are where nobody says anything else; None for torch's own.
    """
    source = _current.source or _of_generator
    return source(rows, device, generator)


def _of_generator(rows: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    return torch.rand(rows, 1, device=device, generator=generator)


@contextmanager
def _from(source: _Source) -> Iterator[None]:
    before, _current.source = _current.source, source
    try:
        yield
    finally:
        _current.source = before


@contextmanager
def by_seeds(seeds: torch.Tensor, positions: torch.Tensor) -> Iterator[None]:
    """Let each row's numbers depend on its seed and position alone, as the token that a sampler draws.

    They come from that token's noise, at ids that no vocabulary has; each that asks gets numbers of its own.
    """
    taken = 0

    def source(rows: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
        nonlocal taken
        token = torch.full((rows,), _NO_TOKEN - taken, dtype=torch.int64, device=device)
        taken += 1
        noise = exponential_noise(seeds.expand(rows), positions.expand(rows), token).unsqueeze(1)
        return (-torch.expm1(-noise)).clamp(max=_BELOW_ONE)

    with _from(source):
        yield


class Noted(NamedTuple):
    """What was drawn, for ``again``."""

    numbers: list[torch.Tensor]
    """What was asked for, in its order."""
    state: torch.Tensor
    """Where torch's own generator of the CPU stood before."""
    states: dict[int, torch.Tensor]
    """The same of the GPU, by its index; nothing where there is none."""


@contextmanager
def noted(device: torch.device) -> Iterator[Noted]:
    """Note what is drawn, with torch's own generators of the CPU and of a device too."""
    states = {device.index: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    found = Noted([], torch.get_rng_state(), states)
    source = _current.source or _of_generator

    def noting(rows: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
        found.numbers.append(source(rows, device, generator))
        return found.numbers[-1]

    with _from(noting):
        yield found


@contextmanager
def again(noted: Noted) -> Iterator[None]:
    """Draw the same once more; what others draw later doesn't change by that."""
    waiting = iter(noted.numbers)
    with torch.random.fork_rng(list(noted.states)):
        torch.set_rng_state(noted.state)
        for index, state in noted.states.items():
            torch.cuda.set_rng_state(state, index)
        with _from(lambda rows, device, generator: next(waiting)):
            yield
