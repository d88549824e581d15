"""Kernels compiled before the first call: the call is rehearsed, and what it would launch is compiled at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from fastlogits_kernels.runtime.backend import absence, unsupported
from fastlogits_kernels.runtime.launcher import Launch, Launcher, collected, prepare
from fastlogits_kernels.runtime.recent import is_capturing

from fastlogits.checks import LOGITS_DTYPES, device_of, whole_number
from fastlogits.plan.barrier import Barrier
from fastlogits.plan.observation import Observation
from fastlogits.plan.part import AnyPlan
from fastlogits.plan.rows import RowsPart
from fastlogits.plan.stages import When

_PROMPT = 1
"""Tokens of the prompt of a rehearsed call."""
_FARTHEST = 2**30
"""No sequence has positions beyond it."""


@dataclass(frozen=True, repr=False)
class WarmUp:
    """The result of a warm-up.

    Args:
        device: where the kernels are.
        seconds: how long it took. Kernels that are in the cache on disk are only loaded.
        kernels: the names of the kernels that were compiled or loaded from the cache, one for each variant. Kernels
            that the process had already are left out.
        needed: how many variants the calls launch.
        skipped: what else the calls run, and why it was not rehearsed.
        failed: why kernels couldn't be compiled. Calls fall back to torch for them, with a warning.
        reason: why there was nothing to do; empty otherwise.

    Example:
        >>> from fastlogits import LogitsProcessorList, TopKLogitsWarper
        >>> LogitsProcessorList([TopKLogitsWarper(50)]).warm_up(1000, device="cpu")
        <WarmUp: nothing to compile on cpu: the kernels are for GPUs, and torch runs here>
    """

    device: torch.device
    seconds: float = 0.0
    kernels: tuple[str, ...] = ()
    needed: int = 0
    skipped: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"nothing to compile on {self.device}: {self.reason}"
        counts = Counter(self.kernels)
        names = ", ".join(name if n == 1 else f"{name} ({n})" for name, n in sorted(counts.items()))
        if not self.needed:
            said = f"nothing to compile on {self.device}: the calls launch no kernel of fastlogits"
        elif not self.kernels and not self.failed:
            said = f"nothing to compile on {self.device}: the process has all {self.needed} already"
        else:
            of = "" if len(self.kernels) == self.needed else f" of {self.needed}"
            said = (
                f"{len(self.kernels)}{of} kernels made ready on {self.device} in {self.seconds:.1f} s: {names or '-'}"
            )
        rest = [*(f"not rehearsed: {each}" for each in self.skipped), *(f"FAILED: {each}" for each in self.failed)]
        return "; ".join([said, *rest])

    def __repr__(self) -> str:
        return f"<WarmUp: {self}>"


def warmed(device: torch.device, rehearse: Callable[[], None], skipped: Iterable[str] = ()) -> WarmUp:
    """Rehearse calls: collect their launches instead of making them, and compile them all at once.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if is_capturing(device):
        raise RuntimeError(
            "warm_up() must be called before a CUDA graph is captured: compiling would break the capture"
        )
    reason = no_kernels(device)
    if reason is not None:
        return WarmUp(device, reason=reason)
    start = time.perf_counter()
    launches = rehearsed(rehearse)
    outcomes = prepare(launches)
    return WarmUp(
        device,
        time.perf_counter() - start,
        tuple(sorted(_name(launch.launcher) for launch, error in outcomes if error is None)),
        len({(id(each.launcher), each.key) for each in launches}),
        tuple(skipped),
        tuple(str(error) for _, error in outcomes if error is not None),
    )


def rehearsed(rehearse: Callable[[], None]) -> list[Launch]:
    """The launches of some calls; none is made."""
    with collected() as launches, torch.no_grad():
        rehearse()
    return launches


def no_kernels(device: torch.device) -> str | None:
    """Why nothing is compiled for a device; None if kernels are."""
    if device.type != "cuda":
        return "the kernels are for GPUs, and torch runs here"
    return absence() or unsupported(device)


def _name(launcher: Launcher) -> str:
    return launcher.name.strip("_").removesuffix("_kernel")


# -- Arguments of rehearsed calls -------------------------------------------------------------------------


def checked_device(device: torch.device | str | None) -> torch.device:
    """A device as torch has it; None for the current GPU where there is one, else the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return device_of("device", device)


def checked_dtype(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, if kernels take logits of it."""
    if dtype not in LOGITS_DTYPES:
        raise ValueError(
            f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {dtype!r}: give that of the logits"
        )
    return dtype


def dummy_logits(
    rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device, row_stride: int | None
) -> torch.Tensor:
    """Logits ``[rows, V]``, uninitialised, with this row stride."""
    checked_dtype(dtype)
    vocab_size = whole_number("vocab_size", vocab_size, 1)
    if row_stride is None:
        row_stride = vocab_size
    elif whole_number("row_stride", row_stride) < vocab_size:
        raise ValueError(
            f"row_stride must be at least {vocab_size}, the size of the vocabulary, got {row_stride}: it is "
            "logits.stride(0), or None for logits that are contiguous"
        )
    return torch.empty(rows, row_stride, dtype=dtype, device=device)[:, :vocab_size]


def dummy_ids(input_ids: torch.Tensor | None, rows: int, device: torch.device) -> torch.Tensor:
    """The given tokens so far, or a prompt of one token."""
    if input_ids is None:
        return torch.zeros(rows, _PROMPT, dtype=torch.int64, device=device)
    if (
        not isinstance(input_ids, torch.Tensor)
        or input_ids.ndim != 2
        or input_ids.dtype not in (torch.int32, torch.int64)
        or input_ids.device != device
    ):
        found = (
            f"{input_ids.dtype} of {tuple(input_ids.shape)} on {input_ids.device}"
            if isinstance(input_ids, torch.Tensor)
            else repr(input_ids)
        )
        raise ValueError(
            f"input_ids must be int32 or int64 of shape (B, L) on {device}, as a call has them, or None for int64, got "
            f"{found}"
        )
    return input_ids


def host_positions(plan: AnyPlan | None) -> list[tuple[int, int]]:
    """``cache_position`` and ``prompt_length`` of calls that together open and close all gates of a plan."""
    found = {0}
    for when in () if plan is None else _gates(plan):
        for index in (when.start, when.stop, when.phase):
            if index is not None:
                # A prompt of one token: step s is that of position s, and length n that of n - 1.
                at = index if when.of == "step" else index - 1
                found |= {at - 1, at, at + 1}
    return [(at, _PROMPT) for at in sorted(found) if 0 <= at <= _FARTHEST]


def _gates(plan: AnyPlan) -> Iterator[When]:
    for part in plan.parts:
        if isinstance(part, Barrier) and part.inner is not None:
            yield from _gates(part.inner)
        for member in part.members:
            when = getattr(member.stage, "when", None)
            if isinstance(when, When):
                yield when


def not_rehearsed(plan: AnyPlan | None) -> list[str]:
    """The parts of a plan that run without our kernels, each in a few words."""
    found = []
    for part in () if plan is None else plan.parts:
        if isinstance(part, Barrier) and part.inner is not None:
            found += not_rehearsed(part.inner)
        elif isinstance(part, Barrier):
            found.append(f"{part.members[0].name}, which fastlogits doesn't know")
        elif isinstance(part, Observation) or (isinstance(part, RowsPart) and not part.launches):
            found.append(f"{part.members[0].name}, which is some operations of torch")
    return found


def checked_choices(argument: str, value: object, choices: Sequence[str]) -> tuple[str, ...]:
    """One or several of the choices.

    Raises:
        ValueError: something else is among them.
    """
    asked = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else None
    if asked is None or any(each not in choices for each in asked):
        raise ValueError(f"{argument} must be one or several of {', '.join(map(repr, choices))}, got {value!r}")
    return asked
