"""Machines that do at random what a run and a serving engine do, step after step, and compare at each.

Here they take the same few examples each time; ``make fuzz`` looks for new ones, see ``tests/campaign/fuzz.py``.
"""

import copy
import pickle
import random
from collections import Counter

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fastlogits as fl
from fastlogits.plan.stages import Truncate
from fastlogits.processors.base import member_of
from tests import entries
from tests.oracle import check_truncation
from tests.parity.test_processors import (
    PATH,
    RELAXED,
    _pickles,
    build,
    check_chain,
    draw_case,
    draw_chain,
    draw_dtype,
    draw_ids,
    draw_layout,
    draw_scores,
    one_by_one,
    prepared,
    reference,
)
from tests.serving.test_batch import Request, alone, assert_same, bitmask_of, history_of, random_params

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*deterministic.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS: Counter[str] = Counter()
"""Steps that each machine has done."""

CHOSEN = entries.kinds(lambda entry: entry.rows == 1)
# What may be set between two steps, on both sides.
SET = {
    "TemperatureLogitsWarper": ("temperature", st.floats(0.1, 5)),
    "RepetitionPenaltyLogitsProcessor": ("penalty", st.floats(0.5, 2)),
    "TopPLogitsWarper": ("top_p", st.floats(0.01, 1)),
    "MinPLogitsWarper": ("min_p", st.floats(0, 1)),
}


class ListMachine(RuleBasedStateMachine):
    """One list through runs: each step beside transformers' objects one by one, truncations beside the oracle too."""

    @initialize(data=st.data())
    def begin(self, data):
        draw = data.draw
        self.case = draw_case(draw)
        self.dtype = draw_dtype(draw, PATH)
        self.chain = draw_chain(draw, self.case, 4, CHOSEN)
        self.whose = [draw(st.sampled_from([fl, fl, reference])) for _ in self.chain]
        self.ids = draw_ids(draw, self.case.B, self.case.V, self.case.L)
        self.renew()

    def renew(self):
        """Begin a run: some processors carry what they have seen from step to step."""
        self.theirs = [self.made(reference, link) for link in self.chain]
        pairs = zip(self.whose, self.chain, strict=True)
        self.ours = fl.LogitsProcessorList([self.made(module, link) for module, link in pairs])

    def made(self, module, link):
        return prepared(build(module, *link), self.case)

    @invariant()
    def count(self):
        STEPS["list"] += 1

    # -- What a run does -----------------------------------------------------------------------------------------

    @rule(data=st.data(), how=st.sampled_from(["list", "list", "in place", "run", "apart"]))
    def step(self, data, how):
        scores = self.scores(data)
        ways = {
            "list": self.ours,
            "in place": lambda ids, scores: self.ours.apply_(ids, scores.clone()),
            "run": self.ours.for_run(),
            "apart": self.apart,
        }
        self.compare(scores, ways[how], rounded=how == "in place")

    @rule(data=st.data(), window=st.integers(1, 3))
    def step_at_a_known_position(self, data, window):
        """The same behind a processor of our own that asks which step of the run this is."""
        draw, device = data.draw, self.ids.device
        B, L = self.ids.shape
        prompt = draw(st.lists(st.integers(0, L), min_size=B, max_size=B))
        banned = draw(st.lists(st.integers(0, self.case.V - 1), min_size=1, max_size=3))
        if draw(st.booleans()):
            prompt_length, steps = prompt[0], torch.full((B,), L - prompt[0])
        else:
            prompt_length, steps = torch.tensor(prompt, device=device), L - torch.tensor(prompt)
        cache_position = draw(st.sampled_from([None, L - 1, torch.tensor(L - 1, device=device)]))
        scores = self.scores(data)
        allowed = scores.clone()
        rows = (steps < window).nonzero().to(device)
        allowed[rows, torch.tensor(banned, device=device)] = -float("inf")
        listed = fl.LogitsProcessorList([fl.SuppressFirstTokens(banned, window=window), *self.ours])
        at = {"prompt_length": prompt_length, "cache_position": cache_position}
        self.compare(allowed, lambda ids, _: listed(ids, scores, **at))

    @rule(data=st.data(), count=st.integers(1, 3))
    def append(self, data, count):
        new = draw_ids(data.draw, len(self.ids), self.case.V, count)
        self.ids = torch.cat([self.ids, new], 1)

    @rule(data=st.data())
    def rewind(self, data):
        self.ids = self.ids[:, : data.draw(st.integers(0, self.ids.shape[1]))]

    @rule(data=st.data())
    def reorder(self, data):
        """As beam search does; the histories then lie in a larger tensor."""
        last = len(self.ids) - 1
        rows = data.draw(st.lists(st.integers(0, last), min_size=last + 1, max_size=last + 1))
        self.ids = draw_layout(data.draw, self.ids[rows], 0)

    @rule(data=st.data(), B=st.integers(1, 5), L=st.integers(0, 20))
    def another_batch(self, data, B, L):
        self.renew()
        self.ids = draw_ids(data.draw, B, self.case.V, L)

    # -- What becomes of the list --------------------------------------------------------------------------------

    @rule(data=st.data())
    def insert(self, data):
        [link] = draw_chain(data.draw, self.case, 1, CHOSEN)
        at = data.draw(st.integers(0, len(self.chain)))
        self.chain.insert(at, link)
        self.whose.insert(at, fl)
        self.theirs.insert(at, self.made(reference, link))
        self.ours.insert(at, self.made(fl, link))

    @precondition(lambda self: len(self.chain) > 1)
    @rule(data=st.data())
    def remove(self, data):
        at = data.draw(st.integers(0, len(self.chain) - 1))
        for each in (self.chain, self.whose, self.theirs, self.ours):
            del each[at]

    @rule()
    def turn_around(self):
        for each in (self.chain, self.whose, self.theirs, self.ours):
            each.reverse()

    @precondition(lambda self: any(name in SET for name, _ in self.chain))
    @rule(data=st.data())
    def set_an_attribute(self, data):
        at = data.draw(st.sampled_from([at for at, (name, _) in enumerate(self.chain) if name in SET]))
        name, arguments = self.chain[at]
        attribute, values = SET[name]
        value = data.draw(values)
        self.chain[at] = (name, {**arguments, attribute: value})
        for side in (self.theirs, self.ours):
            setattr(list(side)[at], attribute, value)

    @precondition(lambda self: all(name != "WatermarkLogitsProcessor" for name, _ in self.chain))  # holds a generator
    @rule(pickled=st.booleans())
    def copy_the_list(self, pickled):
        if pickled and _pickles(self.theirs):
            self.ours = pickle.loads(pickle.dumps(self.ours))
        else:
            self.ours = copy.deepcopy(self.ours)

    # -- Comparison ----------------------------------------------------------------------------------------------

    def scores(self, data):
        nan = all(entries.ENTRIES[name].nan for name, _ in self.chain)
        special = data.draw(st.booleans())
        return draw_scores(data.draw, len(self.ids), self.case.V, self.dtype, special, nan)

    def apart(self, ids, scores):
        scores = scores.clone()  # some of transformers' own write to them
        for processor in self.ours:
            scores = processor(ids, scores)
        return scores

    def compare(self, scores, ours, rounded=False):
        """Compare ``ours`` with transformers, whose result is ``rounded`` to the dtype of the scores."""
        if not self.ids.shape[1] and any(entries.ENTRIES[name].stateful for name, _ in self.chain):
            return  # the state of transformers' text watermark shrinks with each call that brings no token
        stages = one_by_one(self.chain, self.theirs, self.ids, scores)
        # Where transformers' own broadcast what they hold to more rows, no row has a position of its own.
        if stages is None or len(stages[-1][1]) != len(scores):
            self.renew()
            return
        if rounded:
            given, made = stages.pop()
            stages.append((given, made.to(scores.dtype)))
        check_chain(self.chain, self.case, stages, self.ids, scores, ours, PATH)
        if self.dtype != torch.float32:
            return
        for processor, (given, _) in zip(self.ours, stages, strict=True):
            stage = member_of(processor).stage
            if isinstance(stage, Truncate) and all(rule.filter_value == -float("inf") for rule in stage.rules):
                found = fl.LogitsProcessorList([processor])(self.ids, given)
                check_truncation(given, stage.rules, found)


SLOTS, VOCAB, LONGEST = 4, 37, 24


class BatchMachine(RuleBasedStateMachine):
    """A batch of requests that come, go and move: each row of a step beside a batch of its request alone."""

    @initialize(semantics=st.sampled_from(["transformers", "vllm", "sglang"]), seed=st.integers(0, 2**32))
    def begin(self, semantics, seed):
        self.semantics = semantics
        self.rng = random.Random(seed)  # of what is not worth shrinking: parameters, logits, tokens
        self.batch = fl.BatchProcessor(SLOTS, VOCAB, DEVICE, max_length=LONGEST, semantics=semantics, max_rows=16)
        self.present: dict[int, Request] = {}

    @invariant()
    def the_batch_knows_who_is_there(self):
        STEPS["batch"] += 1
        assert len(self.batch) == len(self.present)
        assert [slot in self.batch for slot in range(SLOTS)] == [slot in self.present for slot in range(SLOTS)]

    def tokens(self, most):
        few = self.rng.choice([4, VOCAB])
        return [self.rng.randrange(few) for _ in range(self.rng.randint(0, most))]

    # -- Requests ------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.present) < SLOTS)
    @rule(data=st.data(), chosen=st.booleans())
    def add(self, data, chosen):
        free = [slot for slot in range(SLOTS) if slot not in self.present]
        wanted = data.draw(st.sampled_from(free)) if chosen else None
        request = Request(random_params(self.rng, VOCAB), self.tokens(12), self.tokens(4))
        slot = self.batch.add(request.params, request.prompt, request.output, slot=wanted)
        assert slot == (free[0] if wanted is None else wanted)
        self.present[slot] = request

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def remove(self, data):
        slot = data.draw(st.sampled_from(sorted(self.present)))
        self.batch.remove(slot)
        del self.present[slot]

    @precondition(lambda self: 0 < len(self.present) < SLOTS)
    @rule(data=st.data())
    def move(self, data):
        source = data.draw(st.sampled_from(sorted(self.present)))
        target = data.draw(st.sampled_from([slot for slot in range(SLOTS) if slot not in self.present]))
        self.batch.move(source, target)
        self.present[target] = self.present.pop(source)

    @rule(a=st.integers(0, SLOTS - 1), b=st.integers(0, SLOTS - 1))
    def swap(self, a, b):
        self.batch.swap(a, b)
        places = {a: b, b: a}
        self.present = {places.get(slot, slot): request for slot, request in self.present.items()}

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def append(self, data):
        """Tokens for some requests, several for one, and more than there is room for."""
        slots = data.draw(st.lists(st.sampled_from([*sorted(self.present), -1]), min_size=1, max_size=6))
        self.keep(slots, [self.rng.randrange(VOCAB) for _ in slots])

    def keep(self, slots, tokens):
        before = {slot: len(each.prompt) + len(each.output) for slot, each in self.present.items()}
        given = torch.tensor(slots, device=DEVICE), torch.tensor(tokens, device=DEVICE)
        if DEVICE == "cpu" and any(before[slot] + slots.count(slot) > LONGEST for slot in before):
            with pytest.raises(ValueError, match="must leave each history at most"):
                self.batch.append(*given)
            return
        self.batch.append(*given)
        for slot, token in zip(slots, tokens, strict=True):
            request = self.present.get(slot)
            if request is not None and len(request.prompt) + len(request.output) < LONGEST:
                request.output.append(token)

    # -- Steps ---------------------------------------------------------------------------------------------------

    @rule(data=st.data(), grows=st.booleans())
    def step(self, data, grows):
        """Some of the requests in any order, and a row of none."""
        slots = data.draw(st.permutations([*sorted(self.present), -1]))[: data.draw(st.integers(1, SLOTS + 1))]
        tokens = self.compare(data, slots, [self.present.get(slot) for slot in slots])
        if grows:
            self.keep(slots, tokens)

    @precondition(lambda self: self.present)
    @rule(data=st.data())
    def rewind(self, data):
        """A step at a position before the end of the history, or at its end."""
        slots = data.draw(st.permutations(sorted(self.present)))
        seen = []
        for slot in slots:
            request = self.present[slot]
            output = request.output[: data.draw(st.integers(0, len(request.output)))]
            seen.append(Request(request.params, request.prompt, output))
        positions = torch.tensor([len(each.prompt) + len(each.output) - 1 for each in seen], device=DEVICE)
        self.compare(data, slots, seen, cache_position=positions)

    @precondition(lambda self: any(len(each.prompt + each.output) < LONGEST - 4 for each in self.present.values()))
    @rule(data=st.data(), known=st.booleans())
    def drafts(self, data, known):
        """Rows of draft tokens: the first was fed with a token that the history doesn't hold yet."""
        slots, seen, fed, local = [], [], [], []
        for slot in data.draw(st.permutations(sorted(self.present))):
            request = self.present[slot]
            if len(request.prompt + request.output) >= LONGEST - 4 or not request.prompt + request.output:
                continue
            first = [*request.prompt, *request.output][-1]
            drafts = history_of(data.draw(st.integers(0, 3)), self.rng.getrandbits(32), VOCAB)
            for j in range(len(drafts) + 1):
                slots.append(slot)
                local.append(j)
                fed.append(drafts[j - 1] if j else first)
                seen.append(Request(request.params, request.prompt, request.output + drafts[:j]))
        if not slots:
            return
        given = {"draft_ids": torch.tensor(fed, device=DEVICE), "local_position": torch.tensor(local, device=DEVICE)}
        if known:
            ends = [len(each.prompt) + len(each.output) - 1 for each in seen]
            given["cache_position"] = torch.tensor(ends, device=DEVICE)
        self.compare(data, slots, seen, **given)

    def compare(self, data, slots, seen, **given):
        """Check each row of a step of these requests, and return the tokens that it draws."""
        draw, rows = data.draw, len(slots)
        dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
        logits = draw_scores(draw, rows, VOCAB, dtype, special=False)
        bitmask = bitmask_of(rows, self.rng.getrandbits(32), VOCAB).to(DEVICE)
        indices = torch.tensor(slots, device=DEVICE, dtype=draw(st.sampled_from([torch.int64, torch.int32])))
        before = logits.clone()
        if draw(st.booleans()):
            processed = self.batch.apply(logits, indices, bitmask=bitmask, **given)
        else:
            processed = self.batch.apply_(logits.clone(), indices, bitmask=bitmask, **given)
        tokens = self.batch.sample(logits, indices, bitmask=bitmask, **given).tokens.tolist()
        assert torch.equal(logits, before), "the logits were written"
        for row, request in enumerate(seen):
            if request is None:
                assert torch.equal(processed[row], logits[row])
                assert tokens[row] == 0
                continue
            expected, token = alone(request, logits[row], bitmask[row], self.semantics, LONGEST)
            assert_same(processed[row], expected)
            assert tokens[row] == token
        return tokens


# A GPU compiles kernels for most of the examples: some seconds each.
_SETTINGS = settings(max_examples=60 if DEVICE == "cpu" else 4, stateful_step_count=20, **RELAXED)
TestListMachine, TestBatchMachine = ListMachine.TestCase, BatchMachine.TestCase
TestListMachine.settings = TestBatchMachine.settings = _SETTINGS
