"""The fold: stages of every kind in one pass, kernel against torch, on the host's positions and on the device's."""

import math

import pytest
import torch
from fastlogits_kernels.pointwise import fold as fold_kernels
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from hypothesis import given, settings
from hypothesis import strategies as st

import fastlogits as fl
from fastlogits.plan.plan import Plan
from fastlogits.plan.pointwise import Pointwise
from fastlogits.plan.row_values import RowValues
from fastlogits.plan.run import Run
from fastlogits.plan.stages import (
    AllowFrom,
    Ban,
    BanRange,
    Bias,
    Clean,
    Decay,
    Force,
    ForceRows,
    Given,
    History,
    LowerRepetitions,
    Member,
    Penalize,
    Repeated,
    RowBias,
    Scale,
    SequenceBias,
    When,
)

V = 77
# Triton's interpreter truncates to bfloat16, where the GPU rounds.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
INF = math.inf


class Kernels:
    """Both backends on the same tensors: torch, and Triton by its interpreter where there is no GPU."""

    def __init__(self, monkeypatch, device):
        self._monkeypatch, self._device = monkeypatch, device

    def torch(self, *arguments, **options):
        self._monkeypatch.setattr(fold_kernels, "FORCE_KERNEL", False)
        if self._device == "cuda":
            lost = torch.device("cuda", torch.cuda.current_device())
            self._monkeypatch.setitem(fold_kernels._OPERATION.lost, lost, "for this test")
        try:
            return fold(*arguments, **options)
        finally:
            self._monkeypatch.undo()

    def triton(self, *arguments, **options):
        self._monkeypatch.setattr(fold_kernels, "FORCE_KERNEL", True)
        try:
            return fold(*arguments, **options)
        finally:
            self._monkeypatch.undo()


@pytest.fixture
def kernels(device):
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Kernels(monkeypatch, device)


def fold(stages, input_ids, scores, run=None, in_place=False):
    return Pointwise([Member("stage", stage) for stage in stages])(input_ids, scores, run, in_place=in_place)


tokens = st.integers(0, V - 1)
some = st.lists(tokens, min_size=1, max_size=6, unique=True).map(tuple)
histories = st.builds(History, st.sampled_from(["all", "prompt", "generated"]), st.integers(0, 3))
texts = st.builds(
    lambda rows: Given(torch.tensor(rows)),
    st.lists(st.lists(st.integers(0, V - 1), min_size=5, max_size=5), min_size=1, max_size=2),
)
whens = st.builds(
    lambda of, start, long, period: When(of, start, None if long is None else (start or 0) + long, period, start or 0),
    st.sampled_from(["step", "length"]),
    st.none() | st.integers(0, 9),
    st.none() | st.integers(1, 4),
    st.integers(1, 2),
)
# Powers of two: dividing and multiplying by the reciprocal are then the same, on every backend.
factors = st.sampled_from([0.25, 0.5, 2.0, 4.0])
values = st.integers(-16, 16).map(lambda n: n / 8)
penalties = st.lists(st.integers(0, 8), min_size=1, max_size=4).map(
    lambda steps: (0.0, *(sum(steps[: n + 1]) / 8 for n in range(50)))
)


def row_values(scale, shift):
    """Values of each row, some of them 0: by its place, its last token and its step."""

    def computed(rows):
        step = torch.full((1, 1), rows.step, device=rows.device) if isinstance(rows.step, int) else rows.step
        place = torch.arange(rows.B, device=rows.device)
        return (place + rows.last().flatten().clamp(min=0) + step.flatten() - shift) * scale

    return RowValues(computed, "something")[0]


of_rows = st.builds(row_values, values, st.integers(0, 9))
ends = st.integers(0, V + 5) | st.builds(row_values, st.sampled_from([1.0, 8.0, 31.0, -5.0]), st.integers(-40, 9))
stages = st.one_of(
    st.builds(Ban, st.builds(Repeated, st.integers(1, 3), st.none(), st.just("prompt"))),
    st.builds(BanRange, ends, st.none() | ends),
    st.builds(Bias, histories, values, extra=some, rounds_once=st.booleans()),
    st.builds(Bias, st.builds(Repeated, st.integers(1, 3), st.none(), st.just("prompt")), values),
    st.builds(RowBias, some, of_rows),
    st.builds(ForceRows, some, of_rows),
    st.builds(Ban, some, st.none() | whens),
    st.builds(Ban, some, whens, some),
    st.builds(Ban, histories),
    st.builds(Ban, st.builds(Repeated, st.integers(1, 3), st.none() | texts)),
    st.builds(AllowFrom, st.just("prompt"), some, st.just((1,)), some),
    st.builds(Penalize, histories | texts, factors),
    st.builds(Scale, factors),
    st.builds(Bias, some, values, st.just(0.0), st.none() | whens),
    st.builds(Bias, histories, values, values),
    st.builds(Bias, texts, values),
    st.builds(LowerRepetitions, penalties, some, st.none() | st.integers(1, 9)),
    st.builds(
        lambda found: SequenceBias(tuple(found.items())),
        st.dictionaries(
            st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
            values | st.just(-INF),
            min_size=1,
            max_size=8,
        ),
    ),
    st.builds(lambda found: SequenceBias(tuple((ids, -INF) for ids in found)), st.sets(some, min_size=1, max_size=8)),
    st.builds(Decay, some, st.integers(0, 9), factors),
    st.builds(Force, some, whens),
    st.builds(Clean),
)


@settings(deadline=None, max_examples=80)
@given(
    chain=st.lists(stages, min_size=1, max_size=6).filter(
        lambda chain: sum(isinstance(s, AllowFrom) for s in chain) < 2
    ),
    shape=st.sampled_from([(2, 1, 1), (2, 7, 4), (4, 9, 5)]),
    dtype=st.sampled_from(DTYPES),
    on_device=st.booleans(),
    in_place=st.booleans(),
    odd=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_kernels_equal_torch(device, chain, shape, dtype, on_device, in_place, odd, seed):
    if not HAS_TRITON:
        pytest.skip("needs Triton")
    B, L, prompt = shape
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (B, L), generator=generator).to(device)
    scores = (torch.randint(-16, 16, (B, 2 * V), generator=generator) / 4).to(device, dtype)
    scores[0, :4] = torch.tensor([INF, -INF, math.nan, 0.0])
    scores = scores[:, :V] if odd else scores[:, :V].contiguous()
    run = Run(torch.full((B,), prompt, device=device), torch.tensor(L - 1, device=device)) if on_device else Run(prompt)
    with pytest.MonkeyPatch.context() as monkeypatch:
        backends = Kernels(monkeypatch, device)
        expected = backends.torch(chain, ids, scores, run)
        given_scores = scores.clone() if in_place else scores
        found = backends.triton(chain, ids, given_scores, run, in_place)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if in_place:
        assert found is given_scores


@pytest.mark.parametrize("of", ["step", "length"])
@pytest.mark.parametrize("phase", [0, 1, 2, 5])
def test_a_period_counts_from_its_phase(kernels, device, of, phase):
    chain, prompt = [Ban((3,), When(of, period=3, phase=phase))], 2
    for length in range(prompt, prompt + 7):
        ids, scores = torch.zeros(1, length, dtype=torch.int64, device=device), torch.zeros(1, 10, device=device)
        run = Run(torch.full((1,), prompt, device=device), torch.tensor(length - 1, device=device))
        index = length if of == "length" else length - prompt
        for found in (kernels.triton(chain, ids, scores, run), kernels.torch(chain, ids, scores, run)):
            assert bool(found[0, 3] == -INF) == ((index - phase) % 3 == 0), (length, found)


def test_positions_on_the_device_differ_by_row(kernels, device):
    """Rows of one buffer stand at different lengths, and what lies beyond a row's length doesn't count."""
    ids = torch.tensor([[1, 2, 3, 1, 9, 9], [1, 2, 1, 2, 1, 9], [5, 5, 5, 5, 5, 5]], device=device)
    lengths = [4, 5, 2]
    prompts = [1, 2, 2]
    chain = [
        Bias(History("prompt"), 1.5, extra=(1, 30)),
        Bias(Repeated(2, span="prompt"), 2.5),
        RowBias((14, 15), RowValues(lambda rows: rows.last() * 0.5, "half of the last token")[0]),
        BanRange(20, RowValues(lambda rows: 20 + rows.length + 0 * rows.last(), "the length")[0]),
        BanRange(RowValues(lambda rows: rows.last(2) + 40, "the token before", positioned=False)[0], 43),
        ForceRows((16,), RowValues(lambda rows: rows.last() == 5, "at token 5")[0]),
        Penalize(History("generated"), 2.0),
        Ban(Repeated(2)),
        SequenceBias((((1, 7), -INF), ((2, 1, 8), 3.0), ((6,), 1.0))),
        Ban((10,), When("step", stop=1)),
        Ban((11,), When("length", stop=5)),
        Decay((12,), 3, 2.0),
        Force((13,), When("length", 2, 3)),
        Bias(History("prompt"), 0.5, 0.25),
    ]
    scores = torch.arange(3 * V, device=device).reshape(3, V).float() - 100
    alone = [
        kernels.torch(chain, ids[i : i + 1, :n], scores[i : i + 1], Run(p))
        for i, (n, p) in enumerate(zip(lengths, prompts, strict=True))
    ]
    run = Run(torch.tensor(prompts, device=device), torch.tensor(lengths, device=device) - 1)
    for backend in (kernels.torch, kernels.triton):
        torch.testing.assert_close(backend(chain, ids, scores, run), torch.cat(alone), rtol=0, atol=0)


def test_rows_far_apart(kernels, device):
    """Offsets of rows may take more than 32 bits, also where each stride takes fewer."""
    apart = 2**30
    if device == "cpu":
        torch.utils.deterministic.fill_uninitialized_memory = False  # what nobody touches takes no memory
    wide = torch.empty(2 * apart + V, dtype=torch.float16, device=device)
    rows = wide.as_strided((3, V), (apart, 1))
    rows.copy_(torch.randn(3, V, generator=torch.Generator().manual_seed(0)))
    stages, ids = [Bias((1, 2), 0.5), Scale(2.0)], torch.zeros(3, 2, dtype=torch.int64, device=device)
    expected = kernels.torch(stages, ids, rows.contiguous())
    assert torch.equal(kernels.triton(stages, ids, rows), expected)
    assert torch.equal(kernels.triton(stages, ids, rows, in_place=True), expected)


def test_a_batch_of_another_size_has_its_own_texts():
    """Rows of a text are dealt out to the rows of the scores, anew for each number of these."""
    launch = Pointwise([Member("stage", Penalize(Given(torch.tensor([[1, 2], [3, 4]])), 2.0))])
    for B in (2, 4, 2):
        changed = launch(torch.zeros(B, 1, dtype=torch.int64), torch.ones(B, V)) != 1
        wanted = [[1, 2]] * (B // 2) + [[3, 4]] * (B // 2)
        assert [row.nonzero().flatten().tolist() for row in changed] == wanted


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 2500])
def test_long_histories(kernels, device, length):
    """More than one block of positions, and more than one range of words."""
    vocab_size = 32 * 1024 * 2 + 5
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, vocab_size, (2, length), generator=generator)
    ids[:, length // 2 :] = ids[:, : length - length // 2]  # so that n-grams repeat
    scores = torch.randn(2, vocab_size, generator=generator)
    chain = [
        Penalize(History("all"), 2.0),
        Ban(Repeated(3)),
        Bias(History("all"), 0.0, counted=0.5),
        SequenceBias((*(((i, i + 1), 1.0) for i in range(1500)), ((int(ids[0, -1]), 7), -2.0))),
    ]
    ids, scores = ids.to(device), scores.to(device)
    expected = kernels.torch(chain, ids, scores)
    assert not torch.equal(expected, scores)
    torch.testing.assert_close(kernels.triton(chain, ids, scores), expected, rtol=0, atol=0)


def test_bans_are_one_set_wherever_they_may_be():
    def sets(*stages):
        launch = Pointwise([Member("stage", stage) for stage in stages])
        launch(torch.zeros(1, 3).long(), torch.zeros(1, V), Run(1))
        chain = launch._last[3]
        return [op.kind for op in chain.ops].count(fold_kernels.BAN.value)

    assert sets(Ban((1,)), Scale(2.0), Ban(Repeated(2)), Penalize(History(), 2.0), Ban((2,), When("step", stop=3))) == 1
    assert sets(Ban((1,)), Clean(), Ban((2,))) == 2
    assert sets(Ban((1,)), Force((3,), When("length", 9, 10)), Ban((2,))) == 2
    assert sets(Ban((1,)), Scale(INF), Ban((2,))) == 2  # -inf / inf is NaN
    assert sets(Ban((1,)), Scale(-2.0), Ban((2,))) == 2  # -inf / -2 is inf
    assert sets(Ban((1,)), Penalize(History(), 0.0), Ban((2,))) == 2  # -inf * 0 is NaN


def test_bans_behind_one_gate_add_up():
    while_first = When("step", stop=3)
    chain = [Ban((1, 2), while_first), Scale(2.0), Ban((2, 3), while_first), Ban((4,), When("step", start=3))]
    for length, banned in ((3, [1, 2, 3]), (6, [4])):
        found = fold(chain, torch.zeros(1, length).long(), torch.ones(1, V), Run(3))
        assert found[0].isinf().nonzero().flatten().tolist() == banned


def test_two_divisions_round_twice(device, kernels):
    """A product of divisors would round once: not what one warper after the other makes."""
    scores = torch.randn(3, V, generator=torch.Generator().manual_seed(0)).to(device)
    chain, ids = [Scale(0.7), Scale(1.3)], torch.zeros(3, 2, dtype=torch.int64, device=device)
    expected = scores / 0.7 / 1.3
    assert not torch.equal(expected, scores / (0.7 * 1.3))
    assert torch.equal(kernels.torch(chain, ids, scores), expected)
    torch.testing.assert_close(kernels.triton(chain, ids, scores), expected, rtol=3e-7, atol=0)


def test_allowed_rows_on_both_sides_of_what_brings_scores_back():
    """Tokens that the first doesn't allow are back before the second is asked."""
    first, second = (AllowFrom(torch.tensor([ids]), (), (), ()) for ids in ([1, 2], [2, 3]))
    for between in (Clean(), Force((3,), When("step", 0))):
        members = [Member("stage", stage) for stage in (first, between, second)]
        found = Plan.compile(members)(torch.zeros(1, 3).long(), torch.ones(1, V), Run(3))
        wanted = torch.ones(1, V)
        for member in members:
            wanted = Pointwise([member])(torch.zeros(1, 3).long(), wanted, Run(3))
        assert torch.equal(found, wanted)
        assert found[0, 3] != -INF


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_history_as_long_as_the_prefix_of_an_ngram(kernels, device, size):
    """The shortest one that can repeat an n-gram of another text, and one token less."""
    text = Given(torch.tensor([[5, 6, 7, 8, 5, 6, 9]]))
    scores = torch.zeros(1, V, device=device)
    for length in range(max(1, size - 2), size + 1):
        ids = torch.tensor([[5, 6, 7][:length]], device=device)
        chain = [Ban(Repeated(size, text)), Bias((0,), 1.0)]
        found = kernels.triton(chain, ids, scores)
        assert torch.equal(found, kernels.torch(chain, ids, scores))
        ends = ids[0, length - size + 1 :].tolist() if length >= size - 1 else None
        texts = text.ids[0].tolist()
        banned = {texts[i] for i in range(size - 1, len(texts)) if texts[i - size + 1 : i] == ends}
        assert set((found[0] == -INF).nonzero().flatten().tolist()) == banned


def test_growth_leaves_what_is_not_finite(kernels, device):
    scores = torch.tensor([[INF, -INF, math.nan, -2.0, 0.0, *[1.0] * (V - 5)]], device=device)
    ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
    expected = kernels.torch([Decay((0, 1, 2, 3, 4), 1, 2.0)], ids, scores)
    assert expected[0, :5].nan_to_num(nan=77.0, posinf=88.0, neginf=99.0).tolist() == [88.0, 99.0, 77.0, 4.0, 0.0]
    found = kernels.triton([Decay((0, 1, 2, 3, 4), 1, 2.0)], ids, scores)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_growth_in_float64_at_a_position_of_the_device():
    scores = torch.tensor([[-2.0, 0.3, 1.0]], dtype=torch.float64)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    expected = fold([Decay((0, 1), 1, 1.2)], ids, scores)
    found = fold([Decay((0, 1), 1, 1.2)], ids, scores, Run(torch.tensor(0), torch.tensor([2])))
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


def test_each_map_rounds_as_a_kernel_of_its_own(kernels, device):
    """In float16 the sum of two small biases is not what one after the other makes."""
    scores = (torch.randn(3, V, generator=torch.Generator().manual_seed(0)) * 3).half().to(device)
    ids = torch.zeros(3, 2, dtype=torch.int64, device=device)
    first, second = 2**-10, 3 * 2**-11  # numbers of float16, to which torch rounds them on the CPU
    chain = [Bias(tuple(range(V)), first), Bias(tuple(range(V)), second), Scale(2.0)]
    expected = (scores + first + second) / 2
    assert not torch.equal(expected, (scores + (first + second)) / 2)
    assert torch.equal(kernels.torch(chain, ids, scores), expected)
    assert torch.equal(kernels.triton(chain, ids, scores), expected)


def test_a_list_that_does_nothing_at_a_step_returns_its_input():
    processors = fl.LogitsProcessorList(
        [fl.MinLengthLogitsProcessor(3, 1), fl.SuppressTokensAtBeginLogitsProcessor([2], 2)]
    )
    scores = torch.zeros(1, V)
    assert processors(torch.zeros(1, 9).long(), scores) is scores
    assert processors(torch.zeros(1, 2).long(), scores)[0, :3].tolist() == [0, -INF, -INF]


def test_other_shapes_go_to_transformers_and_gradients_through_torch(monkeypatch):
    monkeypatch.setattr(fold_kernels, "FORCE_KERNEL", HAS_TRITON)  # kernels have no gradients
    processors = fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), fl.SuppressTokensLogitsProcessor([1])])
    assert processors(None, torch.ones(3)).tolist() == [2, -INF, 2]
    assert processors(None, torch.ones(1, 1, 3)).tolist() == [[[2, -INF, 2]]]
    scores = torch.ones(1, 3, requires_grad=True)
    processors(None, scores)[0, 0].backward()
    assert scores.grad.tolist() == [[2, 0, 0]]


def test_double_precision():
    scores = torch.randn(2, V, dtype=torch.float64)
    found = fl.TemperatureLogitsWarper(0.7)(None, scores)
    assert found.dtype == torch.float64
    assert torch.equal(found, scores / 0.7)


def test_an_attribute_set_later_counts():
    processor = fl.TemperatureLogitsWarper(0.5)
    processors = fl.LogitsProcessorList([processor, fl.SuppressTokensAtBeginLogitsProcessor([0], 5)])
    ids, scores = torch.zeros(1, 3).long(), torch.ones(1, 2)
    assert processors(ids, scores).tolist() == [[2, 2]]
    processor.temperature = 0.25
    processors[1].set_begin_index(3)
    assert processor(ids, scores).tolist() == [[4, 4]]
    assert processors(ids, scores).tolist() == [[-INF, 4]]


def test_guidance_in_place_is_refused():
    processors = fl.LogitsProcessorList([fl.ClassifierFreeGuidanceLogitsProcessor(2.0)])
    with pytest.raises(ValueError, match="in place"):
        processors.apply_(torch.zeros(1, 3).long(), torch.zeros(2, V))


def test_a_tensor_of_another_batch_size_is_refused():
    try:
        processor = fl.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([1, 2]))
    except (ValueError, RuntimeError):
        pytest.skip("this version of transformers takes no tensor")
    with pytest.raises(ValueError, match="prompt_ignore_length"):
        processor(torch.zeros(3, 4).long(), torch.zeros(3, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_ids_that_are_no_integers_are_refused(dtype):
    """They would be cut to integers, and tokens be banned that were never there."""
    ids = torch.tensor([[1.9, 2.2, 1.1]]).to(dtype)
    for processors in ([fl.NoRepeatNGramLogitsProcessor(2)], [fl.PresencePenaltyLogitsProcessor(1.5)]):
        with pytest.raises(ValueError, match=f"input_ids must be int32 or int64.*got {dtype}"):
            fl.LogitsProcessorList(processors)(ids, torch.zeros(1, V))
        with pytest.raises(ValueError, match=f"input_ids must be int32 or int64.*got {dtype}"):
            fl.sample(torch.zeros(1, V), processors, seeds=1, positions=0, input_ids=ids)


def test_one_operation_for_a_compiler(device):
    processors = fl.LogitsProcessorList(
        [fl.RepetitionPenaltyLogitsProcessor(1.3), fl.NoRepeatNGramLogitsProcessor(2), fl.TemperatureLogitsWarper(0.7)]
    )
    plan = processors.plan
    ids, scores = torch.randint(0, 9, (2, 8), device=device), torch.randn(2, V, device=device)
    expected = plan(ids, scores)
    compiled = torch.compile(lambda ids, scores: plan(ids, scores) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, scores), expected * 2)
    in_place = torch.compile(
        lambda ids, scores: plan(ids, scores, in_place=True) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(in_place(ids, scores.clone()), expected * 2)


def test_opcheck(device):
    processors = fl.LogitsProcessorList(
        [fl.RepetitionPenaltyLogitsProcessor(1.3), fl.SuppressTokensLogitsProcessor([3])]
    )
    ids, scores = torch.randint(0, 9, (2, 8), device=device), torch.randn(2, V, device=device)
    processors(ids, scores)
    chain = processors.plan.inner_parts[0]._last[3]
    for operation in (torch.ops.fastlogits.fold.default, torch.ops.fastlogits.fold_.default):
        torch.library.opcheck(operation, (scores.clone(), chain.handle, ids), {"cache_offset": 7})


def test_a_plan_goes_on_without_its_list(device):
    """A registered operation finds its chain by a handle, which lives as long as the plan."""
    plan = Plan.compile([Member("one", Scale(2.0)), Member("two", Ban((1,), When("length", stop=9)))])
    ids, scores = torch.zeros(1, 3, device=device).long(), torch.ones(1, 3, device=device)
    compiled = torch.compile(plan, fullgraph=True, backend="aot_eager")
    plan(ids, scores)
    assert compiled(ids, scores).tolist() == [[0.5, -INF, 0.5]]


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_one_graph_for_every_step():
    """Captured once over a buffer and a position on the device, replayed at other steps on other tokens and logits."""
    processors = fl.LogitsProcessorList(
        [
            fl.RepetitionPenaltyLogitsProcessor(1.3),
            fl.NoRepeatNGramLogitsProcessor(2),
            fl.SequenceBiasLogitsProcessor({(1, 2): 1.5, (3,): -2.0}),
            fl.FrequencyPenaltyLogitsProcessor(0.5),
            fl.SuppressFirstTokens([4]),
            fl.MinLengthLogitsProcessor(9, 5),
            fl.ExponentialDecayLengthPenalty((2, 1.5), 6, 5),
            fl.TemperatureLogitsWarper(0.7),
        ]
    )
    B, longest = 3, 16
    buffer = torch.zeros(B, longest, dtype=torch.int64, device="cuda")
    position = torch.zeros(B, dtype=torch.int64, device="cuda")
    scores = torch.zeros(B, V, device="cuda")
    start = torch.full((B,), 5, device="cuda")
    run = processors.for_run(prompt_length=start, cache_position=position)
    run(buffer, scores)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            out = run(buffer, scores)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for length in (5, 6, 8, 12):
        buffer.random_(0, 7)
        scores.normal_()
        position.fill_(length - 1)
        graph.replay()
        expected = processors(buffer[:, :length], scores, prompt_length=5)
        assert torch.equal(out, expected), length


@needs_gpu
def test_more_than_two_to_the_31_elements():
    B, vocab_size = 66_000, 33_000
    scores = torch.ones(B, vocab_size, dtype=torch.bfloat16, device="cuda")
    ids = torch.zeros(B, 2, dtype=torch.int64, device="cuda")
    ids[-1] = vocab_size - 1
    chain = [Penalize(History(), 2.0), Bias(History(), 0.0, counted=1.0), Scale(2.0)]
    found = fold(chain, ids, scores)
    assert found[0, :2].tolist() == [1.25, 0.5]
    assert found[-1, -2:].tolist() == [0.5, 1.25]
    assert found[-1, 0] == 0.5


# -- Repetitions -------------------------------------------------------------------------------------------------------


PENALTIES = tuple(0.0 if n < 1 else 0.5 * 2.0 ** (n - 1) for n in range(51))


def test_repetitions_are_lowered_within_the_pass(kernels, device):
    """Rows that end at other places of the same ids, between two maps, in each dtype, with a stride and in place."""
    ids = torch.tensor([[5, 1, 2, 3, 9, 1, 2, 3, 1, 2], [7, 7, 7, 7, 7, 7, 80, 7, -1, 7]], device=device)
    stages = [Scale(2.0), LowerRepetitions(PENALTIES, (9,)), Bias((3,), 1.0)]
    for length in (torch.tensor([10, 6], device=device), torch.tensor([8, 8], device=device), 10):
        run = Run(length, 2) if isinstance(length, torch.Tensor) else None
        for dtype in DTYPES:
            wide = torch.randn(2, V + 9, device=device).to(dtype)
            scores = wide[:, 5 : 5 + V]
            expected = kernels.torch(stages, ids, scores, run and Run(length - 1, 2))
            found = kernels.triton(stages, ids, scores, run and Run(length - 1, 2))
            assert torch.equal(found, expected)
            assert not torch.equal(expected, kernels.torch([stages[0], stages[2]], ids, scores))
            assert torch.equal(kernels.triton(stages, ids, scores, run and Run(length - 1, 2), in_place=True), expected)


def test_penalties_of_repetitions_do_not_add_up(kernels, device):
    """The largest counts, whatever the plane held before; ids outside the vocabulary match, and get nothing."""
    ids = torch.tensor([[90, 4, 6, 90, 4, 6, 3, 90, 4]], device=device)
    stages = [LowerRepetitions(PENALTIES, ()), LowerRepetitions(PENALTIES, (4,)), LowerRepetitions(PENALTIES, (6,), 3)]
    scores = torch.zeros(1, V, device=device)
    for run in (kernels.torch, kernels.triton):
        found = run(stages[:1], ids, scores)
        assert found.nonzero().tolist() == [[0, 6]]
        assert found[0, 6] == -1.0  # two tokens, of which one is in no vocabulary
        assert not run(stages[1:], ids, scores).any()


def test_a_repetition_is_not_matched_beyond_the_first_token(kernels, device):
    ids = torch.tensor([[-1, 3, -2, 3], [3, 3, 3, 3], [-2, -1, -2, -1]], device=device)
    scores = torch.zeros(3, V, device=device)
    for run in (kernels.torch, kernels.triton):
        found = run([LowerRepetitions(PENALTIES, ())], ids, scores)
        assert found.nonzero().tolist() == [[1, 3]]
        assert found[1, 3] == -2.0


def test_a_breaker_matches_no_id_that_is_negative(kernels, device):
    ids = torch.tensor([[-1, 5, 3], [-5, 5, -5]], device=device)
    for run in (kernels.torch, kernels.triton):
        found = run([LowerRepetitions(PENALTIES, (0, 3))], ids, torch.zeros(2, V, device=device))
        assert found.nonzero().tolist() == [[1, 5]]
