"""What proposes drafts: the text itself, where it repeats, or a smaller model.

A draft model draws with the noise of the positions, so that from a similar distribution it mostly draws the same tokens
as the model (Daliri et al., arXiv 2408.07978). On a GPU its step is a CUDA graph too.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from fastlogits.plan.plan import Plan
from fastlogits.plan.run import Run
from fastlogits.transformers import caches, loop
from fastlogits.transformers.graphs import GRAPHS, kind_of_plan
from fastlogits.transformers.loop import Request
from fastlogits.transformers.step import Chooser, Start, Verification


class Drafter(Protocol):
    """What proposes tokens."""

    @property
    def most(self) -> int:
        """How many tokens it proposes at most."""

    def propose(self, text: Sequence[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow a text."""

    def hear(self, proposed: int, accepted: int) -> None:
        """Be told how many of the proposed tokens were right."""

    def captured(self) -> AbstractContextManager[None]:
        """While this lasts, steps of its own may be captured: the graphs are reserved for this call."""


class PromptLookup:
    """Proposes what followed the text's last tokens where they stood before.

    Args:
        count: how many tokens it proposes at most.
        ngram: how many last tokens are looked for at most; fewer where that many aren't found.
    """

    def __init__(self, count: int, ngram: int) -> None:
        self._ngram = ngram
        self.most = count
        self._forget()

    def _forget(self) -> None:
        self._read: list[int] = []
        self._places: list[dict[tuple[int, ...], list[int]]] = [defaultdict(list) for _ in range(self._ngram)]

    def propose(self, text: Sequence[int], most: int) -> list[int]:
        """What followed at the latest place where as many of the last tokens stood as can be found.

        A later place with too few tokens behind it, as in a text that repeats one token, gives way to an earlier one.
        """
        text, count = list(text), min(self.most, most)
        self._note(text)
        for size in range(min(self._ngram, len(text) - 1), 0, -1):
            places = self._places[size - 1].get(tuple(text[-size:]))
            if places:
                full = bisect_right(places, len(text) - count)  # so many have enough tokens behind them
                place = places[max(full - 1, 0)]
                return text[place : place + count]
        return []

    def _note(self, text: list[int]) -> None:
        """Note what stands before each token of a text, as far as it hasn't been read."""
        if self._read != text[: len(self._read)]:
            self._forget()
        for place in range(max(1, len(self._read)), len(text)):
            for size in range(1, min(self._ngram, place) + 1):
                self._places[size - 1][tuple(text[place - size : place])].append(place)
        self._read = text

    def hear(self, proposed: int, accepted: int) -> None:
        """Nothing is learnt from it."""

    def captured(self) -> AbstractContextManager[None]:
        """It takes no steps."""
        return nullcontext()


class DraftModel:
    """Proposes what a smaller model draws, with the noise of the positions.

    Args:
        model: the smaller model, of the same vocabulary.
        request: the call.
        plan: its processors, for positions of one row as rows of a call; None where they don't take that.
    """

    def __init__(self, model: Any, request: Request, plan: Plan | None) -> None:
        self._model, self._request = model, request
        self._plan = Plan.compile([]) if plan is None else plan
        self._chooser = Chooser(self._plan, request.do_sample, False)
        # Layers with a window keep the whole text too, so that any of it can be taken back; the mask has the window.
        self._cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if caches.unfit(self._cache) is None:
            self._cache = DynamicCache()
        else:
            self._cache.activate_past_recording()
        self._seen: list[int] = []
        """The tokens whose states are cached."""
        mask = request.model_kwargs.get("attention_mask")
        L = request.input_ids.shape[1]
        # Of one row, tokens that don't count can be left out.
        self._skipped = 0 if mask is None else int((mask[0, -L:] == 0).sum()) if L else 0
        config = model.generation_config
        self._count = int(getattr(config, "num_assistant_tokens", None) or 5)
        self.most = max(16, self._count)
        self._adapts = str(getattr(config, "num_assistant_tokens_schedule", "constant")).startswith("heuristic")
        self._captures = False
        self._step: Verification | None = None
        self._steps = 0

    def propose(self, text: Sequence[int], most: int) -> list[int]:
        """What the model draws, token after token."""
        text = list(text)
        said: list[int] = []
        if len(text) <= self._skipped:
            return said
        self._take_back(text[self._skipped :])
        for _ in range(min(self._count, most)):
            said.append(self._next(text) if self._captures and self._seen else self._next_uncaptured(text))
            text.append(said[-1])
        return said

    def hear(self, proposed: int, accepted: int) -> None:
        """With the heuristic schedule, propose more after all were right, and fewer else."""
        if self._adapts and proposed:
            self._count = min(self.most, self._count + 2) if accepted == proposed else max(1, self._count - 1)

    def _take_back(self, text: list[int]) -> None:
        """Drop from the cache what isn't in a text, and its last token, which is read again for its logits.

        Once for each text: a layer with a window then forgets what it doesn't need to go on from there.
        """
        same = min(len(self._seen), len(text) - 1)
        while self._seen[:same] != text[:same]:
            same -= 1
        if self._seen:
            if self._step is None:
                crop(self._cache, len(self._seen) - same)
            self._seen = self._seen[:same]

    # -- Steps as they are

    def _next_uncaptured(self, text: list[int]) -> int:
        request, L, device = self._request, self._request.input_ids.shape[1], self._model.device
        logits = self._logits(text[self._skipped :])
        ids = torch.tensor([text], device=device)
        noise = request.starts.to(device) + (len(text) - L)
        at = torch.tensor([len(text) - 1], device=device)
        tokens, _ = self._chooser(ids, logits, request.seeds.to(device), noise, Run(L, at))
        return int(tokens[0])

    def _logits(self, text: list[int]) -> torch.Tensor:
        """The logits ``[1, V]`` behind a text, of which only what isn't cached is read."""
        new = torch.tensor([text[len(self._seen) :]], device=self._model.device)
        outputs = self._model(input_ids=new, use_cache=True, return_dict=True, **{caches.NAME: self._cache})
        self._seen = list(text)
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits

    # -- Steps that a GPU captures

    @contextmanager
    def captured(self) -> Iterator[None]:
        """While this lasts, its steps are captured, if they are such that a GPU captures them."""
        model = self._model
        self._captures = (
            model.device == self._request.model.device
            and caches.unfit(self._cache) is None
            and loop.reason_of_model(model) is None
            and GRAPHS.refused(model, self._kind) is None
        )
        try:
            yield
        finally:
            if self._step is not None:
                cached = int(self._cache.get_seq_length())
                self._step.append_to(self._cache, cached, len(self._seen))
                crop(self._cache, max(0, cached - len(self._seen)))
            self._captures, self._step = False, None

    @property
    def _kind(self) -> Any:
        return "draft model", kind_of_plan(self._plan), self._request.do_sample

    def _next(self, text: list[int]) -> int:
        """The token behind a text, by a step for each token that isn't cached yet."""
        if self._step is None:
            self._step = self._begun(text)
        step, own = self._step, text[self._skipped :]
        for cached in range(len(self._seen), len(own)):
            step.verify(own[cached], [], cached + self._skipped, cached)
            self._steps += 1
            if step.tokens.device.type == "cuda":
                loop.advance(step, self._model, self._model.__call__, self._steps, self._kind)
            else:
                step.advance(self._model, self._model.__call__)
            drawn = int(step.drawn[0])  # the host waits, so that it may write what the next step reads
        self._seen = own
        return drawn

    def _begun(self, text: list[int]) -> Verification:
        """The step that is kept for this kind of call, or a new one, with what is cached so far."""
        request, model, device = self._request, self._model, self._model.device
        L = request.input_ids.shape[1]
        position_ids = None
        if "position_ids" in inspect.signature(model.forward).parameters:
            position_ids = torch.full((1, 1), L - self._skipped, device=device)
        no_eos = torch.full((8,), -1, device=device)
        start = Start(
            request.input_ids, self._cache, None, position_ids, {"use_cache": True}, request.seeds, request.starts,
            no_eos, None,
        )  # fmt: skip
        room = loop.rounded((request.stopping_criteria.max_length or len(text)) + self.most + 1)
        key = loop.key_of(model, start, self._kind, room)
        step = GRAPHS.get(model, key)
        if not isinstance(step, Verification):
            with torch.inference_mode(False), torch.no_grad():
                chooser = Chooser(self._plan, request.do_sample, False)
                step = Verification(start, room, room, chooser, False, loop.masked_of(model), 1)
            GRAPHS.keep(model, key, step)
        step.begin(start)
        step.history[0, : len(text)].copy_(torch.tensor(text))
        return step


def crop(cache: Any, count: int) -> None:
    """Take back the last tokens of a cache; with none, layers with a window drop what is beyond it."""
    if count or any(hasattr(layer, "record_past") for layer in getattr(cache, "self_attention_cache", cache).layers):
        cache.crop(-count)
