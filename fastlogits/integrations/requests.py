"""What one request asks of fastlogits inside another engine, and batches of such requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from fastlogits_kernels.runtime.launcher import to_device
from fastlogits_kernels.serving.layout import IndexSizes

from fastlogits.serving.batch import BatchProcessor
from fastlogits.serving.packing import Stack
from fastlogits.serving.params import RequestParams
from fastlogits.token_mask import TokenMask, fitted

Refuse: TypeAlias = Callable[[str], object]
"""Called with a message for each option of a request that can't be honoured."""

logger = logging.getLogger(__name__)

EDITS = (
    "banned_token_ids",
    "bad_words",
    "no_repeat_ngram_size",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_breakers",
    "first_tokens_suppressed",
    "first_window",
    "forced_tokens",
    "top_n_sigma",
)
"""Parameters of ``RequestParams`` that act before the engine's temperature."""

TRUNCATIONS = ("typical_p", "epsilon", "eta", "top_h", "top_a")
"""Parameters that act on probabilities, so that they need the temperature."""

MAX_LISTED = 4096
"""Words that the lists of a request may take; see ``max_listed`` of ``BatchProcessor``."""

_MOST_INDEX_BYTES = 2**28
"""What the index of all histories of an engine may take of the GPU's memory."""

_SHORT_LISTS = 256
"""Of those, the words for lists that are always short: sets of up to 64 tokens, and DRY."""
_UNKNOWN = 2**31 - 1
"""A token of no vocabulary. It takes a place in a history, and counts for nothing."""


class RequestOptions(NamedTuple):
    """What a request asks for, checked."""

    edits: RequestParams
    """What acts before the temperature. Its own temperature is 1."""
    truncations: RequestParams | None
    """What needs the temperature; None if nothing does."""

    @property
    def is_nothing(self) -> bool:
        """Whether no option is left."""
        return self.truncations is None and self.edits == RequestParams()


def read_options(
    given: Any,
    names: Collection[str],
    where: str,
    temperature: float,
    vocab_size: int | None = None,
    refuse: Refuse | None = None,
) -> RequestOptions:
    """Check what a request asks for.

    Args:
        given: a mapping from names of ``RequestParams`` to values, or the same as text in JSON, for interfaces that
            take only text and numbers.
        names: the names that are allowed here.
        where: what the user calls the argument.
        temperature: of the request; 0 for greedy, which truncations don't change.
        vocab_size: tokens of the vocabulary, to check token ids; None if it isn't known yet.
        refuse: for requests that run already, where an exception would reach nobody. It is called with each option that
            can't be honoured, and the rest is read. None raises at the first.

    Raises:
        ValueError: an unknown name, or one that the engine has an argument of its own for; a value out of range; a
            token id outside the vocabulary; lists that are too long.

    Example:
        >>> read_options({"epsilon": 0.01}, TRUNCATIONS, "extra_args['fastlogits']", 0.7).truncations.temperature
        0.7
        >>> read_options({"top_k": 9}, TRUNCATIONS, "extra_args['fastlogits']", 0.7)
        Traceback (most recent call last):
        ValueError: extra_args['fastlogits'] has 'top_k', which the engine itself applies: ...
        >>> left_out = []
        >>> options = read_options({"top_k": 9, "epsilon": 0.01}, TRUNCATIONS, "here", 0.7, refuse=left_out.append)
        >>> options.truncations.epsilon
        0.01
        >>> len(left_out)
        1
    """
    tell: Refuse = refuse or _raise
    wanted = {
        name: value for name, value in _as_mapping(given, where, tell).items() if _is_known(name, names, where, tell)
    }
    checked = {name: value for name, value in wanted.items() if _is_right(name, value, where, tell)}
    edits = RequestParams(**{name: value for name, value in checked.items() if name not in TRUNCATIONS})
    chosen = {name: value for name, value in checked.items() if name in TRUNCATIONS}
    truncations = RequestParams(temperature=temperature, **chosen) if chosen else None
    if vocab_size is not None:
        edits = within(edits, vocab_size, where, tell)
    return RequestOptions(_short_enough(edits, where, tell), truncations if temperature > 0 else None)


def _raise(message: str) -> NoReturn:
    raise ValueError(message)


def _as_mapping(given: Any, where: str, refuse: Refuse) -> Mapping[str, Any]:
    """The options as a mapping; an empty one if they are none."""
    read = given
    if isinstance(given, str):
        try:
            read = json.loads(given)
        except ValueError as error:
            refuse(f"{where} must be a mapping from names to values, or one in JSON, got {given!r}: {error}")
            return {}
    if not isinstance(read, Mapping):
        refuse(f"{where} must be a mapping from names to values, or one in JSON, got {read!r}")
        return {}
    return read


def _is_known(name: str, names: Collection[str], where: str, refuse: Refuse) -> bool:
    if name in names:
        return True
    if name in RequestParams.__dataclass_fields__:
        refuse(
            f"{where} has {name!r}, which the engine itself applies: give it as the engine's own parameter; here "
            f"there are {', '.join(names)}"
        )
    else:
        refuse(f"{where} has {name!r}, which is unknown; there are {', '.join(names)}")
    return False


def _is_right(name: str, value: Any, where: str, refuse: Refuse) -> bool:
    try:
        RequestParams(**{name: value})
    except ValueError as error:
        refuse(f"{where}: {error}")
        return False
    return True


def within(edits: RequestParams, vocab_size: int, where: str, refuse: Refuse) -> RequestParams:
    """The options that a vocabulary can honour.

    A token or a bad word with an id outside the vocabulary is left out: it could never be sampled. Forced tokens with
    such an id are left out as a whole.
    """
    changed: dict[str, Any] = {}

    def leave_out(name: str, kept: Any, wrong: object) -> None:
        changed[name] = kept
        refuse(f"{where}: {name} must have token ids of the vocabulary, 0 to {vocab_size - 1}, got {wrong}")

    for name in ("banned_token_ids", "first_tokens_suppressed", "dry_breakers"):
        tokens = getattr(edits, name)
        if isinstance(tokens, TokenMask):
            try:
                fitted(name, tokens, vocab_size)
            except ValueError:
                leave_out(name, (), f"a mask of {tokens.vocab_size} tokens")
        elif tokens and max(tokens) >= vocab_size:
            leave_out(name, tuple(token for token in tokens if token < vocab_size), max(tokens))
    words = tuple(word for word in edits.bad_words if max(word) < vocab_size)
    if len(words) < len(edits.bad_words):
        leave_out("bad_words", words, max(map(max, edits.bad_words)))
    if edits.forced_tokens and max(edits.forced_tokens) >= vocab_size:
        leave_out("forced_tokens", (), max(edits.forced_tokens))
    return replace(edits, **changed) if changed else edits


def has_room_for_index(tokens: torch.Tensor, vocab_size: int) -> bool:
    """Whether an index of an engine's histories ``[slots, L]``, which only grow, takes little enough memory.

    For ``history_grows`` of ``BatchProcessor``. Without it each step reads the histories anew.
    """
    slots, longest = tokens.shape
    return slots * IndexSizes.of(vocab_size, longest).total * 4 <= _MOST_INDEX_BYTES


def _short_enough(edits: RequestParams, where: str, refuse: Refuse) -> RequestParams:
    """The options, without lists that there is no room for."""
    most = MAX_LISTED - _SHORT_LISTS
    longest = max(map(len, edits.bad_words), default=0)
    forced, words = len(edits.forced_tokens), len(edits.bad_words) * (longest + 1)
    if forced + words <= most:
        return edits
    refuse(
        f"{where}: forced_tokens and bad_words take {forced + words} words (one for a forced token, {longest + 1} for "
        f"each bad word, since the longest has {longest} tokens), but may take {most}"
    )
    changed: dict[str, Any] = {"forced_tokens": ()} if forced > most else {}
    if words > most or not changed:
        changed["bad_words"] = ()
    return replace(edits, **changed)


def without_text(edits: RequestParams, *, counted: bool) -> tuple[RequestParams, list[str]]:
    """The options that can be honoured while the newest tokens aren't known, and the names of the others.

    Args:
        edits: the options of a request.
        counted: whether the number of tokens is known.
    """
    words = tuple(word for word in edits.bad_words if len(word) == 1)
    changed: dict[str, Any] = {name: 0 for name in ("no_repeat_ngram_size", "dry_multiplier") if getattr(edits, name)}
    if len(words) < len(edits.bad_words):
        changed["bad_words"] = words
    if not counted:
        changed |= {name: () for name in ("first_tokens_suppressed", "forced_tokens") if getattr(edits, name) != ()}
    return (replace(edits, **changed) if changed else edits), list(changed)


@lru_cache
def say_once(message: str) -> None:
    """Log an error once, which would come again at every step."""
    logger.error(message)


def say_left_out(messages: Sequence[str]) -> None:
    """Log which options of a request are not honoured."""
    if messages:
        logger.warning("a request is steered but for what can't be honoured: %s", "; ".join(messages))


class TruncationFilter:
    """Truncations that need the temperature, which the engine applies later: what they keep is found on a copy."""

    def __init__(
        self, max_requests: int, vocab_size: int, device: torch.device, max_rows: int, semantics: Stack
    ) -> None:
        self._batch = BatchProcessor(
            max_requests, vocab_size, device, max_length=1, max_rows=max_rows, semantics=semantics, max_listed=0
        )

    def __len__(self) -> int:
        return len(self._batch)

    def put(self, slot: int, truncations: RequestParams | None) -> None:
        """Set the truncations of a slot; None for none."""
        if slot in self._batch:
            self._batch.remove(slot)
        if truncations is not None:
            self._batch.add(truncations, slot=slot)

    def has(self, slot: int) -> bool:
        """Whether a slot has truncations."""
        return slot in self._batch

    def filter_(self, logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Set to -inf what the truncations of each row's slot drop; -1 for a row without any.

        The positions only tell several rows of a request apart.
        """
        kept = self._batch.apply(logits, slots, positions)
        logits.masked_fill_(kept == float("-inf"), float("-inf"))


class LiveRequest:
    """A request, and the list to which its engine adds the tokens that it generates.

    Args:
        options: of the request.
        prompt: its tokens.
        outputs: the engine's own list. A negative id stands for a token that the engine doesn't know yet.
    """

    __slots__ = ("blind", "blind_edits", "hides", "options", "outputs", "prompt", "slot", "taken")

    def __init__(self, options: RequestOptions, prompt: Sequence[int], outputs: Sequence[int]) -> None:
        self.options, self.prompt, self.outputs = options, prompt, outputs
        self.slot: int | None = None
        self.taken = 0
        # The options that can be honoured while the newest token isn't known, the names of the others, and whether
        # the slot holds only those.
        self.blind_edits, self.hides = without_text(options.edits, counted=True)
        self.blind = False


class LiveBatch:
    """Requests whose tokens an engine keeps in lists on the host. The lists grow, and may shrink again.

    Before each step the history of a request is made equal to its list, so that a step processed twice gives the same
    result twice. There is always room: slots, rows and tokens double where they don't suffice.

    Args:
        vocab_size: tokens of the vocabulary.
        device: where the logits are.
        max_requests: requests at a time.
        max_length: tokens of a request.
        semantics: of the engine.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, max_requests: int, max_length: int, semantics: Stack
    ) -> None:
        self.vocab_size, self.device, self._semantics = vocab_size, device, semantics
        self._held: dict[int, LiveRequest] = {}  # by slot; the one seen last is at the end
        self._listed: list[int] = []  # slots of the rows, as they are on the device
        self._make(max_requests, max_length, max_requests)

    @property
    def max_requests(self) -> int:
        """Number of slots now."""
        return self._batch.max_requests

    def release(self, live: LiveRequest) -> None:
        """Free the slot of a request, if it has one."""
        if live.slot is not None and live.slot >= 0:
            del self._held[live.slot]
            self._batch.remove(live.slot)
            self._filter.put(live.slot, None)
        live.slot = None

    def process_(self, logits: torch.Tensor, rows: Sequence[LiveRequest | None]) -> torch.Tensor:
        """Process the logits ``[B, V]`` of a step in place; rows of None stay as they are."""
        self._make_room(rows)
        new_slots: list[int] = []
        new_tokens: list[int] = []
        slots = [-1 if live is None else self._slot(live, new_slots, new_tokens) for live in rows]
        if new_slots:
            self._batch.append(new_slots, new_tokens)
        if slots != self._listed:
            self._listed = slots
            self._slots = to_device(torch.tensor(slots), self.device)
            filtered = [slot if slot >= 0 and self._filter.has(slot) else -1 for slot in slots]
            has_filtered = max(filtered, default=-1) >= 0
            self._filtered_slots = to_device(torch.tensor(filtered), self.device) if has_filtered else None
        if max(slots, default=-1) >= 0:
            self._batch.apply_(logits, self._slots)
            if self._filtered_slots is not None:
                self._filter.filter_(logits, self._filtered_slots)
        return logits

    def _make(self, max_requests: int, max_length: int, max_rows: int) -> None:
        sizes: dict[str, Any] = {"max_rows": max_rows, "semantics": self._semantics}
        self._batch = BatchProcessor(
            max_requests, self.vocab_size, self.device, max_length=max_length, max_listed=MAX_LISTED, **sizes
        )
        self._filter = TruncationFilter(max_requests, self.vocab_size, self.device, max_rows, self._semantics)
        for live in self._held.values():
            live.slot = None
        self._held.clear()
        self._listed = []

    def _make_room(self, rows: Sequence[LiveRequest | None]) -> None:
        """Make room for a slot for each row, and for its tokens."""
        batch, lives = self._batch, [live for live in rows if live is not None]
        length = max((len(live.prompt) + len(live.outputs) for live in lives), default=0)
        if length > batch.max_length or len(rows) > batch.max_rows or len(lives) > batch.max_requests:
            self._make(
                _doubled(batch.max_requests, len(lives)),
                _doubled(batch.max_length, length),
                _doubled(batch.max_rows, len(rows)),
            )
        short = sum(live.slot is None for live in lives) - (batch.max_requests - len(self._held))
        if short > 0:
            # The engine doesn't say when a request is over: those that were not seen for longest go.
            here = set(map(id, lives))
            for live in [live for live in self._held.values() if id(live) not in here][:short]:
                self.release(live)

    def _slot(self, live: LiveRequest, new_slots: list[int], new_tokens: list[int]) -> int:
        """The slot of a request. Tokens that its history lacks are added to the lists, or the slot is written anew."""
        known = len(live.outputs)
        blind = bool(live.hides) and known > 0 and live.outputs[-1] < 0
        if blind:
            say_once(
                f"{', '.join(live.hides)} of requests are not honoured: the engine keeps their newest tokens from "
                "logits processors"
            )
        if live.slot is not None and blind == live.blind and (live.slot < 0 or live.taken <= known):
            if live.slot >= 0:
                new_slots += [live.slot] * (known - live.taken)
                # A token that the engine doesn't know yet takes its place; nothing that is honoured now looks at it.
                new_tokens += [token if token >= 0 else _UNKNOWN for token in live.outputs[live.taken :]]
                self._held[live.slot] = self._held.pop(live.slot)
        else:
            self.release(live)
            live.blind = blind
            live.slot = self._add(live)
            self._listed = []
        live.taken = known
        return live.slot

    def _add(self, live: LiveRequest) -> int:
        """Write a request into a slot; -1 if nothing of it can be honoured."""
        batch = self._batch
        try:
            try:
                slot = batch.add(live.blind_edits if live.blind else live.options.edits, live.prompt, live.outputs)
            except ValueError:
                # What could not be checked before must not stop the other requests of the batch.
                left_out: list[str] = []
                edits = within(live.options.edits, self.vocab_size, "its options", left_out.append)
                say_left_out(left_out)
                live.options = live.options._replace(edits=edits)
                live.blind_edits, live.hides = without_text(edits, counted=True)
                slot = batch.add(live.blind_edits if live.blind else edits, live.prompt, live.outputs)
        except ValueError as error:
            logger.error("a request is not steered: %s", error)
            return -1
        self._held[slot] = live
        self._filter.put(slot, live.options.truncations)
        return slot


def _doubled(size: int, least: int) -> int:
    while size < least:
        size *= 2
    return size
