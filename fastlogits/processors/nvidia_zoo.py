"""NVIDIA's logits-processor-zoo (0.2.1) under its names, for each row and without a loop over rows.

Processors that put a phrase into the text need to know earlier steps. A phrase may begin with a token that is in the
text anyway, and the text doesn't say how sure the model was. So they keep notes for each row of a run. Rows may change
places, become more or fewer, and be cut back; ``_Memory`` says what is not known then.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from threading import local
from time import monotonic
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from fastlogits_kernels.runtime.recent import hold, is_capturing
from torch.nn.functional import pad

from fastlogits.checks import check_rows, finite_number, whole_number
from fastlogits.plan.position import Index, prompt_of
from fastlogits.plan.row_values import CallRows, RowValues
from fastlogits.plan.run import Run
from fastlogits.plan.stages import Ban, Bias, ForceRows, History, Repeated, RowBias, Rows, Several
from fastlogits.processors.base import StagedProcessor
from fastlogits.token_mask import TokenMask, ids_on
from fastlogits.token_text import token_texts

_INF = float("inf")
# No run is longer: more is compared as this.
_MOST_STEPS = 2**31


class GenLengthLogitsProcessor(StagedProcessor):
    r"""Make the end of the text more or less likely as the text grows.

    In rows that haven't ended, ``boost_factor * (step / 10) ** p`` is added to the score of the end of the text.

    Args:
        tokenizer: a tokenizer of transformers.
        boost_factor: a finite number, usually from -1 to 1; a negative one makes texts longer.
        p: exponent of the number of generated tokens, 0 to 32.
        complete_sentences: whether only rows count whose last token ends a sentence or a line: any token whose text
            ends with a full stop or a line break, such as ``".\n"``. The original knows two such tokens.
        boost_token_str: text of the token that is used instead of the end of the text, such as ``"</think>"``.

    Raises:
        ValueError: an argument out of range, text that is not one token, a tokenizer without an end of text; on a
            call, a token outside the vocabulary, or a run whose start isn't known.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, ".": 3}))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> run = GenLengthLogitsProcessor(tokenizer, 1.0).for_run(prompt_length=1)
        >>> run(torch.tensor([[1, 2, 2, 2, 2, 2]]), torch.zeros(1, 4))
        tensor([[0.2500, 0.0000, 0.0000, 0.0000]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: Any,
        boost_factor: float,
        p: float = 2,
        complete_sentences: bool = False,
        boost_token_str: str | None = None,
    ) -> None:
        self.boost_factor = finite_number("boost_factor", boost_factor)
        self.p = finite_number("p", p, 0, 32)
        self.complete_sentences = complete_sentences
        self.boost_token = _boosted(tokenizer, boost_token_str)
        self.sentence_ends = _sentence_ends(tokenizer) if complete_sentences else None

    def stage(self) -> RowBias:
        """A bias of its own for each row, on one token."""
        function = partial(_boost_of_end, self.boost_token, self.boost_factor, self.p, self.sentence_ends)
        where = " after a sentence" if self.complete_sentences else ""
        boost = RowValues(function, f"{self.boost_factor:g} * (step / 10) ** {self.p:g}{where}")
        return RowBias((self.boost_token,), boost[0], "boost_token")


class CiteFromPromptLogitsProcessor(StagedProcessor):
    """Make tokens of the prompt more or less likely.

    Each row has its own prompt: all tokens of ``input_ids`` before the run, including padding and special tokens.

    Args:
        tokenizer: a tokenizer of transformers.
        boost_factor: added to the scores of the prompt's tokens, a finite number.
        boost_eos: whether the end of the text counts as a token of the prompt.
        conditional_boost_factor: added to the scores of tokens that follow the last generated token somewhere in the
            prompt, a finite number; not at the first step.

    Raises:
        ValueError: a factor that is not a finite number, a tokenizer without an end of text; on a call, an end of
            text outside the vocabulary, ``input_ids`` of other rows than the scores, or a run whose start isn't known.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, ".": 3}))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> run = CiteFromPromptLogitsProcessor(tokenizer, 2.0).for_run(prompt_length=2)
        >>> run(torch.tensor([[3, 2, 1]]), torch.zeros(1, 4))
        tensor([[2., 0., 2., 2.]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: Any,
        boost_factor: float = 1.0,
        boost_eos: bool = True,
        conditional_boost_factor: float = 0.0,
    ) -> None:
        self.boost_factor = finite_number("boost_factor", boost_factor)
        self.boost_eos = boost_eos
        self.conditional_boost_factor = finite_number("conditional_boost_factor", conditional_boost_factor)
        self.eos_token_id = _end_of_text(tokenizer) if boost_eos else None

    def stage(self) -> Several:
        """A bias on the prompt's tokens, and one on those that would go on as the prompt does."""
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        stages = [Bias(History("prompt"), self.boost_factor, argument="eos_token_id", extra=eos, rounds_once=True)]
        if self.conditional_boost_factor:
            stages.append(Bias(Repeated(2, span="prompt"), self.conditional_boost_factor, rounds_once=True))
        return Several(tuple(stages))


class MultipleChoiceLogitsProcessor(StagedProcessor):
    r"""Allow only tokens that answer with one of some choices, at every step.

    The choices keep their scores, and so their probabilities relative to each other. The original gives all other
    tokens the lowest score of the row, so that a sampler may still take one.

    Args:
        tokenizer: a tokenizer of transformers.
        choices: texts of the choices, each of one token; None for ``"1"`` to ``"4"``.
        delimiter: text of one token, which follows each choice where the prompt lists them.
        boost_first_words: if not 0, ``boost_first_words`` times the score of the first token after ``"\nA."`` in the
            prompt is added to the score of the choice ``"A"``, for the choices that the prompt lists in order. All
            tokens with the text of a choice are found there, with and without a space before it.

    Raises:
        ValueError: text that is not one token, no choices or equal ones, a factor that is not a finite number; on a
            call, a choice outside the vocabulary, or, with ``boost_first_words``, a run whose start isn't known.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, ".": 3}))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> processor = MultipleChoiceLogitsProcessor(tokenizer, ["yes", "no"])
        >>> processor(torch.tensor([[3]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
        tensor([[-inf, 1., 2., -inf]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: Any,
        choices: Iterable[str] | None = None,
        delimiter: str = ".",
        boost_first_words: float = 0.0,
    ) -> None:
        texts = ["1", "2", "3", "4"] if choices is None else list(choices)
        self.choice_tokens = tuple(_token("choices", tokenizer, text) for text in texts)
        if not texts or len(set(self.choice_tokens)) < len(texts):
            raise ValueError(f"choices must be at least one text, each another token, got {texts!r}")
        self.boost_first_words = finite_number("boost_first_words", boost_first_words)
        self.delimiter_token = _token("delimiter", tokenizer, delimiter)
        if self.boost_first_words:
            self.new_lines = TokenMask.matching(tokenizer, r"[\s\S]*\n", how="fullmatch")
            self.delimiters = _same_text(tokenizer, self.delimiter_token)
            self.listed_choices = [_same_text(tokenizer, token) for token in self.choice_tokens]

    def stage(self) -> Ban | Rows:
        """A mask; after a bias that the prompt makes, where there is one."""
        if not self.boost_first_words:
            return Ban(self.choice_tokens, argument="choices", inverted=True)
        function = partial(
            _choose, self.choice_tokens, self.boost_first_words, self.new_lines, self.delimiters, self.listed_choices
        )
        description = f"allow {len(self.choice_tokens)} choices, with {self.boost_first_words:g} of their first words"
        return Rows("mask", function, description, positioned=True)


class ForceLastPhraseLogitsProcessor(StagedProcessor):
    """Force a phrase before the end of the text, where the end becomes the most likely token.

    After the phrase the text may end. A forced token gets a score of 0 and all others -inf; the original gives the
    others the lowest score of the row.

    Args:
        phrase: the phrase.
        tokenizer: a tokenizer of transformers.
        batch_size: not used; rows may be of any number.

    Raises:
        ValueError: a phrase without tokens, a tokenizer without an end of text; on a call, a token outside the
            vocabulary, or a run whose start isn't known.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, ".": 3}))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> run = ForceLastPhraseLogitsProcessor("no", tokenizer).for_run(prompt_length=1)
        >>> run(torch.tensor([[1]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
        tensor([[-inf, -inf, 0., -inf]])
        >>> run(torch.tensor([[1, 2]]), torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
        tensor([[4., 1., 2., 3.]])
    """

    supports_continuous_batching = False

    def __init__(self, phrase: str, tokenizer: Any, batch_size: int | None = None) -> None:
        self.eos_token_id = _end_of_text(tokenizer)
        self.phrase_tokens = _phrase(phrase, tokenizer)
        self._memory = _Memory(1)

    def stage(self) -> Rows:
        """Forced tokens in some rows."""
        function = partial(_force_last, self.phrase_tokens, self.eos_token_id, self._memory)
        description = f"force {len(self.phrase_tokens)} tokens before token {self.eos_token_id}"
        return Rows("force", function, description, positioned=True, keeps_notes=True)


class TriggerPhraseLogitsProcessor(StagedProcessor):
    """Force a phrase where a certain token becomes the most likely one, or after some time.

    A forced token gets a score of 0 and all others -inf; the original gives the others the lowest score of the row.

    Args:
        tokenizer: a tokenizer of transformers.
        batch_size: not used; rows may be of any number.
        phrase: the phrase.
        trigger_token_phrase: text of the one token; None for none.
        trigger_time: seconds from the start of the run, or from the row's last phrase, after which the phrase is forced
            anyway; None for never. Each call reads the host's clock, so such a plan can't be captured in a CUDA graph.
            In the original the phrase of one row restarts the clock of all rows.
        trigger_count: how often the phrase is forced in a row of the batch at most, an integer of at least 0.
        trigger_after: whether the phrase follows the token, rather than replacing it.

    Raises:
        ValueError: neither token nor time, text that is not one token, an argument out of range; on a call, a token
            outside the vocabulary, or a run whose start isn't known.
        RuntimeError: with ``trigger_time``, on a call during the capture of a CUDA graph.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, ".": 3}))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> processor = TriggerPhraseLogitsProcessor(tokenizer, phrase="no", trigger_token_phrase="yes")
        >>> run = processor.for_run(prompt_length=1)
        >>> run(torch.tensor([[3]]), torch.tensor([[1.0, 4.0, 2.0, 3.0]]))
        tensor([[-inf, -inf, 0., -inf]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: Any,
        batch_size: int | None = None,
        phrase: str = "",
        trigger_token_phrase: str | None = None,
        trigger_time: float | None = None,
        trigger_count: int = 1,
        trigger_after: bool = False,
    ) -> None:
        if trigger_token_phrase is None and trigger_time is None:
            raise ValueError("trigger_token_phrase or trigger_time must be given, got None for both")
        self.phrase_tokens = _phrase(phrase, tokenizer)
        self.trigger_token = (
            None if trigger_token_phrase is None else _token("trigger_token_phrase", tokenizer, trigger_token_phrase)
        )
        self.trigger_time = None if trigger_time is None else finite_number("trigger_time", trigger_time, 0)
        self.trigger_count = whole_number("trigger_count", trigger_count)
        self.trigger_after = trigger_after
        self._memory = _Memory(3)

    def stage(self) -> Rows:
        """Forced tokens in some rows."""
        trigger = _Trigger(
            self.trigger_token, self.trigger_time, min(self.trigger_count, _MOST_STEPS), self.trigger_after
        )
        function = partial(_force_triggered, self.phrase_tokens, trigger, self._memory)
        causes = [] if self.trigger_token is None else [f"at token {self.trigger_token}"]
        causes += [] if self.trigger_time is None else [f"after {self.trigger_time:g} s"]
        times = f"up to {self.trigger_count} times"
        description = f"force {len(self.phrase_tokens)} tokens {' or '.join(causes)}, {times}"
        return Rows("force", function, description, positioned=True, keeps_notes=True)


class PreventHallucinationLogitsProcessor(StagedProcessor):
    """Force a phrase when the model has been unsure too often.

    The model is unsure at a step if its most likely token has a probability below ``minp``. The first step after the
    phrase isn't forced, and the count starts again after it. A forced token gets a score of 0 and all others -inf; the
    original gives the others the lowest score of the row.

    Args:
        tokenizer: a tokenizer of transformers.
        batch_size: not used; rows may be of any number.
        minp: a probability, 0 to 1.
        tolerate: number of unsure steps that are tolerated, consecutive or not, an integer of at least 0.
        phrase: the phrase.

    Raises:
        ValueError: a phrase without tokens, an argument out of range; on a call, a token outside the vocabulary, or a
            run whose start isn't known.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, ".": 3}))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> processor = PreventHallucinationLogitsProcessor(tokenizer, minp=0.4, tolerate=0, phrase="no")
        >>> processor.for_run(prompt_length=1)(torch.tensor([[3]]), torch.zeros(1, 4))
        tensor([[-inf, -inf, 0., -inf]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: Any,
        batch_size: int | None = None,
        minp: float = 0.4,
        tolerate: int = 1,
        phrase: str = "...I don't know actually.\n",
    ) -> None:
        self.minp = finite_number("minp", minp, 0, 1)
        self.tolerate = whole_number("tolerate", tolerate)
        self.phrase_tokens = _phrase(phrase, tokenizer)
        self._memory = _Memory(2)

    def stage(self) -> Rows:
        """Forced tokens in some rows."""
        tolerate = min(self.tolerate, _MOST_STEPS)
        function = partial(_force_unsure, self.phrase_tokens, self.minp, tolerate, self._memory)
        description = f"force {len(self.phrase_tokens)} tokens after {self.tolerate + 1} steps below {self.minp:g}"
        return Rows("force", function, description, positioned=True, keeps_notes=True)


class MaxTimeLogitsProcessor(StagedProcessor):
    """Force the end of the text after some time, in rows that haven't ended.

    The time starts at the first step of a run, or at the first call of it. Each call reads the host's clock, so such a
    plan can't be captured in a CUDA graph.

    Args:
        tokenizer: a tokenizer of transformers.
        max_time: seconds, a finite number of at least 0.
        complete_sentences: whether a row goes on until its last token ends a sentence or a line; see
            ``GenLengthLogitsProcessor``.
        boost_token_str: text of the token that is used instead of the end of the text, such as ``"</think>"``.

    Raises:
        ValueError: an argument out of range, text that is not one token, a tokenizer without an end of text; on a
            call, a token outside the vocabulary, or a run whose start isn't known.
        RuntimeError: on a call during the capture of a CUDA graph.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "yes": 1, "no": 2, ".": 3}))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> run = MaxTimeLogitsProcessor(tokenizer, 60.0).for_run(prompt_length=1)
        >>> run(torch.tensor([[1]]), torch.zeros(1, 4))
        tensor([[0., 0., 0., 0.]])
    """

    supports_continuous_batching = False

    def __init__(
        self,
        tokenizer: Any,
        max_time: float,
        complete_sentences: bool = False,
        boost_token_str: str | None = None,
    ) -> None:
        self.max_time = finite_number("max_time", max_time, 0)
        self.complete_sentences = complete_sentences
        self.boost_token = _boosted(tokenizer, boost_token_str)
        self.sentence_ends = _sentence_ends(tokenizer) if complete_sentences else None
        self._memory = _Memory(1)

    def stage(self) -> ForceRows:
        """A forced token in some rows."""
        function = partial(_is_late, self.boost_token, self.max_time, self.sentence_ends, self._memory)
        where = " after a sentence" if self.complete_sentences else ""
        late = RowValues(function, f"after {self.max_time:g} s{where}", keeps_notes=True)
        return ForceRows((self.boost_token,), late[0], "boost_token")


# -- What the stages do -------------------------------------------------------------------------------------------


def _boost_of_end(token: int, factor: float, p: float, sentence_ends: TokenMask | None, rows: CallRows) -> torch.Tensor:
    """What is added to the end of each row ``[B, 1]``."""
    going = _is_going(token, sentence_ends, rows)
    step = rows.step
    if isinstance(step, int):
        boost = torch.full((), factor * max(0, step) ** p / 10**p, dtype=torch.float64, device=rows.device)
    else:
        boost = factor * step.clamp(min=0).double() ** p / 10**p
    return boost.where(going, -0.0)


def _choose(
    choices: tuple[int, ...],
    factor: float,
    new_lines: TokenMask,
    delimiters: TokenMask,
    listed_choices: list[TokenMask],
    input_ids: torch.Tensor,
    scores: torch.Tensor,
    cache_position: Index,
    prompt_length: Index,
) -> torch.Tensor:
    check_rows("MultipleChoiceLogitsProcessor", input_ids, scores)
    _check_tokens(scores, *choices)
    V = scores.shape[1]
    prompt = prompt_of(input_ids, prompt_length)
    L = prompt.shape[1]
    starts = _are_in(new_lines, prompt[:, :-3]) & _are_in(delimiters, prompt[:, 2:-1])  # [B, L - 3]
    column = torch.arange(starts.shape[1], device=prompt.device)
    after = torch.full_like(prompt[:, :1], -1, dtype=torch.int64)
    words = []
    for listed in listed_choices if L > 3 else ():
        found = starts & _are_in(listed, prompt[:, 1:-2]) & (column > after)
        # The first that comes after the choice before it; none comes after one that isn't there.
        after = column.where(found, L).amin(1, keepdim=True)
        words.append(pad(prompt, (0, L + 3), value=-1)[:, 3:].gather(1, after))
    chosen = ids_on(scores.device, choices).expand(scores.shape[0], -1)
    kept = scores.gather(1, chosen)
    if words:
        word = torch.cat(words, 1)
        inside = (word >= 0) & (word < V)
        wide = torch.promote_types(scores.dtype, torch.float32)
        boost = factor * scores.gather(1, word.where(inside, 0).long()).to(wide)
        kept = (kept.to(wide) + boost).to(scores.dtype).where(inside, kept)
    return torch.full_like(scores, -_INF).scatter_(1, chosen, kept)


def _force_last(
    phrase: tuple[int, ...],
    eos: int,
    memory: _Memory,
    input_ids: torch.Tensor,
    scores: torch.Tensor,
    cache_position: Index,
    prompt_length: Index,
    run: Run,
) -> torch.Tensor:
    check_rows("ForceLastPhraseLogitsProcessor", input_ids, scores)
    _check_tokens(scores, eos, *phrase)
    recalled = memory.of(CallRows.of(input_ids, scores, cache_position, prompt_length, run))
    said = recalled.state[:, 0]
    due = torch.where(said == 0, scores.argmax(1) == eos, said < len(phrase))
    recalled.note(said + due)
    return _forced(scores, due, phrase, said)


@dataclass(frozen=True)
class _Trigger:
    """When a phrase begins: at a token, after seconds, so many times, in the token's place or after it."""

    token: int | None
    time: float | None
    count: int
    after: bool


def _force_triggered(
    phrase: tuple[int, ...],
    trigger: _Trigger,
    memory: _Memory,
    input_ids: torch.Tensor,
    scores: torch.Tensor,
    cache_position: Index,
    prompt_length: Index,
    run: Run,
) -> torch.Tensor:
    check_rows("TriggerPhraseLogitsProcessor", input_ids, scores)
    _check_tokens(scores, *phrase)
    recalled = memory.of(CallRows.of(input_ids, scores, cache_position, prompt_length, run))
    # The phrase begins at the next step at the latest where ``said`` is 1; then it is one more than is said of it.
    said, times, started = recalled.state.unbind(1)
    fires = torch.zeros_like(said, dtype=torch.bool)
    if trigger.token is not None:
        fires |= scores.argmax(1) == trigger.token
    now = 0
    if trigger.time is not None:
        now = _now(scores.device)
        started = started.where(started > 0, now)
        fires |= now - started > trigger.time * 1e6
    fires &= (said == 0) & (times < trigger.count)
    due = said > 0
    if not trigger.after:
        due = due | fires
    said = said + fires
    complete = due & (said == len(phrase))
    recalled.note((said + due).masked_fill(complete, 0), times + complete, started.masked_fill(complete, now))
    return _forced(scores, due, phrase, said - 1)


def _force_unsure(
    phrase: tuple[int, ...],
    minp: float,
    tolerate: int,
    memory: _Memory,
    input_ids: torch.Tensor,
    scores: torch.Tensor,
    cache_position: Index,
    prompt_length: Index,
    run: Run,
) -> torch.Tensor:
    check_rows("PreventHallucinationLogitsProcessor", input_ids, scores)
    _check_tokens(scores, *phrase)
    recalled = memory.of(CallRows.of(input_ids, scores, cache_position, prompt_length, run))
    said, unsure = recalled.state.unbind(1)
    likeliest = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).amax(-1)
    unsure = unsure + (likeliest < minp)
    complete = said == len(phrase)
    due = torch.where(said == 0, unsure > tolerate, ~complete)
    recalled.note((said + due).masked_fill(complete, 0), unsure.masked_fill(complete, 0))
    return _forced(scores, due, phrase, said)


def _is_late(
    token: int, max_time: float, sentence_ends: TokenMask | None, memory: _Memory, rows: CallRows
) -> torch.Tensor:
    """Which rows ``[B, 1]`` have had their time, and haven't ended."""
    recalled = memory.of(rows)
    now = _now(rows.device)
    started = recalled.state[:, 0]
    started = started.where(started > 0, now)
    recalled.note(started)
    return (now - started > max_time * 1e6).unsqueeze(1) & _is_going(token, sentence_ends, rows)


def _forced(scores: torch.Tensor, due: torch.Tensor, phrase: tuple[int, ...], said: torch.Tensor) -> torch.Tensor:
    """Scores that leave nothing but the phrase's token after ``said`` in the rows that are due."""
    if scores.is_cpu and not due.any():
        return scores
    token = ids_on(scores.device, phrase)[said.clamp(0, len(phrase) - 1)].unsqueeze(1)
    due = due.unsqueeze(1)
    processed = scores.masked_fill(due, -_INF)
    return processed.scatter_(1, token, scores.gather(1, token).masked_fill(due, 0.0))


# -- What was, and where a row stands -----------------------------------------------------------------------------


class _Notes(NamedTuple):
    """What was noted at each of the last steps, in each place of a batch."""

    texts: torch.Tensor
    """Hashes of the texts, int64 ``[steps, rows]``."""
    values: torch.Tensor
    """What was noted for them, int64 ``[steps, rows, width]``."""

    @classmethod
    def empty(cls, steps: int, rows: int, width: int, device: torch.device) -> _Notes:
        """Nothing noted."""
        with torch.inference_mode(False):
            texts = torch.zeros(steps, rows, dtype=torch.int64, device=device)
            return cls(texts, texts.new_zeros(steps, rows, width))

    def of_more(self, rows: int) -> _Notes:
        """The same with room for more rows."""
        more = rows - self.texts.shape[1]
        with torch.inference_mode(False):
            return _Notes(pad(self.texts, (0, more)), pad(self.values, (0, 0, 0, more)))


class _Memory:
    """A few integers for each row of a run, which are kept from step to step.

    A call reads the notes of one step earlier in the same place of the batch, if the text there was the row's own: all
    its tokens but the last, compared by a hash. If not, rows have changed places, and the nearest place with the row's
    text is taken. So rows with equal texts keep their own notes, rows may move and become more or fewer, and a text
    that is cut back finds the notes of its length. At the first step of a run, and for a text that wasn't there one
    step earlier, all integers are 0. The host never waits for the device, and a captured graph keeps notes too.

    If rows with equal texts change places, or one of them ends, nobody can tell them apart: the notes stay in their
    places.

    Each run has its own notes, of its last 64 steps. A list that is called with ``prompt_length`` makes a run for each
    call: such a call takes the notes of the last one in its thread.

    A processor has one memory, not one for each of its plans. So an attribute that is set during a run, or a copy that
    is made then, forgets nothing.

    Args:
        width: how many integers.
    """

    _STEPS = 64

    def __init__(self, width: int) -> None:
        self._width = width
        self._thread = local()
        self._captured: list[_Notes] = []
        """What captured graphs read and write, which must outlive its run."""

    def of(self, rows: CallRows) -> _Recalled:
        """What is known of the rows of a call, which has a run."""
        input_ids, device = rows.input_ids, rows.device
        B, L = input_ids.shape
        notes = self._notes(rows)
        length, step = rows.length, rows.step
        if isinstance(step, int):
            step = torch.full((1, 1), step, device=device)
        step = step.flatten()
        column = torch.arange(L, device=device)
        terms = (input_ids + 1) * _weights(column)  # [B, L]
        before = terms.where(column < length - 1, 0).sum(1)
        text = terms.where(column < length, 0).sum(1)

        slot = (step - 1) % self._STEPS
        N = notes.texts.shape[1]
        place = torch.arange(N, device=device)
        same = notes.texts.index_select(0, slot) == before.unsqueeze(1)  # [B, N]
        # Nearest first; of two that are as near, the lower one.
        order = (place - place[:B].unsqueeze(1)).abs() * N + place
        best = order.where(same, N * N).amin(1)  # [B]
        known = (best < N * N) & (step > 0)
        state = notes.values[slot, best % N].where(known.unsqueeze(1), 0)
        return _Recalled(state, notes, step % self._STEPS, text)

    def _notes(self, rows: CallRows) -> _Notes:
        """The notes of a run, with room for the rows of a call."""
        B, device, run = rows.B, rows.device, rows.run
        assert run is not None
        # A draft model of another vocabulary writes other texts.
        key = (device, rows.V)
        kept = run.kept_for(self)
        notes: _Notes | None = kept.get(key)
        if notes is None:
            owner, last = self._lasting.get(key, (None, None))
            # The run of another call of the list is gone by now; one that lives has its notes to itself.
            notes = last if owner is None or owner() is None else None
        room = max(64, 1 << (B - 1).bit_length())
        if notes is None or notes.texts.shape[1] < room:
            if is_capturing(device):
                raise RuntimeError("call the plan once, in this thread, before it is captured in a CUDA graph")
            notes = _Notes.empty(self._STEPS, room, self._width, device) if notes is None else notes.of_more(room)
        kept[key] = notes
        self._lasting[key] = ref(run), notes
        if is_capturing(device):
            hold(self._captured, notes)
        return notes

    @property
    def _lasting(self) -> dict[tuple[torch.device, int], tuple[ReferenceType[Run], _Notes]]:
        """Of this thread, the last run and its notes, for each device and vocabulary."""
        found: dict[Any, Any] = self._thread.__dict__.setdefault("lasting", {})
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"_width": self._width}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _Memory.__init__(self, state["_width"])


@dataclass(frozen=True)
class _Recalled:
    """What is known of the rows of a call.

    Args:
        state: int64 ``[B, width]``.
        notes: where it was found.
        slot: where the step is in them, ``[1]`` or ``[B]``.
        text: hashes of the texts, ``[B]``.
    """

    state: torch.Tensor
    notes: _Notes
    slot: torch.Tensor
    text: torch.Tensor

    def note(self, *state: torch.Tensor) -> None:
        """Note something for the texts of the call, a column ``[B]`` for each integer."""
        texts, values = self.notes
        noted = torch.stack(state, 1)
        B = self.text.shape[0]
        if self.slot.shape[0] == 1:
            # What other rows, which are gone, have noted for this step goes.
            spare = texts.shape[1] - B
            texts.index_copy_(0, self.slot, pad(self.text, (0, spare)).unsqueeze(0))
            values.index_copy_(0, self.slot, pad(noted, (0, 0, 0, spare)).unsqueeze(0))
        else:
            row = torch.arange(B, device=texts.device)
            texts[self.slot, row] = self.text
            values[self.slot, row] = noted


def _weights(column: torch.Tensor) -> torch.Tensor:
    """A fixed random odd number for each column: sums of tokens times these are hashes (splitmix64)."""
    x = (column + 1) * -0x61C8864680B583EB
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return (x ^ (x >> 31)) | 1


def _now(device: torch.device) -> int:
    """The host's clock in microseconds, above 0."""
    if is_capturing(device):
        raise RuntimeError("a processor that reads the clock can't be captured in a CUDA graph: it would stand still")
    return int(monotonic() * 1e6) + 1


def _is_going(token: int, sentence_ends: TokenMask | None, rows: CallRows) -> torch.Tensor:
    """Rows ``[B, 1]`` that haven't generated a token, and whose last one ends a sentence, if that is asked for."""
    going = ~((rows.input_ids == token) & rows.generated()).any(1, keepdim=True)
    return going if sentence_ends is None else going & _are_in(sentence_ends, rows.last())


def _are_in(mask: TokenMask, ids: torch.Tensor) -> torch.Tensor:
    """Which of some ids are in a mask; those that it doesn't know are not."""
    row = mask.row(ids.device)
    return row[ids.clamp(0, mask.vocab_size - 1).long()] & (ids >= 0) & (ids < mask.vocab_size)


def _check_tokens(scores: torch.Tensor, *tokens: int) -> None:
    if max(tokens) >= scores.shape[1]:
        raise ValueError(f"token id {max(tokens)} is outside the vocabulary of {scores.shape[1]} tokens")


# -- What the tokenizer says --------------------------------------------------------------------------------------


def _end_of_text(tokenizer: Any) -> int:
    eos = getattr(tokenizer, "eos_token_id", None)
    if not isinstance(eos, int):
        raise ValueError(f"tokenizer must have an eos_token_id, the token that ends the text, got {eos!r}")
    return eos


def _boosted(tokenizer: Any, text: str | None) -> int:
    return _end_of_text(tokenizer) if text is None else _token("boost_token_str", tokenizer, text)


def _token(argument: str, tokenizer: Any, text: str) -> int:
    """The one token of a text, apart from a space that the tokenizer puts before it."""
    if not isinstance(text, str):
        raise ValueError(f"{argument} must be text, got {text!r}")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    texts = token_texts(tokenizer)
    while len(ids) > 1 and not (texts[ids[0]] or "").strip(" "):
        ids = ids[1:]
    if len(ids) != 1:
        raise ValueError(f"{argument} must be text of one token, but the tokenizer makes {len(ids)} of {text!r}")
    return ids[0]


def _phrase(phrase: str, tokenizer: Any) -> tuple[int, ...]:
    if not isinstance(phrase, str):
        raise ValueError(f"phrase must be text, got {phrase!r}")
    ids = tuple(tokenizer.encode(phrase, add_special_tokens=False))
    if not ids:
        raise ValueError(f"phrase must have at least one token, got {phrase!r}")
    return ids


def _sentence_ends(tokenizer: Any) -> TokenMask:
    return TokenMask.matching(tokenizer, r"[\s\S]*[.\n]", how="fullmatch")


def _same_text(tokenizer: Any, token: int) -> TokenMask:
    """A token, and those with the same text, with and without a space before it."""
    texts = token_texts(tokenizer)
    text = texts[token]
    same = [i for i, other in enumerate(texts) if text and other in (text.lstrip(" "), " " + text.lstrip(" "))]
    return TokenMask.from_ids({token, *same}, len(texts))
