"""Token ids that somebody writes into a tensor which a processor has: the next call has them."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

import fastlogits as fl
from tests.entries import ENTRIES, Case, build

IDS, SCORES = torch.tensor([[1, 2, 3]]), torch.ones(1, 6)
MADE = {
    "suppress_tokens": lambda of: of.SuppressTokensLogitsProcessor([1]),
    "begin_suppress_tokens": lambda of: of.SuppressTokensAtBeginLogitsProcessor([1], 3),
    "eos_token_id": lambda of: of.MinLengthLogitsProcessor(9, torch.tensor([2])),
    "encoder_input_ids": lambda of: of.EncoderRepetitionPenaltyLogitsProcessor(2.0, torch.tensor([[1, 2]])),
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("of", [theirs, fl], ids=["transformers", "fastlogits"])
@pytest.mark.parametrize("name", MADE)
def test_what_is_written_counts_from_the_next_call_on(name, of, listed):
    processor = MADE[name](of)
    call = fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), processor]) if listed else processor
    for token in (5, 3):
        getattr(processor, name).fill_(token)
        expected = MADE[name](theirs)
        getattr(expected, name).fill_(token)
        scores = SCORES / 0.5 if listed else SCORES
        assert torch.equal(call(IDS, SCORES), expected(IDS, scores.clone()))


def test_a_source_that_is_written():
    processor = fl.OnlyTokensFrom(torch.tensor([[4, 5]]), eos_token_id=2)
    for call in (processor, fl.LogitsProcessorList([processor])):
        for token in (4, 3):
            call(IDS, SCORES)
            processor.source_ids.fill_(token)
            assert torch.equal(call(IDS, SCORES), fl.OnlyTokensFrom([token], eos_token_id=2)(IDS, SCORES))


def test_values_by_row_are_read_at_each_call():
    processor = fl.TopKLogitsWarper(torch.tensor([2]))
    for call in (processor, fl.LogitsProcessorList([processor])):
        plan, scores = call.plan, torch.arange(6.0)[None]
        for k in (1, 3):
            processor.top_k.fill_(k)
            assert int((call(IDS, scores) > -torch.inf).sum()) == k
        assert call.plan is plan


@pytest.mark.parametrize(
    ("name", "of"),
    # What transformers' own set anew at each call says nothing of what they do.
    [(name, of) for of in (theirs, fl) for name, entry in ENTRIES.items() if of is fl or not entry.stateful],
)
@given(data=st.data())
@settings(max_examples=2, deadline=None)
def test_no_plan_is_made_again_where_only_processors_write(name, of, data):
    entry, case = ENTRIES[name], Case(2, max(40, ENTRIES[name].least_vocab), 5)
    processors = fl.LogitsProcessorList([build(of, name, entry.draw(data.draw, case))])
    plan, calls = processors.plan, 0
    ids, scores = torch.randint(0, case.V, (case.B, case.L)), torch.randn(case.B * entry.rows, case.V)
    with suppress(Exception):  # arguments that no call takes
        for calls in range(1, 4):  # noqa: B007
            processors(ids, scores.clone())
    assert processors.plan is plan or not calls
