"""Draws: the generator's published answers, the distribution, independence of the batch, reports on a token."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from fastlogits_kernels.draw import _exponential, _noise_of_rows, exponential_noise, philox, reference_draw
from fastlogits_kernels.rules import RULES, Rule, argument_of
from fastlogits_kernels.truncate.dispatch import truncate

import fastlogits as fl
from fastlogits.sampling import SamplingOptions
from tests.chi_square import chi_square, tail_of
from tests.oracle import broken_rows, hard_rows

INF = float("inf")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(
    scope="module",
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))],
)
def device(request):
    return request.param


def gauss(B: int, V: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * 3


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal; on a GPU torch adds up the rows of another batch in another order."""
    if first.is_cuda and first.is_floating_point():
        return torch.allclose(first, second, rtol=0, atol=1e-5, equal_nan=True)
    return torch.equal(first.nan_to_num(1e30), second.nan_to_num(1e30))


# -- The generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, words):
    found = philox([torch.tensor(word) for word in key], [torch.tensor(word) for word in counter])
    assert " ".join(f"{int(word):08x}" for word in found) == words


def philox_by_hand(key, counter):
    """In Python's integers."""
    (k0, k1), (a, b, c, d) = key, counter
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = second >> 32 ^ b ^ k0, second & 0xFFFFFFFF, first >> 32 ^ d ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return a, b, c, d


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, -1, -(2**63)])
@pytest.mark.parametrize("position", [0, 7, 2**32 + 5, -3])
def test_the_noise_is_what_the_definition_says(seed, position):
    tokens = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 127, 128_255])
    found = exponential_noise(torch.tensor(seed), torch.tensor(position), tokens)
    for token, noise in zip(tokens.tolist(), found.tolist(), strict=True):
        assert noise == pytest.approx(noise_by_hand(seed, position, token), rel=3e-7)


def noise_by_hand(seed: int, position: int, token: int) -> float:
    """The definition in whole numbers, and one logarithm in double precision."""
    halves = [(value % 2**32, (value >> 32) % 2**32) for value in (seed, position)]
    coarse, fine = (
        philox_by_hand(halves[0], (block, *halves[1], call)) for call, block in enumerate((token // 8, token // 4))
    )
    n = (coarse[token % 8 // 2] >> 16 * (token % 2)) % 2**16 * 2**32 + fine[token % 4]
    # 1 - u too is a number of 49 bits, which float64 holds.
    return -math.log1p(-(n + 0.5) * 2.0**-48)


@pytest.mark.parametrize("n", [0, 1, 2**24, 2**46 - 1, 2**46, 2**47 - 1, 2**47, 2**48 - 2**20, 2**48 - 2, 2**48 - 1])
def test_the_noise_has_all_its_digits_at_both_ends(n):
    found = _exponential(torch.tensor([n]))
    assert found.item() == pytest.approx(-math.log1p(-(n + 0.5) * 2.0**-48), rel=3e-7)
    assert 2.0**-49 <= found.item() < 34


def noise_in_numpy(seed: int, positions: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The definition once more, in numpy and in double precision, of many positions and tokens."""
    low = np.uint64(0xFFFFFFFF)
    key = [np.uint64(seed) & low, np.uint64(seed) >> np.uint64(32)]

    def words(blocks: np.ndarray, call: int) -> np.ndarray:
        a, b, c = (
            blocks.astype(np.uint64),
            positions.astype(np.uint64) & low,
            positions.astype(np.uint64) >> np.uint64(32),
        )
        d = np.full_like(a, call)
        for turn in range(10):
            k0, k1 = (np.uint64((int(key[i]) + turn * step) % 2**32) for i, step in enumerate((0x9E3779B9, 0xBB67AE85)))
            first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
            a, b, c, d = second >> np.uint64(32) ^ b ^ k0, second & low, first >> np.uint64(32) ^ d ^ k1, first & low
        return np.stack((a, b, c, d))

    def of(words: np.ndarray, which: np.ndarray) -> np.ndarray:
        return np.take_along_axis(words, which[None], 0)[0]

    coarse = of(words(tokens // 8, 0), tokens % 8 // 2) >> (16 * (tokens % 2)).astype(np.uint64) & np.uint64(0xFFFF)
    n = coarse << np.uint64(32) | of(words(tokens // 4, 1), tokens % 4)
    return -np.log1p(-(n.astype(np.float64) + 0.5) * 2.0**-48)


def test_ten_million_noises_are_exponential():
    """Against numpy one by one, and by a chi-square whose last cells on both sides hold some hundred."""
    seed, count, chunk = 2**40 + 7, 10_000_000, 1_000_000
    inner = np.linspace(0, 1, 1001)[1:-1]
    edges = np.concatenate(([2e-5, 1e-4], inner, [1 - 1e-4, 1 - 2e-5]))
    cells = np.zeros(len(edges) + 1)
    for start in range(0, count, chunk):
        tokens = np.arange(start, start + chunk) % 1000
        positions = np.arange(start, start + chunk) // 1000
        found = exponential_noise(torch.tensor(seed), torch.from_numpy(positions), torch.from_numpy(tokens)).numpy()
        if start == 0:
            np.testing.assert_allclose(found, noise_in_numpy(seed, positions, tokens), rtol=3e-7)
        cells += np.bincount(np.searchsorted(edges, -np.expm1(-found.astype(np.float64))), minlength=len(cells))
    expected = np.diff(np.concatenate(([0.0], edges, [1.0]))) * count
    assert tail_of(((cells - expected) ** 2 / expected).sum(), len(cells) - 1) > 1e-3


def test_ten_million_draws_fit_the_distribution(device):
    """Without truncation, with tokens that are drawn some ten times among them."""
    V, B, draws = (4096, 20_000, 10_000_000) if device == "cuda" else (8, 500_000, 10_000_000)
    p = torch.logspace(0, -6, V, dtype=torch.float64)
    logits, count = p.log().float().to(device).expand(B, V), torch.arange(B, device=device)
    sampler = fl.Sampler()
    tokens = [sampler(logits, 99, count + turn * B).tokens.cpu() for turn in range(draws // B)]
    counts = torch.bincount(torch.cat(tokens), minlength=V)
    assert chi_square(counts, p / p.sum()) > 1e-3


@pytest.mark.parametrize("V", [1, 6, 1003, 50_000])
def test_the_noise_of_some_tokens_is_that_of_whole_rows(V):
    # Or a row would depend on how many tokens its neighbours keep.
    seeds, positions = torch.arange(5) * 10**12, torch.arange(5)
    rows = _noise_of_rows(seeds, positions, V)
    assert rows.shape == (5, V)
    some = torch.randint(V, (5, 77), generator=torch.Generator().manual_seed(0))
    found = exponential_noise(seeds[:, None], positions[:, None], some)
    assert torch.equal(found, rows.gather(1, some))
    assert torch.equal(found.log(), rows.log().gather(1, some))
    assert torch.equal(exponential_noise(seeds[2], positions[2], some[2, :3]).log(), found[2, :3].log())


# -- The draw --------------------------------------------------------------------------------------------------------


def drawn_by_hand(scores: torch.Tensor, seeds, positions) -> torch.Tensor:
    tokens = torch.arange(scores.shape[1])
    noise = torch.stack([exponential_noise(seed, at, tokens) for seed, at in zip(seeds, positions, strict=True)])
    return (scores - noise.log()).argmax(-1)


@pytest.mark.parametrize("V", [1, 2, 5, 64, 1001, 32_003])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.1])
def test_the_token_is_the_argmax_of_the_definition(device, V, kept):
    scores = gauss(6, V)
    dropped = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) > kept
    dropped[:, V // 2] = False
    scores[dropped] = -INF
    seeds, positions = torch.arange(6) * 7919, torch.tensor([0, 5, 5, 2**33, 9, 1])
    found = fl.sample(scores.to(device), seeds=seeds.to(device), positions=positions.to(device)).tokens
    assert found.dtype == torch.int64
    assert torch.equal(found.cpu(), drawn_by_hand(scores, seeds, positions))


@pytest.mark.parametrize("vary", ["positions", "seeds", "rows of both"])
def test_a_million_draws_fit_the_distribution(device, vary):
    V, B, rounds = 48, 20_000, 50
    row = -2.5 * torch.log(torch.randperm(V, generator=torch.Generator().manual_seed(3)) + 1.0)
    rules = {"top_k": 40, "top_p": 0.9999}
    sampler = fl.Sampler(temperature=0.8, **rules)
    kept = truncate(row[None] / 0.8, [Rule(kind, value) for kind, value in rules.items()])[0]
    logits, count, tokens = row.to(device).expand(B, V), torch.arange(B, device=device), []
    for turn in range(rounds):
        fresh = count + turn * B
        seeds, positions = {
            "positions": (1234, fresh),
            "seeds": (fresh, 77),
            "rows of both": (count % 1000, count // 1000 + 20 * turn),
        }[vary]
        tokens.append(sampler(logits, seeds, positions).tokens.cpu())
    drawn = torch.cat(tokens)
    assert len(drawn) == 1_000_000
    assert chi_square(torch.bincount(drawn, minlength=V), kept.double().softmax(-1)) > 1e-3
    # Neighbouring draws know nothing of each other: pairs of the four likeliest tokens.
    likely = kept.topk(4).indices
    pairs = drawn.view(-1, 2)
    both = (pairs[:, :1] == likely).int().argmax(1) * 4 + (pairs[:, 1:] == likely).int().argmax(1)
    both = both[(torch.isin(pairs[:, 0], likely)) & torch.isin(pairs[:, 1], likely)]
    p = kept.double().softmax(-1)[likely]
    assert chi_square(torch.bincount(both, minlength=16), torch.outer(p, p).flatten() / p.sum() ** 2) > 1e-3


def test_a_row_draws_the_same_token_in_any_batch(device):
    B, V = 24, 3000
    logits = torch.cat([torch.stack(list(hard_rows(V).values())), gauss(B, V)])[:B].to(device)
    generator = torch.Generator().manual_seed(5)
    seeds, positions = (torch.randint(0, 2**40, (B,), generator=generator).to(device) for _ in range(2))
    parameters = {
        "temperature": torch.linspace(0, 2, B).to(device),
        "top_k": torch.randint(1, 200, (B,), generator=generator).to(device),
        "top_p": torch.linspace(0.3, 1, B).to(device),
        "min_p": torch.linspace(0, 0.1, B).to(device),
    }
    options = {"logprobs": "processed", "top_logprobs": 3}
    whole = fl.sample(logits, seeds=seeds, positions=positions, **parameters, **options)
    assert fl.sample(logits, seeds=seeds, positions=positions, **parameters).tokens.equal(whole.tokens)
    order = torch.randperm(B, generator=generator).to(device)
    for rows in (order, order[:7], order[7:8]):
        some = fl.sample(
            logits[rows], seeds=seeds[rows], positions=positions[rows],
            **{name: value[rows] for name, value in parameters.items()}, **options,
        )  # fmt: skip
        for found, right in zip(some, whole, strict=True):
            assert same(found, right[rows])


@pytest.mark.parametrize("order", ["transformers", "vllm"])
@pytest.mark.parametrize("ties", ["all", "lowest"])
def test_parameters_per_row_are_those_of_each_row_alone(device, order, ties):
    logits = gauss(8, 2000).bfloat16().to(device)
    rows = {
        "temperature": [0.0, 0.5, 0.7, 1.0, 1.3, 2.0, 1.0, 0.0],
        "top_k": [5, 50, 2000, 1, 7, 3000, 20, 4],
        "top_p": [0.9, 1.0, 0.5, 0.1, 0.99, 0.0, 0.95, 1.0],
        "min_p": [0.0, 0.05, 0.1, 1.0, 0.0, 0.01, 0.0, 0.5],
        "typical_p": [1.0, 0.9, 1.0, 0.5, 1.0, 0.2, 1.0, 1.0],
        "epsilon": [0.0, 3e-4, 0.0, 0.01, 0.0, 0.0, 0.1, 0.0],
        "eta": [3e-4, 0.0, 2e-3, 0.0, 0.0, 0.0, 0.0, 0.0],
        "top_h": [1.0, 1.0, 0.5, 1.0, 0.9, 1.0, 1.0, 1.0],
        "top_n_sigma": [INF, 1.0, INF, 3.0, INF, INF, 2.0, INF],
    }
    tensors = {
        name: torch.tensor(values, dtype=torch.int32 if name == "top_k" else torch.float32, device=device)
        for name, values in rows.items()
    }
    sampler = fl.Sampler(**tensors, order=order, ties=ties, logprobs="processed", top_logprobs=4)
    together = sampler(logits, torch.arange(8, device=device), 3)
    for row in range(8):
        numbers = {name: value[row].item() for name, value in tensors.items()}
        options = {"order": order, "ties": ties, "logprobs": "processed", "top_logprobs": 4}
        alone = fl.sample(logits[row : row + 1], seeds=row, positions=3, **numbers, **options)
        for found, right in zip(together, alone, strict=True):
            assert same(found[row : row + 1], right), row


def test_the_orders_are_those_of_the_stacks():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    both = {"top_p": 0.75, "min_p": 0.3, "logprobs": "processed", "top_logprobs": 4, "seeds": 0, "positions": 0}
    # After top-p 0.75 three are left; min-p 0.3 leaves three of the four, of which top-p takes 0.75 of 0.9.
    kept = {
        order: int((fl.sample(logits, order=order, **both).top_logprobs > -INF).sum())
        for order in ("transformers", "vllm")
    }
    assert kept == {"transformers": 3, "vllm": 2}


def test_processors_come_first(device):
    logits = gauss(2, 50).to(device)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]], device=device)
    best = logits.argmax(-1)
    ban = fl.SuppressTokensLogitsProcessor(best.tolist())
    for processors in ([ban], fl.LogitsProcessorList([ban, fl.RepetitionPenaltyLogitsProcessor(1.5)])):
        found = fl.sample(logits, processors, seeds=1, positions=2, input_ids=ids, temperature=0.0, logprobs="raw")
        right = logits
        for processor in processors:
            right = processor(ids, right)
        assert torch.equal(found.tokens, right.argmax(-1))
        raw = logits.log_softmax(-1).gather(1, found.tokens[:, None])[:, 0]
        assert torch.allclose(found.logprobs, raw)
    first = fl.SuppressFirstTokens(best.tolist())
    for step, right in ((0, False), (1, True)):
        found = fl.sample(
            logits, [first], seeds=1, positions=2, input_ids=ids, temperature=0.0, prompt_length=3 - step
        )  # fmt: skip
        assert torch.equal(found.tokens, best) == right


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_layout_are_left_alone(device, dtype):
    logits = gauss(4, 500).to(device, dtype)
    wide = torch.full((4, 3, 511), math.nan, device=device, dtype=dtype)
    strided = wide[:, 1, 5:505].copy_(logits)
    before = strided.clone()
    parameters = {"seeds": torch.arange(4, device=device), "positions": 9, "temperature": 0.8, "top_p": 0.9}
    found = fl.sample(strided, **parameters)
    assert torch.equal(strided, before)
    assert torch.equal(found.tokens, fl.sample(logits.float(), **parameters).tokens)


# -- Rows of all kinds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [2, 300, 6000])
@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9}])
def test_rows_without_a_distribution_get_the_documented_token(device, V, parameters):
    rows = broken_rows(V)
    logits = torch.stack(list(rows.values())).to(device)
    found = fl.sample(logits, seeds=3, positions=4, logprobs="raw", top_logprobs=1, **parameters)
    for row, token in zip(rows.values(), found.tokens.tolist(), strict=True):
        if bool(row.isnan().any()):
            assert token == int(row.isnan().int().argmax())
        elif bool((row == INF).any()):
            assert token == int((row == INF).int().argmax())
        else:
            assert token == 0
    assert bool(found.logprobs.isnan().all())


def test_greedy_rows_take_the_lowest_of_the_largest(device):
    logits = torch.randint(0, 4, (16, 5000), generator=torch.Generator().manual_seed(0)).float().to(device)
    right = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    temperature = torch.zeros(16, device=device)
    for each in (0, 0.0, temperature):
        found = fl.sample(logits, seeds=0, positions=0, temperature=each, typical_p=0.2)
        assert torch.equal(found.tokens, right)
    temperature[::2] = 1.0
    mixed = fl.sample(logits, seeds=0, positions=0, temperature=temperature).tokens
    assert torch.equal(mixed[1::2], right[1::2])
    assert torch.equal(mixed[::2], fl.sample(logits[::2], seeds=0, positions=0).tokens)


def test_one_survivor_is_drawn(device):
    logits = torch.full((3, 700), -INF)
    logits[[0, 1, 2], [0, 350, 699]] = torch.tensor([-5.0, 0.0, 1e4])
    found = fl.sample(logits.to(device), seeds=1, positions=1, temperature=0.5, top_p=0.3, logprobs="processed")
    assert found.tokens.tolist() == [0, 350, 699]
    assert found.logprobs.tolist() == [0.0, 0.0, 0.0]
    assert found.ranks.tolist() == [1, 1, 1]


def test_no_rows(device):
    found = fl.sample(torch.zeros(0, 9, device=device), seeds=0, positions=0, top_k=2, logprobs="raw", top_logprobs=2)
    assert [tuple(each.shape) for each in found] == [(0,), (0,), (0,), (0, 2), (0, 2)]


# -- Log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, 60])  # the second is more than kernels look for
@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_log_probabilities_are_those_of_the_distribution_asked_for(device, kind, count):
    logits = gauss(5, 1000).bfloat16().float()
    parameters = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
    found = fl.sample(
        logits.to(device), seeds=torch.arange(5).to(device), positions=0, logprobs=kind, top_logprobs=count,
        **parameters,
    )  # fmt: skip
    scores = logits
    if kind == "processed":
        scores = truncate(logits / 0.7, [Rule("top_k", 50), Rule("top_p", 0.9)])
    right = scores.double().log_softmax(-1)
    tokens, logprobs, ranks, top_tokens, top_logprobs = (each.cpu() for each in found if each is not None)
    own = right.gather(1, tokens[:, None])
    assert torch.allclose(logprobs.double(), own[:, 0], atol=1e-5)
    assert torch.equal(ranks, (scores >= scores.gather(1, tokens[:, None])).sum(1))
    assert torch.equal(top_tokens, scores.sort(descending=True, stable=True).indices[:, :count])
    assert torch.allclose(top_logprobs.double(), right.gather(1, top_tokens), atol=1e-5)


def test_nothing_is_reported_that_nobody_asked_for():
    logits = gauss(2, 9)
    assert fl.sample(logits, seeds=0, positions=0)[1:] == (None, None, None, None)
    found = fl.sample(logits, seeds=0, positions=0, logprobs="raw")
    assert found.top_tokens is None
    assert found.top_logprobs is None


def test_equal_tokens_are_listed_by_their_ids(device):
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0] * 100]).to(device)
    found = fl.sample(logits, seeds=0, positions=0, temperature=0.0, logprobs="raw", top_logprobs=5)
    assert found.top_tokens.tolist() == [[1, 3, 6, 8, 10]]
    assert found.tokens.tolist() == [1]
    assert found.ranks.tolist() == [300]
    few = logits.masked_fill(logits < 2, -INF)
    few[:, 15:] = -INF
    found = fl.sample(few, seeds=0, positions=0, logprobs="raw", top_logprobs=9)
    assert found.top_tokens.tolist() == [[1, 3, 6, 8, 10, 13, 0, 2, 4]]
    few[0, 2] = math.nan
    assert fl.sample(few, seeds=0, positions=0, logprobs="raw", top_logprobs=2).top_tokens.tolist() == [[2, 1]]


# -- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processors", "error", "message"),
    [
        ([{"top_k": 3}], AttributeError, r"must be callable with \(input_ids, scores\), got dict \(number 1\)"),
        ([fl.TopKLogitsWarper(3), None], AttributeError, r"must be callable .* got None \(number 2\)"),
        ([fl.TopKLogitsWarper], ValueError, "must be objects, got the class TopKLogitsWarper"),
    ],
)
def test_what_is_no_processor_is_refused_when_the_sampler_is_made(processors, error, message):
    with pytest.raises(error, match=message):
        fl.Sampler(processors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.5}, "temperature must be .* got .*-0.5"),
        ({"temperature": math.nan}, "temperature must be .* got .*nan"),
        ({"temperature": INF}, "temperature must be .* got .*inf"),
        ({"temperature": "hot"}, "temperature must be .* got .*'hot'"),
        ({"temperature": torch.tensor([1.0, -1.0])}, "temperature must be .* got .*-1 in row 1"),
        ({"temperature": torch.tensor([1.0, math.nan])}, "temperature must be .* got .*nan in row 1"),
        ({"temperature": torch.tensor([1, 2])}, "temperature must be .* got .*torch.int64"),
        (
            {"temperature": torch.ones(3)},
            r"temperature must be a number for all rows or a tensor of shape \(2,\).* got one of \(3,\)",
        ),
        (
            {"temperature": torch.ones(2, device="meta")},
            "temperature must be on cpu, as the logits are, got a tensor on meta",
        ),
        ({"top_k": -2}, r"top_k must be an integer of at least 1 \(V or more, 0 and -1 turn it off\), got -2"),
        ({"top_k": 2.0}, "top_k must be .* got .*2.0"),
        ({"top_k": True}, "top_k must be .* got .*True"),
        ({"top_k": torch.tensor([3, 0])}, "top_k must be .* got 0 in row 1"),
        (
            {"top_k": torch.tensor([3])},
            "top_k must be a number, or have a value for each of the 2 rows .* got 1 values",
        ),
        ({"top_p": 1.5}, "top_p must be .* got .*1.5"),
        ({"top_p": -0.1}, "top_p must be .* got .*-0.1"),
        ({"top_p": math.nan}, "top_p must be .* got .*nan"),
        ({"top_p": torch.tensor([0.5, 2.0])}, "top_p must be .* got 2 in row 1"),
        ({"top_p": torch.tensor(0.5)}, r"top_p must be .* got one of shape \(\)"),
        ({"min_p": 1.1}, "min_p must be .* got .*1.1"),
        ({"typical_p": 0.0}, "typical_p must be .* got .*0.0"),
        ({"epsilon": 1.0}, "epsilon must be .* got .*1.0"),
        ({"eta": -1.0}, "eta must be .* got .*-1.0"),
        ({"top_h": 0}, "top_h must be .* got .*0"),
        ({"top_n_sigma": 0}, "top_n_sigma must be .* got .*0"),
        ({"order": "openai"}, "order must be one of 'transformers', 'vllm', 'sglang', got 'openai'"),
        ({"ties": "first"}, "ties must be .* got .*'first'"),
        ({"logprobs": "all"}, "logprobs must be .* got .*'all'"),
        ({"top_logprobs": -1, "logprobs": "raw"}, "top_logprobs must be .* got .*-1"),
        ({"top_logprobs": 3}, "logprobs must be 'raw' or 'processed' where top_logprobs is 3, got None"),
        ({"top_logprobs": 8, "logprobs": "raw"}, "top_logprobs must be at most 7, the size of the vocabulary, got 8"),
        ({"seeds": 1.5}, "seeds must be .* got .*1.5"),
        ({"seeds": 2**64}, "seeds must be .* got .*18446744073709551616"),
        ({"seeds": torch.ones(2)}, "seeds must be .* got .*torch.float32"),
        (
            {"positions": torch.ones(3, dtype=torch.int64)},
            r"positions must be a number for all rows or a tensor of shape \(2,\).* got one of \(3,\)",
        ),
        ({"positions": None}, "positions must be .* got .*None"),
        (
            {"processors": [fl.RepetitionPenaltyLogitsProcessor(1.2)]},
            "input_ids must be .* got None: RepetitionPenaltyLogitsProcessor reads them",
        ),
        ({"logits": torch.zeros(7)}, r"logits must be .* got .*\(7,\)"),
        ({"logits": torch.zeros(2, 7).long()}, "logits must be .* got .*torch.int64"),
        ({"logits": torch.zeros(2, 0)}, r"logits must be .* got .*\(2, 0\)"),
    ],
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fl.sample(**{"logits": torch.zeros(2, 7), "seeds": 0, "positions": 0, **arguments})


def test_numbers_of_numpy_are_numbers():
    logits, ids = gauss(2, 400), torch.tensor([[1, 2], [3, 4]])
    values = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "min_p": 0.0625}
    of_numpy = {
        "temperature": np.float32(0.5), "top_k": np.int64(7), "top_p": np.float64(0.75), "min_p": np.float16(0.0625),
        "top_logprobs": np.int32(2), "logprobs": "raw", "prompt_length": np.int64(2), "cache_position": np.int32(1),
    }  # fmt: skip
    plain = fl.sample(logits, seeds=7, positions=3, **values)
    banned = fl.SuppressFirstTokens([5])
    found = fl.sample(logits, [banned], seeds=np.uint64(7), positions=np.int8(3), input_ids=ids, **of_numpy)
    assert torch.equal(found.tokens, plain.tokens)
    assert found.top_tokens.shape == (2, 2)


@pytest.mark.parametrize("off", [{"top_k": 0}, {"top_k": -1}, {"top_k": np.int64(-1)}, {"top_p": 1}, {"min_p": 0}])
def test_truncations_are_turned_off_as_in_other_libraries(off):
    logits = gauss(2, 400)
    assert torch.equal(
        fl.sample(logits, seeds=7, positions=3, **off).tokens, fl.sample(logits, seeds=7, positions=3).tokens
    )
    assert not fl.Sampler(**off)._rules


def test_seeds_are_64_bits_whatever_their_type():
    logits = gauss(2, 400)
    by_number = [fl.sample(logits, seeds=seed, positions=1).tokens for seed in (2**64 - 5, -5)]
    by_tensor = fl.sample(logits, seeds=torch.tensor([-5, -5]), positions=torch.tensor([1, 1], dtype=torch.int32))
    assert torch.equal(by_number[0], by_number[1])
    assert torch.equal(by_number[0], by_tensor.tokens)


# -- How it is made --------------------------------------------------------------------------------------------------


def test_the_options_of_a_sampler_are_the_fields_of_its_params():
    options = [field.name for field in dataclasses.fields(fl.SamplingParams)]
    assert list(SamplingOptions.__annotations__) == options
    for name, of_params in fl.SamplingParams.__annotations__.items():
        assert SamplingOptions.__annotations__[name].__forward_arg__ == of_params
    assert {argument_of(kind) for kind in RULES} <= set(options)


def test_options_replace_fields_of_params():
    params = fl.SamplingParams(temperature=0.5, top_k=np.int64(7), top_p=1, order="vllm")
    assert (params.top_k, params.top_p) == (7, None)
    sampler = fl.Sampler(params=params, top_k=3)
    assert (sampler.params.temperature, sampler.params.top_k, sampler.params.order) == (0.5, 3, "vllm")
    assert fl.Sampler(None, params).params is params
    logits = gauss(2, 400)
    found = fl.sample(logits, seeds=7, positions=3, params=params, ties="lowest")
    plain = fl.sample(logits, seeds=7, positions=3, temperature=0.5, top_k=7, order="vllm", ties="lowest")
    assert torch.equal(found.tokens, plain.tokens)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3
    with pytest.raises(ValueError, match="params must be SamplingParams or None, got 3"):
        fl.Sampler(None, 3)
    with pytest.raises(TypeError, match="top_q"):
        fl.Sampler(top_q=3)


def test_a_sampler_reads_its_tensors_at_each_call(device):
    logits = gauss(2, 100).to(device)
    temperature, top_k = torch.ones(2, device=device), torch.tensor([100, 100], device=device)
    sampler = fl.Sampler(temperature=temperature, top_k=top_k)
    free = sampler(logits, 1, 2).tokens
    assert torch.equal(free, fl.sample(logits, seeds=1, positions=2).tokens)
    top_k.fill_(1)
    assert torch.equal(sampler(logits, 1, 2).tokens, logits.argmax(-1))
    top_k.fill_(100)
    temperature.zero_()
    assert torch.equal(sampler(logits, 1, 2).tokens, logits.argmax(-1))


def test_noise_is_made_for_kept_tokens_only(monkeypatch):
    made = []

    def watched(seeds, positions, tokens):
        made.append(tokens.numel())
        return exponential_noise(seeds, positions, tokens)

    monkeypatch.setattr("fastlogits_kernels.draw.exponential_noise", watched)
    fl.sample(gauss(4, 5000), seeds=0, positions=0, top_k=50)
    assert made == [4 * 64]


def test_compiled_it_is_the_same():
    logits = gauss(3, 200)

    def step(logits, seeds, positions):
        return fl.sample(
            logits, seeds=seeds, positions=positions, temperature=0.7, top_k=20, logprobs="raw", top_logprobs=3
        )

    seeds, positions = torch.arange(3), torch.arange(3) + 7
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, right in zip(compiled(logits, seeds, positions), step(logits, seeds, positions), strict=True):
        assert torch.equal(found, right)


@pytest.mark.filterwarnings("ignore")
def test_the_registered_operations():
    scores, seeds = gauss(3, 40), torch.arange(3)
    for greedy in (None, torch.tensor([True, False, True])):
        torch.library.opcheck(torch.ops.fastlogits.draw.default, (scores, seeds, seeds, greedy))
    tokens = reference_draw(scores, seeds, seeds)
    torch.library.opcheck(torch.ops.fastlogits.report.default, (scores, tokens, 3))


# -- Tiny temperatures -----------------------------------------------------------------------------------------------

TINY = [1e-30, 1e-38, 1e-40, 1e-45]


@pytest.mark.parametrize("temperature", TINY)
@pytest.mark.parametrize("rules", [{}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}], ids=str)
def test_a_tiny_temperature_takes_the_largest_logit(temperature, rules, device):
    logits = torch.cat((gauss(3, 300), torch.tensor([[3e7, 1e7] * 150]))).to(device)
    logits[3, 7] = 3.2e7
    seeds, expected = torch.arange(4, device=device), logits.argmax(1).tolist()
    warper = fl.TemperatureLogitsWarper(temperature)
    drawn = fl.sample(logits, [warper], seeds=seeds, positions=3, input_ids=seeds.unsqueeze(1), **rules).tokens
    assert drawn.tolist() == expected
    rows = torch.tensor([temperature, 1.0, temperature, temperature], device=device)
    assert fl.sample(logits, seeds=seeds, positions=3, temperature=temperature, **rules).tokens.tolist() == expected
    found = fl.sample(logits, seeds=seeds, positions=3, temperature=rows, **rules).tokens.tolist()
    assert [found[row] for row in (0, 2, 3)] == [expected[row] for row in (0, 2, 3)]
    batch = fl.BatchProcessor(4, 300, device, max_length=4)
    slots = [batch.add(fl.RequestParams(temperature=temperature, seed=i, **rules), [0]) for i in range(4)]
    assert batch.sample(logits, slots).tokens.tolist() == expected


@pytest.mark.parametrize("temperature", [1e-4, 1e-8, 1e-20, 1e-30])
@pytest.mark.parametrize("rules", [{}, {"top_p": 0.9}, {"typical_p": 0.9}], ids=str)
def test_a_tiny_temperature_doesnt_overflow_in_float16(temperature, rules, device):
    logits = (gauss(4, 300) * 4).half().to(device)
    batch = fl.BatchProcessor(4, 300, device, max_length=4)
    slots = [batch.add(fl.RequestParams(temperature=temperature, **rules), [0]) for _ in range(4)]
    found = batch.apply(logits, slots)
    assert not found.isnan().any()
    assert (found < INF).all()
    assert found.argmax(1).tolist() == logits.argmax(1).tolist()


# -- As many log-probabilities as there are ----------------------------------------------------------------------


@pytest.mark.parametrize("count", [32, 33, 50])
def test_top_logprobs_around_what_the_kernels_look_for(count, device):
    logits = gauss(2, 50).to(device)
    found = fl.Sampler(temperature=0.0, logprobs="raw", top_logprobs=count)(logits, seeds=1, positions=0)
    expected = torch.sort(logits.log_softmax(-1), -1, descending=True)
    assert torch.equal(found.top_tokens, expected.indices[:, :count])
    torch.testing.assert_close(found.top_logprobs, expected.values[:, :count])


def test_no_more_top_logprobs_than_tokens(device):
    sampler = fl.Sampler(logprobs="raw", top_logprobs=51)
    with pytest.raises(ValueError, match="top_logprobs must be at most 50, the size of the vocabulary, got 51"):
        sampler(gauss(2, 50).to(device), seeds=1, positions=0)


def test_an_argument_that_there_is_none_of():
    with pytest.raises(TypeError, match="no argument 'topk': did you mean top_k"):
        fl.Sampler(topk=5)
    with pytest.raises(TypeError, match="there is no argument 'qqqq'"):
        fl.sample(torch.zeros(1, 3), seeds=0, positions=0, qqqq=1)
