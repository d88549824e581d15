"""How parameters are shown: those that differ from their defaults, with tensors by their shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import torch


def shown(value: Any) -> str:
    """A value as people read it: a tensor by its dtype and shape, without waiting for its device."""
    if isinstance(value, torch.Tensor):
        return f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
    return str(value) if isinstance(value, torch.device) else repr(value)


def arguments(given: Mapping[str, Any]) -> str:
    """Arguments by name."""
    return ", ".join(f"{name}={shown(value)}" for name, value in given.items())


def set_fields(params: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    found = {}
    for field in fields(params):
        value = getattr(params, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if isinstance(value, torch.Tensor) or value != default:
            found[field.name] = value
    return found
