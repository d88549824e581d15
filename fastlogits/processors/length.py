"""Processors that read the length of the sequence: when it may end, and how it must begin and end."""

from __future__ import annotations

from transformers.generation import logits_process as theirs

from fastlogits.plan.stages import Ban, Decay, Force, When
from fastlogits.processors.base import StagedProcessor


class MinLengthLogitsProcessor(StagedProcessor, theirs.MinLengthLogitsProcessor):
    """Forbid the end of the text until the sequence, prompt included, has a minimal length.

    Args:
        min_length: an integer of at least 0.
        eos_token_id: the id or ids that end the text; a list, an integer or a tensor.
        device: device on which the ids are kept.

    Raises:
        ValueError: ``min_length`` is not an integer or is negative.

    Example:
        >>> import torch
        >>> MinLengthLogitsProcessor(3, 1)(torch.tensor([[5, 7]]), torch.zeros(1, 3))
        tensor([[0., -inf, 0.]])
    """

    def stage(self) -> Ban:
        """A mask below a length."""
        return Ban(ids_of(self.eos_token_id), When("length", stop=self.min_length), lenient=True)


class MinNewTokensLengthLogitsProcessor(StagedProcessor, theirs.MinNewTokensLengthLogitsProcessor):
    """Forbid the end of the text until a minimal number of tokens has been generated.

    Args:
        prompt_length_to_skip: number of tokens of the prompt, an integer of at least 0.
        min_new_tokens: an integer of at least 0.
        eos_token_id: the id or ids that end the text; a list, an integer or a tensor.
        device: device on which the ids are kept.

    Raises:
        ValueError: a number that is not an integer or is negative.

    Example:
        >>> import torch
        >>> MinNewTokensLengthLogitsProcessor(2, 1, 1)(torch.tensor([[5, 7]]), torch.zeros(1, 3))
        tensor([[0., -inf, 0.]])
    """

    def stage(self) -> Ban:
        """A mask below a length."""
        until = self.prompt_length_to_skip + self.min_new_tokens
        return Ban(ids_of(self.eos_token_id), When("length", stop=until), lenient=True)


class ForcedBOSTokenLogitsProcessor(StagedProcessor, theirs.ForcedBOSTokenLogitsProcessor):
    """Force the token that follows the decoder's start token.

    Args:
        bos_token_id: the forced token.

    Raises:
        IndexError: on a call, a token outside the vocabulary.

    Example:
        >>> import torch
        >>> ForcedBOSTokenLogitsProcessor(1)(torch.tensor([[0]]), torch.ones(1, 3))
        tensor([[-inf, 0., -inf]])
    """

    def stage(self) -> Force:
        """Force at a length of 1."""
        return Force((int(self.bos_token_id),), When("length", start=1, stop=2), "bos_token_id")


class ForcedEOSTokenLogitsProcessor(StagedProcessor, theirs.ForcedEOSTokenLogitsProcessor):
    """Force the end of the text as the last token before the maximal length.

    Args:
        max_length: length at which generation stops.
        eos_token_id: the id or ids that end the text; a list, an integer or a tensor.
        device: device on which the ids are kept.

    Raises:
        ValueError: ids that are not integers or are negative.
        IndexError: on a call, ids outside the vocabulary.

    Example:
        >>> import torch
        >>> ForcedEOSTokenLogitsProcessor(3, 1)(torch.tensor([[5, 7]]), torch.ones(1, 3))
        tensor([[-inf, 0., -inf]])
    """

    def stage(self) -> Force:
        """Force at one length."""
        last = When("length", start=self.max_length - 1, stop=self.max_length)
        return Force(ids_of(self.eos_token_id), last, "eos_token_id")


class ExponentialDecayLengthPenalty(StagedProcessor, theirs.ExponentialDecayLengthPenalty):
    """Make the end of the text more and more likely beyond a length.

    Args:
        exponential_decay_length_penalty: number of generated tokens after which the score of the end grows, and the
            factor by which it grows at each step.
        eos_token_id: the id or ids that end the text; a list, an integer or a tensor.
        input_ids_seq_length: number of tokens of the prompt.

    Raises:
        ValueError: ids that are not integers or are negative.
        IndexError: on a call, ids outside the vocabulary.

    Example:
        >>> import torch
        >>> processor = ExponentialDecayLengthPenalty((1, 2.0), 1, input_ids_seq_length=2)
        >>> processor(torch.tensor([[5, 7, 5, 7]]), torch.ones(1, 3))
        tensor([[1., 2., 1.]])
    """

    def stage(self) -> Decay:
        """Growth beyond a length."""
        return Decay(ids_of(self.eos_token_id), self.regulation_start, self.regulation_factor)


def ids_of(tensor: object) -> tuple[int, ...]:
    """The token ids of a tensor, once, in their order."""
    return tuple(dict.fromkeys(int(token) for token in tensor.flatten().tolist()))  # type: ignore[attr-defined]
