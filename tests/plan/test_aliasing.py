"""What a processor writes in place: never the tensor that the caller gave, unless the caller asked for that."""

import pytest
import torch
import transformers
from fastlogits_kernels.selection import launch
from transformers import LogitsProcessor

import fastlogits as fl
from fastlogits.plan.part import apart

V, INF = 64, float("inf")
IDS = torch.tensor([[5, 6, 5, 6], [9, 8, 7, 9]])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def given():
    return torch.randn(2, V, generator=torch.Generator().manual_seed(3)).to(DEVICE)


class InPlace(LogitsProcessor):
    """Writes what it is given and returns it, as most published processors do."""

    def __init__(self):
        self.got = []

    def __call__(self, input_ids, scores):
        self.got.append(scores.data_ptr())
        scores[:, 10:] = -INF
        return scores


class InPlaceOfAView(InPlace):
    def __call__(self, input_ids, scores):
        return super().__call__(input_ids, scores)[:]


class InPlaceWithArguments(InPlace):
    def __call__(self, input_ids, scores, factor):
        return super().__call__(input_ids, scores).mul_(factor)


class Looks(LogitsProcessor):
    """Gives back what it is given, or a view of it."""

    def __init__(self, how):
        self.how = how

    def __call__(self, input_ids, scores):
        return self.how(scores)


NOTHING_TO_DO = {
    "nothing": list,
    "a mask that is over": lambda: [fl.MinLengthLogitsProcessor(1, 2, DEVICE)],
    "no tokens": lambda: [fl.SuppressTokensLogitsProcessor([], DEVICE)],
    "no n-grams yet": lambda: [fl.NoRepeatNGramLogitsProcessor(9)],
    "no such words": lambda: [fl.NoBadWordsLogitsProcessor([[60, 61, 62]])],
    "a first step that is over": lambda: [fl.SuppressFirstTokens([1]).for_run(prompt_length=2)],
    "two of them": lambda: [fl.MinLengthLogitsProcessor(1, 2, DEVICE), fl.ForcedEOSTokenLogitsProcessor(99, 2, DEVICE)],
    "a look": lambda: [Looks(lambda scores: scores)],
    "a view": lambda: [Looks(lambda scores: scores[:])],
    "a part": lambda: [Looks(lambda scores: scores.view(1, 2, V)[0])],
    "transformers' own": lambda: [transformers.MinLengthLogitsProcessor(1, 2, DEVICE)],
}
WRITERS = [InPlace, InPlaceOfAView]


def by_call(processors, scores):
    return fl.LogitsProcessorList(processors)(IDS.to(DEVICE), scores)


def by_run(processors, scores):
    return fl.LogitsProcessorList(processors).for_run(prompt_length=4)(IDS.to(DEVICE), scores)


def by_trace(processors, scores):
    return fl.trace(processors, IDS.to(DEVICE), scores).scores


def by_check(processors, scores):
    fl.check(processors, IDS.to(DEVICE), scores)
    return by_call(processors, scores)


def by_originals(processors, scores):
    """Scores that have gradients go through transformers' own implementations."""
    scores.requires_grad_()
    found = by_call(processors, scores)
    scores.requires_grad_(False)
    return found.detach()


def in_a_list_of_transformers(processors, scores):
    """As generate runs what our list hands to it."""
    default_list = []
    made = list(fl.LogitsProcessorList(processors)._for_generate({"default_list": default_list}))
    if not isinstance(made[0], fl.processors.base.RunProcessor):
        return by_call(processors, scores)  # a processor that comes first is generate's own matter
    return transformers.LogitsProcessorList(made)(IDS.to(DEVICE), scores)


WAYS = [by_call, by_run, by_trace, by_check, by_originals, in_a_list_of_transformers]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("front", NOTHING_TO_DO)
def test_the_callers_scores_stay_as_they_are(front, way, writer):
    scores = given()
    found = way([*NOTHING_TO_DO[front](), writer()], scores)
    assert torch.equal(scores, given())
    assert found[:, 10:].isneginf().all()
    assert torch.equal(found[:, :10], given()[:, :10])


@pytest.mark.parametrize("view", [lambda x: x[:, :V], lambda x: x[1:3, :V], lambda x: x[:1, :V].expand(2, V)])
def test_scores_that_are_views_stay_as_they_are(view):
    whole = torch.randn(4, V + 3, device=DEVICE)
    before = whole.clone()
    found = fl.LogitsProcessorList([InPlace()])(IDS.to(DEVICE), view(whole))
    assert torch.equal(whole, before)
    assert torch.equal(found[:, :10], view(before)[:, :10])


def test_a_processor_of_more_arguments():
    scores = given()
    found = fl.LogitsProcessorList([InPlaceWithArguments()])(IDS.to(DEVICE), scores, factor=2.0)
    assert torch.equal(scores, given())
    assert torch.equal(found[:, :10], given()[:, :10] * 2)


def test_who_asks_for_it_in_place_gets_it_in_place():
    for processors in ([InPlace()], [InPlaceOfAView(), fl.TemperatureLogitsWarper(1.0)], [Looks(lambda s: s.flip(1))]):
        expected = fl.LogitsProcessorList(processors)(IDS.to(DEVICE), given())
        scores = given()
        assert fl.LogitsProcessorList(processors).apply_(IDS.to(DEVICE), scores) is scores
        assert torch.equal(scores, expected)
        scores = given().requires_grad_().clone()  # through transformers' own implementations
        assert torch.equal(fl.LogitsProcessorList(processors).apply_(IDS.to(DEVICE), scores), expected)


def test_in_place_from_another_part_of_the_same_memory():
    scores = torch.arange(9.0, device=DEVICE).reshape(3, 3)
    turned = scores.T.clone()
    fl.LogitsProcessorList([Looks(lambda scores: scores.T)]).apply_(torch.zeros(3, 1).long().to(DEVICE), scores)
    assert torch.equal(scores, turned)


def test_a_tensor_that_a_step_has_made_is_handed_on_as_it_is():
    writer = InPlace()
    processors = fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), writer])
    found = processors(IDS.to(DEVICE), given())
    assert writer.got == [found.data_ptr()]
    run = transformers.LogitsProcessorList(list(processors._for_generate({})))
    assert run(IDS.to(DEVICE), given()).data_ptr() == writer.got[-1]


def test_what_only_fastlogits_wrote_gets_no_copy(monkeypatch):
    """Its own processors never write, also where the plan can't read what they are."""
    run = fl.SuppressFirstTokens([1]).for_run(prompt_length=2)
    copies = []
    monkeypatch.setattr("fastlogits.plan.plan.apart", lambda *tensors: copies.append(1) or apart(*tensors))
    scores = given()
    chain = [run, fl.MinLengthLogitsProcessor(1, 2, DEVICE), run]
    assert fl.LogitsProcessorList(chain)(IDS.to(DEVICE), scores) is scores
    assert not copies
    fl.LogitsProcessorList([*chain, InPlace()])(IDS.to(DEVICE), scores)
    assert copies


@pytest.mark.parametrize("name", ["DiaEOSChannelFilterLogitsProcessor", "DiaEOSDelayPatternLogitsProcessor"])
def test_classes_of_transformers_that_write(name):
    """Theirs run for shapes that a plan doesn't take, and they write what they are given."""
    if name == "DiaEOSChannelFilterLogitsProcessor":
        processor = fl.DiaEOSChannelFilterLogitsProcessor(9, 3)
    else:
        processor = fl.DiaEOSDelayPatternLogitsProcessor([0, 1, 2], 3, 0)
    scores = torch.randn(2 * 9, V, device=DEVICE, requires_grad=True)
    before = scores.detach().clone()
    ids = torch.zeros(2 * 9, 4, dtype=torch.long, device=DEVICE)
    try:
        fl.LogitsProcessorList([processor])(ids, scores)
    except (RuntimeError, ValueError):
        pytest.skip("this version of transformers has no gradients for it")
    assert torch.equal(scores.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("logprobs", ["raw", "processed"])
def test_log_probabilities_speak_of_the_logits_that_were_given(logprobs, kernels, dtype, monkeypatch):
    monkeypatch.setattr(launch, "FORCE_KERNEL", kernels)
    logits = given().to(dtype)
    ids = IDS.to(DEVICE)
    asked = {"seeds": 1, "positions": 0, "input_ids": ids, "logprobs": logprobs, "top_logprobs": 2}
    for processors in ([InPlace()], [fl.MinLengthLogitsProcessor(1, 2, DEVICE), InPlace(), fl.TopKLogitsWarper(40)]):
        found = fl.sample(logits, processors, **asked)
        again = fl.Sampler(processors, logprobs=logprobs, top_logprobs=2)(logits, 1, 0, ids)
        assert torch.equal(logits, given().to(dtype))
        assert torch.equal(found.tokens, again.tokens)
        assert (found.tokens < 10).all()
        seen = given().to(dtype).float()
        if logprobs == "processed":
            seen[:, 10:] = -INF
        expected = seen.log_softmax(-1)
        torch.testing.assert_close(found.logprobs, expected.gather(1, found.tokens.unsqueeze(1)).squeeze(1))
        assert torch.equal(found.top_tokens, expected.topk(2).indices)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_sampler_hands_the_position_to_processors_that_ask_for_it(kernels, monkeypatch):
    monkeypatch.setattr(launch, "FORCE_KERNEL", kernels)
    told = []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids, scores, prompt_length):
            told.append(prompt_length)
            return scores

    fl.sample(given(), [Asks()], seeds=1, positions=0, input_ids=IDS.to(DEVICE), prompt_length=3)
    assert told == [3]


def test_raw_logits_of_generate_stay_raw(llama):
    prompt = torch.tensor([[3, 50, 63, 8]])
    processors = fl.LogitsProcessorList([fl.MinLengthLogitsProcessor(1, 2), InPlace()])
    out = llama.generate(
        prompt, logits_processor=processors, max_new_tokens=2, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert all(logits.isfinite().all() for logits in out.logits)
