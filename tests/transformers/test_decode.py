"""``custom_generate=fl.decode``: the distribution of sampling, and a draw that each request has to itself."""

import copy
import functools
import inspect
import threading

import pytest
import torch
import transformers
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.selection import launch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

import fastlogits as fl
from fastlogits.transformers import caches, loop
from tests.models import VOCAB_SIZE, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")


OURS = caches.has_device_counters() and hasattr(transformers.GenerationMixin, "_prefill")
"""Whether this version of transformers has what the own loop takes."""


@pytest.fixture(autouse=True, params=["ordinary loop", "own loop"])
def in_loop(monkeypatch, request):
    """All tests, through transformers' loop and through the one whose steps a GPU captures."""
    monkeypatch.setattr(loop, "FORCE", request.param == "own loop")
    return request.param


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
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    monkeypatch.setattr("fastlogits.sampling.draw", None)
    if flags in ("all", "truncations", "fold", "nothing"):
        monkeypatch.setattr("fastlogits.plan.plan.Plan.__call__", None)
    assert torch.equal(generate(llama, ids, **options), wanted)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("flags", [{"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}, {}], ids=["fold", "nothing"])
def test_greedy_tokens_of_the_kernels_that_process(monkeypatch, llama, flags):
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, **flags}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids, llama = PROMPT.to(device), copy.deepcopy(llama).to(device)
    wanted = generate(llama, ids, custom_generate=None, **options)
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    monkeypatch.setattr("fastlogits.plan.plan.Plan.__call__", None)
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


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of single letters, with as many tokens as the model."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB_SIZE - 3]
    vocabulary = {letter: i for i, letter in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@functools.wraps(fl.decode)
def of_ones_own(*arguments, **options):
    return fl.decode(*arguments, **options)


def with_a_signature_of_its_own(model, input_ids, **options):
    return fl.decode(model, input_ids, **options)


METHODS = {
    "decode": fl.decode,
    "partial": functools.partial(fl.decode, seeds=3),
    "wraps": of_ones_own,
    "partial of wraps": functools.partial(of_ones_own, seeds=3),
}
FREE = {
    "function": with_a_signature_of_its_own,
    "lambda": lambda model, ids, **options: fl.decode(model, ids, **options),
    "two deep": lambda *arguments, **options: with_a_signature_of_its_own(*arguments, **options),
}


@pytest.mark.parametrize("method", METHODS)
def test_stop_strings(llama, letters, method):
    plain = generate(llama, PROMPT[:1], do_sample=False, custom_generate=None)
    stop = [letters.decode(plain[0, L + 2 : L + 4])]
    options = {"do_sample": False, "stop_strings": stop, "tokenizer": letters}
    expected = generate(llama, PROMPT[:1], custom_generate=None, **options)
    assert expected.shape[1] < plain.shape[1]
    assert torch.equal(generate(llama, PROMPT[:1], custom_generate=METHODS[method], **options), expected)
    with fl.accelerate(llama):
        assert torch.equal(generate(llama, PROMPT[:1], custom_generate=METHODS[method], **options), expected)


@pytest.mark.parametrize("method", METHODS)
def test_token_healing(llama, letters, method):
    ids = letters(["abc"], return_tensors="pt").input_ids
    options = {"do_sample": False, "token_healing": True, "tokenizer": letters}
    expected = generate(llama, ids, custom_generate=None, **options)
    assert torch.equal(generate(llama, ids, custom_generate=METHODS[method], **options), expected)


def test_stop_strings_of_a_pipeline(llama, letters):
    pipeline = transformers.pipeline("text-generation", model=llama, tokenizer=letters, device="cpu")
    asked = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False, "tokenizer": letters}
    said = pipeline("abc", **asked)[0]["generated_text"]
    stop = [said[2:4]]
    expected = pipeline("abc", stop_strings=stop, **asked)
    assert len(expected[0]["generated_text"]) < len(said)
    assert pipeline("abc", stop_strings=stop, custom_generate=fl.decode, **asked) == expected


@pytest.mark.parametrize("method", FREE)
def test_stop_strings_in_a_function_that_takes_no_tokenizer(llama, letters, method):
    """transformers says so before it decodes: by the signature it hands the tokenizer on to nobody."""
    with pytest.raises(ValueError, match="tokenizer"):
        generate(llama, custom_generate=FREE[method], stop_strings=["a"], tokenizer=letters)


def test_the_signature_is_what_it_was():
    names = list(inspect.signature(fl.decode).parameters)
    assert names[:2] == ["model", "input_ids"]
    assert names[-3:] == ["seeds", "tokenizer", "model_kwargs"]
    assert "tokenizer" in inspect.signature(METHODS["partial of wraps"]).parameters


@pytest.mark.parametrize("method", [*METHODS, *FREE])
def test_a_streamer_gets_every_token(llama, letters, method):
    """Also where decode is called in a function that isn't given the streamer: its reader would wait for ever."""
    streamer = TextIteratorStreamer(letters, timeout=60)
    said = []

    def work():
        options = {"custom_generate": {**METHODS, **FREE}[method], "streamer": streamer, "do_sample": False}
        said.append(generate(llama, PROMPT[:1], **options))

    thread = threading.Thread(target=work)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == letters.decode(said[0][0])


def test_the_streamer_of_another_generate_is_left_alone(llama):
    """The nearest generate of the model counts."""

    class Streamer(BaseStreamer):
        def __init__(self):
            self.count = 0

        def put(self, value):
            self.count += 1

        def end(self):
            pass

    def twice(model, input_ids, **options):
        generate(llama, PROMPT[:1], max_new_tokens=5)
        fl.decode(model, input_ids, **copy.deepcopy(options), streamer=given)
        return fl.decode(model, input_ids, **options)

    streamer, given = Streamer(), Streamer()
    options = {"max_new_tokens": 3, "eos_token_id": None}
    generate(llama, PROMPT[:1], custom_generate=twice, streamer=streamer, **options)
    assert (streamer.count, given.count) == (1 + 3, 3)


@pytest.mark.parametrize("method", [*METHODS, *FREE])
@pytest.mark.parametrize("asked", [True, False, None])
def test_synced_gpus(monkeypatch, llama, method, asked, in_loop):
    """Else one process waits for ever for those that have gone on; decode's own loop is for one process."""
    seen = []

    def unfinished(model, this_peer_finished, synced_gpus, device):
        seen.append(synced_gpus)
        return not this_peer_finished

    monkeypatch.setattr(type(llama), "_has_unfinished_sequences", unfinished)
    generate(llama, custom_generate={**METHODS, **FREE}[method], synced_gpus=asked, max_new_tokens=2)
    assert set(seen) == ({bool(asked)} if asked or in_loop == "ordinary loop" or not OURS else set())


def test_functions_that_name_tokens_and_prompts_that_are_avoided(llama):
    """What goes into processors reaches them."""
    options = {"do_sample": False, "prefix_allowed_tokens_fn": lambda row, ids: list(range(3, 40, 1 + row))}
    assert torch.equal(generate(llama, **options), generate(llama, custom_generate=None, **options))
    options = {"do_sample": False, "negative_prompt_ids": PROMPT.flip(1), "guidance_scale": 2.0}
    assert torch.equal(generate(llama, **options), generate(llama, custom_generate=None, **options))


OTHERS = {
    "num_beams": {"num_beams": 3},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False},
    "dola_layers": {"dola_layers": "low"},
    "assistant_early_exit": {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("method", ["decode", "lambda"])
def test_other_methods_are_refused(llama, name, method):
    options = OTHERS[name]
    value = repr(options[name])
    error = f"{name} must be (1|None) with custom_generate=fastlogits.decode.* got {value}: leave {name} out, or leave"
    with pytest.raises(ValueError, match=error):
        generate(llama, PROMPT[:1], custom_generate={**METHODS, **FREE}[method], **options)


@pytest.mark.parametrize("sequences", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_one_seed_for_each_prompt(llama, sequences, count):
    """A number that merely divides the rows is none for each prompt."""
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    options = {"num_return_sequences": sequences, "seeds": torch.arange(count), "max_new_tokens": 2}
    if count == 4:
        assert len(generate(llama, prompts, **options)) == 4 * sequences
        return
    with pytest.raises(ValueError, match=rf"one per prompt, of shape \(4,\), got torch.int64 of shape \({count},\)"):
        generate(llama, prompts, **options)


def test_a_temperature_set_while_it_runs(llama):
    """It counts from the next step on."""
    warper = fl.TemperatureLogitsWarper(0.7)

    class Sets(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores):
            warper.temperature = 0.7 if input_ids.shape[1] < L + 3 else 1e-4
            return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {"top_k": 0, "seeds": 3, "max_new_tokens": 8, "eos_token_id": None}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    out = generate(llama, logits_processor=[warper], stopping_criteria=[Sets()], **options, **kept)
    tokens = out.sequences[:, L:]
    assert torch.equal(tokens[:, 3:], torch.stack(out.logits, 1).argmax(-1)[:, 3:])
    assert not torch.equal(tokens[:, :3], torch.stack(out.logits, 1).argmax(-1)[:, :3])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_beams": 2}, "num_beams must be 1 with custom_generate=fastlogits.decode.* got 2: leave num_beams out"),
        ({"seeds": 1.5}, "seeds must be an integer of 64 bits.*1.5"),
        ({"seeds": True}, "seeds must be an integer of 64 bits.*True"),
        ({"seeds": 2**64}, "seeds must be an integer of 64 bits.* got 18446744073709551616"),
        ({"seeds": [1, 2]}, r"seeds must be an integer of 64 bits.* got \[1, 2\]"),
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
