"""How things are shown, and that parts and sums of a list stay lists that run as one plan."""

import operator

import pytest
import torch

import fastlogits as fl

WARPERS = [fl.TemperatureLogitsWarper(0.7), fl.TopKLogitsWarper(5), fl.SuppressFirstTokens([1, 2])]


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (lambda: WARPERS[0], "<TemperatureLogitsWarper: divide by 0.7>"),
        (lambda: WARPERS[2], "<SuppressFirstTokens: ban 2 tokens while step < 1>"),
        (lambda: fl.LogitsProcessorList(WARPERS[1:2]), "LogitsProcessorList([<TopKLogitsWarper: top-k 5>])"),
        (lambda: fl.LogitsProcessorList(WARPERS).for_run(prompt_length=3), ", SuppressFirstTokens, of one run>"),
        (lambda: fl.RequestParams(), "RequestParams()"),
        (lambda: fl.RequestParams(top_k=3, seed=1), "RequestParams(top_k=3, seed=1)"),
        (lambda: fl.SamplingParams(top_p=torch.ones(2)), "SamplingParams(top_p=<float32 (2,)>)"),
        (lambda: fl.Sampler(top_k=3, logprobs="raw"), "Sampler(top_k=3, logprobs='raw')"),
        (lambda: fl.Sampler(WARPERS[1:2]), "Sampler(processors=[<TopKLogitsWarper: top-k 5>])"),
        (lambda: fl.BatchProcessor(2, 10, "cpu", max_length=8), "0 of 2 requests, vocab_size=10, device=cpu"),
    ],
)  # fmt: skip
def test_what_is_shown(made, shown):
    assert shown in repr(made())


def test_a_repr_never_raises():
    class Unfinished(fl.StagedProcessor):
        def stage(self):
            raise ValueError("not yet")

    assert repr(Unfinished()) == "<Unfinished>"


def test_every_processor_says_what_it_does():
    from tests.entries import ENTRIES

    assert len(ENTRIES) > 30
    for name in ENTRIES:
        assert getattr(fl, name).__repr__ is not object.__repr__


def test_parts_and_sums_are_lists_of_ours():
    processors = fl.LogitsProcessorList(WARPERS)
    made = {
        "a part": (processors[:2], WARPERS[:2]),
        "a sum": (operator.add(processors, WARPERS[:1]), [*WARPERS, WARPERS[0]]),
        "a sum from the right": (operator.add(WARPERS[:1], processors), [WARPERS[0], *WARPERS]),
        "twice": (processors * 2, WARPERS * 2),
        "a copy": (processors.copy(), WARPERS),
    }
    for name, (found, wanted) in made.items():
        assert type(found) is fl.LogitsProcessorList, name
        assert list(found) == wanted, name
    assert processors[1] is WARPERS[1]
    ids, scores = torch.tensor([[4, 5]]), torch.randn(1, 20)
    both = operator.add(processors[:1], processors[1:])
    assert torch.equal(both(ids, scores, prompt_length=2), processors(ids, scores, prompt_length=2))
    with pytest.raises(TypeError):
        operator.add(processors, 3)


def test_a_part_of_a_run_is_a_plain_list(llama):
    kept = []

    def keep(model, input_ids, logits_processor, *args, **kwargs):
        kept.append(logits_processor)
        return input_ids

    ids = torch.tensor([[5, 6, 7]])
    with fl.accelerate(llama):
        llama.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=keep, repetition_penalty=1.3)
    assert type(kept[0][:]) is fl.LogitsProcessorList
