"""A serving step: one batch in which every request has its own parameters, processed by the same few launches."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from ctypes import c_float
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import torch
from fastlogits_kernels import slots as layout
from fastlogits_kernels._triton import to_device
from fastlogits_kernels.bits import words
from fastlogits_kernels.slot_sets import Step, append_tokens, process_rows, sample_rows, swap_slots
from fastlogits_kernels.slots import Rows, Semantics, Slots
from fastlogits_kernels.truncate import RANGES, Range, RuleKind, Ties, argument_of

from fastlogits.checks import device_of
from fastlogits.token_mask import TokenMask, TokenSet, checked_set, fitted

if TYPE_CHECKING:
    from fastlogits.sampling import Distribution, Sample

Scope: TypeAlias = Literal["all", "output"]
Preset: TypeAlias = Literal["transformers", "vllm", "sglang"]
Ids: TypeAlias = "Sequence[int] | np.ndarray[Any, Any] | torch.Tensor"


class _Preset(NamedTuple):
    """Where the stacks disagree."""

    rules: tuple[RuleKind, ...]
    """In the order in which they act."""
    ties: Ties
    repetition: Scope
    counts: Scope
    semantics: Semantics


_PRESETS: dict[Preset, _Preset] = {
    "transformers": _Preset(
        ("top_n_sigma", "top_k", "top_p", "min_p", "typical", "epsilon", "eta"), "all", "all", "output", Semantics()
    ),
    "vllm": _Preset(
        ("top_n_sigma", "min_p", "top_k", "top_p", "typical", "epsilon", "eta"), "all", "all", "output",
        Semantics(words_in_output=True),
    ),
    "sglang": _Preset(
        ("top_n_sigma", "top_p", "top_k", "min_p", "typical", "epsilon", "eta"), "lowest", "output", "output",
        Semantics(bias_last=True),
    ),
}  # fmt: skip

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
        top_k: at least 1; None for off. This and the other truncations are those of the warpers of their names.
        top_p: from 0 to 1; 1 or None for off.
        min_p: from 0 to 1; 0 or None for off.
        typical_p: above 0 and at most 1; 1 or None for off.
        epsilon: at least 0 and below 1; 0 or None for off.
        eta: at least 0 and below 1; 0 or None for off.
        top_n_sigma: above 0; inf or None for off.
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
        logit_bias: finite or -inf, added to the logits of these token ids.
        allowed_token_ids: the only tokens that may come, a ``TokenMask`` or token ids; None for all.
        banned_token_ids: tokens that never come, a ``TokenMask`` or token ids.
        bad_words: sequences of token ids, none empty: the last token of each is banned where the others precede it.
        no_repeat_ngram_size: no n-gram of so many tokens comes twice; 0 is off.
        min_tokens: for so many output tokens the ``stop_token_ids`` are banned.
        stop_token_ids: token ids that end the text.
        first_tokens_suppressed: tokens that the output doesn't begin with, a ``TokenMask`` or token ids.
        first_window: for how many output tokens that holds, at least 1.
        forced_tokens: the first output tokens, whatever all else says.
        bitmask: whether the request obeys the bitmask that is handed to a step.
        seed: an integer of up to 64 bits; None for one that is drawn when the request is added.
        logprobs: for how many of the likeliest tokens log-probabilities are wanted besides the drawn token's; None for
            none at all.

    Raises:
        ValueError: an argument out of range or of a wrong type; its message names it.

    Example:
        >>> RequestParams(temperature=0.7, top_p=1.5)
        Traceback (most recent call last):
        ValueError: `top_p` has to be a number from 0 to 1 (1 turns it off), but is 1.5
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon: float | None = None
    eta: float | None = None
    top_n_sigma: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_scope: Scope | None = None
    presence_scope: Scope | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_breakers: TokenMask | Sequence[int] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: TokenMask | Sequence[int] | None = None
    banned_token_ids: TokenMask | Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    no_repeat_ngram_size: int = 0
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    first_tokens_suppressed: TokenMask | Sequence[int] = ()
    first_window: int = 1
    forced_tokens: Sequence[int] = ()
    bitmask: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        given = self.__dict__
        for name, default, check in _CHECKED:
            value = given[name]
            if value is not default:
                given[name] = check(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


class _Packed(NamedTuple):
    """Parameters as a slot holds them."""

    record: np.ndarray[Any, Any]
    """int32, all but the lengths and a seed that is drawn."""
    masks: tuple[tuple[int, np.ndarray[Any, Any]], ...]
    """Planes in ascending order, and the packed masks that they hold."""


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
        max_length: tokens that a request may have, prompt included; not with ``history``.
        semantics: see above.
        max_rows: rows that a step may have; None for ``max_requests``. Rows of draft tokens count.
        max_listed: how much each request may list, in words of 32 bits: two for each biased token, one for each stop
            and forced token, ``longest + 1`` for each bad word, where the longest has that many tokens, one for each
            banned or suppressed first token up to 64 (more are kept as a mask), 51 for DRY.
        history: an engine's own tensors, kept up to date by the engine: token ids ``[max_requests, L]``, lengths of
            the prompts and lengths so far, ``[max_requests]``, int32 or int64. ``append`` is not used then.
        max_logprobs: the most that a request may want as ``logprobs``, at most V.

    Raises:
        ValueError: an argument out of range; a history of another shape, dtype or device.

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
        _check_whole("max_requests", max_requests, 1)
        _check_whole("vocab_size", vocab_size, 2)
        if semantics not in _PRESETS:
            raise ValueError(f"`semantics` has to be one of {', '.join(map(repr, _PRESETS))}, but is {semantics!r}")
        rows = max_requests if max_rows is None else _check_whole("max_rows", max_rows, 1)
        _check_whole("max_listed", max_listed, 0)
        _check_whole("max_logprobs", max_logprobs, 0, vocab_size)
        device = device_of("device", device)
        if history is not None:
            if max_length is not None:
                raise ValueError(
                    f"`max_length` is {max_length}, but with `history` its length counts: give one of them"
                )
            _check_history(history, max_requests, device)
        elif max_length is None:
            raise ValueError("`max_length` is needed where there is no `history`: the most tokens of a request")
        else:
            _check_whole("max_length", max_length, 1)
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
            self._slots, rows, vocab_size, self._preset.rules, self._preset.ties, self._preset.semantics, max_listed
        )
        # Views take the host longer than what is done with them.
        self._table, self._held, self._flags = table, table.unbind(), records[:, layout.FLAGS.value].unbind()
        self._staging = _Staging(device)
        self._active = bytearray(max_requests)
        self._seeds = random.Random()

    # -- Requests --------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of requests."""
        return sum(self._active)

    def __contains__(self, slot: object) -> bool:
        """Whether a slot holds a request."""
        return isinstance(slot, int) and 0 <= slot < self.max_requests and bool(self._active[slot])

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
            prompt_ids: its prompt, token ids of the vocabulary. Not looked at where the engine has the history.
            output_ids: what it has generated already, as after a preemption.
            slot: the slot it takes, which has to be free; None for the lowest one that is free.

        Returns:
            Its slot.

        Raises:
            ValueError: no free slot; a slot that is taken or doesn't exist; token ids outside the vocabulary; more
                tokens than ``max_length``, lists longer than ``max_listed``, or more ``logprobs`` than
                ``max_logprobs``. Nothing has changed then.
        """
        if not isinstance(params, RequestParams):
            raise ValueError(f"`params` has to be RequestParams, but is {params!r}")
        if slot is None:
            slot = self._active.find(0)
            if slot < 0:
                raise ValueError(f"all {self.max_requests} slots are taken: remove a request, or make the batch larger")
        else:
            self._check_slot(slot)
            if self._active[slot]:
                raise ValueError(f"slot {slot} holds a request: remove it first")
        if params.logprobs is not None and params.logprobs > self.max_logprobs:
            raise ValueError(
                f"`logprobs` is {params.logprobs}, but the batch was made with `max_logprobs` = {self.max_logprobs}"
            )
        packed = self._packed(params)
        prompt = output = _NO_TOKENS
        if self._owns_history:
            prompt = _token_ids("prompt_ids", prompt_ids, self.vocab_size)
            output = _token_ids("output_ids", output_ids, self.vocab_size)
            if len(prompt) + len(output) > self.max_length:
                raise ValueError(
                    f"prompt and output have {len(prompt) + len(output)} tokens, but `max_length` is {self.max_length}"
                )
        self._write(slot, packed, prompt, output, params.seed is None)
        self._active[slot] = 1
        return slot

    def remove(self, slot: int) -> None:
        """Let a request go: its slot is free, and rows that name it are left alone.

        Raises:
            ValueError: the slot holds no request.
        """
        self._check_taken("slot", slot)
        self._flags[slot].zero_()
        self._active[slot] = 0

    def move(self, source: int, target: int) -> None:
        """Move a request to a free slot. A history that is the engine's own is for the engine to move.

        Raises:
            ValueError: ``source`` holds no request, or ``target`` holds one. Nothing has changed then.
        """
        self._check_taken("source", source)
        self._check_slot(target)
        if source == target:
            return
        if self._active[target]:
            raise ValueError(f"`target` is {target}, which holds a request: remove it first, or use swap()")
        self.swap(source, target)

    def swap(self, a: int, b: int) -> None:
        """Exchange what two slots hold, a request or none, but for histories that are the engine's own.

        Raises:
            ValueError: a slot that doesn't exist.
        """
        self._check_slot(a)
        self._check_slot(b)
        if a == b:
            return
        swap_slots(self._table, a, b)
        self._active[a], self._active[b] = self._active[b], self._active[a]

    def append(self, slots: Ids, token_ids: Ids) -> None:
        """Add tokens to the histories of requests, in their order; a slot may come more than once.

        On a GPU with tensors this is one launch, which a graph may hold. What can't be checked without waiting for the
        device is ignored there: negative slots and tokens, slots of no request, and tokens beyond ``max_length``.

        Args:
            slots: the slots, ``[N]``; negative ones are ignored.
            token_ids: a token for each, ``[N]``; negative ones are ignored.

        Raises:
            ValueError: the engine has the history; not one token for each slot; a slot that is known on the host and
                holds no request. Nothing has changed then.
        """
        if not self._owns_history:
            raise ValueError("append() is for histories that the batch keeps, but this one's are the engine's")
        slots, token_ids = self._index("slots", slots), self._index("token_ids", token_ids)
        if len(slots) != len(token_ids):
            raise ValueError(f"`slots` are {len(slots)}, but `token_ids` are {len(token_ids)}: give one for each slot")
        append_tokens(self._slots, slots, token_ids)

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
            cache_position: index in its sequence of the last token that each row has seen, so that the row's token
                gets the next one; None for the end of the history and of the draft tokens before it. One that is
                smaller rewinds.
            bitmask: packed tokens that the grammar of each row allows, int32 ``[rows, W]``, bit ``i`` of word ``w``
                for token ``32 * w + i``; obeyed by requests that ask for it. Tokens beyond it are not allowed.
            draft_ids: with draft tokens, the token that each row was fed with, ``[rows]``. Rows of one request are
                neighbours, in order; the row at local position ``j`` sees the history and the draft tokens of the
                ``j - 1`` rows before it and its own.
            local_position: with draft tokens, how many of them each row sees, ``[rows]``; 0 for the first row.

        Returns:
            ``logits``.

        Raises:
            ValueError: an argument of another shape, dtype or device than is said here, or a slot known on the host
                that holds no request. Nothing has changed then.
        """
        rows = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
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

        Raises:
            ValueError: see ``apply_``.
        """
        rows = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        if out is None:
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        elif (out.shape, out.dtype, out.device) != (logits.shape, logits.dtype, logits.device):
            raise ValueError(
                f"`out` is {out.dtype} of shape {tuple(out.shape)} on {out.device}, but the logits are "
                f"{logits.dtype} of shape {tuple(logits.shape)} on {logits.device}"
            )
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
                or that has none, has NaN and rank 0.

        Raises:
            ValueError: see ``apply_``.
        """
        from fastlogits.sampling import Sample

        if logprobs not in (None, "raw", "processed"):
            raise ValueError(f"`logprobs` has to be None, 'raw' or 'processed', but is {logprobs!r}")
        rows = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        tokens, asked = sample_rows(self._step, logits, rows, logprobs, self.max_logprobs)
        return Sample.of(tokens, asked, self.max_logprobs)

    # -- What calls have in common ---------------------------------------------------------------------------------

    def _check_slot(self, slot: int) -> None:
        if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < self.max_requests:
            raise ValueError(f"slots are integers from 0 to {self.max_requests - 1}, but one is {slot!r}")

    def _check_taken(self, argument: str, slot: int) -> None:
        self._check_slot(slot)
        if not self._active[slot]:
            raise ValueError(f"`{argument}` is {slot}, which holds no request")

    def _index(self, argument: str, value: Ids) -> torch.Tensor:
        """Integers ``[N]`` on the device, checked where they are known on the host."""
        if not isinstance(value, torch.Tensor):
            value = torch.from_numpy(np.asarray(value, dtype=np.int64))
        if value.ndim != 1 or value.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"`{argument}` has to be int32 or int64 of one dimension, but is {value.dtype} of {tuple(value.shape)}"
            )
        device = value.device
        if device.type == "cpu" and argument == "slots":
            for slot in value.tolist():
                if slot >= self.max_requests or (slot >= 0 and not self._active[slot]):
                    raise ValueError(f"`slots` has {slot}, which holds no request; use -1 for a row of none")
        if device.type == "cpu" and argument == "token_ids" and len(value) and int(value.max()) >= self.vocab_size:
            raise ValueError(f"`token_ids` has {int(value.max())}, but the vocabulary has {self.vocab_size} tokens")
        if device != self.device:
            if device.type != "cpu":
                raise ValueError(f"`{argument}` is on {device}, but the batch is on {self.device}")
            value = to_device(value, self.device)
        return value

    def _rows(
        self,
        logits: torch.Tensor,
        slots: Ids,
        cache_position: Ids | None,
        bitmask: torch.Tensor | None,
        draft_ids: Ids | None,
        local_position: Ids | None,
    ) -> Rows:
        if logits.ndim != 2 or logits.shape[1] != self.vocab_size or logits.dtype not in _DTYPES:
            raise ValueError(
                f"`logits` have to be float32, float16 or bfloat16 of shape (rows, {self.vocab_size}), but are "
                f"{logits.dtype} of {tuple(logits.shape)}"
            )
        if logits.device != self.device:
            raise ValueError(f"`logits` are on {logits.device}, but the batch is on {self.device}")
        B = logits.shape[0]
        if self.max_rows < B:
            raise ValueError(f"`logits` have {B} rows, but the batch was made with `max_rows` = {self.max_rows}")
        if (draft_ids is None) != (local_position is None):
            raise ValueError("`draft_ids` and `local_position` have to be given together")
        given = {
            "slots": slots, "cache_position": cache_position, "draft_ids": draft_ids, "local_position": local_position
        }  # fmt: skip
        found = {name: None if value is None else self._index(name, value) for name, value in given.items()}
        for name, value in found.items():
            if value is not None and len(value) != B:
                raise ValueError(f"`{name}` has {len(value)} rows, but logits have {B}")
        if bitmask is not None and (
            bitmask.ndim != 2 or bitmask.dtype != torch.int32 or len(bitmask) != B or bitmask.device != self.device
        ):
            raise ValueError(
                f"`bitmask` has to be int32 of shape ({B}, {words(self.vocab_size)}) on {self.device}, but is "
                f"{bitmask.dtype} of {tuple(bitmask.shape)} on {bitmask.device}"
            )
        if bitmask is not None and bitmask.stride(1) != 1:
            bitmask = bitmask.contiguous()
        assert found["slots"] is not None
        return Rows(found["slots"], found["cache_position"], bitmask, found["draft_ids"], found["local_position"])

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
                f"the lists of the request take {listed} words (biases, stop and forced tokens, bad words, banned "
                f"tokens), but the batch was made with `max_listed` = {self.max_listed}"
            )
        return packed


_NO_TOKENS = np.zeros(0, dtype=np.int32)


_RULES = [(argument_of(kind), layout.OFF[kind]) for kind in layout.RULE_KINDS]
# The words before the lists, in the order of their places in the record.
_HEADER = struct.Struct("=6i Q 4f fi5f i 16i")
_LENGTHS, _SEED = struct.Struct("=2i"), struct.Struct("=Q")


def _pack(params: RequestParams, V: int, preset: _Preset) -> _Packed:
    flags = layout.ACTIVE.value
    masks: list[TokenMask | None] = [None] * layout.MASKS
    places = [0] * 16
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
            mask = fitted(f"`{name}`", _as_set(tokens), V)
            kept = masks[plane]
            masks[plane] = mask if kept is None else mask | kept
            flags |= flag.value
        else:
            put_ids(which, name, tokens)

    if (params.repetition_scope or preset.repetition) == "output":
        flags |= layout.OUTPUT_REPETITION.value
    if (params.presence_scope or preset.counts) == "output":
        flags |= layout.OUTPUT_COUNTS.value
    if params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty:
        flags |= layout.TALLIED.value
    if params.bitmask:
        flags |= layout.BITMASK.value
    if params.allowed_token_ids is not None:
        masks[layout.BAN_PLANE] = ~fitted("`allowed_token_ids`", _as_set(params.allowed_token_ids), V)
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
        tokens, values = list(params.logit_bias), params.logit_bias.values()
        _check_ids("logit_bias", tokens, V)
        put(layout.BIASES, struct.pack(f"={len(tokens)}i{len(tokens)}f", *tokens, *values), len(tokens))
    if params.bad_words:
        width = 1 + max(map(len, params.bad_words))
        table: list[int] = []
        for ids in params.bad_words:
            _check_ids("bad_words", ids, V)
            table += [ids[-1], len(ids) - 1, *ids[-2::-1], *[-1] * (width - 1 - len(ids))]
        put(layout.WORDS, struct.pack(f"={len(table)}i", *table), len(table))
        put(layout.WIDTH, b"", width)
    if params.dry_multiplier:
        least = max(1, params.dry_allowed_length)
        penalties = [
            params.dry_multiplier * params.dry_base ** (n - params.dry_allowed_length) if n >= least else 0.0
            for n in range(layout.LONGEST + 1)
        ]
        put(layout.DRY, np.array(penalties, dtype=np.float32).tobytes(), len(penalties))
        if len(params.dry_breakers):
            masks[layout.BREAKER_PLANE] = fitted("`dry_breakers`", _as_set(params.dry_breakers), V)
            flags |= layout.BREAKER_MASK.value

    given = params.__dict__
    rules = [off if given[name] is None else given[name] for name, off in _RULES]
    rules[layout.TOP_K_AT] = _small(int(rules[layout.TOP_K_AT]))
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
    )


def _check_ids(name: str, ids: Sequence[int], V: int) -> None:
    if max(ids) >= V:
        raise ValueError(f"`{name}`: token id {max(ids)} is outside the vocabulary of {V} tokens (0 to {V - 1})")


def _token_ids(name: str, ids: Ids, V: int) -> np.ndarray[Any, Any]:
    if isinstance(ids, torch.Tensor):
        if ids.device.type != "cpu":
            raise ValueError(f"`{name}` is on {ids.device}: give token ids on the host, so that nothing waits for them")
        ids = ids.numpy()
    if not len(ids):
        return _NO_TOKENS
    found = np.asarray(ids)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ValueError(f"`{name}` has to be integers of one dimension, but is {found.dtype} of shape {found.shape}")
    # Negative ids are the largest of all without their sign. Of a few thousand, argmax finds it sooner than max.
    unsigned = found.view(f"u{found.itemsize}")
    if unsigned[unsigned.argmax()] >= V:
        wrong = int(found[(found < 0) | (found >= V)][0])
        raise ValueError(f"`{name}`: token id {wrong} is outside the vocabulary of {V} tokens (0 to {V - 1})")
    return found


def _as_set(tokens: TokenMask | Sequence[int]) -> TokenSet:
    return tokens if isinstance(tokens, TokenMask) else tuple(tokens)


def _small(value: int) -> int:
    """What 32 bits hold of a count; larger ones mean the same."""
    return min(value, 2**31 - 1)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _single(value: float) -> float:
    """A number in float32, as a slot holds it: what is within a range may be rounded out of it."""
    return c_float(value).value if abs(value) <= _LARGEST else math.nan


def _check_number(name: str, value: Any, least: float = -math.inf) -> float:
    if not _is_number(value) or not abs(value) <= _LARGEST or value < least:
        at_least = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"`{name}` has to be a finite number{at_least}, but is {value!r}")
    return value  # type: ignore[no-any-return]


def _check_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        at_most = "" if most is None else f" and at most {most}"
        raise ValueError(f"`{name}` has to be an integer of at least {least}{at_most}, but is {value!r}")
    return value


def _is_in(bounds: Range, value: float) -> bool:
    return value == bounds.off or bool(bounds.has(value))


def _check_rule(name: str, value: Any, kind: RuleKind) -> float:
    bounds, whole = RANGES[kind], kind == "top_k"
    if (
        not _is_number(value)
        or (whole and not isinstance(value, int))
        or not _is_in(bounds, value)
        or not (whole or value == bounds.off or _is_in(bounds, _single(value)))
    ):
        what = "an integer" if whole else "a number"
        raise ValueError(f"`{name}` has to be {what} {bounds.words}, but is {value!r}")
    return value  # type: ignore[no-any-return]


def _check_repetition(name: str, value: Any) -> float:
    if _single(_check_number(name, value, 0)) == 0:
        raise ValueError(f"`{name}` has to be above 0 (1 turns it off), but is 0")
    return value  # type: ignore[no-any-return]


def _check_scope(name: str, value: Any) -> Any:
    if value not in get_args(Scope):
        raise ValueError(f"`{name}` has to be 'all', 'output' or None, but is {value!r}")
    return value


def _check_base(name: str, value: Any) -> float:
    if _check_number(name, value, 1) > _LARGEST_BASE:
        raise ValueError(f"`{name}` has to have a finite {layout.LONGEST}th power, but is {value!r}")
    return value  # type: ignore[no-any-return]


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` has to be True or False, but is {value!r}")
    return value


def _check_set(name: str, value: Any) -> TokenSet:
    return checked_set(f"`{name}`", value)


def _sequence(name: str, ids: Any) -> tuple[int, ...]:
    if isinstance(ids, torch.Tensor):
        ids = ids.tolist()
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (list, tuple, Iterable)):
        raise ValueError(f"`{name}` has to be token ids, but is {ids!r}")
    found = tuple(ids)
    if not found or (set(map(type, found)) == {int} and min(found) >= 0):
        return found
    for token in found:
        if isinstance(token, bool) or not hasattr(token, "__index__") or token < 0:
            raise ValueError(f"`{name}` has to be token ids of at least 0, but has {token!r} among them")
    return tuple(map(int, found))


def _check_words(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"`{name}` has to be sequences of token ids, but is {value!r}")
    sequences = tuple(_sequence(name, each) for each in value)
    if not all(sequences):
        raise ValueError(f"`{name}` has to be sequences of at least one token id, but one of them is empty")
    return sequences


def _check_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, (dict, Mapping)):
        raise ValueError(f"`{name}` has to be a mapping from token ids to numbers, but is {value!r}")
    biases = dict(value)
    _sequence(name, biases)
    for token, bias in biases.items():
        if not _is_number(bias) or not (bias == -math.inf or abs(bias) <= _LARGEST):
            raise ValueError(f"`{name}` has to be finite or -inf, but is {bias!r} for token {token}")
    return biases


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "temperature": partial(_check_number, least=0),
    **{argument_of(kind): partial(_check_rule, kind=kind) for kind in layout.RULE_KINDS},
    "repetition_penalty": _check_repetition,
    "presence_penalty": _check_number,
    "frequency_penalty": _check_number,
    "repetition_scope": _check_scope,
    "presence_scope": _check_scope,
    "dry_multiplier": partial(_check_number, least=0),
    "dry_base": _check_base,
    "dry_allowed_length": partial(_check_whole, least=0),
    "dry_breakers": _check_set,
    "logit_bias": _check_bias,
    "allowed_token_ids": _check_set,
    "banned_token_ids": _check_set,
    "bad_words": _check_words,
    "no_repeat_ngram_size": partial(_check_whole, least=0),
    "min_tokens": partial(_check_whole, least=0),
    "stop_token_ids": lambda name, value: tuple(_check_set(name, value)),
    "first_tokens_suppressed": _check_set,
    "first_window": partial(_check_whole, least=1),
    "forced_tokens": _sequence,
    "bitmask": _check_bool,
    "seed": partial(_check_whole, least=-(2**63), most=2**64 - 1),
    "logprobs": partial(_check_whole, least=0),
}
# What is left as it is needs no check: most of the parameters of most requests.
_CHECKED = [(each.name, each.default, _CHECKS[each.name]) for each in fields(RequestParams)]


def _check_history(history: tuple[torch.Tensor, ...], slots: int, device: torch.device) -> None:
    names = ("token ids", "prompt lengths", "lengths")
    if len(history) != len(names):
        raise ValueError("`history` has to be three tensors: token ids, prompt lengths, lengths so far")
    for name, tensor, dims in zip(names, history, (2, 1, 1), strict=True):
        if tensor.ndim != dims or tensor.shape[0] != slots or tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"`history`: {name} have to be int32 or int64 of {dims} dimensions and {slots} slots, but are "
                f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"`history`: {name} are on {tensor.device}, but the batch is on {device}")
