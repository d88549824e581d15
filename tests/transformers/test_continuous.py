"""Continuous batching under ``accelerate``: each request says what ``generate`` says of it alone."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from fastlogits_kernels.selection import launch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import fastlogits as fl
from tests.models import tiny_llama

pytest.importorskip("accelerate")
pytest.importorskip("psutil")
requests = pytest.importorskip("transformers.generation.continuous_batching.cb_logits_processors")
continuous = pytest.importorskip("fastlogits.transformers.continuous")
drawing = pytest.importorskip("fastlogits.transformers.continuous_draw")
from transformers.generation import ContinuousBatchingConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
interpreted = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter; a GPU captures graphs instead"
)

# More than fit into a batch, of different lengths, one of a single token.
PROMPTS = [[1, 5, 6], [1, 7, 8, 9, 10], [4], [1, 30, 31, 32, 33, 34, 35, 36], [1, 9, 9, 9], [1, 60]]
FLAGS = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "two-grams": {"no_repeat_ngram_size": 2, "repetition_penalty": 0.7},
    "bad_words_ids": {"bad_words_ids": [[t] for t in range(3, 40)] + [[t, t + 1] for t in range(40, 95)]},
    "min_length": {"min_length": 9, "bad_words_ids": [[t] for t in range(3, 90)]},
    "min_new_tokens": {"min_new_tokens": 6, "bad_words_ids": [[t] for t in range(3, 90)]},
    "forced": {"forced_bos_token_id": 70, "forced_eos_token_id": 2},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(3, 80))},
    "suppress_tokens": {"suppress_tokens": list(range(3, 60))},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.6)},
    "sequence_bias": {"sequence_bias": {(30,): 5.0, (31, 32): 9.0, (33,): -4.0}},
    "all": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[7], [8, 9]],
        "min_length": 5,
        "min_new_tokens": 4,
        "forced_eos_token_id": 2,
        "exponential_decay_length_penalty": (5, 1.2),
        "begin_suppress_tokens": list(range(40, 60)),
        "suppress_tokens": [50, 51],
        "sequence_bias": {(30,): 2.0},
        "remove_invalid_values": True,
        "renormalize_logits": True,
    },
}


@pytest.fixture
def llama():
    """One of this test alone: transformers changes a model's attention, and an error leaves it changed."""
    return tiny_llama()


def config(**flags):
    return GenerationConfig(**{"max_new_tokens": 9, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0, **flags})


def batching(**options):
    sizes = {"page_size": 16, "num_blocks": 32, "max_batch_tokens": 64, "max_requests_per_batch": 4, "seed": 0}
    options = {**sizes, **options}
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    if "page_size" not in known:  # its name until transformers 5.17
        options["block_size"] = options.pop("page_size")
    return ContinuousBatchingConfig(**{name: value for name, value in options.items() if name in known})


def alone(model, flags, prompts=PROMPTS):
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config(**flags))
        said.append(found[0, len(prompt) :].tolist())
    return said


def together(model, flags, prompts=PROMPTS, **options):
    found = model.generate_batch(
        prompts, generation_config=config(**flags), continuous_batching_config=batching(**options)
    )
    assert [output.error for output in found.values()] == [None] * len(found)
    return [output.generated_tokens for output in found.values()]


@pytest.mark.parametrize("name", FLAGS)
def test_each_request_is_processed_as_itself(llama, name):
    expected = alone(llama, FLAGS[name])
    assert expected != alone(llama, {}), "the flag must show"
    with fl.accelerate(llama):
        assert together(llama, FLAGS[name]) == expected


@pytest.mark.parametrize("implementation", ["paged|eager", "eager", "sdpa"])
def test_attention_implementations(implementation):
    model = tiny_llama()
    model.set_attn_implementation(implementation.removeprefix("paged|"))
    expected = alone(model, FLAGS["all"])
    if implementation == "paged|eager":
        model.set_attn_implementation(implementation)
    with fl.accelerate(model):
        assert together(model, FLAGS["all"], auto_switch_to_flash=False) == expected


def test_prompts_in_several_pieces_and_shared_prefixes(llama):
    prompts = [list(range(3, 43)), [*range(3, 43), 50], list(range(50, 80))]
    expected = alone(llama, FLAGS["all"], prompts)
    with fl.accelerate(llama):
        assert together(llama, FLAGS["all"], prompts, max_batch_tokens=16) == expected


def test_requests_that_are_taken_up_again(llama, monkeypatch):
    """Where the cache is too small for all, a request goes out and begins again with what it has said as its prompt."""
    resets = []
    from transformers.generation.continuous_batching.requests import RequestState

    original = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda state: resets.append(1) or original(state)
    )
    prompts = [[1, 5 + i, *range(20, 32)] for i in range(4)]
    flags = {**FLAGS["all"], "max_new_tokens": 24, "min_new_tokens": 12}
    expected = alone(llama, flags, prompts)
    with fl.accelerate(llama):
        assert together(llama, flags, prompts, num_blocks=6, page_size=8) == expected
    assert resets


def test_the_whole_process(llama):
    expected = alone(llama, FLAGS["all"])
    with fl.accelerate():
        assert together(llama, FLAGS["all"]) == expected


WARPERS = {
    "temperature": {"temperature": 0.6, "top_k": 0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "three": {"temperature": 1.4, "top_k": 20, "top_p": 0.9},
}


@pytest.mark.parametrize("name", WARPERS)
def test_sampling_is_that_of_transformers(llama, name):
    """The same draws under the same seed, where transformers' own processors work."""
    flags = {"do_sample": True, **WARPERS[name]}
    torch.manual_seed(0)
    expected = together(llama, flags, per_request_processors=True)
    with fl.accelerate(llama):
        torch.manual_seed(0)
        found = together(llama, flags)
    assert found == expected


@interpreted
def test_sampling_in_kernels(llama, monkeypatch):
    """Values of each request, temperature first: the same draws from scores that kernels have truncated in one pass."""
    flags = {"do_sample": True, "max_new_tokens": 4, **WARPERS["three"]}
    torch.manual_seed(0)
    with fl.accelerate(llama):
        expected = together(llama, flags)
        monkeypatch.setattr(launch, "FORCE_KERNEL", True)
        monkeypatch.setattr(continuous, "truncate", None)
        torch.manual_seed(0)
        assert together(llama, flags) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("name", ["repetition_penalty", "two-grams", "forced", "begin_suppress_tokens", "all"])
def test_captured_graphs(name, overlaps):
    """Each batch size captured once, with the processors in the graph, batches overlapping or not: the same tokens."""
    model = tiny_llama().cuda()
    prompts = [*PROMPTS, *([1, 11 + i, 12 + i, 13] for i in range(6))]
    flags = {**FLAGS[name], "max_new_tokens": 16}
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        found = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config(**flags))
        said.append(found[0, len(prompt) :].tolist())
    options = {"use_cuda_graph": True, "use_async_batching": overlaps, "auto_switch_to_flash": False}
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    captured = []
    original = ModelRunner._capture_graph
    with pytest.MonkeyPatch.context() as patch, fl.accelerate(model):
        patch.setattr(ModelRunner, "_capture_graph", lambda *given: captured.append(1) or original(*given))
        assert together(model, flags, prompts, **options) == said
    assert captured


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("overlaps", [False, True])
def test_values_of_each_request_in_captured_graphs(overlaps):
    """Top-k 1 beside hot requests, in one replayed graph, says what greedy says."""
    model = tiny_llama().cuda()
    flags = {"do_sample": True, "temperature": 5.0, "top_k": 90, "top_p": 0.99, "repetition_penalty": 1.3}
    own = [{"top_k": 1}, {}, {"temperature": 1e-4}, {}, {"top_p": 1e-6}, {"top_k": 1, "temperature": 9.0}]
    options = {"use_cuda_graph": True, "use_async_batching": overlaps, "auto_switch_to_flash": False}
    found = managed(model, flags, own, **options)
    for i, values in enumerate(own):
        ids = torch.tensor([PROMPTS[i]], device="cuda")
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config(repetition_penalty=1.3)
        )
        assert (found[f"r{i}"].generated_tokens == greedy[0, ids.shape[1] :].tolist()) is bool(values), i


def test_values_of_each_request(llama):
    """A request's own temperature and top-k, beside others in the same batch: top-k 1 says what greedy says."""
    greedy = alone(llama, {"repetition_penalty": 1.3})
    flags = {"do_sample": True, "temperature": 5.0, "top_k": 90, "top_p": 0.99, "repetition_penalty": 1.3}
    own = [{"top_k": 1}, {}, {"temperature": 1e-4}, {}, {"top_p": 1e-6}, {"top_k": 1, "temperature": 9.0}]
    found = managed(llama, flags, own)
    for i, values in enumerate(own):
        assert (found[f"r{i}"].generated_tokens == greedy[i]) is bool(values), i


def test_a_top_k_beyond_the_vocabulary_is_off(llama):
    flags = {"do_sample": True, "top_k": 1, "temperature": 50.0}
    found = managed(llama, flags, [{"top_k": 10_000}, {}])
    assert [found[name].error for name in ("r0", "r1")] == [None, None]
    assert found["r1"].generated_tokens == alone(llama, {}, PROMPTS[1:2])[0]
    assert found["r0"].generated_tokens != alone(llama, {}, PROMPTS[:1])[0]


def managed(model, flags, own, **options):
    with (
        fl.accelerate(model),
        model.continuous_batching_context_manager(
            generation_config=config(**flags), continuous_batching_config=batching(**options)
        ) as manager,
    ):
        for i, values in enumerate(own):
            manager.add_request(PROMPTS[i], request_id=f"r{i}", **values)
        found = {}
        while len(found) < len(own):
            output = manager.get_result(timeout=600)
            assert output is not None
            if output.is_finished():
                found[output.request_id] = output
    return found


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"temperature": 0.0}, "temperature of a request must be a number above 0, got 0.0"),
        ({"temperature": float("nan")}, "temperature of a request must be a number above 0, got nan"),
        ({"temperature": "hot"}, "temperature of a request must be a number above 0, got 'hot'"),
        ({"top_k": 0}, "top_k of a request must be an integer of at least 1, got 0"),
        ({"top_k": 2.0}, "top_k of a request must be an integer of at least 1, got 2.0"),
        ({"top_k": True}, "top_k of a request must be an integer of at least 1, got True"),
        ({"top_p": 1.5}, "top_p of a request must be a number above 0, at most 1, got 1.5"),
        (
            {"top_q": 3},
            "top_q of a request must be left out, got 3: a request may have its own temperature, top_k, top_p",
        ),
        ({"repetition_penalty": 1.2}, "in this run: temperature, top_k, top_p"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_of_a_request_are_checked(llama, values, error):
    """The request fails with a message; the one beside it goes on."""
    found = managed(llama, {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}, [values, {}])
    assert error in found["r0"].error
    assert found["r1"].error is None
    assert len(found["r1"].generated_tokens)


SEEDED = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.95, "seed": 7}


@pytest.mark.parametrize("flags", [{}, {"no_repeat_ngram_size": 1, "min_p": 0.01}, {"temperature": 1.0, "top_k": 0}])
def test_a_seed_for_each_request(llama, flags):
    """The tokens are those of ``decode`` with that seed, whoever shares the batch."""
    flags, seeds = SEEDED | flags, [3, 2**63 + 5, -4, 0, 11, 11]
    expected = []
    for prompt, seed in zip(PROMPTS, seeds, strict=True):
        with fl.accelerate(llama):
            asked = config(**{name: value for name, value in flags.items() if name != "seed"})
            made = torch.tensor([seed if seed < 2**63 else seed - 2**64])
            ids = torch.tensor([prompt])
            found = llama.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=asked, custom_generate=fl.decode, seeds=made
            )
        expected.append(found[0, len(prompt) :].tolist())
    for rows in (4, 1):
        torch.manual_seed(rows)
        own = [{"seed": seed} for seed in seeds]
        found = managed(llama, flags, own, max_requests_per_batch=rows)
        assert [found[f"r{i}"].generated_tokens for i in range(len(seeds))] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(expected)


def test_seeds_that_requests_are_given(llama):
    """By the config's seed and their ids; a token depends on nothing else."""
    runs = []
    for seed in (7, 7, 8):
        found = managed(llama, SEEDED | {"seed": seed}, [{}] * 4, max_requests_per_batch=len(runs) + 2)
        runs.append([found[f"r{i}"].generated_tokens for i in range(4)])
    assert runs[0] == runs[1] != runs[2]
    states = [State([1]) for _ in range(2)]
    states[0].request_id, states[1].request_id = "a", "b"
    for state in states:
        state.logit_processor_kwargs = {}
    seeds = [drawing.seed_of(state, seed) for state in states for seed in (7, 8)]
    assert len(set(seeds)) == 4
    states[0].logit_processor_kwargs = {"seed": 2**64 - 3}
    states[1].logit_processor_kwargs = {"seed": 2**31 + 1}
    assert drawing.seeds_in(torch.stack(drawing.table_lines(states, 7))).tolist() == [-3, 2**31 + 1]


def test_log_probabilities_of_seeded_requests(llama):
    flags, own = SEEDED | {"no_repeat_ngram_size": 1}, [{"seed": i} for i in range(3)]
    found = managed(llama, flags, own, return_logprobs=True)
    plain = managed(llama, flags, own)
    for name, output in found.items():
        assert output.generated_tokens == plain[name].generated_tokens
        assert len(output.logprobs) == len(output.generated_tokens)
        assert all(-9 < value <= 0 for value in output.logprobs)


@interpreted
def test_seeded_in_kernels(llama, monkeypatch):
    flags, own = SEEDED | {"max_new_tokens": 3}, [{"seed": i} for i in range(3)]
    expected = managed(llama, flags, own)
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    found = managed(llama, flags, own)
    for name, output in expected.items():
        assert found[name].generated_tokens == output.generated_tokens


def test_a_seed_must_be_one(llama, monkeypatch):
    with fl.accelerate(llama), pytest.raises(ValueError, match="seed of a generation config must be an integer"):
        llama.init_continuous_batching(generation_config=config(**SEEDED | {"seed": 1.5}))
    found = managed(llama, SEEDED, [{"seed": "one"}, {}])
    assert "seed of a request must be an integer" in found["r0"].error
    assert found["r1"].error is None
    found = managed(llama, {"do_sample": True, "top_k": 5}, [{"seed": 1}])
    assert "seed of a request must be left out, got 1" in found["r0"].error


def test_several_sequences_of_a_request(llama):
    flags = {"do_sample": True, "num_return_sequences": 3, "no_repeat_ngram_size": 1, "max_new_tokens": 12}
    # An older transformers gives the first of each alone.
    count = len(together(llama, {**flags, "no_repeat_ngram_size": 0, "max_new_tokens": 1}, PROMPTS[:2])) // 2
    with fl.accelerate(llama):
        found = together(llama, flags, PROMPTS[:2])
    assert len(found) == 2 * count
    for i, said in enumerate(found):
        whole = PROMPTS[i // count] + said
        assert len(set(whole)) == len(whole), "a token has come back"
    assert len({tuple(said) for said in found}) > count - 1


def test_three_truncations_are_one_launch(llama, monkeypatch):
    shapes = []
    truncate = continuous.truncate
    monkeypatch.setattr(
        continuous,
        "truncate",
        lambda scores, rules: shapes.append((scores.shape[0], len(rules))) or truncate(scores, rules),
    )
    with fl.accelerate(llama):
        together(llama, {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01})
    assert {rules for _, rules in shapes} == {3}
    assert max(rows for rows, _ in shapes) == 4


class Counting(LogitsProcessor):
    """One of a model's own, which continuous batching knows nothing about."""

    def __init__(self, supported=None):
        self.supports_continuous_batching = supported
        self.shapes = []

    def __call__(self, input_ids, scores):
        self.shapes.append(tuple(input_ids.shape))
        return scores


@pytest.mark.parametrize("supported", [None, True, False])
@pytest.mark.parametrize("drop", [False, True])
def test_processors_that_fastlogits_does_not_know(monkeypatch, supported, drop):
    """They stay or go as in transformers, in their place, and see the newest tokens."""
    counting, said = Counting(supported), []
    monkeypatch.setattr(continuous.logger, "warning", said.append)

    class Own(type(tiny_llama())):
        def _get_logits_processor(self, *arguments, **options):
            processors = super()._get_logits_processor(*arguments, **options)
            processors.insert(1, counting)
            return processors

    model = Own(tiny_llama().config).eval()
    model.load_state_dict(tiny_llama().state_dict())
    expected = alone(tiny_llama(), FLAGS["all"])
    with fl.accelerate(model):
        assert together(model, FLAGS["all"], drop_unsupported_processors=drop) == expected
    dropped = supported is False and drop
    assert bool(counting.shapes) is not dropped
    assert all(len(shape) == 1 for shape in counting.shapes)
    assert len([text for text in said if "Counting" in text]) == (supported is not True)


class State:
    """What a request's state is to its processors."""

    _true_initial_tokens, max_new_tokens, logit_processor_kwargs = 0, 5, {}

    def __init__(self, initial, generated=()):
        self.initial_tokens, self.generated_tokens = list(initial), list(generated)
        self.position_offset = len(self.initial_tokens) + len(self.generated_tokens)
        self.has_new_token, self.state = True, self


def test_a_table_row_without_a_request_is_harmless():
    """Padded batches hold rows that belong to no request; histories grow, and rows change their request."""

    made = [RepetitionPenaltyLogitsProcessor(2.0)]
    histories = functools.partial(continuous._Histories, torch.device("cpu"), 4, 8)
    processors = continuous.RequestProcessors(made, drop_unsupported=True, histories=histories)
    storage = torch.empty(processors.tensors_required, 9, dtype=torch.int32)
    processors.fill_defaults(storage[:, :1])
    long, short = State(range(200, 400), range(5, 9)), State([1, 2, 3])
    for states in ([long, short], [long], [long, short], [short], [short, long], [State([4])], [long]):
        processors.prepare_tensor_args(states, storage)
        newest = torch.zeros(4, dtype=torch.int32)
        newest[: len(states)] = torch.tensor([[*s.initial_tokens, *s.generated_tokens][-1] for s in states])
        found = processors(newest, torch.ones(4, 500), storage)
        for row, state in enumerate(states):
            halved = (found[row] == 0.5).nonzero().flatten().tolist()
            assert halved == sorted({*state.initial_tokens, *state.generated_tokens})
        short.generated_tokens.append(7)
        short.position_offset += 1
    # The newest token may be known on the device only, one step ahead of what the host has seen.
    ahead = State([1, 2, 3])
    ahead.position_offset += 1
    processors.prepare_tensor_args([ahead], storage)
    found = processors(torch.tensor([9], dtype=torch.int32), torch.ones(1, 500), storage)
    assert (found[0] == 0.5).nonzero().flatten().tolist() == [1, 2, 3, 9]


def test_other_managers_are_untouched(llama):
    other = tiny_llama(seed=1)
    with fl.accelerate(llama):
        manager = other.init_continuous_batching(config(suppress_tokens=[5]), batching())
        assert type(manager.logit_processor) is requests.ContinuousBatchingLogitsProcessorList
        manager = llama.init_continuous_batching(config(), batching())
        assert not manager.logit_processor.do_processing
        manager = llama.init_continuous_batching(config(suppress_tokens=[5]), batching())
        assert "SuppressTokens" in repr(manager.logit_processor)
        manager.logit_processor.clear()
        assert not manager.logit_processor.do_processing


def test_one_graph_for_a_compiler():
    made = [RepetitionPenaltyLogitsProcessor(2.0), TemperatureLogitsWarper(0.7), TopKLogitsWarper(20)]
    histories = functools.partial(continuous._Histories, torch.device("cpu"), 4, 8)
    processors = continuous.RequestProcessors(made, drop_unsupported=True, histories=histories)
    storage = torch.empty(processors.tensors_required, 9, dtype=torch.int32)
    processors.prepare_tensor_args([State([1, 2, 3]), State([4, 5, 6, 7])], storage)
    newest, scores = torch.tensor([3, 7], dtype=torch.int32), torch.randn(2, 97)
    expected = processors(newest, scores, storage)
    compiled = torch.compile(processors.__call__, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(newest, scores, storage), expected)


class InPlace(LogitsProcessor):
    """As most published ones: it writes what it is given."""

    supports_continuous_batching = True

    def __call__(self, input_ids, scores):
        scores[:, 5:] = -float("inf")
        return scores


def of_two_rows(made):
    histories = functools.partial(continuous._Histories, torch.device("cpu"), 4, 8)
    processors = continuous.RequestProcessors(made, drop_unsupported=True, histories=histories)
    storage = torch.empty(processors.tensors_required, 9, dtype=torch.int32)
    processors.prepare_tensor_args([State([1, 2, 3]), State([4, 5, 6, 7])], storage)
    return processors, storage


@pytest.mark.parametrize(
    "made",
    [
        [InPlace()],
        [InPlace(), TopKLogitsWarper(3)],
        [fl.SuppressTokensLogitsProcessor([]), InPlace()],
        [NoBadWordsLogitsProcessor([[3, 4, 9]], 2), InPlace(), InPlace()],
        [RepetitionPenaltyLogitsProcessor(2.0), InPlace()],
    ],
    ids=lambda made: " ".join(type(each).__name__ for each in made),
)
def test_the_scores_of_a_manager_are_not_written(made):
    """Neither by a processor in place, nor by one behind what changes nothing."""
    processors, storage = of_two_rows(made)
    newest, scores = torch.tensor([3, 7], dtype=torch.int32), torch.randn(2, 97)
    kept = scores.clone()
    found = processors(newest, scores, storage)
    assert found[:, 5:].isinf().all()
    assert torch.equal(scores, kept)


@pytest.mark.parametrize(
    "made",
    [
        lambda: fl.TopPLogitsWarper(torch.tensor([0.5, 0.9])),
        lambda: fl.EncoderNoRepeatNGramLogitsProcessor(2, torch.tensor([[1, 2], [3, 4]])),
        lambda: fl.EncoderRepetitionPenaltyLogitsProcessor(1.2, torch.tensor([[1, 2], [3, 4]])),
        lambda: fl.OnlyTokensFrom([[3, 4], [5, 6]], eos_token_id=2),
    ],
)
def test_values_of_rows_are_refused(made):
    """The rows of a batch are other requests at each step."""
    processor = made()
    error = f"{type(processor).__name__} must have one value for all requests .*got one for each row: .*its own"
    with pytest.raises(ValueError, match=error):
        of_two_rows([processor])


def test_values_of_a_request():
    processors, _ = of_two_rows([TemperatureLogitsWarper(0.7), TopKLogitsWarper(20)])
    processors.check_kwargs({"temperature": np.float32(0.5), "top_k": np.int64(3)})
    for kwargs, kind, error in (
        ({"temperature": -1.0}, ValueError, "temperature of a request must be a number above 0, got -1.0"),
        (
            {"temperature": float("inf")},
            ValueError,
            "temperature of a request must be a number above 0, got inf",
        ),
        ({"temperature": "1"}, TypeError, "temperature of a request must be a number above 0, got '1'"),
        ({"temperature": True}, TypeError, "temperature of a request must be a number above 0, got True"),
        ({"top_k": 0}, ValueError, "top_k of a request must be an integer of at least 1, got 0"),
        ({"top_k": 1.5}, TypeError, "top_k of a request must be an integer of at least 1, got 1.5"),
        ({"top_p": 0.5}, ValueError, "top_p of a request must be left out, got 0.5: .*in this run: temperature, top_k"),
    ):
        with pytest.raises(kind, match=error):
            processors.check_kwargs(kwargs)


def test_histories_of_buffers_that_are_gone():
    """A manager that is started again has other buffers each time."""
    processors, _ = of_two_rows([RepetitionPenaltyLogitsProcessor(2.0)])
    buffers = [torch.empty(processors.tensors_required, 9, dtype=torch.int32) for _ in range(20)]
    for pair in zip(buffers[::2], buffers[1::2], strict=True):
        held = []
        for step in range(6):
            storage = pair[step % 2]
            processors.prepare_tensor_args([State([1, 2, 3])], storage)
            held.append(processors._current)
            found = processors(torch.tensor([3], dtype=torch.int32), torch.ones(1, 97), storage)
            assert (found[0] == 0.5).nonzero().flatten().tolist() == [1, 2, 3]
        assert held[0] is held[2] is held[4]
        assert held[1] is held[3] is held[5]
    assert len(processors._histories) < 6


@pytest.mark.parametrize(
    ("rows", "width", "named"),
    [
        (5, 3, "max_requests_per_batch must be at least 5 .* got 4"),
        (2, 9, "max_position_embeddings .* at least 9 .* got 8"),
    ],
)
def test_a_batch_that_is_too_large(rows, width, named):
    histories = continuous._Histories(torch.device("cpu"), 4, 8)
    histories._grows, histories._ids = False, torch.zeros(4, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match=named):
        histories._fit(rows, width)
