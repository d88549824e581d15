"""What requests of other engines ask for, without the engines; tests/engines has them."""

import logging
import random
import subprocess
import sys
from enum import Enum
from types import SimpleNamespace

import pytest
import torch

import fastlogits as fl
from fastlogits.integrations import steering
from fastlogits.integrations.steering import CUTS, EDITS, Live, LiveBatch, read_wishes
from fastlogits.integrations.vllm import FastLogitsProcessor

V = 61


def wishes(**given):
    return read_wishes(given, EDITS + CUTS, "here", 0.7)


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
        ({"typical_p": 2.0}, "`typical_p` has to be a number above 0 and at most 1"),
        ({"forced_tokens": [0.5]}, "`forced_tokens`"),
        ("[1]", r"has to be a mapping from names to values, or one in JSON, but is \[1\]"),
        ("{", "or one in JSON, but is '{'"),
        (7, "but is 7"),
        ({"forced_tokens": range(5000)}, "forced_tokens and bad_words take 5000 words .* but may take 3840"),
    ):
        with pytest.raises(ValueError, match=message):
            validated(given)
    with pytest.raises(ValueError, match="forced_tokens don't go with structured outputs"):
        validated({"forced_tokens": [1]}, structured_outputs=object())
    validated({"banned_token_ids": [1]}, structured_outputs=object())


def test_greedy_requests_are_not_truncated_by_probability():
    assert read_wishes({"eta": 0.1}, CUTS, "here", 0.0).cuts is None
    assert read_wishes({"eta": 0.1}, CUTS, "here", 0.5).cuts.temperature == 0.5


def test_live_lists(device):
    """Requests come, speak, take back, move about and go; each row is what its list says, whatever went before."""
    random.seed(0)
    torch.manual_seed(0)
    batch = LiveBatch(V, torch.device(device), max_requests=3, max_length=13, preset="vllm")
    lives = [None]
    for step in range(120):
        if random.random() < 0.3:
            prompt = random.choices(range(V), k=random.randint(0, 9))
            lives.append(Live(wishes(no_repeat_ngram_size=1), prompt, []))
        for live in lives[1:]:
            if random.random() < 0.7:
                live.outputs.append(random.randrange(V))
        if len(lives) > 5 or random.random() < 0.1:
            gone = lives.pop() if len(lives) > 1 else None
            if gone is not None and step % 2:  # others are forgotten when their slots are needed
                batch.let_go(gone)
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
    made = [wishes(epsilon=0.05), wishes(eta=0.1, banned_token_ids=[3]), wishes(typical_p=0.6), wishes(top_n_sigma=1.0)]
    out = LiveBatch(V, logits.device, 4, 8, "vllm").process_(logits.clone(), [Live(each, [], []) for each in made])
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
    live, beside = Live(wishes(no_repeat_ngram_size=1), [1], []), Live(wishes(banned_token_ids=[5]), [1], [])
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
    assert not processor.add_request(0, asking())
    processor.apply_staged_writes()
    assert step(*drafts) == [[6], [], [], [], []]


def test_nothing_is_imported_before_a_request_asks():
    code = (
        "import sys, fastlogits.integrations.vllm as v; v.FastLogitsProcessor;"
        "print([m for m in ('transformers', 'triton', 'fastlogits.serving', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
