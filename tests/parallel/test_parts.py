"""Tokens sampled from the parts of the logits by the kernels, in the interpreter, against those of one process."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from fastlogits_kernels.parallel.launch import TopShards, capacity_of, sent_of
from fastlogits_kernels.pointwise import fold
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.selection import launch

import fastlogits as fl
from fastlogits import warm_up as warming
from fastlogits.parallel import sampling
from tests.parallel.ranks import same
from tests.parallel.test_group import part_of

pytestmark = [
    pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs the kernels run, see test_gpus"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

V = 624
CASES = [
    ({"temperature": 0.7, "top_k": 5, "top_p": 0.9}, torch.bfloat16),
    ({"top_k": 5, "top_p": 0.5, "min_p": 0.1}, torch.float32),
    ({"top_k": 3, "top_p": 0.6, "ties": "lowest", "order": "vllm", "min_p": 0.02}, torch.float16),
    ({"temperature": torch.linspace(0, 2, 6), "top_k": 20, "typical_p": 0.6, "epsilon": 0.03}, torch.float32),
    ({"temperature": torch.linspace(0, 2, 6)}, torch.bfloat16),
    ({"temperature": 0.0, "top_k": 5}, torch.float32),
    ({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "logprobs": "raw", "top_logprobs": 5}, torch.bfloat16),
    ({"temperature": torch.linspace(0, 2, 6), "logprobs": "raw", "top_logprobs": 32}, torch.float32),
    ({"top_k": 400, "logprobs": "raw", "top_logprobs": 1}, torch.float16),
    ({"temperature": 2.0, "logprobs": "raw"}, torch.float32),
    ({"temperature": 0.7, "top_p": 0.9}, torch.bfloat16),
    ({"temperature": torch.linspace(0, 2, 6), "top_p": torch.linspace(0.1, 1, 6), "min_p": 0.01}, torch.float32),
    ({"min_p": 0.1, "logprobs": "raw", "top_logprobs": 2}, torch.float16),
]


def hard_logits(dtype):
    """Rows of many ties, of infinities and NaN."""
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(3)) * 3
    logits[0] = 0.0
    logits[1] = (logits[1] * 2).round() / 2
    logits[2] = float("-inf")
    logits[2, [5, 300, 301]] = 1.0
    logits[3] = float("-inf")
    logits[4, 423], logits[4, 77] = float("nan"), float("inf")
    logits[5, 100:500] = 9.5
    return logits.to(dtype)


@contextmanager
def by_parts():
    """The kernels run, and parts are taken however few the rows are; the steps that begin are listed."""
    taken = []
    begin = sampling.Parts.begin
    with (
        patch.multiple(sampling, LEAST_DEALT=0, LEAST_WEIGHED=0),
        patch.object(sampling.Parts, "begin", lambda self, call: (taken.append(self.step), begin(self, call))[1]),
        patch.object(launch, "FORCE_KERNEL", True),
        patch.object(fold, "FORCE_KERNEL", True),
    ):
        yield taken


def of_parts(process_group, case):
    """Whether the ranks sample from their parts, and what one process samples."""
    options, dtype = CASES[case]
    logits = hard_logits(dtype)
    rank, size = process_group.rank(), process_group.size()
    seeds = torch.arange(6) * 3 + 1
    part = part_of(logits, rank, size)
    with by_parts() as taken:
        found = fl.Sampler(**options, group=process_group)(part, seeds, 5)
        return same(found, fl.Sampler(**options)(logits, seeds, 5)), len(taken)


MADE = [
    [lambda: fl.TemperatureLogitsWarper(0.7), lambda: fl.TopKLogitsWarper(5), lambda: fl.TopPLogitsWarper(0.9)],
    [
        lambda: fl.RepetitionPenaltyLogitsProcessor(1.4), lambda: fl.NoRepeatNGramLogitsProcessor(2),
        lambda: fl.NoBadWordsLogitsProcessor([[3], [4, 500], [500, 4]], 0),
        lambda: fl.AllowedTokensLogitsProcessor(range(0, V, 3)), lambda: fl.LogitBiasLogitsProcessor({300: 9.0}),
    ],
    [lambda: fl.SuppressFirstTokens([300, 301, 5]), lambda: fl.FrequencyPenaltyLogitsProcessor(0.7)],
    [
        lambda: fl.RepetitionPenaltyLogitsProcessor(1.4), lambda: fl.NoBadWordsLogitsProcessor([[3], [4, 500]], 0),
        lambda: fl.LogitBiasLogitsProcessor({300: 3.0}),
    ],
]  # fmt: skip
OPTIONS = [{}, {"temperature": 0.8, "top_k": 5, "top_p": 0.8}, {"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.8}]


def of_processors(process_group, case):
    """The same with processors."""
    logits = hard_logits(torch.bfloat16)[1:5]
    ids = torch.randint(0, 12, (4, 9), generator=torch.Generator().manual_seed(case))
    ids[:, 4::3] = torch.tensor([4, 500])
    made = [make() for make in MADE[case]]
    part = part_of(logits, process_group.rank(), process_group.size())
    call = (torch.arange(4), 9, ids)
    with by_parts() as taken:
        found = fl.Sampler(made, **OPTIONS[case], group=process_group)(part, *call, prompt_length=9)
        expected = fl.Sampler(made, **OPTIONS[case])(logits, *call, prompt_length=9)
        return same(found, expected), len(taken)


@pytest.mark.parametrize("case", range(len(MADE)))
def test_processors_take_their_parts(ranks, case):
    assert ranks.alike(of_processors, 2, case) == (True, 1)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_ranks_sample_from_their_parts(ranks, case):
    # Two and three ranks have a multiple of eight tokens each.
    assert ranks.alike(of_parts, 3 if case in (1, 4) else 2, case) == (True, 1)


def test_what_is_sent_is_known_beforehand():
    def sent(*rules, ranks=4):
        return sent_of([Rule(*rule) if isinstance(rule, tuple) else rule for rule in rules], 1000, ranks)

    assert sent(("top_k", 50), ("top_p", 0.9)) == 128
    assert sent(("min_p", 0.1), ("top_k", 50)) == 128
    assert sent(("top_k", 50), ("min_p", 0.9), ("top_p", 0.9), ("min_p", 0.1)) == 128
    assert sent(("top_k", 50), ("typical", 0.9)) == 128
    # More than a few tokens, or how many depends on the logits.
    for rules in ([], [("top_p", 0.9)], [("top_p", 0.9), ("top_k", 50)], [("epsilon", 0.1), ("top_k", 50)]):
        assert sent(*rules) is None
    assert sent(("top_k", torch.tensor([50]))) is None
    assert sent(("top_k", 1000)) is None
    # What ties is taken apart, and then counts.
    assert sent(("top_k", 50), ("top_p", 0.9), ("epsilon", 0.1)) is None
    assert sent(("top_k", 50), ("top_h", 0.9)) is None
    assert sent(("top_k", 400), ranks=8) == 512
    assert sent(("top_k", 400), ranks=16) is None
    assert sent(("top_k", 50, 100)) == 256


@pytest.mark.parametrize("k", [1, 2, 50, 65, 66, 400])
def test_there_is_room_for_what_is_above_the_cutoff_and_for_records(k):
    assert k - 1 + 64 <= capacity_of(k)


def of_warm_up(process_group, case):
    """The launches of a call that a warm-up has not rehearsed, and how many it has."""
    rehearsed = []
    options = [
        {"temperature": 0.7, "top_k": 5}, {"temperature": 0.7}, {"top_p": 0.9},
        {"temperature": 0.7, "logprobs": "raw", "top_logprobs": 3},
    ][case]  # fmt: skip
    prepare = patch.object(warming, "prepare", lambda launches: rehearsed.extend(launches) or [])
    with by_parts(), prepare, patch.object(warming, "no_kernels", lambda device: None):
        sampler = fl.Sampler(**options, group=process_group)
        sampler.warm_up(V, torch.bfloat16, batch=4, device="cpu")
        part = part_of(hard_logits(torch.bfloat16)[:4], process_group.rank(), process_group.size())
        with launcher.collected() as launches:
            sampler(part, torch.arange(4), torch.arange(4))
    known = {(each.launcher.name, each.key) for each in rehearsed}
    called = {(each.launcher.name, each.key) for each in launches}
    return sorted(name for name, _ in called - known), len(called)


@pytest.mark.parametrize("case", range(4))
def test_a_warm_up_compiles_what_calls_launch(ranks, case):
    missing, launched = ranks.alike(of_warm_up, 2, case)
    assert not missing
    assert launched >= (6 if case == 2 else 3)


def sampled_apart(logits, rules, temperature, seeds, sizes):
    """Tokens of rows whose parts are so large, sampled without processes."""
    vocab = logits.shape[1]
    sent = sent_of(rules, vocab, len(sizes))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    steps = [
        TopShards(rules, sent, vocab, size, start, torch.device("cpu"))
        for size, start in zip(sizes, starts, strict=True)
    ]
    parts = logits.split(sizes, 1)
    all_sent = [step.sent(part, seeds, seeds, temperature) for step, part in zip(steps, parts, strict=True)]
    return steps[0].tokens(torch.stack(all_sent), seeds, seeds, temperature)


@pytest.mark.parametrize("greedy", [False, True])
def test_more_ties_than_a_block_holds_and_rows_without_a_distribution(monkeypatch, greedy):
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    logits = torch.zeros(5, 2200)
    logits[2, 100:2000] = float("inf")
    logits[3, 900::15] = float("nan")
    logits[4, 10::2] = 3.0
    rules = (Rule("top_k", 9), Rule("top_p", 0.2))
    temperature = torch.full((5,), 0.0 if greedy else 0.9)
    seeds = torch.arange(5) + 3
    expected = launch.select_tokens(logits, launch.Selection(rules, 2200, logits.device), seeds, seeds, temperature)
    assert torch.equal(sampled_apart(logits, rules, temperature, seeds, [1090, 1110]), expected)
    if not greedy:
        # Of 2200 tokens that tie the 440 of the largest ids are kept.
        assert (expected[:2] >= 1760).all()
        assert expected[0] != expected[1]
