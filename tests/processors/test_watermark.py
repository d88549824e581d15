"""Watermarks, beside transformers' own; and the kernel of SynthID."""

import logging

import pytest
import torch
import transformers.generation.logits_process as theirs
from fastlogits_kernels import synthid
from fastlogits_kernels.runtime import launcher
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlogits.processors import watermark
from tests.processors.twins import DEVICE, INF, bit_equal, close, compare, draw_ids, draw_scores


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
