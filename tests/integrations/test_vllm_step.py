"""vLLM's parameters as requests, and the step over an engine's own table of tokens, without vLLM."""

import dataclasses

import pytest
import torch
from fastlogits_kernels.runtime.launcher import HAS_TRITON, collected
from fastlogits_kernels.selection import launch
from fastlogits_kernels.serving import layout, steps

import fastlogits as fl
from fastlogits import warm_up as warming
from fastlogits.integrations.requests import EDITS, TRUNCATIONS, has_room_for_index, read_options
from fastlogits.integrations.vllm_params import ELSEWHERE, TRANSLATED, end_tokens, translate, unknown_fields
from fastlogits.integrations.vllm_step import EndTokens, Places, Rows, StepOfSlots

V, S, L = 40, 6, 32
NEG = float("-inf")


class Sampling:
    """vLLM's parameters at their defaults."""

    __struct_fields__ = tuple(sorted(TRANSLATED | ELSEWHERE))

    def __init__(self, **given):
        self.__dict__.update(dict.fromkeys(self.__struct_fields__))
        self.__dict__.update(
            n=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
            frequency_penalty=0.0, min_tokens=0, all_stop_token_ids={2}, bad_words_token_ids=None,
        )  # fmt: skip
        self.__dict__.update(given)


def changed(params):
    """The fields that are not at their defaults."""
    default = fl.RequestParams()
    names = [field.name for field in dataclasses.fields(params)]
    return {name: getattr(params, name) for name in names if getattr(params, name) != getattr(default, name)}


ASKED = {
    "nothing": ({}, {}),
    "greedy": ({"temperature": 0.0}, {"temperature": 0.0}),
    "off": ({"top_k": -1, "top_p": 1.0, "min_p": 0.0}, {}),
    "truncations": ({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
                    {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}),
    "penalties": ({"repetition_penalty": 1.3, "presence_penalty": -1.0, "frequency_penalty": 0.5},
                  {"repetition_penalty": 1.3, "presence_penalty": -1.0, "frequency_penalty": 0.5}),
    "bias": ({"logit_bias": {3: 1.0}, "allowed_token_ids": [3, 4]},
             {"logit_bias": {3: 1.0}, "allowed_token_ids": (3, 4)}),
    "an empty list allows all": ({"allowed_token_ids": [], "logit_bias": {}}, {}),
    "bad words": ({"bad_words_token_ids": [[3], [4, 5]]}, {"bad_words": ((3,), (4, 5))}),
    "ends": ({"min_tokens": 3, "all_stop_token_ids": {9, 2, V + 3}}, {"min_tokens": 3, "stop_token_ids": (2, 9)}),
    "no ends": ({"min_tokens": 3, "all_stop_token_ids": set()}, {}),
    "ends of a grammar": ({"min_tokens": 3, "structured_outputs": object()}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_what_a_request_asks_for(name):
    given, expected = ASKED[name]
    made = translate(Sampling(**given), 11, V)
    assert changed(made.params) == {"seed": 11, **expected}
    assert made.ends_if_nothing_is_left is (name == "ends of a grammar")


def test_options_beside_what_vllm_asks_for():
    options = read_options(
        {"no_repeat_ngram_size": 3, "bad_words": [[7]], "epsilon": 0.1, "forced_tokens": [4]},
        EDITS + TRUNCATIONS,
        "",
        0.5,
    )
    made = translate(Sampling(temperature=0.5, bad_words_token_ids=[[8, 9]]), 0, V, options, logprobs=4).params
    assert made.bad_words == ((8, 9), (7,))
    assert (made.no_repeat_ngram_size, made.epsilon, made.forced_tokens, made.logprobs) == (3, 0.1, (4,), 4)


def test_fields_of_a_newer_vllm():
    class Newer(Sampling):
        __struct_fields__ = (*Sampling.__struct_fields__, "mirostat")

    assert unknown_fields(Sampling(temperature=0.3)) == []
    assert unknown_fields(Newer()) == []
    assert unknown_fields(Newer(mirostat=2)) == ["mirostat"]


def test_end_tokens_of_the_logits():
    assert end_tokens(Sampling(all_stop_token_ids={5, 1, V, -1}), V) == (1, 5)


# -- The step ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(device):
    """An engine's table, with some requests in it, and the step over it."""
    torch.manual_seed(0)
    tokens = torch.randint(0, V, (S, L), dtype=torch.int32, device=device)
    lengths = torch.tensor([9, 12, 20, 7, 30, 3], dtype=torch.int32, device=device)
    step = StepOfSlots(V, 3 * S, tokens, lengths, 3)
    step.write_prompts(torch.tensor([4, 5, 6, 7, 8, 3], dtype=torch.int32))
    return step, tokens, lengths


REQUESTS = [
    fl.RequestParams(temperature=0, repetition_penalty=1.5, seed=1, logprobs=3),
    fl.RequestParams(temperature=0.7, top_k=8, top_p=0.9, seed=2, logprobs=3),
    fl.RequestParams(
        temperature=1.3,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        no_repeat_ngram_size=2,
        seed=3,
        logprobs=3,
    ),
    fl.RequestParams(temperature=1.1, logit_bias={3: 2.0}, banned_token_ids=[4], epsilon=0.01, seed=4, logprobs=3),
    fl.RequestParams(temperature=0.9, bad_words=[[5], [6, 7]], forced_tokens=[9] * 40, seed=5, logprobs=3),
]


def rows_of(slots, lengths, drafts=0, tokens=None):
    """A step's rows: each slot's newest token, and draft tokens behind it."""
    device = lengths.device
    each = torch.tensor(slots, device=device).repeat_interleave(1 + drafts)
    local = torch.arange(1 + drafts, device=device).repeat(len(slots))
    positions = lengths[each].long() - 1 + local
    fed = torch.randint(0, V, (len(each),), dtype=torch.int32, device=device)
    fed = torch.where(local == 0, tokens[each, positions.clamp(max=L - 1)], fed)
    return Rows(each, Places(positions, fed, local.int()))


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("logprobs", [None, "raw", "processed"])
def test_one_pass_and_around_others(engine, drafts, logprobs, device):
    step, tokens, lengths = engine
    order = [4, 0, 2, 1, 3]
    made = [dataclasses.replace(params, logprobs=None if logprobs is None else 3) for params in REQUESTS]
    for slot, params in enumerate(made):
        step.add(slot, params)
    rows = rows_of(order, lengths, drafts, tokens)
    logits = torch.randn(len(rows.slots), V, device=device) * 3
    given = logits.clone()
    whole = step.sample(logits, rows, None, logprobs)
    around = step.sample(logits, rows, lambda x: x, logprobs)
    alone = batch_of(made, tokens, lengths).sample(
        logits, rows.slots, rows.places.positions, draft_ids=rows.places.input_ids,
        local_position=rows.places.local_position,
        logprobs=logprobs,
    )  # fmt: skip
    assert torch.equal(whole.tokens, alone.tokens)
    for name in ("tokens", "logprobs", "ranks", "top_tokens", "top_logprobs"):
        ours, theirs = getattr(whole, name), getattr(around, name)
        if logprobs == "raw" and name != "tokens":
            continue  # raw ones are of the logits that are drawn from where others have been
        assert (ours is None) is (theirs is None) is (logprobs is None and name != "tokens")
        if ours is not None:
            torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert torch.equal(step.process(logits, rows, None), step.process(logits, rows, lambda x: x))
    assert torch.equal(logits, given)


def batch_of(requests, tokens, lengths):
    """The same requests in a batch by itself."""
    prompts = torch.tensor([4, 5, 6, 7, 8, 3], dtype=torch.int32, device=tokens.device)
    batch = fl.BatchProcessor(
        S, V, tokens.device, semantics="vllm", max_rows=3 * S, history=(tokens, prompts, lengths), max_logprobs=3
    )
    for slot, params in enumerate(requests):
        batch.add(params, slot=slot)
    return batch


def test_others_act_between_penalties_and_temperature(engine, device):
    step, tokens, lengths = engine
    seen = []

    def prefer(x):
        seen.append(x.clone())
        x[:, ::2] = NEG
        return x

    step.add(0, fl.RequestParams(temperature=2.0, top_k=2, logit_bias={5: 7.0}, seed=1))
    rows = rows_of([0], lengths, tokens=tokens)
    logits = torch.randn(1, V, device=device).bfloat16()
    processed = step.process(logits, rows, prefer)
    expected = logits.float()
    expected[0, 5] += 7.0
    assert torch.equal(seen[0], expected)
    kept = processed.isfinite().nonzero()[:, 1].tolist()
    assert kept == sorted(expected[0, 1::2].topk(2).indices.mul(2).add(1).tolist())
    assert torch.equal(processed[0, kept], (expected / 2.0)[0, kept])


def test_ends_unless_nothing_else_is_left(engine, device):
    step, tokens, lengths = engine
    step.add(1, fl.RequestParams(temperature=0), EndTokens((2, 7, 9), 20))
    step.add(2, fl.RequestParams(temperature=0), EndTokens((3,), 20))
    step.add(0, fl.RequestParams(temperature=0))
    rows = rows_of([1, 2, 0], lengths, tokens=tokens)
    logits = torch.zeros(3, V, device=device)
    logits[0, 7], logits[1, 3], logits[2, 7] = 5, 5, 5
    found = step.process(logits, rows, lambda x: x)
    # The second request has as many tokens as it needs.
    assert found.isneginf().nonzero().tolist() == [[0, 2], [0, 7], [0, 9]]
    logits[0] = NEG
    logits[0, 9] = 1.0
    assert torch.equal(step.process(logits, rows, lambda x: x), logits)
    assert step.sample(logits, rows, lambda x: x).tokens.tolist() == [9, 3, 7]
    step.add(1, fl.RequestParams(temperature=0))
    assert not step.process(torch.zeros(3, V, device=device), rows, lambda x: x).isneginf().any()


def test_slots_that_change_hands(engine, device):
    step, tokens, lengths = engine
    rows, logits = rows_of([0], lengths, tokens=tokens), torch.zeros(1, V, device=device)
    for token in (3, 8):
        step.add(0, fl.RequestParams(temperature=0, logit_bias={token: 1.0}))
        assert [step.sample(logits, rows, each).tokens.item() for each in (None, lambda x: x)] == [token] * 2
    with pytest.raises(ValueError, match="logit_bias must have token ids of the vocabulary"):
        step.add(0, fl.RequestParams(logit_bias={V: 1.0}))
    assert step.sample(logits, rows, None).tokens.item() == 0
    step.remove(0)


def test_longer_lists_than_there_was_room_for(engine, device, monkeypatch):
    step, tokens, lengths = engine
    step.add(1, fl.RequestParams(temperature=0, logit_bias={6: 1.0}))
    rows, logits = rows_of([1, 0], lengths, tokens=tokens), torch.zeros(2, V, device=device)
    step.sample(logits, rows, lambda x: x)
    words = [[1 + i % 30, *[2] * 200] for i in range(60)]
    assert step.sample(logits, rows, None).tokens.tolist() == [6, 0]  # an empty slot's is 0
    step.add(0, fl.RequestParams(temperature=0, bad_words=words, logit_bias={5: 1.0}))
    for foreign in (None, lambda x: x):
        assert step.sample(logits, rows, foreign).tokens.tolist() == [6, 5]


def test_rows_without_places_are_at_the_end_of_their_texts(engine, device):
    step, tokens, lengths = engine
    for slot, params in enumerate(REQUESTS):
        step.add(slot, params)
    there = rows_of([3, 0, 2, 4, 1], lengths, 0, tokens)
    logits = torch.randn(5, V, device=device) * 3
    expected = step.sample(logits, there, None, "processed")
    for rows in (Rows(there.slots), there._replace(has_drafts=False)):
        found = step.sample(logits, rows, None, "processed")
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.top_logprobs, expected.top_logprobs)


def test_drafts_that_are_accepted(engine, device):
    step, _, _ = engine
    for slot in range(4):
        step.add(slot, fl.RequestParams())
    # All are right; one is never accepted; the second is wrong; the first is wrong, and the second right by chance.
    tokens = torch.tensor([5, 6, 7, 1, 9, 4, 4, 4, 8, 9, 9], device=device)
    drafts = torch.tensor([0, 5, 6, 0, -1, 0, 4, 3, 0, 7, 9], dtype=torch.int32, device=device)
    slots = torch.tensor([2, 2, 2, 0, 0, 3, 3, 3, 1, 1, 1], device=device)
    rows = Rows(slots)
    found = step.accept(tokens, rows, drafts, torch.tensor([0, 3, 5, 8, 11], dtype=torch.int32, device=device), 3)
    assert found.counts.tolist() == [3, 1, 2, 1]
    assert found.counts.dtype == torch.int32
    assert [row[:count] for row, count in zip(found.tokens.tolist(), found.counts.tolist(), strict=True)] == (
        [[5, 6, 7], [1], [4, 4], [8]]
    )


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_long_texts_of_the_engine_are_indexed_and_the_tokens_are_the_same(device, monkeypatch):
    """Also after a slot has had another request, whose text is another one."""
    monkeypatch.setattr(layout, "SPAN_BLOCK", 4)
    monkeypatch.setattr(layout, "_SHORT", 16)
    monkeypatch.setattr(layout, "_FEWEST_HASHES", 16)
    slots, length = 3, 200
    text = torch.randint(0, 12, (slots, length), generator=torch.Generator().manual_seed(1)).int().to(device)
    asked = [
        fl.RequestParams(repetition_penalty=1.4, frequency_penalty=0.3, seed=1),
        fl.RequestParams(no_repeat_ngram_size=3, temperature=0.9, seed=2),
        fl.RequestParams(presence_penalty=0.6, dry_multiplier=0.8, dry_allowed_length=1, seed=3),
    ]

    def drawn(kernels: bool, foreign) -> list[list[int]]:
        monkeypatch.setattr(steps, "FORCE_KERNEL", kernels)
        tokens, found = text.clone(), []
        lengths = torch.tensor([100, 60, 80], dtype=torch.int32, device=device)
        step = StepOfSlots(V, 2 * slots, tokens, lengths, 0)
        assert step._whole._slots.indices.by_step
        for slot, params in enumerate(asked):
            step.add(slot, params)
        for turn in range(6):
            step.write_prompts(torch.tensor([50, 40, 80 if turn < 3 else 20], dtype=torch.int32))
            if turn == 3:  # the engine has another request in this slot
                step.add(2, asked[0])
                tokens[2], lengths[2] = tokens[2].roll(7), 30
            rows = rows_of(range(slots), lengths, 0, tokens)
            logits = torch.randn(slots, V, generator=torch.Generator().manual_seed(turn)).to(device)
            new = step.sample(logits, rows, foreign).tokens
            tokens[torch.arange(slots, device=device), lengths.long()] = new.int()
            lengths += 1
            found.append(new.tolist())
        return found

    # On a GPU the kernels run in any case, so there nothing but the engine's own order is compared.
    for foreign in (None, lambda logits: logits):
        assert drawn(True, foreign) == drawn(False, None)


def test_an_index_has_to_be_small():
    def table(slots, length):
        return torch.zeros((), dtype=torch.int32).expand(slots, length)

    assert has_room_for_index(table(256, 131_072), 128_256)
    assert not has_room_for_index(table(1024, 131_072), 128_256)
    assert has_room_for_index(table(10**6, 4096), 128_256)  # none is made


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels are compiled")
@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("logprobs", [None, "processed"])
def test_a_warm_up_compiles_what_steps_launch(monkeypatch, engine, drafts, logprobs):
    step, tokens, lengths = engine
    rehearsed = []
    monkeypatch.setattr(warming, "no_kernels", lambda device: None)
    monkeypatch.setattr(warming, "prepare", lambda launches: rehearsed.extend(launches) or [])
    monkeypatch.setattr(steps, "FORCE_KERNEL", True)
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    step.warm_up(torch.float32, [logprobs] if logprobs else [], drafts > 0)
    for slot, params in enumerate(REQUESTS):
        step.add(slot, dataclasses.replace(params, logprobs=3 if logprobs else None))
    rows = rows_of([3, 0, 2], lengths, drafts, tokens)
    if not drafts:
        rows = Rows(rows.slots)  # as the sampler has them
    with collected() as launches:
        step.sample(torch.randn(len(rows.slots), V), rows, None, logprobs)
    known = {(each.launcher.name, each.key) for each in rehearsed}
    assert launches
    assert not {(each.launcher.name, each.key) for each in launches} - known
