"""A serving step: one batch in which every request has its own parameters, processed by the same few launches."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast, get_args

import numpy as np
import torch
from fastlogits_kernels.rules import ORDERS, RULES, Range, RuleKind, Ties, argument_of
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.runtime.launcher import to_device
from fastlogits_kernels.serving import layout
from fastlogits_kernels.serving.layout import Rows, Semantics, Slots
from fastlogits_kernels.serving.steps import Step, append_tokens, process_rows, sample_rows, swap_slots

from fastlogits.checks import device_of, finite_number, is_integer, is_number, one_of, whole_number
from fastlogits.token_mask import TokenMask, TokenSet, checked_set, fitted

if TYPE_CHECKING:
    from fastlogits.sampling import Distribution, Sample
    from fastlogits.warm_up import WarmUp

Scope: TypeAlias = Literal["all", "output"]
Preset: TypeAlias = Literal["transformers", "vllm", "sglang"]
Call: TypeAlias = Literal["sample", "apply_", "apply", "append", "swap"]
Ids: TypeAlias = "Sequence[int] | np.ndarray[Any, Any] | torch.Tensor"
_Index: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None] | tuple[None, None]"
"""Integers on the device, and on the host where they are known there; None for an argument that is not given."""


class _Preset(NamedTuple):
    """Where the stacks disagree, apart from the order of the rules."""

    ties: Ties
    repetition: Scope
    counts: Scope
    semantics: Semantics


_PRESETS: dict[Preset, _Preset] = {
    "transformers": _Preset("all", "all", "output", Semantics()),
    "vllm": _Preset("all", "all", "output", Semantics(words_in_output=True)),
    "sglang": _Preset("lowest", "output", "output", Semantics(bias_last=True)),
}

# Words that are allocated at once for staging: those of dozens of requests.
_STAGED = 2**16
# Sets of more tokens than this are kept as packed masks, which cost the same whatever they hold.
_FEW = 64
_LARGEST_BASE = torch.finfo(torch.float64).max ** (1 / layout.LONGEST)
_LARGEST = torch.finfo(torch.float32).max
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RequestParams:
    """What one request wants; everything is off by default. Immutable, and checked when it is made.

    Making one object and adding it for many requests saves host time: what a batch makes of it is kept with it.

    Args:
        temperature: what the logits are divided by, finite and at least 0; 0 is greedy: the largest logit after
            penalties and masks, whatever the truncations.
        top_k: at least 1; None, 0 or -1 for off, and all three are kept as None. This and the other truncations are
            those of the warpers of their names.
        top_p: from 0 to 1; 1 or None for off.
        min_p: from 0 to 1; 0 or None for off.
        typical_p: above 0 and at most 1; 1 or None for off.
        epsilon: at least 0 and below 1; 0 or None for off.
        eta: at least 0 and below 1; 0 or None for off.
        top_n_sigma: above 0; inf or None for off.
        top_h: above 0 and at most 1; 1 or None for off.
        top_a: from 0 to 1; 0 or None for off.
        repetition_penalty: above 0 and finite; 1 is off.
        presence_penalty: finite, subtracted from the logit of each token that has occurred; 0 is off.
        frequency_penalty: finite, subtracted once for every time that it has occurred; 0 is off.
        repetition_scope: where the repetition penalty looks: ``"all"``, prompt and output, or only the ``"output"``;
            None for what the semantics of the batch say.
        presence_scope: likewise for the presence and frequency penalties.
        dry_multiplier: see ``DRYLogitsProcessor``; 0 is off.
        dry_base: likewise.
        dry_allowed_length: likewise.
        dry_breakers: likewise, a ``TokenMask`` or token ids.
        logit_bias: finite or -inf, added to the logits of these token ids. An id may be a text of digits, as in
            OpenAI's interface.
        allowed_token_ids: the only tokens that may come, a ``TokenMask`` or token ids; None for all.
        banned_token_ids: tokens that never come, a ``TokenMask`` or token ids.
        bad_words: sequences of token ids, none empty: the last token of each is banned where the others precede it.
        no_repeat_ngram_size: no n-gram of so many tokens comes twice; 0 is off.
        min_tokens: for so many output tokens the ``stop_token_ids`` are banned.
        stop_token_ids: token ids that end the text.
        first_tokens_suppressed: tokens that the output doesn't begin with, a ``TokenMask`` or token ids.
        first_window: for how many output tokens that holds, at least 1.
        forced_tokens: the first output tokens, whatever all else says.
        bitmask: None to obey the bitmask of a step that has one; True to require one, so that a step without is an
            error; False to obey none.
        seed: an integer of up to 64 bits; None for one that is drawn when the request is added.
        logprobs: for how many of the likeliest tokens log-probabilities are wanted besides the drawn token's; None for
            none at all.

    Numbers may be numpy's scalars, or tensors of no dimension on the CPU; they are kept as Python's.

    Raises:
        ValueError: an argument out of range or of a wrong type; its message names it.

    Example:
        >>> RequestParams(temperature=0.7, top_p=1.5)
        Traceback (most recent call last):
        ValueError: top_p must be a number from 0 to 1 (1 turns it off), got 1.5
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon: float | None = None
    eta: float | None = None
    top_n_sigma: float | None = None
    top_h: float | None = None
    top_a: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_scope: Scope | None = None
    presence_scope: Scope | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_breakers: TokenMask | Sequence[int] = ()
    logit_bias: Mapping[int, float] | Mapping[str, float] = field(default_factory=dict)
    allowed_token_ids: TokenMask | Sequence[int] | None = None
    banned_token_ids: TokenMask | Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    no_repeat_ngram_size: int = 0
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    first_tokens_suppressed: TokenMask | Sequence[int] = ()
    first_window: int = 1
    forced_tokens: Sequence[int] = ()
    bitmask: bool | None = None
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        given = self.__dict__
        for name, default, check in _CHECKED:
            value = given[name]
            if value is not default:
                if isinstance(value, torch.Tensor) and not value.ndim and value.device.type == "cpu":
                    value = value.item()
                given[name] = check(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class _Packed(NamedTuple):
    """Parameters as a slot holds them."""

    record: np.ndarray[Any, Any]
    """int32, all but the lengths and a seed that is drawn."""
    masks: tuple[tuple[int, np.ndarray[Any, Any]], ...]
    """Planes in ascending order, and the packed masks that they hold."""
    looks_back: bool
    """Whether the tokens so far matter, and not only their number."""


class _Staging:
    """Memory of the host from which requests are copied to the device, piece by piece and never the same one twice.

    Where a GPU copies from it, it is pinned. A block that is used up goes back to torch, which hands it out again when
    the copies from it are done, on whatever streams they are; so nothing waits, and nothing is overwritten too early.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned, self._used, self._array = device.type == "cuda", 0, _NO_TOKENS

    def take(self, count: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
        """So many words, int32, not initialised: as a tensor and as an array."""
        begin, end = self._used, self._used + count
        if end > len(self._array):
            self._block = torch.empty(max(count, _STAGED), dtype=torch.int32, pin_memory=self._pinned)
            self._array, begin, end = self._block.numpy(), 0, count
        self._used = end
        return self._block[begin:end], self._array[begin:end]


class BatchProcessor:
    """Fixed slots for the requests of a serving stack, and the step that processes a changing batch of them.

    A step takes the logits ``[rows, V]`` and the slot of each row. It launches the same kernels whatever the requests
    ask for, reads all parameters on the device, and neither waits nor copies: one CUDA graph, captured once, serves
    every mix of requests. Adding takes one copy, and removing, moving and swapping one launch, in the order of the
    current stream; they never wait either. They are calls of the host: between two replays, not inside a graph.

    A request's result depends on its own parameters, history, seed and position, and on nothing else: not on its slot,
    its row, or the other requests.

    Token ids that the logits don't have (placeholders of images, ids of padded embeddings, negative ids) may stand in
    prompts, outputs and draft tokens. They take their place and count for nothing: no penalty, ban or bias comes of
    them, though an n-gram or a repetition may hold them. Ids that 32 bits don't hold become -1.

    What a call can't do is refused where the host can see it: in lists, arrays and tensors on the CPU. Of tensors on a
    GPU nothing can be known without waiting for it; what happens there is said with each argument.

    Maps act in this order: logit bias, repetition, frequency, presence penalty, DRY; then all bans (allowed and banned
    tokens, bad words, n-grams, minimum of tokens, first tokens, bitmask), of which none depends on another; then
    temperature and truncations. A forced token gets 0, all others -inf, whatever the bans. The logits are taken as
    float32; what biases and penalties change is rounded to the dtype of the logits once, where logits are the result.

    ``semantics`` says what the serving stacks see differently:

        =============================  ==================  ===================  ====================
        .                              transformers        vllm                 sglang
        =============================  ==================  ===================  ====================
        truncations (and, after them,  top-n-sigma, top-k  top-n-sigma, min-p,  top-n-sigma, top-p,
        typical, epsilon, eta)         top-p, min-p        top-k, top-p         top-k, min-p
        ties at the edge               as the warpers      as the warpers       as many as it takes,
                                       keep them           keep them            lowest ids first
        repetition penalty of          prompt and output   prompt and output    the output
        presence, frequency of         the output          the output           the output
        bias and penalties             bias first          bias first           frequency, presence,
                                                                                repetition, DRY, bias
        bad words are looked for in    all                 the output           all
        =============================  ==================  ===================  ====================

    Args:
        max_requests: number of slots.
        vocab_size: tokens of the vocabulary, V.
        device: where the logits are.
        max_length: tokens that a request may have, prompt included; not with ``history``. See ``lengths`` for a history
            that is full.
        semantics: see above.
        max_rows: rows that a step may have; None for ``max_requests``. Rows of draft tokens count.
        max_listed: how much each request may list, in words of 32 bits: two for each biased token, one for each stop
            and forced token, ``longest + 1`` for each bad word, where the longest has that many tokens, one for each
            banned or suppressed first token up to 64 (more are kept as a mask), 51 for DRY.
        history: an engine's own tensors, kept up to date by the engine: token ids ``[max_requests, L]``, lengths of
            the prompts and lengths so far, ``[max_requests]``, int32 or int64. ``append`` is not used then, and the
            ids are read as they are: those that the logits don't have count for nothing.
        max_logprobs: the most that a request may want as ``logprobs``, at most V.

    Raises:
        ValueError: an argument out of range; a history of another shape, dtype or device; a GPU that isn't there.

    Example:
        >>> batch = BatchProcessor(4, vocab_size=8, device="cpu", max_length=32)
        >>> greedy = batch.add(RequestParams(temperature=0, banned_token_ids=[3]), prompt_ids=[1, 2])
        >>> forced = batch.add(RequestParams(forced_tokens=[5]), prompt_ids=[7])
        >>> logits = torch.tensor([[0.0, 1, 2, 9, 4, 3, 2, 1]]).repeat(2, 1)
        >>> batch.sample(logits, [greedy, forced]).tokens
        tensor([4, 5])
    """

    def __init__(
        self,
        max_requests: int,
        vocab_size: int,
        device: torch.device | str = "cuda",
        *,
        max_length: int | None = None,
        semantics: Preset = "transformers",
        max_rows: int | None = None,
        max_listed: int = 1024,
        history: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        max_logprobs: int = 0,
    ) -> None:
        max_requests = whole_number("max_requests", max_requests, 1)
        vocab_size = whole_number("vocab_size", vocab_size, 1)
        one_of("semantics", semantics, tuple(_PRESETS))
        rows = max_requests if max_rows is None else whole_number("max_rows", max_rows, 1)
        max_listed = whole_number("max_listed", max_listed)
        max_logprobs = whole_number("max_logprobs", max_logprobs, 0, vocab_size)
        device = device_of("device", device)
        if history is not None:
            if max_length is not None:
                raise ValueError(f"max_length must be None with history, whose own length counts, got {max_length!r}")
            _check_history(history, max_requests, device)
        else:
            if max_length is None:
                raise ValueError(
                    "max_length must be an integer of at least 1 where there is no history, got None: give the most "
                    "tokens that a request may have"
                )
            max_length = whole_number("max_length", max_length, 1)
        self.max_requests, self.vocab_size, self.device = max_requests, vocab_size, device
        self.max_rows, self.max_listed, self.max_logprobs = rows, max_listed, max_logprobs
        self.semantics: Preset = semantics
        self._preset = _PRESETS[semantics]
        self._lists_end = layout.RECORD.value + max_listed
        self._owns_history = history is None
        # What a slot holds stands side by side, so that one copy brings it: packed masks, record, lists, history.
        W = words(vocab_size)
        self._masks_end = layout.MASKS * W
        table = torch.zeros(
            max_requests, self._masks_end + self._lists_end + (max_length or 0), dtype=torch.int32, device=device
        )
        masks = table[:, : self._masks_end].view(max_requests, layout.MASKS, W)
        records = table[:, self._masks_end :]
        if history is None:
            tokens, prompts, lengths = records[:, self._lists_end :], records[:, 1], records[:, 0]
        else:
            tokens, prompts, lengths = history
        self.max_length: int = tokens.shape[1]
        self._slots = Slots(records, masks, tokens, lengths, prompts)
        self._step = Step(
            self._slots, rows, vocab_size, ORDERS[semantics], self._preset.ties, self._preset.semantics, max_listed
        )
        # Views take the host longer than what is done with them.
        self._table, self._held, self._flags = table, table.unbind(), records[:, layout.FLAGS.value].unbind()
        self._staging = _Staging(device)
        self._active = bytearray(max_requests)
        self._seeds = random.Random()
        # What the host knows of the slots, so that it can refuse what they ask for and a step doesn't have.
        self._looking_back: set[int] = set()  # whose requests depend on the tokens so far
        self._strict: set[int] = set()  # whose requests require a bitmask
        self._reported: set[int] = set()  # whose requests want log-probabilities
        # Tokens that the host has seen going to each slot: all of them, until tensors on a GPU are appended.
        self._counted = [0] * max_requests
        self._saw_all = self._owns_history

    # -- Requests --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of requests."""
        return sum(self._active)

    def __contains__(self, slot: object) -> bool:
        """Whether a slot holds a request."""
        if not is_integer(slot):
            return False
        at = int(slot)  # type: ignore[call-overload]
        return 0 <= at < self.max_requests and bool(self._active[at])

    @property
    def lengths(self) -> torch.Tensor:
        """How many tokens the history of each slot has, ``[max_requests]``: on the device, and to be read only.

        A history of ``max_length`` tokens is full: whatever is appended to it from tensors on a GPU is dropped, so its
        next token would be drawn with the same noise again. End such a request, or make a batch of longer histories.
        """
        return self._slots.lengths

    @property
    def bytes_per_slot(self) -> dict[str, int]:
        """Memory that a slot takes: parameters and lists, packed masks, and its history where the batch keeps it."""
        record = self._lists_end * 4
        masks = self._slots.masks[0].numel() * 4
        return {"parameters": record, "masks": masks, "history": self.max_length * 4 if self._owns_history else 0}

    @property
    def bytes_per_row(self) -> int:
        """Memory that a row of a step takes, besides that of the truncations."""
        return self._step.bytes_per_row

    def add(self, params: RequestParams, prompt_ids: Ids = (), output_ids: Ids = (), slot: int | None = None) -> int:
        """Let a request in.

        Args:
            params: what it wants.
            prompt_ids: its prompt, integers on the host. Ids that the logits don't have count for nothing. Not looked
                at where the engine has the history.
            output_ids: what it has generated already, as after a preemption.
            slot: the slot it takes, which must be free; None for the lowest one that is free.

        Returns:
            Its slot.

        Raises:
            ValueError: no free slot; a slot that is taken or doesn't exist; parameters with token ids outside the
                vocabulary; more tokens than ``max_length``, lists longer than ``max_listed``, or more ``logprobs``
                than ``max_logprobs``. Nothing has changed then.
        """
        if not isinstance(params, RequestParams):
            raise ValueError(f"params must be RequestParams, got {params!r}")
        if slot is None:
            slot = self._active.find(0)
            if slot < 0:
                raise ValueError(f"all {self.max_requests} slots are taken: remove a request, or make the batch larger")
        else:
            slot = self._checked_slot("slot", slot)
            if self._active[slot]:
                raise ValueError(f"slot must be free, got {slot}, which holds a request: remove it first")
        if params.logprobs is not None and params.logprobs > self.max_logprobs:
            raise ValueError(
                f"logprobs must be at most {self.max_logprobs}, the max_logprobs of the batch, got {params.logprobs}: "
                "make the batch with more"
            )
        packed = self._packed(params)
        prompt = output = _NO_TOKENS
        if self._owns_history:
            prompt, output = _history_ids("prompt_ids", prompt_ids), _history_ids("output_ids", output_ids)
            if len(prompt) + len(output) > self.max_length:
                raise ValueError(
                    f"prompt_ids and output_ids must have at most {self.max_length} tokens together, the max_length of "
                    f"the batch, got {len(prompt) + len(output)}"
                )
        self._write(slot, packed, prompt, output, params.seed is None)
        self._active[slot] = 1
        self._counted[slot] = len(prompt) + len(output)
        if params.bitmask:
            self._strict.add(slot)
        if params.logprobs is not None:
            self._reported.add(slot)
        if packed.looks_back:
            self._looking_back.add(slot)
        return slot

    def remove(self, slot: int) -> None:
        """Let a request go: its slot is free, and rows that name it are left alone.

        Raises:
            ValueError: the slot holds no request.
        """
        slot = self._taken_slot("slot", slot)
        self._flags[slot].zero_()
        self._active[slot] = 0
        for known in (self._strict, self._reported, self._looking_back):
            known.discard(slot)

    def move(self, source: int, target: int) -> None:
        """Move a request to a free slot. A history that is the engine's own is for the engine to move.

        Raises:
            ValueError: ``source`` holds no request, or ``target`` holds one. Nothing has changed then.
        """
        source, target = self._taken_slot("source", source), self._checked_slot("target", target)
        if source == target:
            return
        if self._active[target]:
            raise ValueError(f"target must be free, got {target}, which holds a request: remove it first, or swap()")
        self.swap(source, target)

    def swap(self, a: int, b: int) -> None:
        """Exchange what two slots hold, a request or none, but for histories that are the engine's own.

        Raises:
            ValueError: a slot that doesn't exist.
        """
        a, b = self._checked_slot("a", a), self._checked_slot("b", b)
        if a == b:
            return
        swap_slots(self._table, a, b)
        self._active[a], self._active[b] = self._active[b], self._active[a]
        self._counted[a], self._counted[b] = self._counted[b], self._counted[a]
        for known in (self._strict, self._reported, self._looking_back):
            if (a in known) != (b in known):
                known ^= {a, b}

    def append(self, slots: Ids, token_ids: Ids) -> None:
        """Add tokens to the histories of requests, in their order; a slot may come more than once.

        On a GPU with tensors this is one launch, which a graph may hold. What can't be checked without waiting for the
        device is ignored there: slots of no request, and tokens beyond ``max_length``, which ``lengths`` tells of.

        Args:
            slots: the slots, ``[N]``; negative ones are ignored.
            token_ids: a token for each, ``[N]``; negative ones are ignored, and stand for nothing. Ids that the logits
                don't have take their place in the history, and count for nothing.

        Raises:
            ValueError: the engine has the history; not one token for each slot; where it is known on the host, a slot
                that holds no request, or a history that is full. Nothing has changed then.
        """
        if not self._owns_history:
            raise ValueError("append() is for histories that the batch keeps, but this one's are the engine's")
        of, known = self._slot_index(slots)
        tokens, host = self._index("token_ids", token_ids)
        if len(of) != len(tokens):
            raise ValueError(f"token_ids must have one token for each of {len(of)} slots, got {len(tokens)}")
        self._count(known, host)
        append_tokens(self._slots, of, tokens)

    # -- Steps -----------------------------------------------------------------------------------------------------

    def apply_(
        self,
        logits: torch.Tensor,
        slots: Ids,
        cache_position: Ids | None = None,
        *,
        bitmask: torch.Tensor | None = None,
        draft_ids: Ids | None = None,
        local_position: Ids | None = None,
    ) -> torch.Tensor:
        """Process the logits of a step, in place.

        Args:
            logits: float32, float16 or bfloat16 ``[rows, V]`` of any strides.
            slots: the slot of each row, int32 or int64 ``[rows]``. Rows of a negative slot, or of one that holds no
                request, are left alone; where such a slot is known on the host and not negative, it is refused.
                Without draft tokens a slot has one row, or several of different ``cache_position``.
            cache_position: index in its sequence of the last token that each row has seen, so that the row's token
                gets the next one; None for the end of the history and of the draft tokens before it. One that is
                smaller rewinds. One that is larger than the history says gives the row its position and step; the
                tokens in between are not seen, which is refused for requests that look back, where it is known on the
                host.
            bitmask: packed tokens that the grammar of each row allows, int32 ``[rows, W]``, bit ``i`` of word ``w``
                for token ``32 * w + i``; obeyed by all requests but those of ``bitmask=False``. Tokens beyond it are
                not allowed. Without it, a row whose request has ``bitmask=True`` is refused where its slot is known
                on the host; else nothing is allowed in it, so that no token passes for one of the grammar's.
            draft_ids: with draft tokens, the token that each row was fed with, ``[rows]``. Rows of one request are
                neighbours, in order; the row at local position ``j`` sees the history and the draft tokens of the
                ``j - 1`` rows before it and its own. Ids that the logits don't have count for nothing.
            local_position: with draft tokens, how many of them each row sees, ``[rows]``; 0 for the first row.

        Returns:
            ``logits``.

        Raises:
            ValueError: an argument of another shape, dtype or device than is said here; logits of which several share
                memory; or, where it is known on the host, a slot that holds no request, what is refused above, or rows
                of draft tokens out of order. Nothing has changed then.
        """
        rows, _ = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        _check_own_memory("logits", logits)
        return process_rows(self._step, logits, rows, logits)

    def apply(
        self,
        logits: torch.Tensor,
        slots: Ids,
        cache_position: Ids | None = None,
        *,
        bitmask: torch.Tensor | None = None,
        draft_ids: Ids | None = None,
        local_position: Ids | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same to another tensor: ``out``, of the shape, dtype and device of the logits, or a new one.

        ``out`` may be the logits themselves, but no other tensor that shares memory with them.

        Raises:
            ValueError: see ``apply_``; or ``out`` shares memory with the logits.
        """
        rows, _ = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        if out is None:
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        elif _checked_out(out, logits):
            process_rows(self._step, logits, rows, logits)
            return out
        return process_rows(self._step, logits, rows, out)

    def sample(
        self,
        logits: torch.Tensor,
        slots: Ids,
        cache_position: Ids | None = None,
        *,
        bitmask: torch.Tensor | None = None,
        draft_ids: Ids | None = None,
        local_position: Ids | None = None,
        logprobs: Distribution | None = None,
    ) -> Sample:
        """Draw the token of each row, as a ``Sampler`` does: from the request's seed and the token's position.

        The logits are not written, and nothing is appended to the histories. Rows of no request get token 0.

        Args:
            logits: see ``apply_``.
            slots: see ``apply_``.
            cache_position: see ``apply_``.
            bitmask: see ``apply_``.
            draft_ids: see ``apply_``.
            local_position: see ``apply_``.
            logprobs: ``"raw"`` for log-probabilities of the logits as they are given, ``"processed"`` for those of the
                distribution that is drawn from; None for none. There are ``max_logprobs`` columns for the likeliest
                tokens; where a request asked for fewer, the others are -1 and NaN. A row whose request asked for none,
                or that has none, has NaN and rank 0. A request that asked for them in a step without, and a step with
                them of whose requests none asked, are refused where the slots are known on the host.

        Raises:
            ValueError: see ``apply_``, and ``logprobs``.
        """
        from fastlogits.sampling import Sample

        one_of("logprobs", logprobs, (None, "raw", "processed"))
        rows, known = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        if known is not None:
            self._check_logprobs(known, logprobs)
        tokens, asked = sample_rows(self._step, logits, rows, logprobs, self.max_logprobs)
        return Sample.of(tokens, asked, self.max_logprobs)

    # -- Before the first step -------------------------------------------------------------------------------------

    def warm_up(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        calls: Call | Sequence[Call] = ("sample", "apply_", "apply", "append", "swap"),
        logprobs: Distribution | Sequence[Distribution] = (),
        bitmask: bool | None = None,
        cache_position: torch.dtype | None = None,
        draft_ids: torch.dtype | None = None,
        slots: torch.dtype = torch.int64,
        row_stride: int | None = None,
    ) -> WarmUp:
        """Compile now, and at once, what steps with such logits launch; else the first of them does it, and waits.

        A step of a row of no request is rehearsed: its launches are collected, compiled side by side and loaded, and
        none is made. So requests may be there already, and nothing of them changes; a step in flight isn't disturbed.
        Which requests there are, what they ask for, and the number of rows change nothing of what is compiled.

        Args:
            dtype: of the logits: float32, float16 or bfloat16.
            calls: which methods will be called; ``"swap"`` stands for ``move`` too. Fewer compile sooner: ``sample``
                and each of the two ``apply`` have kernels of their own.
            logprobs: whose log-probabilities ``sample`` will be asked for: ``"raw"``, ``"processed"``, both or none.
            bitmask: whether steps have a bitmask; None for steps with one and steps without.
            cache_position: the dtype of the ``cache_position`` of steps, int32 or int64 (lists count as int64); None
                where they have none.
            draft_ids: likewise of ``draft_ids`` and ``local_position``.
            slots: likewise of ``slots``, which all steps have.
            row_stride: ``logits.stride(0)``, where logits are a part of wider ones; None for contiguous ones.

        Returns:
            What was compiled, in how many seconds: see ``WarmUp``.

        Raises:
            ValueError: an argument of another form than is said here.
            RuntimeError: a CUDA graph is being captured.

        Example:
            >>> batch = BatchProcessor(4, vocab_size=8, device="cpu", max_length=32)
            >>> batch.warm_up(torch.bfloat16, calls="sample")
            <WarmUp: nothing to compile on cpu: the kernels are for GPUs, and torch runs here>
        """
        from fastlogits import warm_up as warming

        asked = warming.checked_choices("calls", calls, get_args(Call))
        reports = warming.checked_choices("logprobs", logprobs, ("raw", "processed"))
        one_of("bitmask", bitmask, (None, False, True))
        integers = (torch.int32, torch.int64)
        one_of("cache_position", cache_position, (None, *integers))
        one_of("draft_ids", draft_ids, (None, *integers))
        one_of("slots", slots, integers)
        logits = warming.dummy_logits(1, self.vocab_size, dtype, self.device, row_stride)

        def whole(value: int, of: torch.dtype | None) -> torch.Tensor | None:
            return None if of is None else torch.full((1,), value, dtype=of, device=self.device)

        def rehearse() -> None:
            nobody: Any = whole(-1, slots)
            mask = torch.zeros(1, words(self.vocab_size), dtype=torch.int32, device=self.device)
            for each in (None, mask) if bitmask is None else (mask if bitmask else None,):
                step: Any = {
                    "cache_position": whole(-1, cache_position), "draft_ids": whole(0, draft_ids),
                    "local_position": whole(0, draft_ids), "bitmask": each,
                }  # fmt: skip
                if "sample" in asked:
                    for distribution in (None, *reports):
                        self.sample(logits, nobody, **step, logprobs=cast("Distribution | None", distribution))
                if "apply_" in asked:
                    self.apply_(logits, nobody, **step)
                if "apply" in asked:
                    self.apply(logits, nobody, **step)
            if "append" in asked and self._owns_history:
                append_tokens(self._slots, nobody, torch.zeros(1, dtype=torch.int64, device=self.device))
            if "swap" in asked:
                swap_slots(self._table, 0, 0)

        return warming.warmed(self.device, rehearse)

    # -- What calls have in common ---------------------------------------------------------------------------------

    def _checked_slot(self, argument: str, slot: int) -> int:
        if not is_integer(slot) or not 0 <= slot < self.max_requests:
            raise ValueError(f"{argument} must be an integer from 0 to {self.max_requests - 1}, got {slot!r}")
        return int(slot)

    def _taken_slot(self, argument: str, slot: int) -> int:
        slot = self._checked_slot(argument, slot)
        if not self._active[slot]:
            raise ValueError(f"{argument} must be a slot that holds a request, got {slot}")
        return slot

    def _index(self, argument: str, value: Ids) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Integers ``[N]`` on the device, and on the host where they are known there."""
        if not isinstance(value, torch.Tensor):
            value = torch.from_numpy(_longs(_integers(argument, value)))
        if value.ndim != 1 or value.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{argument} must be int32 or int64 of one dimension, got {value.dtype} of {tuple(value.shape)}"
            )
        if value.device.type == "cpu":
            return (value if self.device.type == "cpu" else to_device(value, self.device)), value
        if value.device != self.device:
            raise ValueError(f"{argument} must be on {self.device} or on the host, got a tensor on {value.device}")
        return value, None

    def _slot_index(self, slots: Ids) -> tuple[torch.Tensor, list[int] | None]:
        """Slots on the device, and as a list where they are known on the host, where each has to hold a request."""
        on_device, host = self._index("slots", slots)
        if host is None:
            return on_device, None
        known: list[int] = host.tolist()
        for slot in known:
            if slot >= self.max_requests or (slot >= 0 and not self._active[slot]):
                raise ValueError(f"slots must hold requests, or be -1 for rows of none, got {slot} among them")
        return on_device, known

    def _count(self, slots: list[int] | None, tokens: torch.Tensor | None) -> None:
        """Count what is appended, as far as the host sees it."""
        if slots is None or tokens is None:
            self._saw_all = False
            return
        counted = self._counted.copy()
        for slot, token in zip(slots, tokens.tolist(), strict=True):
            if slot >= 0 and token >= 0:
                if counted[slot] >= self.max_length:
                    raise ValueError(
                        f"token_ids must leave each history at most {self.max_length} tokens, the max_length of the "
                        f"batch, got one more for slot {slot}: end its request, or make the batch with a larger one"
                    )
                counted[slot] += 1
        self._counted = counted

    def _rows(
        self,
        logits: torch.Tensor,
        slots: Ids,
        cache_position: Ids | None,
        bitmask: torch.Tensor | None,
        draft_ids: Ids | None,
        local_position: Ids | None,
    ) -> tuple[Rows, list[int] | None]:
        """The rows of a step, checked, and their slots where they are known on the host."""
        if not isinstance(logits, torch.Tensor):
            raise ValueError(f"logits must be a tensor of shape (rows, {self.vocab_size}), got {type(logits).__name__}")
        if logits.ndim != 2 or logits.shape[1] != self.vocab_size or logits.dtype not in _DTYPES:
            raise ValueError(
                f"logits must be float32, float16 or bfloat16 of shape (rows, {self.vocab_size}), got {logits.dtype} "
                f"of {tuple(logits.shape)}"
            )
        if logits.device != self.device:
            raise ValueError(f"logits must be on {self.device}, where the batch is, got them on {logits.device}")
        B = logits.shape[0]
        if self.max_rows < B:
            raise ValueError(f"logits must have at most {self.max_rows} rows, the max_rows of the batch, got {B}")
        if (draft_ids is None) != (local_position is None):
            raise ValueError("draft_ids and local_position must be given together, got one of them")
        of, known = self._slot_index(slots)
        nowhere: _Index = (None, None)
        positions: _Index = nowhere if cache_position is None else self._index("cache_position", cache_position)
        drafts: _Index = nowhere if draft_ids is None else self._index("draft_ids", draft_ids)
        local: _Index = nowhere if local_position is None else self._index("local_position", local_position)
        mask = None if bitmask is None else self._checked_bitmask(bitmask, B)
        for name, value in (
            ("slots", of), ("cache_position", positions[0]), ("draft_ids", drafts[0]), ("local_position", local[0])
        ):  # fmt: skip
            if value is not None and len(value) != B:
                raise ValueError(f"{name} must have one entry for each of {B} rows of logits, got {len(value)}")
        if known is not None:
            self._check_masks(known, bitmask)
            self._check_order(known, positions, local)
        return Rows(of, positions[0], mask, drafts[0], local[0]), known

    def _checked_bitmask(self, bitmask: torch.Tensor, B: int) -> torch.Tensor:
        if (
            not isinstance(bitmask, torch.Tensor)
            or (bitmask.ndim, bitmask.dtype, bitmask.device) != (2, torch.int32, self.device)
            or len(bitmask) != B
        ):
            found = (
                f"{bitmask.dtype} of {tuple(bitmask.shape)} on {bitmask.device}"
                if isinstance(bitmask, torch.Tensor)
                else type(bitmask).__name__
            )
            raise ValueError(
                f"bitmask must be int32 of shape ({B}, {words(self.vocab_size)}) on {self.device}, got {found}"
            )
        return bitmask if bitmask.stride(1) == 1 else bitmask.contiguous()

    def _check_masks(self, slots: list[int], bitmask: torch.Tensor | None) -> None:
        if bitmask is None and self._strict and not self._strict.isdisjoint(slots):
            slot = next(slot for slot in slots if slot in self._strict)
            raise ValueError(
                f"bitmask must be given, got None, but the request of slot {slot} has bitmask=True: give the mask of "
                "its grammar, or make the request with bitmask=None, to obey one where there is one"
            )

    def _check_logprobs(self, slots: list[int], logprobs: Distribution | None) -> None:
        asked = bool(self._reported) and not self._reported.isdisjoint(slots)
        if logprobs is None and asked:
            slot = next(slot for slot in slots if slot in self._reported)
            raise ValueError(
                f"logprobs must be 'raw' or 'processed', got None, but the request of slot {slot} wants log-"
                "probabilities"
            )
        if logprobs is not None and not asked and max(slots, default=-1) >= 0:
            raise ValueError(
                f"logprobs must be None where no request wants them, got {logprobs!r}: make requests with logprobs=0 "
                "for the token that is drawn, or n for the n likeliest too"
            )

    def _check_order(self, slots: list[int], positions: _Index, local: _Index) -> None:
        """Refuse what rows can't see, as far as the host knows it."""
        at = None if positions[1] is None else positions[1].tolist()
        depth = None if local[1] is None else local[1].tolist()
        if depth is not None:
            _check_neighbours(slots, depth)
        elif local[0] is None and len(set(slots)) < len(slots) and (positions[0] is None or at is not None):
            _check_once(slots, at)
        if at is None:
            return
        if local[0] is None:
            depth = [0] * len(slots)
        for row, (slot, position) in enumerate(zip(slots, at, strict=True)):
            if slot < 0:
                continue
            if position < -1:
                raise ValueError(f"cache_position must be at least -1, got {position} in row {row}")
            if self._saw_all and depth is not None and slot in self._looking_back:
                most = self._counted[slot] + depth[row] - 1
                if position > most:
                    raise ValueError(
                        f"cache_position must be at most {most} in row {row}, whose request looks back and has "
                        f"{self._counted[slot]} tokens in its history, got {position}: append what is missing"
                    )

    def _write(
        self, slot: int, packed: _Packed, prompt: np.ndarray[Any, Any], output: np.ndarray[Any, Any], draws_seed: bool
    ) -> None:
        """Bring a request to its slot: one copy, of no more than from its first mask to its last token."""
        P, N = len(prompt), len(prompt) + len(output)
        W = self._masks_end // layout.MASKS
        begin = packed.masks[0][0] * W if packed.masks else self._masks_end
        end = self._masks_end + (self._lists_end + N if N else len(packed.record))
        staged, held = self._staging.take(end - begin)
        for plane, mask in packed.masks:
            held[plane * W - begin : (plane + 1) * W - begin] = mask
        record = held[self._masks_end - begin :]
        record[: len(packed.record)] = packed.record
        _LENGTHS.pack_into(record.data, 4 * layout.LENGTH.value, N, P)
        if draws_seed:
            _SEED.pack_into(record.data, 4 * layout.SEED.value, self._seeds.getrandbits(64))
        if P:
            record[self._lists_end : self._lists_end + P] = prompt
        if N > P:
            record[self._lists_end + P :] = output
        self._held[slot][begin:end].copy_(staged, non_blocking=True)

    def _packed(self, params: RequestParams) -> _Packed:
        """What a slot holds of parameters; kept with them."""
        key = (self.vocab_size, self.semantics)
        kept: dict[Any, _Packed] = params.__dict__.setdefault("_packed", {})
        packed = kept.get(key)
        if packed is None:
            packed = kept[key] = _pack(params, self.vocab_size, self._preset)
        listed = len(packed.record) - layout.RECORD.value
        if listed > self.max_listed:
            raise ValueError(
                f"params must list at most {self.max_listed} words, the max_listed of the batch, got lists that take "
                f"{listed} words (biases, stop and forced tokens, bad words, banned tokens): make the batch with more"
            )
        return packed


_NO_TOKENS = np.zeros(0, dtype=np.int32)


_RULES = [(argument_of(kind), layout.OFF[kind]) for kind in layout.RULE_KINDS]
# The words before the lists, in the order of their places in the record.
_HEADER = struct.Struct(
    f"=6i Q 4f {''.join('i' if whole else 'f' for whole in layout.INTEGERS)} i {2 * layout.N_LISTS}i"
)
_LENGTHS, _SEED = struct.Struct("=2i"), struct.Struct("=Q")


def _pack(params: RequestParams, V: int, preset: _Preset) -> _Packed:
    flags = layout.ACTIVE.value
    masks: list[TokenMask | None] = [None] * layout.MASKS
    places = [0] * (2 * layout.N_LISTS)
    parts: list[bytes] = []
    end = layout.RECORD.value

    def put(which: Any, packed: bytes, count: int) -> None:
        nonlocal end
        places[2 * which.value : 2 * which.value + 2] = end, count
        parts.append(packed)
        end += len(packed) // 4

    def put_ids(which: Any, name: str, ids: Sequence[int]) -> None:
        _check_ids(name, ids, V)
        put(which, struct.pack(f"={len(ids)}i", *ids), len(ids))

    def put_set(which: Any, name: str, tokens: TokenMask | Sequence[int], plane: int, flag: Any) -> None:
        """Keep a set of tokens as a list where it is small; else as a mask, of which the flag tells."""
        nonlocal flags
        if isinstance(tokens, TokenMask) or len(tokens) > _FEW:
            mask = fitted(name, _as_set(tokens), V)
            kept = masks[plane]
            masks[plane] = mask if kept is None else mask | kept
            flags |= flag.value
        else:
            put_ids(which, name, tokens)

    if (params.repetition_scope or preset.repetition) == "output":
        flags |= layout.OUTPUT_REPETITION.value
    if (params.presence_scope or preset.counts) == "output":
        flags |= layout.OUTPUT_COUNTS.value
    is_tallied = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    if is_tallied:
        flags |= layout.TALLIED.value
    if params.bitmask is not False:
        flags |= layout.BITMASK.value
    if params.bitmask:
        flags |= layout.NEEDS_BITMASK.value
    if params.allowed_token_ids is not None:
        masks[layout.BAN_PLANE] = ~fitted("allowed_token_ids", _as_set(params.allowed_token_ids), V)
        flags |= layout.BAN_MASK.value
    if params.banned_token_ids != ():
        put_set(layout.BANS, "banned_token_ids", params.banned_token_ids, layout.BAN_PLANE, layout.BAN_MASK)
    if params.first_tokens_suppressed != ():
        first = params.first_tokens_suppressed
        put_set(layout.FIRSTS, "first_tokens_suppressed", first, layout.FIRST_PLANE, layout.FIRST_MASK)
    if params.stop_token_ids:
        put_ids(layout.STOPS, "stop_token_ids", params.stop_token_ids)
    if params.forced_tokens:
        put_ids(layout.FORCED, "forced_tokens", params.forced_tokens)
    if params.logit_bias:
        tokens, values = cast("list[int]", list(params.logit_bias)), params.logit_bias.values()
        _check_ids("logit_bias", tokens, V)
        put(layout.BIASES, struct.pack(f"={len(tokens)}i{len(tokens)}f", *tokens, *values), len(tokens))
    if params.bad_words:
        width = 1 + max(map(len, params.bad_words))
        table: list[int] = []
        for ids in params.bad_words:
            _check_ids("bad_words", ids, V)
            table += [ids[-1], len(ids) - 1, *ids[-2::-1], *[-1] * (width - 1 - len(ids))]
        put(layout.SEQUENCES, struct.pack(f"={len(table)}i", *table), len(table))
        put(layout.SEQUENCE_WIDTH, b"", width)
    if params.dry_multiplier:
        least = max(1, params.dry_allowed_length)
        penalties = [
            params.dry_multiplier * params.dry_base ** (n - params.dry_allowed_length) if n >= least else 0.0
            for n in range(layout.LONGEST + 1)
        ]
        put(layout.DRY, np.array(penalties, dtype=np.float32).tobytes(), len(penalties))
        if len(params.dry_breakers):
            masks[layout.BREAKER_PLANE] = fitted("dry_breakers", _as_set(params.dry_breakers), V)
            flags |= layout.BREAKER_MASK.value

    given = params.__dict__
    rules = [off if given[name] is None else given[name] for name, off in _RULES]
    rules = [_small(int(value)) if whole else value for value, whole in zip(rules, layout.INTEGERS, strict=True)]
    header = _HEADER.pack(
        0, 0, flags, _small(params.no_repeat_ngram_size), _small(params.min_tokens), _small(params.first_window),
        (params.seed or 0) & (2**64 - 1),
        params.temperature, params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
        *rules,
        -1 if params.logprobs is None else params.logprobs,
        *places,
    )  # fmt: skip
    return _Packed(
        np.frombuffer(header + b"".join(parts), dtype=np.int32),
        tuple((plane, mask.bits().numpy()) for plane, mask in enumerate(masks) if mask is not None),
        bool(is_tallied or params.dry_multiplier or params.no_repeat_ngram_size)
        or any(len(ids) > 1 for ids in params.bad_words),
    )


def _check_ids(name: str, ids: Sequence[int], V: int) -> None:
    if max(ids) >= V:
        raise ValueError(f"{name} must have token ids of the vocabulary, 0 to {V - 1}, got {max(ids)}")


def _integers(argument: str, ids: Ids) -> np.ndarray[Any, Any]:
    """Integers of one dimension on the host."""
    if isinstance(ids, torch.Tensor):
        if ids.device.type != "cpu":
            raise ValueError(
                f"{argument} must be on the host, so that nothing waits for them, got a tensor on {ids.device}"
            )
        ids = ids.numpy()
    try:
        found = np.asarray(ids)
    except (TypeError, ValueError, OverflowError):  # rows of several lengths, say
        found = np.asarray(None)
    if found.ndim == 1 and found.dtype.kind in "iu":
        return found
    if found.ndim == 1 and not len(found):
        return _NO_TOKENS
    if isinstance(ids, Sequence) and not isinstance(ids, str) and all(map(is_integer, ids)):
        # Python's integers may be larger than any of numpy's.
        return np.asarray([min(max(int(each), -(2**63)), 2**63 - 1) for each in ids], dtype=np.int64)
    shown = type(ids).__name__ if found.ndim != 1 else f"{found.dtype} of {found.shape}"
    raise ValueError(f"{argument} must be integers of one dimension, got {shown}")


def _longs(found: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Integers as int64, which holds all but the largest of those without a sign."""
    if found.dtype == np.int64:
        return found
    return (np.minimum(found, np.uint64(2**63 - 1)) if found.dtype == np.uint64 else found).astype(np.int64)


def _history_ids(argument: str, ids: Ids) -> np.ndarray[Any, Any]:
    """Token ids as a history keeps them: what 32 bits don't hold is no token of any vocabulary, and becomes -1."""
    found = _longs(_integers(argument, ids))
    if len(found) and (found.max() >= 2**31 or found.min() < -(2**31)):
        found = np.where((found >= 2**31) | (found < -(2**31)), -1, found)
    return found


def _check_once(slots: list[int], positions: list[int] | None) -> None:
    """Refuse a slot that comes twice, at the same position where positions are given."""
    met: set[tuple[int, int]] = set()
    for row, slot in enumerate(slots):
        entry = slot, 0 if positions is None else positions[row]
        if slot >= 0 and entry in met:
            raise ValueError(
                f"slots must be different, got {slot} twice: give draft_ids and local_position for rows of draft "
                "tokens, or another cache_position for each row"
            )
        met.add(entry)


def _check_neighbours(slots: list[int], local: list[int]) -> None:
    """Refuse rows of draft tokens that don't follow one another."""
    for row, (slot, depth) in enumerate(zip(slots, local, strict=True)):
        follows = row > 0 and slots[row - 1] == slot and local[row - 1] == depth - 1
        if slot >= 0 and depth != 0 and not (follows and depth > 0):
            raise ValueError(
                f"local_position must count 0, 1, 2, ... in neighbouring rows of a slot, got {depth} in row {row} of "
                f"slot {slot}"
            )


def _check_own_memory(argument: str, tensor: torch.Tensor) -> None:
    """Refuse what can't be written, since several of its elements are one."""
    if 0 in tensor.stride() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise ValueError(
            f"{argument} must have memory of its own for each logit, got strides {tensor.stride()}: clone it"
        )


def _checked_out(out: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether ``out``, checked, is the memory of the logits."""
    if not isinstance(out, torch.Tensor) or (out.shape, out.dtype, out.device) != (
        logits.shape, logits.dtype, logits.device
    ):  # fmt: skip
        shown = f"{out.dtype} of {tuple(out.shape)} on {out.device}" if isinstance(out, torch.Tensor) else repr(out)
        raise ValueError(
            f"out must be as the logits, {logits.dtype} of {tuple(logits.shape)} on {logits.device}, got {shown}"
        )
    _check_own_memory("out", out)
    if not out.numel() or out.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
        return False
    if (out.storage_offset(), out.stride()) == (logits.storage_offset(), logits.stride()):
        return True
    # Where each row begins and ends: rows of one may lie between those of the other.
    reach = [
        (begin, begin + (tensor.shape[1] - 1) * tensor.stride(1), which)
        for which, tensor in enumerate((logits, out))
        for begin in range(
            tensor.storage_offset(), tensor.storage_offset() + len(tensor) * tensor.stride(0), tensor.stride(0)
        )
    ]
    ends = [-1, -1]
    for begin, end, which in sorted(reach):
        if begin <= ends[1 - which]:
            raise ValueError("out must share no memory with the logits, unless it is the logits, got rows that do")
        ends[which] = max(ends[which], end)
    return False


def _as_set(tokens: TokenMask | Sequence[int]) -> TokenSet:
    return tokens if isinstance(tokens, TokenMask) else tuple(tokens)


def _small(value: int) -> int:
    """What 32 bits hold of a count; larger ones mean the same."""
    return min(value, 2**31 - 1)


def _single(value: float) -> float:
    """A number in float32, as a slot holds it: what is within a range may be rounded out of it."""
    return c_float(value).value if abs(value) <= _LARGEST else math.nan


def _check_number(name: str, value: Any, least: float = -_LARGEST) -> float:
    number = _python(value)  # first: numpy's own smaller floats overflow where they are compared
    return finite_number(name, value if number is None else number, least, _LARGEST)


def _is_in(bounds: Range, value: float) -> bool:
    return value == bounds.off or bool(bounds.has(value))


def _check_rule(name: str, value: Any, kind: RuleKind) -> float:
    bounds = RULES[kind].range
    number = _python(value)
    # What is in the range may be rounded out of it.
    if number is None or not _is_in(bounds, number) or not (number == bounds.off or _is_in(bounds, _single(number))):
        raise ValueError(f"{name} must be a number {bounds.words}, got {value!r}")
    return number


def _check_top_k(name: str, value: Any) -> int | None:
    if not is_integer(value) or value < -1:
        raise ValueError(f"{name} must be an integer of at least 1 (None, 0 or -1 turns it off), got {value!r}")
    return int(value) if value > 0 else None


def _python(value: Any) -> float | None:
    """A number as Python's; None for what is none."""
    if type(value) in (float, int):
        return value  # type: ignore[no-any-return]
    return float(value) if is_number(value) else None


def _check_repetition(name: str, value: Any) -> float:
    number = _check_number(name, value, 0)
    if _single(number) == 0:
        raise ValueError(f"{name} must be above 0 (1 turns it off), got {value!r}")
    return number


def _check_scope(name: str, value: Any) -> Any:
    one_of(name, value, (*get_args(Scope), None))
    return value


def _check_base(name: str, value: Any) -> float:
    number = _check_number(name, value, 1)
    if number > _LARGEST_BASE:
        raise ValueError(f"{name} must have a finite {layout.LONGEST}th power, got {value!r}")
    return number


def _check_mask_choice(name: str, value: Any) -> bool | None:
    if value is not None and not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True, False or None (to obey a bitmask where there is one), got {value!r}")
    return None if value is None else bool(value)


def _sequence(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (list, tuple, Iterable)):
        raise ValueError(f"{name} must be token ids, got {ids!r}")
    found = tuple(ids)
    if not found or (set(map(type, found)) == {int} and min(found) >= 0):
        return found
    for token in found:
        if not is_integer(token) or token < 0:
            raise ValueError(f"{name} must be token ids of at least 0, got {token!r} among them")
    return tuple(map(int, found))


def _check_words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be sequences of token ids, got {value!r}")
    sequences = tuple(_sequence(name, each) for each in value)
    if not all(sequences):
        raise ValueError(f"{name} must be sequences of at least one token id, got an empty one among them")
    return sequences


def _check_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, (dict, Mapping)):
        raise ValueError(f"{name} must be a mapping from token ids to numbers, got {value!r}")
    ids = _sequence(name, [int(key) if isinstance(key, str) and key.isdecimal() else key for key in value])
    biases: dict[int, float] = {}
    for token, bias in zip(ids, value.values(), strict=True):
        number = _python(bias)
        if number is None or not (number == -math.inf or abs(number) <= _LARGEST):
            raise ValueError(f"{name} must be finite numbers or -inf, got {bias!r} for token {token}")
        if token in biases:
            raise ValueError(f"{name} must have each token id once, got {token} as a number and as a text")
        biases[token] = number
    return biases


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": partial(_check_number, least=0),
    **{argument_of(kind): partial(_check_rule, kind=kind) for kind in layout.RULE_KINDS},
    "top_k": _check_top_k,
    "repetition_penalty": _check_repetition,
    "presence_penalty": _check_number,
    "frequency_penalty": _check_number,
    "repetition_scope": _check_scope,
    "presence_scope": _check_scope,
    "dry_multiplier": partial(_check_number, least=0),
    "dry_base": _check_base,
    "dry_allowed_length": whole_number,
    "dry_breakers": checked_set,
    "logit_bias": _check_bias,
    "allowed_token_ids": checked_set,
    "banned_token_ids": checked_set,
    "bad_words": _check_words,
    "no_repeat_ngram_size": whole_number,
    "min_tokens": whole_number,
    "stop_token_ids": lambda name, value: tuple(checked_set(name, value)),
    "first_tokens_suppressed": checked_set,
    "first_window": partial(whole_number, low=1),
    "forced_tokens": _sequence,
    "bitmask": _check_mask_choice,
    "seed": partial(whole_number, low=-(2**63), high=2**64 - 1),
    "logprobs": whole_number,
}
# What is left as it is needs no check: most of the parameters of most requests.
_CHECKED = [(each.name, each.default, _CHECKS[each.name]) for each in fields(RequestParams)]


def _check_history(history: tuple[torch.Tensor, ...], slots: int, device: torch.device) -> None:
    names = ("token ids", "prompt lengths", "lengths")
    if len(history) != len(names):
        raise ValueError(
            f"history must be three tensors, token ids, prompt lengths and lengths so far, got {len(history)}"
        )
    for name, tensor, dims in zip(names, history, (2, 1, 1), strict=True):
        if tensor.ndim != dims or tensor.shape[0] != slots or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"history must have {name} of int32 or int64, {dims} dimensions and {slots} slots, got {tensor.dtype} "
                f"of {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"history must have {name} on {device}, where the batch is, got them on {tensor.device}")
