"""The processors of speech models, guidance, watermarks, constraints and diverse beams, beside transformers' own."""

import copy
import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers.generation.logits_process as theirs
from fastlogits_kernels import synthid
from fastlogits_kernels.runtime import launcher
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlogits.plan.plan import Plan
from fastlogits.plan.stages import Member
from fastlogits.processors import audio, beams, constrained, guidance, watermark
from tests.models import VOCAB_SIZE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = (audio, beams, constrained, guidance, watermark)
INF = float("inf")
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
few = settings(deadline=None, max_examples=40)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


def ours(name):
    return next(getattr(module, name) for module in MODULES if name in vars(module))


def bit_equal(a, b):
    same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isnan(), b.isnan())
    a, b = a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)
    return same and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def close(a, b):
    """Equal but for the order of sums: in probability, since a tournament may take one to almost zero."""
    return a.dtype == b.dtype and torch.allclose(
        a.double().exp(), b.double().exp(), rtol=1e-4, atol=2e-6, equal_nan=True
    )


def draw_scores(draw, B, V, dtype=None, odd=True):
    """Scores in the layouts that callers have; ties, NaN and infinities among them."""
    values = torch.randn(B, V) * draw(st.sampled_from([0.5, 3.0, 20.0]))
    if draw(st.booleans()):
        values = values.round()
    if odd and draw(st.booleans()):
        for value in (float("nan"), INF, -INF, -INF, -0.0):
            values[draw(st.integers(0, B - 1)), draw(st.integers(0, V - 1))] = value
    if odd and draw(st.integers(0, 5)) == 0:
        values[draw(st.integers(0, B - 1))] = -INF
    values = values.to(DEVICE, dtype or draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["plain", "last position", "sliced", "column-major"]))
    if layout == "plain":
        return values
    if layout == "column-major":
        return values.T.contiguous().T
    wide = values.new_zeros(B, 3 * V + 5)
    start = 2 * V if layout == "last position" else 5
    wide[:, start : start + V] = values
    return wide[:, start : start + V]


def draw_ids(draw, B, L, high):
    dtype = draw(st.sampled_from([torch.int64, torch.int64, torch.int32]))
    return torch.randint(0, high, (B, 2 * L), dtype=dtype, device=DEVICE)[:, ::2]


def compare(name, arguments, calls, equal=bit_equal, reads=()):
    """Call both classes, and the fast stage of transformers' own object, step by step."""
    cls = ours(name)
    expecting = getattr(theirs, name)(**copy.deepcopy(arguments))
    fast = cls(**copy.deepcopy(arguments))
    twin = getattr(theirs, name)(**copy.deepcopy(arguments))
    functions = {fast: fast, twin: Plan.compile([Member(name, cls.stage(twin))])}
    for ids, scores in calls:
        # Two of transformers' classes write what they are given.
        expected = expecting(ids.clone(), scores.clone())
        for processor, function in functions.items():
            seen_ids, seen = ids.clone(), scores.clone()
            result = function(ids, scores)
            assert equal(result, expected), (name, result, expected)
            assert bit_equal(scores, seen)
            assert torch.equal(ids, seen_ids)
            for attribute in reads:
                a, b = getattr(processor, attribute), getattr(expecting, attribute)
                assert bit_equal(a, b) if isinstance(a, torch.Tensor) else a == b


class TestAudio:
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

    @few
    @given(data=st.data())
    def test_dia_guidance(self, data):
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
    def test_dia_channel_filter(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        channels, V = draw(st.integers(1, 3)), 6
        rows = channels * draw(st.integers(1, 4))
        arguments = {"num_channels": channels, "eos_token_id": draw(st.integers(1, V - 1))}
        calls = [(draw_ids(draw, rows, 2, V), draw_scores(draw, rows, V))]
        compare("DiaEOSChannelFilterLogitsProcessor", arguments, calls)

    @settings(deadline=None, max_examples=80)
    @given(data=st.data())
    def test_dia_delay_pattern(self, data):
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


class TestGuidance:
    @few
    @given(data=st.data())
    def test_batched(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V = draw(st.integers(1, 3)), 33
        calls = [(draw_ids(draw, B, 2, V), draw_scores(draw, 2 * B, V))]
        scale = draw(st.sampled_from([1.5, 3, 7.1]))
        compare("ClassifierFreeGuidanceLogitsProcessor", {"guidance_scale": scale}, calls)

    @pytest.mark.parametrize(
        "name", ["ClassifierFreeGuidanceLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor"]
    )
    def test_bad_arguments(self, name):
        with pytest.raises(ValueError, match="guidance"):
            ours(name)(1.0)
        with pytest.raises(ValueError, match="3 rows"):
            ours(name)(2.0)(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 4))

    @pytest.mark.parametrize("scale", [1, 1.5, 0.5])
    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("given_ids", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_unbatched(self, llama, scale, use_cache, given_ids, dtype):
        torch.manual_seed(0)
        unconditional = torch.tensor([[4, 5, 6], [7, 8, 9]]) if given_ids else None
        made = [
            cls(scale, llama, unconditional, use_cache=use_cache)
            for cls in (
                guidance.UnbatchedClassifierFreeGuidanceLogitsProcessor,
                theirs.UnbatchedClassifierFreeGuidanceLogitsProcessor,
            )
        ]
        ids = torch.randint(3, VOCAB_SIZE, (2, 4))
        with torch.no_grad():
            for _ in range(3):
                scores = torch.randn(2, VOCAB_SIZE).to(dtype)
                before = scores.clone()
                fast, expected = (processor(ids, scores) for processor in made)
                assert bit_equal(fast, expected)
                assert bit_equal(scores, before)
                ids = torch.cat((ids, expected.argmax(-1, keepdim=True)), 1)


class TestConstrained:
    @settings(deadline=None, max_examples=80)
    @given(data=st.data())
    def test_prefixes(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        batch, num_beams, V = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 12
        forms = {
            "list": lambda ids: ids,
            "tensor": lambda ids: torch.tensor(ids),
            "on device": lambda ids: torch.tensor(ids, device=DEVICE),
            "bool": lambda ids: torch.zeros(V, dtype=torch.bool).index_fill(0, torch.tensor(ids), True),
        }
        form = draw(st.sampled_from(list(forms)))
        count = draw(st.sampled_from([1, 3, V]))

        def allowed(batch_id, sent):
            assert sent.ndim == 1
            assert sent.device.type == DEVICE
            ids = [(int(sent[-1]) * 7 + batch_id + i) % V for i in range(count)]
            return forms[form](ids if form == "bool" else [*ids[:-1], ids[-1] - V])

        calls = []
        for step in range(2):
            scores = draw_scores(draw, batch * num_beams, V)
            if draw(st.booleans()):
                scores[: draw(st.integers(1, batch)) * num_beams] = -INF
            calls.append((draw_ids(draw, batch * num_beams, 2 + step, V), scores))
        arguments = {"prefix_allowed_tokens_fn": allowed, "num_beams": num_beams}
        compare("PrefixConstrainedLogitsProcessor", arguments, calls)

    def test_nothing_allowed(self):
        processor = constrained.PrefixConstrainedLogitsProcessor(lambda batch_id, sent: [], 1)
        with pytest.raises(ValueError, match="prefix_allowed_tokens_fn"):
            processor(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 4))

    def test_packed_rows_are_the_rows_one_by_one(self):
        """What CUDA scores take, whose rows aren't written one by one."""
        lists = [[3], [0, -1, 2], [True, False, False, True]]
        expected, packed = torch.zeros(3, 4), torch.zeros(3, 4)
        for row, ids in zip(expected, lists, strict=True):
            row[ids] = 1
        index = constrained._index([constrained._as_ids(ids) for ids in lists], packed.device)
        packed[index] = 1
        assert torch.equal(packed, expected)


@pytest.mark.skipif("HammingDiversityLogitsProcessor" not in beams.__all__, reason="gone from transformers 5")
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_diverse_beams(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    batch, num_beams, V = draw(st.integers(1, 3)), draw(st.integers(2, 6)), 9
    groups = draw(st.integers(2, num_beams))
    arguments = {"diversity_penalty": 0.7, "num_beams": num_beams, "num_beam_groups": groups}
    fast = beams.HammingDiversityLogitsProcessor(**arguments)
    expecting = theirs.HammingDiversityLogitsProcessor(**arguments)
    group = draw(st.integers(0, groups - 1))
    start = group * (num_beams // groups)
    size = min(start + num_beams // groups, num_beams) - start
    scores = draw_scores(draw, batch * size, V)
    ids = torch.zeros(batch * size, 3, dtype=torch.int64, device=DEVICE)
    chosen = torch.randint(0, V, (batch * num_beams,), device=DEVICE)
    before = scores.clone()
    assert bit_equal(fast(ids, scores, chosen, group), expecting(ids, scores, chosen, group))
    assert bit_equal(scores, before)


class TestWatermark:
    @pytest.fixture(autouse=True)
    def _quiet(self, caplog):
        """Sequences shorter than the context are warned of at each call."""
        for module in (theirs, watermark):
            caplog.set_level(logging.ERROR, module.__name__)

    @settings(deadline=None, max_examples=30)
    @given(data=st.data())
    def test_green_lists(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V = draw(st.integers(1, 3)), draw(st.sampled_from([40, 41, 97]))
        arguments = {
            "vocab_size": V - draw(st.sampled_from([0, 0, 7])),
            "device": DEVICE,
            "greenlist_ratio": draw(st.sampled_from([0.5, 0.9])),  # transformers fails where no candidate is green
            "bias": draw(st.sampled_from([2.0, 0.3, -1.0])),
            "hashing_key": draw(st.sampled_from([15485863, 7, 2**40])),
            "seeding_scheme": draw(st.sampled_from(["lefthash", "selfhash"])),
            "context_width": draw(st.integers(1, 4)),
        }
        alphabet = draw(st.sampled_from([2, V]))  # contexts come again, or don't
        calls = [(draw_ids(draw, B, 1 + step, alphabet), draw_scores(draw, B, V)) for step in range(4)]
        compare("WatermarkLogitsProcessor", arguments, calls)

    @pytest.mark.parametrize("scheme", ["lefthash", "selfhash"])
    def test_memory_of_lists_is_bounded_and_used(self, scheme, monkeypatch):
        monkeypatch.setattr(watermark, "_KEPT_BYTES", 4 * 50 * 2)
        monkeypatch.setattr(watermark, "_KEPT_VERDICTS", 60)
        draws = []
        monkeypatch.setattr(
            watermark, "_draw", lambda *arguments, _draw=watermark._draw: draws.append(1) or _draw(*arguments)
        )
        processor = watermark.WatermarkLogitsProcessor(50, DEVICE, seeding_scheme=scheme)
        expecting = theirs.WatermarkLogitsProcessor(50, DEVICE, seeding_scheme=scheme)
        torch.manual_seed(0)
        scores = torch.randn(3, 50, device=DEVICE)
        for token in (1, 1, 2, 3, 1):
            ids = torch.tensor([[0, token], [0, token + 1], [0, token]], device=DEVICE)
            assert bit_equal(processor(ids, scores), expecting(ids, scores))
        ids = torch.tensor([[0, 1]], device=DEVICE)
        processor(ids, scores[:1])
        count = len(draws)
        processor(ids, scores[:1])
        assert len(draws) == count
        function = processor.stage().function
        function(torch.arange(30, device=DEVICE).reshape(-1, 1), torch.randn(30, 50, device=DEVICE))
        assert len(function.args[1]._drawn) <= {"lefthash": 2, "selfhash": 60}[scheme]

    def test_no_candidate_is_green(self):
        processor = watermark.WatermarkLogitsProcessor(50, DEVICE, greenlist_ratio=0.01, seeding_scheme="selfhash")
        scores = torch.randn(2, 50, device=DEVICE)
        assert torch.equal(processor(torch.ones(2, 3, dtype=torch.int64, device=DEVICE), scores), scores)

    def test_errors(self):
        with pytest.raises(ValueError, match="seeding_scheme"):
            watermark.WatermarkLogitsProcessor(50, DEVICE, seeding_scheme="other")
        with pytest.raises(ValueError, match="greenlist_ratio"):
            watermark.WatermarkLogitsProcessor(50, DEVICE, greenlist_ratio=1.0)
        ids = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
        with pytest.raises(IndexError, match="vocab_size"):
            watermark.WatermarkLogitsProcessor(50, DEVICE)(ids, torch.zeros(1, 40, device=DEVICE))


def synthid_arguments(draw):
    return {
        "ngram_len": draw(st.integers(2, 5)),
        "keys": draw(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=8)),
        "sampling_table_size": draw(st.sampled_from([1, 16, 1000, 65536, 1001])),
        "sampling_table_seed": draw(st.integers(0, 5)),
        "context_history_size": draw(st.sampled_from([1, 4])),
        "device": torch.device(DEVICE),
        "skip_first_ngram_calls": draw(st.booleans()),
        "debug_mode": draw(st.integers(0, 4)) == 0,
    }


class TestSynthID:
    @settings(deadline=None, max_examples=30)
    @given(data=st.data())
    def test_tournament(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 64, 301]))
        arguments = synthid_arguments(draw)
        # Two tokens, so that contexts come again.
        calls = [(draw_ids(draw, B, 1 + step, 2), draw_scores(draw, B, V)) for step in range(5)]
        if DEVICE == "cpu":
            compare("SynthIDTextWatermarkLogitsProcessor", arguments, calls)
        else:
            calls = [(ids, scores.clamp(-20, 20)) for ids, scores in calls]
            compare("SynthIDTextWatermarkLogitsProcessor", arguments, calls, close)

    def test_state_is_that_of_transformers(self):
        arguments = {"ngram_len": 4, "keys": [3, 4], "sampling_table_size": 16, "sampling_table_seed": 0}
        arguments |= {"context_history_size": 3, "device": torch.device(DEVICE)}
        fast = watermark.SynthIDTextWatermarkLogitsProcessor(**arguments)
        expecting = theirs.SynthIDTextWatermarkLogitsProcessor(**arguments)
        ids = torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
        for step in range(6):
            ids = torch.cat((ids, torch.randint(0, 50, (2, 1), device=DEVICE)), 1)
            for processor in (fast, expecting):
                processor(ids, torch.zeros(2, 9, device=DEVICE))
            assert fast.state.num_calls == expecting.state.num_calls == step + 1
            assert torch.equal(fast.state.context, expecting.state.context)
            assert torch.equal(fast.state.context_history, expecting.state.context_history)
        assert torch.equal(fast.compute_g_values(ids), expecting.compute_g_values(ids))
        fast.state = None
        fast(ids[:1], torch.zeros(1, 9, device=DEVICE))
        assert fast.state.num_calls == 1

    def test_ids_must_have_two_dimensions(self):
        arguments = {"ngram_len": 4, "keys": [3, 4], "sampling_table_size": 16, "sampling_table_seed": 0}
        arguments |= {"context_history_size": 3, "device": torch.device(DEVICE)}
        processor = watermark.SynthIDTextWatermarkLogitsProcessor(**arguments)
        with pytest.raises(ValueError, match="shape"):
            processor.stage().function(torch.zeros(3, device=DEVICE), torch.zeros(1, 9, device=DEVICE))


MULTIPLIER = watermark._MULTIPLIER**2


@pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")
class TestSynthIDKernel:
    @settings(deadline=None, max_examples=20)
    @given(data=st.data())
    def test_is_the_reference(self, data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 10**6)))
        B, V = draw(st.integers(1, 3)), draw(st.sampled_from([2, 40, 2048, 2049, 6500]))
        D, N = draw(st.integers(1, 8)), draw(st.sampled_from([1, 64, 4096, 1000]))
        table = torch.randint(0, 2, (N,), device=DEVICE)
        offsets = torch.randint(-(2**62), 2**62, (B, D), device=DEVICE)
        skip = torch.rand(B, 1, device=DEVICE) < 0.3
        scores = draw_scores(draw, B, V, torch.float32, odd=False)
        multiplier = watermark._wrapped(MULTIPLIER)
        if not N & (N - 1) and draw(st.booleans()):
            table, inverse = synthid.bit_table(table, MULTIPLIER, V)
            offsets, multiplier = offsets * inverse & (N - 1), 1
        arguments = scores, table.to(torch.uint8), offsets, skip, multiplier
        result, expected = synthid.launch_synthid(*arguments), synthid.reference_synthid(*arguments)
        assert bit_equal(result[skip[:, 0]], scores[skip[:, 0]].contiguous())
        assert close(result[~skip[:, 0]], expected[~skip[:, 0]])

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    @pytest.mark.parametrize("value", [-INF, INF, float("nan")])
    def test_rows_without_probabilities(self, value):
        scores = torch.zeros(3, 3000, device=DEVICE)
        scores[0] = value
        scores[1, 2500] = value
        table, inverse = synthid.bit_table(torch.tensor([0, 1, 1, 0], device=DEVICE), MULTIPLIER, 3000)
        offsets = torch.tensor([[0, 1, 2, 3]] * 3, device=DEVICE) * inverse & 3
        arguments = scores, table, offsets, torch.zeros(3, 1, dtype=torch.bool, device=DEVICE), 1
        result, expected = synthid.launch_synthid(*arguments), synthid.reference_synthid(*arguments)
        assert not result.isnan().any()
        assert torch.equal(result == torch.finfo(torch.float32).min, expected == torch.finfo(torch.float32).min)
        assert close(result, expected)

    def test_bits_are_a_window(self):
        """Also where the window wraps around a table that is smaller than the vocabulary."""
        N, V = 32, 77
        table = torch.randint(0, 2, (N,))
        windowed, inverse = synthid.bit_table(table, MULTIPLIER, V)
        for offset in (-(2**61) - 5, 0, 12345):
            index = [(token * MULTIPLIER + offset) % N for token in range(V)]
            start = offset * inverse % N
            assert torch.equal(windowed[start : start + V].long(), table[index])

    def test_registered_operation(self):
        scores, table = torch.randn(2, 50, device=DEVICE), torch.randint(0, 2, (7,), device=DEVICE).to(torch.uint8)
        offsets = torch.randint(0, 99, (2, 3), device=DEVICE)
        arguments = scores, table, offsets, torch.zeros(2, 1, dtype=torch.bool, device=DEVICE), 5
        torch.library.opcheck(torch.ops.fastlogits.synthid, arguments)
        compiled = torch.compile(synthid.synthid, backend="eager", fullgraph=True)
        assert torch.equal(compiled(*arguments), synthid.synthid(*arguments))


def device_cases(B, V):
    """What can be captured: name, arguments, rows of scores to each row of ids."""
    config = SimpleNamespace(no_timestamps_token_id=V // 2, eos_token_id=V // 3, bos_token_id=1)
    keys = {"ngram_len": 5, "keys": [3, 1, 4, 1, 5, 9, 2], "sampling_table_seed": 0, "context_history_size": 8}
    return [
        ("WhisperTimeStampLogitsProcessor", {"generate_config": config, "begin_index": 2}, 1),
        ("BarkEosPrioritizerLogitsProcessor", {"eos_token_id": [3], "min_eos_p": 1e-3}, 1),
        (
            "AlternatingCodebooksLogitsProcessor",
            {"input_start_len": 1, "semantic_vocab_size": V // 4, "codebook_size": V // 4},
            1,
        ),
        ("DiaClassifierFreeGuidanceLogitsProcessor", {"guidance_scale": 2.0, "guidance_top_k": 7}, 2),
        ("DiaEOSChannelFilterLogitsProcessor", {"num_channels": 2, "eos_token_id": V - 4}, 1),
        (
            "DiaEOSDelayPatternLogitsProcessor",
            {"delay_pattern": [0, 2], "eos_token_id": 3, "max_generation_len": 99, "device": "cuda"},
            1,
        ),
        ("ClassifierFreeGuidanceLogitsProcessor", {"guidance_scale": 2.0}, 2),
        *(
            ("SynthIDTextWatermarkLogitsProcessor", keys | {"sampling_table_size": size, "device": DEVICE}, 1)
            for size in (65536, 1000)
        ),
    ]


@needs_gpu
@pytest.mark.parametrize("case", range(9))
def test_waits_for_nothing_and_is_captured(case):
    B, V = 4, 5000
    name, arguments, factor = device_cases(B, V)[case]
    torch.manual_seed(0)
    ids = torch.randint(0, V, (B, 6), device="cuda")
    steps = [torch.randn(factor * B, V, device="cuda") * 3 for _ in range(4)]
    eager, captured = ours(name)(**arguments), ours(name)(**arguments)
    expected = [eager(ids, scores) for scores in steps]
    scores = steps[0].clone()
    captured(ids, scores)  # makes its tables
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = captured(ids, steps[1])
        assert result.shape == expected[1].shape
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bit_equal(result, expected[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = captured(ids, scores)
    for step in (2, 3):
        scores.copy_(steps[step])
        graph.replay()
        assert bit_equal(result, expected[step])


def test_names_and_constructors_are_those_of_transformers():
    for module in MODULES:
        for name, cls in vars(module).items():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and hasattr(theirs, name):
                assert issubclass(cls, getattr(theirs, name))
                assert inspect.signature(cls) == inspect.signature(getattr(theirs, name))
    assert watermark.SynthIDTextWatermarkState is theirs.SynthIDTextWatermarkState
