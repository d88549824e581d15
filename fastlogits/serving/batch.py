"""A serving step: one batch in which every request has its own parameters, processed by the same few launches."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from fastlogits_kernels.rules import ORDERS
from fastlogits_kernels.runtime.bits import words
from fastlogits_kernels.serving import layout
from fastlogits_kernels.serving.layout import NO_INDEX, HistoryIndex, IndexSizes, Slots, StepRows
from fastlogits_kernels.serving.reference import accepted
from fastlogits_kernels.serving.steps import (
    Step,
    accept_drafts,
    append_tokens,
    process_rows,
    sample_rows,
    swap_slots,
)

from fastlogits import warm_up as warming
from fastlogits.checks import LOGITS_DTYPES, device_of, is_integer, one_of, whole_number
from fastlogits.kept_tokens import KeptForm, checked_form, kept_of_bits
from fastlogits.parallel.dtensor import is_split
from fastlogits.representation import arguments
from fastlogits.sampled import Distribution, Sample
from fastlogits.serving.accepted import Accepted
from fastlogits.serving.arguments import (
    INDEX_DTYPES,
    NO_TOKENS,
    NOT_GIVEN,
    Ids,
    Index,
    check_distinct,
    check_draft_rows,
    check_history,
    check_neighbours,
    check_own_memory,
    history_ids,
    is_in_place,
    read_index,
)
from fastlogits.serving.packing import STACKS, PackedParams, Stack, Staging, pack, write_lengths, write_seed
from fastlogits.serving.params import RequestParams
from fastlogits.warm_up import WarmUp

if TYPE_CHECKING:
    from fastlogits.parallel.serving import SplitStep

History: TypeAlias = "tuple[torch.Tensor, torch.Tensor, torch.Tensor]"
Call: TypeAlias = Literal["sample", "apply_", "apply", "append", "accept", "swap"]


class BatchProcessor:
    """Fixed slots for the requests of a serving stack, and the step that processes a changing batch of them.

    A step takes the logits ``[rows, V]`` and the slot of each row. It launches the same kernels for every mix of
    requests, reads all parameters on the device, and neither waits nor copies. So one CUDA graph, captured once, serves
    every mix of requests. Adding a request takes one copy, changing it a few; removing, moving and swapping take one
    launch. They follow
    the order of the current stream, and never wait. Call them on the host between two replays, not inside a graph.

    A request's result depends on its own parameters, history, seed and position, and on nothing else: not on its slot,
    its row, or the other requests.

    Prompts, outputs and draft tokens may have token ids that the logits don't have: placeholders of images, ids of
    padded embeddings, negative ids. They take their place and count for nothing: they cause no penalty, ban or bias,
    though an n-gram or a repetition may contain them. Ids beyond 32 bits become -1.

    The host refuses what a call can't do if it can see that: in lists, arrays and tensors on the CPU. Tensors on a GPU
    can't be checked without waiting for it; each argument says what happens there.

    The order is: logit bias, repetition, frequency and presence penalty, DRY; then all bans (allowed and banned tokens,
    bad words, n-grams, minimum of tokens, first tokens, bitmask), which don't depend on each other; then temperature
    and truncations. A forced token gets 0 and all others -inf, whatever the bans. The arithmetic is float32. Where
    logits are the result, what biases and penalties change is rounded once to the dtype of the logits.

    ``semantics`` says where the serving stacks differ:

        ===============================  =================  =================  =================
        .                                transformers       vllm               sglang
        ===============================  =================  =================  =================
        ``order`` of ``SamplingParams``  transformers       vllm               sglang
        ``ties`` of ``SamplingParams``   all                all                lowest
        repetition penalty counts        prompt and output  prompt and output  the output
        presence, frequency count        the output         the output         the output
        bias and penalties               bias first         bias first         frequency,
                                                                               presence,
                                                                               repetition, DRY,
                                                                               bias
        bad words are looked for in      prompt and output  the output         prompt and output
        ===============================  =================  =================  =================

    Args:
        max_requests: number of slots.
        vocab_size: tokens of the vocabulary, V.
        device: where the logits are.
        max_length: the most tokens of a request, prompt included; not with ``history``. See ``lengths`` for a history
            that is full.
        semantics: see above.
        max_rows: the most rows of a step, draft tokens included; None for ``max_requests``.
        max_listed: room for the lists of a request, in words of 32 bits: two for each biased token; one for each stop
            and forced token; ``longest + 1`` for each bad word, where ``longest`` is the length of the longest; one for
            each banned or suppressed first token up to 64 (more are kept as a mask); 51 for DRY.
        history: an engine's own tensors, which the engine keeps up to date: token ids ``[max_requests, L]``, lengths of
            the prompts, and lengths so far, both ``[max_requests]``, int32 or int64. Then ``append`` is not used.
        history_grows: whether that history only grows: tokens that a step has seen stay as they are, and lengths never
            shrink, until a request is added to the slot. Then long histories are not read anew at each step, for one
            launch more. A batch's own history does so, and needs none.
        max_logprobs: the largest ``logprobs`` of a request, at most V.
        group: the ranks of which each has a part of the vocabulary; see ``Sampler``. Then all ranks make the same calls
            and have the same requests. The logits of a step are this rank's part ``[rows, width]``; so are those that
            ``apply`` and ``apply_`` return, with -inf in columns of padding. ``sample`` returns the same on all ranks.
            A bitmask is that of the whole vocabulary, or of this rank's part where all parts begin at a multiple of 32.

    Raises:
        ValueError: an argument out of range; a history of another shape, dtype or device; a device that torch can't
            use.

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
        semantics: Stack = "transformers",
        max_rows: int | None = None,
        max_listed: int = 1024,
        history: History | None = None,
        history_grows: bool = False,
        max_logprobs: int = 0,
        group: Any = None,
    ) -> None:
        self.max_requests = whole_number("max_requests", max_requests, 1)
        self.vocab_size = whole_number("vocab_size", vocab_size, 1)
        one_of("semantics", semantics, tuple(STACKS))
        self.semantics: Stack = semantics
        self.max_rows = self.max_requests if max_rows is None else whole_number("max_rows", max_rows, 1)
        self.max_listed = whole_number("max_listed", max_listed)
        self.max_logprobs = whole_number("max_logprobs", max_logprobs, 0, self.vocab_size)
        self.device = device_of("device", device)
        self._owns_history = history is None
        if history_grows and history is None:
            raise ValueError(
                "history_grows must be False without a history of the engine's, got True: a batch's own grows"
            )
        self._slots = self._make_slots(self._room_for_tokens(max_length, history), history, history_grows)
        self.max_length: int = self._slots.history.shape[1]
        stack = STACKS[semantics]
        self._step = Step(
            self._slots, self.max_rows, self.vocab_size, ORDERS[semantics], stack.ties, stack.kernel, self.max_listed
        )
        # Making views takes the host longer than what is done with them.
        self._held, self._flags = self._table.unbind(), self._slots.records[:, layout.FLAGS.value].unbind()
        self._staging = Staging(self.device)
        self._active = bytearray(self.max_requests)
        self._split = None if group is None else self._splitting(group)
        self._seeds = random.Random()
        if self._split is not None:
            self._seeds.seed(self._split.seed(self._seeds.getrandbits(64)))
        # What the host knows of the slots, so that it can refuse what a request needs and a step lacks.
        self._looking_back: set[int] = set()  # whose requests depend on the tokens so far
        self._strict: set[int] = set()  # whose requests require a bitmask
        self._reported: set[int] = set()  # whose requests want log-probabilities
        # Tokens that the host has seen going to each slot: all of them, until tensors on a GPU are appended.
        self._counted = [0] * self.max_requests
        self._saw_all = self._owns_history

    def _splitting(self, group: Any) -> SplitStep:
        """What processes the parts of the logits that the ranks of a group have."""
        from fastlogits.parallel.serving import SplitStep  # imports torch.distributed

        names = ("max_requests", "vocab_size", "semantics", "max_rows", "max_listed", "max_logprobs")
        return SplitStep(group, self._step, tuple((name, getattr(self, name)) for name in names))

    def _room_for_tokens(self, max_length: int | None, history: History | None) -> int:
        """Tokens of a slot's history in memory of the batch: none where the engine has the history."""
        if history is not None:
            if max_length is not None:
                raise ValueError(f"max_length must be None with history, whose own length counts, got {max_length!r}")
            check_history(history, self.max_requests, self.device)
            return 0
        if max_length is None:
            raise ValueError(
                "max_length must be an integer of at least 1 where there is no history, got None: give the most "
                "tokens that a request may have"
            )
        return whole_number("max_length", max_length, 1)

    def _make_slots(self, room: int, history: History | None, grows: bool) -> Slots:
        """Memory for all slots: packed masks, record, lists, history and index side by side. One copy fills a slot."""
        W = words(self.vocab_size)
        self._lists_end = layout.RECORD.value + self.max_listed
        self._masks_end = layout.MASKS * W
        longest = history[0].shape[1] if history is not None and grows else room
        sizes = IndexSizes.of(self.vocab_size, longest)
        index_at = self._lists_end + room
        self._table = torch.zeros(
            self.max_requests, self._masks_end + index_at + sizes.total, dtype=torch.int32, device=self.device
        )
        masks = self._table[:, : self._masks_end].view(self.max_requests, layout.MASKS, W)
        records = self._table[:, self._masks_end :]
        index = HistoryIndex(records[:, index_at:], sizes, history is not None) if sizes.total else NO_INDEX
        if history is None:
            lengths, prompts = records[:, layout.LENGTH.value], records[:, layout.PROMPT.value]
            tokens = records[:, self._lists_end : index_at]
        else:
            tokens, prompts, lengths = history
        return Slots(records, masks, tokens, lengths, prompts, index)

    def __repr__(self) -> str:
        given = {name: getattr(self, name) for name in ("vocab_size", "device", "max_length", "semantics")}
        return f"<BatchProcessor: {len(self)} of {self.max_requests} requests, {arguments(given)}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a BatchProcessor can't be copied or pickled, since host and device share what it holds: make another one, "
            "and add the requests to it"
        )

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
        """Number of tokens in the history of each slot, ``[max_requests]``, on the device. Don't write to it.

        A history of ``max_length`` tokens is full. What tensors on a GPU append to it is dropped, so that its next
        token would be sampled with the same noise again. End such a request, or make a batch of longer histories.
        """
        return self._slots.lengths

    @property
    def bytes_per_slot(self) -> dict[str, int]:
        """Memory of a slot: parameters and lists, packed masks, and its history with an index, if the batch keeps it.

        The index is for long histories, and takes no more than they do: of one that it covers, a step reads what it
        needs, so that its time hardly depends on the length.
        """
        record = self._lists_end * 4
        masks = self._slots.masks[0].numel() * 4
        tokens = self.max_length * 4 if self._owns_history else 0
        return {"parameters": record, "masks": masks, "history": tokens, "index": self._slots.indices.sizes.total * 4}

    @property
    def bytes_per_row(self) -> int:
        """Memory of a row of a step, without that of the truncations."""
        return self._step.bytes_per_row

    def add(self, params: RequestParams, prompt_ids: Ids = (), output_ids: Ids = (), slot: int | None = None) -> int:
        """Add a request.

        Args:
            params: what it asks for.
            prompt_ids: its prompt, integers on the host. Ignored if the engine has the history.
            output_ids: what it has generated already, as after a preemption.
            slot: its slot, which must be free; None for the lowest free one.

        Returns:
            Its slot.

        Raises:
            ValueError: no free slot; a slot that is taken or doesn't exist; parameters with token ids outside the
                vocabulary; more tokens than ``max_length``, longer lists than ``max_listed``, or more ``logprobs`` than
                ``max_logprobs``. Then nothing has changed.
        """
        if not isinstance(params, RequestParams):
            raise ValueError(f"params must be RequestParams, got {params!r}")
        slot = self._free_slot(slot)
        packed = self._packed(params)
        prompt = output = NO_TOKENS
        if self._owns_history:
            prompt, output = history_ids("prompt_ids", prompt_ids), history_ids("output_ids", output_ids)
            if len(prompt) + len(output) > self.max_length:
                raise ValueError(
                    f"prompt_ids and output_ids must have at most {self.max_length} tokens together, the max_length of "
                    f"the batch, got {len(prompt) + len(output)}"
                )
        self._write(slot, packed, prompt, output, params.seed)
        self._active[slot] = 1
        self._counted[slot] = len(prompt) + len(output)
        self._note(slot, params, packed)
        return slot

    def update(self, slot: int, params: RequestParams) -> None:
        """Give a request other parameters, which act from its next step on. Its history and its position stay.

        Args:
            slot: its slot.
            params: all of its parameters, not only those that change: ``dataclasses.replace(params, top_p=0.5)``. Where
                ``seed`` is None, the request keeps the seed that it has.

        Raises:
            ValueError: the slot holds no request; or the parameters don't fit, see ``add``. Then nothing has changed.

        Example:
            >>> batch = BatchProcessor(1, vocab_size=4, device="cpu", max_length=8)
            >>> slot = batch.add(RequestParams(temperature=0), prompt_ids=[1])
            >>> batch.update(slot, RequestParams(temperature=0, banned_token_ids=[3]))
            >>> batch.sample(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), [slot]).tokens
            tensor([2])
        """
        if not isinstance(params, RequestParams):
            raise ValueError(f"params must be RequestParams, got {params!r}")
        slot = self._taken_slot("slot", slot)
        packed = self._packed(params)
        self._write_over(slot, packed, params.seed is None)
        self._note(slot, params, packed)

    def _note(self, slot: int, params: RequestParams, packed: PackedParams) -> None:
        """Keep on the host what a step may lack that a request needs."""
        asks = (params.bitmask, params.logprobs is not None, packed.looks_back)
        for known, asked in zip((self._strict, self._reported, self._looking_back), asks, strict=True):
            (known.add if asked else known.discard)(slot)

    def remove(self, slot: int) -> None:
        """Remove a request: its slot is free, and rows that name it are left alone.

        Raises:
            ValueError: the slot holds no request.
        """
        slot = self._taken_slot("slot", slot)
        self._flags[slot].zero_()
        self._active[slot] = 0
        for known in (self._strict, self._reported, self._looking_back):
            known.discard(slot)

    def move(self, source: int, target: int) -> None:
        """Move a request to a free slot. The engine moves a history of its own itself.

        Raises:
            ValueError: ``source`` holds no request, or ``target`` holds one. Then nothing has changed.
        """
        source, target = self._taken_slot("source", source), self._checked_slot("target", target)
        if source == target:
            return
        if self._active[target]:
            raise ValueError(f"target must be free, got {target}, which holds a request: remove it first, or swap()")
        self.swap(source, target)

    def swap(self, a: int, b: int) -> None:
        """Exchange the contents of two slots. The engine exchanges histories of its own itself.

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
        """Append tokens to the histories of requests, in their order. A slot may occur more than once.

        With tensors on a GPU this is one launch, which a graph may hold. There, what can't be checked without waiting
        is ignored: slots without a request, and tokens beyond ``max_length``. See ``lengths``.

        Args:
            slots: the slots, ``[N]``; negative ones are ignored.
            token_ids: a token for each, ``[N]``; negative ones are ignored. Ids that the logits don't have take their
                place in the history, and count for nothing.

        Raises:
            ValueError: the engine has the history; not one token for each slot; or, if the host knows the arguments, a
                slot without a request, or a full history. Then nothing has changed.
        """
        if not self._owns_history:
            raise ValueError("append() is for histories that the batch keeps, but this one's are the engine's")
        of, known = self._slot_index(slots)
        tokens = read_index("token_ids", token_ids, self.device)
        ids = cast("torch.Tensor", tokens.on_device)
        if len(of) != len(ids):
            raise ValueError(f"token_ids must have one token for each of {len(of)} slots, got {len(ids)}")
        self._count(known, tokens.on_host)
        append_tokens(self._slots, of, ids)

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
            slots: the slot of each row, int32 or int64 ``[rows]``. Rows with a negative slot stay as they are. So do
                rows whose slot has no request; on the host such a slot is refused. Without draft tokens a slot has one
                row, or several with different ``cache_position``.
            cache_position: index of the last token that each row has seen in its sequence; the row's token gets the
                next index. None for the end of the history and of the draft tokens before the row. A smaller one
                rewinds. One beyond the history gives the row its position and step, but the tokens in between are not
                seen; for requests that look back, this is refused on the host.
            bitmask: the tokens that the grammar of each row allows, packed, int32 ``[rows, W]``: bit ``i`` of word
                ``w`` is token ``32 * w + i``. Tokens beyond it are not allowed. All requests obey it except those with
                ``bitmask=False``. If it is missing, a row whose request has ``bitmask=True`` is refused on the host; on
                a GPU no token is allowed in that row.
            draft_ids: with draft tokens, the token that each row was fed with, ``[rows]``. The rows of a request are
                neighbours, in order. The row at local position ``j`` sees the history, the draft tokens of the
                ``j - 1`` rows before it, and its own. Ids that the logits don't have count for nothing.
            local_position: with draft tokens, how many of them each row sees, ``[rows]``; 0 for the first row.

        Returns:
            ``logits``.

        Raises:
            ValueError: an argument of another shape, dtype or device; logits that share memory with each other; or, if
                the host knows the arguments, a slot without a request, what is refused above, or rows of draft tokens
                out of order. Then nothing has changed.
        """
        rows, _ = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        check_own_memory("logits", logits)
        return self._process(logits, rows, logits)

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
        """Process the logits of a step into another tensor: ``out``, or a new one.

        ``out`` has the shape, dtype and device of the logits. It may be the logits themselves, but no other tensor that
        shares memory with them. The other arguments are those of ``apply_``.

        Raises:
            ValueError: see ``apply_``; or ``out`` shares memory with the logits.
        """
        rows, _ = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        if out is None:
            out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        elif is_in_place(out, logits):
            self._process(logits, rows, logits)
            return out
        return self._process(logits, rows, out)

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
        return_kept: KeptForm = None,
    ) -> Sample:
        """Sample the token of each row, as a ``Sampler`` does: with the request's seed and the token's position.

        The logits are not written, and nothing is appended to the histories. Rows without a request get token 0.

        Args:
            logits: see ``apply_``.
            slots: see ``apply_``.
            cache_position: see ``apply_``.
            bitmask: see ``apply_``.
            draft_ids: see ``apply_``.
            local_position: see ``apply_``.
            logprobs: ``"raw"`` for log-probabilities of the logits as they are given, ``"processed"`` for those of the
                distribution that is sampled; None for none. There are ``max_logprobs`` columns for the most likely
                tokens. If a request asked for fewer, the others are -1 and NaN. A row without a request, or whose
                request asked for none, has NaN and rank 0. If the host knows the slots, it refuses a step without them
                if a request asked for them, and a step with them if no request did.
            return_kept: how the tokens that the truncations kept of each row are returned too: see ``Sampler``.

        Raises:
            ValueError: see ``apply_``, and ``logprobs``; or ``return_kept`` is none of what it may be.
        """
        one_of("logprobs", logprobs, (None, *get_args(Distribution)))
        form = checked_form(return_kept)
        rows, known = self._rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        if known is not None:
            self._check_logprobs(known, logprobs)
        if self._split is not None:
            if form is not None:
                raise ValueError(f"return_kept must be None with a group, got {return_kept!r}: no rank has whole rows")
            return self._split.sample(logits, rows, logprobs, self.max_logprobs)
        if form is None:
            tokens, asked = sample_rows(self._step, logits, rows, logprobs, self.max_logprobs)
            return Sample.of(tokens, asked, self.max_logprobs)
        bits = torch.empty((len(logits), words(self.vocab_size)), dtype=torch.int32, device=self.device)
        tokens, asked = sample_rows(self._step, logits, rows, logprobs, self.max_logprobs, bits)
        return Sample.of(tokens, asked, self.max_logprobs, kept_of_bits(bits, self.vocab_size, form))

    def accept(self, out: Sample | torch.Tensor, slots: Ids, draft_ids: Ids) -> Accepted:
        """Say which drafts of a step are kept, and append what counts to the histories of the requests.

        Rows of draft tokens are sampled as if their drafts were the text. So a draft is right if it is the token that
        the row before it drew. A request keeps its drafts up to the first that isn't, and then takes the token that was
        drawn in its place, or behind the last draft: always one token more than drafts kept. These are the tokens that
        it would have got without drafts, whatever made them.

        This is one launch, which a graph may hold, and waits for nothing. It looks for no stop token: cut the tokens on
        the host. If the engine has the history, nothing is appended.

        Args:
            out: what ``sample`` returned for the step, or its tokens, int64 or int32 ``[rows]``. A negative token
                counts for nothing, and neither does what follows it in its request.
            slots: the slot of each row, as given to ``sample``. Rows of a request are neighbours, and a request has
                rows in one place. Rows of no request count for nothing.
            draft_ids: the token that each row was fed with, as given to ``sample``. That of a request's first row
                isn't looked at. -1 is never kept: steps of one shape pad short drafts with it.

        Returns:
            The tokens that count, and how many drafts each request keeps.

        Raises:
            ValueError: not one entry for each row; or, if the host knows the arguments, a slot without a request, or in
                two places, or more tokens than ``max_length``. Then nothing has changed. On a GPU, tokens beyond
                ``max_length`` are dropped from the history. See ``lengths``.

        Example:
            >>> batch = BatchProcessor(2, vocab_size=8, device="cpu", max_length=32, max_rows=6)
            >>> slot = batch.add(RequestParams(temperature=0), prompt_ids=[1, 2])
            >>> logits = torch.eye(8)[[3, 4, 6]] * 9.0  # the model goes on with 3, then 4, then 6
            >>> drafts = [2, 3, 5]  # the last token, and two drafts, of which the second is wrong
            >>> out = batch.sample(logits, [slot] * 3, draft_ids=drafts, local_position=[0, 1, 2])
            >>> batch.accept(out, [slot] * 3, drafts)
            Accepted(tokens=tensor([ 3,  4, -1]), kept=tensor([1, 1, 1], dtype=torch.int32))
            >>> int(batch.lengths[slot])
            4
        """
        tokens = read_index("out", out.tokens if isinstance(out, Sample) else out, self.device)
        of, known = self._slot_index(slots)
        drafts = read_index("draft_ids", draft_ids, self.device)
        drawn, fed = cast("torch.Tensor", tokens.on_device), cast("torch.Tensor", drafts.on_device)
        for name, value in (("slots", of), ("draft_ids", fed)):
            if len(value) != len(drawn):
                raise ValueError(f"{name} must have one entry for each of {len(drawn)} rows, got {len(value)}")
        counted = None
        if known is not None:
            check_neighbours(known)
            if tokens.on_host is not None and drafts.on_host is not None:
                active = [slot >= 0 for slot in known]
                counted = accepted(known, tokens.on_host.tolist(), drafts.on_host.tolist(), active)[0]
        if self._owns_history:
            self._count(known, None if counted is None else torch.tensor(counted, dtype=torch.int64))
        if not len(drawn):
            return Accepted(torch.empty_like(drawn, dtype=torch.int64), torch.empty_like(drawn, dtype=torch.int32))
        return Accepted(*accept_drafts(self._slots, of, drawn, fed, self._owns_history))

    # -- Before the first step -------------------------------------------------------------------------------------

    def warm_up(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        calls: Call | Sequence[Call] = ("sample", "apply_", "apply", "append", "accept", "swap"),
        logprobs: Distribution | Sequence[Distribution] = (),
        bitmask: bool | None = None,
        cache_position: torch.dtype | None = None,
        draft_ids: torch.dtype | None = None,
        slots: torch.dtype = torch.int64,
        row_stride: int | None = None,
    ) -> WarmUp:
        """Compile now what steps with such logits launch. Without it the first step compiles, and waits for that.

        A step of one row without a request is rehearsed: its launches are collected, compiled side by side and loaded,
        and none is made. So it changes no request, and disturbs no step that is running. What is compiled doesn't
        depend on the requests or on the number of rows.

        Args:
            dtype: of the logits: float32, float16 or bfloat16.
            calls: which methods will be called; ``"swap"`` includes ``move``, and ``"accept"`` needs ``draft_ids``.
                Fewer take less time: ``sample``, ``apply`` and ``apply_`` have kernels of their own.
            logprobs: the ``logprobs`` of ``sample``: ``"raw"``, ``"processed"``, both or none.
            bitmask: whether steps have a bitmask; None for steps with and without.
            cache_position: the dtype of the ``cache_position`` of steps, int32 or int64 (lists count as int64); None
                for steps without.
            draft_ids: the dtype of ``draft_ids`` and ``local_position``; None for steps without.
            slots: the dtype of ``slots``.
            row_stride: ``logits.stride(0)`` if the logits are a part of wider ones; None for contiguous logits.

        Returns:
            What was compiled, and how long it took: see ``WarmUp``.

        Raises:
            ValueError: an argument out of range or of a wrong type.
            RuntimeError: a CUDA graph is being captured.

        Example:
            >>> batch = BatchProcessor(4, vocab_size=8, device="cpu", max_length=32)
            >>> batch.warm_up(torch.bfloat16, calls="sample")
            <WarmUp: nothing to compile on cpu: the kernels are for GPUs, and torch runs here>
        """
        asked = warming.checked_choices("calls", calls, get_args(Call))
        reports = warming.checked_choices("logprobs", logprobs, get_args(Distribution))
        one_of("bitmask", bitmask, (None, False, True))
        one_of("cache_position", cache_position, (None, *INDEX_DTYPES))
        one_of("draft_ids", draft_ids, (None, *INDEX_DTYPES))
        one_of("slots", slots, INDEX_DTYPES)
        logits = warming.dummy_logits(1, self.vocab_size, dtype, self.device, row_stride)
        mask = torch.zeros(1, words(self.vocab_size), dtype=torch.int32, device=self.device)
        masks = (None, mask) if bitmask is None else (mask,) if bitmask else (None,)

        def whole(value: int, of: torch.dtype | None) -> torch.Tensor | None:
            return None if of is None else torch.full((1,), value, dtype=of, device=self.device)

        def rehearse() -> None:
            split, self._split = self._split, None  # whole rows are what is processed, and nothing is exchanged
            try:
                rehearse_alone()
            finally:
                self._split = split

        def rehearse_alone() -> None:
            nobody: Any = whole(-1, slots)
            draft = {"draft_ids": whole(0, draft_ids), "local_position": whole(0, draft_ids)}
            for each in masks:
                step: Any = {"cache_position": whole(-1, cache_position), "bitmask": each, **draft}
                self._rehearse_step(asked, logits, nobody, step, (None, *reports))
            if "append" in asked and self._owns_history:
                append_tokens(self._slots, nobody, torch.zeros(1, dtype=torch.int64, device=self.device))
            if "accept" in asked and draft_ids is not None:
                drawn = torch.zeros(1, dtype=torch.int64, device=self.device)
                accept_drafts(self._slots, nobody, drawn, cast("torch.Tensor", whole(0, draft_ids)), self._owns_history)
            if "swap" in asked:
                swap_slots(self._table, 0, 0)

        return warming.warmed(self.device, rehearse)

    def _rehearse_step(
        self,
        calls: Sequence[str],
        logits: torch.Tensor,
        slots: torch.Tensor,
        arguments: dict[str, Any],
        distributions: Sequence[str | None],
    ) -> None:
        if "sample" in calls:
            for distribution in distributions:
                self.sample(logits, slots, **arguments, logprobs=cast("Distribution | None", distribution))
        if "apply_" in calls:
            self.apply_(logits, slots, **arguments)
        if "apply" in calls:
            self.apply(logits, slots, **arguments)

    def _process(self, logits: torch.Tensor, rows: StepRows, out: torch.Tensor) -> torch.Tensor:
        if self._split is not None:
            return self._split.process(logits, rows, out)
        return process_rows(self._step, logits, rows, out)

    # -- What calls have in common ---------------------------------------------------------------------------------

    def _checked_slot(self, argument: str, slot: int) -> int:
        if not is_integer(slot) or not 0 <= slot < self.max_requests:
            raise ValueError(f"{argument} must be an integer from 0 to {self.max_requests - 1}, got {slot!r}")
        return int(slot)

    def _free_slot(self, slot: int | None) -> int:
        if slot is None:
            slot = self._active.find(0)
            if slot < 0:
                raise ValueError(f"all {self.max_requests} slots are taken: remove a request, or make the batch larger")
            return slot
        slot = self._checked_slot("slot", slot)
        if self._active[slot]:
            raise ValueError(f"slot must be free, got {slot}, which holds a request: remove it first")
        return slot

    def _taken_slot(self, argument: str, slot: int) -> int:
        slot = self._checked_slot(argument, slot)
        if not self._active[slot]:
            raise ValueError(f"{argument} must be a slot that holds a request, got {slot}")
        return slot

    def _slot_index(self, slots: Ids) -> tuple[torch.Tensor, list[int] | None]:
        """Slots on the device, and as a list if the host knows them; then each has to hold a request."""
        index = read_index("slots", slots, self.device)
        on_device = cast("torch.Tensor", index.on_device)
        if index.on_host is None:
            return on_device, None
        known: list[int] = index.on_host.tolist()
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
    ) -> tuple[StepRows, list[int] | None]:
        """The rows of a step, checked, and their slots if the host knows them."""
        try:
            return self._checked_rows(logits, slots, cache_position, bitmask, draft_ids, local_position)
        except Exception as error:
            if self._split is not None:
                self._split.refuse(error)
            raise

    def _checked_rows(
        self,
        logits: torch.Tensor,
        slots: Ids,
        cache_position: Ids | None,
        bitmask: torch.Tensor | None,
        draft_ids: Ids | None,
        local_position: Ids | None,
    ) -> tuple[StepRows, list[int] | None]:
        self._check_logits(logits)
        B = logits.shape[0]
        if (draft_ids is None) != (local_position is None):
            raise ValueError("draft_ids and local_position must be given together, got one of them")
        of, known = self._slot_index(slots)
        positions = self._optional_index("cache_position", cache_position)
        drafts = self._optional_index("draft_ids", draft_ids)
        local = self._optional_index("local_position", local_position)
        mask = None if bitmask is None else self._checked_bitmask(bitmask, B)
        for name, value in (
            ("slots", of), ("cache_position", positions.on_device), ("draft_ids", drafts.on_device),
            ("local_position", local.on_device),
        ):  # fmt: skip
            if value is not None and len(value) != B:
                raise ValueError(f"{name} must have one entry for each of {B} rows of logits, got {len(value)}")
        if known is not None:
            self._check_masks(known, bitmask)
            self._check_order(known, positions, local)
        return StepRows(of, positions.on_device, mask, drafts.on_device, local.on_device), known

    def _optional_index(self, argument: str, value: Ids | None) -> Index:
        return NOT_GIVEN if value is None else read_index(argument, value, self.device)

    def _check_logits(self, logits: torch.Tensor) -> None:
        if not isinstance(logits, torch.Tensor):
            raise ValueError(f"logits must be a tensor of shape (rows, {self.vocab_size}), got {type(logits).__name__}")
        if is_split(logits):
            raise ValueError(
                "logits must be a torch.Tensor, got a DTensor: make the batch with group=..., and give this rank's "
                "part, logits.to_local()"
            )
        columns = self.vocab_size if self._split is None or logits.ndim != 2 else logits.shape[1]
        if logits.ndim != 2 or logits.shape[1] != columns or logits.dtype not in LOGITS_DTYPES:
            raise ValueError(
                f"logits must be float32, float16 or bfloat16 of shape (rows, {self.vocab_size}), got {logits.dtype} "
                f"of {tuple(logits.shape)}"
            )
        if logits.device != self.device:
            raise ValueError(f"logits must be on {self.device}, where the batch is, got them on {logits.device}")
        if self.max_rows < len(logits):
            raise ValueError(
                f"logits must have at most {self.max_rows} rows, the max_rows of the batch, got {len(logits)}"
            )

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

    def _check_order(self, slots: list[int], positions: Index, local: Index) -> None:
        """Refuse rows that come twice, or that can't see what they need, as far as the host knows."""
        at: list[int] | None = None if positions.on_host is None else positions.on_host.tolist()
        depth: list[int] | None = None if local.on_host is None else local.on_host.tolist()
        has_drafts = local.on_device is not None
        if depth is not None:
            check_draft_rows(slots, depth)
        elif not has_drafts and len(set(slots)) < len(slots) and (positions.on_device is None or at is not None):
            check_distinct(slots, at)
        if at is not None:
            self._check_positions(slots, at, depth if has_drafts else [0] * len(slots))

    def _check_positions(self, slots: list[int], positions: list[int], depth: list[int] | None) -> None:
        """Refuse positions whose rows would look back at tokens that the history lacks."""
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
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
        self,
        slot: int,
        packed: PackedParams,
        prompt: np.ndarray[Any, Any],
        output: np.ndarray[Any, Any],
        seed: int | None,
    ) -> None:
        """Bring a request to its slot: one copy, of no more than from its first mask to its last token."""
        P, N = len(prompt), len(prompt) + len(output)
        W = self._masks_end // layout.MASKS
        first_plane = packed.masks[0].plane if packed.masks else layout.MASKS
        begin = first_plane * W
        end = self._masks_end + (self._lists_end + N if N else len(packed.record))
        staged, held = self._staging.take(end - begin)
        for plane, mask in packed.masks:
            held[plane * W - begin : (plane + 1) * W - begin] = mask
        record = held[self._masks_end - begin :]
        record[: len(packed.record)] = packed.record
        write_lengths(record, N, P)
        if seed is None:
            write_seed(record, self._seeds.getrandbits(64))
        if P:
            record[self._lists_end : self._lists_end + P] = prompt
        if N > P:
            record[self._lists_end + P :] = output
        self._held[slot][begin:end].copy_(staged, non_blocking=True)

    def _write_over(self, slot: int, packed: PackedParams, keeps_seed: bool) -> None:
        """Bring other parameters to a slot, around its lengths, and around its seed where that stays."""
        W = self._masks_end // layout.MASKS
        pieces = [(mask.plane * W, mask.words) for mask in packed.masks]
        # The index is of the n-grams that a request asks for: it is made anew.
        starts = (layout.FLAGS.value, layout.SEED.value, layout.TEMPERATURE.value, len(packed.record))
        for begin, end in pairwise(starts):
            if begin != layout.SEED.value or not keeps_seed:
                pieces.append((self._masks_end + begin, packed.record[begin:end]))
        for at, words_of_it in pieces:
            staged, held = self._staging.take(len(words_of_it))
            held[:] = words_of_it
            self._held[slot][at : at + len(words_of_it)].copy_(staged, non_blocking=True)

    def _packed(self, params: RequestParams) -> PackedParams:
        """Parameters as a slot of this batch holds them; kept with them, since making one takes time.

        Raises:
            ValueError: they don't fit the vocabulary or the room of the batch.
        """
        if params.logprobs is not None and params.logprobs > self.max_logprobs:
            raise ValueError(
                f"logprobs must be at most {self.max_logprobs}, the max_logprobs of the batch, got {params.logprobs}: "
                "make the batch with more"
            )
        key = (self.vocab_size, self.semantics)
        kept: dict[Any, PackedParams] = params.__dict__.setdefault("_packed", {})
        packed = kept.get(key)
        if packed is None:
            if params.min_tokens and not params.stop_token_ids:
                warnings.warn("stop_token_ids is empty: min_tokens does nothing", stacklevel=3)
            packed = kept[key] = pack(params, self.vocab_size, STACKS[self.semantics])
        if packed.listed > self.max_listed:
            raise ValueError(
                f"params must list at most {self.max_listed} words, the max_listed of the batch, got lists that take "
                f"{packed.listed} words (biases, stop and forced tokens, bad words, banned tokens): make the batch "
                "with more"
            )
        return packed
