"""Checks of numbers that constructors take; the messages name the argument, what is allowed and what was given."""

from __future__ import annotations

_INF = float("inf")


def finite_number(argument: str, value: object, low: float = -_INF, high: float = _INF) -> float:
    """``value`` as it is.

    Raises:
        ValueError: not a finite number from ``low`` to ``high``.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or abs(value) == _INF:
        least = "" if low == -_INF else f" of at least {low}"
        most = "" if high == _INF else f" and at most {high}"
        raise ValueError(f"{argument} must be a finite number{least}{most}, got {value!r}")
    return value


def whole_number(argument: str, value: object, low: int = 0) -> int:
    """``value`` as it is.

    Raises:
        ValueError: not an integer of at least ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{argument} must be an integer of at least {low}, got {value!r}")
    return value
