"""Processors whose values of rows torch computes: one fold with their neighbours, on both backends."""

from types import SimpleNamespace

import pytest
import torch
import transformers.generation.logits_process as theirs
from fastlogits_kernels.pointwise import fold as fold_kernels
from fastlogits_kernels.runtime.launcher import HAS_TRITON

import fastlogits as fl
from fastlogits.plan.pointwise import Pointwise
from fastlogits.processors import nvidia_zoo as zoo
from tests.processors.test_nvidia_zoo import JOBS, Clock
from tests.processors.toy import DEVICE, EOS, LINE, ONE, STOP, TOKENIZER, A, B, C, V, only, same

FIRST = 10  # the first timestamp
# Triton's interpreter truncates to bfloat16, where the GPU rounds.
DTYPES = {
    "torch": [torch.float32, torch.float16, torch.bfloat16, torch.float64],
    "kernels": [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])],
}


@pytest.fixture(params=["torch", "kernels"])
def backend(request, monkeypatch):
    if request.param == "kernels" and not HAS_TRITON:
        pytest.skip("needs Triton")
    monkeypatch.setattr(fold_kernels, "FORCE_KERNEL", request.param == "kernels")
    if request.param == "torch" and DEVICE == "cuda":
        lost = torch.device("cuda", torch.cuda.current_device())
        monkeypatch.setitem(fold_kernels._OPERATION.lost, lost, "for this test")
    return request.param


def config(latest=None):
    return SimpleNamespace(
        no_timestamps_token_id=FIRST - 1, eos_token_id=EOS, bos_token_id=1, max_initial_timestamp_index=latest
    )


def of_transformers(make):
    """A row as the class of transformers has it, of a run whose prompt is three tokens."""

    def rule(state, prompt, generated, row):
        return make(theirs)(torch.tensor([prompt + generated]), row.unsqueeze(0).clone()).squeeze(0)

    return rule


def timestamps(module, latest=None):
    return module.WhisperTimeStampLogitsProcessor(config(latest), 3, _detect_timestamp_from_logprob=False)


def codebooks(module):
    return module.AlternatingCodebooksLogitsProcessor(3, semantic_vocab_size=2, codebook_size=5)


def due(state, prompt, generated, row):
    return only(row, EOS) if EOS not in generated else row


FUSED = {
    **{name: JOBS[name] for name in ("length", "sentences", "cite", "cite less", "cite next")},
    "time": (lambda: zoo.MaxTimeLogitsProcessor(TOKENIZER, 0.0), due),
    "codebooks": (lambda: codebooks(fl), of_transformers(codebooks)),
    "timestamps": (lambda: timestamps(fl), of_transformers(timestamps)),
    "early timestamps": (lambda: timestamps(fl, 2), of_transformers(lambda module: timestamps(module, 2))),
}
each = pytest.mark.parametrize("name", list(FUSED))
# Its last token stands there twice, and the end of the text between.
PROMPT = [B, EOS, B]
# Texts that end in all ways: none generated, a sentence, the end of the text, timestamps alone, in pairs and in order.
GENERATED = [
    [[]] * 3, [[A], [FIRST], [EOS]], [[A, STOP], [FIRST, FIRST + 1], [A, FIRST + 2]],
    [[A, B, A], [EOS, C, STOP], [A, 12, 12]],
    [[LINE, A, 13, 13], [11, A, 12, B], [12, 12, A, LINE]], [[A, B, C, 15, 15], [A, A, A, A, A], [11, A, B, A, 14]],
]  # fmt: skip


@pytest.fixture(autouse=True)
def late(monkeypatch):
    """A clock that goes on by a second whenever it is read."""
    clock = Clock()

    def read():
        clock.now += 1.0
        return clock.now

    monkeypatch.setattr(zoo, "monotonic", read)


def listed(name):
    return fl.LogitsProcessorList(
        [
            fl.LogitBiasLogitsProcessor({A: 0.5, STOP: -0.25}),
            fl.SuppressTokensLogitsProcessor([14]),
            FUSED[name][0](),
            fl.TemperatureLogitsWarper(2.0),
            fl.SuppressTokensLogitsProcessor([ONE]),
        ]
    )


def expected(name, prompt, generated, row):
    row = row.clone()
    row[A] += 0.5
    row[STOP] -= 0.25
    row[14] = -torch.inf
    row = FUSED[name][1]({}, prompt, generated, row) / 2.0
    row[ONE] = -torch.inf
    return row


def scores(dtype, strided):
    generator = torch.Generator().manual_seed(V)
    values = (torch.randint(-40, 40, (3, 2 * V + 1), generator=generator) / 8).to(DEVICE, dtype)
    return values[:, 1::2][:, :V] if strided else values[:, :V].contiguous()


@each
@pytest.mark.parametrize("strided", [False, True])
def test_in_a_list_with_neighbours(backend, name, strided):
    for dtype in DTYPES[backend][: 1 if strided else None]:
        for generated in GENERATED:
            if name == "time" and not generated[0]:
                continue
            ids = torch.tensor([PROMPT + text for text in generated], device=DEVICE)
            given = scores(dtype, strided)
            run = listed(name).for_run(3)
            if name == "time":
                run(ids[:, :-1], given)  # starts the clock
            found = run(ids, given)
            assert same(given, scores(dtype, strided))
            wanted = torch.stack(
                [expected(name, PROMPT, text, row.cpu()) for text, row in zip(generated, given, strict=True)]
            )
            assert same(found, wanted), (generated, found, wanted)
            if strided:
                assert run.apply_(ids, given) is given
                assert same(given, wanted)


@each
def test_rows_at_positions_of_their_own(backend, name):
    """A serving engine's buffer: each row at its own length, known on the device, and anything behind it."""
    texts = [PROMPT + GENERATED[2][0], PROMPT + GENERATED[4][1], PROMPT + GENERATED[5][2]]
    buffer = torch.full((3, 20), EOS, device=DEVICE)
    buffer[:, 12:] = FIRST + 3
    for row, text in enumerate(texts):
        buffer[row, : len(text)] = torch.tensor(text, device=DEVICE)
    lengths = torch.tensor([len(text) for text in texts], device=DEVICE)
    prompts = torch.full((3,), 3, device=DEVICE)
    processors = listed(name)
    given = scores(torch.float32, False)
    if name == "time":
        processors(buffer, given, prompt_length=prompts, cache_position=lengths - 2)
    found = processors(buffer, given, prompt_length=prompts, cache_position=lengths - 1)
    wanted = [expected(name, PROMPT, text[3:], row.cpu()) for text, row in zip(texts, given, strict=True)]
    assert same(found, torch.stack(wanted)), (found, wanted)


@each
def test_one_fold(name):
    processors = listed(name)
    assert [type(part) for part in processors.plan.parts] == [Pointwise]
    told = processors.explain()
    assert len(told.parts) == 1
    assert told.parts[0].name.startswith("fold")
    assert "torch: " not in told
    assert ("values of each row" in told) is (name in ("length", "sentences", "time") or "timestamps" in name)


def test_likely_timestamps_are_all_that_stays_in_torch():
    processors = fl.LogitsProcessorList(
        [
            fl.SuppressTokensLogitsProcessor([14]),
            fl.WhisperTimeStampLogitsProcessor(config(), 3),
            fl.TemperatureLogitsWarper(2.0),
        ]
    )
    assert [part.name for part in processors.explain().parts] == [
        "fold: values of each row in torch, a search for their tokens, then 5 stages in one pass",
        "torch: mask",
        "fold: one pass",
    ]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@each
def test_captured_with_positions_on_the_device(name):
    if name == "time":
        pytest.skip("reads the clock")
    buffer = torch.full((3, 20), EOS, device=DEVICE)
    lengths, prompts = torch.full((3,), 3, device=DEVICE), torch.full((3,), 3, device=DEVICE)
    processors, given = listed(name), scores(torch.float32, False)

    def call():
        return processors(buffer, given, prompt_length=prompts, cache_position=lengths - 1)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for generated in GENERATED:
        lengths.fill_(3 + len(generated[0]))
        for row, text in enumerate(generated):
            buffer[row, : 3 + len(text)] = torch.tensor(PROMPT + text, device=DEVICE)
        graph.replay()
        wanted = [expected(name, PROMPT, text, row.cpu()) for text, row in zip(generated, given, strict=True)]
        assert same(found, torch.stack(wanted))
