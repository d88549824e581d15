"""``torch.compile``: lists that nobody has called before make no break; every registered operation is a sound one."""

import importlib
import pkgutil

import fastlogits_kernels
import pytest
import torch
import transformers.generation.logits_process as theirs
from fastlogits_kernels.pointwise.mask import Bans
from fastlogits_kernels.rules import Rule
from fastlogits_kernels.runtime.bits import pack_bits
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.selection import launch
from fastlogits_kernels.training.logprobs import flattened as trained
from fastlogits_kernels.training.reference import Task
from fastlogits_kernels.truncate.dispatch import _flattened

import fastlogits as fl
from fastlogits.compilers import constant
from tests.models import tiny_llama

V, L = 50, 9
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.randint(0, V, (2, L), generator=torch.Generator().manual_seed(0)).to(DEVICE)
SCORES = torch.randn(2, V, generator=torch.Generator().manual_seed(1)).to(DEVICE)

LISTS = {
    "masks": lambda: [fl.SuppressTokensLogitsProcessor([1, 2]), fl.SuppressFirstTokens([3], window=4)],
    "history": lambda: [fl.RepetitionPenaltyLogitsProcessor(1.3), fl.NoRepeatNGramLogitsProcessor(2)],
    "words": lambda: [
        fl.NoBadWordsLogitsProcessor([[1, 2], [3]]),
        fl.SequenceBiasLogitsProcessor([[[1, 2], 2.0], [[3], -1.0]]),
    ],
    "lengths": lambda: [
        fl.MinNewTokensLengthLogitsProcessor(L, 3, [2]),
        fl.ForcedEOSTokenLogitsProcessor(L + 1, 2),
        fl.ExponentialDecayLengthPenalty((2, 1.1), 2, 3),
    ],
    "truncations": lambda: [fl.TopKLogitsWarper(20), fl.TopPLogitsWarper(0.9), fl.LogitNormalization()],
    "transformers' own": lambda: [
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.TemperatureLogitsWarper(0.7),
        theirs.MinPLogitsWarper(0.05),
    ],
    "a function": lambda: [fl.TemperatureLogitsWarper(0.7), lambda ids, scores: scores - 1],
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", LISTS)
def test_a_list_never_called_before_makes_no_break(name):
    """Nor does it make a second graph once it has been called."""
    processors, same = (fl.LogitsProcessorList(LISTS[name]()) for _ in range(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(ids, scores):
        return processors(ids, scores * 2, prompt_length=L - 1)

    wanted = same(IDS, SCORES * 2, prompt_length=L - 1)
    for _ in range(2):
        assert torch.equal(step(IDS, SCORES), wanted)
    processors(IDS, SCORES, prompt_length=L - 1)
    assert torch.equal(step(IDS, SCORES), wanted)
    assert len(graphs) == 1


@pytest.mark.parametrize("module", [fl, theirs])
def test_changes_of_a_list_count(module):
    processors = fl.LogitsProcessorList([module.TemperatureLogitsWarper(0.7), module.TopKLogitsWarper(9)])
    step = torch.compile(lambda ids, scores: processors(ids, scores * 2), fullgraph=True, backend="aot_eager")

    def check():
        assert torch.equal(step(IDS, SCORES), fl.LogitsProcessorList(list.__iter__(processors))(IDS, SCORES * 2))

    check()
    processors[0].temperature = 1.7
    check()
    processors[1].top_k = 5
    check()
    processors.append(module.MinPLogitsWarper(0.3))
    check()
    processors[0] = module.RepetitionPenaltyLogitsProcessor(2.0)
    check()
    del processors[1]
    check()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_kernels_that_fold_and_truncate_are_one_operation(monkeypatch):
    """What a GPU takes in one pass stays one pass in a compiled function."""
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    processors = fl.LogitsProcessorList([*LISTS["history"](), *LISTS["truncations"]()])
    plan = processors.plan
    called = []

    def backend(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes if "fastlogits" in str(node.target))
        return graph

    compiled = torch.compile(lambda ids, scores: plan(ids, scores * 2), fullgraph=True, backend=backend)
    found = compiled(IDS, SCORES)
    assert called == ["fastlogits.select"]
    assert torch.equal(found, plan(IDS, SCORES * 2))


def test_a_processor_by_itself():
    for made in (LISTS["masks"]()[0], *LISTS["history"](), *LISTS["truncations"]()):
        step = torch.compile(lambda ids, scores, made=made: made(ids, scores * 2), fullgraph=True, backend="aot_eager")
        assert torch.equal(step(IDS, SCORES), made(IDS, SCORES * 2))


def test_forward_processors_and_choice_are_one_graph():
    model = tiny_llama().to(DEVICE)
    processors = fl.LogitsProcessorList([*LISTS["history"](), *LISTS["lengths"](), *LISTS["truncations"]()])

    def step(ids):
        return processors(ids, model(ids).logits[:, -1].float(), prompt_length=L).argmax(-1)

    with torch.no_grad():
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(IDS)
        assert torch.equal(found, step(IDS))


# -- Registered operations -------------------------------------------------------------------------------------------


def _fold():
    processors = fl.LogitsProcessorList([*LISTS["history"](), *LISTS["lengths"]()])
    step = processors.plan.inner_parts[0]
    run = processors.for_run(L)
    run(IDS, SCORES)
    (chain,) = step._kept.values()
    _fold.keeps = step  # a chain lives as long as its step
    return (SCORES.clone(), chain.handle, IDS), {"cache_offset": L - 1, "prompt_offset": L}


def _selection():
    rules = [Rule("top_k", 3)]
    _selection.keeps = launch.Selection(rules, V, torch.device(SCORES.device))
    return (SCORES, _selection.keeps.handle, *_fold()[0][1:]), {"cache_offset": L - 1, "prompt_offset": L}


def _bans():
    windows = torch.tensor([1, 2], dtype=torch.int32, device=DEVICE)
    sets = pack_bits(torch.rand(2, V, device=DEVICE) < 0.3)
    return (SCORES.clone(), *Bans(sets, None, None, windows, cache_offset=3)), {}


def _rows(*values):
    return torch.tensor(values, device=DEVICE)


def _of_rows():
    """Targets, and what is asked of them."""
    return IDS[:2, 0], *trained(Task(IDS[:2, 0], None, (Rule("top_k", 20), Rule("top_p", _rows(0.9, 0.5))), None, -100))


EXAMPLES = {
    "apply_bitmask_": lambda: ((SCORES.clone(), _rows(*[0b0101] * -(-V // 32)).int().expand(len(SCORES), -1), V), {}),
    "draw": lambda: ((SCORES, _rows(3, 4), _rows(0, 1), _rows(True, False)), {}),
    "fold": _fold,
    "fold_": _fold,
    "mask_tokens": _bans,
    "mask_tokens_": _bans,
    "pack_ids": lambda: ((IDS, V), {}),
    "report": lambda: ((SCORES, _rows(3, 4), 5), {"counts": _rows(5, 5).int()}),
    "select": _selection,
    "kept_ids": lambda: ((torch.tensor([[5, 0], [-1, 3]], dtype=torch.int32, device=DEVICE), 60, 9), {}),
    "logprobs": lambda: ((SCORES, *_of_rows(), True), {}),
    "logprobs_backward": lambda: (
        (
            _rows(1.0, 2.0),
            None,
            SCORES,
            IDS[:2, 0],
            torch.ops.fastlogits.logprobs(SCORES, *_of_rows(), True)[3],
            *_of_rows()[1:],
        ),
        {},
    ),
    "synthid": lambda: (
        (SCORES, _rows(0, 1, 1, 0, 1, 0, 0).to(torch.uint8), IDS[:, :3], _rows(False, True).view(2, 1), 5),
        {},
    ),
    "truncate": lambda: (
        (SCORES, *_flattened([Rule("top_k", 20), Rule("top_p", _rows(0.9, 0.5)), Rule("min_p", 0.05)])),
        {},
    ),
}


def test_a_constant_is_marked_as_torch_marks_it():
    ours, torchs = (mark(lambda: None) for mark in (constant, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(torchs) != {}


def _registered():
    for module in pkgutil.iter_modules(fastlogits_kernels.__path__):
        importlib.import_module(f"fastlogits_kernels.{module.name}")
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.split("::")[1] for name in names if name.startswith("fastlogits::"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", _registered())
def test_each_registered_operation_passes_opcheck(name):
    if name == "select" and not HAS_TRITON:
        pytest.skip("needs Triton")
    assert name in EXAMPLES, f"give arguments for fastlogits::{name} in EXAMPLES"
    arguments, named = EXAMPLES[name]()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    if name == "select" and DEVICE == "cpu":
        tests = tests[:3]  # seconds a call in the interpreter
    torch.library.opcheck(getattr(torch.ops.fastlogits, name).default, arguments, named, test_utils=tests)
