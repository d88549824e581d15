"""What a stage of one's own may be made of: what can't be is refused where it is made, by its name."""

import pytest
import torch

import fastlogits as fl
from fastlogits.plan.stages import (
    Ban,
    BanRange,
    Bias,
    Force,
    ForceRows,
    Given,
    History,
    Penalize,
    Repeated,
    RowBias,
    Rows,
    Scale,
    SequenceBias,
    When,
)

FIRST, TEXT = When("step", stop=1), Given(torch.tensor([[4, 5]]))
IDS, SCORES = torch.tensor([[1, 2, 3, 1, 2]]), torch.zeros(1, 8)


class Own(fl.StagedProcessor):
    def __init__(self, stage):
        self.it = stage

    def stage(self):
        return self.it


@pytest.mark.parametrize("source", [History(), TEXT, Repeated(2)], ids=["history", "given", "repeated"])
@pytest.mark.parametrize(
    "make",
    [
        lambda source: Ban(source, FIRST), lambda source: Bias(source, -5.0, when=FIRST),
        lambda source: Bias(source, -5.0, when=FIRST, extra=(7,)),
        lambda source: Bias(source, 0.0, counted=-1.0, when=FIRST),
    ],
)  # fmt: skip
def test_no_gate_is_dropped(make, source):
    with pytest.raises(ValueError, match="only a mask or token ids can be gated, not"):
        make(source)


@pytest.mark.parametrize("tokens", [(2, 5), fl.TokenMask.from_ids([2, 5], 8)])
def test_a_gate_opens_and_closes(tokens):
    for stage in (Ban(tokens, FIRST), Bias(tokens, -5.0, when=FIRST)):
        processors = fl.LogitsProcessorList([Own(stage)])
        at_first, later = (processors(IDS, SCORES, prompt_length=length)[0] for length in (5, 0))
        assert (at_first != 0).nonzero().flatten().tolist() == [2, 5]
        assert not later.any()


WRONG = {
    "counted must be 0 where tokens aren't a History alone": lambda: Bias((1, 2), -1.0, counted=-1.0),
    "counted must be 0 where own aren't": lambda: Bias(TEXT, -1.0, counted=-1.0, argument="own"),
    "counted must be 0 where": lambda: Bias(History(), -1.0, counted=-1.0, extra=(3,)),
    "tokens of a Penalize must be a History or a Given, got a tuple": lambda: Penalize((1, 2), 2.0),
    "tokens of a Penalize must be a History or a Given, got a Repeated": lambda: Penalize(Repeated(2), 2.0),
    "tokens of a Force must be a tuple of token ids or a TokenMask": lambda: Force(History(), FIRST),
    "a Repeated, got a list: write tuple": lambda: Ban([1]),
    "penalty of a Penalize must be a number, got 'a'": lambda: Penalize(History(), "a"),
    "divisor of a Scale must be a number, got '2'": lambda: Scale("2"),
    "value of a Bias must be a number": lambda: Bias((1,), None),
    "span must be one of 'all', 'prompt', 'generated', got 'outputs'": lambda: History("outputs"),
    "ignore of a History must be an integer": lambda: History(ignore=0.5),
    "span must be one of 'all', 'prompt', got": lambda: Repeated(2, span="generated"),
    "text of a Repeated must be a Given or None": lambda: Repeated(2, "text"),
    "ids of a Given must be a tensor of integers": lambda: Given([[1]]),
    "value of a RowBias must be a RowValue, got 2.0": lambda: RowBias((1,), 2.0),
    "condition of a ForceRows must be a RowValue": lambda: ForceRows((1,), True),
    "start of a BanRange must be an integer or a RowValue": lambda: BanRange(0.5),
    "stop of a BanRange must be an integer or a RowValue": lambda: BanRange(0, "9"),
    "acts_as must be one of 'mask', .* got 'blah'": lambda: Rows("blah", lambda ids, scores: scores, ""),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_no_stage_takes_is_named(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message]()


@pytest.mark.parametrize("token", [-1, 8, -9])
@pytest.mark.parametrize(
    "make",
    [
        lambda token: Ban((2, token)), lambda token: Ban((token,), inverted=True), lambda token: Bias((token,), 2.0),
        lambda token: SequenceBias((((token,), 1.0),)), lambda token: SequenceBias((((1, token), 1.0),)),
        lambda token: SequenceBias((((1, token), -float("inf")),)), lambda token: Bias(History(), 1.0, extra=(token,)),
    ],
)  # fmt: skip
def test_a_token_outside_the_vocabulary_is_refused_on_either_side(make, token):
    for processors in (Own(make(token)), fl.LogitsProcessorList([Own(make(token))])):
        with pytest.raises(ValueError, match=rf"token ids? \[?{token}\]?"):
            processors(IDS, SCORES)


def test_a_token_outside_is_ignored_where_that_is_asked_for():
    found = Own(Ban((2, -1, 8), lenient=True))(IDS, SCORES)
    assert (found != 0).nonzero().tolist() == [[0, 2]]
