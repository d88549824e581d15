r"""Logits processors that travel to an SGLang server with a request, and a sampling backend for it.

A processor is sent by name, so fastlogits must be installed where the server runs, which is started with
``--enable-custom-logit-processor``:

    {"custom_logit_processor": FastLogitsProcessor.to_str(),
     "sampling_params": {"custom_params": FastLogitsProcessor.params(no_repeat_ngram_size=3)}}

``--sampling-backend fastlogits`` draws tokens with fastlogits: one pass over the logits for temperature, top-k, top-p
and min-p, and with ``--enable-deterministic-inference`` a draw that depends on a request's seed and position alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastlogits.integrations.requests import (
    CUTS,
    EDITS,
    Live,
    LiveBatch,
    read_wishes,
    say_left_out,
    say_once,
    without_text,
)

if TYPE_CHECKING:
    from fastlogits.sampling import Sampler

_KEY = "fastlogits"
_THEIRS = "sglang.srt.sampling.custom_logit_processor"


class _WithoutSGLang:
    """What stands in for SGLang's class where that can't be imported: requests can be made there, but for one call."""

    @classmethod
    def to_str(cls) -> str:
        """What SGLang's class has for sending a processor with a request.

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
    """What requests ask for in ``custom_params``, made by ``params``.

    The names are those of ``RequestParams`` that SGLang has no parameter for: ``banned_token_ids``, ``bad_words``,
    ``no_repeat_ngram_size``, ``dry_multiplier``, ``dry_base``, ``dry_allowed_length``, ``dry_breakers``,
    ``first_tokens_suppressed``, ``first_window``, ``forced_tokens``, ``top_n_sigma``, and ``typical_p``, ``epsilon``,
    ``eta``, ``top_h`` and ``top_a`` at the request's temperature. They act before SGLang's penalties, temperature and
    truncations.

    The tokens so far are read from the request, at each call, so a step that is processed twice gives the same twice.
    SGLang overlaps steps: then the newest token is not there yet. Options that depend on it are left out, and an error
    is logged, unless the server is started with ``--disable-overlap-schedule``, or with
    ``SGLANG_ENABLE_DELAY_SAMPLE=1``, which goes on overlapping all but the sampling. The rows of draft tokens that some
    speculative decoding makes of a request are left alone but for the first.

    ``params`` refuses what is out of range. What only the server sees (an id outside the vocabulary, forced tokens
    beside a grammar, which may forbid them) can't be refused there: the other options are honoured, and one warning
    names what isn't.
    """

    names: ClassVar[tuple[str, ...]] = EDITS + CUTS
    """What may be asked for."""

    @classmethod
    def params(cls, **wishes: Any) -> dict[str, Any]:
        """``custom_params`` of a request.

        Raises:
            ValueError: an unknown name, or a value out of range.

        Example:
            >>> FastLogitsProcessor.params(no_repeat_ngram_size=3)
            {'fastlogits': '{"no_repeat_ngram_size": 3}'}
        """
        read_wishes(wishes, cls.names, cls.__name__, 1.0)
        return {_KEY: json.dumps(wishes, default=list)}

    def __call__(
        self, logits: torch.Tensor, custom_param_list: Sequence[dict[str, Any] | None] | None = None
    ) -> torch.Tensor:
        """Process rows ``[n, V]`` of the requests whose parameters are given, in place."""
        batch = _batch(logits.shape[1], logits.device)
        met: set[int] = set()
        rows: list[Live | None] = []
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
    """Of those the ban on n-grams that come twice."""

    names = ("no_repeat_ngram_size",)


class DRYLogitProcessor(FastLogitsProcessor):
    """Of those the penalty on repetitions."""

    names = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_breakers")


class FirstTokensLogitProcessor(FastLogitsProcessor):
    """Of those what is said of the first tokens: which may not come, and which have to."""

    names = ("first_tokens_suppressed", "first_window", "forced_tokens")


class BannedTokensLogitProcessor(FastLogitsProcessor):
    """Of those the tokens and sequences that never come."""

    names = ("banned_token_ids", "bad_words")


class _Requests:
    """Requests of one vocabulary and device, found again by their ids."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.live = LiveBatch(vocab_size, device, max_requests=64, max_length=4096, preset="sglang")
        # By id: the list of outputs, which tells requests of one id apart, and what was made of it.
        self._known: dict[str, tuple[Sequence[int], Live | None]] = {}

    def find(self, given: Mapping[str, Any], names: tuple[str, ...]) -> Live | None:
        """The request that some parameters belong to; None for one that asks for nothing, or can't be served."""
        request = given.get("__req__")
        if request is None:
            return self._made(given, names, None)
        try:
            outputs, live = self._known.get(request.rid, (None, None))
        except ReferenceError:  # SGLang's reference is weak, and the request is over
            return None
        if outputs is not request.output_ids:
            if live is not None:
                self.live.let_go(live)
            if len(self._known) > 4 * self.live.max_requests:
                self._forget()
            live = self._made(given, names, request)
            self._known[request.rid] = request.output_ids, live
        return live

    def _made(self, given: Mapping[str, Any], names: tuple[str, ...], request: Any) -> Live | None:
        sampling = getattr(request, "sampling_params", None)
        # SGLang writes greedy decoding as top-k 1.
        temperature = 1.0 if sampling is None else 0.0 if sampling.top_k == 1 else sampling.temperature
        asked = given.get(_KEY)
        if asked is None:
            return None
        left_out: list[str] = []
        where = f"custom_params[{_KEY!r}]"
        wishes = read_wishes(asked, names, where, temperature, self.live.vocab_size, left_out.append)
        if wishes.edits.forced_tokens and _has_grammar(sampling):
            left_out.append(f"{where}: forced_tokens must be left out beside a grammar, which may forbid them")
            wishes = wishes._replace(edits=replace(wishes.edits, forced_tokens=()))
        # Whoever else is in the batch must not suffer, and here nobody hears an exception.
        say_left_out(left_out)
        edits, hidden = without_text(wishes.edits, counted=False)
        if request is not None and hidden and _overlaps():
            say_once(
                f"{', '.join(hidden)} of requests are not honoured: SGLang samples before the token of the last step "
                "is known; start it with --disable-overlap-schedule, or with SGLANG_ENABLE_DELAY_SAMPLE=1"
            )
            wishes = wishes._replace(edits=edits)
        if wishes.is_nothing:
            return None
        if request is None:
            return Live(wishes, (), ())
        prompt = getattr(request, "origin_input_ids_unpadded", None) or request.origin_input_ids
        return Live(wishes, prompt, request.output_ids)

    def _forget(self) -> None:
        """Forget requests that hold no slot; one that is still running is read again."""
        holding = {rid: known for rid, known in self._known.items() if known[1] and known[1].slot is not None}
        self._known = holding


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

    register_sampler_backend("fastlogits", lambda: sampler_class()())


@lru_cache
def sampler_class() -> type:
    """SGLang's ``Sampler`` with the draw of fastlogits; made when it is asked for, since SGLang is slow to import."""
    from sglang.srt.layers import sampler as theirs

    class FastLogitsSampler(theirs.Sampler):  # type: ignore[misc]
        """Draws from the logits in one pass, where SGLang divides, takes a softmax, and truncates probabilities.

        The distribution is that of SGLang's: top-p and top-k on all of it, then min-p. Without seeds of the requests
        they come from torch's generator, one a row and step. Greedy batches, and what needs the probabilities
        themselves, stay with SGLang.
        """

        def __init__(self) -> None:
            super().__init__()
            self._of: Any = None
            self._draw: Sampler | None = None

        def forward(
            self,
            logits_output: Any,
            sampling_info: Any,
            return_logprob: bool,
            top_logprobs_nums: list[int],
            token_ids_logprobs: list[list[int]],
            positions: torch.Tensor,
            **more: Any,
        ) -> torch.Tensor:
            if (
                sampling_info.is_all_greedy
                or sampling_info.sampling_mask_batch_indices is not None
                or self.rl_on_policy_target is not None
                or any(value is not None for value in more.values())
            ):
                tokens: torch.Tensor = super().forward(
                    logits_output,
                    sampling_info,
                    return_logprob,
                    top_logprobs_nums,
                    token_ids_logprobs,
                    positions,
                    **more,
                )
                return tokens
            logits = self._preprocess_logits(logits_output.next_token_logits, sampling_info)
            seeds = sampling_info.sampling_seed
            if seeds is None:
                low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
                seeds = torch.randint(low, high, (len(logits),), device=logits.device)
            tokens = self._drawn_as(sampling_info)(logits, seeds, positions).tokens.to(torch.int32)
            if return_logprob:
                original = theirs.SGLANG_RETURN_ORIGINAL_LOGPROB
                logprobs = torch.log_softmax(logits if original else logits / sampling_info.temperatures, dim=-1)
                self.output_logprob_processor.compute_logprobs(
                    logprobs, top_logprobs_nums, token_ids_logprobs, tokens
                ).write_output_to(logits_output)
            self._sync_token_ids_across_tp(tokens, sampling_info)
            return tokens

        def _drawn_as(self, info: Any) -> Sampler:
            """The draw for a batch, kept as long as it has the same tensors."""
            tensors = (info.temperatures, info.top_ps, info.top_ks, info.min_ps)
            if self._of is None or any(now is not then for now, then in zip(tensors, self._of, strict=True)):
                from fastlogits.sampling import Sampler

                self._draw = Sampler(
                    temperature=info.temperatures.flatten(),
                    top_p=info.top_ps if info.need_top_p_sampling else None,
                    top_k=info.top_ks if info.need_top_k_sampling else None,
                    min_p=info.min_ps if info.need_min_p_sampling else None,
                    order="sglang",
                    ties="lowest",
                )
                self._of = tensors
            assert self._draw is not None
            return self._draw

        def _sample_from_probs(
            self, probs: torch.Tensor, sampling_info: Any, positions: torch.Tensor, simple_sampling_case: bool
        ) -> tuple[torch.Tensor, Any]:
            """What SGLang's own path draws, for the masks of kept tokens that it can report."""
            if simple_sampling_case:
                drawn: tuple[torch.Tensor, Any] = super()._sample_from_probs(
                    probs, sampling_info, positions, simple_sampling_case
                )
                return drawn
            tokens, weights, ids, chosen = theirs.top_k_top_p_min_p_sampling_from_probs_torch(
                probs,
                sampling_info.top_ks,
                sampling_info.top_ps,
                sampling_info.min_ps,
                sampling_info.need_min_p_sampling,
                sampling_info.sampling_seed,
                positions,
                return_filtered_probs=True,
            )
            rows = sampling_info.sampling_mask_batch_indices
            if rows is None:
                return tokens, None
            return tokens, theirs._SamplingMaskCapture(
                weights=weights[rows], token_ids=ids[rows], selected_weight=chosen[rows], batch_rows=rows
            )

    return FastLogitsSampler
