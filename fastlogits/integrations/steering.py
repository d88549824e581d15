"""What one request asks of fastlogits inside another engine, and batches of such requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from fastlogits_kernels._triton import to_device

from fastlogits.serving import BatchProcessor, Preset, RequestParams

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
"""Parameters of ``RequestParams`` that act on the logits before an engine's temperature."""

CUTS = ("typical_p", "epsilon", "eta")
"""Those that look at probabilities, which need the temperature."""

MAX_LISTED = 4096
"""Words that the lists of a request may take; see ``max_listed`` of ``BatchProcessor``."""


class Wishes(NamedTuple):
    """What a request asks for, checked."""

    edits: RequestParams
    """What acts before the temperature; its own temperature is 1."""
    cuts: RequestParams | None
    """What needs the temperature; None where nothing does."""

    @property
    def looks_back(self) -> bool:
        """Whether it matters what has been generated so far, or how much."""
        edits = self.edits
        return bool(
            edits.no_repeat_ngram_size
            or edits.dry_multiplier
            or edits.first_tokens_suppressed
            or edits.forced_tokens
            or any(len(word) > 1 for word in edits.bad_words)
        )


def read_wishes(given: Any, names: Collection[str], where: str, temperature: float) -> Wishes:
    """Check what a request asks for.

    Args:
        given: a mapping from names of ``RequestParams`` to values, or the same as a text in JSON, for interfaces that
            take nothing but text and numbers.
        names: those that are allowed here.
        where: what the user calls the argument.
        temperature: that of the request; 0 for greedy, which truncations don't change.

    Raises:
        ValueError: an unknown name, or one that the engine has an argument of its own for; a value out of range; lists
            that are too long.

    Example:
        >>> read_wishes({"epsilon": 0.01}, CUTS, "extra_args['fastlogits']", 0.7).cuts.temperature
        0.7
        >>> read_wishes({"top_k": 9}, CUTS, "extra_args['fastlogits']", 0.7)
        Traceback (most recent call last):
        ValueError: extra_args['fastlogits'] has 'top_k', which the engine itself applies: ...
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"{where} has to be a mapping, or one in JSON, but is {given!r}: {error}") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} has to be a mapping from names to values, or one in JSON, but is {given!r}")
    for name in given:
        if name in names:
            continue
        if name in RequestParams.__dataclass_fields__:
            raise ValueError(
                f"{where} has {name!r}, which the engine itself applies: give it as the engine's own parameter; here "
                f"there are {', '.join(names)}"
            )
        raise ValueError(f"{where} has {name!r}, which is unknown; there are {', '.join(names)}")
    try:
        edits = RequestParams(**{name: value for name, value in given.items() if name not in CUTS})
        wanted = {name: value for name, value in given.items() if name in CUTS}
        cuts = RequestParams(temperature=temperature, **wanted) if wanted else None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    longest = max(map(len, edits.bad_words), default=0)
    listed = len(edits.forced_tokens) + len(edits.bad_words) * (longest + 1)
    most = MAX_LISTED - 256  # room for what is always short: sets of up to 64 tokens, and DRY
    if listed > most:
        raise ValueError(
            f"{where}: forced_tokens and bad_words take {listed} words (one for a forced token, {longest + 1} for each "
            f"bad word, since the longest has {longest} tokens), but may take {most}"
        )
    return Wishes(edits, cuts if temperature > 0 else None)


@lru_cache
def say_once(message: str) -> None:
    """Log an error that would come again at every step."""
    logger.error(message)


class Cutter:
    """Truncations that need the temperature, by which the engine divides only later: found on a copy of the logits."""

    def __init__(self, max_requests: int, vocab_size: int, device: torch.device, max_rows: int, preset: Preset) -> None:
        self._batch = BatchProcessor(
            max_requests, vocab_size, device, max_length=1, max_rows=max_rows, semantics=preset, max_listed=0
        )

    def __len__(self) -> int:
        return len(self._batch)

    def put(self, slot: int, cuts: RequestParams | None) -> None:
        """What a slot asks for from now on; None for nothing."""
        if slot in self._batch:
            self._batch.remove(slot)
        if cuts is not None:
            self._batch.add(cuts, slot=slot)

    def has(self, slot: int) -> bool:
        """Whether a slot asks for anything."""
        return slot in self._batch

    def cut_(self, logits: torch.Tensor, slots: torch.Tensor) -> None:
        """Set to -inf what the requests of the rows cut away; -1 for a row that has nothing to do with it."""
        cut = self._batch.apply(logits, slots)
        logits.masked_fill_(cut == float("-inf"), float("-inf"))


class Live:
    """A request, and the list to which its engine adds the tokens that it generates.

    Args:
        wishes: what it asks for.
        prompt: its prompt.
        outputs: the engine's own list; a negative id stands for a token that the engine doesn't know yet.
    """

    __slots__ = ("outputs", "prompt", "slot", "taken", "wishes")

    def __init__(self, wishes: Wishes, prompt: Sequence[int], outputs: Sequence[int]) -> None:
        self.wishes, self.prompt, self.outputs = wishes, prompt, outputs
        self.slot: int | None = None
        self.taken = 0


class LiveBatch:
    """Requests whose tokens an engine keeps in lists on the host, which grow, and may shrink again.

    Nothing is counted: before each step a request's history is brought to what its list says, and a step that is
    processed twice gives the same twice. There is always room: where slots, rows or tokens don't suffice, they double.

    Args:
        vocab_size: tokens of the vocabulary.
        device: where the logits are.
        max_requests: requests at a time.
        max_length: tokens of a request.
        preset: the engine's semantics.
    """

    def __init__(
        self, vocab_size: int, device: torch.device, max_requests: int, max_length: int, preset: Preset
    ) -> None:
        self.vocab_size, self.device, self._preset = vocab_size, device, preset
        self._held: dict[int, Live] = {}  # by slot, the one that was seen last at the end
        self._listed: list[int] = []  # slots of the rows, the same that is on the device
        self._make(max_requests, max_length, max_requests)

    @property
    def max_requests(self) -> int:
        """Number of slots now."""
        return self._batch.max_requests

    def let_go(self, live: Live) -> None:
        """Free the slot of a request, if it has one."""
        if live.slot is not None and live.slot >= 0:
            del self._held[live.slot]
            self._batch.remove(live.slot)
            self._cutter.put(live.slot, None)
        live.slot = None

    def process_(self, logits: torch.Tensor, rows: Sequence[Live | None]) -> torch.Tensor:
        """Process the logits ``[B, V]`` of a step in place; the rows of None stay as they are."""
        self._make_room(rows)
        new_slots: list[int] = []
        new_tokens: list[int] = []
        slots = [-1 if live is None else self._slot(live, new_slots, new_tokens) for live in rows]
        if new_slots:
            self._batch.append(new_slots, new_tokens)
        if slots != self._listed:
            self._listed = slots
            self._slots = to_device(torch.tensor(slots), self.device)
            cuts = [slot if slot >= 0 and self._cutter.has(slot) else -1 for slot in slots]
            self._cut_slots = to_device(torch.tensor(cuts), self.device) if max(cuts, default=-1) >= 0 else None
        if max(slots, default=-1) >= 0:
            self._batch.apply_(logits, self._slots)
            if self._cut_slots is not None:
                self._cutter.cut_(logits, self._cut_slots)
        return logits

    def _make(self, max_requests: int, max_length: int, max_rows: int) -> None:
        sizes: dict[str, Any] = {"max_rows": max_rows, "semantics": self._preset}
        self._batch = BatchProcessor(
            max_requests, self.vocab_size, self.device, max_length=max_length, max_listed=MAX_LISTED, **sizes
        )
        self._cutter = Cutter(max_requests, self.vocab_size, self.device, max_rows, self._preset)
        for live in self._held.values():
            live.slot = None
        self._held.clear()
        self._listed = []

    def _make_room(self, rows: Sequence[Live | None]) -> None:
        """Let the rows find a slot each, and space for their tokens."""
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
            # An engine that doesn't say when a request is over: those go that have not been seen for longest.
            here = set(map(id, lives))
            for live in [live for live in self._held.values() if id(live) not in here][:short]:
                self.let_go(live)

    def _slot(self, live: Live, new_slots: list[int], new_tokens: list[int]) -> int:
        """The slot of a request; tokens that its history lacks are added to the lists, or it is written anew."""
        known = len(live.outputs)
        if known and live.outputs[-1] < 0:
            say_once("requests are not steered: the engine keeps their newest tokens from logits processors")
            return -1
        if live.slot is not None and (live.slot < 0 or live.taken <= known):
            if live.slot >= 0:
                new_slots += [live.slot] * (known - live.taken)
                new_tokens += live.outputs[live.taken :]
                self._held[live.slot] = self._held.pop(live.slot)
        else:
            self.let_go(live)
            try:
                live.slot = self._batch.add(live.wishes.edits, live.prompt, live.outputs)
                self._held[live.slot] = live
                self._cutter.put(live.slot, live.wishes.cuts)
            except ValueError as error:
                # Whoever else is in the batch must not suffer for what could not be checked before.
                logger.error("a request is not steered: %s", error)
                live.slot = -1
            self._listed = []
        live.taken = known
        return live.slot


def _doubled(size: int, least: int) -> int:
    while size < least:
        size *= 2
    return size
