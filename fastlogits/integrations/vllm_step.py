"""The step of vLLM's newer runner: requests in slots, and the draw of a token for each row.

It knows tensors and parameters, and nothing of vLLM: the samplers in ``vllm_sampler`` hand over what vLLM has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from fastlogits_kernels.rules import argument_of
from fastlogits_kernels.runtime.launcher import to_device
from fastlogits_kernels.serving.layout import RULE_KINDS

from fastlogits.integrations.requests import MAX_LISTED, has_room_for_index
from fastlogits.serving.batch import BatchProcessor, History
from fastlogits.serving.packing import STACKS, pack
from fastlogits.serving.params import RequestParams

if TYPE_CHECKING:
    from fastlogits.sampled import Distribution, Sample

Foreign: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""What others do to the logits after penalties and bans, float32 ``[rows, V]``, and before the temperature."""

_DRAWS = ("temperature", *map(argument_of, RULE_KINDS))


class Places(NamedTuple):
    """Where the rows of a step are in the texts of their slots."""

    positions: torch.Tensor
    """Index of the last token that each row has seen."""
    input_ids: torch.Tensor
    """The token that each row was fed with."""
    local_position: torch.Tensor
    """How many draft tokens it sees."""


class Rows(NamedTuple):
    """The rows of a step: of slots alone where each has one row, which has seen all of the slot's tokens."""

    slots: torch.Tensor
    places: Places | None = None
    """Where else in the text the rows are."""
    has_drafts: bool = True
    """Whether any row sees draft tokens, if there are places."""

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of ``BatchProcessor``'s calls."""
        if self.places is None:
            return {}
        positions, input_ids, local_position = self.places
        if not self.has_drafts:
            return {"cache_position": positions}
        return {"cache_position": positions, "draft_ids": input_ids, "local_position": local_position}


class Taken(NamedTuple):
    """What requests take of a step with drafts."""

    tokens: torch.Tensor
    """int64 ``[requests, most]``; behind a request's last token is anything."""
    counts: torch.Tensor
    """How many tokens, int32 ``[requests]``."""


class EndTokens(NamedTuple):
    """Tokens that may not end a request yet, unless its grammar allows nothing else."""

    tokens: tuple[int, ...]
    length: int
    """From how many tokens on, prompt included, it may end."""


class StepOfSlots:
    """Draws the tokens of all requests, in one pass where nothing foreign acts between penalties and temperature.

    Where something does, there are two passes, the second from float32 logits: the tokens are the same.

    Args:
        vocab_size: tokens of the vocabulary.
        max_rows: the most rows of a step.
        tokens: the engine's table of tokens, int32 or int64 ``[slots, L]``, to which it only appends.
        lengths: how many tokens each slot has, ``[slots]``.
        max_logprobs: for how many of the most likely tokens the distribution that is sampled may be reported.
    """

    def __init__(
        self, vocab_size: int, max_rows: int, tokens: torch.Tensor, lengths: torch.Tensor, max_logprobs: int
    ) -> None:
        self.vocab_size, self.max_rows, self.max_logprobs = vocab_size, max_rows, max_logprobs
        self._tokens, self._lengths = tokens, lengths
        self._params: dict[int, RequestParams] = {}
        self._ends: dict[int, EndTokens] = {}
        # The engine's own prompt lengths are in another buffer at every step.
        self._prompts = torch.zeros(len(lengths), dtype=torch.int32, device=tokens.device)
        self._listed = MAX_LISTED
        # The engine appends to a slot's tokens until it adds another request to it. One index is made, before the
        # engine has given away the memory.
        self._has_index = has_room_for_index(tokens, vocab_size)
        self._whole = self._batch(max_logprobs=max_logprobs, history_grows=self._has_index)
        self._edits: BatchProcessor | None = None
        self._draws: BatchProcessor | None = None
        self._end_table: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def slots(self) -> int:
        """Number of slots."""
        return len(self._lengths)

    def add(self, slot: int, params: RequestParams, ends: EndTokens | None = None) -> None:
        """Put a request into a slot, in place of what is there.

        Raises:
            ValueError: a token id outside the vocabulary. Then the slot is empty.
        """
        self.remove(slot)
        try:
            self._whole.add(params, slot=slot)
        except ValueError:
            if not self._make_room(params):
                raise
            self._whole.add(params, slot=slot)
        self._params[slot] = params
        if ends is not None:
            self._ends[slot] = ends
            self._end_table = None
        if self._edits is not None and self._draws is not None:
            self._edits.add(_edits_of(params), slot=slot)
            self._draws.add(_draws_of(params), slot=slot)

    def remove(self, slot: int) -> None:
        """Empty a slot."""
        if self._params.pop(slot, None) is not None:
            for batch in (self._whole, self._edits, self._draws):
                if batch is not None:
                    batch.remove(slot)
        if self._ends.pop(slot, None) is not None:
            self._end_table = None

    def write_prompts(self, lengths: torch.Tensor) -> None:
        """Take over the lengths of all prompts, int32 ``[slots]`` on the host. The tensor must not change any more."""
        self._prompts.copy_(to_device(lengths, self._prompts.device), non_blocking=True)

    def warm_up(self, dtype: torch.dtype, logprobs: Sequence[Distribution], drafts: bool) -> None:
        """Compile now what steps with logits of a dtype launch, without drafts and with them if there will be any."""
        common: Any = {"logprobs": logprobs, "bitmask": False}
        self._whole.warm_up(dtype, calls="sample", **common)
        if drafts:
            common |= {"cache_position": torch.int64, "draft_ids": torch.int32}
            self._whole.warm_up(dtype, calls=("sample", "accept"), **common)

    def _known(self, rows: Rows) -> Rows:
        """The rows, those of empty slots marked where the host would refuse them."""
        if rows.slots.device.type != "cpu":
            return rows
        return rows._replace(slots=torch.tensor([slot if slot in self._params else -1 for slot in rows.slots.tolist()]))

    def sample(
        self, logits: torch.Tensor, rows: Rows, foreign: Foreign | None, logprobs: Distribution | None = None
    ) -> Sample:
        """A token of each row ``[rows, V]``, and a report on it in one of the distributions. Empty slots get token 0.

        Args:
            logits: not written.
            rows: see there.
            foreign: what others do to the logits, of rows with places; None for nothing, which takes one pass.
            logprobs: of which distribution; see ``BatchProcessor.sample``.
        """
        rows = self._known(rows)
        if foreign is None:
            return self._whole.sample(logits, rows.slots, **rows.arguments, logprobs=logprobs)
        edited, draws = self._edited(logits, rows, foreign)
        return draws.sample(edited, rows.slots, **rows.arguments, logprobs=logprobs)

    def accept(self, tokens: torch.Tensor, rows: Rows, drafts: torch.Tensor, bounds: torch.Tensor, most: int) -> Taken:
        """Keep the tokens of each request up to the first that the next draft doesn't equal.

        Args:
            tokens: drawn in each row, int64 ``[rows]``.
            rows: see there.
            drafts: the token that each row was fed with, ``[rows]``; -1 for a draft that is never accepted.
            bounds: where the rows of each request begin and end, ``[requests + 1]``.
            most: the most rows of a request.
        """
        begin, last = bounds[:-1], bounds[1:].unsqueeze(1) - 1
        kept = self._whole.accept(tokens, self._known(rows).slots, drafts).kept.index_select(0, begin)
        places = torch.minimum(begin.unsqueeze(1) + torch.arange(most, device=tokens.device), last)
        return Taken(tokens[places], kept + 1)

    def process(self, logits: torch.Tensor, rows: Rows, foreign: Foreign | None) -> torch.Tensor:
        """The logits that are drawn from, float32 ``[rows, V]``: scaled, and -inf where a token is dropped."""
        rows = self._known(rows)
        if foreign is None:
            return self._whole.apply_(_copied(logits), rows.slots, **rows.arguments)
        edited, draws = self._edited(logits, rows, foreign)
        return draws.apply_(edited, rows.slots, **rows.arguments)

    def _edited(self, logits: torch.Tensor, rows: Rows, foreign: Foreign) -> tuple[torch.Tensor, BatchProcessor]:
        """Logits after penalties, bans and what others do, and the batch that draws from them."""
        if self._edits is None or self._draws is None:
            self._edits, self._draws = self._batch(), self._batch(max_listed=0, max_logprobs=self.max_logprobs)
            for slot, params in self._params.items():
                self._edits.add(_edits_of(params), slot=slot)
                self._draws.add(_draws_of(params), slot=slot)
        edited = self._edits.apply_(_copied(logits), rows.slots, **rows.arguments)
        if self._ends:
            self._ban_ends_(edited, rows)
        return foreign(edited), self._draws

    def _ban_ends_(self, logits: torch.Tensor, rows: Rows) -> None:
        """Ban the tokens that would end a request too early, in rows that have other tokens left."""
        tokens, lengths = self._ends_on_device()
        of = rows.slots.clamp(min=0)
        assert rows.places is not None
        ids, early = tokens.index_select(0, of), rows.places.positions + 1 < lengths.index_select(0, of)
        own = logits.gather(1, ids)
        nothing = float("-inf")
        others = logits.scatter(1, ids, nothing).amax(-1) > nothing
        logits.scatter_(1, ids, own.masked_fill((early & others & (rows.slots >= 0)).unsqueeze(1), nothing))

    def _ends_on_device(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._end_table is None:
            width = max(len(ends.tokens) for ends in self._ends.values())
            tokens = torch.zeros(self.slots, width, dtype=torch.int64)
            lengths = torch.zeros(self.slots, dtype=torch.int64)
            for slot, ends in self._ends.items():
                # A token that comes twice is written twice, with the same value.
                tokens[slot] = torch.tensor([*ends.tokens, *ends.tokens[:1] * (width - len(ends.tokens))])
                lengths[slot] = ends.length
            device = self._tokens.device
            self._end_table = to_device(tokens, device), to_device(lengths, device)
        return self._end_table

    def _batch(self, **sizes: Any) -> BatchProcessor:
        history: History = (self._tokens, self._prompts, self._lengths)
        given: dict[str, Any] = {"max_rows": self.max_rows, "max_listed": self._listed, "history": history}
        return BatchProcessor(self.slots, self.vocab_size, self._tokens.device, semantics="vllm", **given | sizes)

    def _make_room(self, params: RequestParams) -> bool:
        """Whether there is more room for lists now, as these parameters need it."""
        needed = pack(params, self.vocab_size, STACKS[self._whole.semantics]).listed
        if needed <= self._listed:
            return False
        self._listed = 1 << (needed - 1).bit_length()
        self._whole = self._batch(max_logprobs=self.max_logprobs, history_grows=self._has_index)
        for slot, held in self._params.items():
            self._whole.add(held, slot=slot)
        # Made anew where they are needed again.
        self._edits = self._draws = None
        return True


def _copied(logits: torch.Tensor) -> torch.Tensor:
    return torch.empty(logits.shape, dtype=torch.float32, device=logits.device).copy_(logits)


def _edits_of(params: RequestParams) -> RequestParams:
    """What acts before the temperature."""
    default = RequestParams()
    return replace(params, **{name: getattr(default, name) for name in _DRAWS}, logprobs=None)


def _draws_of(params: RequestParams) -> RequestParams:
    """The temperature, what comes after it, and the seed."""
    return RequestParams(**{name: getattr(params, name) for name in (*_DRAWS, "seed", "logprobs")})
