"""The step of ``fl.decode`` as a CUDA graph: what it says, that it is replayed, and what is left when it can't be."""

import contextlib
import copy
import logging

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import fastlogits as fl
from fastlogits.plan.stages import Rows
from fastlogits.transformers import caches, loop
from fastlogits.transformers.graphs import GRAPHS, Graphs
from fastlogits.transformers.step import Step, Verification
from tests.models import tiny_llama
from tests.transformers.test_loop import CHAINS, MODELS, OUTPUT, PROMPT, RUNS, SEEDS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not caches.has_device_counters(), reason="no static cache that counts on the device"),
]

NEW = 16


@pytest.fixture(autouse=True)
def _nothing_kept():
    fl.decode.clear()
    yield
    fl.decode.clear()


@pytest.fixture(scope="module")
def model():
    return tiny_llama().cuda()


def generate(model, ids=PROMPT, **options):
    ids = ids.cuda()
    given = {"max_new_tokens": NEW, "do_sample": True, "custom_generate": fl.decode, "eos_token_id": None, **options}
    given["attention_mask"] = given.get("attention_mask", torch.ones_like(ids)).cuda()
    if "seeds" in given:
        given["seeds"] = given["seeds"].cuda()
    return model.generate(input_ids=ids, **given)


@contextlib.contextmanager
def uncaptured(monkeypatch):
    """The same loop, with no step captured."""
    fl.decode.clear()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_WARM_UP", 10**6)
        yield
    fl.decode.clear()


@contextlib.contextmanager
def ordinary(monkeypatch):
    """transformers' own loop."""

    def refuse(request):
        raise loop.Unfit("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "decode", refuse)
        yield


def captured():
    """The one step that is kept, whose graph there is."""
    (step,) = GRAPHS
    assert step.graph is not None, GRAPHS._refused
    return step


def test_captured_once_and_replayed(monkeypatch, model):
    """A second call of the same kind, with other prompts and seeds, captures nothing."""
    generate(model, seeds=SEEDS, **CHAINS["all"])
    step = captured()
    assert step.replays == NEW - 1 - loop._WARM_UP
    monkeypatch.setattr(Graphs, "capture", None)
    for ids, seeds in ((PROMPT.flip(1), SEEDS + 1), (PROMPT, SEEDS + 2)):
        before = step.replays
        generate(model, ids, seeds=seeds, **CHAINS["all"])
        assert captured() is step
        assert step.replays == before + NEW - 1


def test_other_numbers_replay_the_same_graph(monkeypatch, model):
    """Temperatures, k, p, penalties and lengths are in tensors."""
    chains = [
        {"temperature": t, "top_k": k, "top_p": 0.9, "repetition_penalty": r, "min_new_tokens": n, "eos_token_id": 2}
        for t, k, r, n in ((0.8, 20, 1.3, 4), (3.0, 30, 1.1, 8), (0.1, 5, 2.0, 2), (0.8, 20, 1.3, 4))
    ]
    with uncaptured(monkeypatch):
        wanted = [generate(model, ids, seeds=SEEDS, **chain) for chain in chains for ids in (PROMPT, PROMPT[:, 2:])]
    said = [generate(model, ids, seeds=SEEDS, **chain) for chain in chains for ids in (PROMPT, PROMPT[:, 2:])]
    for mine, theirs in zip(said, wanted, strict=True):
        assert torch.equal(mine, theirs)
    assert captured().replays


@pytest.mark.parametrize("chain", CHAINS)
def test_the_same_tokens(monkeypatch, model, chain):
    """As of the same steps without a graph, and as of transformers' own loop; the second time, by replays alone."""
    options = {"seeds": SEEDS, **CHAINS[chain]}
    if "exponential_decay_length_penalty" in options:
        options["eos_token_id"] = 2  # of which it speaks
    with uncaptured(monkeypatch):
        wanted = generate(model, **options)
    with ordinary(monkeypatch):
        assert torch.equal(generate(model, **options), wanted)
    for _ in range(2):
        assert torch.equal(generate(model, **options), wanted)
    captured()


@pytest.mark.parametrize("run", RUNS)
def test_processors_of_ours(monkeypatch, model, run):
    def said():
        return generate(model, seeds=SEEDS, top_k=0, logits_processor=fl.LogitsProcessorList(RUNS[run]()))

    with uncaptured(monkeypatch):
        wanted = said()
    for _ in range(2):
        assert torch.equal(said(), wanted)
    captured()


@pytest.mark.parametrize("chain", ["all", "greedy", "typical"])
def test_scores_and_logits(monkeypatch, model, chain):
    options = {"seeds": SEEDS, **CHAINS[chain], **OUTPUT}
    with uncaptured(monkeypatch):
        wanted = generate(model, **options)
    for _ in range(2):
        said = generate(model, **options)
        assert torch.equal(said.sequences, wanted.sequences)
        for name in ("scores", "logits"):
            assert all(torch.equal(*pair) for pair in zip(said[name], wanted[name], strict=True))
        for mine, theirs in zip(said.past_key_values.layers, wanted.past_key_values.layers, strict=True):
            assert torch.equal(mine.keys, theirs.keys)
    captured()


def test_a_replayed_step_never_waits(monkeypatch, model):
    original = Step.advance

    def advance(step, *given):
        if step.graph is None:
            return original(step, *given)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(step, *given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Step, "advance", advance)
    generate(model, seeds=SEEDS, **CHAINS["all"])
    assert captured().replays


def test_rows_that_end(monkeypatch, model):
    """The end is found late, and nothing of what came after it is left: tokens, scores, cache, streamer."""

    class Streamer(BaseStreamer):
        def __init__(self):
            self.got = []

        def put(self, value):
            self.got.append(value.tolist())

        def end(self):
            self.got.append("end")

    for seed in range(6):
        seeds = SEEDS + seed
        options = {"eos_token_id": [*range(30, 60), 2], "seeds": seeds, "max_new_tokens": 40, **OUTPUT}
        with ordinary(monkeypatch):
            wanted = generate(model, streamer=(theirs := Streamer()), **options)
        said = generate(model, streamer=(mine := Streamer()), **options)
        assert torch.equal(said.sequences, wanted.sequences)
        assert len(said.scores) == len(wanted.scores)
        assert said.past_key_values.get_seq_length() == wanted.past_key_values.get_seq_length()
        assert mine.got == theirs.got


@pytest.mark.parametrize("name", MODELS)
def test_windows_and_turns(monkeypatch, name):
    """Sliding windows, and a cache that goes on to the next turn."""
    model = MODELS[name]().cuda()

    def run():
        ids, cache = PROMPT, None
        for turn in range(2):
            given = {} if cache is None else {"past_key_values": cache}
            out = generate(model, ids, seeds=SEEDS + turn, **given, **OUTPUT)
            ids, cache = torch.cat([out.sequences.cpu(), PROMPT[:, 1:4]], 1), out.past_key_values
        return out.sequences

    with ordinary(monkeypatch):
        wanted = run()
    assert torch.equal(run(), wanted)
    # The masks of eager attention are made on the host.
    assert any(step.graph is not None for step in GRAPHS) == (name != "eager"), GRAPHS._refused


def test_left_padding(monkeypatch, model):
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    ids[1, :3], mask[1, :3] = 0, 0
    with ordinary(monkeypatch):
        wanted = generate(model, ids, attention_mask=mask, seeds=SEEDS)
    generate(model, seeds=SEEDS)  # without padding: the same graph
    assert torch.equal(generate(model, ids, attention_mask=mask, seeds=SEEDS), wanted)
    captured()


def test_encoder_decoder(monkeypatch, t5):
    model = copy.deepcopy(t5).cuda()
    with ordinary(monkeypatch):
        wanted = [generate(model, ids, seeds=SEEDS, **CHAINS["all"]) for ids in (PROMPT, PROMPT.flip(1))]
    said = [generate(model, ids, seeds=SEEDS, **CHAINS["all"]) for ids in (PROMPT, PROMPT.flip(1))]
    assert all(torch.equal(*pair) for pair in zip(said, wanted, strict=True))
    captured()


def test_bfloat16(monkeypatch):
    model = tiny_llama().cuda().bfloat16()
    with uncaptured(monkeypatch):
        wanted = generate(model, seeds=SEEDS, **CHAINS["all"])
    for _ in range(2):
        assert torch.equal(generate(model, seeds=SEEDS, **CHAINS["all"]), wanted)
    captured()


def test_a_compiled_forward(monkeypatch):
    """Given its logits, the tokens are those that they give."""
    model = tiny_llama().cuda()
    said = generate(model, seeds=SEEDS, compile=True, **CHAINS["all"], **OUTPUT)
    captured()
    with uncaptured(monkeypatch):
        wanted = generate(model, seeds=SEEDS, compile=True, **CHAINS["all"], **OUTPUT)
    assert torch.equal(said.sequences, wanted.sequences)
    for mine, theirs in zip(said.logits, wanted.logits, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("do_sample", [False, True])
def test_drafts(monkeypatch, model, do_sample):
    """Verified by a graph, drafts change no token; and a text that repeats itself takes fewer steps."""
    for chain in (
        {"top_k": 0},
        {"logits_processor": fl.LogitsProcessorList([fl.LogitBiasLogitsProcessor({17: 60.0})])},
    ):
        options = {"seeds": SEEDS[:1], "do_sample": do_sample, "max_new_tokens": 60, **chain}
        wanted = generate(model, PROMPT[:1], **options)
        for _ in range(2):
            said = generate(model, PROMPT[:1], prompt_lookup_num_tokens=4, **options, **OUTPUT)
            assert torch.equal(said.sequences, wanted)
    assert len(said.accepted_drafts) <= 31  # how many drafts are found differs between versions of transformers
    verifications = [step for step in GRAPHS if isinstance(step, Verification)]
    assert verifications
    assert all(step.graph is not None for step in verifications), GRAPHS._refused
    alike = generate(model, PROMPT[:1], assistant_model=model, **options, **OUTPUT)
    assert torch.equal(alike.sequences, wanted)
    assert sum(alike.accepted_drafts) > 30


# -- What can't be captured ----------------------------------------------------------------------------------------


class _Waits(fl.StagedProcessor):
    """Looks at the scores on the host."""

    def stage(self):
        return Rows("opaque", lambda ids, scores: scores + 0 * scores.max().item(), "waits", reads_history=False)


class _Refuses(fl.StagedProcessor):
    """Fails in a capture, and only there."""

    def stage(self):
        return Rows("opaque", self._run, "refuses", reads_history=False)

    def _run(self, ids, scores):
        if torch.cuda.is_current_stream_capturing():
            scores.max().item()
        return scores


@pytest.mark.parametrize("kind", [_Waits, _Refuses])
def test_a_step_that_can_not_be_captured(monkeypatch, caplog, model, kind):
    """It says why, goes on without, and leaves CUDA as it was; the next call takes the ordinary loop at once."""
    caplog.set_level(logging.INFO, logger="fastlogits")
    processor = kind()
    options = {"seeds": SEEDS, "temperature": 0.9}
    with ordinary(monkeypatch):
        wanted = generate(model, logits_processor=fl.LogitsProcessorList([processor]), **options)
    kept = generate(model, PROMPT[:1], seeds=SEEDS[:1])  # a graph beside it
    caplog.clear()
    assert torch.equal(generate(model, logits_processor=fl.LogitsProcessorList([processor]), **options), wanted)
    assert "goes on without a CUDA graph" in caplog.text
    torch.cuda.synchronize()
    assert torch.rand(4, device="cuda").isfinite().all()
    assert not torch.cuda.is_current_stream_capturing()
    caplog.clear()
    assert torch.equal(generate(model, logits_processor=fl.LogitsProcessorList([processor]), **options), wanted)
    assert "transformers' own loop" in caplog.text
    for _ in range(2):
        assert torch.equal(generate(model, PROMPT[:1], seeds=SEEDS[:1]), kept)
    assert any(step.graph is not None for step in GRAPHS)


def test_clear_frees_the_memory():
    """Models are gone too once nobody else has them: a graph keeps none."""
    model = tiny_llama().cuda()
    generate(model, seeds=SEEDS)  # what cuBLAS and the kernels keep
    fl.decode.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for rows in (2, 8, 32):
        generate(model, PROMPT[:1].repeat(rows, 1), seeds=torch.arange(rows), max_new_tokens=100)
    assert torch.cuda.memory_allocated() > before + 2**20
    fl.decode.clear()
    torch.cuda.synchronize()
    # A workspace of cuBLAS for the stream of the captures may stay.
    assert torch.cuda.memory_allocated() <= before + 2**26
