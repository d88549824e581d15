"""Log-probabilities, ranks and the likeliest tokens: the kernels and torch, against ``log_softmax`` in float64."""

import math

import pytest
import torch
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.selection import launch, logprobs
from fastlogits_kernels.selection.logprobs import MOST, KeptRows, launch_report, reference_report, report
from fastlogits_kernels.selection.row import LOWEST

import fastlogits as fl
from tests.oracle import broken_rows, hard_rows

INF = math.inf
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
kernel = pytest.param("kernel", marks=pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"))
LOW = LOWEST.value


@pytest.fixture(params=["torch", kernel])
def backend(request, monkeypatch):
    """Both ways of the operation, wherever the tensors are."""
    monkeypatch.setattr(launch, "FORCE_KERNEL", request.param == "kernel")
    if request.param == "torch" and GPU:
        lost = torch.device("cuda", torch.cuda.current_device())
        monkeypatch.setitem(logprobs._OPERATION.lost, lost, "for this test")
    return request.param


def check(logits, tokens, count, found, counts=None):
    """Fail unless a report is that of the definition, in float64."""
    logits, tokens = logits.detach().cpu().double(), tokens.cpu()
    B, V = logits.shape
    right = logits.log_softmax(-1)
    for row in range(B):
        wanted = count if counts is None else min(count, int(counts[row]))
        mine = [each[row].cpu() for each in found]
        assert [each.dtype for each in mine] == [torch.float32, torch.int64, torch.int64, torch.float32]
        if wanted < 0:
            assert mine[0].isnan()
            assert mine[1] == 0
        else:
            own = int(tokens[row])
            inside = 0 <= own < V
            value = right[row, own] if inside else torch.tensor(math.nan)
            torch.testing.assert_close(mine[0].double(), value.double(), atol=2e-5, rtol=1e-6, equal_nan=True)
            assert mine[1] == (int((logits[row] >= logits[row, own]).sum()) if inside else 0)
        wanted = max(wanted, 0)
        order = logits[row].sort(descending=True, stable=True).indices[:wanted]
        assert mine[2][:wanted].tolist() == order.tolist()
        torch.testing.assert_close(
            mine[3][:wanted].double(), right[row, order], atol=2e-5, rtol=1e-6, equal_nan=True
        )  # fmt: skip
        assert (mine[2][wanted:] == -1).all()
        assert mine[3][wanted:].isnan().all()


def some_tokens(B, V):
    return torch.randint(V, (B,), generator=torch.Generator().manual_seed(B + V)).to(DEVICE)


@pytest.mark.parametrize("count", [0, 1, 5, 20, MOST])
@pytest.mark.parametrize("V", [1, 33, 1000, 151936])
def test_is_what_log_softmax_says(backend, V, count):
    if not GPU and backend == "kernel" and V > 1000 and count not in (0, 20):
        pytest.skip("slow in the interpreter")
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(V)).to(DEVICE) * 3
    tokens = some_tokens(3, V)
    count = min(count, V)
    check(logits, tokens, count, report(logits, tokens, count))


def test_hard_rows(backend):
    """Ties, spikes, masked rows; and rows without a distribution."""
    V = 4401 if GPU else 700
    for rows in (hard_rows(V), broken_rows(V)):
        logits = torch.stack([*rows.values()]).to(DEVICE)
        tokens = some_tokens(len(logits), V)
        check(logits, tokens, 20, report(logits, tokens, 20))
        best = logits.argmax(-1)
        check(logits, best, 3, report(logits, best, 3))


def test_tokens_that_tie_come_by_their_ids(backend):
    logits = torch.full((3, 5000), -INF)
    logits[0, ::7] = 1.5
    logits[0, 4000] = 2.0
    logits[1] = torch.randint(0, 3, (5000,), generator=torch.Generator().manual_seed(0)).float()
    logits[2, [4999, 77, 2048]] = torch.tensor([0.0, -0.0, 0.0])  # the zeros tie; ids of -inf follow
    logits = logits.to(DEVICE)
    tokens = torch.tensor([7, 3, 77], device=DEVICE)
    found = report(logits, tokens, MOST)
    check(logits, tokens, MOST, found)
    assert found.top_tokens[0, :3].tolist() == [4000, 0, 7]
    assert found.top_tokens[2, :5].tolist() == [77, 2048, 4999, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(backend, dtype):
    logits = (torch.randn(4, 1500, generator=torch.Generator().manual_seed(1)) * 3).to(DEVICE, dtype)
    tokens = some_tokens(4, 1500)
    check(logits.float(), tokens, 20, report(logits, tokens, 20))
    wide = torch.full((4, 3101), math.nan, device=DEVICE, dtype=dtype)
    wide[:, 101::2] = logits
    strided = wide[:, 101::2]
    whole, apart = report(logits, tokens, 9), report(strided, tokens, 9)
    assert all(map(torch.equal, apart, whole))
    twice = torch.stack((tokens, tokens * 0), 1)[:, 0]
    assert all(map(torch.equal, report(logits, twice, 9), whole))


def test_rows_that_want_less(backend):
    """Each row says how many it wants; what it doesn't want is not there."""
    logits = torch.randn(6, 900, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    tokens = torch.tensor([5, 899, -1, 900, 0, 3], device=DEVICE)  # two are outside the vocabulary
    counts = torch.tensor([-1, 0, 5, 20, 99, -7], dtype=torch.int32, device=DEVICE)
    logits[0] = math.nan
    check(logits, tokens, 20, report(logits, tokens, 20, counts), counts)
    check(logits, tokens, 0, report(logits, tokens, 0, counts), counts)


def test_no_rows(backend):
    found = report(torch.zeros(0, 50, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE), 4)
    assert [tuple(each.shape) for each in found] == [(0,), (0,), (0, 4), (0, 4)]


def test_more_than_the_kernels_look_for(backend):
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    tokens = some_tokens(2, 3000)
    check(logits, tokens, MOST + 9, report(logits, tokens, MOST + 9))


@pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")
def test_a_row_has_its_report_to_itself():
    """Bit for bit, whatever its place and its neighbours."""
    logits = torch.stack([*hard_rows(3000).values()])[:6].to(DEVICE)
    tokens = some_tokens(6, 3000)
    together = launch_report(logits, tokens, 5)
    order = torch.tensor([4, 0, 5], device=DEVICE)
    apart = launch_report(logits[order], tokens[order], 5)
    for found, right in zip(apart, together, strict=True):
        assert torch.equal(found, right[order])


# -- What a selection has left ---------------------------------------------------------------------------------------


def key_of(x):
    """The key of a number, as the kernels have it."""
    bits = (x + 0.0).view(torch.int32)
    return torch.where(x.isnan(), 0x7FFFFFFF, torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


def bits_of(x):
    return x.float().view(torch.int32)


@pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("first", [False, True])
def test_of_what_is_alive(first):
    """Tokens above a cut-off, some of those at it, and a band around a centre; the others are at -inf."""
    V = 2500
    logits = (torch.randn(4, V, generator=torch.Generator().manual_seed(6)) * 2).bfloat16().float()
    ids = torch.arange(V)
    words, kept = [], []
    # All of a row; the 40 largest and what ties with them; of those that tie only some; those nearest to 1.
    words.append(torch.tensor([LOW, LOW, 0, LOW]))
    kept.append(torch.ones(V, dtype=torch.bool))
    cutoff = logits[1].topk(40).values[-1]
    words.append(torch.tensor([int(key_of(cutoff)) - 1, LOW, 0, LOW]))
    kept.append(logits[1] >= cutoff)
    cutoff = logits[2].topk(40).values[-1]
    tied = ids[logits[2] == cutoff]
    some = tied[: len(tied) // 2 + 1] if first else tied[len(tied) // 2 :]
    cut = -int(some[-1]) if first else int(some[0])
    words.append(torch.tensor([int(key_of(cutoff)), cut, 0, LOW]))
    kept.append((logits[2] > cutoff) | torch.isin(ids, some))
    centre = torch.tensor(1.0)
    words.append(torch.tensor([LOW, LOW, int(bits_of(centre)), int(key_of(torch.tensor(-0.25)))]))
    kept.append((logits[3] - centre).abs() <= 0.25)
    rows = torch.full((4, 9), -1, dtype=torch.int32)
    rows[:, 2:6] = torch.stack(words)
    kept_rows = KeptRows(rows.to(DEVICE)[:, 2:6], first, True)
    processed = logits.masked_fill(~torch.stack(kept), -INF)
    for tokens in (processed.argmax(-1), torch.tensor([0, 1, 2, 3])):
        found = launch_report(logits.to(DEVICE), tokens.to(DEVICE), 20, kept=kept_rows)
        check(processed, tokens, 20, found)


@pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")
def test_of_what_a_chain_and_a_temperature_make():
    """Folded and divided while they are read, rows of no positive temperature by 1."""
    V = 900
    logits = (torch.randn(3, V, generator=torch.Generator().manual_seed(8)) * 2).bfloat16().to(DEVICE)
    ids = torch.tensor([[5, 7, 5], [1, 2, 3], [9, 9, 9]], device=DEVICE)
    processors = fl.LogitsProcessorList(
        [fl.RepetitionPenaltyLogitsProcessor(1.7), fl.SuppressTokensLogitsProcessor([*range(100, 200), 5])]
    )
    temperature = torch.tensor([0.5, 0.0, 2.0], device=DEVICE)
    divisor = torch.tensor([0.5, 1.0, 2.0], device=DEVICE)
    chain, call = processors.plan.inner_parts[0].inputs(ids, logits.float(), None)
    found_sets = launch.find_sets(logits.float(), chain, call)
    right = processors(ids, logits.float()) / divisor[:, None]
    tokens = torch.tensor([5, 2, 150], device=DEVICE)
    found = launch_report(logits, tokens, 20, chain=chain, found=found_sets, temperature=temperature)
    check(right, tokens, 20, found)


SAMPLERS = {
    "k p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "lowest": {"top_k": 20, "top_p": 0.9, "ties": "lowest"},
    "typical": {"typical_p": 0.8},
    "free": {"temperature": 1.3},
    "greedy": {"temperature": 0.0},
    "whole rows": {"top_p": 0.999},
    "each its own": {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 2.0, 1.0, 0.0]),
        "top_p": torch.tensor([0.9, 0.9, 1.0, 0.5, 0.99, 1.0]),
        "min_p": torch.tensor([0.1, 0.0, 0.0, 0.05, 0.0, 0.0]),
    },
}  # fmt: skip


@pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("parameters", SAMPLERS)
@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_a_sampler_reports_from_kernels_what_torch_says(monkeypatch, parameters, kind):
    """Greedy rows, sampled rows and rows of ties; the reported distribution is the one that was drawn from."""
    V = 700
    logits = torch.stack([hard_rows(V)[name] for name in ("gauss", "ties", "zipf", "masked", "spike .95", "gauss")])
    given = SAMPLERS[parameters]
    call = {"seeds": torch.arange(6) * 977, "positions": torch.arange(6), "input_ids": torch.arange(24).view(6, 4)}
    processors = [fl.RepetitionPenaltyLogitsProcessor(1.3), fl.SuppressTokensLogitsProcessor([3, 5])]
    options = {"logprobs": kind, "top_logprobs": 20}
    wanted = fl.sample(logits, processors, **call, **given, **options)
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    monkeypatch.setattr("fastlogits.sampling.draw", None)  # no way but that of the kernels
    monkeypatch.setattr(logprobs, "reference_report", None)
    given, call = ({k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in each.items()} for each in (given, call))
    found = fl.sample(logits.to(DEVICE), processors, **call, **given, **options)
    assert found.tokens.tolist() == wanted.tokens.tolist()
    assert found.ranks.tolist() == wanted.ranks.tolist()
    assert found.top_tokens.tolist() == wanted.top_tokens.tolist()
    for mine, right in ((found.logprobs, wanted.logprobs), (found.top_logprobs, wanted.top_logprobs)):
        torch.testing.assert_close(mine.cpu(), right, atol=2e-5, rtol=1e-5)


# -- How it is registered --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_opcheck(backend):
    logits, counts = torch.randn(3, 40, device=DEVICE), torch.tensor([3, 5, 3], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor([3, 39, 0], device=DEVICE)
    for arguments in ((logits, tokens, 3), (logits.bfloat16(), tokens, 3, counts), (logits, tokens, 0)):
        torch.library.opcheck(torch.ops.fastlogits.report.default, arguments)


@gpu
def test_captured_and_without_waiting():
    """One graph serves other logits, tokens and counts."""
    B, V = 7, 128256
    logits = torch.randn(B, V, device=DEVICE).bfloat16()
    tokens = some_tokens(B, V)
    counts = torch.full((B,), 20, dtype=torch.int32, device=DEVICE)
    report(logits, tokens, 20, counts)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        report(logits, tokens, 20, counts)
    finally:
        torch.cuda.set_sync_debug_mode(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = report(logits, tokens, 20, counts)
    for step in range(3):
        logits.normal_().mul_(1 + step)
        tokens.random_(V)
        counts.random_(-1, 21)
        graph.replay()
        torch.cuda.synchronize()
        again = report(logits, tokens, 20, counts)
        assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(found, again, strict=True))
        check(logits.float(), tokens, 20, found, counts)


def test_the_reference_takes_any_logits():
    logits = torch.randn(2, 60).bfloat16()
    check(logits.float(), torch.tensor([3, 4]), 5, reference_report(logits, torch.tensor([3, 4]), 5))
