"""A look at the scores of one call splits no fold: Whisper's silence, in a list, beside transformers' own list."""

from types import SimpleNamespace

import pytest
import torch
import transformers.generation.logits_process as theirs

import fastlogits as fl
from fastlogits.plan.observation import Observation
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.selection import Selection
from tests.processors.toy import DEVICE, same

V, BEGIN = 40, 3
IDS = torch.tensor([[1, 2, 3, 4, 5], [3, 2, 1, 2, 3]], device=DEVICE)


def scores(*shape):
    return torch.randn(*(shape or (2, V)), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def detecting(module, token, offset=1):
    """A detection that sees the scores at a length; with another offset the model, which it asks."""
    detection = module.WhisperNoSpeechDetection(token, offset)
    detection.set_begin_index(BEGIN)
    return detection


def made(module, *, behind=True, offset=1):
    """A detection behind two processors and before three, or first of all; and the list."""
    detection = detecting(module, 7, offset)
    before = [module.SuppressTokensLogitsProcessor([9, 11]), module.RepetitionPenaltyLogitsProcessor(1.5)]
    after = [module.SuppressTokensLogitsProcessor([7, 12]), module.TemperatureLogitsWarper(0.5)]
    after.append(module.TopKLogitsWarper(5))
    return detection, [*before, detection, *after] if behind else [detection, *before, *after]


class Model:
    """What is asked where the transcription began before the first step."""

    calls = 0

    def prepare_inputs_for_generation(self, **inputs):
        return inputs

    def forward(self, input_features=None, decoder_input_ids=None):
        self.calls += 1
        return SimpleNamespace(logits=scores(2, 6, V))

    __call__ = forward


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_sees_what_transformers_sees_and_at_one_length(behind, model, in_place):
    ours, processors = made(fl, behind=behind, offset=2 if model else 1)
    expecting, others = made(theirs, behind=behind, offset=2 if model else 1)
    processors, others = fl.LogitsProcessorList(processors), theirs.LogitsProcessorList(others)
    for detection in (ours, expecting) if model else ():
        detection.set_model(Model())
        detection.set_inputs({"inputs": torch.zeros(2, 2), "decoder_input_ids": torch.zeros(2, 1)})
    for length in range(1, 6):
        given, ids = scores() + length, IDS[:, :length]
        expected = others(ids, given.clone())
        found = processors.apply_(ids, given) if in_place else processors(ids, given)
        torch.testing.assert_close(found, expected)
        if length < BEGIN:
            assert ours.no_speech_prob == expecting.no_speech_prob == [0.0]
        else:
            assert same(ours.no_speech_prob, expecting.no_speech_prob)
    if model:
        assert ours.model.calls == expecting.model.calls == 1


def test_splits_no_fold():
    processors = fl.LogitsProcessorList(made(fl)[1])
    assert [type(part) for part in processors.plan.parts] == [Observation, Selection]
    told = processors.explain()
    assert [part.name.partition(":")[0] for part in told.parts] == ["observe", "fold", "truncate"]
    assert told.parts[0].name == "observe: where input_ids have 3 tokens, what the next 2 stages make of the scores"
    assert len(told.parts[1].lines) == 4


def test_other_calls_look_at_nothing(monkeypatch):
    processors = fl.LogitsProcessorList(made(fl)[1])
    folds = []
    fold = Pointwise.__call__
    monkeypatch.setattr(Pointwise, "__call__", lambda *arguments: folds.append(1) or fold(*arguments))
    counts = []
    for length in (2, 3, 4):
        processors(IDS[:, :length], scores())
        counts.append(len(folds))
        folds.clear()
    # On a GPU truncations take the fold in; a look runs it by itself.
    ordinary = 0 if scores().is_cuda else 1
    assert counts == [ordinary, ordinary + 1, ordinary]


class Counts(fl.LogitsProcessor):
    """Not known to fastlogits, with a state."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + 1


def test_what_has_a_state_runs_once():
    count, (detection, processors) = Counts(), made(fl)
    fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), count, *processors])(IDS[:, :BEGIN], scores())
    other, (expecting, others) = Counts(), made(theirs)
    theirs.LogitsProcessorList([theirs.TemperatureLogitsWarper(0.5), other, *others])(IDS[:, :BEGIN], scores())
    torch.testing.assert_close(detection.no_speech_prob, expecting.no_speech_prob)
    assert count.calls == other.calls == 1


def test_two_looks_and_other_shapes():
    first, processors = made(fl)
    second = detecting(fl, 3)
    expected_first, others = made(theirs)
    expected_second = detecting(theirs, 3)
    fl.LogitsProcessorList([*processors, second])(IDS[:, :BEGIN], scores())
    theirs.LogitsProcessorList([*others, expected_second])(IDS[:, :BEGIN], scores())
    torch.testing.assert_close(first.no_speech_prob, expected_first.no_speech_prob)
    torch.testing.assert_close(second.no_speech_prob, expected_second.no_speech_prob)
    # Three dimensions, which transformers' own take: in the order of the list.
    made_here = [fl.TemperatureLogitsWarper(0.5), first, fl.TemperatureLogitsWarper(0.1)]
    made_there = [theirs.TemperatureLogitsWarper(0.5), expected_first, theirs.TemperatureLogitsWarper(0.1)]
    given = scores(2, V, 4)
    found = fl.LogitsProcessorList(made_here)(IDS[:, :BEGIN], given)
    assert torch.equal(found, theirs.LogitsProcessorList(made_there)(IDS[:, :BEGIN], given))
    assert same(first.no_speech_prob, expected_first.no_speech_prob)


def test_a_sampler_looks_too():
    detection, processors = made(fl)
    expecting, others = made(theirs)
    sampler = fl.Sampler(fl.LogitsProcessorList(processors))
    theirs.LogitsProcessorList(others)(IDS[:, :BEGIN], scores())
    sampler(scores(), 0, 0, input_ids=IDS[:, :BEGIN])
    torch.testing.assert_close(detection.no_speech_prob, expecting.no_speech_prob)
