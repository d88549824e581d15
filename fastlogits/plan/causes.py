"""Why a call has failed, in the words of its arguments: looked for once it has, so that other calls pay nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from fastlogits.parallel.dtensor import is_split
from fastlogits.plan.stages import Member


def of_scores(scores: object) -> str | None:
    """What is wrong with scores, if anything is."""
    if not isinstance(scores, torch.Tensor):
        hint = ": torch.from_numpy makes one of it" if type(scores).__module__ == "numpy" else ""
        return f"scores must be a floating-point tensor of shape (B, V), got {kind(scores)}{hint}"
    if not scores.is_floating_point():
        return f"scores must be floating-point of shape (B, V), got {kind(scores)}"
    return None


def of_ids(input_ids: object, members: Iterable[Member]) -> str | None:
    """What is wrong with the tokens so far, if anything is."""
    if isinstance(input_ids, torch.Tensor):
        if input_ids.is_floating_point() or input_ids.is_complex():
            return f"input_ids must be int32 or int64 of shape (B, L), got {kind(input_ids)}"
        return None
    reader = next((member.name for member in members if member.stage.needs_history), None)
    if input_ids is None and reader is None:
        return None
    reads = "" if reader is None else f": {reader} reads them"
    return f"input_ids must be the tokens so far, an integer tensor of shape (B, L), got {kind(input_ids)}{reads}"


def of_call(members: Sequence[Member], input_ids: object, scores: object) -> str | None:
    """What is wrong with the arguments of a processor's call, if anything is."""
    if not (isinstance(input_ids, torch.Tensor) and isinstance(scores, torch.Tensor)):
        return of_scores(scores) or of_ids(input_ids, members)
    if input_ids.is_floating_point() and not scores.is_floating_point():
        return (
            f"input_ids must come first and scores second, got {kind(input_ids)} and {kind(scores)}, which look swapped"
        )
    return of_scores(scores) or of_ids(input_ids, members)


def of_shapes(input_ids: object, scores: object) -> str | None:
    """What may be wrong with the shapes of arguments that are tensors; some processors take other ones."""
    if not (isinstance(input_ids, torch.Tensor) and isinstance(scores, torch.Tensor)):
        return None
    if scores.ndim != 2:
        return f"scores must be floating-point of shape (B, V), got {kind(scores)}"
    if input_ids.ndim != 2:
        return f"input_ids must be int32 or int64 of shape (B, L), got {kind(input_ids)}"
    if len(input_ids) != len(scores):
        return f"input_ids must have as many rows as scores ({len(scores)}), got {len(input_ids)}"
    return None


def explain_failure(error: Exception, members: Sequence[Member], input_ids: object, scores: object) -> None:
    """Raise an error of the same type that names the argument at fault; return where no argument is.

    Args:
        error: what a call of a plan has raised.
        members: its processors.
        input_ids: what the call was given.
        scores: likewise.
    """
    if type(error).__module__ not in ("builtins", "torch") or _comes_from_elsewhere(error):
        return
    if is_split(scores):
        raise ValueError(
            "scores must be a torch.Tensor for these processors, got a DTensor: fastlogits.process(scores, processors, "
            "input_ids) takes one that is split over its last dimension"
        ) from error
    message = of_call(members, input_ids, scores)
    if message is None and not _says_it(error):
        message = of_shapes(input_ids, scores)
    if message is not None and message != str(error):
        try:
            told = type(error)(message)
        except TypeError:  # it asks for something else than a message
            told = ValueError(message)
        raise told from error


def _comes_from_elsewhere(error: Exception) -> bool:
    """Whether it was raised in the code of somebody's own processor."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] not in ("fastlogits", "fastlogits_kernels", "torch", "transformers")


def _says_it(error: Exception) -> bool:
    """Whether an error is for people: a ValueError is, but for that of a shape of other dimensions."""
    return isinstance(error, ValueError) and "values to unpack" not in str(error)


def checked_processors(processors: Iterable[Any]) -> Iterator[Any]:
    """The processors, one by one, as far as they are some.

    Raises:
        ValueError: a class rather than an object of it, or a list, of the types that transformers' call refuses so.
        AttributeError: something else that can't be called, likewise.
    """
    for number, processor in enumerate(processors, 1):
        if isinstance(processor, type):
            name = processor.__name__
            raise ValueError(f"processors must be objects, got the class {name} (number {number}): write {name}(...)")
        if isinstance(processor, (list, tuple)):
            error = ValueError if callable(processor) else AttributeError
            raise error(
                f"processors must be in one list, got a {type(processor).__name__} of {len(processor)} (number "
                f"{number}): put its processors there one by one, as [*others] does"
            )
        if not callable(processor):
            raise AttributeError(
                f"processors must be callable with (input_ids, scores), got {kind(processor)} (number {number})"
            )
        yield processor


def kind(value: object) -> str:
    """A value for people: small ones as they are, others by their type and shape."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} of {tuple(value.shape)}"
    cls, shape = type(value), getattr(value, "shape", None)
    name = cls.__name__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__name__}"
    return f"{name} of {shape}" if isinstance(shape, tuple) else name
