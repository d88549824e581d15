"""Log-probabilities, ranks and the likeliest tokens from parts of the logits, against those of all of them."""

import pytest
import torch
from fastlogits_kernels.parallel.launch import BestShards, FrontShards
from fastlogits_kernels.parallel.report import report_of_part
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.selection import launch
from fastlogits_kernels.selection.logprobs import launch_report
from fastlogits_kernels.training.shards import Place

from fastlogits.parallel import sampling
from fastlogits.parallel.group import Group
from tests.parallel.ranks import same

pytestmark = [
    pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs the kernels run, see test_gpus"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

SPLITS = [(2056, 40, 3000), (5, 3, 20, 2100), (4096, 2052), (2500,)]


def hard_rows(V, dtype):
    """Rows of ties, infinities and NaN, numbers far apart; and a token of each."""
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(V)) * 3
    logits[1] = 0.0
    logits[2] = (logits[2] * 2).round() / 2
    logits[3] = float("-inf")
    logits[3, [5, V - 3]] = 1.0
    logits[4, [423, 7]], logits[4, 77] = float("nan"), float("inf")
    logits[5, [3, V - 9]] = float("inf")
    logits[6] *= 30
    logits[7] = float("-inf")
    return logits.to(dtype), torch.tensor([V - 1, 6, 2060 % V, V - 3, 423, 3, 8, 0])


def of_parts(process_group, widths, dtype, count, strided):
    """Whether ranks whose parts are so wide report what one process reports."""
    group = Group.of(process_group)
    logits, tokens = hard_rows(sum(widths), dtype)
    if strided:
        logits = logits.T.contiguous().T
    starts = [sum(widths[:rank]) for rank in range(len(widths))]
    place = Place.of(starts, widths, group.rank)
    launch.FORCE_KERNEL = True
    try:
        part = logits[:, place.first : place.first + place.width]
        found = report_of_part(part, tokens, count, place, group.all_gather, group.added)
        return [same(*pair) for pair in zip(found, launch_report(logits, tokens, count), strict=True)]
    finally:
        launch.FORCE_KERNEL = False


@pytest.mark.parametrize("widths", SPLITS)
@pytest.mark.parametrize(
    ("dtype", "count", "strided"), [(torch.float32, 32, False), (torch.bfloat16, 5, False), (torch.float16, 0, True)]
)
def test_the_ranks_report_what_one_process_reports(ranks, widths, dtype, count, strided):
    assert ranks.alike(of_parts, len(widths), widths, dtype, count, strided) == [True] * 4


def test_rows_are_dealt_out_where_they_are_few():
    place, device = Place.of([0, 32064, 64128, 96192], [32064] * 4, 0), torch.device("cpu")
    few, many = torch.empty(8, 32064, dtype=torch.bfloat16), torch.empty(256, 32064, dtype=torch.bfloat16)
    best, front = BestShards(32064, 0, device), FrontShards((Rule("top_p", 0.9),), place, device)
    for step, reported, expected in (
        (best, None, [True, True]), (best, 0, [False, True]), (front, None, [False, True]), (front, 0, [False, True]),
    ):  # fmt: skip
        parts = sampling.Parts(step, 32064, None, None, None, reported, place)
        assert [parts.is_quicker(logits) for logits in (few, many)] == expected
