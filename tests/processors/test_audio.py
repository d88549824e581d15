"""The processors of Whisper, Bark and Dia, beside transformers' own."""

from types import SimpleNamespace

import pytest
import torch
import transformers.generation.logits_process as theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlogits.processors import audio
from tests.processors.twins import DEVICE, INF, bit_equal, compare, draw_ids, draw_scores, few


class TestWhisper:
    @settings(deadline=None, max_examples=100)
    @given(data=st.data())
    def test_timestamps(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V, L = draw(st.integers(1, 5)), 24, draw(st.integers(1, 7))
        no_timestamps = draw(st.sampled_from([8, 12, 22]))
        config = SimpleNamespace(
            no_timestamps_token_id=no_timestamps,
            eos_token_id=draw(st.integers(1, no_timestamps)),
            bos_token_id=1,
            max_initial_timestamp_index=draw(st.sampled_from([None, 0, 3, 50])),
        )
        arguments = {
            "generate_config": config,
            "begin_index": draw(st.integers(0, L + 1)),
            "_detect_timestamp_from_logprob": draw(st.sampled_from([None, True, False])),
        }
        ids = torch.randint(no_timestamps - 3, V, (B, L), device=DEVICE)
        compare("WhisperTimeStampLogitsProcessor", arguments, [(ids, draw_scores(draw, B, V))])

    def test_begin_index_may_change(self):
        config = SimpleNamespace(no_timestamps_token_id=4, eos_token_id=3, bos_token_id=1)
        fast = audio.WhisperTimeStampLogitsProcessor(config, 5)
        expecting = theirs.WhisperTimeStampLogitsProcessor(config, 5)
        ids, scores = torch.tensor([[1, 2, 6]]), torch.randn(1, 9)
        assert bit_equal(fast(ids, scores), expecting(ids, scores))
        fast.set_begin_index(3)
        expecting.set_begin_index(3)
        assert bit_equal(fast(ids, scores), expecting(ids, scores))
        assert fast(ids, scores)[0, 0] == -INF

    def test_begin_index_must_be_given(self):
        config = SimpleNamespace(no_timestamps_token_id=4, eos_token_id=3, bos_token_id=1)
        with pytest.raises(ValueError, match="begin_index"):
            audio.WhisperTimeStampLogitsProcessor(config, None)

    @few
    @given(data=st.data())
    def test_no_speech(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V, L = draw(st.integers(1, 3)), 11, 3
        logits = torch.randn(B, 4, V, device=DEVICE)

        class Model:
            def prepare_inputs_for_generation(self, **inputs):
                return inputs

            def forward(self, input_features=None, decoder_input_ids=None):
                return SimpleNamespace(logits=logits)

            __call__ = forward

        arguments = {
            "no_speech_token": draw(st.integers(0, V - 1)),
            "begin_index": draw(st.sampled_from([0, 1, L])),
            "scores_is_logprobs": draw(st.booleans()),
        }
        begin_index = draw(st.sampled_from([L, L, L + 1]))
        results = []
        for cls in (audio.WhisperNoSpeechDetection, theirs.WhisperNoSpeechDetection):
            detection = cls(**arguments)
            detection.set_model(Model())
            detection.set_inputs({"inputs": torch.zeros(B, 2), "decoder_input_ids": torch.zeros(B, 1)})
            detection.set_begin_index(begin_index)
            results.append(detection)
        fast, expecting = results
        ids, scores = draw_ids(draw, B, L, V), draw_scores(draw, B, V)
        assert fast(ids, scores) is scores
        expecting(ids, scores)
        if begin_index == L:
            assert bit_equal(fast.no_speech_prob, expecting.no_speech_prob)
        else:
            assert fast.no_speech_prob == expecting.no_speech_prob == [0.0]


class TestBark:
    @few
    @given(data=st.data())
    def test_bark(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V = draw(st.integers(1, 4)), draw(st.sampled_from([2, 33, 64]))
        eos = draw(st.sampled_from([1, [0, 1], torch.tensor([1, 0], device=DEVICE)]))
        arguments = {"eos_token_id": eos, "min_eos_p": draw(st.sampled_from([None, 0.02, 0.3])), "device": DEVICE}
        compare("BarkEosPrioritizerLogitsProcessor", arguments, [(draw_ids(draw, B, 2, V), draw_scores(draw, B, V))])

    @few
    @given(data=st.data())
    def test_codebooks(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V, L = draw(st.integers(1, 3)), 20, draw(st.integers(1, 4))
        arguments = {
            "input_start_len": draw(st.integers(0, 3)),
            "semantic_vocab_size": draw(st.integers(0, V + 2)),
            "codebook_size": draw(st.integers(0, V)),
        }
        calls = [(draw_ids(draw, B, L + step, V), draw_scores(draw, B, V)) for step in range(2)]
        compare("AlternatingCodebooksLogitsProcessor", arguments, calls)


class TestDia:
    @few
    @given(data=st.data())
    def test_guidance(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V = draw(st.integers(1, 3)), 20
        arguments = {
            "guidance_scale": draw(st.sampled_from([1.5, 3])),
            "guidance_top_k": draw(st.sampled_from([None, 1, 5, V])),
        }
        scores = draw_scores(draw, 2 * B, V)
        compare("DiaClassifierFreeGuidanceLogitsProcessor", arguments, [(draw_ids(draw, B, 2, V), scores)])

    @settings(deadline=None, max_examples=80)
    @given(data=st.data())
    def test_channel_filter(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        channels, V = draw(st.integers(1, 3)), 6
        rows = channels * draw(st.integers(1, 4))
        arguments = {"num_channels": channels, "eos_token_id": draw(st.integers(1, V - 1))}
        calls = [(draw_ids(draw, rows, 2, V), draw_scores(draw, rows, V))]
        compare("DiaEOSChannelFilterLogitsProcessor", arguments, calls)

    @settings(deadline=None, max_examples=80)
    @given(data=st.data())
    def test_delay_pattern(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        delays = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
        rows, V = len(delays) * draw(st.integers(1, 3)), 5
        arguments = {
            "delay_pattern": delays,
            "eos_token_id": draw(st.integers(0, V - 1)),
            "max_generation_len": draw(st.integers(4, 12)),
            "device": DEVICE,
        }
        calls = [(draw_ids(draw, rows, 1 + step, V), draw_scores(draw, rows, V)) for step in range(6)]
        compare("DiaEOSDelayPatternLogitsProcessor", arguments, calls, reads=("active_batches", "delay_pattern"))
