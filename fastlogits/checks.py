"""Checks of arguments, with one wording: ``top_p must be between 0 and 1 (1 turns it off), got 1.5``.

Numbers may be Python's or numpy's scalars, and come out as Python's.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import wraps
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from fastlogits_kernels.runtime.rows import HOW_TO_REPEAT

LOGITS_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What logits may be."""
_INF = float("inf")
_T = TypeVar("_T")


def is_number(value: object) -> bool:
    """Whether a value is a real number; a bool is none."""
    return type(value) in (float, int) or (isinstance(value, Real) and not isinstance(value, bool))


def is_integer(value: object) -> bool:
    """Whether a value is an integer; a bool is none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def finite_number(argument: str, value: object, low: float = -_INF, high: float = _INF) -> float:
    """``value`` as a Python number.

    Raises:
        ValueError: not a finite number from ``low`` to ``high``.
    """
    if not is_number(value) or not low <= value <= high or abs(value) == _INF:  # type: ignore[operator,arg-type]
        least = "" if low == -_INF else f" of at least {low:g}"
        most = "" if high == _INF else f" and at most {high:g}"
        raise ValueError(f"{argument} must be a finite number{least}{most}, got {value!r}")
    return value if type(value) in (int, float) else float(value)  # type: ignore[return-value,arg-type]


def whole_number(argument: str, value: object, low: int = 0, high: int | None = None) -> int:
    """``value`` as a Python integer.

    Raises:
        ValueError: not an integer from ``low`` to ``high``.
    """
    if not is_integer(value) or value < low or (high is not None and value > high):  # type: ignore[operator]
        most = "" if high is None else f" and at most {high}"
        raise ValueError(f"{argument} must be an integer of at least {low}{most}, got {value!r}")
    return int(value)  # type: ignore[call-overload, no-any-return]


def one_of(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: the message names them all.
    """
    if value not in choices:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def no_argument(name: str, known: Iterable[str]) -> TypeError:
    """What is raised for an argument that there isn't, with the one that may be meant."""
    near = get_close_matches(name, list(known), 1, 0.5)
    return TypeError(f"there is no argument {name!r}" + (f": did you mean {near[0]}?" if near else ""))


def suggests_fields(cls: type[_T]) -> type[_T]:
    """A dataclass that says which of its fields may be meant, where one is given that it doesn't have."""
    init: Any = cls.__init__

    @wraps(init)
    def checked(self: Any, *values: Any, **named: Any) -> None:
        try:
            init(self, *values, **named)
        except TypeError:
            fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
            unknown = next((name for name in named if name not in fields), None)
            if unknown is None:
                raise
            raise no_argument(unknown, fields) from None

    setattr(cls, "__init__", checked)  # noqa: B010 - a type checker knows no other way
    return cls


def device_of(argument: str, device: torch.device | str | int) -> torch.device:
    """``device`` as torch has it, with the index of the current one where it is a GPU without an index.

    Raises:
        ValueError: torch knows no such device, or can't use it here.
    """
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        torch.empty(0, device=found)
    except Exception as error:  # AssertionError, RuntimeError or TypeError, by torch's build and the driver
        usable = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{argument} must be a device that torch can use here ({usable}), got {str(device)!r}: {reason}"
        ) from error
    return found


def check_rows(name: str, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
    """Refuse ids of other rows than the scores, for what reads the tokens of each row.

    Args:
        name: the processor, for people.
        input_ids: ``(R, L)``.
        scores: ``(B, V)``.

    Raises:
        ValueError: R is not B.
    """
    if input_ids.shape[0] != scores.shape[0]:
        raise ValueError(
            f"input_ids must have as many rows as scores ({scores.shape[0]}), since {name} reads the tokens of each, "
            f"got {input_ids.shape[0]}; {HOW_TO_REPEAT}"
        )
