"""Processors that read the last tokens, and forbid or bias what may follow them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from transformers.generation import logits_process as theirs

from fastlogits.checks import is_number, whole_number
from fastlogits.plan.stages import Ban, Given, Repeated, SequenceBias
from fastlogits.processors.base import StagedProcessor
from fastlogits.token_mask import checked_ids


class NoRepeatNGramLogitsProcessor(StagedProcessor, theirs.NoRepeatNGramLogitsProcessor):
    """Forbid tokens that would complete an n-gram that the sequence, prompt included, already holds.

    Args:
        ngram_size: tokens of an n-gram, at least 1.

    Raises:
        ValueError: not an integer of at least 1.

    Example:
        >>> NoRepeatNGramLogitsProcessor(2)(torch.tensor([[1, 2, 1]]), torch.zeros(1, 4))
        tensor([[0., 0., -inf, 0.]])
    """

    def stage(self) -> Ban:
        """A mask that the history makes."""
        return Ban(Repeated(whole_number("ngram_size", self.ngram_size, 1)))


class EncoderNoRepeatNGramLogitsProcessor(StagedProcessor, theirs.EncoderNoRepeatNGramLogitsProcessor):
    """Forbid tokens that would complete an n-gram of the encoder's input.

    Args:
        encoder_ngram_size: tokens of an n-gram, at least 1.
        encoder_input_ids: integer ``(L,)`` or ``(R, L)``; beams of one input are neighbouring rows.

    Raises:
        ValueError: a size that is not an integer of at least 1.

    Example:
        >>> processor = EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([[1, 2, 3]]))
        >>> processor(torch.tensor([[0, 1]]), torch.zeros(1, 4))
        tensor([[0., 0., -inf, 0.]])
    """

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: torch.Tensor) -> None:
        super().__init__(encoder_ngram_size, encoder_input_ids.new_empty(1, 0))
        self.encoder_input_ids = encoder_input_ids.reshape(-1, encoder_input_ids.shape[-1])
        self.batch_size = self.encoder_input_ids.shape[0]
        self.generated_ngrams = _NGrams(encoder_ngram_size, self.encoder_input_ids)

    def stage(self) -> Ban:
        """A mask that the history makes, given another text."""
        ids = self.__dict__.get("encoder_input_ids")
        if ids is None:  # an object of transformers' own class keeps the n-grams only
            texts = [
                [token for prefix, tokens in known.items() for last in tokens for token in (*prefix, last, -1)]
                for known in self.generated_ngrams
            ]
            ids = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True, padding_value=-1
            )
        return Ban(Repeated(whole_number("ngram_size", self.ngram_size, 1), Given(ids)))


class _NGrams(Sequence[Any]):
    """The n-grams of each row of some ids, which transformers' own call reads, made when somebody asks for them.

    Args:
        size: tokens of an n-gram.
        ids: integer ``(R, L)``.
    """

    def __init__(self, size: int, ids: torch.Tensor) -> None:
        self._size, self._ids = size, ids

    @cached_property
    def _made(self) -> list[dict[tuple[int, ...], list[int]]]:
        made: list[dict[tuple[int, ...], list[int]]] = []
        for row in self._ids.tolist():
            known: dict[tuple[int, ...], list[int]] = {}
            for last in range(self._size - 1, len(row)):
                known.setdefault(tuple(row[last - self._size + 1 : last]), []).append(row[last])
            made.append(known)
        return made

    def __getitem__(self, row: Any) -> Any:
        return self._made[row]

    def __len__(self) -> int:
        return self._ids.shape[0]


class SequenceBiasLogitsProcessor(StagedProcessor, theirs.SequenceBiasLogitsProcessor):
    """Add a bias to the last token of a sequence if the tokens before it end the text so far.

    Args:
        sequence_bias: a dictionary from tuples of token ids to floats, or a list of ``[[ids], float]``. A sequence of
            one token always counts.

    Raises:
        ValueError: no sequences, or sequences of another form; on a call, token ids outside the vocabulary.

    Example:
        >>> processor = SequenceBiasLogitsProcessor({(1, 2): -5.0, (0,): 1.0})
        >>> processor(torch.tensor([[3, 1]]), torch.zeros(1, 4))
        tensor([[ 1.,  0., -5.,  0.]])
    """

    def stage(self) -> SequenceBias:
        """A bias on the ends of sequences."""
        sequences = [(tuple(int(token) for token in ids), float(bias)) for ids, bias in self.sequence_bias.items()]
        if not _IN_ORDER:
            # Floats are added up in transformers' order: sequences of one length together, at the first one's place.
            lengths = {length: i for i, length in enumerate(dict.fromkeys(len(ids) for ids, _ in sequences))}
            sequences.sort(key=lambda each: lengths[len(each[0])])
        return SequenceBias(tuple(sequences))


_IN_ORDER = int(transformers.__version__.partition(".")[0]) < 5


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor, theirs.NoBadWordsLogitsProcessor):
    """Forbid words: the last token of a word if the tokens before it end the text so far.

    Args:
        bad_words_ids: a list of lists of token ids.
        eos_token_id: the id or ids that end the text, which are never forbidden; a list, an integer or a tensor.

    Raises:
        ValueError: no words, or words of another form; on a call, token ids outside the vocabulary.

    Example:
        >>> NoBadWordsLogitsProcessor([[1, 2], [0]])(torch.tensor([[3, 1]]), torch.zeros(1, 4))
        tensor([[-inf, 0., -inf, 0.]])
    """


class LogitBiasLogitsProcessor(StagedProcessor):
    """Add a bias to the scores of some tokens: ``logit_bias`` of serving engines.

    Args:
        logit_bias: a mapping from token ids to numbers; -inf forbids a token. Keys may be strings, as in OpenAI's
            interface, where the numbers are from -100 to 100.

    Raises:
        ValueError: ids that are not integers or are negative, values that are not numbers; on a call, ids outside the
            vocabulary.

    Example:
        >>> LogitBiasLogitsProcessor({1: 2.0, 3: -1.0})(None, torch.zeros(1, 4))
        tensor([[ 0.,  2.,  0., -1.]])
    """

    supports_continuous_batching = True

    def __init__(self, logit_bias: Mapping[int, float] | Mapping[str, float]) -> None:
        if not isinstance(logit_bias, Mapping):
            raise ValueError(f"logit_bias must be a mapping from token ids to numbers, got {logit_bias!r}")
        ids = checked_ids("logit_bias", [_as_id(token) for token in logit_bias])
        for value in logit_bias.values():
            if not (is_number(value) and value < float("inf")):
                raise ValueError(f"logit_bias must have numbers below inf as values, got {value!r}")
        self.logit_bias = dict(zip(ids, map(float, logit_bias.values()), strict=True))

    def stage(self) -> SequenceBias:
        """A bias on single tokens."""
        return SequenceBias(tuple(((token,), value) for token, value in self.logit_bias.items()))


def _as_id(token: int | str) -> int:
    return int(token) if isinstance(token, str) and token.isdecimal() else token  # type: ignore[return-value]
