"""The namespace of the registered operations, ``torch.ops.fastlogits``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "fastlogits"

library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operation that picks its backend itself: what it does, and what it returns for fake tensors."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
