"""What is kept of long histories: a step that takes it finds the same bits as one that reads the whole history."""

import random

import pytest
import torch
from fastlogits_kernels.pointwise.fold import launch_fold
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.runtime.bits import unpack_bits
from fastlogits_kernels.serving import layout
from fastlogits_kernels.serving import steps as slot_sets
from fastlogits_kernels.serving.history import cover_launch
from fastlogits_kernels.serving.layout import IndexSizes, StepRows
from fastlogits_kernels.serving.reference import reference_slots
from fastlogits_kernels.serving.search import launch_slot_sets

from fastlogits import BatchProcessor, RequestParams

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"),
]

V, L = 101, 200


@pytest.fixture
def short(monkeypatch):
    """Histories that a test can fill have an index, and spans of a few tokens."""
    monkeypatch.setattr(layout, "SPAN_BLOCK", 4)
    monkeypatch.setattr(layout, "_SHORT", 16)
    monkeypatch.setattr(layout, "_FEWEST_HASHES", 16)
    monkeypatch.setattr(slot_sets, "FORCE_KERNEL", True)


def asked(rng: random.Random) -> RequestParams:
    """Parameters of which each looks back in some way."""
    options = {}
    if rng.random() < 0.5:
        options["repetition_penalty"] = rng.choice([0.8, 1.3])
        options["repetition_scope"] = rng.choice(["all", "output", None])
    if rng.random() < 0.5:
        options |= rng.choice([{"presence_penalty": 0.5}, {"frequency_penalty": 0.3, "presence_penalty": -0.2}])
        options["presence_scope"] = rng.choice(["all", "output", None])
    if rng.random() < 0.4:
        options["no_repeat_ngram_size"] = rng.choice([1, 2, 3, 4, 7])
    if rng.random() < 0.5:
        options |= {"dry_multiplier": 0.7, "dry_base": 1.2, "dry_allowed_length": rng.choice([0, 1, 2, 3, 6])}
        options["dry_breakers"] = rng.choice([(), (2,)])
    if rng.random() < 0.3:
        options |= {"logit_bias": {3: 0.5, 90: 1.0}, "bad_words": [[1, 2], [90]]}
    return RequestParams(**options, seed=1)


def found(batch: BatchProcessor, logits: torch.Tensor, rows: StepRows) -> torch.Tensor:
    made = batch._step.workspace
    out = torch.empty_like(logits)
    launch_fold(logits, out, made.chain, launch_slot_sets(made, logits, rows, False))
    return out


def check(batch: BatchProcessor, rows: StepRows, seed: int) -> None:
    logits = (torch.randn(len(rows.slots), V, generator=torch.Generator().manual_seed(seed)) * 3).to(batch.device)
    expected, _ = reference_slots(logits, batch._slots, rows, batch._step.semantics, False)
    assert torch.equal(found(batch, logits, rows), expected)


def covered(batch: BatchProcessor) -> list[int]:
    return batch._slots.records[:, layout.INDEXED.value].tolist()


class Machine:
    """A batch whose requests come and go, grow, change places, and are looked at."""

    def __init__(self, seed: int, device: str, semantics: str) -> None:
        self.rng, self.device = random.Random(seed), device
        self.batch = BatchProcessor(4, V, device, max_length=L, max_rows=16, semantics=semantics)
        assert self.batch._slots.indices.memory is not None
        assert self.batch.bytes_per_slot["index"] <= self.batch.bytes_per_slot["history"]

    def ids(self, most: int) -> list[int]:
        return [self.rng.choice([0, 1, 2, 2, 3, 5, V - 1, V + 7, -4]) for _ in range(self.rng.randrange(most))]

    def tensor(self, values) -> torch.Tensor:
        return torch.tensor(values, device=self.device)

    def act(self) -> None:
        often = [self.add, self.append] * 2
        self.rng.choice([*often, self.accept, self.swap, self.remove, self.update])()

    def add(self) -> None:
        free = [slot for slot in range(4) if slot not in self.batch]
        if free:
            self.batch.add(asked(self.rng), self.ids(90), self.ids(60), slot=self.rng.choice(free))

    def remove(self) -> None:
        slot = self.rng.randrange(4)
        if slot in self.batch:
            self.batch.remove(slot)

    def update(self) -> None:
        slot = self.rng.randrange(4)
        if slot in self.batch:
            self.batch.update(slot, asked(self.rng))

    def swap(self) -> None:
        self.batch.swap(self.rng.randrange(4), self.rng.randrange(4))

    def append(self) -> None:
        slots = [self.rng.randrange(-1, 5) for _ in range(self.rng.randrange(1, 12))]
        tokens = [self.rng.choice([0, 1, 2, 3, 5, V + 7, -1, 2**40]) for _ in slots]
        slot_sets.append_tokens(self.batch._slots, self.tensor(slots), self.tensor(tokens))

    def accept(self) -> None:
        slots, drafts = self.drafts()
        tokens = [each if self.rng.random() < 0.8 else 1 for each in drafts[1:]] + [2]
        given = self.tensor(tokens).clamp(min=0), self.tensor(drafts)
        slot_sets.accept_drafts(self.batch._slots, self.tensor(slots), *given, True)

    def drafts(self) -> tuple[list[int], list[int]]:
        slots = [slot for slot in self.rng.sample(range(4), 3) for _ in range(self.rng.randrange(1, 4))]
        return slots, [self.rng.choice([0, 1, 2, 3, V + 7]) for _ in slots]

    def look(self, seed: int) -> None:
        slots, drafts = self.drafts()
        local = [slots[: row + 1].count(slot) - 1 for row, slot in enumerate(slots)]
        rows = StepRows(self.tensor(slots), draft_ids=self.tensor(drafts), local_position=self.tensor(local))
        check(self.batch, rows, seed)
        back = [max(int(self.batch.lengths[slot]) - self.rng.randrange(0, 9), 0) - 1 for slot in range(4)]
        check(self.batch, StepRows(torch.arange(4, device=self.device), self.tensor(back)), seed)


@pytest.mark.parametrize(("seed", "semantics"), [(0, "transformers"), (1, "sglang")])
def test_an_index_is_right_whatever_happens_to_a_batch(device, short, seed, semantics):
    machine = Machine(seed, device, semantics)
    for step in range(12):
        for _ in range(3):
            machine.rng.choice(
                [machine.add, machine.add, machine.append, machine.accept, machine.swap, machine.remove]
            )()
        if step % 2:
            machine.look(step)
    assert any(covered(machine.batch))


def test_a_step_covers_the_history_of_an_engine_that_only_grows(device, short):
    """Several rows of a slot bring its index up to date once; a slot that is added anew begins anew."""
    rng = random.Random(4)
    tokens = torch.zeros(3, L, dtype=torch.int64, device=device)
    prompts, lengths = (torch.zeros(3, dtype=torch.int64, device=device) for _ in range(2))
    batch = BatchProcessor(3, V, device, history=(tokens, prompts, lengths), history_grows=True, max_rows=8)
    slots = torch.tensor([0, 2, 2, 1, 0], device=device)
    for step in range(5):
        for slot in range(3):
            if slot not in batch or rng.random() < 0.1:
                if slot in batch:
                    batch.remove(slot)
                batch.add(asked(rng), slot=slot)
                prompts[slot] = lengths[slot] = rng.randrange(70)
                tokens[slot] = torch.tensor([rng.choice([1, 2, 3, V + 5, 2**33]) for _ in range(L)])
            lengths[slot] = min(L, int(lengths[slot]) + rng.randrange(5))
        rows = StepRows(slots, draft_ids=torch.tensor([1, 2, 3, 1, 2], device=device),
                        local_position=torch.tensor([0, 0, 1, 0, 0], device=device))  # fmt: skip
        launcher.launch_together([cover_launch(batch._slots, slots, slots)])
        looks = (batch._slots.records[:, [layout.GRAM.value]] > 0).any(1)
        looks |= (batch._slots.records[:, layout.FLAGS.value] & layout.TALLIED.value) != 0
        assert torch.equal(batch._slots.records[:, layout.INDEXED.value], torch.where(looks, lengths, 0).int())
        check(batch, rows, step)
    slots = torch.arange(3, device=device)
    lengths.clamp_(max=L - 3).add_(2)
    batch.sample(torch.randn(3, V, device=device), slots)
    assert torch.equal(batch._slots.records[:, layout.INDEXED.value], torch.where(looks, lengths, 0).int())


def test_only_an_engine_says_that_its_history_grows():
    with pytest.raises(ValueError, match="history_grows must be False without a history"):
        BatchProcessor(1, V, "cpu", max_length=L, history_grows=True)


def test_what_an_index_holds(device, short):
    """Bits, counts with their carries, and spans; and how far it goes."""
    batch = BatchProcessor(2, V, device, max_length=L)
    prompt, output = [3, 4, 3, V + 1], [5, 6] * 40 + [-1, 5]
    params = RequestParams(repetition_penalty=1.1, frequency_penalty=0.1, no_repeat_ngram_size=3)
    batch.add(params, prompt, output[:-1])
    batch.add(RequestParams(), prompt)
    assert covered(batch) == [0, 0]
    slot_sets.append_tokens(batch._slots, *[torch.tensor(each, device=device) for each in ([0, 1], [5, 6])])
    assert covered(batch) == [len(prompt) + len(output), 0]  # nothing looks back at the other

    sizes, memory = batch._slots.indices.sizes, batch._slots.indices.memory[0].cpu()
    assert unpack_bits(memory[: sizes.W], V).nonzero().flatten().tolist() == [3, 4, 5, 6]
    planes = memory[sizes.planes_at :][: 4 * sizes.W].view(4, sizes.W)
    counts = sum(unpack_bits(plane, V).int() << bit for bit, plane in enumerate(planes))
    carries = memory[sizes.planes_at + 4 * sizes.W :]
    carried = torch.bincount(carries[1 : 1 + carries[0]], minlength=V) * 16
    expected = torch.zeros(V, dtype=torch.int64)
    expected[[5, 6]] = torch.tensor([41, 40])
    assert torch.equal(counts + carried, expected)
    in_spans = memory[sizes.W : sizes.planes_at]
    assert in_spans.count_nonzero() <= len({*zip(prompt + output, (prompt + output)[1:], strict=False)})
    check(batch, StepRows(torch.tensor([0, 1], device=device)), 0)


def test_a_row_that_sees_less_than_the_index_reads_what_it_sees(device, short):
    batch = BatchProcessor(1, V, device, max_length=L)
    batch.add(RequestParams(repetition_penalty=1.5, frequency_penalty=0.3, dry_multiplier=1.0), [1, 2, 3])
    slot_sets.append_tokens(batch._slots, torch.zeros(6, dtype=torch.int64, device=device),
                            torch.tensor([1, 2, 9, 1, 2, 8], device=device))  # fmt: skip
    for position in range(-1, 12):
        check(batch, StepRows(torch.tensor([0], device=device), torch.tensor([position], device=device)), 1)


def test_a_token_whose_count_was_carried_whole_is_penalised(device, short):
    """Of 16 or 32 occurrences nothing is left in the bits of a count."""
    batch = BatchProcessor(1, V, device, max_length=L)
    batch.add(RequestParams(frequency_penalty=0.25), [7], [5] * 16 + [6] * 32 + [9])
    slot_sets.append_tokens(batch._slots, *[torch.tensor([each], device=device) for each in (0, 9)])
    check(batch, StepRows(torch.tensor([0], device=device)), 2)


def test_what_an_index_doesn_t_cover_yet_is_read(device, short):
    """The first token behind it may be the last of an n-gram, or of what DRY looks for."""
    for options in ({"no_repeat_ngram_size": 3}, {"dry_multiplier": 1.0, "dry_allowed_length": 2}):
        batch = BatchProcessor(1, V, device, max_length=L, max_rows=8)
        batch.add(RequestParams(**options), [9, 8])
        slot_sets.append_tokens(batch._slots, *[torch.tensor([each], device=device) for each in (0, 1)])
        assert covered(batch) == [3]
        slots = torch.zeros(5, dtype=torch.int64, device=device)
        drafts, local = torch.tensor([1, 2, 3, 1, 2], device=device), torch.arange(5, device=device)
        check(batch, StepRows(slots, draft_ids=drafts, local_position=local), 3)


@pytest.mark.parametrize("vocab", [32_000, 128_256, 151_936])
def test_an_index_takes_no_more_memory_than_the_history(vocab):
    for length in (1, 512, 4096, 4097, 8192, 16_384, 32_768, 131_072, 2**20):
        sizes = IndexSizes.of(vocab, length)
        assert sizes.total <= length
        assert length > 4096 or not sizes.total
        if sizes.total:
            assert 32 * sizes.span >= length
    assert IndexSizes.of(vocab, 32_768).carries
    assert IndexSizes.of(vocab, 131_072).carries


@pytest.mark.parametrize(("longest", "again"), [(24_576, 100), (70_000, 2500)])
def test_an_index_of_the_sizes_of_real_batches(device, monkeypatch, longest, again):
    """Real spans and hashes, a vocabulary of several ranges, and a history of several blocks."""
    monkeypatch.setattr(slot_sets, "FORCE_KERNEL", True)
    vocab = 70_001
    batch = BatchProcessor(1, vocab, device, max_length=longest)
    assert batch._slots.indices.sizes.carries
    text = (torch.rand(5000, generator=torch.Generator().manual_seed(0)) ** 4 * vocab).long().tolist()
    text += text[again : again + 60]
    options = {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "dry_multiplier": 0.5, "no_repeat_ngram_size": 4}
    batch.add(RequestParams(**options, presence_scope="all"), text)
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(1)).to(device)
    for token in text[again + 60 : again + 62]:
        slot_sets.append_tokens(batch._slots, *[torch.tensor([each], device=device) for each in (0, token)])
        rows = StepRows(torch.tensor([0], device=device))
        expected, _ = reference_slots(logits, batch._slots, rows, batch._step.semantics, False)
        assert torch.equal(found(batch, logits, rows), expected)
        assert (expected != logits).sum() > 1000
