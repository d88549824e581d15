r"""vLLM's samplers with fastlogits: penalties, bans, temperature, truncations and the draw in one step.

They take the places of vLLM's own where the environment asks:

    FASTLOGITS_VLLM_SAMPLER=1 vllm serve ...

Each token then depends on its request alone: on its parameters, tokens, seed and position, and not on the batch, on
preemption, or on drafts. Drafts are accepted as long as they equal what is drawn, so they never change a token.

The newer runner's sampler honours every field of ``SamplingParams``, and the options of ``extra_args["fastlogits"]``.
What other logits processors and thinking budgets do runs as vLLM has it, between the penalties and the temperature. An
engine that watermarks, replays traces or reports sampling masks keeps vLLM's sampler, and so does a request with a
field that is unknown here. Each is logged once. The older runner shows its sampler neither seeds nor positions: there
temperature, truncations and the draw are one step, and penalties, drafts and the rest are vLLM's.
"""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from fastlogits_kernels.selection.logprobs import MOST, report

from fastlogits.integrations import vllm_hooks as hooks
from fastlogits.integrations.requests import say_once
from fastlogits.integrations.vllm import FastLogitsProcessor, running_options
from fastlogits.integrations.vllm_params import end_tokens, translate, unknown_fields
from fastlogits.integrations.vllm_step import EndTokens, Places, Rows, StepOfSlots, Taken

if TYPE_CHECKING:
    from fastlogits.sampled import Distribution

logger = logging.getLogger(__name__)

# How a request is served; a step is served as the largest number among its requests says.
_IN_ONE_PASS, _AROUND_OTHERS, _BY_VLLM = range(3)
_LOGITS_MODES = ("raw_logits", "processed_logits")


@lru_cache
def _tell(message: str) -> None:
    logger.warning("%s", message)


# -- The newer runner -------------------------------------------------------------------------------------------------


class _Watched:
    """A logits processor of others; it notes whether it has something to do for the request that was added last."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.is_asked = False

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.is_asked = bool(self.processor.add_request(req_idx, sampling_params))
        return self.is_asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


class _OfSlots:
    """A number for each slot, mostly 0; where all are, a step looks no further."""

    def __init__(self, slots: int) -> None:
        self.numbers = np.zeros(slots, dtype=np.int8)
        self._any = False

    def note(self, slot: int, number: int) -> None:
        """Set the number of a slot. It stays until the slot has another request."""
        self.numbers[slot] = number
        self._any = bool(self.numbers.any())

    def most(self, slots: Any) -> int:
        """The largest number of some slots."""
        return int(self.numbers[slots].max(initial=0)) if self._any else 0


class _Drawn(NamedTuple):
    """What a step has drawn."""

    tokens: torch.Tensor
    """int64 ``[rows]``."""
    logprobs: Any
    """vLLM's ``LogprobsTensors``; None for none."""
    rows: Rows


def _wants_scores(sampling: Any) -> bool:
    """Whether a request has vLLM report log-probabilities of its tokens, or of named ones."""
    return sampling.logprobs is not None or bool(getattr(sampling, "logprob_token_ids", None))


def _places_of(input_batch: Any) -> Places:
    """Where the rows of a step are in the texts."""
    at = input_batch.logits_indices
    return Places(
        input_batch.positions.index_select(0, at), input_batch.input_ids.index_select(0, at),
        input_batch.expanded_local_pos,
    )  # fmt: skip


class NewerSampler:
    """Before vLLM's ``Sampler`` of the newer runner in a class made of both, whose interface stays."""

    # What vLLM's class has.
    req_states: Any
    sampling_states: Any
    logprobs_mode: str
    logits_processors: list[Any]
    logprob_token_ids_state: Any
    thinking_budget_state: Any
    trace_replay_state: Any
    return_sampling_mask: bool
    num_speculative_tokens: int
    compute_nans: bool
    get_logprobs_dims: Any

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._others: list[_Watched] = []
        self._step: StepOfSlots | None = None
        self._is_changed = False
        config: Any = named.get("vllm_config", given[0] if given else None)
        self.shares_batches = hooks.shares_batches(config)
        reason = hooks.reason_for_vllm(self)
        if reason is not None:
            _tell(f"vLLM's own sampler runs: {reason}")
            return
        slots = self.sampling_states.max_num_reqs
        self._served_by, self._reports, self._scored = _OfSlots(slots), _OfSlots(slots), _OfSlots(slots)
        self._step = self._new_step(config)
        self._watch_others()

    def _new_step(self, config: Any) -> StepOfSlots:
        states, model = self.req_states, config.model_config
        V = self.sampling_states.vocab_size
        most = MOST if model.max_logprobs < 0 else min(MOST, model.max_logprobs)
        processed = self.logprobs_mode == "processed_logprobs"
        rows = self.sampling_states.max_num_reqs * max(1, self.num_speculative_tokens)
        tokens = states.all_token_ids.gpu
        step = StepOfSlots(V, rows, tokens, states.total_len.gpu, min(most, V) if processed else 0)
        if tokens.is_cuda:
            step.warm_up(model.dtype, ["processed"] if processed else [], self.num_speculative_tokens > 1)
        return step

    def _watch_others(self) -> None:
        """Note what other processors have to do, and let ours wait: the step itself does what it is there for."""
        processors = self.logits_processors
        for place in range(hooks.BUILT_IN_PROCESSORS, len(processors)):
            if isinstance(processors[place], FastLogitsProcessor):
                processors[place].wait()
            else:
                processors[place] = watched = _Watched(processors[place])
                self._others.append(watched)

    def add_request(self, req_idx: int, sampling_params: Any) -> None:
        """A request takes a slot."""
        theirs: Any = super()
        theirs.add_request(req_idx, sampling_params)
        if self._step is not None:
            self._is_changed = True
            self._scored.note(req_idx, _wants_scores(sampling_params))
            self._served_by.note(req_idx, self._add(self._step, req_idx, sampling_params))

    def _add(self, step: StepOfSlots, slot: int, sampling: Any) -> int:
        """Put a request into its slot, and say how it is served."""
        unknown = unknown_fields(sampling)
        if unknown:
            _tell(f"vLLM's own sampler serves requests with {', '.join(unknown)}, which fastlogits doesn't know")
            step.remove(slot)
            return _BY_VLLM
        V = step.vocab_size
        options, seed = running_options(sampling, V), int(self.sampling_states.seeds.np[slot])
        try:
            reports = bool(step.max_logprobs) and sampling.logprobs is not None
            self._reports.note(slot, reports)
            asked = translate(sampling, seed, V, options, step.max_logprobs if reports else None)
            ends = None
            if asked.ends_if_nothing_is_left:
                length = int(self.req_states.prompt_len.np[slot]) + sampling.min_tokens
                ends = EndTokens(end_tokens(sampling, V), length)
            step.add(slot, asked.params, ends)
        except ValueError as error:
            _tell(f"vLLM's own sampler serves a request that fastlogits refuses: {error}")
            return _BY_VLLM
        others = [type(each.processor).__name__ for each in self._others if each.is_asked]
        if sampling.thinking_token_budget is not None and self.thinking_budget_state.enabled:
            others.append("thinking_token_budget")
        if others:
            _tell(f"{', '.join(others)} of requests run as vLLM has them, between fastlogits' penalties and its draw")
        return _AROUND_OTHERS if others or ends is not None else _IN_ONE_PASS

    def apply_staged_writes(self) -> None:
        """The state of the requests is on the device."""
        theirs: Any = super()
        theirs.apply_staged_writes()
        if self._step is not None and self._is_changed:
            self._is_changed = False
            self._step.write_prompts(torch.from_numpy(self.req_states.prompt_len.np.copy()))

    def is_served_by_vllm(self, logits: torch.Tensor, input_batch: Any) -> bool:
        """Whether a step is vLLM's own."""
        step = self._step
        if step is None:
            return True
        if logits.shape[1] != step.vocab_size or len(logits) > step.max_rows:
            say_once(
                f"vLLM's own sampler runs: logits are {tuple(logits.shape)}, and at most {step.max_rows} rows of "
                f"{step.vocab_size} were announced"
            )
            return True
        return self._served_by.most(input_batch.idx_mapping_np) == _BY_VLLM

    def dims(self, input_batch: Any, **asked: Any) -> tuple[int, int] | None:
        """How many of the most likely tokens, and how many named ones, a step reports; None for no report."""
        slots = input_batch.idx_mapping_np
        found: tuple[int, int] | None = self.get_logprobs_dims(slots, **asked) if self._scored.most(slots) else None
        return found

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        """Sample a token of each row, and return a ``SamplerOutput``."""
        if self.is_served_by_vllm(logits, input_batch):
            theirs: Any = super()
            return theirs.__call__(logits, input_batch)
        nans = hooks.number_of_nans(logits) if self.compute_nans else None
        drawn = self.draw(logits, input_batch, self.dims(input_batch))
        return hooks.sampler_output(
            drawn.tokens.view(-1, 1), drawn.logprobs, nans, input_batch.seq_lens.new_ones(input_batch.num_reqs),
            input_batch, self.req_states,
        )  # fmt: skip

    def draw(self, logits: torch.Tensor, input_batch: Any, dims: tuple[int, int] | None, bounds: Any = None) -> _Drawn:
        """The token of each row, and the log-probabilities that requests want.

        Args:
            logits: ``[rows, V]``; not written.
            input_batch: vLLM's.
            dims: see ``dims``.
            bounds: where the rows of each request begin, for the report; None for vLLM's on the host.
        """
        assert self._step is not None
        slots = input_batch.idx_mapping_np
        has_drafts = len(logits) != input_batch.num_reqs
        is_around_others = self._served_by.most(slots) == _AROUND_OTHERS
        # Else a row has seen all of its request's text. (One within a prompt has not, and nobody takes its token.)
        places = _places_of(input_batch) if has_drafts or is_around_others else None
        rows = Rows(input_batch.expanded_idx_mapping, places, has_drafts)
        foreign = None
        if is_around_others:
            assert places is not None
            context = hooks.logits_context(rows.slots, places, input_batch)
            foreign = partial(self._apply_others, context)
        asks: Distribution | None = "processed" if self._reports.most(slots) else None
        fits = dims is not None and not dims[1] and self.logprobs_mode not in _LOGITS_MODES
        if fits and dims is not None:
            fits = dims[0] <= (MOST if self.logprobs_mode == "raw_logprobs" else self._step.max_logprobs)
        sample = self._step.sample(logits, rows, foreign, asks)
        if dims is None:
            return _Drawn(sample.tokens, None, rows)
        if bounds is None and len(logits) != input_batch.num_reqs:
            bounds = input_batch.cu_num_logits_np.tolist()
        if not fits:
            source = logits if self.logprobs_mode.startswith("raw") else self._step.process(logits, rows, foreign)
            scores = hooks.scores_by_vllm(self, source, sample.tokens, dims, input_batch, bounds)
            return _Drawn(sample.tokens, scores, rows)
        if asks is None:
            found: Any = report(logits, sample.tokens, dims[0])
        else:
            found = sample
        tokens, logprobs = sample.tokens.unsqueeze(1), found.logprobs.unsqueeze(1)
        if dims[0]:
            tokens = torch.cat((tokens, found.top_tokens[:, : dims[0]]), 1)
            logprobs = torch.cat((logprobs, found.top_logprobs[:, : dims[0]]), 1)
        return _Drawn(sample.tokens, hooks.logprobs_tensors(tokens, logprobs, found.ranks, bounds), rows)

    def accept(self, drawn: _Drawn, drafts: torch.Tensor, bounds: torch.Tensor, most: int) -> Taken:
        """What each request takes of the tokens that were drawn: see ``StepOfSlots.accept``."""
        assert self._step is not None
        return self._step.accept(drawn.tokens, drawn.rows, drafts, bounds, most)

    def _apply_others(self, context: Any, logits: torch.Tensor) -> torch.Tensor:
        """What other processors and thinking budgets do, in vLLM's order."""
        for each in self._others:
            logits = each.processor.apply(logits, context)
        self.thinking_budget_state.apply(logits, context)
        return logits


class EqualTokens:
    """Before vLLM's ``RejectionSampler`` of the newer runner: a draft is accepted if it is what the request draws."""

    # What vLLM's class has.
    sampler: Any
    num_speculative_steps: int
    synthetic_conditional_rates: torch.Tensor | None
    enable_adaptive_verification: bool

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> Any:
        """Sample with drafts: of each request the accepted ones and one token more, as a ``SamplerOutput``."""
        sampler = self.sampler
        if (
            not isinstance(sampler, NewerSampler)
            or self.synthetic_conditional_rates is not None
            or sampler.is_served_by_vllm(logits, input_batch)
        ):
            theirs: Any = super()
            return theirs.__call__(logits, input_batch, draft_logits, invalid_drafts)
        nans = hooks.number_of_nans(logits) if sampler.compute_nans else None
        bounds = input_batch.cu_num_logits.clone() if self.enable_adaptive_verification else None
        # Ranks that share a batch put their reports together, and expect no named tokens in steps with drafts.
        dims = sampler.dims(input_batch, include_token_ids=not sampler.shares_batches)
        drawn = sampler.draw(logits, input_batch, dims, bounds)
        places = drawn.rows.places or _places_of(input_batch)
        drafts = hooks.drafts_to_verify(drawn.rows.slots, places, sampler.req_states.prefill_len.gpu)
        if invalid_drafts is not None:
            drafts = drafts.masked_fill(invalid_drafts, -1)
        tokens, counts = sampler.accept(drawn, drafts, input_batch.cu_num_logits, self.num_speculative_steps + 1)
        return hooks.sampler_output(tokens, drawn.logprobs, nans, counts, input_batch, sampler.req_states)


@lru_cache
def newer_sampler(theirs: type) -> type:
    """The class for the newer runner, of ours and vLLM's."""
    return type("FastLogitsSampler", (NewerSampler, theirs), {})


@lru_cache
def newer_rejection_sampler(theirs: type) -> type:
    """The class for the newer runner's drafts, of ours and vLLM's."""
    return type("FastLogitsRejectionSampler", (EqualTokens, theirs), {})
