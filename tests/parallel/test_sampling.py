"""Sampling from logits that are split over ranks, against one process."""

import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastlogits as fl
from tests.parallel.ranks import same
from tests.parallel.test_group import part_of

SIZES = [1, 2, 3, 4]
V = 67


def some_logits(seed, B, dtype=torch.float32):
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * 3
    if seed % 3 == 1:
        logits = (logits * 2).round() / 2  # ties
    if seed % 5 == 2 and B > 3:
        logits[1, 5], logits[2], logits[3, 40] = float("nan"), float("-inf"), float("inf")
    return logits.to(dtype)


def random_options(seed, B):
    choose = random.Random(seed)

    def maybe(value, rows):
        kind = choose.choice(["none", "none", "number", "rows"])
        return None if kind == "none" else value if kind == "number" else rows

    options = {
        "temperature": maybe(0.7, torch.linspace(0, 2, B)),
        "top_k": maybe(9, torch.arange(B) % 8 + 1),
        "top_p": maybe(0.8, torch.linspace(0.3, 1, B)),
        "min_p": maybe(0.05, torch.linspace(0, 0.2, B)),
        "typical_p": maybe(0.7, torch.linspace(0.3, 1, B)),
        "epsilon": maybe(0.01, None),
        "eta": maybe(0.02, None),
        "top_h": maybe(0.6, None),
        "top_n_sigma": maybe(1.5, None),
        "top_a": maybe(0.2, None),
        "order": choose.choice(["transformers", "vllm", "sglang"]),
        "ties": choose.choice(["all", "lowest"]),
    }
    logprobs = choose.choice([None, "raw", "processed"])
    return options, logprobs, choose.choice([0, 3]) if logprobs else 0


def processors_of(seed):
    choose = random.Random(seed + 1000)
    all_of_them = [
        lambda: fl.RepetitionPenaltyLogitsProcessor(1.3),
        lambda: fl.NoRepeatNGramLogitsProcessor(2),
        lambda: fl.NoBadWordsLogitsProcessor([[3], [4, 5]], 0),
        lambda: fl.SequenceBiasLogitsProcessor([[[7], 2.0], [[8, 9], -3.0]]),
        lambda: fl.SuppressTokensLogitsProcessor([1, 60]),
        lambda: fl.MinNewTokensLengthLogitsProcessor(3, 4, 0),
        lambda: fl.SuppressFirstTokens([11, 12, 13]),
        lambda: fl.DRYLogitsProcessor(1.0, 1.75, 2, [0]),
        lambda: fl.FrequencyPenaltyLogitsProcessor(0.4),
        lambda: fl.LogitBiasLogitsProcessor({20: 5.0, 66: 2.0}),
        lambda: fl.ForcedEOSTokenLogitsProcessor(8, 2),
        lambda: fl.InfNanRemoveLogitsProcessor(),
        lambda: fl.TemperatureLogitsWarper(0.6),
        lambda: fl.TopKLogitsWarper(12),
        lambda: fl.LogitNormalization(),
        lambda: fl.OnlyTokensFrom("prompt", eos_token_id=2),
        lambda: fl.WatermarkLogitsProcessor(V, "cpu"),
        lambda: lambda ids, scores: scores - scores.mean(1, keepdim=True),
    ]
    return fl.LogitsProcessorList([make() for make in choose.sample(all_of_them, choose.randrange(4))])


def one_process(seed, B, dtype):
    options, logprobs, top = random_options(seed, B)
    processors = processors_of(seed)
    ids = torch.randint(0, V, (B, 8 if seed % 2 else 6), generator=torch.Generator().manual_seed(seed))
    sampler = fl.Sampler(processors, logprobs=logprobs, top_logprobs=top, **options)
    return sampler, (processors, options, logprobs, top), some_logits(seed, B, dtype), torch.arange(B) * 7 + seed, ids


def of_ranks(process_group, seeds, B, dtype):
    """Whether the ranks sample what one process samples, for some seeds."""
    found = []
    for seed in seeds:
        sampler, (processors, options, logprobs, top), logits, own_seeds, ids = one_process(seed, B, dtype)
        calls = [(own_seeds, 3, ids), (own_seeds, torch.arange(B), ids)]
        split = fl.Sampler(processors, logprobs=logprobs, top_logprobs=top, group=process_group, **options)
        part = part_of(logits, process_group.rank(), process_group.size())
        for call in calls:
            expected = sampler(logits, *call, prompt_length=6)
            found.append(same(split(part, *call, prompt_length=6), expected))
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("B", "dtype"), [(1, torch.float32), (5, torch.bfloat16), (6, torch.float32)])
def test_all_ranks_sample_what_one_process_samples(ranks, size, B, dtype):
    assert all(ranks.alike(of_ranks, size, list(range(12)), B, dtype))


def of_dtensor(process_group, with_group):
    mesh = DeviceMesh.from_group(process_group, "cpu")
    logits = some_logits(3, 6)
    split = DTensor.from_local(
        part_of(logits, process_group.rank(), process_group.size()), mesh, [Shard(1)], shape=logits.shape, stride=(V, 1)
    )
    sampler = fl.Sampler(top_p=0.8, group=mesh if with_group else None)
    return same(sampler(split, 5, 7), fl.Sampler(top_p=0.8)(logits, 5, 7))


@pytest.mark.parametrize("with_group", [True, False])
def test_a_dtensor_brings_its_group(ranks, with_group):
    assert ranks.alike(of_dtensor, 3, with_group)


def of_other_calls(process_group):
    """A sampler that has seen a ``DTensor`` takes plain logits for all of them, and others of another mesh."""
    mesh, logits = DeviceMesh.from_group(process_group, "cpu"), some_logits(3, 6)
    part = part_of(logits, process_group.rank(), process_group.size())
    sampler, expected = fl.Sampler(top_p=0.8), fl.Sampler(top_p=0.8)(logits, 5, 7)
    split = DTensor.from_local(part, mesh, [Shard(1)], shape=logits.shape, stride=(V, 1))
    alone = DeviceMesh.from_group(dist.new_group([process_group.rank()], use_local_synchronization=True), "cpu")
    whole = DTensor.from_local(logits, alone, [Shard(1)])
    return [same(sampler(each, 5, 7), expected) for each in (logits, split, logits, whole, split, logits)]


def test_a_dtensor_binds_no_later_call(ranks):
    assert all(ranks.alike(of_other_calls, 2))


def of_random_numbers(process_group, B):
    """Ranks whose own generators differ; and what one process samples."""
    torch.manual_seed(process_group.rank())
    processors, ids = [fl.XTCLogitsProcessor(0.01, 0.5), fl.TemperatureLogitsWarper(0.7)], torch.zeros(B, 1).long()
    logits = some_logits(1, B)
    part = part_of(logits, process_group.rank(), process_group.size())
    split, one = fl.Sampler(processors, group=process_group), fl.Sampler(processors)
    return [same(split(part, 3, step, ids), one(logits, 3, step, ids)) for step in range(8)]


@pytest.mark.parametrize("B", [1, 2, 5])
def test_random_numbers_of_processors_are_the_same_on_all_ranks(ranks, B):
    assert all(ranks.alike(of_random_numbers, 2, B))


def of_another_split(process_group):
    mesh = DeviceMesh.from_group(process_group, "cpu")
    logits = DTensor.from_local(some_logits(3, 6), mesh, [Replicate()])
    return fl.Sampler()(logits, 5, 7)


def test_a_dtensor_that_is_not_split_is_refused(ranks):
    (found, _) = ranks.each(of_another_split, 2)
    assert "must be a DTensor that is split over its last dimension" in str(found)


def with_sample(process_group):
    logits = some_logits(1, 4)
    part = part_of(logits, process_group.rank(), process_group.size())
    return same(
        fl.sample(part, seeds=3, positions=4, top_k=5, group=process_group),
        fl.sample(logits, seeds=3, positions=4, top_k=5),
    )


def test_sample_takes_a_group(ranks):
    assert ranks.alike(with_sample, 2)


def of_two_vocabularies(process_group):
    """Of which the first rank has as many columns; calls of both take turns, with more and more rows."""
    found = []
    samplers = {V: fl.Sampler(top_k=5, group=process_group) for V in (20, 19)}
    groups = {V: fl.Group(process_group) for V in samplers}
    for B in (1, 3, 6):
        for V, sampler in samplers.items():
            logits = torch.randn(B, V, generator=torch.Generator().manual_seed(V))
            part = part_of(logits, process_group.rank(), process_group.size())
            found += [same(sampler(part, seed, 4), fl.Sampler(top_k=5)(logits, seed, 4)) for seed in range(3)]
            targets = torch.arange(B) * 3 + 2
            found += [same(fl.logprobs(part, targets, group=groups[V]), fl.logprobs(logits, targets))]
    return all(found)


def test_samplers_of_two_vocabularies(ranks):
    assert ranks.alike(of_two_vocabularies, 2)


def with_padding(process_group):
    logits = some_logits(1, 6)
    rank, size = process_group.rank(), process_group.size()
    each = -(-V // size)
    group = fl.Group(process_group, vocab_start=rank * each, vocab_size=V)
    part = part_of(logits, rank, size, each + 5)
    return same(fl.Sampler(top_p=0.9, group=group)(part, 3, 4), fl.Sampler(top_p=0.9)(logits, 3, 4))


def test_padding_is_no_token(ranks):
    assert ranks.alike(with_padding, 3)


def of_nothing(process_group):
    part = part_of(some_logits(1, 6), process_group.rank(), process_group.size())[:0]
    sampler = fl.Sampler(top_p=0.9, logprobs="raw", top_logprobs=2, group=process_group)
    return same(sampler(part, 3, 4), fl.Sampler(top_p=0.9, logprobs="raw", top_logprobs=2)(torch.empty(0, V), 3, 4))


def test_an_empty_batch_has_no_tokens(ranks):
    assert ranks.alike(of_nothing, 2)


# -- Refusals -----------------------------------------------------------------------------------------------------


def with_other_arguments(process_group, which):
    odd = process_group.rank() == 1
    logits = some_logits(0, 4 if odd and which == "rows" else 6, torch.bfloat16 if odd and which == "dtype" else None)
    part = part_of(logits, process_group.rank(), process_group.size())
    processors = [fl.SuppressTokensLogitsProcessor([1])] if odd and which == "processors" else []
    top_p = 0.5 if odd and which == "top_p" else 0.9
    seeds = 0.5 if odd and which == "own" else 3
    sampler = fl.Sampler(processors, top_p=top_p, group=process_group)
    return sampler(part, seeds, 4)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("rows", "number of rows of logits must be the same on all ranks, but rank 1 has 4 where rank 0 has 6"),
        ("dtype", "dtype of logits must be the same on all ranks, but rank 1 has 'torch.bfloat16'"),
        ("processors", "processors must be the same on all ranks, but rank 1 has 'SuppressTokens"),
        ("top_p", "top_p must be the same on all ranks, but rank 1 has 0.5 where rank 0 has 0.9"),
        ("own", "rank 1 has refused its arguments: ValueError: seeds must be an integer"),
    ],
)
def test_the_error_says_which_rank_differs(ranks, which, message):
    found = ranks.each(with_other_arguments, 3, which)
    assert all(isinstance(each, ValueError) for each in found)
    assert message in str(found[0])
    assert message in str(found[2])
    if which == "own":
        assert "seeds must be an integer" in str(found[1])


def failing(process_group):
    def fails(ids, scores):
        if process_group.rank() == 1:
            raise ArithmeticError("no luck")
        return scores

    part = part_of(some_logits(0, 6), process_group.rank(), process_group.size())
    return fl.Sampler([fails], group=process_group)(part, 3, 4)


def test_a_rank_that_fails_at_first_leaves_no_other_waiting(ranks):
    found = ranks.each(failing, 3)
    assert isinstance(found[1], ArithmeticError)
    assert "rank 1 has failed: ArithmeticError: no luck" in str(found[0])
    assert "rank 1 has failed: ArithmeticError: no luck" in str(found[2])
