"""fastlogits beside transformers' own objects: every class, at random, and chains of them, one by one against fused."""

import copy
import inspect
import math
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.generation.logits_process as reference
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastlogits as fl
from tests import entries
from tests.entries import ENTRIES, Case, build

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATH = "torch" if DEVICE == "cpu" else "kernels"
NAMES = entries.names()
PRESENT = entries.kinds(lambda entry: True)
# Defined by a function of the user's, and by torch's generator, which the host seeds.
ON_THE_HOST = ("PrefixConstrainedLogitsProcessor", "WatermarkLogitsProcessor")
VOCABS = st.sampled_from([1, 2, 31, 32, 33, 64, 100, 150]) | st.integers(1, 150)
RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck)}
# Triton's interpreter is slow, and a second implementation of what the examples before it have shown right.
KERNEL_EXAMPLES = 8

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),  # NaN in Triton's interpreter
]


@dataclass
class Inputs:
    """What a processor is called with, step after step."""

    ids: list[torch.Tensor]
    scores: list[torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def _validated_distributions():
    """``torch.compile`` turns this off for all that follows; transformers then takes rows that it refuses otherwise."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(True)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


@pytest.fixture
def kernels(monkeypatch) -> str:
    """The kernels process the scores: on the GPU as always, on the CPU in the interpreter."""
    if DEVICE == "cpu":
        fold = pytest.importorskip("fastlogits_kernels.pointwise.fold")
        if not hasattr(fold, "FORCE_KERNEL") or os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("no way to run the kernels on the CPU")
        monkeypatch.setattr(fold, "FORCE_KERNEL", True)
    return "kernels"


# -- Inputs --------------------------------------------------------------------------------------------------------


def draw_layout(draw, values: torch.Tensor, fill: float) -> torch.Tensor:
    """The same values in memory as ``generate`` may hand them on: a slice of rows, of steps, or of columns."""
    B, n = values.shape
    layout = draw(st.sampled_from(["plain", "plain", "rows", "steps", "columns"]))
    if layout == "rows":
        wide = values.new_full((B, n + 7), fill)
        values = wide[:, 3 : n + 3].copy_(values)
    if layout == "steps":
        steps = values.new_full((B, 3, n), fill)
        values = steps[:, -1].copy_(values)
    if layout == "columns":
        values = values.t().contiguous().t()
    return values


def draw_scores(draw, rows, V, dtype, special=True, nan=True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(rows, V, generator=generator) * draw(st.sampled_from([0.1, 1.0, 3.0, 30.0]))
    if special:
        if draw(st.sampled_from([False, False, True])):
            scores = (scores * 2).round() / 2  # ties
        for value in (entries.NEGATIVE_INFINITY, float("nan"), float("inf"), 0.0, -0.0):
            if draw(st.integers(0, 4)) == 0 and (nan or value == value):
                share = draw(st.sampled_from([1 / V, 0.1, 0.9]))
                scores[torch.rand(rows, V, generator=generator) < share] = value
        if draw(st.integers(0, 5)) == 0:
            scores[draw(st.integers(0, rows - 1))] = draw(st.sampled_from([entries.NEGATIVE_INFINITY, 1.5, 0.0]))
    return draw_layout(draw, scores.to(dtype).to(DEVICE), float("nan"))


def draw_ids(draw, B, V, L, beyond=True, dtype=torch.int64) -> torch.Tensor:
    """A history of few or many different tokens, some of them perhaps outside the vocabulary.

    Not on a GPU: where transformers has no such token, that ends what the process may do there.
    """
    outside = [V + 3] if beyond and DEVICE == "cpu" else []
    alphabet = draw(st.sampled_from([min(2, V), min(4, V), V, *outside]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.randint(0, alphabet, (B, L), generator=generator).to(dtype).to(DEVICE)
    return draw_layout(draw, ids, 0)


def draw_case(draw, least_vocab=1) -> Case:
    V = draw(VOCABS.filter(lambda V: least_vocab <= V))
    return Case(draw(st.integers(1, 5)), V, draw(st.sampled_from([0, 1, 2, 5, 12, 40])), DEVICE)


def draw_dtype(draw, path) -> torch.dtype:
    # The kernels reckon in float32.
    wide = [torch.float64] if path == "torch" else []
    return draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, *wide]))


def draw_steps(draw, case, steps, rows=1, dtype=torch.float32, special=True, nan=True, beyond=True) -> Inputs:
    """A run of several steps: each history is the one before with a token more."""
    ids = [draw_ids(draw, case.B, case.V, case.L, beyond)]
    for _ in range(steps - 1):
        new = draw_ids(draw, case.B, case.V, 1, beyond)
        ids.append(torch.cat([ids[-1], new], 1))
    return Inputs(ids, [draw_scores(draw, case.B * rows, case.V, dtype, special, nan) for _ in range(steps)])


# -- Comparison ----------------------------------------------------------------------------------------------------


def same(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Where two tensors agree: equal, or NaN both. The sign of a zero doesn't count."""
    return (first == second) | (first.isnan() & second.isnan())


def close(found: torch.Tensor, expected: torch.Tensor, ulps: float) -> torch.Tensor:
    """Where two tensors agree within some units in the last place, or within as many of 1; infinities exactly."""
    eps = torch.finfo(expected.dtype).eps
    wide, exact = found.double(), expected.double()
    near = (wide - exact).abs() <= ulps * eps * exact.abs().clamp(min=1.0)
    return near | same(found, expected)


def rounding(dtype: torch.dtype) -> float:
    """How far a sum of probabilities may be off: transformers adds them up in the dtype of the scores."""
    return 1e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps


def undecided(name, arguments, ids, scores) -> torch.Tensor:
    """Which tokens transformers' own class keeps or drops as rounding will have it, bool ``[B, V]``.

    Those whose fate changes in float64 when the boundary moves by a rounding error either way, or the scores do.
    """
    boundary = ENTRIES[name].boundary
    value = arguments.get(boundary)
    found = torch.zeros_like(scores, dtype=torch.bool)
    if not boundary or value is None:
        return found
    off = rounding(scores.dtype)
    kept = []
    generator = torch.Generator().manual_seed(0)
    for moved in (value, value * (1 - off) - off * 1e-2, value * (1 + off) + off * 1e-2, value - off, value + off):
        if boundary in ("top_p", "mass", "top_h", "min_p"):
            moved = min(1.0 if boundary != "mass" else 1 - 1e-12, max(moved, 0.0 if boundary != "top_h" else 1e-12))
        if boundary in ("mass", "epsilon", "min_eos_p"):
            moved = min(max(moved, 1e-12), 1 - 1e-12)
        processor = build(reference, name, {**arguments, boundary: moved})
        for _ in range(2 if boundary in ("mass", "top_h") else 1):
            noise = torch.randn(scores.shape, generator=generator).to(scores.device) * off / 100
            shifted = scores.double()
            kept.append(~same(processor(ids, shifted), shifted))
            kept.append(~same(processor(ids, shifted + noise), shifted + noise))
    for each in kept:
        found |= each != kept[0]
    if boundary == "top_h":
        found |= undecided_of_entropy(value, scores)
    # Which of several equal scores it is that stays is up to a sort.
    return (scores.unsqueeze(2) == torch.where(found, scores, math.nan).unsqueeze(1)).any(2) | found


def undecided_of_entropy(top_h, scores) -> torch.Tensor:
    """The same of top-h, whose entropy may be smaller than what it is rounded by.

    transformers subtracts the logarithm of a sum from logits, as far as their dtype goes.
    """
    top, tokens = scores.double().sort(descending=True)
    p = top[:, :100].softmax(-1)
    sums = torch.where(p > 0, -p * p.log(), 0.0).cumsum(-1)
    largest = torch.where(top.isfinite(), top, 0.0).abs().amax(-1, keepdim=True)
    off = torch.finfo(scores.dtype).eps * (1 + largest)
    near = (sums - top_h * sums[:, -1:]).abs() <= off
    near[:, 0] = False
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, tokens[:, :100], near)


def ordered_by(name, scores) -> torch.Tensor:
    """What transformers' own truncation sorts, ``[B, V]``: equal for tokens that it takes for equal."""
    if name == "TypicalLogitsWarper":  # beside a token that has all the probability, all others are equally far
        logs = scores.log_softmax(-1)
        return (-logs + (logs.exp() * logs).nansum(-1, keepdim=True)).abs()
    if name == "MinPLogitsWarper":  # many are 0 where the dtype holds nothing that small
        return scores.softmax(-1)
    return scores


def but_for_ties(name, found, expected, scores, right) -> torch.Tensor:
    """Rows bool ``[B, 1]`` that differ in which of some tokens that are taken for equal are kept, not in how many.

    transformers leaves that to a sort that is not stable, or to ``topk``.
    """
    order = ordered_by(name, scores).double()
    # What is dropped is filled alike; NaN stands for what is kept.
    fills = [torch.where(same(each, scores), math.nan, each.double()) for each in (found, expected)]
    alike = same(*(torch.sort(each, -1).values for each in fills)).all(-1)
    low, high = (torch.where(right, fill, order) for fill in (float("inf"), -float("inf")))
    return (alike & (low.amin(-1) == high.amax(-1))).unsqueeze(-1)


def splits_ties(name, scores, processed) -> bool:
    """Whether of some tokens that a truncation takes for equal some were kept and some dropped."""
    order = ordered_by(name, scores)
    for row, kept in zip(order.tolist(), same(processed, scores).tolist(), strict=True):
        fates = {}
        for value, fate in zip(row, kept, strict=True):
            if fates.setdefault(value, fate) != fate:
                return True
    return False


def prepared(processor: Any, case: Case) -> Any:
    if isinstance(processor, reference.WhisperNoSpeechDetection):
        processor.set_model(entries.SpeechModel(case.B, case.V, case.device))
        processor.set_inputs({"inputs": torch.zeros(case.B, 1)})
    return processor


def call(processor, ids, scores):
    """The result, or the exception; transformers warns of what it does anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return processor(ids, scores), None
        except Exception as error:  # whatever transformers raises, the other must too
            return None, error


def check(name, arguments, case, ids, scores, found, expected, path):
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert found.device == expected.device
    agreement = ENTRIES[name].agreement
    if agreement == "close":
        right = close(found, expected, 16)
    elif path == "torch":
        right = same(found, expected)
    else:
        right = close(found, expected, ENTRIES[name].ulps)
    if not right.all() and agreement == "truncation":
        right |= but_for_ties(name, found, expected, scores, right)
    if not right.all() and agreement == "truncation":
        right |= undecided(name, arguments, ids, scores)
    assert right.all(), (
        f"{int((~right).sum())} wrong, at {(~right).nonzero()[:5].tolist()}: "
        f"{found[~right][:5].tolist()} instead of {expected[~right][:5].tolist()}"
    )


def unwritten(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    return bool(same(tensor, before).all())


def parameters(made) -> list[tuple]:
    """Those of a constructor, but for what their annotations say."""
    return [(each.name, each.kind, each.default) for each in inspect.signature(made).parameters.values()]


# -- Names ---------------------------------------------------------------------------------------------------------


def test_every_class_of_transformers_is_in_the_zoo():
    assert [name for name in NAMES if name not in ENTRIES] == []


@pytest.mark.parametrize("name", [*NAMES, "LogitsProcessor", "LogitsProcessorList"])
def test_the_name_stands_for_a_subclass_with_the_same_constructor(name):
    ours, theirs = getattr(fl, name), getattr(reference, name)
    assert issubclass(ours, theirs)
    assert parameters(ours) == parameters(theirs)
    assert name in fl.__all__
    if ours is not theirs:
        assert ours.__module__.startswith("fastlogits.")
        assert ours.__name__ == name
        assert ours.__doc__ != theirs.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_transformers_sees_a_call_of_two_parameters(name):
    assert len(inspect.signature(getattr(fl, name).__call__).parameters) == 3  # with self


# -- One class -----------------------------------------------------------------------------------------------------


def run_one(data, name, path, steps, dtype=None, beyond=True):
    draw, entry = data.draw, ENTRIES[name]
    case = draw_case(draw, entry.least_vocab)
    arguments = entry.draw(draw, case)
    dtype = dtype or draw_dtype(draw, path)
    inputs = draw_steps(draw, case, steps, entry.rows, dtype, nan=entry.nan, beyond=beyond)
    ours, theirs = (prepared(build(module, name, arguments), case) for module in (fl, reference))
    for ids, scores in zip(inputs.ids, inputs.scores, strict=True):
        expected, error = call(theirs, ids.clone(), scores.clone())
        assume(error is None and not entries.was_corrected(name, arguments, ids, scores))
        before = ids.clone(), scores.clone()
        found = ours(ids, scores)
        check(name, arguments, case, ids, scores, found, expected, path)
        assert unwritten(ids, before[0]), "input_ids were written"
        assert unwritten(scores, before[1]), "the scores were written"
        for attribute in entry.reads:
            pair = [torch.as_tensor(getattr(side, attribute)) for side in (ours, theirs)]
            assert close(pair[0].double(), pair[1].double(), 1e9).all()


@pytest.mark.parametrize("name", PRESENT)
@settings(max_examples=30, **RELAXED)
@given(data=st.data())
def test_one_class(name, data):
    run_one(data, name, PATH, data.draw(st.sampled_from([1, 3])))


@pytest.mark.parametrize("name", PRESENT)
def test_one_class_by_its_kernels(name, kernels):
    @settings(max_examples=KERNEL_EXAMPLES, **RELAXED)
    @given(data=st.data())
    def run(data):
        run_one(data, name, kernels, 1)

    run()


@pytest.mark.parametrize("name", PRESENT)
@settings(max_examples=8, **RELAXED)
@given(data=st.data())
def test_int32_ids_where_transformers_takes_them(name, data):
    draw, entry = data.draw, ENTRIES[name]
    case = draw_case(draw, entry.least_vocab)
    arguments = entry.draw(draw, case)
    ids = draw_ids(draw, case.B, case.V, case.L, dtype=torch.int32)
    scores = draw_scores(draw, case.B * entry.rows, case.V, torch.float32, nan=entry.nan)
    ours, theirs = (prepared(build(module, name, arguments), case) for module in (fl, reference))
    expected, error = call(theirs, ids.clone(), scores.clone())
    assume(error is None and not entries.was_corrected(name, arguments, ids, scores))
    check(name, arguments, case, ids, scores, ours(ids, scores), expected, PATH)


def test_what_an_entropy_leaves_undecided():
    """transformers' own class isn't held to what it can't tell itself, and to all that it can."""
    generator = torch.Generator().manual_seed(0)
    for scale in (1.0, 30.0):
        for top_h in (0.5, 1.0):
            scores = torch.randn(200, 8, generator=generator) * scale
            arguments = {"top_h": top_h, "filter_value": -1e4}
            processor = build(reference, "TopHLogitsWarper", arguments)
            fates = [same(processor(None, each), each) for each in (scores, scores.double())]
            open_ones = undecided("TopHLogitsWarper", arguments, None, scores)
            assert not (fates[0] ^ fates[1])[~open_ones].any()
            if scale == 1:  # with all of the entropy the least likely token is up to rounding, and no other
                assert open_ones.sum(1).float().mean() < 1.05 * (top_h == 1) + 0.05
    assert (fates[0] ^ fates[1]).any()


@pytest.mark.parametrize("name", PRESENT)
@settings(max_examples=4, **RELAXED)
@given(data=st.data())
def test_a_copy_and_a_pickle_of_a_used_one(name, data):
    draw, entry = data.draw, ENTRIES[name]
    case = draw_case(draw, entry.least_vocab)
    arguments = entry.draw(draw, case)
    inputs = draw_steps(draw, case, 2, entry.rows, nan=entry.nan, beyond=False)
    ours, theirs = (prepared(build(module, name, arguments), case) for module in (fl, reference))
    for side in (theirs, ours):
        _, error = call(side, inputs.ids[0].clone(), inputs.scores[0].clone())
        assume(error is None)
    copies = [copy.copy(ours) if not entry.stateful else copy.deepcopy(ours)]
    if name not in ("WatermarkLogitsProcessor",):  # holds a generator, which torch can neither copy nor pickle
        copies += [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))] if _pickles(theirs) else []
    expected, error = call(theirs, inputs.ids[1].clone(), inputs.scores[1].clone())
    assume(error is None and not entries.was_corrected(name, arguments, inputs.ids[1], inputs.scores[1]))
    for each in copies:
        found = each(inputs.ids[1], inputs.scores[1])
        check(name, arguments, case, inputs.ids[1], inputs.scores[1], found, expected, "kernels")


def _pickles(processor) -> bool:
    try:
        pickle.dumps(processor)
    except Exception:  # a local class or a generator
        return False
    return True


# -- Chains --------------------------------------------------------------------------------------------------------


def draw_chain(draw, case, most=6, chosen=None):
    """Names of up to six classes in any order; one that halves the rows can only come first."""
    pool = [name for name in (chosen or PRESENT) if ENTRIES[name].least_vocab <= case.V]
    halving = [name for name in pool if ENTRIES[name].rows == 2]
    pool = [name for name in pool if ENTRIES[name].rows == 1]
    chain = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=most))
    if halving and draw(st.integers(0, 9)) == 0:
        chain[0] = draw(st.sampled_from(halving))
    return [(name, ENTRIES[name].draw(draw, case)) for name in chain]


def one_by_one(chain, theirs, ids, scores) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """What transformers' objects are given and make of it, each in turn; None where they refuse or were corrected."""
    given, stages = scores.clone(), []
    for link, processor in zip(chain, theirs, strict=True):
        made, error = call(processor, ids.clone(), given.clone())
        if error is not None or entries.was_corrected(*link, ids, given):
            return None
        stages.append((given, made))
        given = made.clone()
    return stages


def check_chain(chain, case, stages, ids, scores, ours, path) -> bool:
    """Whether a chain in one call is those ``stages``; False where rounding decides, and an error where it differs."""
    expected = stages[-1][1] if stages else scores
    sums = any(ENTRIES[name].agreement == "close" for name, _ in chain)
    before = ids.clone(), scores.clone()
    found = ours(ids, scores)
    assert unwritten(ids, before[0]), "input_ids were written"
    assert unwritten(scores, before[1]), "the scores were written"
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if path == "torch" and not sums:
        right = same(found, expected)
    else:
        right = close(found, expected, (32 if sums else 2) * len(chain))
    if not right.all():
        # A token within rounding of a boundary may fall on either side of it, and then all that follows differs.
        for (name, arguments), (given, made) in zip(chain, stages, strict=True):
            if ENTRIES[name].agreement == "truncation" and (
                splits_ties(name, given, made) or undecided(name, arguments, ids, given).any()
            ):
                return False
    assert right.all(), (
        f"{[name for name, _ in chain]}: {int((~right).sum())} wrong, at {(~right).nonzero()[:5].tolist()}: "
        f"{found[~right][:5].tolist()} instead of {expected[~right][:5].tolist()}"
    )
    return True


def run_chain(data, path, dtype=None, most=6, steps=None):
    draw = data.draw
    case = draw_case(draw)
    chain = draw_chain(draw, case, most)
    rows = ENTRIES[chain[0][0]].rows
    dtype = dtype or draw_dtype(draw, path)
    steps = steps or draw(st.sampled_from([1, 1, 3]))
    inputs = draw_steps(draw, case, steps, rows, dtype, special=draw(st.booleans()))
    # The plan takes transformers' own objects too, and a list may hold some of each.
    whose = [draw(st.sampled_from([fl, fl, reference])) for _ in chain]
    theirs = [prepared(build(reference, *link), case) for link in chain]
    ours = fl.LogitsProcessorList(
        [prepared(build(module, *link), case) for module, link in zip(whose, chain, strict=True)]
    )
    for ids, scores in zip(inputs.ids, inputs.scores, strict=True):
        stages = one_by_one(chain, theirs, ids, scores)
        assume(stages is not None)
        assume(check_chain(chain, case, stages, ids, scores, ours, path))


@settings(max_examples=200, **RELAXED)
@given(data=st.data())
def test_chains(data):
    run_chain(data, PATH)


def test_chains_by_the_kernels(kernels):
    @settings(max_examples=4 * KERNEL_EXAMPLES, **RELAXED)
    @given(data=st.data())
    def run(data):
        run_chain(data, kernels, steps=1)

    run()


@settings(max_examples=40, **RELAXED)
@given(data=st.data())
def test_a_list_of_transformers_own_objects(data):
    """The plan adopts them, as if they were ours; that the result is the same is seen by the chains above."""
    draw = data.draw
    case = draw_case(draw)
    chain = draw_chain(draw, case)
    mine, theirs = ([prepared(build(module, *link), case) for link in chain] for module in (fl, reference))
    # Those of n-grams keep no source, but what they found in it.
    adopted, own = (re.sub(r"shape \(.*?\)", "", fl.LogitsProcessorList(each).explain()) for each in (theirs, mine))
    assert adopted == own


# -- Exceptions ----------------------------------------------------------------------------------------------------

ENCODER = torch.tensor([[1, 2, 3]])
BAD_ARGUMENTS = {
    "MinLengthLogitsProcessor": [
        {"min_length": -1, "eos_token_id": 0}, {"min_length": 1.5, "eos_token_id": 0},
        {"min_length": 1}, {"min_length": 1, "eos_token_id": "a"}, {"min_length": 1, "eos_token_id": None},
    ],
    "MinNewTokensLengthLogitsProcessor": [
        {"prompt_length_to_skip": -1, "min_new_tokens": 1, "eos_token_id": 0},
        {"prompt_length_to_skip": 1, "min_new_tokens": -1, "eos_token_id": 0},
        {"prompt_length_to_skip": 1, "min_new_tokens": 0.5, "eos_token_id": 0},
        {"prompt_length_to_skip": 1, "min_new_tokens": 2},
    ],
    "TemperatureLogitsWarper": [
        {"temperature": value} for value in (0.0, -1.0, 1, None, "a", float("nan"), torch.tensor(1.0))
    ],
    "RepetitionPenaltyLogitsProcessor": [
        *({"penalty": value} for value in (0.0, -1.0, 1, None, float("nan"))),
        {"penalty": 1.1, "prompt_ignore_length": -1},
        {"penalty": 1.1, "prompt_ignore_length": torch.zeros(1, 2, dtype=torch.int64)},
    ],
    "EncoderRepetitionPenaltyLogitsProcessor": [
        {"penalty": value, "encoder_input_ids": ENCODER} for value in (0.0, -2.0, 1, None)
    ],
    "TopPLogitsWarper": [
        *({"top_p": value} for value in (-0.1, 1.1, None, "a", [0.5])),
        *({"top_p": 0.5, "min_tokens_to_keep": value} for value in (0, -1, 1.0, None)),
    ],
    "TopKLogitsWarper": [
        *({"top_k": value} for value in (0, -1, 1.5, None, "a")), {"top_k": 1, "min_tokens_to_keep": None},
    ],
    "TopHLogitsWarper": [{"top_h": value} for value in (0.0, -1.0, 1.1, None, float("nan"))],
    "MinPLogitsWarper": [
        *({"min_p": value} for value in (-0.1, 1.1, None, float("nan"))),
        *({"min_p": 0.1, "min_tokens_to_keep": value} for value in (0, 1.0, None)),
    ],
    "TypicalLogitsWarper": [
        *({"mass": value} for value in (0.0, 1.0, -1, 2, None, float("nan"))),
        *({"mass": 0.9, "min_tokens_to_keep": value} for value in (0, 1.0)),
    ],
    "EpsilonLogitsWarper": [
        *({"epsilon": value} for value in (0.0, 1.0, -1, None)),
        *({"epsilon": 0.1, "min_tokens_to_keep": value} for value in (0, -1, None, "a")),
    ],
    "EtaLogitsWarper": [
        *({"epsilon": value} for value in (0.0, 1.0, -1, None)),
        *({"epsilon": 0.1, "min_tokens_to_keep": value} for value in (0, -1, None)),
    ],
    "NoRepeatNGramLogitsProcessor": [{"ngram_size": value} for value in (0, -1, 1.5, None)],
    "EncoderNoRepeatNGramLogitsProcessor": [
        *({"encoder_ngram_size": value, "encoder_input_ids": ENCODER} for value in (0, -1, 1.5, None)),
        {"encoder_ngram_size": 2, "encoder_input_ids": [1, 2]},
    ],
    "SequenceBiasLogitsProcessor": [
        {"sequence_bias": value}
        for value in (
            {}, [], None, "a", {1: 1.0}, {(): 1.0}, {(-1,): 1.0}, {(1.5,): 1.0}, {(1,): 1}, {("a",): 1.0},
            [[[1], 1]], [[[-1], 1.0]], [[1, 1.0]], [[]], [[[1.5], 1.0]],
        )
    ],
    "NoBadWordsLogitsProcessor": [
        *({"bad_words_ids": value} for value in ([], None, "a", {1: 2}, [1], [(1, 2)], [[-1]], [["a"]], [[]], [[1.5]])),
        {"bad_words_ids": [[1]], "eos_token_id": 1},
    ],
    "ForcedEOSTokenLogitsProcessor": [
        {"max_length": 3, "eos_token_id": value} for value in (-1, [-1], 1.5, [1.5], None, torch.tensor([-2]))
    ],
    "ExponentialDecayLengthPenalty": [
        {"exponential_decay_length_penalty": (1, 1.2), "eos_token_id": value, "input_ids_seq_length": 1}
        for value in (-1, [1.5], None)
    ] + [
        {"exponential_decay_length_penalty": value, "eos_token_id": 1, "input_ids_seq_length": 1} for value in (1, ())
    ],
    "SuppressTokensAtBeginLogitsProcessor": [
        {"begin_suppress_tokens": 1, "begin_index": 1}, {"begin_suppress_tokens": None, "begin_index": 1},
        {"begin_suppress_tokens": ["a"], "begin_index": 1}, {"begin_suppress_tokens": [1]},
    ],
    "SuppressTokensLogitsProcessor": [{"suppress_tokens": value} for value in (1, None, ["a"])],
    "WhisperTimeStampLogitsProcessor": [
        {"generate_config": SimpleNamespace(no_timestamps_token_id=3, eos_token_id=2), "begin_index": None},
        {"generate_config": SimpleNamespace(eos_token_id=2), "begin_index": 1},
        {"generate_config": SimpleNamespace(no_timestamps_token_id=3), "begin_index": 1},
    ],
    "ClassifierFreeGuidanceLogitsProcessor": [{"guidance_scale": value} for value in (1, 0.5, None, "a", float("nan"))],
    "AlternatingCodebooksLogitsProcessor": [
        {"input_start_len": value, "semantic_vocab_size": 1, "codebook_size": 1} for value in (-1, 1.5, None)
    ],
    "BarkEosPrioritizerLogitsProcessor": [
        *({"eos_token_id": value, "min_eos_p": 0.1} for value in (-1, [1.5], None)),
        *({"eos_token_id": 1, "min_eos_p": value} for value in (0, -0.1, "a")),
    ],
    "WatermarkLogitsProcessor": [
        {"vocab_size": 10, "device": "cpu", "seeding_scheme": "other"},
        *({"vocab_size": 10, "device": "cpu", "greenlist_ratio": value} for value in (0.0, 1.0, -1, 2, None)),
    ],
    "DiaClassifierFreeGuidanceLogitsProcessor": [
        *({"guidance_scale": value} for value in (1, 0.5, None)), {"guidance_scale": 2, "guidance_top_k": 0},
    ],
    "DiaEOSChannelFilterLogitsProcessor": [
        {"num_channels": 0, "eos_token_id": 1}, {"num_channels": 1, "eos_token_id": 0},
        {"num_channels": None, "eos_token_id": 1},
    ],
    "DiaEOSDelayPatternLogitsProcessor": [
        {"delay_pattern": [], "eos_token_id": 1, "max_generation_len": 3},
        {"delay_pattern": 1, "eos_token_id": 1, "max_generation_len": 3},
    ],
}  # fmt: skip


def outcome(function):
    """The type of the exception that a call raises, or None."""
    try:
        function()
    except Exception as error:
        return type(error)
    return None


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(name, each) for name, table in BAD_ARGUMENTS.items() for each in table],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items())[:60],
)
def test_bad_arguments_raise_as_in_transformers(name, arguments):
    if not hasattr(reference, name):
        pytest.skip("this transformers hasn't the class")
    assert outcome(lambda: getattr(fl, name)(**arguments)) is outcome(lambda: getattr(reference, name)(**arguments))


IDS = torch.tensor([[1, 2, 1], [3, 1, 2]])
BAD_CALLS = {
    "one row of scores for two of ids": ("ClassifierFreeGuidanceLogitsProcessor", {"guidance_scale": 2.0}, IDS, 2, 8),
    "the same for Dia": ("DiaClassifierFreeGuidanceLogitsProcessor", {"guidance_scale": 2.0}, IDS, 2, 8),
    "more of the top than there is": (
        "DiaClassifierFreeGuidanceLogitsProcessor", {"guidance_scale": 2.0, "guidance_top_k": 9}, IDS, 4, 8,
    ),
    "ignored lengths of another batch": (
        "RepetitionPenaltyLogitsProcessor",
        {"penalty": 1.1, "prompt_ignore_length": torch.tensor([1, 2, 3])}, IDS, 2, 8,
    ),
    "a biased token outside": ("SequenceBiasLogitsProcessor", {"sequence_bias": {(1, 8): 1.0}}, IDS, 2, 8),
    "a bad prefix outside": ("NoBadWordsLogitsProcessor", {"bad_words_ids": [[8, 1]]}, IDS, 2, 8),
    "a beginning outside": ("ForcedBOSTokenLogitsProcessor", {"bos_token_id": 8}, IDS[:, :1], 2, 8),
    "an end outside": ("ForcedEOSTokenLogitsProcessor", {"max_length": 4, "eos_token_id": 8}, IDS, 2, 8),
    "a decaying end outside": (
        "ExponentialDecayLengthPenalty",
        {"exponential_decay_length_penalty": (0, 1.5), "eos_token_id": 8, "input_ids_seq_length": 1}, IDS, 2, 8,
    ),
    "an end of speech outside": ("BarkEosPrioritizerLogitsProcessor", {"eos_token_id": 8, "min_eos_p": 0.1}, IDS, 2, 8),
    "a source with ids outside": (
        "EncoderRepetitionPenaltyLogitsProcessor", {"penalty": 2.0, "encoder_input_ids": IDS + 6}, IDS, 2, 8,
    ),
    "nothing allowed": (
        "PrefixConstrainedLogitsProcessor",
        {"prefix_allowed_tokens_fn": lambda batch_id, sent: [], "num_beams": 1}, IDS, 2, 8,
    ),
    "an allowed token outside": (
        "PrefixConstrainedLogitsProcessor",
        {"prefix_allowed_tokens_fn": lambda batch_id, sent: [8], "num_beams": 1}, IDS, 2, 8,
    ),
    "channels that don't divide the rows": (
        "DiaEOSChannelFilterLogitsProcessor", {"num_channels": 3, "eos_token_id": 2}, IDS, 2, 8,
    ),
    "delays that don't divide the rows": (
        "DiaEOSDelayPatternLogitsProcessor",
        {"delay_pattern": [0, 1, 2], "eos_token_id": 2, "max_generation_len": 9}, IDS, 2, 8,
    ),
    "ids of one dimension for a text watermark": (
        "SynthIDTextWatermarkLogitsProcessor",
        {
            "ngram_len": 2, "keys": [1], "sampling_table_size": 8, "sampling_table_seed": 0,
            "context_history_size": 2, "device": "cpu",
        }, IDS[0], 2, 8,
    ),
    "a timestamp outside": (
        "WhisperTimeStampLogitsProcessor",
        {"generate_config": SimpleNamespace(no_timestamps_token_id=8, eos_token_id=2), "begin_index": 1}, IDS, 2, 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_calls_raise_as_in_transformers(what):
    name, arguments, ids, rows, V = BAD_CALLS[what]
    if not hasattr(reference, name):
        pytest.skip("this transformers hasn't the class")
    scores = torch.randn(rows, V, generator=torch.Generator().manual_seed(0))
    theirs = outcome(lambda: getattr(reference, name)(**arguments)(ids, scores.clone()))
    ours = outcome(lambda: getattr(fl, name)(**arguments)(ids, scores))
    in_a_list = outcome(lambda: fl.LogitsProcessorList([getattr(fl, name)(**arguments)])(ids, scores))
    assert theirs is not None, "this is no bad call"
    assert (ours, in_a_list) == (theirs, theirs)


# -- On the GPU: no sync, and captured graphs ----------------------------------------------------------------------

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
HISTORY = 24


def example(name: str, seed: int, case: Case) -> dict[str, Any]:
    """One set of arguments, drawn without hypothesis."""
    found = []

    @settings(max_examples=3, database=None, derandomize=True, **RELAXED)
    @given(data=st.data())
    def collect(data):
        found.append(ENTRIES[name].draw(data.draw, case))

    collect()
    return found[seed % len(found)]


def chain_9(module, case: Case, L: int):
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, case.V, (40,), generator=generator).tolist()
    bad = [[word] for word in words[:10]] + [words[10 + 3 * i : 13 + 3 * i] for i in range(10)]
    on = {"device": case.device}
    return [
        module.RepetitionPenaltyLogitsProcessor(1.1),
        module.NoRepeatNGramLogitsProcessor(3),
        module.NoBadWordsLogitsProcessor(bad),
        module.MinNewTokensLengthLogitsProcessor(L - 1, 5, [2, 3], **on),
        module.SuppressTokensAtBeginLogitsProcessor([5, 6, 7], L, **on),
        module.TemperatureLogitsWarper(0.7),
        module.TopKLogitsWarper(50),
        module.TopPLogitsWarper(0.9),
        module.MinPLogitsWarper(0.05),
    ]


CUDA_CASE = Case(4, 1000, HISTORY, "cuda")


def cuda_inputs(case: Case, rows: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (case.B, case.L), generator=generator).cuda()
    return ids, (torch.randn(case.B * rows, case.V, generator=generator) * 3).cuda()


class NoSync:
    """A context in which waiting for the GPU is an error."""

    def __enter__(self):
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")


@CUDA
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in PRESENT if name not in ON_THE_HOST])
def test_no_call_waits_for_the_gpu(name, seed):
    case, entry = CUDA_CASE, ENTRIES[name]
    arguments = example(name, seed, case)
    ours, theirs = (prepared(build(module, name, arguments), case) for module in (fl, reference))
    for step in range(3):
        ids, scores = cuda_inputs(case, entry.rows, step)
        expected, error = call(theirs, ids.clone(), scores.clone())
        assert error is None
        if step == 0:
            found = ours(ids, scores)  # builds its tables
        else:
            with NoSync():
                found = ours(ids, scores)
        check(name, arguments, case, ids, scores, found, expected, "kernels")


def replayed(processor, ids, scores, others):
    """The results of a captured call, replayed with each of the other inputs."""
    ids, scores = ids.clone(), scores.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            processor(ids, scores)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = processor(ids, scores)
    for new_ids, new_scores in others:
        ids.copy_(new_ids)
        scores.copy_(new_scores)
        graph.replay()
        yield out.clone()


@CUDA
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [name for name in PRESENT if ENTRIES[name].graph])
def test_a_captured_graph_serves_other_inputs(name, seed):
    case, entry = CUDA_CASE, ENTRIES[name]
    arguments = example(name, seed, case)
    ours, theirs = (build(module, name, arguments) for module in (fl, reference))
    others = [cuda_inputs(case, entry.rows, seed + 1) for seed in range(3)]
    results = replayed(ours, *cuda_inputs(case, entry.rows, 0), others)
    for (ids, scores), found in zip(others, results, strict=True):
        check(name, arguments, case, ids, scores, found, theirs(ids.clone(), scores.clone()), "kernels")


@CUDA
@pytest.mark.parametrize(("B", "V"), [(1, 32000), (8, 128256), (3, 50257)])
def test_the_chain_of_nine_without_a_sync_and_captured(B, V):
    case = Case(B, V, 64, "cuda")
    ours = fl.LogitsProcessorList(chain_9(fl, case, case.L))
    theirs = chain_9(reference, case, case.L)
    inputs = [cuda_inputs(case, 1, seed) for seed in range(4)]
    expected = []
    for ids, scores in inputs:
        for processor in theirs:
            scores = processor(ids, scores)
        expected.append(scores)
    found = [ours(*inputs[0])]
    for each in inputs[1:]:
        with NoSync():
            found.append(ours(*each))
    for captured, eager, right in zip(replayed(ours, *inputs[0], inputs), found, expected, strict=True):
        for result in (captured, eager):
            assert torch.equal(result.isfinite(), right.isfinite())
            assert close(result, right, 4).all()
