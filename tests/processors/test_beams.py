"""Diverse beams, beside transformers' own."""

import pytest
import torch
import transformers.generation.logits_process as theirs
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlogits.processors import beams
from tests.processors.twins import DEVICE, bit_equal, draw_scores


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
