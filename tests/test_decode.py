"""``custom_generate=fl.decode``: the distribution of sampling, and a draw that each request has to itself."""

import copy

import pytest
import torch
from conftest import VOCAB_SIZE, tiny_llama
from fastlogits_kernels import select
from fastlogits_kernels._triton import HAS_TRITON
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import fastlogits as fl

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = torch.tensor([[1, 17, 45, 8, 77, 23, 61], [1, 5, 90, 33, 12, 64, 28]])
L = PROMPT.shape[1]
FLAGS = {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}


def generate(model, ids=PROMPT, **options):
    options = {"max_new_tokens": 8, "do_sample": True, "custom_generate": fl.decode, **options}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


@pytest.mark.parametrize("accelerated", [False, True])
def test_greedy_is_that_of_transformers(llama, accelerated):
    options = {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    expected = generate(llama, custom_generate=None, **options)
    if accelerated:
        fl.accelerate(llama)
    assert torch.equal(generate(llama, **options), expected)
    fl.restore(llama)


def test_the_distribution_of_sampling(llama):
    """Counts of the first two tokens, against the probabilities that transformers would draw from."""
    count = 4000
    ids = PROMPT[:1]
    out = generate(llama, ids, max_new_tokens=2, num_return_sequences=count, top_k=6, temperature=1.5, seeds=3)
    first, second = out[:, L], out[:, L + 1]

    def check(tokens, prefix):
        said = llama.generate(
            input_ids=prefix, max_new_tokens=1, do_sample=True, top_k=6, temperature=1.5,
            output_scores=True, return_dict_in_generate=True, attention_mask=torch.ones_like(prefix),
        )  # fmt: skip
        probabilities = said.scores[0][0].softmax(-1)
        expected = probabilities * len(tokens)
        found = torch.bincount(tokens, minlength=VOCAB_SIZE)
        assert not found[probabilities == 0].any()
        kept = expected > 0
        chi = ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum()
        assert chi < 25  # 5 degrees of freedom: about one in ten thousand

    check(first, ids)
    likeliest = first.mode().values
    check(second[first == likeliest], torch.cat([ids, likeliest.reshape(1, 1)], 1))


def test_a_request_is_reproducible_alone_and_in_a_batch(llama):
    together = generate(llama, seeds=torch.tensor([11, 12]), max_new_tokens=12, **FLAGS)
    for row, seed in enumerate((11, 12)):
        alone = generate(llama, PROMPT[row : row + 1], seeds=torch.tensor([seed]), max_new_tokens=12, **FLAGS)
        assert torch.equal(alone[0], together[row, : alone.shape[1]])
    others = generate(llama, seeds=torch.tensor([12, 11]), max_new_tokens=12, **FLAGS)
    assert not torch.equal(others, together)


FUSED = {
    "all": FLAGS,
    "truncations": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "fold": {"top_k": 0, "temperature": 0.8, "repetition_penalty": 1.3, "begin_suppress_tokens": [5, 9]},
    "nothing": {"top_k": 0},
    "normalised": {**FLAGS, "renormalize_logits": True},
    "a barrier": {**FLAGS, "logits_processor": [lambda ids, scores: scores.roll(1, -1)]},
}


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("flags", FUSED)
def test_drawn_by_the_kernels_that_process(monkeypatch, llama, flags):
    """The same tokens as of processed scores, which nothing writes."""
    options = {"seeds": torch.tensor([11, 12]), "max_new_tokens": 4, "eos_token_id": None, **FUSED[flags]}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, llama = PROMPT.to(device), copy.deepcopy(llama).to(device)
    kept = {"output_scores": True, "return_dict_in_generate": True}
    wanted = generate(llama, ids, **options, **kept).sequences
    monkeypatch.setattr(select, "FORCE_KERNEL", True)
    monkeypatch.setattr("fastlogits.sampling.draw", None)
    if flags in ("all", "truncations", "fold", "nothing"):
        monkeypatch.setattr("fastlogits.plan.Plan.__call__", None)
    assert torch.equal(generate(llama, ids, **options), wanted)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("flags", [{"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, {}], ids=["fold", "nothing"])
def test_greedy_tokens_of_the_kernels_that_process(monkeypatch, llama, flags):
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, **flags}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, llama = PROMPT.to(device), copy.deepcopy(llama).to(device)
    wanted = generate(llama, ids, custom_generate=None, **options)
    monkeypatch.setattr(select, "FORCE_KERNEL", True)
    monkeypatch.setattr("fastlogits.plan.Plan.__call__", None)
    assert torch.equal(generate(llama, ids, **options), wanted)
    kept = {"output_scores": True, "return_dict_in_generate": True}
    monkeypatch.undo()
    assert torch.equal(generate(llama, ids, **options, **kept).sequences, wanted)


def test_the_same_prompt_and_seed_in_several_rows(llama):
    """Rows of an integer seed differ, sequences of a request differ; rows of the same given seed are the same."""
    twice = PROMPT[:1].repeat(2, 1)
    for options in ({"seeds": 5}, {}, {"seeds": torch.tensor([5]), "num_return_sequences": 2}):
        out = generate(llama, twice[: 1 if "num_return_sequences" in options else 2], **options)
        assert not torch.equal(out[0], out[1])
    same = generate(llama, twice, seeds=torch.tensor([5, 5]))
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("seeds", [5, torch.tensor([5])])
def test_sequences_of_a_request_share_no_noise(llama, seeds):
    """No row draws at a step what another one draws at another step: rows of equal scores aren't shifted copies."""

    class Flat(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.zeros_like(scores)

    options = {"logits_processor": [Flat()], "top_k": 0, "max_new_tokens": 30, "eos_token_id": None, "seeds": seeds}
    rows = {} if isinstance(seeds, torch.Tensor) else {"input_ids": PROMPT[:1].repeat(3, 1)}
    said = generate(llama, rows.get("input_ids", PROMPT[:1]), num_return_sequences=1 if rows else 3, **options)[:, L:]
    for shift in range(1, 4):
        assert (said[1:, :-shift] == said[:-1, shift:]).sum() < 10


def test_each_step_draws_anew(llama):
    """Where all tokens are as likely at every step, they differ from step to step, and from seed to seed."""

    class Flat(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return torch.zeros_like(scores)

    said = generate(llama, logits_processor=[Flat()], top_k=0, max_new_tokens=40, eos_token_id=None, seeds=1)[:, L:]
    assert all(len(set(row)) > 20 for row in said.tolist())
    assert (said[0] == said[1]).sum() < 5


def test_sequences_belong_to_their_prompt(llama):
    options = {"num_return_sequences": 2, "max_new_tokens": 12, **FLAGS}
    together = generate(llama, seeds=torch.tensor([11, 12]), **options)
    for row, seed in enumerate((11, 12)):
        alone = generate(llama, PROMPT[row : row + 1], seeds=torch.tensor([seed]), **options)
        assert torch.equal(alone, together[2 * row : 2 * row + 2, : alone.shape[1]])


def test_without_seeds_the_generator_of_torch_decides(llama):
    said = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        said.append(generate(llama))
    assert torch.equal(said[0], said[1])
    assert not torch.equal(said[0], said[2])


def test_scores_logits_and_streamers(llama):
    class Streamer(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    streamer = Streamer()
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "streamer": streamer}
    out = generate(llama, PROMPT[:1], seeds=7, **options, **FLAGS)
    assert streamer.tokens == [*out.sequences[0].tolist(), "end"]
    run = fl.LogitsProcessorList(
        [
            fl.RepetitionPenaltyLogitsProcessor(1.3),
            fl.NoRepeatNGramLogitsProcessor(2),
            fl.TemperatureLogitsWarper(0.8),
            fl.TopKLogitsWarper(20),
            fl.TopPLogitsWarper(0.95),
        ]
    )
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert type(scores) is torch.Tensor
        assert torch.equal(scores, run(out.sequences[:, : L + step], logits))
        assert scores[0, out.sequences[0, L + step]].isfinite()


def test_first_steps_and_the_end_of_the_text(llama):
    banned = list(range(3, VOCAB_SIZE, 2))
    out = generate(llama, logits_processor=[fl.SuppressFirstTokens(banned)], seeds=1, eos_token_id=[*range(40, 60), 2])
    assert not set(out[:, L].tolist()) & set(banned)
    for row in out[:, L:].tolist():
        ends = [i for i, token in enumerate(row) if token in (*range(40, 60), 2)]
        assert all(token == 0 for token in row[ends[0] + 1 :]) if ends else len(row) == 8


def test_encoder_decoder(t5):
    said = [generate(t5, seeds=torch.tensor([3, 4]), **FLAGS) for _ in range(2)]
    assert torch.equal(*said)


def test_no_softmax_and_no_multinomial(monkeypatch):
    model = tiny_llama()

    def refuse(*arguments, **options):
        raise AssertionError("multinomial was called")

    monkeypatch.setattr(torch, "multinomial", refuse)
    generate(model, **FLAGS)
    with pytest.raises(AssertionError, match="multinomial was called"):
        generate(model, custom_generate=None, **FLAGS)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_beams": 2}, "num_beams must be 1 with custom_generate=fastlogits.decode.* got 2: leave num_beams out"),
        ({"seeds": 1.5}, "seeds must be an integer of 64 bits.*1.5"),
        ({"seeds": True}, "seeds must be an integer of 64 bits.*True"),
        ({"seeds": 2**63}, "seeds must be an integer of 64 bits"),
        (
            {"seeds": torch.zeros(2)},
            r"seeds must be an integer tensor .*of shape \(2,\), got torch.float32 of shape \(2,\)",
        ),
        ({"seeds": torch.zeros(3).long()}, r"of shape \(2,\), got torch.int64 of shape \(3,\)"),
        ({"seeds": torch.zeros(2, 1).long()}, r"of shape \(2,\), got torch.int64 of shape \(2, 1\)"),
    ],
    ids=str,
)
def test_arguments_are_checked(llama, options, error):
    with pytest.raises(ValueError, match=error):
        generate(llama, **options)
