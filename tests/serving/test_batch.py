"""Requests in a batch of their own parameters, beside the processors, and beside each of them alone."""

import copy
import os
import pickle
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from fastlogits_kernels.pointwise.fold import launch_fold
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.runtime.bits import pack_bits
from fastlogits_kernels.serving import search, steps
from fastlogits_kernels.serving.layout import StepRows
from fastlogits_kernels.serving.reference import reference_slots
from fastlogits_kernels.serving.search import launch_slot_sets

import fastlogits as fl
from fastlogits import BatchProcessor, RequestParams, TokenMask
from fastlogits.serving import packing

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

V = 101
INF = float("inf")


def logits_of(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def history_of(length: int, seed: int = 0, most: int = 12) -> list[int]:
    return torch.randint(0, most, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT, OUTPUT = history_of(20, 1), history_of(9, 2)


def chain(*processors):
    """The processors as a list for a run, given what has been generated already."""
    return fl.LogitsProcessorList(list(processors))


FEATURES = {
    "nothing": ({}, []),
    "temperature": ({"temperature": 0.7}, [lambda: fl.TemperatureLogitsWarper(0.7)]),
    "top_k": ({"top_k": 5}, [lambda: fl.TopKLogitsWarper(5)]),
    "top_k beyond V": ({"top_k": 500}, []),
    "top_p": ({"top_p": 0.8}, [lambda: fl.TopPLogitsWarper(0.8)]),
    "min_p": ({"min_p": 0.1}, [lambda: fl.MinPLogitsWarper(0.1)]),
    "typical": ({"typical_p": 0.7}, [lambda: fl.TypicalLogitsWarper(0.7)]),
    "epsilon": ({"epsilon": 0.01}, [lambda: fl.EpsilonLogitsWarper(0.01)]),
    "eta": ({"eta": 0.01}, [lambda: fl.EtaLogitsWarper(0.01, device="cpu")]),
    "top_n_sigma": ({"top_n_sigma": 1.0}, [lambda: fl.TopNSigmaLogitsWarper(1.0)]),
    "top_a": ({"top_a": 0.3}, [lambda: fl.TopALogitsWarper(0.3)]),
    "top_h": ({"top_h": 0.5}, [lambda: fl.TopHLogitsWarper(0.5)]),
    "repetition": ({"repetition_penalty": 1.3}, [lambda: fl.RepetitionPenaltyLogitsProcessor(1.3)]),
    "presence": ({"presence_penalty": 0.4}, [lambda: fl.PresencePenaltyLogitsProcessor(0.4)]),
    "frequency": ({"frequency_penalty": -0.3}, [lambda: fl.FrequencyPenaltyLogitsProcessor(-0.3)]),
    "dry": (
        {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 1, "dry_breakers": (3, 4)},
        [lambda: fl.DRYLogitsProcessor(0.8, 1.5, 1, (3, 4))],
    ),
    "bias": ({"logit_bias": {4: 1.5, 90: -2.0}}, [lambda: fl.LogitBiasLogitsProcessor({4: 1.5, 90: -2.0})]),
    "allowed": ({"allowed_token_ids": range(0, V, 3)}, [lambda: fl.AllowedTokensLogitsProcessor(range(0, V, 3))]),
    "banned": ({"banned_token_ids": [5, 7]}, [lambda: fl.SuppressTokensLogitsProcessor([5, 7], "cpu")]),
    "many banned": ({"banned_token_ids": range(80)}, [lambda: fl.SuppressTokensLogitsProcessor(range(80), "cpu")]),
    "allowed and many banned": (
        {"allowed_token_ids": range(0, V, 3), "banned_token_ids": range(80)},
        [
            lambda: fl.AllowedTokensLogitsProcessor(range(0, V, 3)),
            lambda: fl.SuppressTokensLogitsProcessor(range(80), "cpu"),
        ],
    ),
    "bad words": (
        {"bad_words": [[7], [OUTPUT[-1], 9], [*OUTPUT[-2:], 11], [90, 91]]},
        [lambda: fl.NoBadWordsLogitsProcessor([[7], [OUTPUT[-1], 9], [*OUTPUT[-2:], 11], [90, 91]])],
    ),
    "ngram": ({"no_repeat_ngram_size": 2}, [lambda: fl.NoRepeatNGramLogitsProcessor(2)]),
    "unigram": ({"no_repeat_ngram_size": 1}, [lambda: fl.NoRepeatNGramLogitsProcessor(1)]),
    "min tokens": (
        {"min_tokens": 10, "stop_token_ids": [1, 2]},
        [lambda: fl.MinNewTokensLengthLogitsProcessor(len(PROMPT), 10, [1, 2], "cpu")],
    ),
    "enough tokens": ({"min_tokens": 9, "stop_token_ids": [1, 2]}, []),
    "first tokens": (
        {"first_tokens_suppressed": [8, 9], "first_window": 10},
        [lambda: fl.SuppressFirstTokens([8, 9], window=10)],
    ),
    "many first tokens": (
        {"first_tokens_suppressed": TokenMask.from_ids(range(90), V), "first_window": 10},
        [lambda: fl.SuppressFirstTokens(range(90), window=10)],
    ),
    "later": ({"first_tokens_suppressed": [8, 9], "first_window": 9}, []),
    "penalties": (
        {
            "logit_bias": {3: 0.7}, "repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.2,
            "no_repeat_ngram_size": 3, "temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02,
        },
        [
            lambda: fl.LogitBiasLogitsProcessor({3: 0.7}),
            lambda: fl.RepetitionPenaltyLogitsProcessor(1.2),
            lambda: fl.FrequencyPenaltyLogitsProcessor(0.1),
            lambda: fl.PresencePenaltyLogitsProcessor(0.2),
            lambda: fl.NoRepeatNGramLogitsProcessor(3),
            lambda: fl.TemperatureLogitsWarper(1.7),
            lambda: fl.TopKLogitsWarper(40),
            lambda: fl.TopPLogitsWarper(0.9),
            lambda: fl.MinPLogitsWarper(0.02),
        ],
    ),
}  # fmt: skip


@pytest.fixture(params=["torch", "kernels"])
def path(request, monkeypatch):
    """Both ways of the CPU: torch, and the kernels in Triton's interpreter; on a GPU, the kernels."""
    if torch.cuda.is_available():
        if request.param == "torch":
            pytest.skip("on a GPU the kernels run")
    elif request.param == "kernels":
        if not launcher.HAS_TRITON:
            pytest.skip("needs Triton")
        monkeypatch.setattr(steps, "FORCE_KERNEL", True)
    return request.param


@pytest.mark.parametrize("feature", FEATURES)
def test_a_request_gets_what_the_processors_of_its_parameters_give(feature, device, path):
    arguments, made = FEATURES[feature]
    batch = BatchProcessor(3, V, device, max_length=64)
    slot = batch.add(RequestParams(**arguments), PROMPT, OUTPUT, slot=1)
    logits = logits_of(1).to(device)
    ids = torch.tensor([PROMPT + OUTPUT], device=device)
    expected = logits.clone()
    if made:
        expected = chain(*(make() for make in made))(ids, expected, prompt_length=len(PROMPT))
    processed = batch.apply(logits, [slot])
    torch.testing.assert_close(processed, expected, rtol=1e-5, atol=1e-5)
    assert batch.apply_(logits, [slot]) is logits
    assert torch.equal(logits, processed)


# -- Requests beside each other ------------------------------------------------------------------------------------


def random_params(rng: random.Random, vocab: int = V) -> RequestParams:
    """Parameters of which each is in use about one time in four."""

    def some(value):
        return value if rng.random() < 0.25 else None

    def ids(most: int) -> list[int]:
        return rng.sample(range(min(vocab, 30)), rng.randint(1, most))

    offered = {
        "temperature": some(rng.choice([0, 0.5, 1.3])),
        "top_k": some(rng.choice([1, 3, 20, 10**6])),
        "top_p": some(rng.choice([0.0, 0.3, 0.9, 1.0])),
        "min_p": some(rng.choice([0.02, 0.3, 1.0])),
        "typical_p": some(0.8),
        "epsilon": some(0.01),
        "eta": some(0.02),
        "top_n_sigma": some(1.5),
        "repetition_penalty": some(rng.choice([0.8, 1.2])),
        "presence_penalty": some(rng.choice([-0.4, 0.7])),
        "frequency_penalty": some(rng.choice([-0.2, 0.3])),
        "repetition_scope": some("output"),
        "presence_scope": some("all"),
        "dry_multiplier": some(0.9),
        "dry_allowed_length": rng.choice([0, 1, 2]),
        "dry_breakers": some(TokenMask.from_ids(ids(2), vocab)),
        "logit_bias": some({token: rng.choice([-3.0, 0.5, -INF]) for token in ids(6)}),
        "allowed_token_ids": some(list(range(0, vocab, 2))),
        "banned_token_ids": some(rng.choice([ids(5), TokenMask.from_ids(range(5, vocab, 7), vocab)])),
        "bad_words": some([ids(3) for _ in range(4)]),
        "no_repeat_ngram_size": some(rng.choice([1, 2, 3])),
        "min_tokens": some(3),
        "stop_token_ids": ids(2),
        "first_tokens_suppressed": some(rng.choice([ids(5), list(range(min(vocab - 1, 70)))])),
        "first_window": rng.choice([1, 3]),
        "forced_tokens": some(ids(3)),
        "bitmask": (None, True, False)[int(3 * rng.random())],
        "seed": rng.getrandbits(63),
    }
    return RequestParams(**{name: value for name, value in offered.items() if value is not None})


def bitmask_of(rows: int, seed: int, vocab: int = V) -> torch.Tensor:
    allowed = torch.rand(rows, vocab, generator=torch.Generator().manual_seed(seed)) < 0.6
    return pack_bits(allowed)


@dataclass
class Request:
    """What the test knows of a request."""

    params: RequestParams
    prompt: list[int]
    output: list[int] = field(default_factory=list)


def alone(request: Request, logits, bitmask, semantics="transformers", length=96):
    """The processed logits and the token of one request in a batch of its own, in torch."""
    batch = BatchProcessor(1, len(logits), "cpu", max_length=length, semantics=semantics)
    slot = batch.add(request.params, request.prompt, request.output)
    row, mask = logits.cpu()[None], bitmask.cpu()[None]
    return batch.apply(row, [slot], bitmask=mask)[0], int(batch.sample(row, [slot], bitmask=mask).tokens)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("semantics", ["transformers", "vllm", "sglang"])
def test_a_request_does_not_depend_on_who_shares_the_batch(semantics, device, path):
    count = 6 if path == "kernels" and device == "cpu" else 40
    rng = random.Random(5)
    batch = BatchProcessor(count, V, device, max_length=96, semantics=semantics, max_rows=count + 2)
    slots = list(range(count))
    rng.shuffle(slots)
    requests = []
    for i, slot in enumerate(slots):
        request = Request(random_params(rng), history_of(rng.randint(0, 60), i), history_of(rng.randint(0, 30), -i))
        assert batch.add(request.params, request.prompt, request.output, slot=slot) == slot
        requests.append(request)
    logits, bitmask = logits_of(count + 2, 9).to(device), bitmask_of(count + 2, 3).to(device)
    of_rows = torch.tensor([*slots, -1, -1], device=device)
    order = torch.randperm(count + 2, generator=torch.Generator().manual_seed(1)).to(device)
    back = order.argsort()
    processed = batch.apply(logits[order], of_rows[order], bitmask=bitmask[order])[back]
    tokens = batch.sample(logits[order], of_rows[order], bitmask=bitmask[order]).tokens[back]
    for row, request in enumerate(requests):
        expected, token = alone(request, logits[row], bitmask[row], semantics)
        assert_same(processed[row], expected)
        assert int(tokens[row]) == token
    assert torch.equal(processed[count:], logits[count:])
    assert tokens[count:].tolist() == [0, 0]


@pytest.mark.parametrize("also", [{}, {"dry_multiplier": 0.8, "dry_allowed_length": 1}])
def test_no_token_twice(also, device, path):
    batch = BatchProcessor(1, V, device, max_length=64)
    batch.add(RequestParams(no_repeat_ngram_size=1, **also), [9, 3, 5, 3], [7])
    found = batch.apply(torch.zeros(1, V, device=device), [0])
    assert torch.isneginf(found[0]).nonzero().flatten().tolist() == [3, 5, 7, 9]


def test_biases_come_last_where_the_engine_adds_them_last(device, path):
    """Rounded in that order: repetitions are lowered before."""
    batch = BatchProcessor(1, V, device, max_length=64, semantics="sglang")
    batch.add(RequestParams(logit_bias={3: 0.5}, dry_multiplier=0.7, dry_allowed_length=1), [5, 3, 5])
    given = torch.tensor(0.45151636)
    assert (given + 0.5) - 0.7 != (given - 0.7) + 0.5
    found = batch.apply(torch.full((1, V), float(given), device=device), [0])
    assert found[0, 3].cpu() == (given - 0.7) + 0.5


def test_draft_rows_see_the_history_and_their_own_prefix(device, path):
    rng = random.Random(2)
    count = 2 if path == "kernels" and device == "cpu" else 12
    batch = BatchProcessor(count, V, device, max_length=96, max_rows=64)
    rows = []
    for slot in range(count):
        request = Request(
            random_params(rng), history_of(rng.randint(0, 20), slot), history_of(rng.randint(1, 9), 50 + slot)
        )
        batch.add(request.params, request.prompt, request.output[:-1])
        drafts = history_of(rng.randint(0, 4), 80 + slot)
        for j in range(len(drafts) + 1):
            fed = request.output[-1] if not j else drafts[j - 1]
            seen = Request(request.params, request.prompt, request.output[:-1] + drafts[:j])
            rows.append((slot, j, fed, seen))
    slots, local, fed, seen = zip(*rows, strict=True)
    logits, bitmask = logits_of(len(rows), 4).to(device), bitmask_of(len(rows), 8).to(device)
    given = {
        "draft_ids": torch.tensor(fed, device=device), "local_position": torch.tensor(local, device=device),
        "bitmask": bitmask,
    }  # fmt: skip
    of_rows = torch.tensor(slots, device=device)
    positions = torch.tensor([len(each.prompt) + len(each.output) - 1 for each in seen], device=device)
    for cache_position in (None, positions):
        processed = batch.apply(logits, of_rows, cache_position, **given)
        tokens = batch.sample(logits, of_rows, cache_position, **given).tokens.tolist()
        for row, request in enumerate(seen):
            expected, token = alone(request, logits[row], bitmask[row])
            assert_same(processed[row], expected)
            assert tokens[row] == token


@pytest.mark.parametrize("draws", [False, True])
def test_kernels_find_in_many_ranges_what_torch_finds(draws, device):
    if not launcher.HAS_TRITON:
        pytest.skip("needs Triton")
    vocab, rng = 70_001, random.Random(3)
    history = torch.randint(0, vocab, (1500,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = history + history[200:230]
    asked = [
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "dry_multiplier": 1.0, "presence_scope": "all"},
        {"bad_words": [[*prompt[-3:], 69_000], [5, 6, 7]], "no_repeat_ngram_size": 3, "bitmask": True},
        {"allowed_token_ids": range(1, vocab, 3), "logit_bias": {70_000: 9.0, 32_767: 1.0, 32_768: 2.0}, "top_k": 7},
        {"repetition_penalty": 0.9, "logit_bias": {token: rng.random() for token in prompt[::7]}, "temperature": 0.7},
        {"forced_tokens": [1, 65_000], "repetition_penalty": 0.9},
    ]
    count = len(asked)
    batch = BatchProcessor(count, vocab, device, max_length=2000, max_listed=1024, max_rows=count + 1)
    for i, each in enumerate(asked):
        batch.add(RequestParams(**each, seed=i), prompt[: 1530 - 30 * i], [3] * (i == 4))
    logits = (torch.randn(count + 1, vocab, generator=torch.Generator().manual_seed(0)) * 3).to(device)
    slots = torch.tensor([*range(count), -1], device=device)
    step, rows = batch._step, StepRows(slots, bitmask=bitmask_of(count + 1, 1, vocab).to(device))
    expected, numbers = reference_slots(logits, step.slots, rows, step.semantics, draws)
    made = step.workspace
    # What an earlier step has left must not matter.
    launch_slot_sets(made, logits, rows._replace(slots=slots.roll(1)), draws)
    found = launch_slot_sets(made, logits, rows, draws)
    out = torch.empty_like(logits)
    launch_fold(logits, out, made.chain, found)
    assert_same(out, expected)
    for mine, theirs in zip(made.numbers, numbers, strict=True):
        assert torch.equal(mine.cpu()[..., :count], theirs.cpu()[..., :count])


@pytest.mark.parametrize(("dtype", "piece"), [(torch.float32, 2048), (torch.float16, 2048), (torch.float32, 1)])
def test_edited_tokens_among_the_candidates(dtype, piece, device, monkeypatch):
    """Where a biased or penalised token decides which tokens stay, or is the one that stays; also in shared lists."""
    monkeypatch.setattr(search, "_PIECE", piece)
    vocab, history = 3001, list(range(100, 160))
    logits = torch.randn(11, vocab, generator=torch.Generator().manual_seed(5)) * 2
    logits[:, 100:103] = 9.5  # what the history has lies above all
    logits = logits.to(dtype)
    asked = [
        {"temperature": 0.0, "logit_bias": {7: 30.0}},
        {"temperature": 0.0, "repetition_penalty": 4.0},
        {"temperature": 0.0, "logit_bias": {7: 30.0, 8: 29.0}, "banned_token_ids": [7]},
        {"temperature": 0.6, "min_p": 0.05, "logit_bias": {7: 10.0, 8: 9.0, 2999: 8.5}},
        {"temperature": 0.6, "min_p": 0.05, "repetition_penalty": 1.5, "frequency_penalty": 0.2},
        {"temperature": 1.7, "min_p": 0.1, "presence_penalty": 3.0, "banned_token_ids": [100]},
        {"temperature": 0.9, "min_p": 0.001, "banned_token_ids": [5]},
        {"temperature": 1.3, "typical_p": 0.6, "repetition_penalty": 1.2},
        {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.1, "no_repeat_ngram_size": 2},
        {"temperature": 0.5, "top_p": 0.7, "logit_bias": dict.fromkeys(range(500, 520), 5.0)},
        {"temperature": 0.8, "top_k": 40, "logit_bias": {token: token * 37 % 100 / 10 for token in range(1500, 2700)}},
    ]

    def made(on):
        batch = BatchProcessor(len(asked), vocab, on, max_length=100, max_listed=2500)
        for i, each in enumerate(asked):
            batch.add(RequestParams(**each, seed=i), history, [3])
        return batch

    def results(batch, on):
        rows = torch.arange(len(asked), device=on)
        given = logits.to(on)
        return batch.apply(given, rows).cpu(), batch.sample(given, rows).tokens.cpu()

    expected, tokens = results(made("cpu"), "cpu")
    if device == "cpu":
        if not launcher.HAS_TRITON:
            pytest.skip("needs Triton")
        monkeypatch.setattr(steps, "FORCE_KERNEL", True)
    found, found_tokens = results(made(device), device)
    assert_same(found, expected)
    assert torch.equal(found_tokens, tokens)


# -- What a batch goes through -------------------------------------------------------------------------------------

STEPS = int(os.environ.get("FASTLOGITS_SERVING_STEPS", "300"))


def test_random_adds_removes_moves_and_steps_leave_every_row_as_it_would_be_alone(device):
    slots, vocab, longest = 6, 37, 48
    rng = random.Random(11)
    batch = BatchProcessor(slots, vocab, device, max_length=longest, max_rows=10)
    present: dict[int, Request] = {}
    for turn in range(STEPS):
        action = rng.choice(["add", "add", "remove", "move", "swap", "step", "step", "step"])
        if action == "add" and len(present) < slots:
            request = Request(random_params(rng, vocab), [rng.randrange(vocab) for _ in range(rng.randint(0, 20))])
            request.output = [rng.randrange(vocab) for _ in range(rng.randint(0, 3))]
            free = [slot for slot in range(slots) if slot not in present]
            slot = batch.add(request.params, request.prompt, request.output, slot=rng.choice([None, rng.choice(free)]))
            assert slot in free
            present[slot] = request
        elif action == "remove" and present:
            slot = rng.choice(list(present))
            batch.remove(slot)
            del present[slot]
        elif action == "move" and present and len(present) < slots:
            source = rng.choice(list(present))
            target = rng.choice([slot for slot in range(slots) if slot not in present])
            batch.move(source, target)
            present[target] = present.pop(source)
        elif action == "swap":
            a, b = rng.randrange(slots), rng.randrange(slots)
            batch.swap(a, b)
            both = present.pop(a, None), present.pop(b, None) if a != b else None
            present |= {slot: each for slot, each in ((b, both[0]), (a, both[1])) if each is not None}
        elif action == "step" and present:
            of_rows = rng.sample([*present, -1], rng.randint(1, len(present) + 1))
            logits, bitmask = logits_of(len(of_rows), turn)[:, :vocab], bitmask_of(len(of_rows), turn, vocab)
            indices = torch.tensor(of_rows, device=device)
            given = (logits.to(device), indices)
            processed = batch.apply_(logits.to(device, copy=True), indices, bitmask=bitmask.to(device))
            tokens = batch.sample(*given, bitmask=bitmask.to(device)).tokens
            for row, slot in enumerate(of_rows):
                if slot < 0:
                    assert torch.equal(processed[row].cpu(), logits[row])
                    continue
                expected, token = alone(present[slot], logits[row], bitmask[row], length=longest)
                assert_same(processed[row], expected)
                assert int(tokens[row]) == token
            full = {slot for slot, each in present.items() if len(each.prompt) + len(each.output) == longest}
            batch.append(
                indices.masked_fill(torch.tensor([slot in full for slot in of_rows], device=device), -1), tokens
            )
            for slot, token in zip(of_rows, tokens.tolist(), strict=True):
                if slot in present and slot not in full:
                    present[slot].output.append(token)
        assert len(batch) == len(present)
        assert all((slot in batch) == (slot in present) for slot in range(slots))


def test_slots_change_places_with_all_that_they_hold(device, path):
    vocab = 40_000
    batch = BatchProcessor(3, vocab, device, max_length=20)
    masks = {"banned_token_ids": range(100, 200), "first_tokens_suppressed": range(300, 400), "logit_bias": {5: 1.0}}
    batch.add(RequestParams(**masks, seed=1), [1, 2, 3], [4])
    batch.add(RequestParams(temperature=0.5, seed=2), [6])
    batch._slots.history[2].fill_(9)
    first, second, third = batch._table.clone()
    batch.swap(0, 1)
    assert torch.equal(batch._table, torch.stack((second, first, third)))
    batch.move(1, 2)
    assert torch.equal(batch._table, torch.stack((second, third, first)))
    assert [slot in batch for slot in range(3)] == [True, False, True]
    assert batch._slots.history[2, :4].tolist() == [1, 2, 3, 4]


def test_a_slot_holds_nothing_of_the_request_before(device, path):
    batch = BatchProcessor(1, V, device, max_length=40)
    masks = {"banned_token_ids": range(70), "first_tokens_suppressed": range(20, 90), "dry_breakers": [3]}
    logits = logits_of(1).to(device)
    for arguments in ({**masks, "dry_multiplier": 1.0}, {"first_tokens_suppressed": range(20, 90)}, {}):
        batch.add(RequestParams(**arguments), PROMPT)
        alone = BatchProcessor(1, V, device, max_length=40)
        alone.add(RequestParams(**arguments), PROMPT)
        assert torch.equal(batch.apply(logits, [0]), alone.apply(logits, [0]))
        batch.remove(0)
        # On a GPU a row may name a slot that the host knows to be free.
        rows = StepRows(torch.tensor([0], device=device))
        assert torch.equal(steps.process_rows(batch._step, logits, rows, torch.empty_like(logits)), logits)
    assert torch.equal(batch.apply(logits, [-1]), logits)


def test_staged_requests_are_not_overwritten_by_those_after_them():
    staging = packing.Staging(torch.device("cpu"))
    taken = []
    for count in (5, packing.STAGED - 6, 3, 2 * packing.STAGED, 1):
        tensor, array = staging.take(count)
        assert tensor.shape == array.shape == (count,)
        array.fill(len(taken))
        taken.append(tensor)
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(taken))


def test_a_step_repeated_until_the_places_of_its_edits_come_round(device, path):
    """Edits are kept in a ring: what a step finds there, many steps later, is as clean as at first."""
    batch = BatchProcessor(1, 40, device, max_length=16, max_listed=64)
    params = RequestParams(
        repetition_penalty=1.3, frequency_penalty=0.2, presence_scope="all", dry_multiplier=1.0, logit_bias={3: 0.5}
    )
    batch.add(params, history_of(14), slot=0)
    logits = logits_of(1)[:, :40].to(device)
    first = batch.apply(logits, [0])
    assert (first != logits).any()
    for _ in range(24):
        assert torch.equal(batch.apply(logits, [0]), first)


def test_append_keeps_the_order_of_tokens_and_ignores_what_names_no_request(device, path):
    batch = BatchProcessor(3, V, device, max_length=6)
    batch.add(RequestParams(), [1, 2], slot=0)
    batch.add(RequestParams(), [3], slot=2)
    slots = torch.tensor([2, 0, -1, 2, 1, 7, 2, 0, 0, 0, 0], device=device)
    tokens = torch.tensor([10, 11, 12, 13, 14, 15, -1, 16, 17, 18, 19], device=device, dtype=torch.int32)
    before = batch._table.clone()
    steps.append_tokens(batch._slots, slots, tokens)  # on a GPU, where nothing can be refused, append() is just that
    batch.append([2], [20])
    tables = batch._slots
    assert tables.lengths.tolist() == [6, 0, 4]
    assert tables.history[0, :6].tolist() == [1, 2, 11, 16, 17, 18]
    assert tables.history[2, :4].tolist() == [3, 10, 13, 20]
    changed = batch._table != before
    changed[:, batch._masks_end] = changed[:, -batch.max_length :] = False
    assert not changed.any()  # nothing but lengths and histories, also where one is full
    many = torch.arange(300, device=device) % 50
    large = BatchProcessor(50, V, device, max_length=6)
    for _ in range(50):
        large.add(RequestParams())
    large.append(many, torch.arange(300, device=device) // 50)
    assert large._slots.lengths.tolist() == [6] * 50
    assert large._slots.history.tolist() == [list(range(6))] * 50


def test_a_position_before_the_end_rewinds(device):
    batch = BatchProcessor(1, V, device, max_length=64)
    params = RequestParams(repetition_penalty=1.5, min_tokens=3, stop_token_ids=[4], seed=3, bitmask=False)
    batch.add(params, PROMPT, OUTPUT)
    logits = logits_of(1).to(device)
    for length in range(len(PROMPT), len(PROMPT) + len(OUTPUT) + 1):
        seen = Request(params, PROMPT, OUTPUT[: length - len(PROMPT)])
        expected, token = alone(seen, logits[0], bitmask_of(1, 0)[0])
        position = torch.tensor([length - 1], device=device)
        assert_same(batch.apply(logits, [0], position)[0], expected)
        assert int(batch.sample(logits, [0], position).tokens) == token


def test_an_engine_may_keep_the_histories_itself(device, path):
    ids = torch.zeros(3, 64, dtype=torch.int32, device=device)
    prompts, lengths = (torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
    batch = BatchProcessor(3, V, device, history=(ids, prompts, lengths))
    params = RequestParams(repetition_penalty=1.5, presence_penalty=1.0, no_repeat_ngram_size=2, seed=1, bitmask=False)
    batch.add(params, slot=1)
    ids[1, : len(PROMPT + OUTPUT)] = torch.tensor(PROMPT + OUTPUT)
    prompts[1], lengths[1] = len(PROMPT), len(PROMPT + OUTPUT)
    logits = logits_of(2).to(device)
    expected, token = alone(Request(params, PROMPT, OUTPUT), logits[0], bitmask_of(1, 0)[0])
    assert_same(batch.apply(logits, [1, -1])[0], expected)
    assert int(batch.sample(logits, [1, -1]).tokens[0]) == token
    with pytest.raises(ValueError, match="engine"):
        batch.append([1], [1])


# -- Single features -----------------------------------------------------------------------------------------------


def test_forced_tokens_come_whatever_all_else_says(device, path):
    batch = BatchProcessor(2, V, device, max_length=64)
    params = RequestParams(forced_tokens=[7, 9], banned_token_ids=[7], bitmask=True, no_repeat_ngram_size=1)
    batch.add(params, [7, 9])
    logits = torch.full((1, V), float("nan"), device=device)
    nothing = torch.zeros(1, 4, dtype=torch.int32, device=device)
    for token in (7, 9):
        processed = batch.apply(logits, [0], bitmask=nothing)
        expected = torch.full((1, V), -INF)
        expected[0, token] = 0
        assert torch.equal(processed.cpu(), expected)
        assert batch.sample(logits, [0], bitmask=nothing).tokens.tolist() == [token]
        batch.append([0], [token])
    assert not torch.equal(batch.apply(logits_of(1).to(device), [0], bitmask=~nothing).cpu(), expected)


def test_a_bitmask_holds_for_all_but_those_who_opt_out_and_bans_what_it_does_not_know(device, path):
    batch = BatchProcessor(3, V, device, max_length=8)
    for choice in (True, None, False):
        batch.add(RequestParams(bitmask=choice))
    logits = logits_of(3).to(device)
    masks = torch.tensor([[-1, 5, 0]] * 3, dtype=torch.int32, device=device)
    processed = batch.apply(logits, [0, 1, 2], bitmask=masks)
    kept = [*range(32), 32, 34]
    for row in (0, 1):
        assert (processed[row] > -INF).nonzero().flatten().tolist() == kept
    assert torch.equal(processed[2], logits[2])
    assert torch.equal(batch.apply(logits[1:], [1, 2]), logits[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_what_is_edited_and_leaves_the_rest(dtype, device, path):
    if path == "kernels" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    batch = BatchProcessor(2, V, device, max_length=64)
    batch.add(RequestParams(repetition_penalty=1.3, frequency_penalty=0.1, banned_token_ids=[3]), PROMPT, OUTPUT)
    wide = logits_of(4, dtype=dtype).to(device)
    logits = wide[::2]  # rows apart
    processed = batch.apply(logits, [0, -1])
    assert processed.dtype == dtype
    ids = torch.tensor([PROMPT + OUTPUT])
    expected = logits[:1].float().cpu()
    for make in (fl.RepetitionPenaltyLogitsProcessor(1.3), fl.FrequencyPenaltyLogitsProcessor(0.1)):
        expected = chain(make)(ids, expected, prompt_length=len(PROMPT))
    expected[:, 3] = -INF
    assert torch.equal(processed[:1].cpu(), expected.to(dtype))
    assert torch.equal(processed[1], logits[1])
    others = wide[1::2].clone()
    assert batch.apply_(logits, [0, -1]) is logits
    assert torch.equal(logits, processed)
    assert torch.equal(wide[1::2], others)


def test_ties_of_the_lowest_ids_in_place(device, path):
    """Of tokens that tie at the cut-off SGLang keeps as many as it takes, the lowest ids first."""
    batch = BatchProcessor(2, V, device, max_length=8, semantics="sglang")
    slots = [batch.add(RequestParams(top_k=3)), batch.add(RequestParams(top_p=0.45))]
    logits = torch.zeros(2, V, device=device)
    logits[:, 40:50] = 9.0
    kept = (batch.apply_(logits, slots) > -INF).nonzero()[:, 1].tolist()
    assert kept == [40, 41, 42, 40, 41, 42, 43, 44]


def test_greedy_ignores_truncations(device, path):
    batch = BatchProcessor(1, V, device, max_length=8)
    batch.add(RequestParams(temperature=0, top_k=3, min_p=0.5))
    logits = logits_of(1).to(device)
    assert torch.equal(batch.apply(logits, [0]), logits)
    assert batch.sample(logits, [0]).tokens.tolist() == logits.argmax(-1).tolist()


def test_semantics_say_the_scope_and_order_that_the_stacks_have(device):
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0]], device=device)
    first = {}
    for semantics in ("transformers", "vllm", "sglang"):
        batch = BatchProcessor(1, 4, device, max_length=8, semantics=semantics)
        batch.add(RequestParams(repetition_penalty=2.0, logit_bias={0: 1.0, 1: 1.0}, bad_words=[[0, 3]]), [0], [1])
        first[semantics] = batch.apply(logits, [0]).tolist()[0]
    assert first["transformers"] == [1.5, 1.0, 0.5, 0.0]
    assert first["vllm"] == [1.5, 1.0, 0.5, 0.0]
    assert first["sglang"] == [3.0, 1.5, 0.5, 0.0]
    ties = torch.zeros(1, 4, device=device)
    for semantics, count in {"transformers": 4, "sglang": 2}.items():
        batch = BatchProcessor(1, 4, device, max_length=8, semantics=semantics)
        batch.add(RequestParams(top_k=2))
        assert int((batch.apply(ties, [0]) > -INF).sum()) == count


def test_min_p_before_top_p_leaves_a_smaller_nucleus(device):
    logits = torch.tensor([[0.5, 0.26, 0.19, 0.05]], device=device).log()
    kept = {}
    for semantics in ("transformers", "vllm"):
        batch = BatchProcessor(1, 4, device, max_length=8, semantics=semantics)
        batch.add(RequestParams(top_p=0.78, min_p=0.2))
        kept[semantics] = int((batch.apply(logits, [0]) > -INF).sum())
    assert kept == {"transformers": 3, "vllm": 2}


def test_log_probabilities_are_those_of_a_sampler(device, path):
    batch = BatchProcessor(3, V, device, max_length=8, max_logprobs=3, max_rows=4)
    batch.add(RequestParams(temperature=0.7, top_k=5, seed=4, logprobs=3))
    batch.add(RequestParams(temperature=0, seed=5, logprobs=1))
    batch.add(RequestParams(seed=6))
    logits = logits_of(4).to(device)
    seeds = torch.tensor([4, 5, 6], device=device)
    for which in ("raw", "processed"):
        sampler = fl.Sampler(
            temperature=torch.tensor([0.7, 0.0, 1.0], device=device), top_k=torch.tensor([5, V, V], device=device),
            logprobs=which, top_logprobs=3,
        )  # fmt: skip
        expected = sampler(logits[:3], seeds, torch.zeros(3, dtype=torch.int64, device=device))
        found = batch.sample(logits, [0, 1, 2, -1], logprobs=which)
        assert torch.equal(found.tokens[:3], expected.tokens)
        for mine, theirs in zip(found[1:], expected[1:], strict=True):
            assert_same(mine[0], theirs[0])
        for mine, theirs in zip(found[1:3], expected[1:3], strict=True):
            assert_same(mine[1], theirs[1])
        assert_same(found.top_tokens[1, :1], expected.top_tokens[1, :1])
        assert found.top_tokens[1, 1:].tolist() == [-1, -1]
        assert found.ranks[2:].tolist() == [0, 0]
        assert bool(found.logprobs[2:].isnan().all())
        assert bool(found.top_logprobs[2:].isnan().all())


def test_seeds_are_drawn_where_none_is_given(device):
    batch = BatchProcessor(2, V, device, max_length=64)
    batch.add(RequestParams())
    batch.add(RequestParams())
    logits = torch.zeros(2, V, device=device)
    positions = [torch.full((2,), n, device=device) for n in range(20)]
    drawn = torch.stack([batch.sample(logits, [0, 1], position).tokens for position in positions])
    assert not torch.equal(drawn[:, 0], drawn[:, 1])


def test_bytes_of_a_slot_grow_with_its_history_and_packed_masks_only(device):
    small, long = (BatchProcessor(2, 128256, device, max_length=length).bytes_per_slot for length in (100, 1100))
    assert long["history"] - small["history"] == 4000
    assert {**long, "history": 0} == {**small, "history": 0}
    assert small["masks"] == 3 * 128256 // 8


# -- Bad input -----------------------------------------------------------------------------------------------------

REFUSED = {
    "temperature": -0.1, "top_k": -2, "top_p": 1.5, "min_p": -1, "typical_p": 0, "epsilon": 1, "eta": 2,
    "top_n_sigma": 0, "top_h": 0, "top_a": -1, "repetition_penalty": 0, "presence_penalty": INF,
    "frequency_penalty": float("nan"),
    "repetition_scope": "prompt", "presence_scope": 1, "dry_multiplier": -1, "dry_base": 0.5, "dry_allowed_length": -1,
    "dry_breakers": "ab", "logit_bias": {1: INF}, "allowed_token_ids": [1.5], "banned_token_ids": [-1],
    "bad_words": [[]], "no_repeat_ngram_size": 1.0, "min_tokens": -1, "stop_token_ids": [-3],
    "first_tokens_suppressed": [None], "first_window": 0, "forced_tokens": [True], "bitmask": 1, "seed": 2**64,
    "logprobs": -1,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_are_checked_when_they_are_made(name):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        RequestParams(**{name: REFUSED[name]})


def test_all_parameters_are_checked():
    assert set(REFUSED) == set(RequestParams.__dataclass_fields__)


BEYOND = {
    "logit_bias": {V: 1.0}, "allowed_token_ids": [V], "banned_token_ids": [V], "bad_words": [[1, V]],
    "stop_token_ids": [V], "first_tokens_suppressed": [V], "forced_tokens": [V], "logprobs": 1,
}  # fmt: skip


def test_what_is_refused_changes_nothing(device):
    batch = BatchProcessor(3, V, device, max_length=8, max_listed=8)
    batch.add(RequestParams(logit_bias={3: 1.0}, seed=1), [1, 2])
    batch.add(RequestParams(repetition_penalty=1.2, seed=2), [3])
    before = [table.clone() for table in batch._slots[:5]]
    slots, vocab = torch.tensor([0, 1], device=device), {"dry_multiplier": 1.0, "dry_breakers": [V]}
    refused = [
        *(("of the vocabulary|outside|max_logprobs", lambda each=each: batch.add(RequestParams(**each))) for each in (
            *({name: value} for name, value in BEYOND.items()), vocab
        )),
        ("max_length", lambda: batch.add(RequestParams(), [1] * 9)),
        ("integers", lambda: batch.add(RequestParams(), [0.5])),
        ("max_listed", lambda: batch.add(RequestParams(logit_bias=dict.fromkeys(range(5), 1.0)))),
        ("RequestParams", lambda: batch.add({"temperature": 1.0})),
        ("slot must be free, got 1", lambda: batch.add(RequestParams(), slot=1)),
        ("must be an integer from 0 to 2", lambda: batch.add(RequestParams(), slot=3)),
        ("holds a request", lambda: batch.remove(2)),
        ("must be an integer from 0 to 2", lambda: batch.remove(-1)),
        ("holds a request", lambda: batch.move(2, 0)),
        ("holds a request", lambda: batch.move(0, 1)),
        ("must be an integer from 0 to 2", lambda: batch.swap(0, 3)),
        ("hold requests", lambda: batch.append([2], [1])),
        ("one token for each", lambda: batch.append([0, 1], [1])),
        ("hold requests", lambda: batch.apply_(logits_of(1).to(device), [2])),
        ("rows", lambda: batch.apply_(logits_of(1).to(device), slots)),
        ("max_rows", lambda: batch.apply_(logits_of(4).to(device), [0, 1, -1, -1])),
        ("floating|float32", lambda: batch.apply_(logits_of(2).to(device).int(), slots)),
        ("float32", lambda: batch.apply_(logits_of(2).to(device)[:, :-1], slots)),
        ("bitmask", lambda: batch.apply_(logits_of(2).to(device), slots, bitmask=torch.zeros(2, 4, device=device))),
        ("together", lambda: batch.apply_(logits_of(2).to(device), slots, local_position=slots)),
        ("int32 or int64", lambda: batch.apply_(logits_of(2).to(device), slots.float())),
        ("logprobs", lambda: batch.sample(logits_of(2).to(device), slots, logprobs="all")),
    ]  # fmt: skip
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(now, then) for now, then in zip(batch._slots[:5], before, strict=True))
    batch.add(RequestParams())
    with pytest.raises(ValueError, match="all 3 slots are taken"):
        batch.add(RequestParams())


@pytest.mark.parametrize(
    ("name", "arguments"),
    {
        "max_requests": {"max_requests": 0}, "vocab_size": {"vocab_size": 0}, "semantics": {"semantics": "ours"},
        "max_length": {"max_length": None}, "max_rows": {"max_rows": 0}, "max_listed": {"max_listed": -1},
        "max_logprobs": {"max_logprobs": V + 1}, "history": {"max_length": None, "history": (torch.zeros(1, 1),) * 3},
    }.items(),
)  # fmt: skip
def test_a_batch_checks_its_arguments(name, arguments):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        BatchProcessor(**{"max_requests": 2, "vocab_size": V, "device": "cpu", "max_length": 8} | arguments)


def test_parameters_survive_pickling():
    params = RequestParams(temperature=0.5, logit_bias={1: 2.0}, banned_token_ids=TokenMask.from_ids([1], V))
    BatchProcessor(1, V, "cpu", max_length=8).add(params)
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params
    assert hash(copy.deepcopy(params)) == hash(params)
    assert replace(params, top_k=3).logit_bias == {1: 2.0}


def test_parameters_do_not_change():
    given = {1: 2.0}
    params = RequestParams(logit_bias=given)
    given[3] = 5.0
    for change in (lambda: params.logit_bias.__setitem__(3, 1.0), lambda: params.logit_bias.update({3: 1.0})):
        with pytest.raises(AttributeError):
            change()
    with pytest.raises(TypeError):
        params.logit_bias[3] = 1.0
    assert repr(params) == "RequestParams(logit_bias={1: 2.0})"
    assert hash(RequestParams()) == hash(RequestParams(logit_bias={}))


def test_a_batch_is_not_copied(device):
    batch = BatchProcessor(2, V, device, max_length=8)
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"a BatchProcessor can't be copied or pickled, .* make another one"):
            take(batch)


# -- On a GPU ------------------------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_captured_graph_serves_every_mix_of_requests(dtype):
    rows, vocab = 16, 32003
    batch = BatchProcessor(rows, vocab, "cuda", max_length=256)
    logits = torch.zeros(rows, vocab, device="cuda", dtype=dtype)
    slots = torch.full((rows,), -1, device="cuda")
    bitmask = torch.zeros(rows, -(-vocab // 32), dtype=torch.int32, device="cuda")

    def step():
        tokens = batch.sample(logits, slots, bitmask=bitmask).tokens
        processed = batch.apply_(logits, slots, bitmask=bitmask)
        batch.append(slots, tokens)
        return tokens, processed

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, processed = step()
    rng, present = random.Random(7), {}
    for turn in range(12):
        for slot in range(rows):
            if slot in present and rng.random() < 0.2:
                batch.remove(slot)
                del present[slot]
            elif slot not in present and rng.random() < 0.5 and turn:
                request = Request(random_params(rng, vocab), history_of(rng.randint(0, 100), slot))
                batch.add(request.params, request.prompt, slot=slot)
                present[slot] = request
        of_rows = [slot if slot in present else -1 for slot in range(rows)]
        slots.copy_(torch.tensor(of_rows))
        given = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(turn)) * 3).to(dtype)
        logits.copy_(given)
        bitmask.copy_(bitmask_of(rows, turn, vocab))
        graph.replay()
        for row, slot in enumerate(of_rows):
            if slot < 0:
                assert torch.equal(processed[row].cpu(), given[row])
                continue
            expected, token = alone(present[slot], given[row], bitmask[row], length=256)
            wrong = ~torch.isclose(
                processed[row].float().cpu(), expected.float(), rtol=1e-2 if dtype != torch.float32 else 1e-5
            )
            assert int(wrong.sum()) <= 1
            present[slot].output.append(int(tokens[row]))
            assert int(tokens[row]) == token


@on_a_gpu
def test_nothing_waits_for_the_device():
    batch = BatchProcessor(4, 32000, "cuda", max_length=64)
    params = replace(random_params(random.Random(1), 32000), bitmask=None)
    logits, slots = torch.randn(4, 32000, device="cuda"), torch.arange(4, device="cuda")
    tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    batch.apply_(logits.clone(), slots)
    batch.sample(logits, slots)
    batch.append(slots, tokens)
    batch.add(params, PROMPT)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one = batch.add(params, PROMPT)
        batch.add(RequestParams(temperature=0.5, top_p=0.9), OUTPUT)
        batch.swap(0, one)
        batch.remove(0)
        batch.move(one, 0)
        batch.append(slots, tokens)
        batch.apply_(logits, slots)
        batch.apply(logits, [0, -1, -1, -1])
        batch.sample(logits, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")
