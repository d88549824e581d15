"""What the installed transformers does, found by asking it.

fastlogits follows the newest one that it is tested with, whichever is installed. Each of these is True where the
installed one does as that, so that a test can compare the two.
"""

from collections.abc import Callable

import torch
import transformers
import transformers.generation.logits_process as reference

IS_4 = transformers.__version__.startswith("4.")
INF = float("inf")


def _does(ask: Callable[[], object]) -> bool:
    try:
        return bool(ask())
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False


def _ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def _penalises_copies() -> object:
    processor = reference.EncoderRepetitionPenaltyLogitsProcessor(2.0, _ids([1]))
    return processor(_ids([0], [0]), torch.ones(2, 3))[1, 1] == 2


def _completes_from_all_of_a_text() -> object:
    processor = reference.SequenceBiasLogitsProcessor({(1, 2): 3.0})
    return processor(_ids([1]), torch.zeros(1, 4))[0, 2] == 3


def _decays_no_ban() -> object:
    processor = reference.ExponentialDecayLengthPenalty((0, 2.0), 1, 1)
    return processor(_ids([0, 0, 0]), torch.tensor([[0.0, -INF]]))[0, 1] == -INF


def _forces_what_is_banned() -> object:
    processor = reference.PrefixConstrainedLogitsProcessor(lambda *_: [1], 1)
    return processor(_ids([0]), torch.tensor([[0.0, -INF]])).isfinite().any()


TAKES_LENGTHS_OF_ROWS = _does(lambda: reference.RepetitionPenaltyLogitsProcessor(2.0, torch.tensor([1])))
"""A repetition penalty that leaves out as many tokens as a tensor says for each row."""
PENALISES_COPIES = _does(_penalises_copies)
"""A row of an encoder's input stands for several rows of the scores."""
COMPLETES_FROM_ALL_OF_A_TEXT = _does(_completes_from_all_of_a_text)
"""A biased sequence is a token longer than the text; biases of one token are added by the length of the sequences."""
TAKES_ONE_TEXT_FOR_ALL_ROWS = _does(
    lambda: reference.SequenceBiasLogitsProcessor({(1, 1): 3.0})(_ids([1, 1]), torch.zeros(2, 4)).any()
)
"""Biases of sequences take a single row of ids, for as many rows of the scores as there are."""
DECAYS_NO_BAN = _does(_decays_no_ban)
"""A token at -inf stays there, however late it is."""
FORCES_WHAT_IS_BANNED = _does(_forces_what_is_banned)
"""Where all allowed tokens are banned they are forced."""
