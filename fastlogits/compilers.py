"""What ``torch.compile`` is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Method = TypeVar("_Method", bound=Callable[..., object])


def constant(method: _Method) -> _Method:
    """A method that keeps something for later calls, which depends on its arguments alone, for ``torch.compile``.

    A compiler that traces a call runs the method as it is, once: how plans, chains and tables are made is nothing that
    it could trace. It guards the arguments; what was kept is looked up by the caller, and guarded there.
    """
    # What torch.compiler.assume_constant_result does, without the second that its import of torch._dynamo takes.
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method
