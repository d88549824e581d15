"""vLLM's ``SamplingParams`` as ``RequestParams``.

Each field of ``SamplingParams`` is in one of three groups: it changes the logits or the draw, and is translated here;
it has nothing to do with them; or it is unknown, as a field of a newer vLLM is, and then vLLM's own code has to serve
the request.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fastlogits.serving.params import RequestParams

if TYPE_CHECKING:
    from fastlogits.integrations.requests import RequestOptions

TRANSLATED = frozenset({
    "temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "min_tokens", "stop_token_ids", "ignore_eos", "_eos_token_id", "_all_stop_token_ids", "logit_bias",
    "allowed_token_ids", "bad_words", "_bad_words_token_ids", "extra_args", "structured_outputs",
    "thinking_token_budget", "logprobs", "logprob_token_ids",
})  # fmt: skip
"""Fields that change the logits, the draw or what is reported of it."""

ELSEWHERE = frozenset({
    "n", "stop", "max_tokens", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "flat_logprobs",
    "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "output_kind",
    "stream_interval", "skip_clone", "output_text_buffer_length", "skip_reading_prefix_cache", "repetition_detection",
    "routed_experts_prompt_start",
    # An engine that watermarks or replays has another sampler, or is left to vLLM as a whole.
    "watermarking", "_watermarking_skipped", "trace_decode_token_ids",
})  # fmt: skip
"""Fields that other parts of vLLM serve."""


_OFF = (
    ("temperature", 1), ("top_k", 0), ("top_p", 1), ("min_p", 0), ("repetition_penalty", 1), ("presence_penalty", 0),
    ("frequency_penalty", 0),
)  # fmt: skip
"""Fields that have the same meaning, with the values that turn them off."""


class Translated(NamedTuple):
    """What a request asks of the step."""

    params: RequestParams
    ends_if_nothing_is_left: bool
    """Whether its end tokens are banned only if a grammar allows another token; then the ban is not in ``params``."""


def end_tokens(sampling: Any, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a request, of those that the logits have, in ascending order."""
    return tuple(sorted(token for token in sampling.all_stop_token_ids if 0 <= token < vocab_size))


def translate(
    sampling: Any, seed: int, vocab_size: int, options: RequestOptions | None = None, logprobs: int | None = None
) -> Translated:
    """The parameters of a request.

    Args:
        sampling: its ``SamplingParams``.
        seed: the seed that vLLM has given it.
        vocab_size: tokens of the vocabulary.
        options: what it asks of fastlogits in ``extra_args``, checked.
        logprobs: of the step's own report; see ``RequestParams``.

    Raises:
        ValueError: a value that ``RequestParams`` refuses.
    """
    asked: dict[str, Any] = {} if options is None else _asked(options)
    for name, off in _OFF:
        value = getattr(sampling, name)
        if value != off:
            asked[name] = value
    if sampling.logit_bias:
        asked["logit_bias"] = sampling.logit_bias
    if sampling.allowed_token_ids:
        asked["allowed_token_ids"] = tuple(sampling.allowed_token_ids)
    if sampling.bad_words_token_ids:
        asked["bad_words"] = (*sampling.bad_words_token_ids, *asked.get("bad_words", ()))
    spares = False
    if sampling.min_tokens > 0:
        ends = end_tokens(sampling, vocab_size)
        spares = bool(ends) and sampling.structured_outputs is not None
        if ends and not spares:
            asked |= {"min_tokens": sampling.min_tokens, "stop_token_ids": ends}
    return Translated(RequestParams(seed=seed, logprobs=logprobs, **asked), spares)


def _asked(options: RequestOptions) -> dict[str, Any]:
    """The options as arguments, those at their defaults left out."""
    from fastlogits.integrations.requests import EDITS, TRUNCATIONS

    default = RequestParams()
    given = [(options.edits, EDITS), (options.truncations, TRUNCATIONS)]
    return {
        name: getattr(params, name)
        for params, names in given
        if params is not None
        for name in names
        if getattr(params, name) is not getattr(default, name)
    }


def unknown_fields(sampling: Any) -> list[str]:
    """Fields of a request that nothing here knows, and that are not at their defaults."""
    kind = cast("Hashable", type(sampling))
    return [name for name, default in _unknown(kind) if getattr(sampling, name) != default]


@lru_cache
def _unknown(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Fields of the class that are neither translated nor served elsewhere, with their defaults."""
    names = [name for name in kind.__struct_fields__ if name not in TRANSLATED | ELSEWHERE]
    if not names:
        return ()
    default = kind()
    return tuple((name, getattr(default, name)) for name in names)
