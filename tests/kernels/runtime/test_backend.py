"""Without Triton, with kernels that can't be compiled, on old GPUs: torch instead, the same result, said once."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from fastlogits_kernels import synthid
from fastlogits_kernels.pointwise import bitmask, fold, mask, pack_ids
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime import backend
from fastlogits_kernels.runtime import launcher as runtime
from fastlogits_kernels.runtime.backend import CompileError, KernelError
from fastlogits_kernels.selection import launch, launchers, logprobs
from fastlogits_kernels.serving import search, steps
from fastlogits_kernels.truncate.dispatch import truncate
from fastlogits_kernels.truncate.reference import reference_truncate

import fastlogits as fl

ROOT = Path(__file__).parents[3]
IDS = torch.tensor([[1, 2, 3], [4, 4, 5]])
needs_triton = pytest.mark.skipif(not runtime.HAS_TRITON, reason="needs Triton")
OPERATIONS = (
    bitmask._OPERATION, fold._OPERATION, mask._OPERATION, pack_ids._OPERATION, logprobs._OPERATION,
    launch.OPERATION, steps._OPERATION, synthid._OPERATION,
)  # fmt: skip


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def fresh(monkeypatch):
    """A process that has lost and said nothing, with the kernels taken on a CPU where there is no GPU."""
    monkeypatch.setattr(backend, "_warned", False)
    for operation in OPERATIONS:
        monkeypatch.setattr(operation, "lost", {})
    for module in (fold, launch, steps):
        monkeypatch.setattr(module, "FORCE_KERNEL", not torch.cuda.is_available())


class Broken:
    """A kernel whose compiler or launch raises."""

    def __init__(self, at_launch: bool = False) -> None:
        self._at_launch = at_launch

    def warmup(self, *arguments, **options):
        if not self._at_launch:
            raise RuntimeError("failed to find C compiler")

    def __getitem__(self, grid):
        raise RuntimeError("out of memory")


def break_kernels(monkeypatch, *launchers, at_launch=False):
    for launcher in launchers:
        monkeypatch.setattr(launcher, "kernel", Broken(at_launch))
        monkeypatch.setattr(launcher, "compiled", {})


def break_selection(monkeypatch, name):
    for made in (launchers.LAUNCHERS, launchers.EARLY):
        found = getattr(made, name)
        break_kernels(monkeypatch, *(found.values() if isinstance(found, dict) else [found]))


def processors():
    return fl.LogitsProcessorList(
        [
            fl.RepetitionPenaltyLogitsProcessor(1.3),
            fl.TemperatureLogitsWarper(0.7),
            fl.TopKLogitsWarper(20),
            fl.TopPLogitsWarper(0.8),
        ]
    )


def inputs(device):
    scores = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) * 3
    return IDS.to(device), scores.to(device)


def same(found, expected):
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-6, atol=0)


def said(caught):
    return [str(each.message) for each in caught if "falls back to torch" in str(each.message)]


@needs_triton
@pytest.mark.parametrize("name", ["bounds", "filter", "refine", "rows"])
def test_a_selection_that_cannot_be_compiled(monkeypatch, fresh, device, name):
    rules = (Rule("top_k", 20), Rule("top_p", 0.8))
    ids, scores = inputs(device)
    expected = reference_truncate(scores, rules)
    break_selection(monkeypatch, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # What has captured the operation calls it whatever happens; what asks first takes another way.
        for _ in range(2):
            found = launch.select(scores, launch.Selection(rules, 300, scores.device, normalise=True))
            same(found, expected.log_softmax(-1))
        same(truncate(scores, rules), expected)
        same(processors()(ids, scores), processors()(*inputs("cpu")))
    (message,) = said(caught)
    assert "C compiler" in message
    assert "FASTLOGITS_BACKEND=torch" in message
    assert torch.equal(scores.cpu(), inputs("cpu")[1])
    assert "select" in backend.lost_on(scores.device)


@needs_triton
@pytest.mark.parametrize("in_place", [False, True])
def test_a_fold_that_cannot_be_compiled(monkeypatch, fresh, device, in_place):
    ids, scores = inputs(device)
    chain = fl.LogitsProcessorList([fl.RepetitionPenaltyLogitsProcessor(1.3), fl.TemperatureLogitsWarper(0.5)])
    expected = scores.clone()
    seen = expected.gather(1, ids)
    expected = expected.scatter(1, ids, torch.where(seen < 0, seen * 1.3, seen / 1.3)) / 0.5
    break_kernels(monkeypatch, fold._fold_launcher)
    with pytest.warns(RuntimeWarning, match="fold: the kernel Broken can't be compiled"):
        found = chain.apply_(ids, scores) if in_place else chain(ids, scores)
    same(found, expected)


@needs_triton
def test_tokens_that_no_kernel_draws(monkeypatch, fresh, device):
    _, scores = inputs(device)
    temperature = torch.tensor([0.0, 0.7], device=device)
    sampler = fl.Sampler(temperature=temperature, top_k=20, logprobs="processed", top_logprobs=3)
    seeds = torch.tensor([3, 4], device=device)
    expected = sampler(scores, seeds, 0)
    break_selection(monkeypatch, "refine")
    with pytest.warns(RuntimeWarning, match="falls back to torch"):
        found = sampler(scores, seeds, 0)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.top_tokens, expected.top_tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs)


@needs_triton
@pytest.mark.parametrize("broken", ["slots", "keep", "selection"])
def test_a_batch_of_requests_whose_kernels_cannot_be_compiled(monkeypatch, fresh, device, broken):
    def run():
        batch = fl.BatchProcessor(max_requests=2, vocab_size=300, max_length=16, device=device)
        parameters = fl.RequestParams(temperature=0.7, top_k=20, repetition_penalty=1.3)
        slots = torch.tensor([batch.add(parameters, row.tolist()) for row in IDS], device=device)
        scores = inputs(device)[1]
        batch.apply_(scores, slots)
        return scores

    expected = run()
    if broken == "selection":
        break_selection(monkeypatch, "rows")
    elif broken == "slots":
        break_kernels(monkeypatch, search._slot_sets_launcher)
    else:
        break_kernels(monkeypatch, sys.modules["fastlogits_kernels.selection.keep"]._keep_launcher)
    with pytest.warns(RuntimeWarning, match="falls back to torch"):
        found = run()
    same(found, expected)


@needs_triton
def test_a_launch_that_fails_says_how_to_do_without_it(monkeypatch, fresh, device):
    break_kernels(monkeypatch, fold._fold_launcher, at_launch=True)
    with pytest.raises(KernelError, match=r"launched.*out of memory.*FASTLOGITS_BACKEND=torch"):
        fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), fl.RepetitionPenaltyLogitsProcessor(1.3)])(
            *inputs(device)
        )


@needs_triton
def test_who_asks_for_the_kernels_gets_them_or_an_error(monkeypatch, fresh, device):
    monkeypatch.setattr(backend, "BACKEND", "triton")
    break_kernels(monkeypatch, fold._fold_launcher)
    both = fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), fl.RepetitionPenaltyLogitsProcessor(1.3)])
    with pytest.raises(CompileError, match="C compiler"):
        both(*inputs(device))


@needs_triton
def test_an_old_gpu(monkeypatch, fresh, device):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    backend.unsupported.cache_clear()
    reason = backend.unsupported(torch.device("cuda", 0))
    backend.unsupported.cache_clear()
    assert reason.startswith("Tesla V100 has compute capability 7.0, and Triton needs 8.0")
    monkeypatch.setattr(backend, "unsupported", lambda device: reason)
    monkeypatch.setattr(fold._fold_launcher, "compiled", {})
    ids, scores = inputs(device)
    with pytest.warns(RuntimeWarning, match="compute capability 7"):
        found = fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), fl.SuppressTokensLogitsProcessor([1])])(
            ids, scores
        )
    expected = scores / 0.5
    expected[:, 1] = -torch.inf
    same(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_that_is_captured_raises(monkeypatch, fresh):
    scores = inputs("cuda")[1]
    words = torch.zeros(2, 10, dtype=torch.int32, device="cuda")
    torch.cuda.synchronize()
    break_kernels(monkeypatch, bitmask._bitmask_launcher)
    with (
        pytest.raises(CompileError, match="FASTLOGITS_BACKEND=torch"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        bitmask.apply_bitmask_(scores, words, 300)


CALL = """
import torch, warnings, fastlogits as fl
from fastlogits_kernels.runtime import backend
from fastlogits_kernels.pointwise import fold
from fastlogits_kernels.selection import launch
fold.FORCE_KERNEL = launch.FORCE_KERNEL = True  # as if the scores were on a GPU
ids, scores = torch.tensor([[1, 2]]), torch.arange(9.0).unsqueeze(0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        found = fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5), fl.TopKLogitsWarper(2)])(ids, scores)
said = [str(each.message) for each in caught if "falls back" in str(each.message)]
assert found[0, -2:].tolist() == [14.0, 16.0] and found[0, :-2].isneginf().all(), found
print(len(said), *said)
"""


def test_without_triton():
    done = python("import sys; sys.modules['triton'] = None" + CALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 fastlogits falls back to torch")
    assert "Triton can't be imported (ModuleNotFoundError" in done.stdout
    assert "pip install triton" in done.stdout


def test_the_environment_switches_the_kernels_off():
    done = python(CALL, FASTLOGITS_BACKEND="torch")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0"]


def test_the_environment_asks_for_triton_where_there_is_none():
    done = python("import sys; sys.modules['triton'] = None" + CALL, FASTLOGITS_BACKEND="triton")
    assert "ImportError: FASTLOGITS_BACKEND is triton, but Triton can't be imported" in done.stderr


ON_THE_CPU = """
import torch, fastlogits as fl
ids, scores = torch.tensor([[1, 2, 70]]), torch.arange(90.0).unsqueeze(0)
calls = [
    lambda: fl.LogitsProcessorList([fl.TemperatureLogitsWarper(0.5)])(ids, scores),
    lambda: fl.LogitsProcessorList([fl.RepetitionPenaltyLogitsProcessor(1.1)]).apply_(ids, scores.clone()),
    lambda: fl.SuppressTokensLogitsProcessor([1, 33, 88])(ids, scores),
    lambda: fl.SuppressTokensLogitsProcessor(range(0, 90, 3))(ids, scores),
    lambda: fl.LogitsProcessorList([fl.SuppressFirstTokens([1, 89])])(ids, scores, prompt_length=3),
    lambda: fl.LogitsProcessorList([fl.AllowedTokensLogitsProcessor([5, 64])])(ids, scores),
    lambda: fl.LogitsProcessorList([fl.OnlyTokensFrom("prompt", eos_token_id=7)])(ids, scores, prompt_length=3),
    lambda: fl.TopKLogitsWarper(3)(ids, scores),
    lambda: fl.sample(scores, seeds=1, positions=0).tokens,
    lambda: fl.sample(scores, seeds=1, positions=0, top_p=0.9).tokens,
]
for call in calls:
    try:
        print([round(each, 4) for each in call().flatten().tolist()])
    except RuntimeError as error:
        print(type(error).__name__, error)
"""
CALLS_ON_THE_CPU = 10


def test_the_environment_asks_for_the_kernels_on_a_cpu():
    done = python(ON_THE_CPU, FASTLOGITS_BACKEND="triton", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    message = (
        "KernelError FASTLOGITS_BACKEND must be auto or torch for tensors on cpu, got 'triton': the kernels need a GPU"
    )
    assert [line.startswith(message) for line in done.stdout.splitlines()] == [True] * CALLS_ON_THE_CPU
    for environment in ({"FASTLOGITS_BACKEND": "auto"}, {"FASTLOGITS_BACKEND": "torch"}):
        results = python(ON_THE_CPU, TRITON_INTERPRET="0", **environment).stdout
        assert results.count("[") == CALLS_ON_THE_CPU
        assert "Error" not in results


@needs_triton
def test_the_interpreter_runs_the_kernels_that_the_environment_asks_for():
    """With the results of torch."""
    done = python(ON_THE_CPU, FASTLOGITS_BACKEND="triton", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("this version of Triton's interpreter has no loops beside this version of NumPy")
    assert done.stdout == python(ON_THE_CPU, FASTLOGITS_BACKEND="torch").stdout


def test_another_word_in_the_environment():
    done = python(CALL, FASTLOGITS_BACKEND="cuda")
    assert "ValueError: FASTLOGITS_BACKEND must be one of auto, torch, triton, got 'cuda'" in done.stderr


def test_a_transformers_that_no_test_has_seen():
    code = "import transformers; transformers.__version__ = '6.1.0'\nimport fastlogits as fl; fl.LogitsProcessorList()"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("transformers 6.1.0 is newer than what fastlogits is tested with") == 1
