"""Gradients with respect to the scores: through every processor, alone, in place, in a list, compiled."""

import pytest
import torch
import transformers.generation.logits_process as reference
from fastlogits_kernels.pointwise import fold as fold_kernels
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.selection import launch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastlogits as fl
from benchmarks.catalogue import _EXTRAS, _tokenizer
from tests import entries

V, START = 41, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = {name: (lambda make=make: make(_tokenizer())) for name, make in _EXTRAS.items()}
OURS |= {
    "blank": lambda: fl.SuppressFirstTokens([1, 2], 2, blank=[3]),
    "many bans": lambda: fl.SuppressFirstTokens(range(35), 9),
    "prompt": lambda: fl.OnlyTokensFrom("prompt", eos_token_id=2),
    "rows of top-p": lambda: fl.TopPLogitsWarper(torch.tensor([0.5, 0.9], device=DEVICE)),
    "rows of top-k": lambda: fl.TopKLogitsWarper(torch.tensor([3, 9], device=DEVICE)),
    "selfhash": lambda: fl.WatermarkLogitsProcessor(V, DEVICE, seeding_scheme="selfhash", context_width=2),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Kernels have no derivative: what has a gradient goes another way."""
    for module in (fold_kernels, launch):
        monkeypatch.setattr(module, "FORCE_KERNEL", HAS_TRITON)


def finite(processed):
    """The scores that something is learned from: bans have none to give."""
    return torch.where(processed.isfinite(), processed, 0.0)


def gradient(process, scores):
    """Of a weighted sum, with respect to the scores; through a product, since a leaf is not written in place."""
    leaf = scores.clone().requires_grad_()
    processed = process(leaf * 1.0)
    weights = torch.arange(1.0, processed.numel() + 1, dtype=processed.dtype, device=scores.device)
    (finite(processed) * weights.view_as(processed)).sum().backward()
    return processed.detach(), leaf.grad


def given_rows(device, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, V, generator=generator, dtype=dtype) * 2
    ids = torch.randint(0, 6, (2, 8), generator=generator)
    return ids.to(device), scores.to(device)


WAYS = {
    "alone": lambda make: make().for_run(START),
    "in place": lambda make: make().for_run(START).apply_,
    "in a list": lambda make: fl.LogitsProcessorList(
        [
            fl.TemperatureLogitsWarper(0.7),
            fl.PresencePenaltyLogitsProcessor(0.5),
            make(),
            fl.RepetitionPenaltyLogitsProcessor(1.3),
        ]
    ).for_run(START),
    "in a list, in place": lambda make: fl.LogitsProcessorList(
        [make(), fl.InfNanRemoveLogitsProcessor(), fl.FrequencyPenaltyLogitsProcessor(0.5), fl.TopKLogitsWarper(30)]
    ).for_run(START).apply_,
}  # fmt: skip


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("name", list(OURS))
def test_of_processors_that_transformers_lacks(name, way, device):
    """Against finite differences, in float64."""
    ids, scores = given_rows(device)
    scores = scores.requires_grad_()
    process = lambda x: finite(WAYS[way](OURS[name])(ids, x * 1.0))  # noqa: E731
    assert torch.autograd.gradcheck(process, (scores,), fast_mode=True)


@pytest.mark.parametrize("way", ["alone", "in place", "behind another"])
@pytest.mark.parametrize("name", entries.kinds(lambda entry: entry.rows == 1))
@settings(deadline=None, max_examples=3, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_of_transformers_processors(name, way, device, data):
    """The gradient is that of transformers' class, where no token of a row, and no end, stands twice."""
    arguments = entries.ENTRIES[name].draw(data.draw, entries.Case(2, V, 8, device))
    ends = arguments.get("eos_token_id")
    ends = ends.tolist() if isinstance(ends, torch.Tensor) else ends
    assume(not isinstance(ends, list) or len(set(ends)) == len(ends))
    _, scores = given_rows(device, data.draw(st.integers(0, 99)), torch.float32)
    ids = torch.stack([torch.randperm(V)[:8] for _ in range(2)]).to(device)
    if name == "EncoderRepetitionPenaltyLogitsProcessor":
        arguments["encoder_input_ids"] = ids
    before = reference.TemperatureLogitsWarper(0.5)

    def theirs(x):
        x = before(ids, x) if way == "behind another" else x
        return entries.build(reference, name, arguments)(ids, x.clone())

    def ours(x):
        processor = entries.build(fl, name, arguments)
        if way == "behind another":
            return fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), processor])(ids, x)
        return (processor.apply_ if way == "in place" else processor)(ids, x)

    try:
        expected = gradient(theirs, scores)
    except (RuntimeError, TypeError, IndexError):  # nothing of the result depends on the scores, or it takes no such
        return
    processed, found = gradient(ours, scores)
    # Where rounding at a cut-off keeps another token, its gradient is kept too.
    same = (processed.isfinite() == expected[0].isfinite()).all(1)
    assert torch.allclose(found[same], expected[1][same], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", ["RepetitionPenaltyLogitsProcessor", "EncoderRepetitionPenaltyLogitsProcessor"])
def test_a_token_that_occurs_twice_counts_once(name, device):
    """transformers' own has the derivative of such a token doubled: it writes the score once for each occurrence."""
    ids, scores = given_rows(device)
    make = getattr(fl, name)
    processor = make(1.5, ids) if name.startswith("Encoder") else make(1.5)
    assert torch.autograd.gradcheck(lambda x: processor(ids, x), (scores.requires_grad_(),), fast_mode=True)


def test_encoder_ngrams_in_shapes_that_a_plan_does_not_take(device):
    """transformers' own call, which looks its n-grams up."""
    ids, scores = torch.tensor([[1, 2, 3]], device=device), torch.randn(1, 5, device=device)
    ours, theirs = (module.EncoderNoRepeatNGramLogitsProcessor(2, ids) for module in (fl, reference))
    text = torch.tensor([[0, 1]], device=device)
    assert list(ours.generated_ngrams) == theirs.generated_ngrams
    assert torch.equal(reference.EncoderNoRepeatNGramLogitsProcessor.__call__(ours, text, scores), theirs(text, scores))


@pytest.mark.parametrize("name", ["PresencePenaltyLogitsProcessor", "rows of top-p"])
def test_compiled(name, device):
    ids, scores = given_rows(device, dtype=torch.float32)
    torch._dynamo.reset()
    run = fl.LogitsProcessorList([fl.RepetitionPenaltyLogitsProcessor(1.3), OURS[name]()]).for_run(START)
    compiled = torch.compile(lambda x: run(ids, x), backend="aot_eager")
    expected, found = gradient(lambda x: run(ids, x), scores), gradient(compiled, scores)
    assert all(map(torch.equal, expected, found))
    torch._dynamo.reset()


def test_without_a_gradient_asked_for(device):
    """Parameters that could have one don't make a list go another way inside ``no_grad``."""
    ids, scores = given_rows(device, dtype=torch.float32)
    run = fl.LogitsProcessorList([fl.PresencePenaltyLogitsProcessor(0.5)]).for_run(START)
    with torch.no_grad():
        processed = run(ids, scores.clone().requires_grad_())
    assert torch.equal(processed, run(ids, scores))
    assert not processed.requires_grad


def test_a_leaf_is_not_written_in_place(device):
    ids, scores = given_rows(device)
    run = fl.LogitsProcessorList([fl.PresencePenaltyLogitsProcessor(0.5)]).for_run(START)
    with pytest.raises(RuntimeError, match="leaf"):
        run.apply_(ids, scores.requires_grad_())


@pytest.mark.parametrize("size", [64, 65])
def test_of_a_tournament(size, device):
    """SynthID's, with a table whose size is a power of two and another."""
    ids, scores = given_rows(device)

    def process(x):
        processor = fl.SynthIDTextWatermarkLogitsProcessor(
            3, [7, 8, 9, 11], size, sampling_table_seed=0, context_history_size=2, device=torch.device(device)
        )
        processor(ids[:, :5], x.detach())
        return processor(ids[:, :6], x)

    assert torch.autograd.gradcheck(process, (scores.requires_grad_(),), fast_mode=True)
