"""What people get wrong: the error names the argument, its value and what is allowed, and has the type it had."""

import threading

import numpy as np
import pytest
import torch
import transformers

import fastlogits as fl
from fastlogits.plan.causes import explain_failure
from fastlogits.plan.stages import Ban, Bias, Repeated, Rows, Stage, When

V = 40
IDS = torch.tensor([[5, 6, 5, 6], [9, 8, 7, 9]])


def given():
    return torch.randn(2, V, generator=torch.Generator().manual_seed(3))


PROCESSORS = {
    "temperature": lambda: fl.TemperatureLogitsWarper(0.7),
    "top-k": lambda: fl.TopKLogitsWarper(5),
    "top-p": lambda: fl.TopPLogitsWarper(0.9),
    "typical": lambda: fl.TypicalLogitsWarper(0.9),
    "repetition": lambda: fl.RepetitionPenaltyLogitsProcessor(1.2),
    "n-grams": lambda: fl.NoRepeatNGramLogitsProcessor(2),
    "suppress": lambda: fl.SuppressTokensLogitsProcessor([1]),
    "words": lambda: fl.NoBadWordsLogitsProcessor([[1, 2], [3]]),
    "min length": lambda: fl.MinLengthLogitsProcessor(9, 2),
    "normalisation": lambda: fl.LogitNormalization(),
    "clean": lambda: fl.InfNanRemoveLogitsProcessor(),
    "prefix": lambda: fl.PrefixConstrainedLogitsProcessor(lambda batch, ids: [1], 1),
    "first step": lambda: fl.SuppressFirstTokens([1]).for_run(2),
    "presence": lambda: fl.PresencePenaltyLogitsProcessor(0.5).for_run(2),
}
READERS = ["repetition", "n-grams", "words", "min length", "prefix", "presence"]
SWAPPED = r"input_ids must come first and scores second, got torch.float32 of \(2, 40\) and torch.int64 of \(2, 4\)"
INTEGERS = r"scores must be floating-point of shape \(B, V\), got torch.int64 of \(2, 40\)"
NUMPY = r"scores must be a floating-point tensor of shape \(B, V\), got numpy.ndarray of \(2, 40\): torch.from_numpy"
NO_IDS = r"input_ids must be the tokens so far, an integer tensor of shape \(B, L\), got None: \w+ reads them"
LISTED_IDS = r"input_ids must be the tokens so far, an integer tensor of shape \(B, L\), got list"


def calls(processor, **positions):
    """The ways to call a processor; the second list has run before, and has its tables."""
    used = fl.LogitsProcessorList([processor])
    used(IDS, given(), **positions)
    return [
        processor,
        fl.LogitsProcessorList([processor]),
        used,
        fl.LogitsProcessorList([processor]).for_run(2),
        fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), processor]),
        lambda ids, scores: fl.LogitsProcessorList([processor]).apply_(ids, scores),
        fl.LogitsProcessorList([fl.LogitsProcessorList([processor]).for_run(2)]),
    ]


def refused(call, arguments, message):
    with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError, IndexError), match=message) as caught:
        call(*arguments)
    assert "self" not in str(caught.value)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (given(), IDS), SWAPPED),
        (lambda: (IDS, torch.ones(2, V, dtype=torch.int64)), INTEGERS),
        (lambda: (IDS, given().numpy()), NUMPY),
        (lambda: (IDS, given().tolist()), "scores must be a floating-point tensor .* got list"),
        (lambda: (IDS, None), "scores must be a floating-point tensor .* got None"),
    ],
    ids=["swapped", "integers", "numpy", "list", "None"],
)
def test_scores_that_are_none(name, arguments, message):
    for call in calls(PROCESSORS[name]()):
        refused(call, arguments(), message)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (None, NO_IDS),
        (IDS.tolist(), LISTED_IDS),
    ],
    ids=["None", "list"],
)
def test_ids_that_are_none(name, ids, message):
    for call in calls(PROCESSORS[name]()):
        refused(call, (ids, given()), message)


def test_ids_of_other_rows():
    refused(
        PROCESSORS["repetition"](),
        (IDS[[0, 0, 1]], given()),
        r"input_ids must have as many rows as scores \(2\).* got 3",
    )


def test_an_error_keeps_the_type_that_transformers_has():
    for name in ("repetition", "n-grams", "min length", "prefix"):
        processor = PROCESSORS[name]()
        theirs = getattr(transformers, type(processor).__name__)
        twin = object.__new__(theirs)
        twin.__dict__ = processor.__dict__
        with pytest.raises(Exception) as expected:  # noqa: PT011
            twin(None, given())
        with pytest.raises(expected.type, match="input_ids must be"):
            processor(None, given())


def test_what_a_processor_of_somebody_raises_stays_as_it_is():
    class Own(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("my tool is out of order")

    with pytest.raises(RuntimeError, match="my tool is out of order") as caught:
        fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), Own()])(IDS[:1], given())
    assert caught.value.__cause__ is None
    explain_failure(ValueError("nothing is wrong with these"), [], IDS, given())


# -- Lists ----------------------------------------------------------------------------------------------------------


class Nothing(fl.StagedProcessor):
    def stage(self):
        return None


class AnotherStage(fl.StagedProcessor):
    def stage(self):
        return Stage()


class AClass(fl.StagedProcessor):
    def stage(self):
        return Ban


MEMBERS = {
    "class": (
        lambda: fl.TopKLogitsWarper,
        ValueError,
        r"got the class TopKLogitsWarper \(number 2\): write TopKLogit.*\(",
    ),
    "their class": (lambda: transformers.TopKLogitsWarper, ValueError, r"write TopKLogitsWarper\(\.\.\.\)"),
    "None": (lambda: None, AttributeError, r"processors must be callable with .* got None \(number 2\)"),
    "text": (lambda: "top_k", AttributeError, r"processors must be callable with .* got 'top_k' \(number 2\)"),
    "list": (lambda: [fl.TopKLogitsWarper(3)], AttributeError, r"must be in one list, got a list of 1 \(number 2\)"),
    "their list": (
        lambda: transformers.LogitsProcessorList([fl.TopKLogitsWarper(3)]),
        ValueError,
        r"must be in one list, got a LogitsProcessorList of 1 \(number 2\)",
    ),
    "our list": (lambda: fl.LogitsProcessorList(), ValueError, r"got a LogitsProcessorList of 0 \(number 2\)"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_that_is_no_processor(name, llama):
    make, error, message = MEMBERS[name]
    members = [fl.TemperatureLogitsWarper(0.5), make()]
    with pytest.raises(error):
        transformers.LogitsProcessorList(members)(IDS, given())
    ways = [
        lambda: fl.LogitsProcessorList(members)(IDS, given()),
        lambda: fl.LogitsProcessorList(members).apply_(IDS, given()),
        lambda: fl.LogitsProcessorList(members).for_run(2),
        lambda: fl.LogitsProcessorList(members).explain(),
        lambda: fl.check(members, IDS, given()),
        lambda: fl.trace(members, IDS, given()),
        lambda: fl.sample(given(), members, seeds=1, positions=0, input_ids=IDS),
        lambda: llama.generate(IDS, logits_processor=fl.LogitsProcessorList(members), max_new_tokens=1),
    ]
    for way in ways:
        with pytest.raises(error, match=message) as caught:
            way()
        assert "self" not in str(caught.value)


@pytest.mark.parametrize(
    "take", [fl.LogitsProcessorList, fl.Sampler, lambda one: fl.sample(given(), one, seeds=1, positions=0)]
)
def test_a_processor_for_a_list(take):
    with pytest.raises(TypeError, match=r"must be a list of processors, got TopKLogitsWarper: .* \[TopKLogitsWarper\("):
        take(fl.TopKLogitsWarper(3))


def test_what_fails_while_a_list_is_made_stays_as_it_is():
    def made():
        raise TypeError("mine")
        yield

    with pytest.raises(TypeError, match=r"^mine$"):
        fl.LogitsProcessorList(made())


@pytest.mark.parametrize("cls", [Nothing, AnotherStage, AClass])
def test_a_stage_that_is_none(cls):
    for call in (cls(), fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), cls()])):
        with pytest.raises(TypeError, match=rf"{cls.__name__}.stage\(\) must return a stage of fastlogits.plan.stages"):
            call(IDS, given())


# -- Sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": given().numpy()}, r"logits must be a floating-point tensor .* got numpy.ndarray of \(2, 40\)"),
        ({"logits": None}, "logits must be a floating-point tensor .* got None"),
        ({"logits": torch.ones(2, V, dtype=torch.int64)}, "logits must be a floating-point tensor .* got torch.int64"),
        ({"input_ids": IDS.tolist()}, LISTED_IDS),
        ({"input_ids": None}, r"input_ids must be the tokens so far.* got None: Rep\w+ reads them"),
        ({"seeds": [1, 2]}, "seeds must be an integer of at most 64 bits or a tensor of integers, got list"),
        ({"positions": 0.5}, "positions must be an integer of at most 64 bits .* got 0.5"),
    ],
)
def test_arguments_of_a_draw(arguments, message):
    asked = {"logits": given(), "seeds": 1, "positions": 0, "input_ids": IDS, **arguments}
    processors = [fl.RepetitionPenaltyLogitsProcessor(1.2)]
    refused(lambda: fl.sample(asked.pop("logits"), processors, **asked), (), message)


# -- Devices and tokenizers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
@pytest.mark.parametrize(
    "take",
    [
        lambda device: fl.BatchProcessor(2, V, device),
        lambda device: fl.TokenMask.from_ids([1], V).bits(device),
        lambda device: fl.TokenMask.from_ids([1], V).ids(device),
        lambda device: fl.TokenMask.from_ids([1], V).row(device),
        lambda device: fl.TokenMask.from_ids([1], V).row(device, torch.float32),
    ],
)
def test_a_device_that_is_not_there(take, device):
    with pytest.raises(ValueError, match=f"device must be a device that torch can use here .*cpu.* got '{device}'"):
        take(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_where_there_is_none():
    with pytest.raises(ValueError, match=r"device must be a device that torch can use here \(cpu\), got 'cuda'"):
        fl.BatchProcessor(2, V)


def test_the_name_of_a_tokenizer():
    message = r"tokenizer must be a tokenizer of transformers, got 'gpt2': AutoTokenizer.from_pretrained\('gpt2'\)"
    with pytest.raises(TypeError, match=message):
        fl.trace([fl.TopKLogitsWarper(3)], IDS, given(), "gpt2")
    with pytest.raises(TypeError, match=message):
        fl.TokenMask.matching("gpt2", r"\d")


# -- Looking inside -------------------------------------------------------------------------------------------------


class UsedUp(transformers.LogitsProcessor):
    """Carries what can't be copied, as those of grammar engines do."""

    def __init__(self, *held):
        self.held, self.calls = held, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores - self.calls


@pytest.mark.parametrize("held", [threading.Lock(), (number for number in range(9))])
def test_what_cannot_run_twice_does_not_run(held):
    processor = UsedUp(held)
    chain = [fl.TopKLogitsWarper(20), processor, fl.TemperatureLogitsWarper(0.5)]
    outcome = fl.check(chain, IDS, given())
    assert outcome
    assert outcome.compared == ("TopKLogitsWarper",)
    (name, reason), (behind, why) = outcome.not_compared
    assert name == "UsedUp"
    assert "it can't be copied (TypeError" in reason
    assert "would use it up" in reason
    assert (behind, why) == ("TemperatureLogitsWarper", "it stands behind UsedUp, which isn't run")
    with pytest.raises(
        ValueError, match=r"processors must be copyable, .* got UsedUp \(number 2\): it can't be copied"
    ):
        fl.trace(chain, IDS, given())
    assert processor.calls == 0
    assert "unknown to fastlogits" in fl.LogitsProcessorList(chain).explain()


def test_processors_that_come_from_a_generator_are_read_once():
    outcome = fl.check((each for each in [fl.TopKLogitsWarper(20), fl.TemperatureLogitsWarper(0.5)]), IDS, given())
    assert outcome
    assert len(outcome.compared) == 2


@pytest.mark.parametrize(
    ("processors", "said"),
    [
        ([], "nothing was compared: there are no processors"),
        ([lambda ids, scores: scores], "nothing was compared\nnot compared: function: fastlogits runs it as it is"),
        ([fl.TopNSigmaLogitsWarper(1.0)], "not compared: TopNSigmaLogitsWarper: transformers has no such processor"),
        ([UsedUp(threading.Lock()), fl.TopKLogitsWarper(3)], "TopKLogitsWarper: it stands behind UsedUp"),
        ([fl.ForcedBOSTokenLogitsProcessor(V)], "by itself it raises IndexError"),
    ],
)
def test_a_check_that_compared_nothing_is_not_true(processors, said):
    outcome = fl.check(processors, IDS[:, :1], given())
    assert outcome.compared_nothing
    assert not outcome
    assert outcome.difference is None
    assert said in str(outcome)


def test_own_processors_are_compared_with_themselves_alone():
    chain = [fl.SuppressFirstTokens([1]), fl.SuppressFirstTokens([2], window=3)]
    outcome = fl.check(chain, IDS, given(), prompt_length=4)
    assert outcome
    assert outcome.fused
    assert outcome.compared == ()


def flat(rows=3):
    scores = torch.zeros(rows, V)
    scores[1] = torch.arange(V) * 0.5
    return scores


@pytest.fixture
def lowest_first(monkeypatch):
    """A transformers whose sort puts equal scores in another order."""
    sort = torch.sort

    def unstable(values, **options):
        if not options.get("descending", True) and values.ndim == 2:
            found = sort(values.flip(1), stable=True, **options)
            return found[0], V - 1 - found[1]
        return sort(values, **options)

    monkeypatch.setattr(torch, "sort", unstable)


@pytest.mark.parametrize("behind", [[], [fl.TemperatureLogitsWarper(0.5), fl.LogitNormalization()]])
def test_other_tokens_of_a_tie_are_no_difference(lowest_first, behind):
    ids = torch.zeros(3, 2, dtype=torch.long)
    outcome = fl.check([fl.TopPLogitsWarper(0.5), *behind], ids, flat())
    assert outcome
    (note,) = outcome.notes
    assert note.startswith("TopPLogitsWarper (processor 1): in 2 rows, first 0, other tokens of the same score")
    assert f"note: {note}" in str(outcome)
    # Rows without a tie are compared to the end.
    wrong = fl.check([fl.TopPLogitsWarper(0.5), *behind, Heats(0.5)], ids, flat())
    assert not wrong
    assert (wrong.difference.processor, wrong.difference.row) == ("Heats", 1)


def test_without_a_tie_there_is_no_note():
    outcome = fl.check([fl.TopPLogitsWarper(0.5)], IDS, given())
    assert outcome
    assert outcome.notes == ()


def test_another_number_of_tokens_is_a_difference(monkeypatch):
    monkeypatch.setattr(transformers.TopPLogitsWarper, "__call__", lambda self, ids, scores: scores)
    assert not fl.check([fl.TopPLogitsWarper(0.5)], torch.zeros(3, 2, dtype=torch.long), flat())


class Heats(fl.StagedProcessor, transformers.TemperatureLogitsWarper):
    """A stage that isn't what the call of its base says."""

    def stage(self):
        return fl.TemperatureLogitsWarper(self.temperature * 1.01).stage()


@pytest.mark.parametrize("scores", [np.zeros((2, V)), torch.ones(2, V, dtype=torch.int64), torch.zeros(V), None])
@pytest.mark.parametrize("look", [fl.check, fl.trace])
def test_scores_that_cannot_be_looked_at(look, scores):
    with pytest.raises(ValueError, match="scores must be"):
        look([fl.TopKLogitsWarper(3)], IDS, scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": 5}, "shape must be .* got 5"),
        ({"shape": ("4", 8)}, "shape must be .* got"),
        ({"shape": (2, 8), "dtype": "float32"}, "dtype must be a dtype of torch.* got 'float32'"),
        ({"bandwidth": "fast"}, "bandwidth must be .* got 'fast'"),
        ({"bandwidth": float("nan")}, "bandwidth must be .* got nan"),
    ],
)
def test_arguments_of_explain(arguments, message):
    with pytest.raises(ValueError, match=message):
        fl.LogitsProcessorList([fl.TopKLogitsWarper(3)]).explain(**arguments)


# -- Said, never silent ------------------------------------------------------------------------------------------------


def stage_of(make):
    class Own(fl.StagedProcessor):
        def stage(self):
            return make()

    return lambda: fl.LogitsProcessorList([Own()])(IDS, SCORES.clone(), prompt_length=2)


SCORES = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ban((1,), When("stepp", stop=1)), "of must be one of 'step', 'length', got 'stepp'"),
        (lambda: Ban((1,), When("step", stop="3")), "stop must be an integer, got '3'"),
        (lambda: Ban((1,), When("step", 2, 1)), "stop must be at least start, which is 2, got 1"),
        (lambda: Ban((1,), When("step", period=0)), "period must be an integer of at least 1, got 0"),
        (lambda: Ban([1]), r"tokens of a Ban must be a tuple of token ids, .* got a list: write tuple\(...\)"),
        (lambda: Ban(1), "tokens of a Ban must be .* got a int"),
        (lambda: Ban((1, 2.5)), "tokens of a Ban must be token ids, got 2.5"),
        (lambda: Bias(torch.tensor([1]), 2.0), "tokens of a Bias must be .* got a Tensor"),
        (lambda: Ban(Repeated(0)), "size must be an integer of at least 1, got 0"),
        (lambda: Rows("normalise", lambda ids, x: None, "none"), "the function of Own must return scores .* got None"),
        (
            lambda: Rows("normalise", lambda ids, x: x[:, :3], "few"),
            r"the function of Own must return scores of all 9 tokens, got torch.float32 of \(2, 3\)",
        ),
    ],
)
def test_stages_that_mean_nothing(make, message):
    with pytest.raises(ValueError, match=message):
        stage_of(make)()


@pytest.mark.parametrize(
    ("processor", "name", "value", "message"),
    [
        (lambda: fl.TopKLogitsWarper(5), "top_k", -3, "top_k must be .* got -3"),
        (lambda: fl.TopKLogitsWarper(5), "top_k", "x", "top_k must be .* got 'x'"),
        (lambda: fl.TopKLogitsWarper(5), "top_k", 2.5, "top_k must be an integer .* got 2.5"),
        (lambda: fl.TopPLogitsWarper(0.5), "top_p", 1.5, "top_p must be .* got 1.5"),
        (lambda: fl.MinPLogitsWarper(0.5), "min_p", -0.5, "min_p must be .* got -0.5"),
        (lambda: fl.NoRepeatNGramLogitsProcessor(2), "ngram_size", 0, "ngram_size must be .* got 0"),
    ],
)
def test_an_attribute_that_is_set_out_of_range(processor, name, value, message):
    processors = fl.LogitsProcessorList([processor()])
    processors(IDS, SCORES)
    setattr(processors[0], name, value)
    with pytest.raises(ValueError, match=message):
        processors(IDS, SCORES)


def test_a_processor_that_returns_nothing():
    with pytest.raises(ValueError, match="must return the processed scores, got None"):
        fl.LogitsProcessorList([lambda ids, scores: None])(IDS, SCORES)


def test_a_misspelt_position_of_a_list():
    processors = fl.LogitsProcessorList([fl.TopKLogitsWarper(3)])
    for name, meant in (("promt_length", "prompt_length"), ("cache_postion", "cache_position")):
        with pytest.raises(TypeError, match=f"there is no argument '{name}': did you mean {meant}"):
            processors(IDS, SCORES, **{name: 2})
        with pytest.raises(TypeError, match=f"there is no argument '{name}': did you mean {meant}"):
            processors.apply_(IDS, SCORES.clone(), **{name: 2})
    assert processors(IDS, SCORES, encoder_ids=3) is not None  # another processor's, as in transformers

    class Asking:
        def __call__(self, input_ids, scores, prompt_lengths):
            return scores + prompt_lengths

    assert torch.equal(fl.LogitsProcessorList([Asking()])(IDS, SCORES, prompt_lengths=1), SCORES + 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: fl.RequestParams(temprature=1), lambda: fl.SamplingParams(temprature=1),
        lambda: fl.Sampler(temprature=1), lambda: fl.Sampler(params=fl.SamplingParams(top_k=3), temprature=1),
        lambda: fl.sample(SCORES, seeds=0, positions=0, temprature=1),
        lambda: fl.logprobs(SCORES, torch.tensor([1, 2]), temprature=1),
    ],
)  # fmt: skip
def test_a_misspelt_parameter(call):
    with pytest.raises(TypeError, match="there is no argument 'temprature': did you mean temperature"):
        call()


def test_a_sampler_does_not_change():
    sampler = fl.Sampler(temperature=0.7)
    for name in ("temperature", "top_k", "params"):
        with pytest.raises(AttributeError, match=f"a Sampler doesn't change, got {name} = 0"):
            setattr(sampler, name, 0)
    assert sampler.params.temperature == 0.7


def test_a_group_that_is_none():
    for make in (lambda: fl.Sampler(group=3), lambda: fl.BatchProcessor(1, 9, "cpu", max_length=4, group=3)):
        with pytest.raises(ValueError, match="group must be"):
            make()


def test_least_tokens_without_tokens_that_end():
    batch, params = fl.BatchProcessor(1, 9, "cpu", max_length=4), fl.RequestParams(min_tokens=4)
    with pytest.warns(UserWarning, match="stop_token_ids is empty: min_tokens does nothing") as told:
        batch.add(params)
    batch.update(0, params)
    assert [each.filename for each in told] == [__file__]  # once, and of who adds it
    with pytest.warns(UserWarning, match="stop_token_ids is empty: MinTokensLogitsProcessor does nothing"):
        fl.MinTokensLogitsProcessor(3, [])
