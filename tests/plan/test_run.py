"""``prompt_length`` and ``cache_position`` mean the same wherever they can be given, one without the other included."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import fastlogits as fl
from fastlogits.plan.run import Run, UnknownRunStartError

V, END = 40, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.tensor([[5, 6, 5], [9, 8, 7]], device=DEVICE)
INF = float("inf")


def given():
    return torch.randn(2, V, generator=torch.Generator().manual_seed(3)).to(DEVICE)


def words():
    made = Tokenizer(models.WordLevel({f"word{i}": i for i in range(V)}))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=f"word{END}")


# -- The entry points: scores after the processors ----------------------------------------------------------------


def by_call(processors, **positions):
    return fl.LogitsProcessorList(processors)(IDS, given(), **positions)


def by_apply(processors, **positions):
    return fl.LogitsProcessorList(processors).apply_(IDS, given(), **positions)


def by_run(processors, **positions):
    return fl.LogitsProcessorList(processors).for_run(**positions)(IDS, given())


def by_run_in_place(processors, **positions):
    return fl.LogitsProcessorList(processors).for_run(**positions).apply_(IDS, given())


def by_runs_of_each(processors, **positions):
    """Each processor in a run of its own, in a list of transformers."""
    return transformers.LogitsProcessorList([each.for_run(**positions) for each in processors])(IDS, given())


def by_plan(processors, **positions):
    told = Run.of(positions.get("prompt_length"), positions.get("cache_position"))
    return fl.LogitsProcessorList(processors).plan(IDS, given(), told)


def by_trace(processors, **positions):
    return fl.trace(processors, IDS, given(), **positions).scores


def by_method(processors, **positions):
    return fl.LogitsProcessorList(processors).trace(IDS, given(), **positions).scores


def by_check(processors, **positions):
    """What it compares with raises as the list does, and the list gives the scores."""
    assert fl.check([*processors, fl.TemperatureLogitsWarper(1.0)], IDS, given(), **positions)
    return by_call(processors, **positions)


CALLS = [by_call, by_apply, by_plan, by_trace, by_method, by_check]
RUNS = [by_run, by_run_in_place, by_runs_of_each]
"""Where neither position is given they take the first call for the first step, and so differ from a call."""
WAYS = [*CALLS, *RUNS]


def drawn(processors, **positions):
    return fl.Sampler(processors, temperature=0.0)(given(), 1, 2, IDS, **positions).tokens


def drawn_once(processors, **positions):
    return fl.sample(given(), processors, seeds=1, positions=2, input_ids=IDS, temperature=0.0, **positions).tokens


# -- What they run ------------------------------------------------------------------------------------------------

LENGTHS = {
    "min length": lambda: fl.MinLengthLogitsProcessor(6, END, DEVICE),
    "forced end": lambda: fl.ForcedEOSTokenLogitsProcessor(7, END, DEVICE),
    "decay": lambda: fl.ExponentialDecayLengthPenalty((1, 1.5), END, 1),
    "min new tokens": lambda: fl.MinNewTokensLengthLogitsProcessor(1, 5, END, DEVICE),
    "forced begin": lambda: fl.ForcedBOSTokenLogitsProcessor(4),
}
"""They ask how long the sequence is."""

STEPS = {
    "first step": lambda: fl.SuppressFirstTokens([3], window=2),
    "blank": lambda: fl.SuppressFirstTokens([3], blank=[4]),
    "presence": lambda: fl.PresencePenaltyLogitsProcessor(0.5),
    "frequency": lambda: fl.FrequencyPenaltyLogitsProcessor(0.5),
    "tokens of the prompt": lambda: fl.OnlyTokensFrom("prompt", eos_token_id=END),
    "a function of rows": lambda: fl.GenLengthLogitsProcessor(words(), 2.0),
}
"""They ask which step of the run it is."""


def as_long_as(processor, length):
    """What transformers says where so many tokens are there."""
    ids = torch.zeros(2, length, dtype=torch.long, device=DEVICE)
    ids[:, -3:] = IDS[:, -length:]
    twin = getattr(transformers, type(processor).__name__)
    same = object.__new__(twin)
    same.__dict__ = processor.__dict__
    return same(ids, given())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 6, 7, 11])
def test_what_asks_for_the_length_needs_no_prompt(way, name, length):
    expected = as_long_as(LENGTHS[name](), length)
    for cache_position in (length - 1, np.int64(length - 1), torch.tensor(length - 1, device=DEVICE)):
        for positions in ({}, {"prompt_length": 2}):
            found = way([LENGTHS[name]()], cache_position=cache_position, **positions)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("way", [drawn, drawn_once])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("length", [1, 3, 6, 11])
def test_a_draw_reads_the_same_length(way, name, length):
    expected = as_long_as(LENGTHS[name](), length).argmax(-1)
    for positions in ({}, {"prompt_length": 2}):
        assert torch.equal(way([LENGTHS[name]()], cache_position=length - 1, **positions), expected)


@pytest.mark.parametrize("way", [*CALLS, drawn, drawn_once])
@pytest.mark.parametrize("name", STEPS)
def test_what_asks_for_the_step_raises_without_positions(way, name):
    with pytest.raises(UnknownRunStartError, match="nothing says where the run starts"):
        way([STEPS[name]()])


@pytest.mark.parametrize("way", [*WAYS, drawn, drawn_once])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("cache_position", [2, torch.tensor([2, 2], device=DEVICE)])
def test_what_asks_for_the_step_raises_without_a_prompt(way, name, cache_position):
    with pytest.raises(UnknownRunStartError, match="nothing says where the run starts"):
        way([STEPS[name]()], cache_position=cache_position)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("cache_position", [None, 2, torch.tensor([2, 2], device=DEVICE)])
@pytest.mark.parametrize("prompt_length", [2, np.int64(2), torch.tensor([2, 2], device=DEVICE)])
def test_what_asks_for_the_step_reads_both(way, name, cache_position, prompt_length):
    expected = STEPS[name]().for_run(2, 2)(IDS, given())
    found = way([STEPS[name]()], cache_position=cache_position, prompt_length=prompt_length)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", WAYS)
def test_positions_for_each_row(way):
    lengths = [4, 9]
    found = way([LENGTHS["min length"]()], cache_position=torch.tensor(lengths, device=DEVICE) - 1)
    assert found[:, END].isneginf().tolist() == [True, False]


def test_a_run_takes_the_length_of_its_first_call_for_the_prompt():
    run = fl.SuppressFirstTokens([3]).for_run()
    assert run(IDS, given())[:, 3].isneginf().all()
    assert torch.equal(run(torch.cat([IDS, IDS[:, :1]], 1), given()), given())
    run = fl.LogitsProcessorList([LENGTHS["min length"]()]).for_run(cache_position=9)
    assert torch.equal(run(IDS, given()), given())


@pytest.mark.parametrize("way", [*WAYS, drawn, drawn_once])
@pytest.mark.parametrize("name", STEPS)
def test_a_prompt_longer_than_the_sequence(way, name):
    with pytest.raises(ValueError, match=r"prompt_length must be at most 3, .* got 4: .* give cache_position"):
        way([STEPS[name]()], prompt_length=4)
    way([STEPS[name]()], prompt_length=4, cache_position=5)  # input_ids hold a part of it


def test_in_place_takes_what_a_call_takes():
    class Scaled(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores, factor, cache_position):
            return scores * factor + cache_position

    processors = fl.LogitsProcessorList([Scaled()])
    asked = {"factor": 2.0, "cache_position": 7}
    scores = given()
    assert processors.apply_(IDS, scores, **asked) is scores
    assert torch.equal(scores, processors(IDS, given(), **asked))
    with pytest.raises(ValueError, match="Make sure that all the required parameters"):
        processors.apply_(IDS, scores, factor=2.0)


# -- Attributes that are set while a run goes on --------------------------------------------------------------------


class Heats(transformers.StoppingCriteria):
    """Stops nothing, and sets a temperature after the first step."""

    def __init__(self, warper):
        self.warper = warper

    def __call__(self, input_ids, scores, **kwargs):
        self.warper.temperature = 0.125
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("cls", [fl.TemperatureLogitsWarper, transformers.TemperatureLogitsWarper])
@pytest.mark.parametrize("accelerated", [False, True])
def test_an_attribute_set_in_a_run_acts_at_once(llama, cls, accelerated):
    def scores(wrap):
        warper = cls(1.0)
        asked = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        asked |= {"logits_processor": wrap([warper, fl.TopKLogitsWarper(30)]), "stopping_criteria": [Heats(warper)]}
        return torch.stack(llama.generate(torch.tensor([[3, 50, 63]]), **asked).scores)

    plain = scores(transformers.LogitsProcessorList)
    if accelerated:
        with fl.accelerate(llama):
            found = scores(transformers.LogitsProcessorList)
    else:
        found = scores(fl.LogitsProcessorList)
    torch.testing.assert_close(found, plain)


class Widens(transformers.StoppingCriteria):
    """Stops nothing, and lets the bans of the first step last from there on."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, input_ids, scores, **kwargs):
        self.processor.window = 9
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("wrap", [list, transformers.LogitsProcessorList, fl.LogitsProcessorList])
@pytest.mark.parametrize("accelerated", [False, True])
def test_an_attribute_of_a_first_step_processor_acts_at_once(llama, wrap, accelerated):
    first = fl.SuppressFirstTokens([7, 8])
    if not accelerated and wrap is not fl.LogitsProcessorList:
        processors = wrap([first.for_run(prompt_length=3)])
    else:
        processors = wrap([first, fl.TemperatureLogitsWarper(0.5)])
    asked = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    asked |= {"logits_processor": processors, "stopping_criteria": [Widens(first)]}
    with fl.accelerate(llama) if accelerated else nullcontext():
        found = llama.generate(torch.tensor([[3, 50, 63]]), **asked).scores
    assert all(scores[:, [7, 8]].isneginf().all() for scores in found)


def test_an_attribute_of_a_processor_in_a_run_of_its_own():
    warper = fl.TemperatureLogitsWarper(0.5)
    run, listed = warper.for_run(3), fl.LogitsProcessorList([warper, fl.TopKLogitsWarper(5)]).for_run(3)
    for temperature in (0.5, 0.25):
        warper.temperature = temperature
        assert torch.equal(run(IDS, given()), given() / temperature)
        expected = fl.TopKLogitsWarper(5)(IDS, given() / temperature)
        assert torch.equal(listed(IDS, given()), expected)
