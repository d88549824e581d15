"""What requests of other engines ask for, without the engines; tests/engines has them."""

import importlib.util
import logging
import random
import subprocess
import sys
from enum import Enum
from types import SimpleNamespace

import pytest
import torch

import fastlogits as fl
from fastlogits.integrations import requests as steering
from fastlogits.integrations.requests import EDITS, TRUNCATIONS, LiveBatch, LiveRequest, read_options
from fastlogits.integrations.vllm import FastLogitsProcessor

V = 61


def options(**given):
    return read_options(given, EDITS + TRUNCATIONS, "here", 0.7)


def banned_by_definition(prompt, outputs):
    return sorted({*prompt, *outputs})


def banned(row):
    return row.isinf().nonzero().flatten().tolist()


def test_parameters_of_vllm():
    def validated(given, temperature=0.7, **more):
        FastLogitsProcessor.validate_params(
            SimpleNamespace(extra_args={"fastlogits": given}, temperature=temperature, **more)
        )

    FastLogitsProcessor.validate_params(SimpleNamespace(extra_args=None))
    FastLogitsProcessor.validate_params(SimpleNamespace(extra_args={"else": 1}))
    validated({"no_repeat_ngram_size": 3})
    validated('{"no_repeat_ngram_size": 3, "bad_words": [[1, 2]]}', temperature=0)
    for given, message in (
        ({"temperature": 2}, "extra_args.'fastlogits'. has 'temperature', which the engine itself applies: give it as"),
        ({"bitmask": True}, "has 'bitmask', which the engine itself applies"),
        ({"ngram": 2}, "has 'ngram', which is unknown; there are banned_token_ids, bad_words, no_repeat_ngram_size,"),
        ({"typical_p": 2.0}, "typical_p must be above 0 and at most 1"),
        ({"forced_tokens": [0.5]}, "forced_tokens must be"),
        ("[1]", r"must be a mapping from names to values, or one in JSON, got \[1\]"),
        ("{", "or one in JSON, got '{'"),
        (7, "got 7"),
        ({"forced_tokens": range(5000)}, "forced_tokens and bad_words take 5000 words .* but may take 3840"),
    ):
        with pytest.raises(ValueError, match=message):
            validated(given)
    with pytest.raises(ValueError, match="forced_tokens must be left out beside structured outputs"):
        validated({"forced_tokens": [1]}, structured_outputs=object())
    validated({"banned_token_ids": [1]}, structured_outputs=object())


class InputProcessor:
    """What checks requests in vLLM: it holds the configuration, and calls through a function of another module."""

    def __init__(self, speculative_config=None, use_v2_model_runner=False):
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(get_vocab_size=lambda: V),
            speculative_config=speculative_config,
            use_v2_model_runner=use_v2_model_runner,
        )

    def validate(self, **given):
        def validate_logits_processors_parameters():
            FastLogitsProcessor.validate_params(SimpleNamespace(extra_args={"fastlogits": given}, temperature=1.0))

        validate_logits_processors_parameters()


OUTSIDE = {
    "banned_token_ids": [1, V], "bad_words": [[1], [2, V]], "first_tokens_suppressed": [V], "forced_tokens": [2, V],
    "dry_breakers": [V],
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_vllm_refuses_ids_outside_the_vocabulary_where_requests_come_in(name):
    message = f"{name} must have token ids of the vocabulary, 0 to {V - 1}, got {V}"
    with pytest.raises(ValueError, match=message):
        InputProcessor().validate(no_repeat_ngram_size=2, **{name: OUTSIDE[name]})
    InputProcessor().validate(banned_token_ids=[V - 1])
    # Whoever else asks doesn't know the vocabulary.
    FastLogitsProcessor.validate_params(asking(**{name: OUTSIDE[name]}))


def test_vllm_refuses_requests_that_its_older_runner_would_not_show_us():
    drafting = object()
    with pytest.raises(ValueError, match="must be left out with speculative decoding"):
        InputProcessor(drafting).validate(no_repeat_ngram_size=2)
    InputProcessor(drafting, use_v2_model_runner=True).validate(no_repeat_ngram_size=2)


UNUSABLE = {
    **{name: ({name: value}, f"{name} must have token ids of the vocabulary") for name, value in OUTSIDE.items()},
    "a mask of another vocabulary": (
        {"dry_breakers": fl.TokenMask.from_ids([V + 40], V + 64)},
        "dry_breakers must have",
    ),
    "out of range": ({"epsilon": 3.0}, "epsilon must be"),
    "of a wrong type": ({"first_window": "two"}, "first_window must be"),
    "unknown": ({"ngrams": 3}, "'ngrams', which is unknown"),
    "the engine's own": ({"top_k": 3}, "'top_k', which the engine itself applies"),
    "too long": ({"forced_tokens": [1] * 5000}, "forced_tokens and bad_words take 5000 words"),
    "beside a grammar": ({"forced_tokens": [1]}, "forced_tokens must be left out beside structured outputs"),
}


def older(given, device):
    """The bans of a request in vLLM's older runner, at two steps."""
    processor = FastLogitsProcessor(config(), torch.device(device), False)
    processor.update_state(update(added=[(0, given, [1, 2], []), (1, asking(banned_token_ids=[9]), [1], [])]))
    return [
        [banned(row) for row in processor.apply(torch.zeros(2, V, device=device))] for _ in range(2)
    ]  # fmt: skip


def newer(given, device):
    """The same in its newer one."""

    def places(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    states = SimpleNamespace(
        max_num_reqs=2, vocab_size=V, all_token_ids=SimpleNamespace(gpu=places(1, 2, 0, 1, 0, 0).view(2, 3)),
        total_len=SimpleNamespace(gpu=places(2, 1)), prompt_len=SimpleNamespace(np=[2, 1]),
    )  # fmt: skip
    processor = FastLogitsProcessor(config(), states)
    assert processor.add_request(0, given)
    assert processor.add_request(1, asking(banned_token_ids=[9]))
    processor.apply_staged_writes()
    context = SimpleNamespace(
        expanded_idx_mapping=places(0, 1), idx_mapping_np=torch.tensor([0, 1]).numpy(),
        expanded_local_pos=places(0, 0), input_ids=places(2, 1), pos=places(1, 0),
    )  # fmt: skip
    return [[banned(row) for row in processor.apply(torch.zeros(2, V, device=device), context)] for _ in range(2)]


@pytest.mark.parametrize("runner", [older, newer])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_one_option_that_cannot_be_honoured_leaves_the_others(kind, runner, device, caplog):
    wrong, message = UNUSABLE[kind]
    given = asking(**{"no_repeat_ngram_size": 1, "banned_token_ids": [3], "dry_multiplier": 1.0, **wrong})
    if "grammar" in kind:
        given.structured_outputs = object()
    with caplog.at_level(logging.WARNING):
        steps = runner(given, device)
    expected = [1, 2] if kind == "banned_token_ids" else [1, 2, 3]  # which are its own two, and what is left of it
    assert steps == [[expected, [9]]] * 2
    said = [record.getMessage() for record in caplog.records if "compiled" not in record.getMessage()]
    assert [message in each for each in said] == [True]


@pytest.mark.parametrize("runner", [older, newer])
def test_of_lists_that_are_too_long_what_there_is_room_for_is_honoured(runner, device, caplog):
    words = [[token, 5] for token in range(V)]
    for given, bans in (
        ({"forced_tokens": [4] * 3000, "bad_words": words * 20}, [token for token in range(V) if token != 4]),
        ({"forced_tokens": [4] * 5000, "bad_words": [[5]]}, [5]),
        ({"forced_tokens": [4] * 5000, "bad_words": words * 60, "banned_token_ids": [8]}, [8]),
    ):
        with caplog.at_level(logging.WARNING):
            assert runner(asking(**given), device)[0] == [bans, [9]]
        assert "forced_tokens and bad_words take" in caplog.records[-1].getMessage()


def test_a_request_of_which_nothing_is_left(device, caplog):
    processor = FastLogitsProcessor(config(), torch.device(device), False)
    processor.update_state(update(added=[(0, asking(top_k=3), [1], [])]))
    logits = torch.zeros(1, V, device=device)
    assert not processor.apply(logits).any()
    assert "top_k" in caplog.text


def test_placeholders_of_images_in_a_prompt_of_vllm(device):
    processor = FastLogitsProcessor(config(), torch.device(device), False)
    ngram = asking(no_repeat_ngram_size=1)
    processor.update_state(update(added=[(0, ngram, [V, 4, V + 3, -1, 2**40], []), (1, ngram, None, [])]))
    logits = torch.zeros(2, V, device=device)
    assert [banned(row) for row in processor.apply(logits)] == [[4], []]


def test_greedy_requests_are_not_truncated_by_probability():
    assert read_options({"eta": 0.1}, TRUNCATIONS, "here", 0.0).truncations is None
    assert read_options({"eta": 0.1}, TRUNCATIONS, "here", 0.5).truncations.temperature == 0.5


def test_live_lists(device):
    """Requests come, speak, take back, move about and go; each row is what its list says, whatever went before."""
    random.seed(0)
    torch.manual_seed(0)
    batch = LiveBatch(V, torch.device(device), max_requests=3, max_length=13, semantics="vllm")
    lives = [None]
    for step in range(120):
        if random.random() < 0.3:
            prompt = random.choices(range(V), k=random.randint(0, 9))
            lives.append(LiveRequest(options(no_repeat_ngram_size=1), prompt, []))
        for live in lives[1:]:
            if random.random() < 0.7:
                live.outputs.append(random.randrange(V))
        if len(lives) > 5 or random.random() < 0.1:
            gone = lives.pop() if len(lives) > 1 else None
            if gone is not None and step % 2:  # others are forgotten when their slots are needed
                batch.release(gone)
        rows = random.sample(lives, random.randint(1, len(lives)))
        for live in rows:
            if live is not None and random.random() < 0.1:
                del live.outputs[random.randint(0, min(live.taken, len(live.outputs))) :]
        logits = torch.randn(len(rows), V, device=device)
        before = logits.clone()
        for _ in range(random.randint(1, 2)):
            batch.process_(logits, rows)
        for row, was, live in zip(logits, before, rows, strict=True):
            assert banned(row) == ([] if live is None else banned_by_definition(live.prompt, live.outputs))
            assert torch.equal(row[~row.isinf()], was[~row.isinf()])


def test_cuts_look_at_the_temperature_and_leave_the_logits(device):
    torch.manual_seed(0)
    logits = torch.randn(4, V, device=device) * 3
    made = [
        options(epsilon=0.05),
        options(eta=0.1, banned_token_ids=[3]),
        options(typical_p=0.6),
        options(top_n_sigma=1.0),
    ]
    out = LiveBatch(V, logits.device, 4, 8, "vllm").process_(
        logits.clone(), [LiveRequest(each, [], []) for each in made]
    )
    chains = [
        [fl.TemperatureLogitsWarper(0.7), fl.EpsilonLogitsWarper(0.05)],
        [fl.SuppressTokensLogitsProcessor([3]), fl.TemperatureLogitsWarper(0.7), fl.EtaLogitsWarper(0.1)],
        [fl.TemperatureLogitsWarper(0.7), fl.TypicalLogitsWarper(0.6)],
        [fl.TopNSigmaLogitsWarper(1.0)],
    ]
    ids = torch.zeros(1, 0, dtype=torch.int64, device=device)
    for row, was, chain in zip(out, logits, chains, strict=True):
        kept = ~fl.LogitsProcessorList(chain)(ids, was[None])[0].isinf()
        assert 0 < kept.sum() < V
        assert torch.equal(row, was.masked_fill(~kept, float("-inf")))


def test_a_token_that_the_engine_keeps_to_itself(device, caplog):
    steering.say_once.cache_clear()
    batch = LiveBatch(V, torch.device(device), 2, 8, "vllm")
    live, beside = (
        LiveRequest(options(no_repeat_ngram_size=1), [1], []),
        LiveRequest(options(banned_token_ids=[5]), [1], []),
    )
    batch.process_(torch.zeros(2, V, device=device), [live, beside])
    live.outputs.append(-1)
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            out = batch.process_(torch.zeros(2, V, device=device), [live, beside])
            assert [banned(row) for row in out] == [[], [5]]
    assert len(caplog.records) == 1
    live.outputs[-1] = 7
    out = batch.process_(torch.zeros(2, V, device=device), [live, beside])
    assert [banned(row) for row in out] == [[1, 7], [5]]


def test_what_counts_tokens_needs_not_to_know_them(device, caplog):
    """Where the newest token is hidden, what doesn't look at it goes on: bans, and what counts the tokens."""
    steering.say_once.cache_clear()
    batch = LiveBatch(V, torch.device(device), 2, 8, "vllm")
    all_kinds = options(
        no_repeat_ngram_size=1, dry_multiplier=1.0, bad_words=[[6], [1, 7]], banned_token_ids=[5],
        first_tokens_suppressed=[8], first_window=3, forced_tokens=[4],
    )  # fmt: skip
    live, counting = (
        LiveRequest(all_kinds, [1], []),
        LiveRequest(options(first_tokens_suppressed=[8], first_window=2), [1], []),
    )

    def step(token):
        for each in (live, counting):
            each.outputs.append(token)
        return [banned(row) for row in batch.process_(torch.zeros(2, V, device=device), [live, counting])]

    first = batch.process_(torch.zeros(2, V, device=device), [live, counting])
    assert banned(first[0]) == [token for token in range(V) if token != 4]
    with caplog.at_level(logging.ERROR):
        assert step(-1) == [[5, 6, 8], [8]]
        assert step(-1) == [[5, 6, 8], []]
        assert step(-1) == [[5, 6], []]
    assert [record.getMessage().split(" of requests")[0] for record in caplog.records] == [
        "no_repeat_ngram_size, dry_multiplier, bad_words"
    ]
    for each in (live, counting):
        each.outputs[:] = [2, 3, 9]
    assert step(1) == [[1, 2, 3, 5, 6, 7, 9], []]


class Direction(Enum):
    UNIDIRECTIONAL = 1
    SWAP = 2


def update(removed=(), added=(), moved=()):
    return SimpleNamespace(removed=removed, added=added, moved=moved)


def config(**more):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=33),
        speculative_config=None,
        **more,
    )


def asking(**given):
    return SimpleNamespace(extra_args={"fastlogits": given} if given else None, temperature=1.0)


def test_indices_of_the_older_runner(device):
    processor = FastLogitsProcessor(config(), torch.device(device), False)
    assert not processor.is_argmax_invariant()
    strided = torch.zeros(4, V + 3, device=device)[:, :V]
    assert processor.apply(strided) is strided
    ngram = asking(no_repeat_ngram_size=1)
    outputs = [[], [9], [], []]

    def bans(rows=4):
        logits = torch.zeros(rows, V + 3, device=device)[:, :V]
        assert processor.apply(logits) is logits
        return [banned(row) for row in logits]

    processor.update_state(update(added=[(i, ngram if i < 3 else asking(), [i], outputs[i]) for i in range(4)]))
    assert bans() == [[0], [1, 9], [2], []]
    outputs[0].append(8)
    processor.update_state(None)
    assert bans() == [[0, 8], [1, 9], [2], []]
    processor.update_state(update(moved=[(0, 3, Direction.SWAP), (1, 2, Direction.SWAP)]))
    assert bans() == [[], [2], [1, 9], [0, 8]]
    # The last one moves to where another was removed; and one is replaced without a removal.
    processor.update_state(update(removed=[1], moved=[(3, 1, Direction.UNIDIRECTIONAL)]))
    assert bans(3) == [[], [0, 8], [1, 9]]
    processor.update_state(update(added=[(1, ngram, [4], []), (0, ngram, None, outputs[0])]))
    assert bans(3) == [[8], [4], [1, 9]]
    # Preempted, and added again with what it had said.
    processor.update_state(update(removed=[2]))
    assert bans(2) == [[8], [4]]
    outputs[1].append(30)
    processor.update_state(update(added=[(2, ngram, [1], outputs[1])]))
    assert bans(3) == [[8], [4], [1, 9, 30]]
    processor.update_state(update(removed=[2, 1, 0]))
    assert bans(3) == [[], [], []]
    processor.update_state(update(added=[(i, ngram, [i], []) for i in range(4)]))
    assert bans() == [[0], [1], [2], [3]]


def test_loaded_twice_it_acts_once(device):
    both = config()
    first, second = (FastLogitsProcessor(both, torch.device(device), False) for _ in range(2))
    another = FastLogitsProcessor(config(), torch.device(device), False)
    penal = asking(dry_multiplier=1.0, dry_allowed_length=1)
    logits = torch.zeros(1, V, device=device)
    for processor in (first, second):
        processor.update_state(update(added=[(0, penal, [1, 2, 1], [])]))
        processor.apply(logits)
    alone = torch.zeros(1, V, device=device)
    another.update_state(update(added=[(0, penal, [1, 2, 1], [])]))
    assert torch.equal(another.apply(alone), logits)
    assert logits[0, 2] == -1


def test_slots_of_the_newer_runner(device):
    tokens = torch.randint(0, V, (4, 16), dtype=torch.int32, device=device)
    tokens[:2, :6] = torch.tensor([[1, 2, 1, 2, 3, 1], [7, 8, 7, 8, 9, 7]], device=device)

    def places(*values):
        return torch.tensor(values, dtype=torch.int32, device=device)

    states = SimpleNamespace(
        max_num_reqs=4,
        vocab_size=V,
        all_token_ids=SimpleNamespace(gpu=tokens),
        total_len=SimpleNamespace(gpu=places(6, 6, 5, 5)),
        prompt_len=SimpleNamespace(np=[4, 4, 5, 5]),
    )
    more = config()
    more.speculative_config = SimpleNamespace(num_speculative_tokens=2)
    processor = FastLogitsProcessor(more, states)

    def step(slots, local, inputs):
        """Rows of some slots, with the draft tokens before them."""
        context = SimpleNamespace(
            expanded_idx_mapping=places(*slots),
            idx_mapping_np=torch.tensor(slots).unique().numpy(),
            expanded_local_pos=places(*local),
            input_ids=places(*inputs),
            pos=states.total_len.gpu[places(*slots).long()].long() - 1 + places(*local),
        )
        logits = torch.zeros(len(slots), V, device=device)
        assert processor.apply(logits, context) is logits
        return [banned(row) for row in logits]

    drafts = ([1, 3, 0, 0, 0], [0, 0, 0, 1, 2], [7, 5, 1, 2, 1])
    processor.apply_staged_writes()
    assert step(*drafts) == [[]] * 5
    assert processor.add_request(0, asking(no_repeat_ngram_size=2))
    assert not processor.add_request(1, asking())
    processor.apply_staged_writes()
    # Slot 0 has said "1 2 1 2 3 1", and its draft goes on with "2 1".
    assert step(*drafts) == [[], [], [2], [1, 3], [2]]
    assert step([1, 3], [0, 0], [7, 5]) == [[], []]
    # The slot is taken by another request, which asks for something else; and another by one that asks now.
    assert processor.add_request(0, asking(first_tokens_suppressed=[4, 5], first_window=3, forced_tokens=[1, 2, 3]))
    assert processor.add_request(1, asking(banned_token_ids=[6]))
    processor.apply_staged_writes()
    got = step(*drafts)
    assert got[:2] == [[6], []]
    assert got[2] == [token for token in range(V) if token != 3]
    assert got[3:] == [[], []]
    # What is cut by probability is cut in each row of a draft: of equal logits, all or none.
    assert processor.add_request(0, asking(typical_p=0.5, banned_token_ids=[3]))
    processor.apply_staged_writes()
    assert step(*drafts) == [[6], [], [3], [3], [3]]
    assert not processor.add_request(0, asking())
    processor.apply_staged_writes()
    assert step(*drafts) == [[6], [], [], [], []]


@pytest.mark.skipif(importlib.util.find_spec("sglang") is not None, reason="for machines without SGLang")
def test_sglangs_text_without_sglang():
    from fastlogits.integrations import sglang

    assert sglang.FastLogitsProcessor.params(no_repeat_ngram_size=3) == {"fastlogits": '{"no_repeat_ngram_size": 3}'}
    for name in ("FastLogitsProcessor", "DRYLogitProcessor"):
        with pytest.raises(
            ImportError, match=rf"{name}.to_str\(\) must be called where SGLang is installed.*pip install"
        ):
            getattr(sglang, name).to_str()


def test_nothing_is_imported_before_a_request_asks():
    code = (
        "import sys, fastlogits.integrations.vllm as v; v.FastLogitsProcessor;"
        "print([m for m in ('transformers', 'triton', 'fastlogits.serving.batch', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
