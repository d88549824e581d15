"""What was made for the keys used last, in a dictionary of bounded size; and what captured graphs go on reading."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import TypeVar

import torch

_Key = TypeVar("_Key")
_Made = TypeVar("_Made")

MOST = 32
"""How many are kept where nothing else is said: more than a caller has batch sizes or vocabularies at work."""

# One for all dictionaries: held for a look and a store, never while something is made.
_lock = Lock()


def recent(kept: dict[_Key, _Made], key: _Key, make: Callable[[], _Made], most: int = MOST) -> _Made:
    """What is kept for a key, or is made now; the one that was asked for longest ago makes room for it.

    The dictionary is the caller's, and may be read without asking. Threads that make the same at once get one of them.
    """
    with _lock:
        made = kept.pop(key, None)
        if made is not None:
            kept[key] = made
            return made
    new = make()
    with _lock:
        made = kept.pop(key, None)
        kept[key] = new if made is None else made
        while len(kept) > most:
            del kept[next(iter(kept))]
        return kept[key]


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device goes into a CUDA graph; a compiler that traces captures nothing yet."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def hold(held: list[_Made], made: _Made) -> None:
    """Keep something for as long as the list lives, since a captured graph goes on reading it."""
    with _lock:
        if not any(made is each for each in held):
            held.append(made)
