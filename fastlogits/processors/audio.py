"""Processors of the speech and music models: Whisper, Bark, Dia."""

from __future__ import annotations

from functools import partial

import torch
from transformers.generation.logits_process import AlternatingCodebooksLogitsProcessor as _AlternatingCodebooks
from transformers.generation.logits_process import BarkEosPrioritizerLogitsProcessor as _BarkEosPrioritizer
from transformers.generation.logits_process import DiaClassifierFreeGuidanceLogitsProcessor as _DiaGuidance
from transformers.generation.logits_process import DiaEOSChannelFilterLogitsProcessor as _DiaEOSChannelFilter
from transformers.generation.logits_process import DiaEOSDelayPatternLogitsProcessor as _DiaEOSDelayPattern
from transformers.generation.logits_process import WhisperNoSpeechDetection as _WhisperNoSpeechDetection
from transformers.generation.logits_process import WhisperTimeStampLogitsProcessor as _WhisperTimeStamp

from fastlogits.plan.pointwise import split_halves
from fastlogits.plan.row_values import CallRows, RowValues
from fastlogits.plan.stages import Ban, BanRange, Observe, Rows, Several, Stage, When
from fastlogits.processors.base import StagedProcessor

_INF = float("inf")


class WhisperTimeStampLogitsProcessor(StagedProcessor, _WhisperTimeStamp):
    """Make Whisper's timestamps come in pairs, and never go back.

    After the first timestamp of a pair no text may follow, and after the second no timestamp. A timestamp is never
    below the last one. If all timestamps together are more likely than any other token, a timestamp must follow.

    Args:
        generate_config: a generation config with ``no_timestamps_token_id``, after which the timestamps begin,
            ``eos_token_id``, and optionally ``max_initial_timestamp_index``, the highest first timestamp.
        begin_index: number of tokens before the first generated one.
        _detect_timestamp_from_logprob: whether likely timestamps are forced; None takes the config's value, or True.

    Raises:
        ValueError: ``begin_index`` is None; on a call, ``input_ids`` of other rows than the scores.
        IndexError: on a call, ``no_timestamps_token_id`` is outside the vocabulary.

    Source: Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision, 2022 (arXiv 2212.04356).

    Example:
        >>> from transformers import GenerationConfig
        >>> config = GenerationConfig(eos_token_id=2, no_timestamps_token_id=3)  # timestamps are 4, 5, 6
        >>> processor = WhisperTimeStampLogitsProcessor(config, begin_index=1, _detect_timestamp_from_logprob=False)
        >>> processor(torch.tensor([[0, 4, 1, 5]]), torch.zeros(1, 7))
        tensor([[-inf, -inf, 0., -inf, -inf, 0., 0.]])
    """

    def stage(self) -> Several:
        """Four bans, of which three are ranges of the row; then one that depends on the sums of the row."""
        first = self.timestamp_begin
        ranges = RowValues(
            partial(WhisperTimeStampLogitsProcessor._ranges, self),
            f"an end that timestamps from token {first} on set",
            count=3,
            positioned=False,
        )
        text_stop, timestamps_stop, late_start = (ranges[i] for i in range(ranges.count))
        bans: list[Stage] = [
            Ban((self.no_timestamps_token_id,), lenient=True),
            BanRange(0, text_stop),
            BanRange(first, timestamps_stop),
            BanRange(late_start),
        ]
        if self._detect_timestamp_from_logprob:
            function = partial(WhisperTimeStampLogitsProcessor._force_likely, self)
            description = f"timestamps from token {first} on where they are likelier than any other token"
            bans.append(Rows("mask", function, description, reads_history=False))
        return Several(tuple(bans))

    def _ranges(self, rows: CallRows) -> torch.Tensor:
        """For each row where the ban of text stops, where that of timestamps stops, and where that of late ones starts.

        Where nothing is banned, text stops at 0, timestamps at 0 at the latest, and late ones start behind the last.
        """
        V, first, begin = rows.V, self.timestamp_begin, self.begin_index
        forbidden = self.no_timestamps_token_id
        if not -V <= forbidden < V:
            raise IndexError(f"no_timestamps_token_id: token id {forbidden} is outside the vocabulary of {V} tokens")
        length = rows.length
        ids = torch.nn.functional.pad(rows.input_ids, (1, 0), value=-1)  # a token of no row, which is no timestamp
        column = torch.arange(ids.shape[1], device=rows.device)
        is_timestamp = (ids >= first) & (column > begin) & (column <= length)
        ends = (rows.last() >= first) & (length > begin)  # [B, 1], as below
        pairs = ends & ((rows.last(2) >= first) | (length == begin + 1))
        opens = ends & ~pairs
        last = (is_timestamp * column).amax(1, keepdim=True)
        # The second timestamp of a pair may repeat the first; later ones may not repeat it again.
        lowest = ids.gather(1, last).long() + ~opens
        is_first = length == begin
        late = V
        if self.max_initial_timestamp_index is not None:
            late = slice(first + self.max_initial_timestamp_index + 1, None).indices(V)[0]
        text_stop = opens * slice(self.eos_token_id).indices(V)[1] + is_first * first
        return torch.cat((text_stop, lowest.maximum(pairs * V), torch.full_like(lowest, V) - is_first * (V - late)), 1)

    def _force_likely(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        first = self.timestamp_begin
        logprobs = torch.log_softmax(scores.float(), -1)
        likely = logprobs[:, first:].logsumexp(-1) > logprobs[:, :first].amax(-1)
        out = scores.clone()
        out[:, :first].masked_fill_(likely.unsqueeze(1), -_INF)
        return out


class WhisperNoSpeechDetection(StagedProcessor, _WhisperNoSpeechDetection):
    """Record the probability of silence at Whisper's first step; the scores don't change.

    ``no_speech_prob`` holds the probabilities ``(B,)``. ``set_model``, ``set_inputs`` and ``set_begin_index`` are those
    of transformers. If the transcription starts before the first step, the model runs once more.

    Args:
        no_speech_token: the token that stands for silence.
        begin_index: number of tokens before the first generated one.
        scores_is_logprobs: whether the scores already are log-probabilities.

    Example:
        >>> detection = WhisperNoSpeechDetection(no_speech_token=1, begin_index=1)
        >>> scores = detection(torch.tensor([[0]]), torch.zeros(1, 4))
        >>> detection.no_speech_prob
        tensor([0.2500])
    """

    def stage(self) -> Observe:
        """A look at the scores of one call."""
        function = partial(WhisperNoSpeechDetection._note, self)
        return Observe(function, self.begin_index, f"note the probability of token {self.no_speech_token}")

    def _note(self, input_ids: torch.Tensor, scores: torch.Tensor) -> None:
        seen, is_logprobs = scores, self.is_scores_logprobs
        if self.start_of_trans_offset > 1:
            with torch.no_grad():
                logits = self.model(**self.inputs).logits
            seen, is_logprobs = logits[:, self.begin_index - self.start_of_trans_offset], False
        probs = seen.exp() if is_logprobs else seen.float().softmax(-1)
        self._no_speech_prob = probs[:, self.no_speech_token]


class BarkEosPrioritizerLogitsProcessor(StagedProcessor, _BarkEosPrioritizer):
    """Allow only the tokens that end the text if one of them is more likely than a threshold.

    Args:
        eos_token_id: the id or ids that end the text, an integer, a list or an integer tensor ``(N,)``.
        min_eos_p: the threshold, a probability above 0; None changes nothing.
        device: device of the scores.

    Raises:
        ValueError: ids that are not integers or are negative; ``min_eos_p`` of 0 or less.

    Example:
        >>> processor = BarkEosPrioritizerLogitsProcessor(eos_token_id=2, min_eos_p=0.4)
        >>> processor(torch.tensor([[0]]), torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
        tensor([[-inf, -inf, 1.],
                [0., 0., 0.]])
    """

    def stage(self) -> Rows:
        """A force in the rows that may end."""
        ids: dict[torch.device, torch.Tensor] = {}
        return Rows(
            "force",
            partial(BarkEosPrioritizerLogitsProcessor._rows, self, ids),
            "nothing" if not self.min_eos_p else f"end the text where its end is likelier than {self.min_eos_p:g}",
            reads_history=False,
        )

    def _rows(
        self, ids: dict[torch.device, torch.Tensor], input_ids: torch.Tensor | None, scores: torch.Tensor
    ) -> torch.Tensor:
        if not self.min_eos_p:
            return scores
        eos = ids.get(scores.device)
        if eos is None:
            # Each once: a token that stands twice would count twice in gradients.
            eos = ids[scores.device] = self.eos_token_id.unique().to(scores.device)
        ends = (scores.float().softmax(-1)[:, eos] > self.min_eos_p).any(1, keepdim=True)
        out = torch.where(ends, -_INF, scores)
        out[:, eos] = scores[:, eos]
        return out


class AlternatingCodebooksLogitsProcessor(StagedProcessor, _AlternatingCodebooks):
    """Allow Bark's two codebooks in turn: the first at even steps, the second at odd steps.

    Args:
        input_start_len: length of the sequence at step 0, an integer of at least 0.
        semantic_vocab_size: number of semantic tokens, which come first in the vocabulary.
        codebook_size: number of tokens of the first codebook, which come next; all others belong to the second.

    Raises:
        ValueError: ``input_start_len`` is not an integer or is negative.

    Example:
        >>> processor = AlternatingCodebooksLogitsProcessor(1, semantic_vocab_size=2, codebook_size=1)
        >>> processor(torch.tensor([[0]]), torch.zeros(1, 5))
        tensor([[-inf, -inf, 0., -inf, -inf]])
        >>> processor(torch.tensor([[0, 2]]), torch.zeros(1, 5))
        tensor([[-inf, -inf, -inf, 0., 0.]])
    """

    def stage(self) -> Several:
        """Two bans, at every other length each."""
        second = self.semantic_vocab_size + self.codebook_size
        first_codebook = tuple(range(self.semantic_vocab_size, second))
        start = self.input_start_len
        return Several(
            (
                Ban(first_codebook, When("length", period=2, phase=start), lenient=True, inverted=True),
                Ban(tuple(range(second)), When("length", period=2, phase=start + 1), lenient=True),
            )
        )


class DiaClassifierFreeGuidanceLogitsProcessor(StagedProcessor, _DiaGuidance):
    """Mix conditional and unconditional logits of one batch, ``[2 * B, V]`` to ``[B, V]``, and keep the best tokens.

    Args:
        guidance_scale: weight of the difference that is added to the conditional logits, above 1.
        guidance_top_k: how many of the best tokens of the mix keep their conditional logits; None returns the mix.

    Raises:
        ValueError: ``guidance_scale`` of 1 or less, ``guidance_top_k`` below 1; on a call, scores that don't have
            twice as many rows as ``input_ids``.

    Example:
        >>> processor = DiaClassifierFreeGuidanceLogitsProcessor(3.0, guidance_top_k=1)
        >>> processor(torch.tensor([[5, 7]]), torch.tensor([[1.0, 2.0], [0.0, 4.0]]))
        tensor([[1., -inf]])
    """

    def stage(self) -> Rows:
        """Two rows become one."""
        function = partial(DiaClassifierFreeGuidanceLogitsProcessor._rows, self)
        kept = "" if self.guidance_top_k is None else f", keep {self.guidance_top_k}"
        return Rows("mix", function, f"conditional and unconditional halves, scale {self.guidance_scale:g}{kept}")

    def _rows(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        conditional, unconditional = split_halves(input_ids, scores)
        mixed: torch.Tensor = (conditional - unconditional).mul_(self.guidance_scale).add_(conditional)
        if self.guidance_top_k is None:
            return mixed
        best = mixed.topk(self.guidance_top_k).indices
        return mixed.fill_(-_INF).scatter_(1, best, conditional.gather(1, best))


class DiaEOSChannelFilterLogitsProcessor(StagedProcessor, _DiaEOSChannelFilter):
    """Let only Dia's first channel end the audio, and force it to where the end is its best token.

    Args:
        num_channels: channels of a sequence, which are neighbouring rows, at least 1.
        eos_token_id: the token that ends the audio, above 0; the special tokens above it are forbidden in all channels.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> processor = DiaEOSChannelFilterLogitsProcessor(num_channels=2, eos_token_id=2)
        >>> processor(torch.tensor([[0], [0]]), torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]]))
        tensor([[-inf, -inf, 2., -inf],
                [0., 1., -inf, -inf]])
    """

    def stage(self) -> Rows:
        """A mask that depends on the row's best token."""
        function = partial(DiaEOSChannelFilterLogitsProcessor._rows, self)
        return Rows(
            "mask",
            function,
            f"token {self.eos_id} in the first of {self.num_channels} channels where it is the best",
            reads_history=False,
        )

    def _rows(self, input_ids: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
        V, eos = scores.shape[-1], self.eos_id
        channels = scores.reshape(-1, self.num_channels, V)
        ends = (channels[:, 0, : eos + 1].argmax(-1) == eos).unsqueeze(1)  # [B, 1]
        out = torch.full_like(channels, -_INF, memory_format=torch.contiguous_format)
        out[:, 1:, :eos] = channels[:, 1:, :eos]
        out[:, 0, :eos] = channels[:, 0, :eos].masked_fill(ends, -_INF)
        out[:, 0, eos : eos + 1] = channels[:, 0, eos : eos + 1].masked_fill(~ends, -_INF)
        return out.view(-1, V)


class DiaEOSDelayPatternLogitsProcessor(StagedProcessor, _DiaEOSDelayPattern):
    """End Dia's channels one after the other, each some steps after the first.

    A countdown starts for each channel when the end of the audio is the first channel's best token, or when the
    maximal length is reached. When a countdown is over, its channel is forced to end. ``active_batches`` and
    ``delay_pattern`` hold the countdowns from call to call, as in transformers: use one object for one run, and don't
    reorder rows. Both are updated in place, so that a captured graph goes on counting.

    Args:
        delay_pattern: the delay of each channel, in steps.
        eos_token_id: the token that ends the audio.
        max_generation_len: length at which all channels have ended.
        device: device of the scores.

    Example:
        >>> processor = DiaEOSDelayPatternLogitsProcessor([0, 1], eos_token_id=1, max_generation_len=9)
        >>> scores = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
        >>> processor(torch.tensor([[0], [0]]), scores)
        tensor([[-inf, 0.],
                [2., 1.]])
        >>> processor(torch.tensor([[0, 1], [0, 0]]), scores)
        tensor([[0., 1.],
                [-inf, 0.]])
    """

    def stage(self) -> Rows:
        """A force in the channels whose countdown is over."""
        function = partial(DiaEOSDelayPatternLogitsProcessor._rows, self)
        return Rows("force", function, f"end {self.num_channels} channels one after the other, each at its delay")

    def _rows(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        V, eos = scores.shape[-1], self.eos_token_id
        channels = scores.reshape(-1, self.num_channels, V)
        state: dict[str, torch.Tensor] = self.__dict__
        if state["active_batches"] is None:
            B = channels.shape[0]
            # Not by assignment, which has the stage asked anew: it doesn't read these two.
            state["delay_pattern"] = state["delay_pattern"].repeat(B, 1)
            state["active_batches"] = torch.zeros(B, device=self.device, dtype=torch.bool)
        active, delays = state["active_batches"], state["delay_pattern"]
        active.logical_or_(channels[:, 0].argmax(-1) == eos)
        if input_ids.shape[1] == self.max_generation_len:
            active.fill_(True)
        forced = active.unsqueeze(1) & (delays == 0)  # [B, C]
        delays.sub_(active.unsqueeze(1).int())
        if forced.is_cpu and not forced.any():
            return scores
        out = channels.masked_fill(forced.unsqueeze(2), -_INF)
        out[:, :, eos].masked_fill_(forced, 0.0)
        return out.reshape(-1, V)
