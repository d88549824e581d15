"""The kernels that fold, truncate and draw, against torch and the float64 oracle; on a CPU in Triton's interpreter."""

import math

import pytest
import torch
from fastlogits_kernels import draw
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection import launch, launchers, layout, row
from fastlogits_kernels.selection.noise import noise_of
from fastlogits_kernels.truncate.reference import reference_truncate

import fastlogits as fl
from tests.chi_square import chi_square
from tests.oracle import broken_rows, check_truncation, hard_rows

pytestmark = pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

CHAINS = {
    "k": (Rule("top_k", 20),),
    "p": (Rule("top_p", 0.9),),
    "k p": (Rule("top_k", 50), Rule("top_p", 0.9)),
    "p k": (Rule("top_p", 0.9), Rule("top_k", 50)),
    "min k p": (Rule("min_p", 0.05), Rule("top_k", 50), Rule("top_p", 0.9)),
    "k p min": (Rule("top_k", 50), Rule("top_p", 0.9), Rule("min_p", 0.05)),
    "k min": (Rule("top_k", 50), Rule("min_p", 0.05)),
    "p min": (Rule("top_p", 0.9), Rule("min_p", 0.05)),
    "k min of 9": (Rule("top_k", 50), Rule("min_p", 0.3, 9)),
    "typical min": (Rule("typical", 0.9), Rule("min_p", 0.05)),
    "min of 4": (Rule("min_p", 0.9, 4),),
    "p of 3": (Rule("top_p", 0.1, 3),),
    "epsilon": (Rule("epsilon", 0.002),),
    "epsilon of 3": (Rule("epsilon", 0.4, 3),),
    "eta": (Rule("eta", 0.002),),
    "sigma": (Rule("top_n_sigma", 1.0),),
    "a": (Rule("top_a", 0.2),),
    "h": (Rule("top_h", 0.5),),
    "typical": (Rule("typical", 0.9),),
    "typical k": (Rule("typical", 0.5), Rule("top_k", 9)),
    "lowest k": (Rule("top_k", 20, ties="lowest"),),
    "lowest p": (Rule("top_p", 0.5, ties="lowest"),),
    "many": (Rule("top_k", 600), Rule("top_p", 0.99)),
    "all kept": (Rule("top_k", 10**6), Rule("top_p", 0.5)),
    "fill": (Rule("top_k", 20, 1, -5.0),),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Take the kernels, wherever the tensors are."""
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)


def selected(scores, rules, **options):
    """What the kernels leave of scores, with poisoned memory before and after."""
    assert launch.takes_rules(rules)
    assert launch.takes_scores(scores)
    torch.empty_like(scores).fill_(math.nan)
    return launch.select(scores, launch.Selection(rules, scores.shape[1], scores.device, **options))


def drawn(scores, rules, seeds, positions, temperature=None):
    """The tokens that the kernels draw."""
    return launch.select_tokens(
        scores, launch.Selection(rules, scores.shape[1], scores.device), seeds, positions, temperature
    )


# 700: few enough for the registers, or all; 4400: more than one block of a row, odd strides.
@pytest.mark.parametrize("V", [700, 4401, 128256] if GPU else [700])
@pytest.mark.parametrize("chain", CHAINS)
def test_keeps_what_the_oracle_keeps(chain, V):
    """Every rule and order on hard rows, several to a batch."""
    rows = hard_rows(V)
    if chain == "typical":
        del rows["spike .50"]  # its two kinds of tokens are equally far from the entropy
    if chain == "sigma":
        del rows["lowest finite"]  # its squares are beyond float32
    if not GPU:
        rows = {name: rows[name] for name in ("gauss", "ties", "equal", "spike .95", "masked", "wide") if name in rows}
    scores = torch.stack(list(rows.values())).to(DEVICE)
    check_truncation(scores, CHAINS[chain], selected(scores, CHAINS[chain]))


@pytest.mark.parametrize("chain", ["k", "k p", "p", "epsilon", "eta", "sigma", "h"])
def test_rows_without_a_distribution(chain):
    """NaN, +inf and nothing but -inf, as torch has them."""
    scores = torch.stack(list(broken_rows(700).values())).to(DEVICE)
    torch.testing.assert_close(
        selected(scores, CHAINS[chain]), reference_truncate(scores, CHAINS[chain]), rtol=0, atol=0, equal_nan=True
    )


def is_sampled(V):
    """Which tokens of a large vocabulary the bounds of a row are guessed from."""
    run, runs = row.RUN.value, layout.SAMPLE // row.RUN.value
    sampled = torch.zeros(V, dtype=torch.bool)
    first = torch.arange(runs) * (V // run) // runs * run
    sampled[(first.unsqueeze(1) + torch.arange(run)).flatten()] = True
    return sampled


def test_more_candidates_than_were_collected(monkeypatch):
    """Of what the sample didn't see there may be more than there is room for, and less than the registers take."""
    # What is read beyond the room shows where it is no NaN.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    V, seeds = 12000, torch.arange(2, device=DEVICE)
    unseen = ~is_sampled(V)
    scores = torch.full((2, V), -5.0) + torch.randn(2, V, generator=torch.Generator().manual_seed(0)) * 0.01
    scores[:, unseen.nonzero().flatten()[:2000]] += 8.0
    scores[:, 3] = 3.0
    scores, rules = scores.to(DEVICE), (Rule("min_p", 0.1),)
    check_truncation(scores, rules, selected(scores, rules))
    tokens = drawn(scores, rules, seeds, seeds)
    assert torch.equal(tokens, draw.reference_draw(reference_truncate(scores, rules), seeds, seeds))


@pytest.mark.parametrize("chain", ["p", "typical", "sigma", "h", "min of 4"])
def test_greedy_rows_of_many_that_tie(chain):
    """Rows that their own temperature makes greedy, with more of the largest logit than there is room for."""
    seeds = torch.arange(2, device=DEVICE)
    scores = torch.randint(0, 4, (2, 5000), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    tokens = drawn(scores, CHAINS[chain], seeds, seeds, torch.zeros(2, device=DEVICE))
    assert tokens.tolist() == [row.index(3.0) for row in scores.tolist()]


@pytest.mark.parametrize("V", [2, 31, 32, 33])
def test_small_vocabularies(V):
    """Down to two tokens; one by itself is left to torch."""
    assert not launch.takes_scores(torch.zeros(3, 1, device=DEVICE))
    scores = torch.randn(3, V, generator=torch.Generator().manual_seed(V)).to(DEVICE)
    for chain in ("k", "p", "k p min", "typical"):
        check_truncation(scores, CHAINS[chain], selected(scores, CHAINS[chain]))
    all_but_one = (Rule("top_k", V - 1),)
    check_truncation(scores, all_but_one, selected(scores, all_but_one))


def test_values_by_row():
    """Each row has its own, off-values and values out of range included: those leave the row as it is."""
    V = 700
    scores = torch.stack([hard_rows(V)["gauss"]] * 6).to(DEVICE)
    k = torch.tensor([5, V, 20, V, 3, -1], device=DEVICE)
    p = torch.tensor([1.0, 0.9, 0.5, 1.0, math.nan, 7.0], device=DEVICE)
    rules = (Rule("top_k", k), Rule("top_p", p))
    for order in (rules, rules[::-1]):
        check_truncation(scores, order, selected(scores, order))
    assert torch.equal(selected(scores, rules)[3], scores[3])
    apart = torch.stack((p, p * 0, p * 0), 1)[:, 0]
    assert torch.equal(selected(scores, (rules[0], Rule("top_p", apart))), selected(scores, rules))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """What is kept is what the float64 oracle keeps of the logits as they are."""
    scores = torch.stack([hard_rows(700)["gauss"], hard_rows(700, 1)["zipf"]]).to(dtype).to(DEVICE)
    for chain in ("k p", "p"):
        check_truncation(scores, CHAINS[chain], selected(scores, CHAINS[chain]))


def test_strides_and_normalisation():
    """Scores of any strides; and logarithms of probabilities of what stays."""
    scores = hard_rows(1400)["gauss"].view(2, 700).to(DEVICE)
    wide = torch.full((2, 1500), math.nan, device=DEVICE)
    wide[:, 3:1403:2] = scores
    strided = wide[:, 3:1403:2]
    assert torch.equal(selected(strided, CHAINS["k p"]), selected(scores, CHAINS["k p"]))
    normal = selected(scores, CHAINS["k p"], normalise=True)
    torch.testing.assert_close(normal, reference_truncate(scores, CHAINS["k p"]).log_softmax(-1))


FLAT = {
    "p": (Rule("top_p", 0.5),),
    "p min": (Rule("top_p", 0.6), Rule("min_p", 0.001)),
    "k": (Rule("top_k", 3000),),
    "k at the limit": (Rule("top_k", 950),),  # there is room for as many, not for what a sample can't tell from them
    "epsilon": (Rule("epsilon", 1e-4),),
    "eta": (Rule("eta", 2e-5),),
    "sigma": (Rule("top_n_sigma", 3.0),),
    "p of many": (Rule("top_p", 0.01, 2000),),
}


def workspace(scores, rules):
    """What the kernels leave in the workspace of each row; first what the sample took it for."""
    selection = launch.Selection(rules, scores.shape[1], scores.device)
    return launch.launch_select(scores, selection, out=torch.empty_like(scores))


@triton.jit
def _noise_kernel(out_ptr, seed, position, N: tl.constexpr):
    token = tl.arange(0, N)
    tl.store(out_ptr + token, noise_of(token, tl.full([], 0, tl.int64) + seed, tl.full([], 0, tl.int64) + position))


@pytest.mark.parametrize(("seed", "position"), [(5, 7), (-3, 2**40 + 1), (2**62, -9)])
def test_the_noise_of_the_kernels_is_that_of_the_definition(seed, position):
    """All its bits: the first 16 alone decide nearly every draw."""
    noise = torch.empty(4096, device=DEVICE)
    _noise_kernel[1,](noise, seed, position, 4096)
    wanted = draw.exponential_noise(torch.tensor(seed), torch.tensor(position), torch.arange(4096))
    torch.testing.assert_close(noise.cpu(), wanted, rtol=2e-6, atol=0)


def sampled_rows(V, dtype):
    """Rows to be drawn from as they are: all sorts of them."""
    gauss = torch.randn(9, V, generator=torch.Generator().manual_seed(V)) * 3
    gauss[1] *= 0.03  # many may win
    gauss[2] = gauss[2].round()
    gauss[3] = 0.0
    gauss[4, torch.rand(V, generator=torch.Generator().manual_seed(1)) < 0.95] = -math.inf
    gauss[4, V // 2] = 0.0
    gauss[5, V // 2 :] = math.nan
    gauss[6, V // 3] = math.inf
    gauss[7] = -math.inf
    gauss[8] = -math.inf
    gauss[8, V - 1] = -5.0
    return gauss.to(dtype).to(DEVICE)


@pytest.mark.parametrize(
    ("V", "dtype"), [(2, torch.float32), (300, torch.float16), (5000, torch.float32), (9000, torch.bfloat16)]
)
def test_rows_that_nothing_is_dropped_of(monkeypatch, V, dtype):
    """By themselves, few or many, and beside rows that lose most of theirs: with the tokens of the reference."""
    scores, seeds = sampled_rows(V, dtype), torch.arange(9, device=DEVICE) * 2**33
    by_row = torch.linspace(0.5, 2.0, 9, device=DEVICE)
    by_row[1], by_row[3] = 0.0, 1e-20
    ordinary = torch.randn(1, V, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    off = torch.tensor([1.0] * 9 + [0.5], device=DEVICE)
    for temperature in (None, torch.tensor(0.7, device=DEVICE), by_row):
        given = (scores, launch.Selection((), V, scores.device), seeds, seeds, temperature)
        wanted, _ = launch.reference_tokens(*given, None, launch.NOTHING)
        assert torch.equal(launch.select_tokens(*given), wanted)
        with monkeypatch.context() as context:
            context.setattr(launch, "_MOST_SAMPLED", 0)
            many = (scores, launch.Selection((), V, scores.device), *given[2:])
            assert torch.equal(launch.select_tokens(*many), wanted)
        more = temperature if temperature is None or not temperature.ndim else temperature.repeat(2)[:10]
        both, last = launch.Selection((Rule("top_p", off),), V, scores.device), seeds.repeat(2)[:10]
        found = launch.select_tokens(torch.cat((scores, ordinary)), both, last, last, more)
        assert torch.equal(found[:9], wanted)


@pytest.mark.parametrize("chain", ["penalty", "ban"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chain_before_a_draw_of_all(chain, dtype):
    """What a chain changes or bans counts before anything is ruled out."""
    V, seeds = 5000, torch.arange(4, device=DEVICE)
    scores = torch.randn(4, V, generator=torch.Generator().manual_seed(2)).to(dtype).to(DEVICE)
    ids = scores.topk(500).indices
    processors = {
        "penalty": [fl.RepetitionPenaltyLogitsProcessor(50.0)],
        "ban": [fl.SuppressTokensLogitsProcessor(ids[0].tolist())],
    }[chain]
    found = fl.Sampler(processors)(scores, seeds, seeds, input_ids=ids).tokens
    plain = scores.float()
    for processor in processors:
        plain = processor(ids, plain)
    assert torch.equal(found, draw.reference_draw(plain, seeds, seeds))


@pytest.mark.parametrize(
    ("V", "deviation", "mass", "temperature"),
    [(12_000, 1.0, 0.5, None), (30_000, 2.0, 0.9, 0.7), (30_000, 1.4, 0.3, 1.3), (12_000, 0.5, 0.6, 1e-4)],
)
def test_of_a_band_only_the_edges_are_collected(V, deviation, mass, temperature):
    """What is typical lies between two cut-offs; a temperature is no part of what the filter compares."""
    scores = torch.randn(2, V, generator=torch.Generator().manual_seed(1)).to(DEVICE) * deviation
    divisor = None
    if temperature is not None:
        divisor = torch.tensor(temperature, device=DEVICE)
        scores = scores * (temperature / 0.7)  # of the same shape, once divided
    scaled = scores if divisor is None else scores / divisor
    rules = (Rule("typical", mass),)
    selection = launch.Selection(rules, V, scores.device)
    out = torch.empty_like(scores)
    work = launch.launch_select(scores, selection, out=out, temperature=divisor)
    assert work[:, row.STATE_AT.value].tolist() == [row.BRACKET.value] * 2
    check_truncation(scaled, rules, out)
    kept = (out > -math.inf).sum(1)
    assert (work[:, row.COUNT_AT.value] < kept).all()
    seeds = torch.tensor([5, 6], device=DEVICE)
    wanted = draw.reference_draw(reference_truncate(scaled, rules), seeds, seeds)
    assert torch.equal(drawn(scores, rules, seeds, seeds, divisor), wanted)


@pytest.mark.parametrize("V", [12_000, 120_000] if GPU else [12_000])
@pytest.mark.parametrize("chain", FLAT)
def test_flat_rows_keep_most_unseen(chain, V):
    """Where thousands are kept only those at the cut-off are collected; their tokens are those of the reference."""
    scores = torch.randn(2, V, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    if V == 12_000:
        found = workspace(scores, FLAT[chain])[:, 0].tolist()
        assert found == [3 if chain != "p of many" else 1] * 2
    check_truncation(scores, FLAT[chain], selected(scores, FLAT[chain]))
    seeds = torch.tensor([5, 6], device=DEVICE)
    tokens = drawn(scores, FLAT[chain], seeds, seeds)
    wanted = draw.reference_draw(reference_truncate(scores, FLAT[chain]), seeds, seeds)
    assert torch.equal(tokens, wanted)
    # What may be drawn is collected beside the candidates, and counts for no rule.
    selection = launch.Selection(FLAT[chain], V, scores.device)
    sampled = launch.launch_select(scores, selection, seeds=seeds, positions=seeds, tokens=torch.empty_like(seeds))
    assert torch.equal(launch.kept_in(sampled), launch.kept_in(workspace(scores, FLAT[chain])))


LISTED = {
    "p": (Rule("top_p", 0.9),),
    "lowest p": (Rule("top_p", 0.9, ties="lowest"),),
    "p k": (Rule("top_p", 0.9), Rule("top_k", 3000)),
    "typical": (Rule("typical", 0.1),),
    "k": (Rule("top_k", 6000),),
}


def between_bounds(scores, work):
    """How many tokens of each row, which no temperature divides, lie between the bounds in its workspace."""
    low, up, first, last = (
        work[:, at.value + i].view(torch.float32)[:, None]
        for at in (row.RAW_RANGE_AT, row.RAW_CERTAIN_AT)
        for i in (0, 1)
    )
    return ((scores >= low) & (scores <= up) & ~((scores >= first) & (scores <= last))).sum(1)


@pytest.mark.parametrize(("k", "V"), [(50, 32_000), (50, 151_936), (50, 262_144), (5, 262_144), (200, 151_936)])
def test_what_bounds_let_through_has_room_in_registers(k, V):
    """A row with more candidates takes several times as long: of a larger vocabulary a sample lets more through."""
    scores = torch.randn(12, V, generator=torch.Generator().manual_seed(k)).to(DEVICE)
    rules = (Rule("top_k", k), Rule("top_p", 0.9))
    slots = launch.Selection(rules, V, scores.device).slots
    assert len(slots) == 1
    assert (workspace(scores, rules)[:, row.COUNT_AT.value] <= slots[0]).all()


@pytest.mark.parametrize("chain", LISTED)
def test_many_candidates_are_refined_block_by_block(monkeypatch, chain):
    """More than are looked at at once, and no more than can be put by."""
    V, most = (151_936, 4096) if GPU else (40_000, 256)
    if not GPU:
        for module in (layout, launchers):
            for name in ("ROOM", "SOME", "MANY"):
                monkeypatch.setattr(module, name, 256)
    scores = torch.randn(2, V, generator=torch.Generator().manual_seed(1))
    scores[1] = (scores[1] * 16).round() / 16  # hundreds tie
    scores, rules = scores.to(DEVICE), LISTED[chain]
    if chain in ("p", "lowest p"):
        work = workspace(scores, rules)
        found = between_bounds(scores, work)
        assert work[:, 0].tolist() == [3, 3]
        assert (found > most).all()
        assert (found <= launch.Selection(rules, V, scores.device).layouts[4].shape.slots).all()
    check_truncation(scores, rules, selected(scores, rules))
    if chain != "typical":  # whose cut-off may be a matter of rounding
        seeds = torch.tensor([5, 6], device=DEVICE)
        wanted = draw.reference_draw(reference_truncate(scores, rules), seeds, seeds)
        assert torch.equal(drawn(scores, rules, seeds, seeds), wanted)


@pytest.mark.parametrize("slots", ["registers", "list"])
def test_a_sample_that_misleads(slots):
    """Tokens that no sample sees: the whole row is looked at, and what the filter took for kept is taken back."""
    V = 12_000
    scores = torch.randn(3, V, generator=torch.Generator().manual_seed(2))
    sampled = is_sampled(V)
    scores[0, ~sampled] += 3
    scores[1, ~sampled] -= 3
    scores[2, torch.arange(V)[~sampled][0]] = 40
    scores = scores.to(DEVICE)
    for chain in ("p", "p min", "k"):
        selection = launch.Selection(FLAT[chain], V, scores.device)
        if slots == "list":
            selection.slots = (1,)  # hardly any candidates are refined in registers
        check_truncation(scores, FLAT[chain], launch.select(scores, selection))


@pytest.mark.parametrize("chain", ["k min", "p min", "typical min", "k min of 9"])
def test_a_goal_that_a_later_rule_leaves_no_room_for(chain):
    """Where min-p drops all that is no candidate, fewer than top-k wants suffice; not where a band has them."""
    V = 12_000
    noise = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    scores, sampled = noise * 3, is_sampled(V)
    scores[3] = noise[3] * 0.01  # all that min-p keeps: fewer than top-k has left, whatever it spares
    # In the last row a tenth of the mass lies beyond a band that no sample has seen to the end.
    scores[2] = -15.0
    near, far = (of.nonzero().flatten()[:count] for of, count in ((sampled, 300), (~sampled, 120)))
    scores[2, near], scores[2, far] = noise[2, near] * 0.1, noise[2, far] * 0.1 - 1
    scores = scores.to(DEVICE)
    work = workspace(scores, CHAINS[chain])
    if chain in ("k min", "p min"):
        assert work[0, row.COUNT_AT.value] < 50
        assert work[:2, row.DONE_AT.value].all()
    check_truncation(scores, CHAINS[chain], selected(scores, CHAINS[chain]))


def test_tokens_are_the_reference_draw(monkeypatch):
    """Greedy, cold and warm rows in one batch, with truncations and without, token for token."""
    V, B = 700, 8
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(B, V, generator=generator) * 3
    seeds, positions = torch.arange(B) * 12345678901 - 3, torch.arange(B) * 2**33 + 7
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.5, 0.0, 2.0, 0.3, 1.0])
    p = torch.tensor([0.9, 0.9, 1.0, 0.5, 1.0, 1.0, 0.9, 0.95])
    arguments = [each.to(DEVICE) for each in (seeds, positions, temperature, p)]
    found = drawn(logits.to(DEVICE), (Rule("top_p", arguments[3]),), *arguments[:3])
    monkeypatch.setattr(launch, "FORCE_KERNEL", False)
    wanted = fl.sample(logits, seeds=seeds, positions=positions, temperature=temperature, top_p=p).tokens
    assert found.tolist() == wanted.tolist()


def test_a_row_has_its_token_to_itself():
    """Whatever its place and its neighbours."""
    logits = torch.stack([*hard_rows(700).values()])[:6].to(DEVICE)
    seeds, positions = torch.arange(6, device=DEVICE), torch.full((6,), 5, device=DEVICE)
    together = drawn(logits, CHAINS["k p"], seeds, positions)
    order = torch.tensor([4, 0, 5, 2], device=DEVICE)
    assert torch.equal(drawn(logits[order], CHAINS["k p"], seeds[order], positions[order]), together[order])


def test_rows_without_a_distribution_have_a_token():
    """The lowest id of NaN, of +inf, or 0."""
    logits = torch.stack([*broken_rows(700).values()]).to(DEVICE)
    seeds = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    for rules in ((), CHAINS["k"], CHAINS["p"]):
        assert drawn(logits, rules, seeds, seeds).tolist() == [350, 0, 0, 233, 0, 0]


def test_steps_that_share_a_pass_are_the_steps_one_by_one():
    """What a plan does on a GPU: a fold, truncations and a normalisation in the same kernels."""
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    scores = torch.stack([hard_rows(700)[name] for name in ("gauss", "zipf")]).to(DEVICE)
    before = [fl.RepetitionPenaltyLogitsProcessor(2.0), fl.SuppressTokensLogitsProcessor([3, 4], DEVICE)]
    after = [fl.TopKLogitsWarper(50), fl.TopPLogitsWarper(0.9)]
    for processors in ([*before, *after], after, [*before[1:], *after]):
        normalised = fl.LogitsProcessorList([*processors, fl.LogitNormalization()])
        plan = fl.LogitsProcessorList(processors).plan
        wanted = scores
        for step in plan.inner_parts:
            wanted = step(ids, wanted)
        found = plan(ids, scores)
        assert torch.equal(found, wanted)
        (fused,) = normalised.plan.parts
        torch.testing.assert_close(fused(ids, scores), found.log_softmax(-1))


def test_a_fill_value_that_can_be_drawn(monkeypatch):
    """A truncation that leaves a finite value joins no draw: what it dropped can still come."""
    logits = torch.zeros(64, 100, device=DEVICE)
    logits[:, :5] = 1.0
    seeds, positions = torch.arange(64, device=DEVICE), torch.zeros(64, dtype=torch.int64, device=DEVICE)
    processors = fl.LogitsProcessorList([fl.TopKLogitsWarper(5, filter_value=0.5)])
    found = fl.sample(logits, processors, seeds=seeds, positions=positions).tokens
    monkeypatch.setattr(launch, "FORCE_KERNEL", False)
    wanted = fl.sample(logits.cpu(), processors, seeds=seeds.cpu(), positions=positions.cpu()).tokens
    assert found.tolist() == wanted.tolist()
    assert max(wanted.tolist()) >= 5


# -- On a GPU only ------------------------------------------------------------------------------------------------


@gpu
def test_draws_follow_the_distribution():
    """A million draws from a truncated row, by their chi-square with a pooled tail."""
    V, draws = 5000, 1 << 20
    row = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 2
    rules = (Rule("top_k", 200), Rule("top_p", 0.95))
    counts = torch.zeros(V, dtype=torch.float64)
    logits = row.to(DEVICE).expand(1 << 12, V)
    for block in range(draws >> 12):
        seeds = torch.arange(block << 12, (block + 1) << 12, device=DEVICE)
        counts += torch.bincount(drawn(logits, rules, seeds, torch.zeros_like(seeds)), minlength=V).cpu()
    p = reference_truncate(row.double().unsqueeze(0), rules)[0].softmax(-1)
    assert chi_square(counts, p) > 1e-3


@gpu
def test_one_graph_serves_other_logits():
    """Captured once and replayed with other logits, parameters, seeds: equal to eager calls, which never wait."""
    B, V = 5, 32000
    logits = torch.randn(B, V, device=DEVICE)
    temperature, p = torch.full((B,), 0.7, device=DEVICE), torch.full((B,), 0.9, device=DEVICE)
    seeds, positions = torch.arange(B, device=DEVICE), torch.zeros(B, dtype=torch.int64, device=DEVICE)
    sampler = fl.Sampler(temperature=temperature, top_k=50, top_p=p)
    processors = fl.LogitsProcessorList(
        [fl.TemperatureLogitsWarper(0.7), fl.TopKLogitsWarper(50), fl.TopPLogitsWarper(0.9), fl.LogitNormalization()]
    )
    ids = torch.zeros(B, 3, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler(logits, seeds, positions)
        processors(ids, logits)
    finally:
        torch.cuda.set_sync_debug_mode(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, processed = sampler(logits, seeds, positions).tokens, processors(ids, logits)
    for step in range(3):
        logits.normal_().mul_(1 + step)
        temperature.uniform_(0.0, 2.0)
        temperature[step] = 0
        p.uniform_(0.1, 1.0)
        positions += 1
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(tokens, sampler(logits, seeds, positions).tokens)
        assert torch.equal(processed, processors(ids, logits))


@gpu
def test_two_streams_at_once():
    """Calls on two streams have their own workspace."""
    B, V = 16, 128256
    inputs = [torch.randn(B, V, device=DEVICE) * scale for scale in (3, 0.01)]
    wanted = [selected(each, CHAINS["k p"]) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, each in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(selected(each, CHAINS["k p"]))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, wanted))


@gpu
def test_fused_with_what_precedes():
    """A whole list, fused, is the fold and then the truncation."""
    B, V = 6, 32000
    ids = torch.randint(0, 200, (B, 64), device=DEVICE)
    scores = torch.randn(B, V, device=DEVICE) * 3
    before = [
        fl.RepetitionPenaltyLogitsProcessor(1.1), fl.NoRepeatNGramLogitsProcessor(2),
        fl.SuppressTokensLogitsProcessor(list(range(50))), fl.TemperatureLogitsWarper(0.7),
    ]  # fmt: skip
    after = [fl.TopKLogitsWarper(50), fl.TopPLogitsWarper(0.9), fl.MinPLogitsWarper(0.05)]
    folded = fl.LogitsProcessorList(before)(ids, scores)
    fused = fl.LogitsProcessorList([*before, *after])(ids, scores)
    rules = (Rule("top_k", 50), Rule("top_p", 0.9), Rule("min_p", 0.05))
    assert torch.equal(fused, selected(folded, rules))
    check_truncation(folded, rules, fused)
    tokens = fl.sample(
        scores, [*before[:3]], input_ids=ids, seeds=5, positions=2, temperature=0.7, top_k=50, top_p=0.9
    ).tokens
    assert torch.equal(tokens, drawn(folded, rules[:2], *(torch.full((B,), n, device=DEVICE) for n in (5, 2))))
