"""Decoding with drafts, which change no token: each position draws what it would have drawn without them.

A forward pass reads the newest token and some drafts of what follows it. Each row of logits then draws with the noise
of its own position, from its own history. Drafts count while they equal what is drawn in their place; the first token
drawn that differs from its draft takes that one's place. On a GPU the forward pass and the draws are a CUDA graph for
a fixed number of drafts, as a step without drafts is.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.generation import stopping_criteria as criteria

from fastlogits.plan.plan import Plan
from fastlogits.plan.run import Run
from fastlogits.transformers import caches, loop
from fastlogits.transformers.accelerate import RunList, takes_any_length
from fastlogits.transformers.drafters import Drafter, crop
from fastlogits.transformers.graphs import GRAPHS, kind_of_plan
from fastlogits.transformers.loop import Request
from fastlogits.transformers.step import Chooser, Verification

logger = logging.getLogger("fastlogits")


def unfit(request: Request) -> str | None:
    """Why drafts can't be taken for a call; None where they can."""
    cache = request.model_kwargs.get(caches.NAME)
    if not hasattr(GenerationMixin, "_prefill") or not hasattr(cache, "activate_past_recording"):
        return "this version of transformers has no cache that takes tokens back"
    return caches.unfit(cache)


def decode(request: Request, drafter_of: Any) -> Any:
    """What ``generate`` returns for a call of one row, with drafts.

    Args:
        request: the call.
        drafter_of: makes the drafter, given the plan of the processors or None.
    """
    L = request.input_ids.shape[1]
    plan: Plan | None = loop.plan_of(request.processors, L)
    if plan is not None and not all(takes_any_length(part) for part in plan.inner_parts):
        plan = None
    return _Loop(request, plan, drafter_of(plan)).run()


class _Loop:
    """One call.

    Args:
        request: the call.
        plan: its processors, where they take positions of one row as rows of a call; else they are called one by one,
            as without drafts.
        drafter: what proposes tokens.
    """

    def __init__(self, request: Request, plan: Plan | None, drafter: Drafter) -> None:
        self._request, self._drafter, self._plan = request, drafter, plan
        self._plans = loop.plans_of(request.processors)
        config = request.config
        self._keeps_scores = bool(config.return_dict_in_generate and config.output_scores)
        self._keeps_logits = bool(config.return_dict_in_generate and config.output_logits)
        self._batched = None if plan is None else Chooser(plan, request.do_sample, self._keeps_scores)
        self._single = Chooser(Plan.compile([]), request.do_sample, False)
        self._prompt_length = int(request.input_ids.shape[1])
        self._limit = self._prompt_length + 1
        if request.stopping_criteria.max_length is not None:
            self._limit = max(self._limit, int(request.stopping_criteria.max_length))
        self._ids = request.input_ids.long()
        self._text: list[int] = self._ids[0].tolist()
        self._ends = [each for each in request.stopping_criteria if type(each) is criteria.EosTokenCriteria]
        self._rest = loop.rest_of(request.stopping_criteria)
        self._scores: tuple[torch.Tensor, ...] = ()
        self._logits: tuple[torch.Tensor, ...] = ()
        self._done = False

    def run(self) -> Any:
        """Decode, and make of it what ``generate`` returns."""
        request, model = self._request, self._request.model
        crossed = bool(model.config.is_encoder_decoder)
        given = dict(request.model_kwargs)
        outputs = model._prefill(request.input_ids, request.config, given, is_first_iteration=True)
        given = model._update_model_kwargs_for_generation(outputs, given, is_encoder_decoder=crossed)
        self._accept(outputs.logits[:, -1:], [])
        del outputs
        accepted: list[int] = []
        with GRAPHS.reserved(model.device) as mine:
            if mine and self._is_captured():
                with self._drafter.captured():
                    accepted = self._verify(given)
                if accepted:
                    count = sum(accepted) + len(accepted)
                    given = model._update_model_kwargs_for_generation(
                        {}, given, is_encoder_decoder=crossed, num_new_tokens=count
                    )
        cache = given[caches.NAME]
        self._go_on(given, accepted, crossed)
        if request.streamer is not None:
            request.streamer.end()
        logger.info("drafts: %d accepted in %d steps", sum(accepted), len(accepted))
        scores = self._scores if self._keeps_scores else None
        output = loop.output_of(request, self._ids, scores, self._logits if self._keeps_logits else None, cache)
        if request.config.return_dict_in_generate:
            output.accepted_drafts = tuple(accepted)
        return output

    def _drafts(self) -> list[int]:
        most = self._limit - len(self._text) - 1
        return self._drafter.propose(self._text, most) if most > 0 else []

    def _is_changed(self) -> bool:
        """Whether processors have been set to something else; then they are called one by one."""
        if self._batched is not None and loop.plans_of(self._request.processors) != self._plans:
            self._batched = None
        return self._batched is None

    # -- Steps that a GPU captures

    @property
    def _kind(self) -> Any:
        plan = None if self._plan is None else kind_of_plan(self._plan)
        return "drafts", self._drafter.most, plan, self._request.do_sample

    def _is_captured(self) -> bool:
        """Whether the steps are such that a GPU captures them."""
        model = self._request.model
        return self._batched is not None and not loop.reason_of(self._request) and not GRAPHS.refused(model, self._kind)

    def _verify(self, given: dict[str, Any]) -> list[int]:
        """Take captured steps until the end, or until processors change; how many drafts each has confirmed."""
        request, model, width = self._request, self._request.model, self._drafter.most + 1
        cache = given[caches.NAME]
        first = int(cache.get_seq_length())
        start = loop.start_of(request, given)
        step = self._step(start, first, width)
        step.begin(start)
        accepted: list[int] = []
        cached = first
        while not self._done and not self._is_changed():
            drafts = self._drafts()
            step.verify(self._text[-1], drafts, len(self._text) - 1, cached)
            if step.tokens.device.type == "cuda":
                loop.advance(step, model, model.__call__, len(accepted) + 1, self._kind)
            else:
                step.advance(model, model.__call__)
            scores = step.scores if self._keeps_scores else None
            drawn = self._by_row(step.drawn, scores)
            count = self._take_in(drawn, step.logits, drafts)
            cached += count
            accepted.append(count - 1)
            self._drafter.hear(len(drafts), count - 1)
        if request.config.return_dict_in_generate or getattr(cache, "_is_user_defined", False) or not self._done:
            step.append_to(cache, first, cached)
        return accepted

    def _step(self, start: Any, cached: int, width: int) -> Verification:
        """The step that is kept for this kind of call, or a new one."""
        request, model = self._request, self._request.model
        left = self._limit - self._prompt_length
        history, cache_length = loop.rounded(self._limit + width), loop.rounded(cached + left + width)
        keeps = (self._keeps_scores, self._keeps_logits)
        key = loop.key_of(model, start, self._kind, *keeps, history, cache_length)
        step = GRAPHS.get(model, key)
        if not isinstance(step, Verification):
            assert self._plan is not None
            chooser = Chooser(self._plan, request.do_sample, self._keeps_scores)
            with torch.inference_mode(False), torch.no_grad():
                masked = loop.masked_of(model)
                step = Verification(start, history, cache_length, chooser, self._keeps_logits, masked, width)
            GRAPHS.keep(model, key, step)
        return step

    # -- Steps as they are

    def _go_on(self, given: dict[str, Any], accepted: list[int], crossed: bool) -> None:
        """Take steps until the end, and note how many drafts each has confirmed."""
        model, cache = self._request.model, given[caches.NAME]
        cache.activate_past_recording()
        while not self._done:
            self._is_changed()
            drafts = self._drafts()
            outputs = self._forward(given, drafts, crossed)
            count = self._accept(outputs.logits[:, -1 - len(drafts) :], drafts)
            accepted.append(count - 1)
            self._drafter.hear(len(drafts), count - 1)
            crop(cache, len(drafts) - (count - 1))
            given = model._update_model_kwargs_for_generation(
                outputs, given, is_encoder_decoder=crossed, num_new_tokens=count
            )
        for layer in getattr(cache, "self_attention_cache", cache).layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def _forward(self, given: dict[str, Any], drafts: list[int], crossed: bool) -> Any:
        """The model's outputs for the newest token and some drafts."""
        count, device = len(drafts), self._ids.device
        given = dict(given)
        ids = torch.cat([self._ids, torch.tensor([drafts], dtype=torch.int64, device=device)], 1)
        for name in ("decoder_attention_mask",) if crossed else ("attention_mask", "token_type_ids"):
            value = given.get(name)
            if value is not None:
                given[name] = torch.cat([value, value[:, -1:].expand(-1, count)], 1)
        name = "decoder_position_ids" if crossed else "position_ids"
        if given.get(name) is not None:
            last = given[name][..., -1:]
            given[name] = torch.cat([given[name], last + torch.arange(1, count + 1, device=last.device)], -1)
        model = self._request.model
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=count + 1, **given)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count + 1
        return model(**inputs, return_dict=True)

    def _accept(self, logits: torch.Tensor, drafts: list[int]) -> int:
        """Append the tokens that are drawn from logits ``[1, N, V]`` while the drafts before them were right.

        Returns:
            How many were appended: one more than drafts were accepted.
        """
        rows = logits[0].to(copy=True, dtype=torch.float32, device=self._ids.device)
        return self._take_in(None if self._batched is None else self._draw_together(rows, drafts), rows, drafts)

    def _take_in(
        self, together: list[tuple[int, torch.Tensor | None]] | None, rows: torch.Tensor | None, drafts: list[int]
    ) -> int:
        """Append tokens while the drafts before them were right; those of rows ``[N, V]``, if not drawn together."""
        count = 0
        for i in range(len(drafts) + 1):
            row = None if rows is None else rows[i : i + 1]
            if together is None:
                assert row is not None
                token, scores = self._draw(row)
            else:
                token, scores = together[i]
            self._append(token, scores, row)
            count += 1
            if self._done or i == len(drafts) or token != drafts[i]:
                break
            if together is not None and self._is_changed():  # what follows was drawn by what they were before
                break
        return count

    @staticmethod
    def _by_row(tokens: torch.Tensor, scores: torch.Tensor | None) -> list[tuple[int, torch.Tensor | None]]:
        kept = [None if scores is None else scores[i : i + 1] for i in range(len(tokens))]
        return list(zip(tokens.tolist(), kept, strict=True))

    def _noise(self) -> torch.Tensor:
        return self._request.starts + (len(self._text) - self._prompt_length)

    def _draw_together(self, rows: torch.Tensor, drafts: list[int]) -> list[tuple[int, torch.Tensor | None]]:
        """The tokens of all rows, and their processed scores where these are kept."""
        assert self._batched is not None
        N, device, seen = len(rows), rows.device, len(self._text)
        ids = torch.tensor([self._text + drafts], device=device).expand(N, -1)
        step = torch.arange(N, device=device)
        run = Run(self._prompt_length, seen - 1 + step)
        tokens, scores = self._batched(ids, rows, self._request.seeds.expand(N).contiguous(), self._noise() + step, run)
        return self._by_row(tokens, scores if self._keeps_scores else None)

    def _draw(self, row: torch.Tensor) -> tuple[int, torch.Tensor | None]:
        """The token of one row, by processors that are called as without drafts."""
        processors: RunList = self._request.processors
        scores = processors(self._ids, row)
        tokens, _ = self._single(self._ids, scores, self._request.seeds, self._noise(), Run())
        return int(tokens[0]), scores

    def _append(self, token: int, scores: torch.Tensor | None, logits: torch.Tensor | None) -> None:
        """Append a token, and find out whether it is the last."""
        request = self._request
        tokens = torch.tensor([token], device=self._ids.device)
        self._ids = torch.cat([self._ids, tokens.unsqueeze(1)], 1)
        self._text.append(token)
        if self._keeps_scores and scores is not None:
            self._scores += (scores.clone(),)
        if self._keeps_logits and logits is not None:
            self._logits += (logits.clone(),)
        if request.streamer is not None:
            request.streamer.put(tokens.cpu())
        self._done = len(self._text) >= self._limit and request.stopping_criteria.max_length is not None
        kept = self._scores if self._keeps_scores else None
        for each in [*self._ends, *self._rest]:
            self._done = bool(torch.as_tensor(each(self._ids, kept)).all()) or self._done
