"""Truncations: against transformers' warpers one by one, against them in float64, and on rows made to trip them."""

import itertools
import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from fastlogits_kernels.rules import RULES, Rule
from fastlogits_kernels.truncate import cpu, dispatch
from fastlogits_kernels.truncate.dispatch import truncate
from fastlogits_kernels.truncate.reference import reference_truncate
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as theirs

from fastlogits.plan.plan import Plan
from fastlogits.plan.stages import Member, Truncate
from fastlogits.processors import truncation as ours
from fastlogits.processors.base import LogitsProcessorList
from tests.oracle import broken_rows, check_mass, check_truncation, hard_rows

INF = float("inf")
FAST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])

MAKE = {
    "top_k": lambda lib, value, keep, fill: lib.TopKLogitsWarper(int(value), fill, keep),
    "top_p": lambda lib, value, keep, fill: lib.TopPLogitsWarper(value, fill, keep),
    "min_p": lambda lib, value, keep, fill: lib.MinPLogitsWarper(value, fill, keep),
    "typical": lambda lib, value, keep, fill: lib.TypicalLogitsWarper(value, fill, keep),
    "epsilon": lambda lib, value, keep, fill: lib.EpsilonLogitsWarper(value, fill, keep),
    "eta": lambda lib, value, keep, fill: lib.EtaLogitsWarper(value, fill, keep),
    "top_h": lambda lib, value, keep, fill: lib.TopHLogitsWarper(value, fill),
}
if not hasattr(theirs, "TopHLogitsWarper"):
    del MAKE["top_h"]
VALUES = {
    "top_k": st.integers(1, 60) | st.integers(1, 3000),
    "top_p": st.sampled_from([0.0, 0.1, 0.9, 0.95, 1.0]) | st.floats(0, 1),
    "min_p": st.sampled_from([0.0, 0.05, 1.0]) | st.floats(1e-4, 1),
    "typical": st.floats(0.05, 0.97),
    "epsilon": st.sampled_from([3e-4, 9e-4]) | st.floats(1e-5, 0.5),
    "eta": st.sampled_from([3e-4, 2e-3]) | st.floats(1e-5, 0.5),
    "top_h": st.floats(0.05, 1.0),
}
pytestmark = pytest.mark.usefixtures("one_thread")

# From 256 tokens on the end of the row is looked at; from 1,100 on it is found by groups; 6,000 take an estimate.
VOCABS = st.sampled_from([1, 2, 7, 64, 300, 700, 1111, 2500, 6000])


def is_refused(scores: torch.Tensor) -> torch.Tensor:
    """The rows that ``torch.distributions`` takes for no distribution."""
    return scores.isnan().any(-1) | (scores == INF).any(-1) | (scores == -INF).all(-1)


def transformers_chain(scores: torch.Tensor, rules, moved: float = 0.0) -> torch.Tensor:
    """Warper after warper; ties in the order of a stable sort, and rows that transformers refuses as they are."""
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with patch.object(torch, "sort", partial(torch.sort, stable=True)):
            for rule in rules:
                value = rule.value
                if rule.kind in ("top_p", "typical"):
                    value = min(1.0 - 1e-9 * (rule.kind == "typical"), max(0.0, value + moved))
                elif rule.kind != "top_k":
                    value = min(1.0, value * (1 + moved))
                warper = MAKE[rule.kind](theirs, value, rule.min_tokens_to_keep, rule.filter_value)
                refused = is_refused(scores) & (rule.kind in ("eta", "top_h"))
                scores = torch.where(refused[:, None], scores, warper(None, scores))
    finally:
        torch.distributions.Distribution.set_default_validate_args(True)
    return scores


def is_decided(scores: torch.Tensor, rules) -> bool:
    """Whether rounding can't change what is kept: not in float64, with values and scores moved, ties staying ties."""
    wide = scores.double()
    kept = [transformers_chain(wide, rules) == wide]
    # The shorter wave moves scores apart that float32 may take for equal.
    for moved, wave in itertools.product((5e-6, -5e-6), (1e4, 1e9)):
        shaken = wide + moved / 2 * (1 + wide.abs() / 10) * torch.sin(wide * wave)
        shaken = torch.where(wide.isfinite(), shaken, wide)
        kept.append(transformers_chain(shaken, rules, moved) == shaken)
    return all(torch.equal(each, kept[0]) for each in kept[1:])


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(found.nan_to_num(1e30), expected.nan_to_num(1e30)) and torch.equal(
        found.isnan(), expected.isnan()
    )


def same_but_for_ties(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return same(found.sort(-1).values, expected.sort(-1).values)


@st.composite
def rows(draw, dtype=torch.float32, broken=False):
    """Scores ``[B, V]`` of any layout, with the rows that trip a truncation."""
    B, V = draw(st.integers(1, 4)), draw(VOCABS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.randn(B, V, generator=generator) * draw(st.sampled_from([0.1, 1.0, 3.0, 30.0]))
    if draw(st.booleans()):
        scores = scores.bfloat16().float()  # ties
    for row in range(B):
        shape = draw(st.sampled_from(["as it is"] * 3 + ["equal", "spike", "zipf", "masked", "few", "far"]))
        if shape == "equal":
            scores[row] = 1.5
        elif shape == "spike":
            scores[row] = -2.0
            scores[row, V // 2] = 8.0
        elif shape == "zipf":
            scores[row] = -1.5 * torch.log(torch.randperm(V, generator=generator) + 1.0)
        elif shape == "masked":
            scores[row, torch.rand(V, generator=generator) < 0.5] = -INF
        elif shape == "few":
            scores[row, torch.arange(V) % max(1, V // 3) != 0] = -INF
        elif shape == "far":
            scores[row] += 1000.0
    if broken:
        for value in (-INF, math.nan, INF):
            if draw(st.booleans()):
                scores[draw(st.integers(0, B - 1)), : draw(st.sampled_from([1, V // 2 + 1, V]))] = value
    scores = scores.to(dtype)
    layout = draw(st.sampled_from(["plain", "slice", "columns"]))
    if layout == "slice":
        return torch.full((B, V + 5), math.nan, dtype=dtype)[:, 2:-3].copy_(scores)
    return scores.t().contiguous().t() if layout == "columns" else scores


@st.composite
def rule_of(draw, kind, fill=None, keep=None):
    fill = draw(st.sampled_from([-INF, -INF, -1e4, 0.0])) if fill is None else fill
    keep = draw(st.sampled_from([1, 1, 2, 70])) if keep is None else keep
    return Rule(kind, draw(VALUES[kind]), 1 if kind in ("top_k", "top_h") else keep, fill)


# -- Against transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE)
@given(data=st.data())
@FAST
def test_one_rule_keeps_what_transformers_keeps(kind, data):
    scores, rule = data.draw(rows()), data.draw(rule_of(kind))
    before = scores.clone()
    found = truncate(scores, [rule])
    assert torch.equal(scores, before)
    assert found.is_contiguous()
    assert found.data_ptr() != scores.data_ptr()
    kept = found == scores
    assert bool((kept | (found == rule.filter_value)).all())
    assume(is_decided(scores, [rule]))
    expected = transformers_chain(scores, [rule])
    # Which ones of equal tokens come out of torch.topk is left open.
    open_ties = kind == "top_h" or (kind in ("min_p", "typical") and rule.min_tokens_to_keep > 1)
    assert (same_but_for_ties if open_ties else same)(found, expected)


@given(data=st.data())
@settings(FAST, max_examples=120)
def test_a_chain_is_the_warpers_one_by_one(data):
    kinds = data.draw(st.lists(st.sampled_from(list(MAKE)), min_size=2, max_size=4))
    rules = [data.draw(rule_of(kind, None if data.draw(st.booleans()) else -INF, keep=1)) for kind in kinds]
    scores = data.draw(rows())
    assume(is_decided(scores, rules))
    agree = same_but_for_ties if "top_h" in kinds else same
    assert agree(truncate(scores, rules), transformers_chain(scores, rules))


@pytest.mark.parametrize("kind", MAKE)
@given(data=st.data())
@FAST
def test_rows_of_nan_and_infinities(kind, data):
    scores, rule = data.draw(rows(broken=True)), data.draw(rule_of(kind, keep=1))
    refused = is_refused(scores)
    assert same(truncate(scores, [rule])[refused], transformers_chain(scores, [rule])[refused])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", MAKE)
@given(data=st.data())
@settings(FAST, max_examples=25)
def test_half_precision_is_rounded_as_transformers_rounds_it(dtype, kind, data):
    scores, rule = data.draw(rows(dtype)), data.draw(rule_of(kind, keep=1))
    agree = same_but_for_ties if kind == "top_h" else same
    assert agree(truncate(scores, [rule]), transformers_chain(scores, [rule]))


@pytest.mark.parametrize("kind", MAKE)
@given(data=st.data())
@settings(FAST, max_examples=25)
def test_the_reference_is_transformers_in_every_bit(kind, data):
    scores, rule = data.draw(rows(data.draw(st.sampled_from([torch.float32, torch.float64])))), data.draw(rule_of(kind))
    open_ties = kind == "min_p" and rule.min_tokens_to_keep > 1  # 4.57 has another sort
    agree = same_but_for_ties if open_ties else same
    assert agree(reference_truncate(scores, [rule]), transformers_chain(scores, [rule]))


# -- Against float64 -------------------------------------------------------------------------------------------------

ORACLE_ROWS = {
    "gauss": lambda V: torch.randn(V) * 3,
    "flat": lambda V: torch.randn(V) * 0.01,
    "equal": lambda V: torch.zeros(V),
    "ties": lambda V: (torch.randn(V) * 3).bfloat16().float(),
    "spike": lambda V: torch.cat([torch.tensor([math.log(0.95 * V / 0.05)]), torch.zeros(V - 1)]),
    "zipf": lambda V: -1.5 * torch.log(torch.randperm(V) + 1.0),
}


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 0.9, 0.95, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("row", ORACLE_ROWS)
def test_a_nucleus_holds_its_mass_and_no_token_too_many(row, p):
    torch.manual_seed(0)
    scores = torch.stack([ORACLE_ROWS[row](20_000) for _ in range(2)])
    kept = truncate(scores, [Rule("top_p", p)]) > -INF
    mass = scores.double().softmax(-1)
    least = mass.masked_fill(~kept, INF).amin(-1)
    assert bool(((mass * kept).sum(-1) >= p - 1e-6).all())
    assert bool((((mass * kept).sum(-1) - least < p + 1e-6) | (kept.sum(-1) == 1)).all())
    assert bool((mass.masked_fill(kept, 0).amax(-1) <= least).all())  # the likelier first


@pytest.mark.parametrize("kind", ["epsilon", "eta", "min_p", "typical"])
@pytest.mark.parametrize("row", ORACLE_ROWS)
def test_a_token_far_from_the_boundary_is_never_on_the_wrong_side(row, kind):
    torch.manual_seed(1)
    scores = torch.stack([ORACLE_ROWS[row](20_000) for _ in range(2)])
    for value in (1e-4, 1e-3, 0.2, 0.9):
        kept = truncate(scores, [Rule(kind, value)]) > -INF
        for off in (1e-5, -1e-5):
            moved = MAKE[kind](theirs, min(value * (1 + off), 1.0), 1, -INF)(None, scores.double()) > -INF
            wrong = (moved & ~kept) if (off > 0) != (kind == "typical") else (kept & ~moved)
            if kind == "typical":  # whose order, too, is subject to rounding
                surprise = -scores.double().log_softmax(-1)
                likeness = (surprise - (surprise * (-surprise).exp()).sum(-1, keepdim=True)).abs()
                cutoff = likeness.masked_fill(~moved, 0).amax(-1, keepdim=True)
                wrong &= (likeness - cutoff).abs() > 1e-5
            assert not bool(wrong.any())


@pytest.mark.parametrize("row", ORACLE_ROWS)
@pytest.mark.parametrize("masked", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_n_sigma_is_its_definition(row, masked, dtype):
    torch.manual_seed(2)
    scores = torch.stack([ORACLE_ROWS[row](5_000) for _ in range(2)]).to(dtype)
    scores[torch.rand(scores.shape) < masked] = -INF
    for n in (0.5, 1.0, 2.5):
        found = truncate(scores, [Rule("top_n_sigma", n)])
        for one, kept in zip(scores.double(), found > -INF, strict=True):
            limit = one.max() - n * one[one.isfinite()].std()
            slack = 1e-4 * (1 + limit.abs())
            assert not bool((kept & (one < limit - slack)).any())
            assert not bool((~kept & (one > limit + slack)).any())
        assert torch.equal(found, truncate(scores * 4, [Rule("top_n_sigma", n)]) / 4)


def test_top_n_sigma_keeps_a_lone_token_and_as_many_as_asked_for():
    lone = torch.full((1, 400), -INF)
    lone[0, 7] = 3.0
    assert torch.equal(truncate(lone, [Rule("top_n_sigma", 1.0)]), lone)
    for V in (2, 400):
        two = torch.full((1, V), -INF)
        two[0, :2] = torch.tensor([0.0, 1.0])  # 0.71 apart with N - 1, 0.5 with N
        assert torch.equal(truncate(two, [Rule("top_n_sigma", 1.5)]), two)
        assert int((truncate(two, [Rule("top_n_sigma", 1.4)]) > -INF).sum()) == 1
    scores = torch.arange(400.0).reshape(1, -1)
    assert int((truncate(scores, [Rule("top_n_sigma", 1e-6, 5)]) > -INF).sum()) == 5


# -- Hard rows, on each device, through a plan -------------------------------------------------------------------------

GRID = {
    "top_k": [1, 3, 50, 700, 10**6],
    "top_p": [0.0, 1e-7, 0.3, 0.5, 0.9, 0.99, 0.9999, 1.0],
    "min_p": [0.0, 1e-4, 0.05, 1.0],
    "top_a": [0.0, 1e-4, 0.2, 1.0],
    "typical": [0.05, 0.5, 0.95],
    "epsilon": [1e-5, 3e-4, 0.3],
    "eta": [1e-5, 3e-4, 0.3],
    "top_h": [0.1, 0.5, 0.9, 1.0],
    "top_n_sigma": [0.5, 1.0, 3.0],
}


@pytest.fixture(
    scope="module",
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))],
)
def device(request):
    return request.param


def planned(scores: torch.Tensor, rules) -> torch.Tensor:
    return Plan.compile([Member("rules", Truncate(tuple(rules)))])(None, scores)


def hard_batch(V: int, seed: int = 0) -> torch.Tensor:
    return torch.stack([*hard_rows(V, seed).values(), *broken_rows(V).values()])


def values_of_rows(kind: str, B: int, generator: torch.Generator) -> torch.Tensor:
    """A value for each row, now and then one that turns the rule off."""
    grid = torch.tensor([*GRID[kind], min(RULES[kind].range.off, 10**6 if kind == "top_k" else INF)])
    values = grid[torch.randint(len(grid), (B,), generator=generator)]
    return values.int() if kind == "top_k" else values.float()


@pytest.mark.parametrize("ties", ["all", "lowest"])
@pytest.mark.parametrize("V", [1, 7, 300, 6000])
@pytest.mark.parametrize("kind", GRID)
def test_a_rule_keeps_what_the_oracle_keeps(device, kind, V, ties):
    if ties == "lowest" and kind not in ("top_k", "top_p"):
        pytest.skip("knows no such choice")
    scores = hard_batch(V).to(device)
    for value in GRID[kind]:
        for keep in (1,) if kind in ("top_k", "top_h") else (1, 3):
            rules = [Rule(kind, value, keep, ties=ties)]
            check_truncation(scores, rules, planned(scores, rules))


@pytest.mark.parametrize("kind", ["top_k", "top_p", "min_p", "eta", "top_n_sigma"])
def test_a_rule_on_a_large_vocabulary(device, kind):
    scores = torch.stack([row for name, row in hard_rows(128_256).items() if name != "lowest finite"]).to(device)
    values = torch.tensor(GRID[kind]).repeat(8)[: len(scores)].to(device)
    for rules in ([Rule(kind, GRID[kind][-2])], [Rule(kind, values.int() if kind == "top_k" else values.float())]):
        check_truncation(scores, rules, planned(scores, rules))


@pytest.mark.parametrize("seed", range(60))
def test_any_rules_in_any_order_with_values_per_row(device, seed):
    generator = torch.Generator().manual_seed(seed)

    def choose(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    V, kinds = choose([7, 300, 2500, 6000]), [choose(list(GRID)) for _ in range(choose([2, 3, 4]))]
    if "top_h" in kinds:
        # Which of equal tokens at its cut-off stay is left open, and so what comes after it. What typical drops for
        # rounding at the likely end decides which ones are its first 100.
        kinds = [kind for kind in kinds if kind not in ("top_h", "typical")] + ["top_h"]
    hard = hard_rows(V, seed)
    if "typical" in kinds:
        del hard["spike .50"]  # its two kinds of tokens are equally typical, but for rounding
    scores = torch.stack([*hard.values(), *broken_rows(V).values()]).to(device)
    rules = []
    for kind in kinds:
        value = choose([*GRID[kind], None, None, None])
        if value is None:
            value = values_of_rows(kind, len(scores), generator).to(device)
        rules.append(Rule(kind, value, 1, choose([-INF, -INF, -(2.0**100)]), choose(["all", "lowest"])))
    check_truncation(scores, rules, planned(scores, rules))


@pytest.mark.parametrize("order", [("top_k", "top_p", "min_p"), ("min_p", "top_k", "top_p")])
def test_the_orders_of_the_stacks(device, order):
    scores = hard_batch(6000).to(device)
    usual = {"top_k": 50, "top_p": 0.9, "min_p": 0.02}
    rules = [Rule(kind, usual[kind]) for kind in order]
    check_truncation(scores, rules, planned(scores, rules))


@pytest.mark.parametrize("V", [5_000, 128_256])
@pytest.mark.parametrize(("spike", "p"), [(0.95, 0.99), (0.5, 0.9), (0.95, 0.96), (0.5, 0.99)])
def test_a_nucleus_that_ends_in_a_flat_tail(device, spike, p, V):
    scores = torch.zeros(2, V, device=device)
    scores[:, V // 3] = math.log(spike / (1 - spike) * (V - 1))
    scores[1] += 0.01 * torch.randn(V, generator=torch.Generator().manual_seed(0)).to(device)
    for ties in ("all", "lowest"):
        found = planned(scores, [Rule("top_p", p, ties=ties)])
        check_truncation(scores, [Rule("top_p", p, ties=ties)], found)
        check_mass(scores, p, found)


@pytest.mark.parametrize("kind", GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_per_row_are_those_of_each_row_alone(device, kind, dtype):
    scores = hard_batch(700).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    for keep in (1, 3):
        values = values_of_rows(kind, len(scores), generator)
        together = planned(scores, [Rule(kind, values.to(device), keep)])
        for row, value in enumerate(values.tolist()):
            alone = scores[row : row + 1]
            if RULES[kind].range.has(value) and value < 700:
                alone = planned(alone, [Rule(kind, value, keep)])
            assert same(together[row : row + 1], alone), (row, value)


@pytest.mark.parametrize("kind", GRID)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_reference_with_values_per_row(kind, dtype):
    scores = hard_batch(300).to(dtype)
    values = values_of_rows(kind, len(scores), torch.Generator().manual_seed(1))
    for ties in ("all", "lowest"):
        together = reference_truncate(scores, [Rule(kind, values, 1, ties=ties)])
        for row, value in enumerate(values.tolist()):
            alone = scores[row : row + 1]
            if RULES[kind].range.has(value) and value < 300:
                alone = reference_truncate(alone, [Rule(kind, value, 1, ties=ties)])
            assert same(together[row : row + 1], alone), (row, value)


def test_a_value_out_of_range_on_a_device_leaves_its_row():
    # What the reference does there, where nothing can be raised.
    scores = torch.randn(4, 50)
    for kind in GRID:
        beyond = [0, -3, 0, -1] if kind == "top_k" else [math.nan, -0.5, -INF, math.nan]
        values = torch.tensor(beyond, dtype=torch.int64 if kind == "top_k" else torch.float32)
        assert torch.equal(reference_truncate(scores, [Rule(kind, values)]), scores)


@pytest.mark.parametrize("V", [20, 900, 6000])
def test_lowest_ties_are_exactly_k_and_the_lowest(device, V):
    generator = torch.Generator().manual_seed(V)
    scores = torch.randint(0, 5, (6, V), generator=generator).float()
    for k in (1, 7, 19):
        kept = planned(scores.to(device), [Rule("top_k", k, ties="lowest")]).cpu() > -INF
        right = scores.sort(descending=True, stable=True).indices[:, :k]
        assert torch.equal(kept, torch.zeros_like(kept).scatter(1, right, True))


def test_a_written_value_counts_from_then_on(device):
    scores = torch.randn(2, 400, device=device)
    p = torch.tensor([0.2, 1.0], device=device)
    processors = LogitsProcessorList([ours.TopPLogitsWarper(p), ours.TopKLogitsWarper(300)])
    for values in ([0.2, 1.0], [1.0, 0.5]):
        p.copy_(torch.tensor(values))
        rules = [Rule("top_p", p), Rule("top_k", 300)]
        check_truncation(scores, rules, processors(None, scores))
    assert "top-p per row" in processors.explain()


# -- What holds for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*MAKE, "top_n_sigma", "top_a"])
def test_a_row_doesn_t_depend_on_its_batch(kind):
    torch.manual_seed(3)
    scores = torch.cat([(torch.randn(12, 9_000) * scale).bfloat16().float() for scale in (0.5, 2.0, 4.0)])
    rule = Rule(kind, {"top_k": 50, "top_n_sigma": 1.0}.get(kind, 0.6 if kind in ("top_h", "typical") else 0.01))
    if kind == "top_p":
        rule = Rule(kind, 0.8)
    together = truncate(scores, [rule])
    for row, alone in zip(together, scores, strict=True):
        assert torch.equal(row, truncate(alone[None], [rule])[0])


@pytest.mark.parametrize("kind", [*MAKE, "top_n_sigma"])
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (0, 0)])
def test_nothing_to_do(kind, shape):
    scores = torch.zeros(shape)
    assert truncate(scores, [Rule(kind, 0.5 if kind != "top_k" else 2)]).shape == shape
    assert truncate(scores, []).shape == shape


def test_no_rule_is_a_copy():
    scores = torch.randn(2, 5)
    found = truncate(scores, [])
    assert torch.equal(found, scores)
    assert found.data_ptr() != scores.data_ptr()


def test_after_a_top_k_no_whole_row_is_sorted(monkeypatch):
    torch.manual_seed(4)
    widest = []

    def watched(scores, rules):
        widest.append(scores.shape[1])
        return reference_truncate(scores, rules)

    monkeypatch.setattr(cpu, "reference_truncate", watched)
    truncate(torch.randn(3, 5_000), [Rule("top_k", 50), Rule("top_p", 0.9), Rule("min_p", 0.05)])
    assert max(widest) < 100


CHAIN = [Rule("top_k", 50), Rule("top_p", 0.9, 2), Rule("min_p", 0.05, 1, -1e4), Rule("top_n_sigma", 2.0)]


def test_compiled_it_is_one_operation():
    scores = torch.randn(3, 700)
    compiled = torch.compile(lambda scores: truncate(scores * 2, CHAIN), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), truncate(scores * 2, CHAIN))


@pytest.mark.filterwarnings("ignore")
def test_the_registered_operation():
    rules = [*CHAIN, Rule("top_p", torch.tensor([0.9, 1.0, 0.2])), Rule("top_k", 3, ties="lowest")]
    arguments = (torch.randn(3, 700), *dispatch._flattened(rules))
    torch.library.opcheck(torch.ops.fastlogits.truncate.default, arguments)
    assert torch.equal(torch.ops.fastlogits.truncate(*arguments), truncate(arguments[0], rules))


# -- The classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKE)
def test_a_class_and_a_list_of_classes(kind):
    torch.manual_seed(5)
    scores = torch.randn(3, 700) * 3
    value = 20 if kind == "top_k" else 0.4
    mine, other = (MAKE[kind](lib, value, 2, -1e4) for lib in (ours, theirs))
    assert isinstance(mine, type(other))
    expected = other(None, scores)
    assert torch.equal(mine(None, scores), expected)
    assert type(mine).stage(other).rules == mine.stage().rules
    assert torch.equal(LogitsProcessorList([mine, other])(None, scores), other(None, expected))
    if kind == "top_k":
        mine.top_k = 3
        assert int((mine(None, scores) > -1e4).sum()) == 9


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: ours.TopKLogitsWarper(torch.tensor([3, 0])), "top_k must be at least 1 .* got 0 in row 1"),
        (lambda: ours.TopKLogitsWarper(torch.tensor([3.0])), "top_k must be of .* got torch.float32"),
        (lambda: ours.TopPLogitsWarper(torch.tensor([0.5, 1.5])), "top_p must be between 0 and 1 .* 1.5 in row 1"),
        (lambda: ours.TopPLogitsWarper(torch.tensor([math.nan])), "top_p .* nan in row 0"),
        (lambda: ours.TopPLogitsWarper(torch.tensor([[0.5]])), r"top_p .* got one of shape \(1, 1\)"),
        (lambda: ours.TopPLogitsWarper(torch.tensor([0.5]).double()), "top_p must be of .* got torch.float64"),
        (lambda: ours.TopPLogitsWarper(torch.tensor([0.5]), min_tokens_to_keep=0), "min_tokens_to_keep"),
        (lambda: ours.MinPLogitsWarper(torch.tensor([-0.1])), "min_p .* -0.1 in row 0"),
        (lambda: ours.TypicalLogitsWarper(torch.tensor([0.0])), "typical_p .* 0 in row 0"),
        (lambda: ours.EpsilonLogitsWarper(torch.tensor([1.0])), "epsilon .* 1 in row 0"),
        (lambda: ours.EtaLogitsWarper(torch.tensor([1.0])), "eta .* 1 in row 0"),
        (lambda: ours.TopNSigmaLogitsWarper(torch.tensor([0.0])), "top_n_sigma .* 0 in row 0"),
        (lambda: ours.TopNSigmaLogitsWarper(0), "top_n_sigma"),
        (lambda: ours.TopALogitsWarper(0), "top_a must be a number above 0 and at most 1, got 0"),
        (lambda: ours.TopALogitsWarper(torch.tensor([0.5, 1.5])), "top_a must be between 0 and 1 .* got 1.5 in row 1"),
        (lambda: ours.TopNSigmaLogitsWarper(INF), "top_n_sigma"),
        (lambda: ours.TopNSigmaLogitsWarper("1"), "top_n_sigma"),
        (lambda: ours.TopNSigmaLogitsWarper(1.0, min_tokens_to_keep=0), "min_tokens_to_keep"),
        (lambda: ours.XTCLogitsProcessor(0.0, 0.5), "threshold"),
        (lambda: ours.XTCLogitsProcessor(0.1, 1.5), "probability"),
        (lambda: ours.XTCLogitsProcessor(0.1, math.nan), "probability"),
        (lambda: ours.XTCLogitsProcessor(0.1, 0.5, [-1]), "special_token_ids"),
        (lambda: ours.XTCLogitsProcessor(0.1, 0.5, generator=3), "generator"),
    ],
)
def test_a_bad_argument_is_named(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


def test_values_that_don_t_fit_the_scores_are_refused():
    scores = torch.zeros(3, 5)
    with pytest.raises(
        ValueError, match="top_p must be a number, or have a value for each of the 3 rows of scores, got 2 values"
    ):
        ours.TopPLogitsWarper(torch.tensor([0.5, 0.6]))(None, scores)
    with pytest.raises(ValueError, match="top_k must be on cpu, as scores are, got meta"):
        truncate(scores, [Rule("top_k", torch.ones(3, dtype=torch.int32, device="meta"))])
    written = torch.tensor([0.5, 0.6, 0.7])
    processor = ours.TopPLogitsWarper(written)
    written[2] = 7.0
    with pytest.raises(ValueError, match=r"top_p .* 7 in row 2"):
        processor(None, scores)


@pytest.mark.parametrize("kind", [*MAKE, "top_n_sigma"])
def test_a_class_with_values_per_row(kind):
    scores = hard_batch(700)
    generator = torch.Generator().manual_seed(2)
    values = values_of_rows(kind, len(scores), generator)
    own = {
        "top_n_sigma": lambda lib, value, keep, fill: lib.TopNSigmaLogitsWarper(value, fill, keep),
        "top_a": lambda lib, value, keep, fill: lib.TopALogitsWarper(value, fill, keep),
    }
    make = {**own, **MAKE}[kind]
    if kind == "top_k":
        processor = ours.TopKLogitsWarper(values, -INF, 3)
        values = values.clamp(min=3)
    else:
        processor = make(ours, values, 1, -INF)
    assert same(processor(None, scores), truncate(scores, [Rule(kind, values)]))


def test_top_h_looks_at_a_hundred_tokens():
    if "top_h" not in MAKE:
        pytest.skip("transformers 5 has it")
    processor = ours.TopHLogitsWarper(0.5)
    processor.top_n = 50
    with pytest.raises(ValueError, match="top_n"):
        processor(None, torch.zeros(1, 5))


# -- XTC -------------------------------------------------------------------------------------------------------------


def xtc_by_hand(probabilities, threshold, special=()):
    likely = sorted((p, token) for token, p in enumerate(probabilities) if p >= threshold)
    removed = {token for _, token in likely[1:]}
    return set() if removed & set(special) else removed


@given(data=st.data())
@FAST
def test_xtc_removes_all_likely_tokens_but_the_least(data):
    V, seed = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 2**31))
    scores = torch.randn(3, V, generator=torch.Generator().manual_seed(seed)) * 1.5
    threshold = data.draw(st.floats(0.01, 1.0))
    special = data.draw(st.lists(st.integers(0, V + 3), max_size=2))
    found = ours.XTCLogitsProcessor(threshold, 1.0, special)(None, scores)
    for row, after in zip(scores, found, strict=True):
        removed = xtc_by_hand(row.softmax(-1).tolist(), torch.tensor(threshold).item(), special)
        assert set((after == -INF).nonzero().flatten().tolist()) == removed
        kept = after > -INF
        assert torch.equal(after[kept], row[kept])


def is_as_often(struck: torch.Tensor, probability: float) -> bool:
    """Whether a count is within four standard deviations of its expectation."""
    spread = math.sqrt(len(struck) * probability * (1 - probability))
    return abs(int(struck.sum()) - len(struck) * probability) < 4 * spread


def test_xtc_strikes_rows_on_their_own_as_often_as_asked_for():
    scores = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(4000, 4)
    processor = ours.XTCLogitsProcessor(0.15, 0.3, generator=torch.Generator().manual_seed(0))
    first, second = (processor(None, scores)[:, 0] == -INF for _ in range(2))
    for struck in (first, second):
        assert is_as_often(struck, 0.3)
    assert is_as_often(first & second, 0.09)  # each step anew
    assert is_as_often(first[1:] & first[:-1], 0.09)  # each row for itself
    assert not bool((ours.XTCLogitsProcessor(0.15, 0.0)(None, scores) == -INF).any())


def test_xtc_leaves_alone_what_has_no_choices():
    scores = torch.tensor([[0.9, 0.05, 0.05], [math.nan, 0.0, 1.0]])
    scores[0].log_()
    assert same(ours.XTCLogitsProcessor(0.1, 1.0)(None, scores), scores)
    masked = torch.tensor([[0.5, 0.5]]).log()
    masked = torch.cat([masked, torch.full((1, 5), -INF)], 1)
    assert int((ours.XTCLogitsProcessor(0.1, 1.0)(None, masked) > -INF).sum()) == 1
