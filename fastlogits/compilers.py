"""What ``torch.compile`` is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_Method = TypeVar("_Method", bound=Callable[..., object])


def constant(method: _Method) -> _Method:
    """A method that keeps something for later calls, which depends on its arguments alone, for ``torch.compile``.

    A compiler that traces a call runs the method as it is, once: how plans, chains and tables are made is nothing that
    it could trace. It guards the arguments; what was kept is looked up by the caller, and guarded there.
    """
    return torch.compiler.assume_constant_result(method)  # type: ignore[no-any-return, no-untyped-call]
