"""A vocabulary that is split over ranks: results and gradients of the whole one, in processes of their own."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.selection import launch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import fastlogits as fl

V, N = 101, 6
WIDTHS = (60, 41)
CASES = {
    "plain": {},
    "k p": {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "lowest": {"top_k": 9, "ties": "lowest"},
    "rows": {"top_p": torch.tensor([0.3, 0.5, 0.7, 0.9, 1.0, 0.2])},
    "kept": {"kept": True, "temperature": 1.3},
}


def given():
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(N, V, generator=generator) * 2).bfloat16().float()
    targets = torch.randint(V, (N,), generator=generator)
    targets[2] = -100
    return logits, targets


def options_of(case, logits):
    options = dict(CASES[case])
    if "kept" in options:
        options["kept"] = fl.sample(logits, seeds=0, positions=0, top_k=20, return_kept=30).kept
    return options


def results(logits, targets, **options):
    leaf = logits.clone().requires_grad_()
    found = fl.logprobs(leaf, targets, entropy=True, outside=True, **options)
    weights = torch.arange(1.0, N + 1)
    ((found.logprobs + 0.1 * found.entropy) * weights).sum().backward()
    return found.logprobs.detach(), found.entropy.detach(), found.outside, leaf.grad


def check(rank, cases):
    logits, targets = given()
    start = sum(WIDTHS[:rank])
    own = logits[:, start : start + WIDTHS[rank]]
    for case in cases:
        options = options_of(case, logits)
        right = results(logits, targets, **options)
        found = results(own, targets, group=dist.group.WORLD, **options)
        for mine, wanted in zip(found[:3], right[:3], strict=True):
            assert torch.equal(mine, wanted), (case, mine, wanted)
        part = right[3][:, start : start + WIDTHS[rank]]
        torch.testing.assert_close(found[3], part, atol=1e-6, rtol=1e-5, msg=lambda told, case=case: f"{case}: {told}")
    # A row, of which one rank has nothing to process.
    one = fl.logprobs(own[:1], targets[:1], top_k=5, group=dist.group.WORLD)
    assert torch.equal(one, fl.logprobs(logits[:1], targets[:1], top_k=5))


def of_a_rank(rank, path):
    torch.set_num_threads(1)
    if HAS_TRITON:
        from tests import interpreter

        interpreter.speed_up()
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=len(WIDTHS))
    logits, targets = given()
    check(rank, CASES)
    launch.FORCE_KERNEL = HAS_TRITON
    check(rank, ("k p", "lowest", "kept"))
    launch.FORCE_KERNEL = False
    mesh = init_device_mesh("cpu", (len(WIDTHS),))
    half = DTensor.from_local(logits[:, rank * 50 : rank * 50 + 50].clone().requires_grad_(), mesh, [Shard(1)])
    low = torch.where(targets < 0, targets, targets % 100)
    assert torch.equal(fl.logprobs(half, low, top_k=9), fl.logprobs(logits[:, :100], low, top_k=9))
    with pytest.raises(ValueError, match="logits must be a DTensor that is split over its last dimension alone"):
        fl.logprobs(DTensor.from_local(logits, mesh, [Replicate()]), targets)
    dist.destroy_process_group()


def test_ranks_have_what_the_whole_has(tmp_path, monkeypatch):
    """From torch and from kernels. A process that has had a gradient can't be forked; one that has imported all can."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # before a kernel is defined there
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(of_a_rank, (str(tmp_path / "meeting"),), nprocs=len(WIDTHS), start_method="forkserver")


def test_what_cant_be_done_is_said():
    logits, targets = given()
    with pytest.raises(ValueError, match=r"group must be a process group of .* or a DeviceMesh, got str"):
        fl.logprobs(logits, targets, group="all")
