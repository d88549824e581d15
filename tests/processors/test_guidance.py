"""Guidance, beside transformers' own."""

import pytest
import torch
import transformers.generation.logits_process as theirs
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from hypothesis import given
from hypothesis import strategies as st

from fastlogits import (
    FrequencyPenaltyLogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from fastlogits.processors import guidance
from tests.campaign.sanitizer_cases import forced
from tests.models import VOCAB_SIZE
from tests.processors.twins import DEVICE, DTYPES, INF, bit_equal, compare, draw_ids, draw_scores, few, ours


@few
@given(data=st.data())
def test_batched(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    B, V = draw(st.integers(1, 3)), 33
    calls = [(draw_ids(draw, B, 2, V), draw_scores(draw, 2 * B, V))]
    scale = draw(st.sampled_from([1.5, 3, 7.1]))
    compare("ClassifierFreeGuidanceLogitsProcessor", {"guidance_scale": scale}, calls)


def rows_of(B, V, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(2 * B, V, generator=generator) * 3).to(DEVICE, dtype)
    scores[0, :4] = torch.tensor([-INF, INF, float("nan"), 0.0])
    return torch.randint(0, V, (B, 5), generator=generator).to(DEVICE), scores


# Powers of two: dividing, and multiplying by the reciprocal as the kernels do, are then the same.
LISTS = {
    "alone": lambda cfg: [cfg],
    "then a fold": lambda cfg: [cfg, RepetitionPenaltyLogitsProcessor(2.0), TemperatureLogitsWarper(0.5)],
    "then planes": lambda cfg: [cfg, FrequencyPenaltyLogitsProcessor(0.5), SuppressTokensLogitsProcessor([5], DEVICE)],
    "then masks": lambda cfg: [cfg, SuppressTokensLogitsProcessor([5, 6], DEVICE)],
    "behind a fold": lambda cfg: [TemperatureLogitsWarper(2.0), cfg, TemperatureLogitsWarper(0.5)],
    "then truncations": lambda cfg: [cfg, TemperatureLogitsWarper(0.5), TopKLogitsWarper(9), TopPLogitsWarper(0.9)],
}


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", list(LISTS))
def test_in_a_list_with_neighbours(name, strided, dtype):
    """What transformers' object makes of the rows, and then each processor by itself; kernels and torch."""
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        pytest.skip("Triton's interpreter truncates bfloat16")
    B, V = 2, 300
    ids, scores = rows_of(B, V, dtype)
    if strided:
        wide = scores.new_zeros(2 * B, 2 * V)
        wide[:, V:] = scores
        scores = wide[:, V:]
    processors = LISTS[name](guidance.ClassifierFreeGuidanceLogitsProcessor(3.0))
    run = LogitsProcessorList(processors).for_run(prompt_length=2)
    before, wanted = scores.clone(), scores
    for processor in processors:
        if isinstance(processor, guidance.ClassifierFreeGuidanceLogitsProcessor):
            wanted = theirs.ClassifierFreeGuidanceLogitsProcessor(3.0)(ids, wanted)
        else:
            wanted = LogitsProcessorList([processor]).for_run(prompt_length=2)(ids, wanted)
    assert bit_equal(run(ids, scores), wanted)
    if HAS_TRITON:
        with forced(True):
            assert bit_equal(run(ids, scores), wanted)
    assert bit_equal(scores, before)


def test_truncations_join_its_pass():
    guided = LISTS["then truncations"](guidance.ClassifierFreeGuidanceLogitsProcessor(3.0))
    (part,) = LogitsProcessorList(guided).plan.parts
    (plain,) = LogitsProcessorList(guided[1:]).plan.parts
    assert [len(inner.members) for inner in part.inner_parts] == [2, 2]
    assert part.cost() == plain.cost()


def test_gradients():
    ids, scores = rows_of(2, 40, torch.float32)
    scores = scores.nan_to_num(0.0, 3.0, -3.0).requires_grad_()
    processors = LogitsProcessorList(
        [guidance.ClassifierFreeGuidanceLogitsProcessor(3.0), TemperatureLogitsWarper(0.5)]
    )
    processors(ids, scores).sum().backward()
    assert scores.grad[:2].eq(6.0).all()
    assert scores.grad[2:].eq(-4.0).all()


def test_compiled():
    ids, scores = rows_of(2, 40, torch.float32)
    processors = LogitsProcessorList(
        [guidance.ClassifierFreeGuidanceLogitsProcessor(3.0), TemperatureLogitsWarper(0.5)]
    )
    step = torch.compile(lambda ids, scores: processors(ids, scores * 2), fullgraph=True, backend="aot_eager")
    assert bit_equal(step(ids, scores), processors(ids, scores * 2))


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
