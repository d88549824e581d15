r"""Logits processors that travel to an SGLang server with a request, and a sampling backend for it.

A processor is sent by name, so fastlogits must be installed where the server runs, which is started with
``--enable-custom-logit-processor``:

    {"custom_logit_processor": FastLogitsProcessor.to_str(),
     "sampling_params": {"custom_params": FastLogitsProcessor.params(no_repeat_ngram_size=3)}}

``--sampling-backend fastlogits`` samples with fastlogits: see ``sglang_sampler``. Penalties, biases and grammars take
one launch; temperature, top-k, top-p, min-p and the draw one pass. With ``--enable-deterministic-inference`` a token
depends on its request's seed and position alone, with drafts or without.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch

from fastlogits.integrations.requests import (
    EDITS,
    TRUNCATIONS,
    LiveBatch,
    LiveRequest,
    read_options,
    say_left_out,
    say_once,
    without_text,
)

_KEY = "fastlogits"
_THEIRS = "sglang.srt.sampling.custom_logit_processor"


class _WithoutSGLang:
    """Stands in for SGLang's class where SGLang isn't installed: requests can be made there, all but ``to_str``."""

    @classmethod
    def to_str(cls) -> str:
        """The text with which SGLang sends a processor.

        Raises:
            ImportError: always: the form of the text is SGLang's.
        """
        try:
            import_module(_THEIRS)
        except ImportError as error:
            raise ImportError(
                f"{cls.__name__}.to_str() must be called where SGLang is installed, whose form the text has, got: "
                f"{error}. Install it with `pip install sglang`, or make the text where the server runs and send that"
            ) from error
        raise ImportError(
            f"{cls.__name__}.to_str() must be called where SGLang was installed before {__name__} was imported: "
            "start Python again"
        )


def _interface() -> tuple[type, ...]:
    """SGLang's class of logits processors, where SGLang is installed."""
    with suppress(ImportError):
        return (import_module(_THEIRS).CustomLogitProcessor,)
    return (_WithoutSGLang,)


class FastLogitsProcessor(*_interface()):  # type: ignore[misc]
    """Applies the options that requests have in ``custom_params``, which ``params`` makes.

    The options are the fields of ``RequestParams`` that SGLang lacks: ``banned_token_ids``, ``bad_words``,
    ``no_repeat_ngram_size``, ``dry_multiplier``, ``dry_base``, ``dry_allowed_length``, ``dry_breakers``,
    ``first_tokens_suppressed``, ``first_window``, ``forced_tokens``, ``top_n_sigma``, and ``typical_p``, ``epsilon``,
    ``eta``, ``top_h`` and ``top_a`` at the request's temperature. They act before SGLang's penalties, temperature and
    truncations.

    The tokens so far are read from the request at each call, so a step processed twice gives the same result twice.
    SGLang overlaps steps, so that the newest token isn't there yet. Options that depend on it are then left out, and an
    error is logged. Start the server with ``--disable-overlap-schedule`` to have them, or with
    ``SGLANG_ENABLE_DELAY_SAMPLE=1``, which overlaps everything but the sampling. Where speculative decoding gives a
    request several rows, only the first is processed.

    ``params`` refuses values out of range. Some faults only the server sees: an id outside the vocabulary, or forced
    tokens beside a grammar, which may forbid them. There the other options are honoured, and one warning names the
    fault.
    """

    names: ClassVar[tuple[str, ...]] = EDITS + TRUNCATIONS
    """The options that are allowed."""

    @classmethod
    def params(cls, **options: Any) -> dict[str, Any]:
        """``custom_params`` of a request.

        Raises:
            ValueError: an unknown name, or a value out of range.

        Example:
            >>> FastLogitsProcessor.params(no_repeat_ngram_size=3)
            {'fastlogits': '{"no_repeat_ngram_size": 3}'}
        """
        read_options(options, cls.names, cls.__name__, 1.0)
        return {_KEY: json.dumps(options, default=list)}

    def __call__(
        self, logits: torch.Tensor, custom_param_list: Sequence[dict[str, Any] | None] | None = None
    ) -> torch.Tensor:
        """Process rows ``[n, V]`` of the requests whose parameters are given, in place."""
        batch = _batch(logits.shape[1], logits.device)
        met: set[int] = set()
        rows: list[LiveRequest | None] = []
        for given in custom_param_list or ():
            live = None if given is None else batch.find(given, self.names)
            if live is not None and id(live) in met:
                say_once("the rows of draft tokens are not steered: SGLang doesn't show them to logits processors")
                live = None
            elif live is not None:
                met.add(id(live))
            rows.append(live)
        if met:
            batch.live.process_(logits, rows)
        return logits


class NoRepeatNGramLogitProcessor(FastLogitsProcessor):
    """Only the ban on repeated n-grams."""

    names = ("no_repeat_ngram_size",)


class DRYLogitProcessor(FastLogitsProcessor):
    """Only the penalty on repetitions (DRY)."""

    names = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_breakers")


class FirstTokensLogitProcessor(FastLogitsProcessor):
    """Only the options for the first tokens: suppressed and forced ones."""

    names = ("first_tokens_suppressed", "first_window", "forced_tokens")


class BannedTokensLogitProcessor(FastLogitsProcessor):
    """Only the bans on tokens and sequences."""

    names = ("banned_token_ids", "bad_words")


class _Known(NamedTuple):
    """What is known of a request's id."""

    outputs: Sequence[int]
    """The request's own list, which tells requests of one id apart."""
    live: LiveRequest | None
    """None if the request asks for nothing."""


class _Requests:
    """Requests of one vocabulary and device, found again by their ids."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.live = LiveBatch(vocab_size, device, max_requests=64, max_length=4096, semantics="sglang")
        self._known: dict[str, _Known] = {}

    def find(self, given: Mapping[str, Any], names: tuple[str, ...]) -> LiveRequest | None:
        """The request that some parameters belong to; None if it asks for nothing, or is over."""
        request = given.get("__req__")
        if request is None:
            return self._made(given, names, None)
        try:
            known = self._known.get(request.rid)
        except ReferenceError:  # SGLang's reference is weak, and the request is over
            return None
        if known is not None and known.outputs is request.output_ids:
            return known.live
        if known is not None and known.live is not None:
            self.live.release(known.live)
        if len(self._known) > 4 * self.live.max_requests:
            self._forget()
        live = self._made(given, names, request)
        self._known[request.rid] = _Known(request.output_ids, live)
        return live

    def _made(self, given: Mapping[str, Any], names: tuple[str, ...], request: Any) -> LiveRequest | None:
        sampling = getattr(request, "sampling_params", None)
        # SGLang writes greedy decoding as top-k 1.
        temperature = 1.0 if sampling is None else 0.0 if sampling.top_k == 1 else sampling.temperature
        asked = given.get(_KEY)
        if asked is None:
            return None
        left_out: list[str] = []
        where = f"custom_params[{_KEY!r}]"
        options = read_options(asked, names, where, temperature, self.live.vocab_size, left_out.append)
        if options.edits.forced_tokens and _has_grammar(sampling):
            left_out.append(f"{where}: forced_tokens must be left out beside a grammar, which may forbid them")
            options = options._replace(edits=replace(options.edits, forced_tokens=()))
        # An exception would stop the other requests of the batch, and reach nobody.
        say_left_out(left_out)
        edits, hidden = without_text(options.edits, counted=False)
        if request is not None and hidden and _overlaps():
            say_once(
                f"{', '.join(hidden)} of requests are not honoured: SGLang samples before the token of the last step "
                "is known; start it with --disable-overlap-schedule, or with SGLANG_ENABLE_DELAY_SAMPLE=1"
            )
            options = options._replace(edits=edits)
        if options.is_nothing:
            return None
        if request is None:
            return LiveRequest(options, (), ())
        prompt = getattr(request, "origin_input_ids_unpadded", None) or request.origin_input_ids
        return LiveRequest(options, prompt, request.output_ids)

    def _forget(self) -> None:
        """Forget requests that hold no slot; one that is still running is read again."""
        self._known = {
            rid: known for rid, known in self._known.items() if known.live is not None and known.live.slot is not None
        }


def _has_grammar(sampling: Any) -> bool:
    """Whether a request's parameters ask for a grammar."""
    return any(getattr(sampling, name, None) for name in ("json_schema", "regex", "ebnf", "structural_tag"))


@lru_cache
def _batch(vocab_size: int, device: torch.device) -> _Requests:
    return _Requests(vocab_size, device)


@lru_cache
def _overlaps() -> bool:
    """Whether a step is sampled before the token of the one before is known."""
    from sglang.srt.environ import envs
    from sglang.srt.runtime_context import get_schedule

    return not get_schedule().disable_overlap_schedule and not envs.SGLANG_ENABLE_DELAY_SAMPLE.get()


# -- The sampling backend ---------------------------------------------------------------------------------------------


def register() -> None:
    """Offer the sampling backend ``fastlogits`` to SGLang, which calls this when it starts."""
    from sglang.srt.layers.sampler import register_sampler_backend

    from fastlogits.integrations.sglang_sampler import make_sampler

    register_sampler_backend("fastlogits", make_sampler)
