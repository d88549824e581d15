"""Where the processor for vLLM depends on the inside of vLLM: on the frames that call it, and on an attribute.

``problems`` reads vLLM's sources, without importing vLLM, and says what no longer stands there; ``python -m fastlogits
doctor`` tells it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

SEEN = ("0.32.0",)
"""The versions of vLLM in which all of this has been seen to hold."""

# Between vLLM's input processor and a logits processor there are two calls.
_CALLERS = 4


def config_of_caller() -> Any:
    """The configuration of the engine that checks a request; None for a caller that has none.

    vLLM hands it to no processor where requests come in, but the object that calls them there holds it.
    """
    frame = sys._getframe(2)
    for _ in range(_CALLERS):
        config = getattr(frame.f_locals.get("self"), "vllm_config", None)
        if config is not None:
            return config
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def keep_outputs() -> None:
    """Ask the batch of the older runner, which calls ``update_state``, to fill in output tokens.

    Under asynchronous scheduling it does so for penalties, for bad words and where a logits processor was named when
    the engine started, but not for an entry point, whose lists would hold -1 for every token.
    """
    batch = sys._getframe(2).f_locals.get("self")
    if getattr(batch, _WANTS_OUTPUTS, None) is False:
        setattr(batch, _WANTS_OUTPUTS, True)


_WANTS_OUTPUTS = "logitsprocs_need_output_token_ids"


class _Text(NamedTuple):
    """What must stand in a module of vLLM, and what is lost where it doesn't."""

    module: str
    text: str
    without: str


_TEXTS = (
    _Text(
        "vllm/v1/engine/input_processor.py",
        "self.vllm_config",
        "requests with forbidden combinations are refused in the worker, by a warning, and not where they come in",
    ),
    _Text(
        "vllm/v1/worker/gpu_input_batch.py",
        f"self.{_WANTS_OUTPUTS}",
        "under asynchronous scheduling the older runner shows no generated tokens to the processors",
    ),
    _Text(
        "vllm/v1/worker/gpu_input_batch.py",
        ".update_state(",
        "the older runner's batch isn't found, and shows no generated tokens to the processors",
    ),
)


def problems(folder: Path) -> Iterator[str]:
    """What of the inside of vLLM is no longer there, and what is lost by it.

    Args:
        folder: the folder that holds the package ``vllm``.
    """
    for each in _TEXTS:
        path = folder / each.module
        if not path.is_file():
            yield f"{each.module} is gone: {each.without}"
        elif each.text not in path.read_text():
            yield f"{each.module} has no {each.text}: {each.without}"


def installed() -> Path | None:
    """The folder that holds the package ``vllm``; None where it isn't installed. vLLM is not imported."""
    spec = find_spec("vllm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parents[1]
