"""Guidance, beside transformers' own."""

import pytest
import torch
import transformers.generation.logits_process as theirs
from hypothesis import given
from hypothesis import strategies as st

from fastlogits.processors import guidance
from tests.models import VOCAB_SIZE
from tests.processors.twins import bit_equal, compare, draw_ids, draw_scores, few, ours


@few
@given(data=st.data())
def test_batched(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    B, V = draw(st.integers(1, 3)), 33
    calls = [(draw_ids(draw, B, 2, V), draw_scores(draw, 2 * B, V))]
    scale = draw(st.sampled_from([1.5, 3, 7.1]))
    compare("ClassifierFreeGuidanceLogitsProcessor", {"guidance_scale": scale}, calls)


@pytest.mark.parametrize("name", ["ClassifierFreeGuidanceLogitsProcessor", "DiaClassifierFreeGuidanceLogitsProcessor"])
def test_bad_arguments(name):
    with pytest.raises(ValueError, match="guidance"):
        ours(name)(1.0)
    with pytest.raises(ValueError, match="3 rows"):
        ours(name)(2.0)(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(3, 4))


@pytest.mark.parametrize("scale", [1, 1.5, 0.5])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("given_ids", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unbatched(llama, scale, use_cache, given_ids, dtype):
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
