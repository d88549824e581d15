"""The list and its plan: merges, barriers, and the same result as one processor after the other."""

import copy
import inspect
import pickle

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlogits as fl
from fastlogits.plan.pointwise import Pointwise

V = 100
INF = float("inf")


class Add(transformers.LogitsProcessor):
    """A user's own processor, of which fastlogits knows nothing."""

    def __init__(self, amount):
        self.amount = amount

    def __call__(self, input_ids, scores):
        return scores + self.amount


class AddFromKwargs(transformers.LogitsProcessor):
    def __call__(self, input_ids, scores, amount):
        return scores + amount


masks = st.one_of(
    st.builds(
        fl.SuppressFirstTokens,
        st.sets(st.integers(0, V - 1), min_size=1, max_size=60),
        st.integers(1, 3),
        blank=st.none() | st.sets(st.integers(0, V - 1), max_size=90),
    ),
    st.builds(fl.SuppressSpecificBOSTokenLogitsProcessor, st.sets(st.integers(0, V - 1), min_size=1, max_size=4)),
    st.builds(fl.OnlyTokensFrom, st.just("prompt"), st.sets(st.integers(0, V - 1)), eos_token_id=st.just(2)),
    st.builds(fl.OnlyTokensFrom, st.lists(st.integers(0, V - 1), min_size=1, max_size=50), eos_token_id=st.just(2)),
)


@settings(deadline=None, max_examples=150)
@given(
    processors=st.lists(masks | st.builds(Add, st.floats(-2, 2)), max_size=6),
    step=st.integers(0, 3),
    on_device=st.booleans(),
    in_place=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_any_list_equals_its_processors_one_by_one(device, processors, step, on_device, in_place, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, V, (2, 4 + step), generator=generator).to(device)
    scores = torch.randn(2, V, generator=generator).to(device, dtype)
    start = torch.tensor([4, 4], device=device) if on_device else 4
    expected = scores
    for processor in processors:
        single = processor.for_run(4) if isinstance(processor, fl.StagedProcessor) else processor
        expected = single(input_ids, expected)
    before = scores.clone()
    together = fl.LogitsProcessorList(processors)
    if in_place:
        assert torch.equal(together.apply_(input_ids, before, prompt_length=start), expected)
        assert torch.equal(before, expected)
    else:
        assert torch.equal(together(input_ids, scores, prompt_length=start), expected)
        assert torch.equal(together.for_run(start)(input_ids, scores), expected)
        assert torch.equal(scores, before)


def test_masks_merge_into_one_launch_and_barriers_part_them():
    a, b, c = (
        fl.SuppressFirstTokens([1]),
        fl.SuppressFirstTokens([2], window=2),
        fl.OnlyTokensFrom("prompt", eos_token_id=3),
    )
    assert [type(step) for step in fl.LogitsProcessorList([a, b, c]).plan.inner_parts] == [Pointwise]
    kinds = [type(step).__name__ for step in fl.LogitsProcessorList([a, Add(1), b, c, Add(2)]).plan.inner_parts]
    assert kinds == ["Pointwise", "Barrier", "Pointwise", "Barrier"]


def test_explain_says_what_merged_and_what_did_not():
    processors = fl.LogitsProcessorList(
        [fl.SuppressFirstTokens([1, 2]), fl.OnlyTokensFrom("prompt", eos_token_id=3), Add(1)]
    )
    assert processors.explain().splitlines() == [
        "3 processors, 1 fused part",
        "1. mask_tokens: 2 masks in one",
        "     SuppressFirstTokens  mask       ban 2 tokens while step < 1",
        "     OnlyTokensFrom       mask       allow the tokens of the prompt, 0 tokens extra, 1 to end with",
        "     why: mask . mask = mask (or)",
        "     moves: one read and one write of the logits; in place, the banned words only",
        "2. barrier",
        "     Add                  opaque     unknown to fastlogits: runs as it is",
        "on a GPU: at most 1 launch, and what 1 part in torch or of your own takes",
    ]
    assert fl.LogitsProcessorList([]).explain() == "0 processors, 0 fused parts"
    assert (
        fl.SuppressFirstTokens([1], 2, blank=[3])
        .explain()
        .splitlines()[2]
        .endswith("ban 1 token while step < 2, then until a token outside 1 token blank")
    )


def test_drop_in():
    assert issubclass(fl.LogitsProcessorList, transformers.LogitsProcessorList)
    assert fl.LogitsProcessor is transformers.LogitsProcessor
    processor = fl.SuppressFirstTokens([1])
    assert isinstance(processor, transformers.LogitsProcessor)
    # LogitsProcessorList of transformers refuses a processor with a third parameter, even an optional one.
    for callable_ in (processor, processor.for_run(1)):
        assert list(inspect.signature(callable_.__call__).parameters) == ["input_ids", "scores"]
    scores = torch.zeros(1, 4)
    run = transformers.LogitsProcessorList([processor.for_run(1), Add(1)])
    assert run(torch.zeros(1, 1).long(), scores).tolist() == [[1, -INF, 1, 1]]


def test_it_is_a_list():
    a, b = fl.SuppressFirstTokens([1]), Add(1)
    processors = fl.LogitsProcessorList([a])
    scores, ids = torch.zeros(1, 4), torch.zeros(1, 1).long()
    assert processors(ids, scores, prompt_length=1).tolist() == [[0, -INF, 0, 0]]
    processors.append(b)
    assert processors(ids, scores, prompt_length=1).tolist() == [[1, -INF, 1, 1]]
    processors[0] = fl.SuppressFirstTokens([2])
    assert processors(ids, scores, prompt_length=1).tolist() == [[1, 1, -INF, 1]]
    processors.pop(0)
    assert processors(ids, scores).tolist() == [[1, 1, 1, 1]]
    assert list(fl.LogitsProcessorList([a, b])) == [a, b]
    assert fl.LogitsProcessorList([a, b]) == [a, b]
    assert all(kept is a for kept in (*fl.LogitsProcessorList([a]),))
    assert a in fl.LogitsProcessorList([a])


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(twin):
    processors = fl.LogitsProcessorList([fl.SuppressFirstTokens(fl.TokenMask.from_ids([1], 4), blank=[2]), Add(1)])
    scores, ids = torch.zeros(1, 4), torch.zeros(1, 1).long()
    expected = processors(ids, scores, prompt_length=1)
    assert torch.equal(twin(processors)(ids, scores, prompt_length=1), expected)
    single = twin(processors[0])
    assert torch.equal(single.for_run(1)(ids, scores), processors[0].for_run(1)(ids, scores))


@pytest.mark.parametrize(
    "processor",
    [
        fl.TopKLogitsWarper(3), fl.TypicalLogitsWarper(0.5), fl.TemperatureLogitsWarper(0.5),
        fl.RepetitionPenaltyLogitsProcessor(2.0), fl.SuppressTokensLogitsProcessor([3]), fl.LogitNormalization(),
        fl.XTCLogitsProcessor(0.01, 1.0), fl.WatermarkLogitsProcessor(V, "cpu"), Add(1.0),
    ],
    ids=lambda processor: type(processor).__name__,
)  # fmt: skip
def test_a_call_leaves_its_input_and_apply_writes_it(processor):
    """Whatever part of a plan it becomes, alone and behind another one."""
    ids = torch.randint(0, V, (2, 7))
    for chain in ([processor], [fl.SuppressTokensLogitsProcessor([5]), processor]):
        plan, scores = fl.LogitsProcessorList(chain), torch.randn(2, V)
        before = scores.clone()
        expected = plan(ids, scores)
        assert torch.equal(scores, before)
        assert not torch.equal(expected, before)
        assert plan.apply_(ids, scores) is scores
        assert torch.equal(scores, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_place_only_the_result_is_rounded(dtype):
    """Behind a processor that returns another dtype all goes on in that."""

    def widened(input_ids, scores):
        return scores.float() * 1.001

    processors = fl.LogitsProcessorList(
        [fl.SuppressTokensLogitsProcessor([1]), widened, fl.TemperatureLogitsWarper(0.999), widened]
    )
    ids, scores = torch.zeros(2, 3, dtype=torch.int64), torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    scores = scores.to(dtype)
    expected = processors(ids, scores)
    assert expected.dtype == torch.float32
    assert processors.apply_(ids, scores) is scores
    assert torch.equal(scores, expected.to(dtype))


def test_processors_that_ask_for_more():
    processors = fl.LogitsProcessorList([AddFromKwargs()])
    scores, ids = torch.zeros(1, 2), torch.zeros(1, 1).long()
    assert processors(ids, scores, amount=3).tolist() == [[3, 3]]
    theirs = transformers.LogitsProcessorList([AddFromKwargs()])
    for each in (processors, theirs):
        with pytest.raises(ValueError, match="Make sure that all the required parameters"):
            each(ids, scores)


def test_each_processor_gets_what_it_asks_for_only():
    processors = fl.LogitsProcessorList([fl.SuppressFirstTokens([1]), AddFromKwargs()])
    processed = processors(torch.zeros(1, 1).long(), torch.zeros(1, 2), prompt_length=1, amount=3)
    assert processed.tolist() == [[3, -INF]]


def test_a_subclass_that_overrides_the_call_is_a_barrier():
    class Loud(fl.SuppressFirstTokens):
        def __call__(self, input_ids, scores):
            return self.for_run(1)(input_ids, scores) + 1

    processors = fl.LogitsProcessorList([Loud([0]), fl.SuppressFirstTokens([1])])
    assert processors(torch.zeros(1, 1).long(), torch.zeros(1, 3), prompt_length=1).tolist() == [[-INF, -INF, 1]]


def test_a_users_own_stage():
    from fastlogits.plan.stages import Ban

    class NoOddTokens(fl.StagedProcessor):
        def stage(self):
            return Ban(tuple(range(1, V, 2)))

    processors = fl.LogitsProcessorList([NoOddTokens(), fl.SuppressFirstTokens([0])])
    assert len(processors.plan.inner_parts) == 1
    assert NoOddTokens()(torch.zeros(1, 9).long(), torch.zeros(1, V))[0].isinf().nonzero().flatten().tolist() == list(
        range(1, V, 2)
    )
    banned = processors(torch.zeros(1, 1).long(), torch.zeros(1, V), prompt_length=1)[0].isinf()
    assert banned.nonzero().flatten().tolist() == [0, *range(1, V, 2)]


@pytest.mark.parametrize("on_device", [False, True])
def test_one_graph_for_a_compiler(on_device):
    """A compiler sees one registered operation and no break."""
    processors = fl.LogitsProcessorList([fl.SuppressFirstTokens([1]), fl.SuppressFirstTokens([40], window=2)])
    start = torch.tensor([3]) if on_device else 3
    run = processors.for_run(start)
    scores, ids = torch.randn(1, V), torch.zeros(1, 3).long()
    run(ids, scores)
    compiled = torch.compile(lambda ids, scores: run(ids, scores) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, scores), run(ids, scores) * 2)
    in_place = torch.compile(lambda ids, scores: run.apply_(ids, scores) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(in_place(ids, scores.clone()), run(ids, scores) * 2)
