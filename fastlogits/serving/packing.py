"""A request as the words of its slot: a record of numbers and lists, and packed masks."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from fastlogits_kernels.rules import Order, Ties, argument_of
from fastlogits_kernels.serving import layout
from fastlogits_kernels.serving.layout import Semantics

from fastlogits.serving.params import RequestParams, Scope
from fastlogits.token_mask import TokenMask, TokenSet, fitted

Stack: TypeAlias = Order
"""The stack whose semantics a batch follows."""


class StackSemantics(NamedTuple):
    """Where the stacks differ, apart from the order of the truncations."""

    ties: Ties
    repetition: Scope
    counts: Scope
    kernel: Semantics


STACKS: dict[Stack, StackSemantics] = {
    "transformers": StackSemantics("all", "all", "output", Semantics()),
    "vllm": StackSemantics("all", "all", "output", Semantics(words_in_output=True)),
    "sglang": StackSemantics("lowest", "output", "output", Semantics(bias_last=True)),
}

STAGED = 2**16
"""Words of a block of staging memory: enough for dozens of requests."""
# Larger sets of tokens are kept as packed masks, which cost the same whatever they hold.
_MOST_LISTED_IN_A_SET = 64


class PackedMask(NamedTuple):
    """A set of tokens as a slot holds it."""

    plane: int
    words: np.ndarray[Any, Any]
    """int32, a bit for each token."""


class PackedParams(NamedTuple):
    """Parameters as a slot holds them."""

    record: np.ndarray[Any, Any]
    """int32: everything but the lengths and a random seed."""
    masks: tuple[PackedMask, ...]
    """In ascending order of their planes."""
    looks_back: bool
    """Whether the tokens so far matter, and not only how many there are."""

    @property
    def listed(self) -> int:
        """Words that the lists take."""
        begin: int = layout.RECORD.value
        return len(self.record) - begin


class Staging:
    """Host memory from which requests are copied to the device, piece by piece and never the same piece twice.

    It is pinned where a GPU copies from it. A used block goes back to torch, which reuses it once the copies from it
    are done, on whatever streams they are. So nothing waits, and nothing is overwritten too early.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._used = 0
        self._array = np.zeros(0, dtype=np.int32)

    def take(self, count: int) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
        """``count`` words, int32, uninitialised: as a tensor and as an array."""
        begin, end = self._used, self._used + count
        if end > len(self._array):
            self._block = torch.empty(max(count, STAGED), dtype=torch.int32, pin_memory=self._pinned)
            self._array, begin, end = self._block.numpy(), 0, count
        self._used = end
        return self._block[begin:end], self._array[begin:end]


# The words before the lists, in the order of their places in the record.
_HEADER = struct.Struct(
    f"=6i Q 4f {''.join('i' if whole else 'f' for whole in layout.INTEGERS)} 3i {2 * layout.N_LISTS}i"
)
_LENGTHS, _SEED = struct.Struct("=2i"), struct.Struct("=Q")
# The parameter of each truncation, the value that turns it off, and whether it is an integer.
_RULES = [
    (argument_of(kind), int(layout.OFF[kind]) if whole else layout.OFF[kind], whole)
    for kind, whole in zip(layout.RULE_KINDS, layout.INTEGERS, strict=True)
]


def write_lengths(record: np.ndarray[Any, Any], tokens: int, prompt: int) -> None:
    """Write into a record how many tokens its history has, and how many of them are the prompt."""
    _LENGTHS.pack_into(record.data, 4 * layout.LENGTH.value, tokens, prompt)


def write_seed(record: np.ndarray[Any, Any], seed: int) -> None:
    """Write a seed of 64 bits into a record."""
    _SEED.pack_into(record.data, 4 * layout.SEED.value, seed)


def pack(params: RequestParams, V: int, semantics: StackSemantics) -> PackedParams:
    """The words of a request for a vocabulary of ``V`` tokens.

    Raises:
        ValueError: a token id outside the vocabulary.
    """
    slot = _Slot(V)
    counts_tokens = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    slot.set_flag(layout.TALLIED, counts_tokens)
    slot.set_flag(layout.OUTPUT_REPETITION, (params.repetition_scope or semantics.repetition) == "output")
    slot.set_flag(layout.OUTPUT_COUNTS, (params.presence_scope or semantics.counts) == "output")
    slot.set_flag(layout.BITMASK, params.bitmask is not False)
    slot.set_flag(layout.NEEDS_BITMASK, params.bitmask)
    _put_sets(slot, params)
    _put_lists(slot, params)
    _put_dry(slot, params)
    looks_back = counts_tokens or params.dry_multiplier or params.no_repeat_ngram_size
    if params.bad_words and not looks_back:
        looks_back = any(len(word) > 1 for word in params.bad_words)
    masks = [PackedMask(plane, mask.bits().numpy()) for plane, mask in enumerate(slot.masks) if mask is not None]
    record = np.frombuffer(_header(slot, params) + b"".join(slot.lists), dtype=np.int32)
    return PackedParams(record, tuple(masks), bool(looks_back))


class _Slot:
    """What has been put together of a slot's words."""

    def __init__(self, V: int) -> None:
        self.V = V
        self.flags: int = layout.ACTIVE.value
        self.masks: list[TokenMask | None] = [None] * layout.MASKS
        self.places = [0] * (2 * layout.N_LISTS)
        self.lists: list[bytes] = []
        self._end: int = layout.RECORD.value

    def set_flag(self, flag: Any, condition: object) -> None:
        if condition:
            self.flags |= flag.value

    def put(self, which: Any, packed: bytes, count: int) -> None:
        """Put a list of ``count`` entries behind those that are there."""
        self.places[2 * which.value : 2 * which.value + 2] = self._end, count
        self.lists.append(packed)
        self._end += len(packed) // 4

    def put_ids(self, which: Any, name: str, ids: Sequence[int]) -> None:
        self.check_ids(name, ids)
        self.put(which, struct.pack(f"={len(ids)}i", *ids), len(ids))

    def put_mask(self, plane: int, flag: Any, mask: TokenMask) -> None:
        """Put a packed mask into its plane, with what the plane has already."""
        kept = self.masks[plane]
        self.masks[plane] = mask if kept is None else mask | kept
        self.flags |= flag.value

    def put_set(self, which: Any, plane: int, flag: Any, name: str, tokens: TokenMask | Sequence[int]) -> None:
        """Put a set of tokens: as a list where it is small, else as a mask."""
        if isinstance(tokens, TokenMask) or len(tokens) > _MOST_LISTED_IN_A_SET:
            self.put_mask(plane, flag, fitted(name, _as_set(tokens), self.V))
        elif tokens:
            self.put_ids(which, name, tokens)

    def check_ids(self, name: str, ids: Sequence[int]) -> None:
        if max(ids) >= self.V:
            raise ValueError(f"{name} must have token ids of the vocabulary, 0 to {self.V - 1}, got {max(ids)}")


def _put_sets(slot: _Slot, params: RequestParams) -> None:
    if params.allowed_token_ids is not None:
        allowed = fitted("allowed_token_ids", _as_set(params.allowed_token_ids), slot.V)
        slot.put_mask(layout.BAN_PLANE, layout.BAN_MASK, ~allowed)
    slot.put_set(layout.BANS, layout.BAN_PLANE, layout.BAN_MASK, "banned_token_ids", params.banned_token_ids)
    first = params.first_tokens_suppressed
    slot.put_set(layout.FIRSTS, layout.FIRST_PLANE, layout.FIRST_MASK, "first_tokens_suppressed", first)


def _put_lists(slot: _Slot, params: RequestParams) -> None:
    if params.stop_token_ids:
        slot.put_ids(layout.STOPS, "stop_token_ids", params.stop_token_ids)
    if params.forced_tokens:
        slot.put_ids(layout.FORCED, "forced_tokens", params.forced_tokens)
    if params.logit_bias:
        tokens, values = cast("list[int]", list(params.logit_bias)), params.logit_bias.values()
        slot.check_ids("logit_bias", tokens)
        slot.put(layout.BIASES, struct.pack(f"={len(tokens)}i{len(tokens)}f", *tokens, *values), len(tokens))
    if params.bad_words:
        width = 1 + max(map(len, params.bad_words))
        table: list[int] = []
        for ids in params.bad_words:
            slot.check_ids("bad_words", ids)
            table += [ids[-1], len(ids) - 1, *ids[-2::-1], *[-1] * (width - 1 - len(ids))]
        slot.put(layout.SEQUENCES, struct.pack(f"={len(table)}i", *table), len(table))
        slot.put(layout.SEQUENCE_WIDTH, b"", width)


def _put_dry(slot: _Slot, params: RequestParams) -> None:
    if not params.dry_multiplier:
        return
    least = max(1, params.dry_allowed_length)
    penalties = [
        params.dry_multiplier * params.dry_base ** (n - params.dry_allowed_length) if n >= least else 0.0
        for n in range(layout.LONGEST + 1)
    ]
    slot.put(layout.DRY, np.array(penalties, dtype=np.float32).tobytes(), len(penalties))
    if len(params.dry_breakers):
        breakers = fitted("dry_breakers", _as_set(params.dry_breakers), slot.V)
        slot.put_mask(layout.BREAKER_PLANE, layout.BREAKER_MASK, breakers)


def _header(slot: _Slot, params: RequestParams) -> bytes:
    """The words before the lists. Lengths are written when the request is added, and so is a random seed."""
    given = params.__dict__
    rules = [
        off if (value := given[name]) is None else _small(int(value)) if whole else value
        for name, off, whole in _RULES
    ]  # fmt: skip
    return _HEADER.pack(
        0, 0, slot.flags, _small(params.no_repeat_ngram_size), _small(params.min_tokens), _small(params.first_window),
        (params.seed or 0) & (2**64 - 1),
        params.temperature, params.repetition_penalty, params.presence_penalty, params.frequency_penalty,
        *rules,
        -1 if params.logprobs is None else params.logprobs,
        0, _gram(params),
        *slot.places,
    )  # fmt: skip


def _gram(params: RequestParams) -> int:
    """Tokens in a row without which no n-gram repeats, and DRY lowers nothing; 0 where one token may suffice."""
    sizes = [params.no_repeat_ngram_size - 1] if params.no_repeat_ngram_size > 1 else []
    if params.dry_multiplier:
        sizes.append(max(1, params.dry_allowed_length))
    return min(*sizes, layout.LONGEST_GRAM.value) if sizes else 0


def _as_set(tokens: TokenMask | Sequence[int]) -> TokenSet:
    return tokens if isinstance(tokens, TokenMask) else tuple(tokens)


def _small(value: int) -> int:
    """A count within 32 bits; larger counts mean the same."""
    return min(value, 2**31 - 1)
