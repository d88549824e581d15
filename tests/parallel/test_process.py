"""Processed logits of which each rank has its part, against one process."""

import random

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import fastlogits as fl
from tests.parallel.ranks import same
from tests.parallel.test_group import part_of
from tests.parallel.test_sampling import V, processors_of, some_logits


def processed(process_group, seeds, B, dtype):
    rank, size = process_group.rank(), process_group.size()
    found = []
    for seed in seeds:
        processors = processors_of(seed)
        ids = torch.randint(0, V, (B, 7), generator=torch.Generator().manual_seed(seed))
        logits = some_logits(seed, B, dtype)
        expected = part_of(processors(ids, logits, prompt_length=6), rank, size)
        part = part_of(logits, rank, size)
        result = fl.process(part, processors, ids, group=process_group, prompt_length=6)
        found.append(same(result, expected) and same(part, part_of(logits, rank, size)))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_rank_gets_its_part_of_what_one_process_gets(ranks, size):
    assert all(ranks.alike(processed, size, list(range(20)), 6, torch.float32))
    assert all(ranks.alike(processed, size, list(range(5)), 2, torch.bfloat16))


POINTWISE = [
    lambda: fl.RepetitionPenaltyLogitsProcessor(1.3),
    lambda: fl.RepetitionPenaltyLogitsProcessor(0.8, prompt_ignore_length=3),
    lambda: fl.FrequencyPenaltyLogitsProcessor(0.4),
    lambda: fl.PresencePenaltyLogitsProcessor(0.7),
    lambda: fl.NoRepeatNGramLogitsProcessor(2),
    lambda: fl.NoRepeatNGramLogitsProcessor(1),
    lambda: fl.NoBadWordsLogitsProcessor([[3], [4, 5], [66, 0], [1, 40, 2]], 0),
    lambda: fl.SequenceBiasLogitsProcessor([[[7], 2.0], [[60, 9], -3.0], [[9, 60], 1.5], [[8, 7], 0.5]]),
    lambda: fl.LogitBiasLogitsProcessor({20: 5.0, 66: 2.0, 0: float("-inf")}),
    lambda: fl.SuppressTokensLogitsProcessor([1, 33, 60]),
    lambda: fl.AllowedTokensLogitsProcessor(range(0, V, 2)),
    lambda: fl.SuppressFirstTokens(fl.TokenMask.from_ids([11, 40, 66], V)),
    lambda: fl.MinNewTokensLengthLogitsProcessor(3, 4, [0, 65]),
    lambda: fl.MinTokensLogitsProcessor(5, [64]),
    lambda: fl.ForcedEOSTokenLogitsProcessor(8, 65),
    lambda: fl.ForcedBOSTokenLogitsProcessor(2),
    lambda: fl.ExponentialDecayLengthPenalty((1, 1.3), [65, 2], 3),
    lambda: fl.OnlyTokensFrom("prompt", eos_token_id=65, exclude=[3]),
    lambda: fl.OnlyTokensFrom(torch.tensor([[5, 6, 60]]), eos_token_id=2, extra=[40]),
    lambda: fl.InfNanRemoveLogitsProcessor(),
    lambda: fl.TemperatureLogitsWarper(0.6),
]


def alone(process_group, seeds):
    """Whether parts are what one process has in them, though the ranks exchange nothing."""

    def refuse(*_):
        raise AssertionError("something was exchanged")

    rank, size = process_group.rank(), process_group.size()
    found = []
    for seed in seeds:
        choose = random.Random(seed)
        made = choose.sample(POINTWISE, 1 + seed % 5)
        processors = fl.LogitsProcessorList([make() for make in made])
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, V if seed % 2 else 12, (3, 7), generator=generator)
        ids[1, 3], ids[2, 1] = -5, V + 9  # which the logits don't have
        logits = some_logits(seed, 3, torch.float16 if seed % 4 == 3 else torch.float32)
        expected = part_of(processors(ids, logits, prompt_length=5), rank, size)
        group = fl.Group(process_group)
        group.all_gather = group.all_to_all = refuse
        found.append(
            same(fl.process(part_of(logits, rank, size), processors, ids, group=group, prompt_length=5), expected)
        )
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_what_maps_each_logit_needs_no_other_part(ranks, size):
    assert all(ranks.alike(alone, size, list(range(60))))


def of_dtensor(process_group):
    mesh = DeviceMesh.from_group(process_group, "cpu")
    logits = some_logits(3, 6)
    rank, size = process_group.rank(), process_group.size()
    split = DTensor.from_local(part_of(logits, rank, size), mesh, [Shard(-1)], shape=logits.shape, stride=(V, 1))
    return same(fl.process(split, [fl.TopKLogitsWarper(3)]), part_of(fl.TopKLogitsWarper(3)(None, logits), rank, size))


def test_a_dtensor_brings_its_group(ranks):
    assert ranks.alike(of_dtensor, 3)


def of_random_numbers(process_group, seeded):
    torch.manual_seed(process_group.rank())
    generator = torch.Generator().manual_seed(5) if seeded else None
    logits = torch.tensor([[0.5, 0.05, 0.25, 0.2, 0.0, 0.0]]).log().expand(5, 6)
    part = part_of(logits, process_group.rank(), process_group.size())
    found = fl.process(part, [fl.XTCLogitsProcessor(0.1, 0.5, generator=generator)], group=process_group)
    expected = fl.XTCLogitsProcessor(0.1, 0.5, generator=torch.Generator().manual_seed(5))(None, logits)
    return same(found, part_of(expected, process_group.rank(), process_group.size()))


def test_random_numbers_come_from_generators_that_are_seeded_alike(ranks):
    assert ranks.alike(of_random_numbers, 2, True)
    for refused in ranks.each(of_random_numbers, 2, False):
        assert isinstance(refused, ValueError)
        assert "got XTCLogitsProcessor without a generator: each rank would draw others" in str(refused)


def of_a_list(process_group):
    mesh, logits = DeviceMesh.from_group(process_group, "cpu"), some_logits(3, 2)
    part = part_of(logits, process_group.rank(), process_group.size())
    split = DTensor.from_local(part, mesh, [Shard(-1)], shape=logits.shape, stride=(V, 1))
    said = []
    for call in (
        lambda: fl.LogitsProcessorList([fl.RepetitionPenaltyLogitsProcessor(1.3)])(torch.zeros(2, 3).long(), split),
        lambda: fl.BatchProcessor(2, V, "cpu", max_length=8).apply(split, [-1, -1]),
        lambda: fl.BatchProcessor(2, V, "cpu", max_length=8, group=process_group).sample(split, [-1, -1]),
    ):
        try:
            said.append(call())
        except ValueError as error:  # noqa: PERF203
            said.append(str(error))
    return said


def test_a_dtensor_where_none_is_taken(ranks):
    for of_list, *of_batches in ranks.each(of_a_list, 2):
        assert "got a DTensor: fastlogits.process(scores, processors, input_ids) takes one" in of_list
        for said in of_batches:
            assert "got a DTensor: make the batch with group=..., and give this rank's part, logits.to_local()" in said


def test_one_process_needs_no_group():
    assert same(fl.process(torch.zeros(1, 2), [fl.SuppressTokensLogitsProcessor([1])]), torch.tensor([[0, -torch.inf]]))
