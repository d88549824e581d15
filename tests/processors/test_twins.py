"""What the twins of transformers' classes have in common: names, constructors, and no wait for the device."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers.generation.logits_process as theirs

from fastlogits.processors import watermark
from tests.processors.twins import DEVICE, MODULES, bit_equal, needs_gpu, ours


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
