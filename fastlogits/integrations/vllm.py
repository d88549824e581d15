r"""A logits processor for vLLM, of both its interfaces: requests ask for what vLLM lacks.

Installed with fastlogits as an entry point of vLLM, so the engine needs no option when it starts. It does nothing,
and takes no memory, until a request asks for something:

    SamplingParams(temperature=0.7, extra_args={"fastlogits": {"no_repeat_ngram_size": 3}})

Over HTTP, whose extra arguments hold text and numbers only, the value is the same in JSON:

    "vllm_xargs": {"fastlogits": "{\"no_repeat_ngram_size\": 3}"}
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastlogits.integrations.vllm_hooks import config_of_caller, keep_outputs

if TYPE_CHECKING:
    from fastlogits.integrations.requests import LiveBatch, LiveRequest, Refuse, RequestOptions
    from fastlogits.serving.batch import BatchProcessor

# vLLM treats lower temperatures as greedy decoding.
_GREEDY = 1e-5
# Rows that there is room for at first. Each row takes a bit for each token for some sets of tokens.
_FEW_ROWS = 64


def _interfaces() -> tuple[type, ...]:
    """The classes of logits processors of the installed vLLM: its older runner's, its newer runner's, or both."""
    found = []
    for module in ("vllm.v1.sample.logits_processor", "vllm.v1.worker.gpu.sample.logits_processor"):
        with suppress(ImportError):
            found.append(import_module(module).LogitsProcessor)
    return tuple(found)


class FastLogitsProcessor(*_interfaces()):  # type: ignore[misc]
    """Applies the options that requests have in ``SamplingParams(extra_args={"fastlogits": {...}})``.

    The options are the fields of ``RequestParams`` that vLLM has no argument for, or that it does more slowly:
    ``banned_token_ids``, ``bad_words`` (as token ids), ``no_repeat_ngram_size``, ``dry_multiplier``, ``dry_base``,
    ``dry_allowed_length``, ``dry_breakers``, ``first_tokens_suppressed``, ``first_window``, ``forced_tokens``,
    ``top_n_sigma``, and ``typical_p``, ``epsilon``, ``eta``, ``top_h`` and ``top_a`` at its temperature. They act on
    the logits before vLLM's temperature, min-p, top-k and top-p. In vLLM's newer runner they see penalties applied
    already, in its older one penalties come after them; bans, bias and bad words of vLLM's own come before them in
    both. What vLLM has an argument for is refused here, so that nothing is applied twice. Values out of range and token
    ids outside the vocabulary are refused when the request comes in. If a running request has an option that can't be
    honoured, the others are, and a warning names it.

    vLLM's older runner calls ``update_state`` and ``apply(logits)``, its newer one ``add_request``,
    ``apply_staged_writes`` and ``apply(logits, context)``, also with the rows of speculative decoding. With speculative
    decoding the older runner loads no logits processors at all, so requests that ask for something are refused there.
    """

    _instances: ClassVar[weakref.WeakSet[FastLogitsProcessor]] = weakref.WeakSet()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Check the options of a new request.

        Raises:
            ValueError: see ``read_options``; forced tokens beside a grammar, which may forbid them; or the older runner
                with speculative decoding.
        """
        if (sampling_params.extra_args or {}).get("fastlogits") is None:
            return
        config = config_of_caller()
        if config is not None and config.speculative_config is not None and not _is_newer(config):
            raise ValueError(
                f"{_WHERE} must be left out with speculative decoding, for which vLLM's older runner loads no logits "
                "processors: start the engine with VLLM_USE_V2_MODEL_RUNNER=1, or without speculative decoding"
            )
        _options(sampling_params, None if config is None else config.model_config.get_vocab_size())

    def __init__(self, vllm_config: Any, place: Any, is_pin_memory: bool | None = None) -> None:
        # The older runner gives a device and whether memory is pinned, the newer one the state of its requests.
        self._config = vllm_config
        self._older = _OlderRunner(vllm_config) if is_pin_memory is not None else None
        self._newer = _NewerRunner(place) if is_pin_memory is None else None
        # Named beside the entry point, the class is loaded twice; then the first instance does it all.
        self._is_second = any(other._config is vllm_config for other in self._instances)
        self._instances.add(self)

    def is_argmax_invariant(self) -> bool:
        """It isn't: bans change which token is the most likely."""
        return False

    def wait(self) -> None:
        """Newer runner: read what requests ask for no earlier than ``apply`` is called, since the sampler is ours."""
        assert self._newer is not None
        self._newer.waits = True

    def update_state(self, batch_update: Any) -> None:
        """Older runner: requests that were removed, added or moved."""
        assert self._older is not None
        if batch_update is not None and not self._is_second:
            self._older.update(batch_update)
            if self._older.requests:
                keep_outputs()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Newer runner: a request takes a slot."""
        assert self._newer is not None
        return not self._is_second and self._newer.add(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """Newer runner: the state of the requests is on the device."""
        assert self._newer is not None
        self._newer.write()

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Process the logits of a step, in place."""
        if self._newer is not None:
            return self._newer.apply(logits, ctx)
        assert self._older is not None
        return self._older.apply(logits)


_WHERE = "extra_args['fastlogits']"


def _is_newer(config: Any) -> bool:
    return bool(getattr(config, "use_v2_model_runner", False))


def _options(sampling_params: Any, vocab_size: int | None, refuse: Refuse | None = None) -> RequestOptions | None:
    """What a request asks for; None where that is nothing."""
    given = (sampling_params.extra_args or {}).get("fastlogits")
    if given is None:
        return None
    from fastlogits.integrations.requests import EDITS, TRUNCATIONS, read_options

    temperature = sampling_params.temperature if sampling_params.temperature >= _GREEDY else 0.0
    options = read_options(given, EDITS + TRUNCATIONS, _WHERE, temperature, vocab_size, refuse)
    if options.edits.forced_tokens and getattr(sampling_params, "structured_outputs", None) is not None:
        message = f"{_WHERE}: forced_tokens must be left out beside structured outputs, whose grammar may forbid them"
        if refuse is None:
            raise ValueError(message)
        refuse(message)
        options = options._replace(edits=replace(options.edits, forced_tokens=()))
    return options


def running_options(sampling_params: Any, vocab_size: int | None) -> RequestOptions | None:
    """The same in an engine's worker, which logs what it can't honour: an exception would stop the other requests."""
    left_out: list[str] = []
    options = _options(sampling_params, vocab_size, left_out.append)
    if options is None:
        return None
    from fastlogits.integrations.requests import say_left_out

    say_left_out(left_out)
    return None if options.is_nothing else options


class _OlderRunner:
    """Rows of logits are requests in the order of their indices, their tokens are lists on the host."""

    def __init__(self, vllm_config: Any) -> None:
        self.requests: dict[int, LiveRequest] = {}
        # The largest batch could take gigabytes, so it begins small and grows when it has to.
        self._max_requests: int = min(64, vllm_config.scheduler_config.max_num_seqs)
        self._max_length: int = min(4096, vllm_config.model_config.max_model_len)
        self._batch: LiveBatch | None = None

    def update(self, changes: Any) -> None:
        """Follow the indices of the requests, in vLLM's order: removed, added, moved."""
        requests = self.requests
        for index in changes.removed:
            self._release(index)
        for index, sampling_params, prompt, outputs in changes.added:
            self._release(index)
            options = running_options(sampling_params, None)
            if options is not None:
                from fastlogits.integrations.requests import LiveRequest

                requests[index] = LiveRequest(options, prompt or (), outputs)
        for source, target, direction in changes.moved:
            moved, met = requests.pop(source, None), requests.pop(target, None)
            if moved is not None:
                requests[target] = moved
            if met is not None:
                requests[source] = met
                if direction.name != "SWAP":
                    self._release(source)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self.requests:
            return logits
        if self._batch is None:
            from fastlogits.integrations.requests import LiveBatch

            self._batch = LiveBatch(logits.shape[1], logits.device, self._max_requests, self._max_length, "vllm")
        return self._batch.process_(logits, [self.requests.get(row) for row in range(logits.shape[0])])

    def _release(self, index: int) -> None:
        request = self.requests.pop(index, None)
        if request is not None and self._batch is not None:
            self._batch.release(request)


class _NewerRunner:
    """Rows of logits name their slots, whose tokens are on the device; draft tokens are among the rows' inputs."""

    def __init__(self, states: Any) -> None:
        self._states = states
        self._options: dict[int, RequestOptions] = {}
        self._new: list[int] = []
        self._tables: _Tables | None = None
        self.waits = False
        self._waiting: dict[int, Any] = {}

    def add(self, slot: int, sampling_params: Any) -> bool:
        if self.waits:
            self._waiting[slot] = sampling_params
            return (sampling_params.extra_args or {}).get("fastlogits") is not None
        options = running_options(sampling_params, self._states.vocab_size)
        if slot in self._options:
            del self._options[slot]
            self._new.append(slot)
        if options is not None:
            self._options[slot] = options
            self._new.append(slot)
        return options is not None

    def write(self) -> None:
        if not self._new:
            return
        if self._tables is None:
            self._tables = _Tables(self._states, _FEW_ROWS)
        self._put(self._new)
        self._new.clear()

    def apply(self, logits: torch.Tensor, context: Any) -> torch.Tensor:
        if self._waiting:
            self._take_over()
        options = self._options
        if not options or not any(slot in options for slot in context.idx_mapping_np.tolist()):
            return logits
        assert self._tables is not None
        if len(logits) > self._tables.max_rows:
            self._tables = _Tables(self._states, 2 * len(logits))
            self._put(options)
        self._tables.apply_(logits, context)
        return logits

    def _take_over(self) -> None:
        """Add the requests that have come in meanwhile."""
        waiting, self._waiting, self.waits = self._waiting, {}, False
        for slot, sampling_params in waiting.items():
            self.add(slot, sampling_params)
        self.write()
        self.waits = True

    def _put(self, slots: Iterable[int]) -> None:
        assert self._tables is not None
        for slot in slots:
            self._tables.put(slot, self._options.get(slot), int(self._states.prompt_len.np[slot]))


class _Tables:
    """What the newer runner's slots ask for."""

    def __init__(self, states: Any, max_rows: int) -> None:
        from fastlogits.integrations.requests import MAX_LISTED, TruncationFilter
        from fastlogits.serving.batch import BatchProcessor

        self.max_rows = max_rows
        tokens, lengths = states.all_token_ids.gpu, states.total_len.gpu
        S, V, device = states.max_num_reqs, states.vocab_size, tokens.device
        # The runner's own prompt lengths are in another buffer at every step.
        self._prompts = torch.zeros(S, dtype=torch.int32, device=device)
        self._batch: BatchProcessor = BatchProcessor(
            S, V, device, semantics="vllm", max_rows=max_rows, max_listed=MAX_LISTED,
            history=(tokens, self._prompts, lengths),
        )  # fmt: skip
        self._filter = TruncationFilter(S, V, device, max_rows, "vllm")
        # Of each slot its own number where it asks for something, else -1.
        self._slots = torch.full((2, S), -1, dtype=torch.int32, device=device)

    def put(self, slot: int, options: RequestOptions | None, prompt_length: int) -> None:
        if slot in self._batch:
            self._batch.remove(slot)
        self._filter.put(slot, None)
        self._slots[:, slot].fill_(-1)
        if options is None:
            return
        self._prompts[slot].fill_(prompt_length)
        self._batch.add(options.edits, slot=slot)
        self._filter.put(slot, options.truncations)
        self._slots[: 1 + (options.truncations is not None), slot].fill_(slot)

    def apply_(self, logits: torch.Tensor, context: Any) -> None:
        slots = self._slots.index_select(1, context.expanded_idx_mapping)
        self._batch.apply_(
            logits, slots[0], context.pos, draft_ids=context.input_ids, local_position=context.expanded_local_pos
        )
        if len(self._filter):
            self._filter.filter_(logits, slots[1], context.pos)
