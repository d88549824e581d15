"""Fold, truncate and sample: find the few tokens of a row that count, then decide among them.

    x = fold(scores) / temperature;  for rule in rules: drop what it drops;  out = x or the fill, or a token

Four to six launches, two where no rule drops anything; the README beside says what they do and why they are exact.

Bytes moved: one read and one write of the logits (no write for a token), a read more for the sums, and the candidates:
in most rows next to nothing, at most a sixth of the logits. The workspace has room for that, and a tenth besides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastlogits_kernels.draw import draw
from fastlogits_kernels.pointwise.fold import Chain, chain_of, find_sets, reference_fold
from fastlogits_kernels.pointwise.search import NOTHING, Call, TokenSets
from fastlogits_kernels.rules import TINY_TEMPERATURE, Rule
from fastlogits_kernels.runtime.backend import Operation
from fastlogits_kernels.runtime.launcher import Launch, Relaunches, empty_out, is_collecting, launch_together
from fastlogits_kernels.runtime.library import register
from fastlogits_kernels.selection.kept import bits_of_scores, launch_kept_bits
from fastlogits_kernels.selection.launchers import LARGEST, Tensors, sample_launches, select_launches
from fastlogits_kernels.selection.layout import Selection as Selection
from fastlogits_kernels.selection.layout import selections
from fastlogits_kernels.selection.layout import takes_rules as takes_rules
from fastlogits_kernels.selection.row import KEPT_AT
from fastlogits_kernels.truncate.dispatch import truncate

OPERATION = Operation("select")
FORCE_KERNEL = False
"""Take the kernels for tensors on the CPU too; for tests, with Triton's interpreter."""

# Of more logits than that a program has too much to do for its part alone: a guess for the whole row, which takes two
# launches more, rules more tokens out.
_MOST_SAMPLED = 2**24
_NO_CHAIN = Chain()
_NO_TENSORS = (None, None, None, None, None)


def takes_scores(scores: torch.Tensor) -> bool:
    """Whether the kernels take these scores."""
    return (
        OPERATION.takes(scores, FORCE_KERNEL)
        and scores.ndim == 2
        and scores.shape[1] > 1
        and scores.dtype in LARGEST
        and not scores.requires_grad
    )


def launch_select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None = None,
    found: TokenSets | None = None,
    out: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write what the rules keep of ``scores`` to ``out``, or a token of each row to ``tokens``: two to six launches.

    Returns the workspace, int32 ``[B, words]``: ``kept_in`` says what is kept of each row.
    """
    chain = chain or _NO_CHAIN
    if _only_samples(scores, selection, found, tokens, seeds):
        words_of_row = selection.words_to_sample
    else:
        words_of_row = selection.layouts[scores.element_size()].words_of_row
    B = scores.shape[0]
    # One overload, which is parsed faster than torch.empty.
    work = torch.empty_strided((B, words_of_row), (words_of_row, 1), dtype=torch.int32, device=scores.device)
    key, pointers = _signature(scores, work, chain, out, tokens, temperature, seeds, positions)
    sets: tuple[Any, Any, Any, Any, Any] = _NO_TENSORS
    if found is not None:
        tokens_of, spans, *lists = found.listed or (None, None, 0, 1)
        sets = (found.bits, found.planes, found.row_values, tokens_of, spans)
        pointers += [each.data_ptr() for each in sets if each is not None]
        key += (*lists, *(None if each is None else (each.shape, each.stride()) for each in sets))
    rows: tuple[torch.Tensor, ...] = ()
    if selection.rows:
        rows = tuple([row.contiguous() for row in selection.rows])
        pointers += [row.data_ptr() for row in rows]
        key += tuple([(row.dtype, row.get_device()) for row in rows])
    relaunches = selection.relaunches.get(key)
    if relaunches is not None and relaunches(scores.get_device(), pointers):
        return work
    tensors = Tensors(scores, work, out, tokens, temperature, seeds, positions, *sets, rows)
    launch_together(launches_of(selection, chain, found, tensors, tensors))
    if is_collecting():
        if _samples_all(selection, found, tokens, seeds):  # how depends on the number of rows: rehearse both
            _rehearse_other(selection, chain, found, tensors)
    elif relaunches is None:
        selection.saw(key, lambda: _laid_out(selection, chain, found, tensors))
    return work


def _signature(
    scores: torch.Tensor,
    work: torch.Tensor,
    chain: Chain,
    out: torch.Tensor | None,
    *others: torch.Tensor | None,
) -> tuple[tuple[Any, ...], list[int]]:
    """All that the arguments depend on but for addresses, and the addresses, in the order of ``Tensors``.

    A chain's number is never another one's. This runs at each call, before anything is launched.
    """
    address = scores.data_ptr()
    out_address = 0 if out is None else out.data_ptr()
    key: tuple[Any, ...] = (
        scores.shape, scores.stride(), scores.dtype, scores.get_device(), address % 16, chain.handle,
        None if out is None else (out.dtype, out.stride(), out_address % 16),
        *[None if each is None else (each.dtype, each.stride(), each.get_device()) for each in others],
    )  # fmt: skip
    pointers = [address, work.data_ptr()]
    if out is not None:
        pointers.append(out_address)
    pointers += [each.data_ptr() for each in others if each is not None]
    return key, pointers


def kept_in(work: torch.Tensor) -> torch.Tensor:
    """What is kept of each row, int32 ``[B, 4]``, of the workspace that ``launch_select`` returned: see ``Kept``."""
    return work[:, KEPT_AT.value : KEPT_AT.value + 4]


def _laid_out(selection: Selection, chain: Chain, found: TokenSets | None, tensors: Tensors) -> Relaunches | None:
    """The launches of such a call through the driver, if they can be made so."""
    index = tensors.scores.get_device()
    for each in (*tensors[:-1], *tensors.rows):
        if each is not None and each.get_device() != index:  # pinned memory, of which Triton asks whether it is
            return None
    stand_ins, given = tensors.stand_ins()
    return Relaunches.of(launches_of(selection, chain, found, tensors, stand_ins), given)


def launches_of(
    selection: Selection, chain: Chain, found: TokenSets | None, tensors: Tensors, given: Tensors
) -> list[Launch]:
    """The launches of a call with some tensors; ``given`` is what their kernels are given of them."""
    sampling = _only_samples(tensors.scores, selection, found, tensors.tokens, tensors.seeds)
    return (sample_launches if sampling else select_launches)(selection, chain, found, tensors, given)


def _rehearse_other(selection: Selection, chain: Chain, found: TokenSets | None, tensors: Tensors) -> None:
    """Collect the launches of a sampling from all tokens that another number of rows would make."""
    scores = tensors.scores
    sampling = _only_samples(scores, selection, found, tensors.tokens, tensors.seeds)
    words_of_row = selection.layouts[scores.element_size()].words_of_row if sampling else selection.words_to_sample
    other = tensors._replace(work=tensors.work.new_empty(len(scores), words_of_row))
    launch_together((select_launches if sampling else sample_launches)(selection, chain, found, other, other))


def _only_samples(scores: torch.Tensor, selection: Selection, found: TokenSets | None, tokens: Any, seeds: Any) -> bool:
    """Whether tokens are sampled part by part."""
    return scores.numel() <= _MOST_SAMPLED and _samples_all(selection, found, tokens, seeds)


def _samples_all(selection: Selection, found: TokenSets | None, tokens: Any, seeds: Any) -> bool:
    """Whether tokens are sampled where no rule drops anything, and no token has a value from a list."""
    if selection.kinds or tokens is None or seeds is None:
        return False
    return found is None or found.listed is None or not found.listed[2]


def select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None = None,
    call: Call = NOTHING,
) -> torch.Tensor:
    """``scores`` ``[B, V]`` folded, and what the rules keep of them: a new contiguous tensor.

    Args:
        scores: float32, float16 or bfloat16 of any strides; never written.
        selection: the rules.
        chain: what is done to the logits before; None for nothing.
        call: what the chain reads.
    """
    if torch.compiler.is_compiling():
        handle = -1 if chain is None else chain.handle
        return torch.ops.fastlogits.select(  # type: ignore[no-any-return]
            scores, selection.handle, handle, *call
        )
    return _select(scores, selection, chain, call)


@OPERATION.falls_back
def _select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None,
    call: Call,
) -> torch.Tensor:
    if not OPERATION.takes(scores, FORCE_KERNEL):
        return reference_select(scores, selection, chain, call)
    out = empty_out(scores)
    if scores.numel():
        found = None if chain is None else find_sets(scores, chain, call)
        launch_select(scores, selection, chain, found, out=out)
    return out


def _call(
    scores: torch.Tensor,
    selection: int,
    chain: int = -1,
    *call: Any,
) -> torch.Tensor:
    maps = None if chain < 0 else chain_of(chain)
    return _select(scores, selections[selection], maps, Call(*call))


register(
    "select(Tensor scores, int selection, int chain=-1, Tensor? input_ids=None, Tensor? allowed=None, "
    "SymInt cache_offset=0, SymInt prompt_offset=0, Tensor? cache_position=None, Tensor? prompt_length=None, "
    "Tensor? values=None, Tensor? mates=None) -> Tensor",
    _call,
    lambda scores, *inputs: scores.new_empty(scores.shape),
)


def reference_select(
    scores: torch.Tensor,
    selection: Selection,
    chain: Chain | None,
    call: Call,
) -> torch.Tensor:
    """The same in torch, one after the other."""
    x = truncate(_folded(scores, chain, call), selection.given)
    return x.log_softmax(-1) if selection.normalise else x


def reference_tokens(
    logits: torch.Tensor,
    selection: Selection,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None,
    chain: Chain | None,
    call: Call,
    kept_bits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens as ``select_tokens`` samples them, and the distribution that they are from, float32 ``[B, V]``."""
    x, greedy = _folded(logits.float(), chain, call), None
    if temperature is None:
        x = truncate(x, selection.given)
    else:
        x, greedy = reference_distribution(x, temperature, selection.given)
    if kept_bits is not None:
        kept_bits.copy_(bits_of_scores(x))
    return draw(x, seeds.expand(len(x)), positions.expand(len(x)), greedy), x


def reference_distribution(
    x: torch.Tensor, temperature: torch.Tensor, rules: Sequence[Rule]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What rules leave of ``x`` ``[B, V]`` divided by temperatures, and which rows are greedy, bool ``[B]``.

    Those are the rows of another temperature than a finite one of at least 1e-30: they stay as they are.
    """
    sampled = ((temperature >= TINY_TEMPERATURE) & (temperature < math.inf)).expand(len(x))
    scaled = x / torch.where(sampled, temperature, 1.0).unsqueeze(1)
    return torch.where(sampled.unsqueeze(1), truncate(scaled, rules) if rules else scaled, x), ~sampled


def _folded(
    scores: torch.Tensor,
    chain: Chain | None,
    call: Call,
) -> torch.Tensor:
    return scores if chain is None else reference_fold(scores, None, chain, call)


@OPERATION.falls_back
def select_tokens(
    logits: torch.Tensor,
    selection: Selection,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor | None = None,
    chain: Chain | None = None,
    call: Call = NOTHING,
    kept_bits: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token sampled from what the rules keep of each row of ``logits`` ``[B, V]``, int64 ``[B]``.

    Args:
        logits: float32, float16 or bfloat16 of any strides, taken as float32; never written.
        selection: the rules.
        seeds: int64 ``[B]``, or of no dimensions.
        positions: likewise.
        temperature: what the logits are divided by, ``[B]`` or of no dimensions; rows of another than a positive finite
            number are greedy. None for 1.
        chain: what is done to the logits before; None for nothing.
        call: what the chain reads.
        kept_bits: where what is kept is written, contiguous int32 ``[B, W]``; None for nowhere.
    """
    if not OPERATION.takes(logits, FORCE_KERNEL):
        tokens, _ = reference_tokens(
            logits, selection, seeds, positions, temperature, chain, call, kept_bits
        )  # fmt: skip
        return tokens
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.numel():
        found = None if chain is None else find_sets(logits, chain, call)
        work = launch_select(
            logits, selection, chain, found, temperature=temperature, seeds=seeds, positions=positions, tokens=tokens
        )
        if kept_bits is not None:
            launch_kept_bits(logits, selection, work, kept_bits, chain, found, temperature)
    return tokens
