"""Processed logits of which each rank has its part, against one process."""

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


def of_dtensor(process_group):
    mesh = DeviceMesh.from_group(process_group, "cpu")
    logits = some_logits(3, 6)
    rank, size = process_group.rank(), process_group.size()
    split = DTensor.from_local(part_of(logits, rank, size), mesh, [Shard(-1)], shape=logits.shape, stride=(V, 1))
    return same(fl.process(split, [fl.TopKLogitsWarper(3)]), part_of(fl.TopKLogitsWarper(3)(None, logits), rank, size))


def test_a_dtensor_brings_its_group(ranks):
    assert ranks.alike(of_dtensor, 3)


def test_one_process_needs_no_group():
    assert same(fl.process(torch.zeros(1, 2), [fl.SuppressTokensLogitsProcessor([1])]), torch.tensor([[0, -torch.inf]]))
