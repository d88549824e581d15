"""``python -m fastlogits watch``: a model, a prompt, and one watched call of ``generate``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastlogits.inspect.watch import Watched, watch
from fastlogits.processors.base import LogitsProcessorList
from fastlogits.processors.masks import SuppressFirstTokens
from fastlogits.token_mask import TokenMask

_SAMPLES = ("temperature", "top_k", "top_p", "min_p")
_OTHERS = ("num_beams", "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences", "max_new_tokens")


class LoadError(Exception):
    """There is no such model, or what is there is none."""


def load(name: str, device: str) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Args:
        name: path or hub id of a causal language model.
        device: where the model is put.

    Raises:
        LoadError: there is none of that name, or it is another kind of model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LoadError(str(error)) from error
    return model.to(device).eval(), tokenizer


def generate(model: Any, tokenizer: Any, options: Namespace, processors: Sequence[Any] = ()) -> Watched:
    """One watched call of ``generate``.

    Args:
        model: the model.
        tokenizer: its tokenizer; a prompt is a chat's first turn where it has a template for chats.
        options: the options of the command.
        processors: processors besides those that ``generate`` makes of its arguments.

    Raises:
        ValueError: what ``generate``, a processor or a pattern refuses.
    """
    samples = any(vars(options)[name] is not None for name in _SAMPLES)
    if options.num_return_sequences > (options.num_beams or 1) and not samples:
        raise ValueError(
            f"--num-return-sequences must be 1, or at most --num-beams, where nothing is sampled, got "
            f"{options.num_return_sequences}: sample, with --temperature 1, or search with more beams"
        )
    if options.not_first is not None:
        processors = [*processors, SuppressFirstTokens(TokenMask.matching(tokenizer, options.not_first))]
    inputs = _inputs(tokenizer, options.prompt, not options.no_chat).to(model.device)
    asked = {name: getattr(options, name) for name in (*_SAMPLES, *_OTHERS) if getattr(options, name) is not None}
    asked["do_sample"] = any(name in asked for name in _SAMPLES)
    if asked["do_sample"]:
        asked = {"top_k": 0, **asked}  # else transformers takes the 50 likeliest, which nobody has asked for
    pad = tokenizer.pad_token_id
    asked["pad_token_id"] = tokenizer.eos_token_id if pad is None else pad
    torch.manual_seed(options.seed)
    with watch(model, tokenizer, top=options.top) as watched:
        model.generate(**inputs, **asked, logits_processor=LogitsProcessorList(processors))
    return watched


def _inputs(tokenizer: Any, prompt: str, is_chat: bool) -> Any:
    if is_chat and getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = tokenizer(prompt, return_tensors="pt")
    if not found["input_ids"].numel():
        raise ValueError(f"--prompt must be a text of at least one token, got {prompt!r}")
    return found
