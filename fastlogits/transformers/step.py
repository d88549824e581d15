"""One step of decoding, on buffers: forward, processors, token, append. On a GPU it is a CUDA graph, replayed.

All that changes from step to step, or from call to call, is in tensors of a fixed place: the history with its length,
the positions, the seeds, the masks, which rows have finished. So a step asks the host nothing.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from fastlogits_kernels.selection import launch

from fastlogits.plan import chance
from fastlogits.plan.allowed import AllowedRows
from fastlogits.plan.plan import Plan
from fastlogits.plan.run import Run
from fastlogits.sampling import FusedDraw, Sampler
from fastlogits.transformers.attention import grouped
from fastlogits.transformers.caches import NAME, FixedCache
from fastlogits.transformers.values import Values, values_of


class _Processors:
    """What a draw asks of a list: its plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


class Chooser:
    """From logits to tokens.

    Args:
        plan: the processors.
        do_sample: whether tokens are drawn; else the likeliest are taken.
        keeps_scores: whether somebody asks for the processed scores. Where nobody does, they are written nowhere.
    """

    def __init__(self, plan: Plan, do_sample: bool, keeps_scores: bool) -> None:
        self.plan = plan
        processors: Any = _Processors(plan)
        self._fused = None if keeps_scores else FusedDraw(processors, None if do_sample else 0.0, seeded=do_sample)
        self._sampler = Sampler() if do_sample else None

    def values(self, logits: torch.Tensor) -> Values | None:
        """The numbers that it reads from tensors, where nothing else of the processors differs from call to call."""
        if self._fused is None or not launch.takes_scores(logits):
            return None
        return values_of(self._fused, self.plan, logits)

    def __call__(
        self, ids: torch.Tensor, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, run: Run
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The tokens ``[B]``, and the processed scores ``[B, V]`` where they are written."""
        if self._fused is not None and launch.takes_scores(logits):
            return self._fused(logits, seeds, positions, ids, run)[0], None
        if self._sampler is None:
            scores = self.plan(ids, logits, run)
            return scores.argmax(-1), scores
        with chance.by_seeds(seeds, positions):
            scores = self.plan(ids, logits, run)
        return self._sampler(scores, seeds, positions).tokens, scores


class Start(NamedTuple):
    """What a call brings, once its prompt has been read."""

    input_ids: torch.Tensor
    """The prompt ``[B, L]``."""
    cache: Any
    """The cache that holds it."""
    mask: torch.Tensor | None
    """Which of the cached tokens count, ``[B, N]``; None for all."""
    position_ids: torch.Tensor | None
    """Where the next token stands, ``[B, 1]``; None where the model counts itself."""
    others: dict[str, Any]
    """What else the model is given at each step."""
    seeds: torch.Tensor
    """The seed of each row, ``[B]``."""
    starts: torch.Tensor
    """Where its positions start, ``[B]``."""
    eos: torch.Tensor
    """The tokens that end a text, ``[N]``; -1 for none."""
    pad: torch.Tensor | None
    """What a row gets after its end; None where it just goes on."""


class Step:
    """The buffers of one kind of call, and the step that works on them.

    Args:
        start: a call of that kind.
        history: tokens that there is room for in a row.
        cache_length: tokens that there is room for in the cache.
        chooser: from logits to tokens.
        keeps_logits: whether somebody asks for the logits.
        masked: the name of what masks cached tokens; other names in ``start.others`` are handed on.
    """

    def __init__(
        self, start: Start, history: int, cache_length: int, chooser: Chooser, keeps_logits: bool, masked: str
    ) -> None:
        B, device = start.input_ids.shape[0], start.input_ids.device
        self.chooser, self.keeps_logits, self._masked = chooser, keeps_logits, masked
        self._fixed = FixedCache(start.cache, cache_length)
        self.history = torch.zeros(B, history, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(B, dtype=torch.int64, device=device)
        self.finished = torch.zeros(B, dtype=torch.bool, device=device)
        self.done = torch.zeros((), dtype=torch.bool, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._prompt_length = torch.zeros((), dtype=torch.int64, device=device)
        self._seeds, self._noise = self.tokens.clone(), self.tokens.clone()
        self._mask = torch.ones(B, cache_length, dtype=torch.bool, device=device)
        self._position_ids = None if start.position_ids is None else start.position_ids.clone()
        self._others = {name: _copied(value) for name, value in start.others.items()}
        self._eos, self._pad = start.eos.clone(), self._position.clone()
        self._pads = self.done.clone()
        self._run = Run(self._prompt_length, self._position)
        self.logits: torch.Tensor | None = None
        """The logits ``[B, V]`` of the last step, where somebody asks for them."""
        self.scores: torch.Tensor | None = None
        """The processed scores of the last step, where they are written."""
        self.graph: torch.cuda.CUDAGraph | None = None
        self.replays = 0
        """How often the graph has been replayed."""
        self._captured: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._captured_draw: tuple[Chooser, Values | None] | None = None

    def choose_by(self, chooser: Chooser, values: Values | None) -> None:
        """Let the processors of a call of the same kind choose; a graph gets their numbers."""
        self.chooser = chooser
        if self.graph is None or self._captured_draw is None:
            self._captured_draw = (chooser, values)
        elif values is not None and self._captured_draw[1] is not None:
            values.put_into(self._captured_draw[1])

    def begin(self, start: Start) -> None:
        """Take over what a call brings."""
        L = start.input_ids.shape[1]
        self._fixed.load(start.cache)
        self.history[:, :L].copy_(start.input_ids)
        self.history[:, L:].zero_()
        self._position.fill_(L - 1)  # of all lanes, where there are several
        self._prompt_length.fill_(L)
        self._seeds.copy_(start.seeds)
        self._noise.copy_(start.starts)
        self._mask.fill_(True)
        if start.mask is not None:
            known = start.mask[:, : self._mask.shape[1]]
            self._mask[:, : known.shape[1]].copy_(known)
        if self._position_ids is not None and start.position_ids is not None:
            self._position_ids.copy_(start.position_ids)
        for name, value in start.others.items():
            _copy_into(self._others[name], value)
        self._eos.copy_(start.eos)
        self._pads.fill_(start.pad is not None)
        if start.pad is not None:
            self._pad.copy_(start.pad.reshape(()))
        self.finished.zero_()
        self.done.zero_()
        self.forget_prompt()

    def forget_prompt(self) -> None:
        """Let what was built of the prompt be built again: in each call, and in the graph."""
        self._run.forget(AllowedRows)

    def take(self, logits: torch.Tensor) -> None:
        """From the logits of the newest token, float32 ``[B, V]``, to the next one, which is appended."""
        tokens, scores = self.chooser(self.history, logits, self._seeds, self._noise, self._run)
        self.append(tokens)
        self.logits = logits if self.keeps_logits else None
        self.scores = scores

    def append(self, tokens: torch.Tensor) -> None:
        """Append a token ``[B]`` to each row."""
        tokens = torch.where(self.finished & self._pads, self._pad, tokens)
        self.tokens.copy_(tokens)
        self._position.add_(1)
        self.history.index_copy_(1, self._position.reshape(1), tokens.unsqueeze(1))
        self._noise.add_(1)
        self.finished.logical_or_((tokens.unsqueeze(1) == self._eos).any(1))
        self.done.copy_(self.finished.all())

    def forward(self, model: Any, call: Callable[..., Any]) -> torch.Tensor:
        """The logits of the newest token, float32 ``[B, V]``."""
        given = {**self._others, NAME: self._fixed.cache}
        given[self._masked] = self._mask
        if self._position_ids is not None:
            given["position_ids"] = self._position_ids
        inputs = model.prepare_inputs_for_generation(self.tokens.unsqueeze(1), next_sequence_length=1, **given)
        with grouped():
            outputs = call(**inputs, return_dict=True)
        if self._position_ids is not None:
            self._position_ids.add_(1)
        logits: torch.Tensor = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
        return logits

    def advance(self, model: Any, call: Callable[..., Any]) -> None:
        """One step: by the graph, if there is one."""
        if self.graph is None:
            self.take(self.forward(model, call))
            return
        self.graph.replay()
        self.replays += 1
        self.logits, self.scores = self._captured

    def capture(self, model: Any, call: Callable[..., Any], pool: Any, stream: torch.cuda.Stream) -> None:
        """Capture the step; it isn't taken. What it allocates is in ``pool``, as ``CUDAGraph.pool()`` names it.

        ``stream`` is one on which nothing runs but captures: the workspace that cuBLAS makes for a stream is then in
        the pool, where nobody else gets it once cuBLAS is told to give it up.

        Raises:
            Exception: what the step raises, or what CUDA does; then there is no graph.
        """
        self.forget_prompt()
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.tokens.device.index or 0]
        random_state = generator.clone_state()
        shared = {} if pool is None else {"pool": pool}
        stream.wait_stream(torch.cuda.current_stream())
        with _no_collection(), torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local", **shared)
            try:
                self.take(self.forward(model, call))
            except BaseException:
                with suppress(Exception):  # the capture has failed, as CUDA then says too
                    graph.capture_end()
                # The state that was captured believes to be in a capture for ever.
                generator.graphsafe_set_state(random_state)
                raise
            graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._captured = (self.logits, self.scores)
        self.graph = graph

    def append_to(self, cache: Any, start: int, stop: int) -> None:
        """Give a cache what the tokens from ``start`` to ``stop`` have left in this one."""
        self._fixed.append_to(cache, start, stop)

    def release(self) -> None:
        """Drop the graph, once nothing of it runs any more."""
        if self.graph is not None:
            with suppress(Exception):  # at the end of a process there may be no device left
                torch.cuda.synchronize(self.tokens.device)
            self.graph.reset()
        self._captured_draw = None
        self.graph, self._captured, self.logits, self.scores = None, (None, None), None, None


class Verification(Step):
    """The step that reads the newest token and some drafts of one row, and draws a token behind each of them.

    Args:
        start: a call of that kind, of one row.
        history: tokens that there is room for in the row, drafts included.
        cache_length: tokens that there is room for in the cache, drafts included.
        chooser: from logits to tokens.
        keeps_logits: whether somebody asks for the logits.
        masked: see ``Step``.
        width: how many tokens are read, W.
    """

    def __init__(
        self,
        start: Start,
        history: int,
        cache_length: int,
        chooser: Chooser,
        keeps_logits: bool,
        masked: str,
        width: int,
    ) -> None:
        super().__init__(start, history, cache_length, chooser, keeps_logits, masked)
        device = self.tokens.device
        self._lanes = torch.arange(width, device=device)
        self._position = self._lanes.clone()
        self._run = Run(self._prompt_length, self._position)
        self.drawn = self._lanes.clone()
        """The tokens ``[W]`` that were drawn."""
        self._given = torch.zeros(width + 2, dtype=torch.int64, device=device)
        self._sent = torch.zeros(width + 2, dtype=torch.int64, pin_memory=device.type == "cuda")

    def verify(self, newest: int, drafts: list[int], at: int, cached: int) -> None:
        """Say what the next step reads: the newest token at a place, drafts behind it, with so many tokens cached."""
        fed = [newest, *drafts]
        # Nothing is under way that still reads it: the host has waited for the tokens of the step before.
        self._sent.copy_(torch.tensor([at, cached, *fed, *[0] * (len(self._lanes) - len(fed))]))
        self._given.copy_(self._sent, non_blocking=True)

    def forward(self, model: Any, call: Callable[..., Any]) -> torch.Tensor:
        """The logits behind each token that is read, float32 ``[W, V]``."""
        at, cached, fed = self._given[0], self._given[1], self._given[2:]
        self._fixed.set_length(cached)
        torch.add(self._lanes, at, out=self._position)
        self.history.index_copy_(1, self._position, fed.unsqueeze(0))
        given = {**self._others, NAME: self._fixed.cache}
        given[self._masked] = self._mask
        if "logits_to_keep" in given:
            given["logits_to_keep"] = len(self._lanes)
        if self._position_ids is not None:
            # Of the first step, whose token stands right behind the prompt.
            given["position_ids"] = self._position_ids + (self._position - self._prompt_length)
        inputs = model.prepare_inputs_for_generation(fed.unsqueeze(0), next_sequence_length=len(self._lanes), **given)
        with grouped():
            outputs = call(**inputs, return_dict=True)
        logits: torch.Tensor = outputs.logits[0, -len(self._lanes) :].to(copy=True, dtype=torch.float32)
        return logits

    def take(self, logits: torch.Tensor) -> None:
        """Draw a token from each row of logits ``[W, V]``."""
        W = len(self._lanes)
        noise = self._noise + (self._position + 1 - self._prompt_length)
        seeds = self._seeds.expand(W).contiguous()
        tokens, scores = self.chooser(self.history.expand(W, -1), logits, seeds, noise, self._run)
        self.drawn.copy_(tokens)
        self.logits = logits if self.keeps_logits else None
        self.scores = scores


def on_side_stream(device: torch.device) -> Any:
    """Where a step is taken that a capture follows, as CUDA asks."""
    return _beside(device) if device.type == "cuda" else nullcontext()


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


@contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    side = _side_streams.get(device)
    if side is None:
        side = _side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


class Waits:
    """Where the host has waited for the GPU, by the warnings that torch gives; see ``watched``."""

    def __init__(self) -> None:
        self.place: str | None = None


@contextmanager
def watched() -> Iterator[Waits]:
    """Take note of the first place where the host waits for the GPU: a capture would fail there.

    Where transformers makes masks it waits only while nothing is captured.
    """
    found = Waits()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" not in str(warning.message):
            if "debug mode" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        elif found.place is None and not warning.filename.endswith("masking_utils.py"):
            found.place = f"{warning.filename}:{warning.lineno}"


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from dropping tensors, events and graphs of others meanwhile."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):  # an output of a model is one
        return type(value)(**{name: _copied(each) for name, each in value.items()})
    return value


def _copy_into(mine: Any, value: Any) -> None:
    if isinstance(mine, torch.Tensor):
        mine.copy_(value)
    elif isinstance(mine, dict):
        for name, each in value.items():
            _copy_into(mine[name], each)
