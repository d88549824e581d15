"""What ranks agree on and exchange."""

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import fastlogits as fl
from fastlogits.parallel import Group, Shards

SIZES = [1, 2, 3, 4]


def part_of(logits, rank, size, width=None):
    """The part of logits that a rank has: equal ones, the last shorter, or all as wide as said, with rubbish behind."""
    V = logits.shape[1]
    each = -(-V // size)
    part = logits[:, rank * each : (rank + 1) * each]
    if width is None:
        return part.contiguous()
    rubbish = torch.full((len(logits), width), 6e4, dtype=logits.dtype)
    rubbish[:, : part.shape[1]] = part
    return rubbish


def exchanged(process_group, B, V, padded, dtype):
    group = Group(process_group, vocab_size=V if padded else None)
    logits = torch.arange(B * V).view(B, V).to(dtype)
    width = -(-V // group.size) + 3 if padded else None
    group = (
        Group(process_group, vocab_size=V, vocab_start=min(V, group.rank * -(-V // group.size))) if padded else group
    )
    part = part_of(logits, group.rank, group.size, width)
    shards = group.shards(part.shape[1])
    own = group.dealt_rows(part, shards)
    back = group.returned_rows(own, B, shards)
    size = shards.sizes[group.rank]
    return (
        torch.equal(group.whole_rows(part, shards), logits),
        torch.equal(own, logits[group.rows_of(group.rank, B)]),
        torch.equal(group.results(own, B), logits),
        torch.equal(back[:, :size], part[:, :size])
        and back.shape == part.shape
        and bool(back[:, size:].isneginf().all()),
        group.vocab_start(part.shape[1]) == min(V, group.rank * -(-V // group.size)),
    )


@pytest.mark.parametrize("size", SIZES)
def test_rows_go_where_they_are_wanted_and_come_back(ranks, size):
    for B, V, padded, dtype in (
        (1, 7, False, torch.float32), (6, 24, False, torch.bfloat16), (7, 48, False, torch.float32),
        (5, 9, False, torch.bfloat16), (8, 12, True, torch.float16),
        (9, 10, True, torch.float32),
    ):  # fmt: skip
        assert ranks.alike(exchanged, size, B, V, padded, dtype) == (True,) * 5


@pytest.mark.parametrize(
    ("widths", "starts", "vocab_size", "expected"),
    [
        ([4, 4, 2], [None] * 3, None, ((0, 4, 8), (4, 8, 10))),
        ([4, 4, 4], [None] * 3, 10, ((0, 4, 8), (4, 8, 10))),
        ([4, 4, 4], [None] * 3, 7, ((0, 4, 7), (4, 7, 7))),
        ([4, 4, 0], [None] * 3, None, ((0, 4, 8), (4, 8, 8))),
        ([4, 6, 5], [0, 3, 8], None, ((0, 3, 8), (3, 8, 13))),
        ([4, 6, 5], [0, 3, 8], 11, ((0, 3, 8), (3, 8, 11))),
    ],
)
def test_shards_follow_each_other(widths, starts, vocab_size, expected):
    shards = Shards.of(widths, starts, vocab_size)
    assert (shards.starts, shards.stops) == expected


@pytest.mark.parametrize(
    ("widths", "starts", "vocab_size", "message"),
    [
        ([4, 4], [0, 5], None, "the logits of rank 0 must have the tokens from 0 to below 5 .* but have 4 columns"),
        ([4, 4], [0, None], None, "vocab_start must be given on all ranks or on none, but rank 1 has none"),
        ([4, 4], [1, 4], None, "vocab_start must be 0 on rank 0, got 1"),
        ([4, 4], [None, None], 9, "the logits of rank 1 must have the tokens from 4 to below 9 .* have 4 columns"),
    ],
)
def test_parts_that_do_not_fit_are_refused(widths, starts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        Shards.of(widths, starts, vocab_size)


def test_a_group_says_what_it_must_be():
    with pytest.raises(ValueError, match=r"call torch\.distributed\.init_process_group"):
        Group()


def of_a_mesh(process_group):
    mesh = DeviceMesh.from_group(process_group, "cpu")
    return fl.Group(mesh).size, fl.Group.of(mesh).rank == fl.Group(process_group).rank


def test_a_mesh_of_one_dimension_is_a_group(ranks):
    assert ranks.alike(of_a_mesh, 3) == (3, True)
