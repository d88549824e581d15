"""Tokens by rules that keep any number of the first tokens, from parts: records, and the mass before each."""

import pytest
import torch
from fastlogits_kernels.parallel.launch import FrontShards, keep_the_first
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.selection import launch
from fastlogits_kernels.training.shards import RECORDS_AT, Place

import fastlogits as fl
from tests.campaign.sanitizer_cases import exchanged
from tests.parallel.test_report import SPLITS, hard_rows

pytestmark = [
    pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs the kernels run, see test_gpus"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

B = 8
EVERY = torch.linspace(0, 2, B)
OPTIONS = [
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.5, "top_p": 0.3, "ties": "lowest"},
    {"temperature": EVERY, "top_p": EVERY.clamp(max=1)},
    {"top_p": 0.99, "min_p": 0.01},
    {"temperature": 0.7, "min_p": 0.05},
    {"top_a": 0.3},
    {"epsilon": 0.001},
    {"temperature": 0.0, "top_p": 0.5},
]


def rules_of(temperature=None, ties="all", **values):
    """The rules of a sampler's options, and its temperature by itself."""
    rules = tuple(Rule(name, value, ties=ties if name == "top_p" else "all") for name, value in values.items())
    return rules, None if temperature is None else torch.as_tensor(temperature)


def sampled_apart(logits, widths, seeds, positions, options, sent=None):
    """The tokens that each of some ranks finds."""
    rules, temperature = rules_of(**options)
    assert keep_the_first(rules, logits.shape[1])
    starts, parts = [sum(widths[:i]) for i in range(len(widths))], logits.split(widths, 1)

    def run(rank, gather, add):
        step = FrontShards(rules, Place.of(starts, widths, rank), logits.device)
        begun = step.begin(parts[rank], seeds, positions, temperature)
        if sent is not None:
            sent[rank] = begun.sent
        return begun.finish(gather(begun.sent), add)

    return exchanged(run, len(widths))


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)


@pytest.mark.parametrize("widths", SPLITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_each_rank_finds_what_one_process_samples(options, dtype, widths):
    logits, _ = hard_rows(sum(widths), dtype)
    seeds, positions = torch.arange(B) * 3 + 1, torch.arange(B) + 5
    expected = fl.Sampler(**options)(logits, seeds, positions).tokens
    for found in sampled_apart(logits, widths, seeds, positions, options):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(12))
def test_sorted_and_steep_and_flat_rows(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, 4100, generator=generator) * torch.tensor([0.01, 1, 3, 3, 30, 30, 1e4, 3]).unsqueeze(1)
    logits[1:4] = logits[1:4].sort(descending=bool(seed % 2)).values
    logits[4] = logits[4].round()
    logits[7, torch.rand(4100, generator=generator) < 0.7] = float("-inf")
    seeds = torch.randint(0, 2**60, (B,), generator=generator)
    options = [{"top_p": 0.9}, {"top_p": torch.rand(B, generator=generator)}, {"temperature": 30.0, "top_p": 0.5}]
    options = options[seed % 3]
    cut = int(torch.randint(2, 4098, (1,), generator=generator))
    expected = fl.Sampler(**options)(logits, seeds, seeds).tokens
    for found in sampled_apart(logits, [cut, 4100 - cut], seeds, seeds, options):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("ties", ["all", "lowest"])
def test_rows_that_are_cut_anywhere_among_tokens_that_tie(ties):
    rows = 64
    logits, seeds = torch.zeros(rows, 4100), torch.arange(rows)
    logits[::2, 1000:3000] = 1.0
    options = {"top_p": torch.rand(rows, generator=torch.Generator().manual_seed(1)) ** 2, "ties": ties}
    expected = fl.Sampler(**options)(logits, seeds, seeds).tokens
    for found in sampled_apart(logits, [2052, 2048], seeds, seeds, options):
        assert torch.equal(found, expected)


def test_there_are_few_records():
    logits = torch.zeros(64, 4096)
    logits[32:] = torch.randn(32, 4096, generator=torch.Generator().manual_seed(1))
    sent = {}
    sampled_apart(logits, [4096], torch.arange(64), torch.zeros(64, dtype=torch.int64), {"top_p": 0.9}, sent)
    counts = sent[0][:, RECORDS_AT.value].view(torch.float32)
    # The sum of 1 / i to 4096 is 8.9 for tokens that tie.
    assert 8 < counts[:32].mean() < 10
    assert counts[32:].mean() < 10
    assert counts.max() <= 24


def test_more_survivors_than_are_few():
    """Beside logits of some millions bounds of the noise say little, and each tile has survivors."""
    logits, seeds = torch.full((4, 32 * 2048), 1.2e7), torch.arange(4)
    options = {"top_p": 0.15}
    expected = fl.Sampler(**options)(logits, seeds, seeds).tokens
    for found in sampled_apart(logits, [31 * 2048, 2048], seeds, seeds, options):
        assert torch.equal(found, expected)


def test_infinities_that_the_temperature_makes():
    logits = torch.full((3, 2100), -5.0)
    logits[0, [3, 2090]] = 3e38
    logits[0, 20] = float("inf")
    logits[1] = float("-inf")
    logits[1, 9] = -3e38
    logits[2, [7, 2095]] = 3e38
    seeds, options = torch.arange(3), {"temperature": 0.5, "top_p": 0.5}
    expected = fl.Sampler(**options)(logits, seeds, seeds).tokens
    for widths in ([2100], [20, 2080], [2060, 40]):
        for found in sampled_apart(logits, widths, seeds, seeds, options):
            assert torch.equal(found, expected)


def test_where_float32_holds_no_noise_the_ranks_agree_on_a_token_that_is_kept():
    logits = torch.full((4, 4096), 1e30)
    logits[1, 1000:] = -1e30
    logits[2] = 2.0**24 + torch.randn(4096, generator=torch.Generator().manual_seed(1)).round() * 2
    logits[3] = -3e38
    seeds = torch.arange(4)
    options = {"top_p": 0.1}
    found = sampled_apart(logits, [2100, 1996], seeds, seeds, options)
    assert torch.equal(*found)
    words = fl.sample(logits, seeds=0, positions=0, return_kept="bits", **options).kept.bits
    kept = words[torch.arange(4), found[0] >> 5] >> (found[0] & 31) & 1
    assert kept.all()


def test_what_there_is_room_for():
    def fits(*sizes):
        return FrontShards.fits(Place.of([sum(sizes[:i]) for i in range(len(sizes))], sizes, 0))

    assert fits(64 * 2048)
    assert not fits(64 * 2048 + 1)
    assert fits(*[100] * 64)
    assert not fits(*[100] * 65)


def test_which_rules_keep_the_first():
    def keep(*rules):
        return keep_the_first([Rule(*rule) for rule in rules], 1000)

    assert keep(("top_p", 0.9))
    assert keep(("top_p", 0.9), ("min_p", 0.1))
    assert keep(("min_p", 0.1), ("min_p", 0.2))
    assert keep(("top_k", 1000), ("top_a", 0.1))
    # Nothing acts, a fixed number, a band, sums of what is left, an entropy, a deviation, a least number of tokens.
    for rules in (
        [], [("top_k", 1000)], [("top_k", 5)], [("typical", 0.9)], [("min_p", 0.1), ("top_p", 0.9)],
        [("top_p", 0.9), ("epsilon", 0.1)], [("top_n_sigma", 1.0)], [("eta", 0.1)],
        [("top_p", 0.9, 2)], [("top_h", 0.4)],
    ):  # fmt: skip
        assert not keep(*rules)
