"""Logits processors at the speed of memory: transformers' names, fused into one or two kernel launches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlogits.plan import Plan as Plan
    from fastlogits.position import Position as Position
    from fastlogits.processors.base import LogitsProcessor as LogitsProcessor
    from fastlogits.processors.base import LogitsProcessorList as LogitsProcessorList
    from fastlogits.processors.base import StagedProcessor as StagedProcessor
    from fastlogits.processors.first_step import SuppressFirstTokens as SuppressFirstTokens
    from fastlogits.processors.first_step import (
        SuppressSpecificBOSTokenLogitsProcessor as SuppressSpecificBOSTokenLogitsProcessor,
    )
    from fastlogits.processors.vocabulary import OnlyTokensFrom as OnlyTokensFrom
    from fastlogits.token_mask import TokenMask as TokenMask

__version__ = "0.1.0"

# Where each public name lives. They are imported on first use: importing fastlogits must not import transformers.
_HOME = {
    "LogitsProcessor": "processors.base",
    "LogitsProcessorList": "processors.base",
    "OnlyTokensFrom": "processors.vocabulary",
    "Plan": "plan",
    "Position": "position",
    "StagedProcessor": "processors.base",
    "SuppressFirstTokens": "processors.first_step",
    "SuppressSpecificBOSTokenLogitsProcessor": "processors.first_step",
    "TokenMask": "token_mask",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastlogits' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fastlogits.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
