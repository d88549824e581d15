"""Whether an operation runs its kernels or its torch path: the one place where that is decided, and said once.

``FASTLOGITS_BACKEND``, read when the kernels are first imported, is ``auto`` for the kernels wherever they can run,
``triton`` for the kernels or an error, ``torch`` for the torch paths alone. Where ``TRITON_INTERPRET`` is set, Triton's
interpreter runs kernels on the CPU too, for who asks for ``triton``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_ALLOWED = ("auto", "torch", "triton")
# What Triton says that it supports, and what the kernels are compiled for in the tests.
_OLDEST = (8, 0)
SWITCH_OFF = "set the environment variable FASTLOGITS_BACKEND=torch to run without the kernels"


def _chosen() -> str:
    """What the environment asks for.

    Raises:
        ValueError: something else than the allowed.
    """
    backend = os.environ.get("FASTLOGITS_BACKEND", "auto")
    if backend not in _ALLOWED:
        raise ValueError(f"FASTLOGITS_BACKEND must be one of {', '.join(_ALLOWED)}, got {backend!r}")
    return backend


BACKEND = _chosen()
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_absence: str | None = None


def do_without(reason: str) -> None:
    """Let all operations take their torch paths; ``reason`` is for people."""
    global _absence
    _absence = reason


def absence() -> str | None:
    """Why no operation has kernels in this process, if none has."""
    return _absence


def has_gradient(tensor: torch.Tensor) -> bool:
    """Whether torch records what becomes of a tensor: no kernel has a derivative, and all torch paths have one."""
    return tensor.requires_grad and torch.is_grad_enabled()


class KernelError(RuntimeError):
    """A kernel failed. The message says how to do without the kernels."""


class CompileError(KernelError):
    """A kernel can't be had on a device; nothing was launched and nothing written."""

    def __init__(self, device: torch.device, message: str) -> None:
        super().__init__(message)
        self.device = device


def wanted_on(device: torch.device) -> bool:
    """Whether somebody asks for the kernels on a device that is no GPU, and gets them from Triton's interpreter.

    Raises:
        KernelError: it is asked for, and there is no interpreter.
    """
    if BACKEND != "triton":
        return False
    if not INTERPRETED:
        raise KernelError(
            f"FASTLOGITS_BACKEND must be auto or torch for tensors on {device}, got 'triton': the kernels need a GPU. "
            "Move the tensors to one, set the variable to auto, or set TRITON_INTERPRET=1 for Triton's interpreter"
        )
    return True


class Operation:
    """Where one operation runs: its kernels, until one of them can't be had on a device, then torch on that device.

    Args:
        name: of the operation, for people.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost: dict[torch.device, str] = {}
        """Devices whose kernels can't be had, and why."""
        _operations.append(self)

    def takes(self, tensor: torch.Tensor, forced: bool = False) -> bool:
        """Whether the kernels take a tensor; ``forced`` for tensors that aren't on a GPU too."""
        if not (tensor.is_cuda or forced or wanted_on(tensor.device)):
            return False
        return (_absence is None and not self.lost) or self._still(tensor.device)

    def _still(self, device: torch.device) -> bool:
        """The same where kernels are missing; who asked for that is not warned of it."""
        if _absence is None:
            return device not in self.lost
        if BACKEND == "auto":
            _warn_once(_absence)
        return False

    def falls_back(self, run: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        """A function that asks ``takes`` first, and is called again when a kernel of it can't be had."""

        @wraps(run)
        def dispatch(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
            try:
                return run(*arguments, **options)
            except CompileError as error:
                if not self._gives_up(error):
                    raise
            return run(*arguments, **options)

        return dispatch

    def _gives_up(self, error: CompileError) -> bool:
        device = error.device
        # A graph that is being captured would keep the torch path for good, and waits that torch needs break it.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if BACKEND == "triton" or capturing or device in self.lost:
            return False
        self.lost[device] = str(error)
        _warn_once(f"{self.name}: {error}")
        return True


_operations: list[Operation] = []


def lost_on(device: torch.device) -> dict[str, str]:
    """The operations that have lost their kernels on a device, and why."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return {each.name: each.lost[device] for each in _operations if device in each.lost}


_warned = False


def _warn_once(message: str) -> None:
    """Warn, once in a process: what follows from one cause would only repeat it."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fastlogits falls back to torch, slower but with the same results: {message}. "
            "`python -m fastlogits doctor` says more",
            RuntimeWarning,
            stacklevel=4,
        )


@cache
def unsupported(device: torch.device) -> str | None:
    """Why the kernels can't run on a GPU, if they can't."""
    if device.type != "cuda" or torch.version.hip is not None or BACKEND == "triton":
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST:
        return None
    name, needed = torch.cuda.get_device_name(device), ".".join(map(str, _OLDEST))
    return (
        f"{name} has compute capability {capability[0]}.{capability[1]}, and Triton needs {needed}; "
        "FASTLOGITS_BACKEND=triton tries all the same, FASTLOGITS_BACKEND=torch ends this message"
    )
