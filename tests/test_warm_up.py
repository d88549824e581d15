"""Kernels compiled before the first call: all that calls launch, and no trace of the warm-up in what they return."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastlogits_kernels.runtime import backend
from fastlogits_kernels.runtime import launcher as runtime
from fastlogits_kernels.runtime.launcher import HAS_TRITON, Launcher, collected, is_collecting, launch_together, prepare
from fastlogits_kernels.selection import launch
from fastlogits_kernels.serving import steps

import fastlogits as fl
from fastlogits import warm_up as warming
from fastlogits.__main__ import main
from tests.kernels.launches import captured

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
V = 1000
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where kernels run; what is only collected is collected of tensors on the CPU."""


@pytest.fixture
def kernels(monkeypatch):
    """Tensors on the CPU take the kernels, as those on a GPU do, and a warm-up has something to compile."""
    for module in (backend, runtime.backend):
        monkeypatch.setattr(module, "wanted_on", lambda device: True)
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    monkeypatch.setattr(steps, "FORCE_KERNEL", True)
    monkeypatch.setattr(warming, "no_kernels", lambda device: None)


def keys(launches):
    return {(each.launcher.name, each.key) for each in launches}


def rehearsed_by(monkeypatch, warm_up):
    """The keys that a warm-up would compile."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(warming, "prepare", lambda launches: found.extend(launches) or [])
        done = warm_up()
    assert done.needed == len(keys(found))
    return keys(found)


# -- A call after a warm-up launches nothing that isn't there ---------------------------------------------------------


def synthid():
    return fl.SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3, keys=[7, 8, 9, 4, 5], sampling_table_size=2**16, sampling_table_seed=0, context_history_size=4,
        device=CPU,
    )  # fmt: skip


class Unknown(fl.LogitsProcessor):
    """What fastlogits doesn't know: it is never called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores * 1.5


TEXT = torch.tensor([[3, 4, 5, 3]])
LISTS = {
    "temperature": lambda: [fl.TemperatureLogitsWarper(0.7)],
    "T k p": lambda: [fl.TemperatureLogitsWarper(0.7), fl.TopKLogitsWarper(50), fl.TopPLogitsWarper(0.9)],
    "p": lambda: [fl.TopPLogitsWarper(0.9)],
    "typical, normalised": lambda: [fl.TypicalLogitsWarper(0.9), fl.LogitNormalization()],
    "min-p after masks": lambda: [fl.SuppressTokensLogitsProcessor([1, 2]), fl.MinPLogitsWarper(0.1)],
    "suppressed": lambda: [fl.SuppressTokensLogitsProcessor([1, 2])],
    "first tokens": lambda: [fl.SuppressFirstTokens([1, 2], window=3)],
    "two windows": lambda: [
        fl.SuppressFirstTokens([1], window=2),
        fl.SuppressFirstTokens(range(V // 2), window=7),
    ],
    "allowed, then first tokens": lambda: [
        fl.OnlyTokensFrom(TEXT, eos_token_id=0),
        fl.SuppressFirstTokens([1], window=3),
    ],
    "allowed from the prompt": lambda: [fl.OnlyTokensFrom("prompt", eos_token_id=0), fl.TemperatureLogitsWarper(0.5)],
    "chain 6": lambda: [
        fl.RepetitionPenaltyLogitsProcessor(1.2),
        fl.NoRepeatNGramLogitsProcessor(3),
        fl.NoBadWordsLogitsProcessor([[1, 2], [3]], eos_token_id=0),
        fl.MinLengthLogitsProcessor(12, 2),
        fl.SuppressFirstTokens([4], window=2),
        fl.TemperatureLogitsWarper(0.7),
    ],
    "chain 8": lambda: [*LISTS["chain 6"](), fl.TopKLogitsWarper(20), fl.TopPLogitsWarper(0.9)],
    "counts": lambda: [fl.FrequencyPenaltyLogitsProcessor(0.5), fl.PresencePenaltyLogitsProcessor(0.5)],
    "biases": lambda: [fl.SequenceBiasLogitsProcessor([[[1, 2], 1.5], [[3], -2.0], [[4, 2], 0.5]])],
    "forced end": lambda: [fl.ForcedEOSTokenLogitsProcessor(9, 2), fl.ForcedBOSTokenLogitsProcessor(1)],
    "decay": lambda: [fl.ExponentialDecayLengthPenalty((3, 1.5), 2, 1)],
    "new tokens": lambda: [fl.MinNewTokensLengthLogitsProcessor(1, 5, 2)],
    "encoder": lambda: [
        fl.EncoderRepetitionPenaltyLogitsProcessor(1.5, TEXT),
        fl.EncoderNoRepeatNGramLogitsProcessor(2, TEXT),
    ],
    "clean": lambda: [fl.InfNanRemoveLogitsProcessor(), fl.SuppressTokensLogitsProcessor([3])],
    "watermark": lambda: [synthid()],
    "watermark, then k": lambda: [fl.TemperatureLogitsWarper(0.5), synthid(), fl.TopKLogitsWarper(5)],
    "around what is unknown": lambda: [
        fl.RepetitionPenaltyLogitsProcessor(1.2), Unknown(), fl.TemperatureLogitsWarper(0.5), fl.TopKLogitsWarper(5)
    ],
    "made for a run": lambda: [
        fl.SuppressFirstTokens([1], window=2).for_run(1), fl.TopKLogitsWarper(5)
    ],
    "around torch": lambda: [fl.DRYLogitsProcessor(0.8), fl.TopKLogitsWarper(5), fl.TemperatureLogitsWarper(0.5)],
}  # fmt: skip


def many_calls(processors, dtype, rows=(1, 2, 5, 90, 140)):
    """Calls of a list that differ in all that a warm-up says changes nothing."""
    for B in rows:
        scores = torch.zeros(B, V, dtype=dtype)
        for P in (1, 4):
            for L in (P, P + 1, P + 3, P + 8, P + 30):
                ids = torch.zeros(B, L, dtype=torch.int64)
                for call in (processors, processors.apply_):
                    for each in processors:
                        if isinstance(each, fl.SynthIDTextWatermarkLogitsProcessor):
                            each.state = None
                    call(ids, scores, prompt_length=P)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(LISTS))
def test_a_list_launches_nothing_new(name, dtype, kernels, monkeypatch):
    if DEVICE.type != "cpu" and name in ("allowed, then first tokens", "allowed from the prompt", "encoder"):
        pytest.skip("a warm-up launches what builds the tables of these, which are on the CPU here")
    processors = fl.LogitsProcessorList(LISTS[name]())
    there = rehearsed_by(monkeypatch, lambda: processors.warm_up(V, dtype, device=CPU))
    assert there or (name, dtype) == ("watermark", torch.bfloat16)  # of which torch is the definition
    with captured() as made:
        many_calls(fl.LogitsProcessorList(LISTS[name]()), dtype)
    wanted = keys(each for each in made if not each.launcher._fills_tables)
    assert wanted <= there, {name for name, _ in wanted - there}
    assert there <= wanted, {name for name, _ in there - wanted}  # and it compiles nothing for nobody


@needs_triton
@pytest.mark.parametrize("make", [lambda: fl.SuppressFirstTokens([1], window=2), lambda: fl.TopKLogitsWarper(5)])
def test_a_processor_by_itself_and_in_a_run(make, kernels, monkeypatch):
    processor = make()
    there = rehearsed_by(monkeypatch, lambda: processor.warm_up(V, device=CPU))
    with captured() as made:
        run = processor.for_run()
        for L in (4, 5, 6):
            run(torch.zeros(2, L, dtype=torch.int64), torch.zeros(2, V))
            run.apply_(torch.zeros(2, L, dtype=torch.int64), torch.zeros(2, V))
    assert keys(made) == there


@needs_triton
def test_positions_on_the_device_and_other_ids_are_those_that_are_given(kernels, monkeypatch):
    processors = fl.LogitsProcessorList(LISTS["chain 8"]())
    given = {
        "prompt_length": torch.tensor([1, 2, 1]), "cache_position": torch.tensor([3, 4, 4]),
    }  # fmt: skip
    ids = torch.zeros(3, 5, dtype=torch.int32)
    warmed = {"batch": 3, "device": CPU, "input_ids": ids, "row_stride": V + 24}
    there = rehearsed_by(monkeypatch, lambda: processors.warm_up(V, **warmed, **given))
    with captured() as made:
        wide = torch.zeros(3, V + 24)
        processors(ids[:, :2], wide[:, :V], **given)
        processors.apply_(ids, wide[:, :V], **given)
    assert keys(made) == there


def test_what_was_made_for_a_run_is_looked_into(kernels):
    inner = fl.LogitsProcessorList([fl.XTCLogitsProcessor(0.5, 0.1), Unknown()]).for_run()
    done = fl.LogitsProcessorList([inner, fl.TopKLogitsWarper(5)]).warm_up(V, device=CPU)
    assert done.needed
    assert done.skipped == (
        "XTCLogitsProcessor, which is some operations of torch",
        "Unknown, which fastlogits doesn't know",
    )
    assert not inner.run._first_lengths


def of_list(*processors):
    """The keys of a call of a list."""
    with captured() as made:
        many_calls(fl.LogitsProcessorList(processors), torch.float32, rows=(2,))
    return keys(made)


def chain(temperature=0.7, k=50, p=0.9, penalty=1.2, banned=(1, 2), bias=1.5, word=(5, 6), window=2):
    return of_list(
        fl.RepetitionPenaltyLogitsProcessor(penalty), fl.SequenceBiasLogitsProcessor([[[3, 4], bias]]),
        fl.NoBadWordsLogitsProcessor([list(word)]), fl.SuppressTokensLogitsProcessor(banned),
        fl.SuppressFirstTokens([4], window=window), fl.TemperatureLogitsWarper(temperature), fl.TopKLogitsWarper(k),
        fl.TopPLogitsWarper(p),
    )  # fmt: skip


@needs_triton
def test_values_compile_nothing_as_the_page_says(kernels):
    same = chain()
    for change in (
        {"temperature": 1.3}, {"k": 2}, {"k": 400}, {"p": 0.5}, {"penalty": 0.8}, {"banned": range(700)},
        {"bias": -2.0}, {"word": (9, 8, 7)}, {"window": 9},
    ):  # fmt: skip
        assert chain(**change) == same, change
    for change in ({"k": 500}, {"k": 950}, {"p": 1.0}):
        assert chain(**change) != same, change
    assert of_list(fl.NoRepeatNGramLogitsProcessor(2)) != of_list(fl.NoRepeatNGramLogitsProcessor(3))


SAMPLERS = {
    "plain": lambda device=CPU, **more: fl.Sampler(**more),
    "greedy": lambda device=CPU, **more: fl.Sampler(temperature=0.0, **more),
    "T k p": lambda device=CPU, **more: fl.Sampler(temperature=0.7, top_k=50, top_p=0.9, **more),
    "by row": lambda device=CPU, **more: fl.Sampler(
        temperature=torch.ones(3, device=device), top_p=torch.full((3,), 0.9, device=device), **more
    ),
    "of a list": lambda device=CPU, **more: fl.Sampler(LISTS["chain 8"](), **more),
    "after a list": lambda device=CPU, **more: fl.Sampler(
        LISTS["chain 6"](), top_k=5, order="vllm", ties="lowest", **more
    ),
    "after what is unknown": lambda device=CPU, **more: fl.Sampler([*LISTS["T k p"](), Unknown()], min_p=0.1, **more),
}
REPORTS = [{}, {"logprobs": "raw"}, {"logprobs": "processed", "top_logprobs": 3}, {
    "logprobs": "processed", "top_logprobs": 40}]  # fmt: skip


@needs_triton
@pytest.mark.parametrize("report", REPORTS, ids=str)
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sampler_launches_nothing_new(name, report, kernels, monkeypatch):
    there = rehearsed_by(monkeypatch, lambda: SAMPLERS[name](**report).warm_up(V, torch.bfloat16, device=CPU))
    sampler = SAMPLERS[name](**report)
    with captured() as made:
        for B in [3] if name == "by row" else [1, 3, 140]:
            # A draw from all tokens goes another way where there are many logits.
            monkeypatch.setattr(launch, "_MOST_SAMPLED", 0 if B == 140 else 2**24)
            for L in (1, 2, 5, 14):
                logits, ids = torch.zeros(B, V, dtype=torch.bfloat16), torch.zeros(B, L, dtype=torch.int64)
                for seeds in (7, torch.arange(B)):
                    sampler(logits, seeds, L, ids, prompt_length=1)
    assert keys(made) == there


@needs_triton
def test_seeds_and_positions_of_a_sampler_are_those_that_are_given(kernels, monkeypatch):
    sampler = fl.Sampler(temperature=0.7)
    short = torch.arange(2, dtype=torch.int32)
    there = rehearsed_by(monkeypatch, lambda: sampler.warm_up(V, batch=2, device=CPU, seeds=short, positions=short))
    with captured() as made:
        for most in (launch._MOST_SAMPLED, 0):  # as of few rows, and of many
            monkeypatch.setattr(launch, "_MOST_SAMPLED", most)
            sampler(torch.zeros(2, V), short, short)
    assert keys(made) == there
    with captured() as made:
        sampler(torch.zeros(2, V), 3, short)
    assert not keys(made) & there or keys(made) != there


def served(device=CPU, **options):
    batch = fl.BatchProcessor(6, V, device, **{"max_length": 64, "max_logprobs": 3, **options})
    batch.add(fl.RequestParams(logprobs=2, seed=5), [1, 2])
    batch.add(fl.RequestParams(logprobs=1, temperature=0.7, top_k=5, repetition_penalty=1.2, seed=6), [3, 4, 3])
    batch.add(fl.RequestParams(logprobs=1, logit_bias={3: 1.0}, bad_words=[[1, 2]], no_repeat_ngram_size=2), [5])
    batch.add(fl.RequestParams(logprobs=0, dry_multiplier=0.8, banned_token_ids=range(500), min_p=0.1), [7, 8])
    return batch


@needs_triton
@pytest.mark.parametrize("semantics", ["transformers", "vllm", "sglang"])
def test_a_batch_launches_nothing_new(semantics, kernels, monkeypatch):
    batch = fl.BatchProcessor(6, V, "cpu", max_length=64, max_logprobs=3, semantics=semantics)
    there = rehearsed_by(monkeypatch, lambda: batch.warm_up(torch.float16, logprobs=["raw", "processed"]))
    batch = served(semantics=semantics)
    with captured() as made:
        for slots in ([0], [1, 2], [3, 0, -1, 2], torch.arange(4)):
            logits = torch.zeros(len(slots), V, dtype=torch.float16)
            for bitmask in (None, torch.full((len(slots), 32), -1, dtype=torch.int32)):
                for logprobs in ("raw", "processed"):
                    batch.sample(logits, slots, bitmask=bitmask, logprobs=logprobs)
                batch.apply(logits, slots, bitmask=bitmask)
                batch.apply_(logits, slots, bitmask=bitmask)
            batch.append(slots, torch.ones(len(slots), dtype=torch.int64))
        batch.swap(0, 5)
        batch.move(1, 4)
    assert keys(made) == there


@needs_triton
def test_a_batch_with_drafts_positions_and_short_integers(kernels, monkeypatch):
    options = {"calls": "sample", "bitmask": False, "cache_position": torch.int64, "draft_ids": torch.int32}
    there = rehearsed_by(monkeypatch, lambda: served().warm_up(**options, slots=torch.int32, row_stride=V + 8))
    short = {"dtype": torch.int32}
    with captured() as made:
        served().sample(
            torch.zeros(2, V + 8)[:, :V], torch.tensor([0, 0], **short), torch.tensor([1, 2]),
            draft_ids=torch.tensor([2, 9], **short), local_position=torch.tensor([0, 1], **short), logprobs="raw",
        )  # fmt: skip
    reports = {"tiles_kernel", "report_kernel"}
    assert {key for key in keys(made) if key[0] not in reports} == there


def test_an_engines_history_has_no_append(kernels, monkeypatch):
    lengths = torch.zeros(6, dtype=torch.int64)
    batch = fl.BatchProcessor(6, V, "cpu", history=(torch.zeros(6, 64, dtype=torch.int64), lengths, lengths.clone()))
    there = rehearsed_by(monkeypatch, lambda: batch.warm_up(calls=["append", "swap"]))
    assert {name for name, _ in there} == {"_swap_kernel"}


# -- It leaves no trace -----------------------------------------------------------------------------------------------


@needs_triton
def test_a_batch_with_requests_is_as_it_was(kernels):
    first, second = served(DEVICE), served(DEVICE)
    first._seeds.setstate(second._seeds.getstate())
    first._table.copy_(second._table)
    before, seen = second._table.clone(), torch.get_rng_state()
    done = second.warm_up(logprobs="raw")
    assert done.needed
    assert torch.equal(torch.get_rng_state(), seen)
    assert torch.equal(second._table, before)
    assert second._seeds.getstate() == first._seeds.getstate()
    assert {name: getattr(second, name) for name in ("_counted", "_active", "_saw_all", "_strict", "_reported")} == {
        name: getattr(first, name) for name in ("_counted", "_active", "_saw_all", "_strict", "_reported")
    }
    logits = (torch.randn(4, V, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE)
    for _ in range(2):
        ours, theirs = (batch.sample(logits, [0, 1, 2, 3], logprobs="raw") for batch in (second, first))
        assert all(torch.equal(a, b) for a, b in zip(ours[:2], theirs[:2], strict=True))
        for batch in (first, second):
            batch.append([0, 1, 2, 3], ours.tokens)


@needs_triton
@pytest.mark.parametrize("name", ["chain 8", "allowed, then first tokens", "encoder", "around what is unknown"])
def test_a_list_in_the_middle_of_a_run_goes_on_as_if_nothing_had_been(name, kernels):
    scores = (torch.randn(2, V, generator=torch.Generator().manual_seed(1)) * 3).to(DEVICE)
    ids = torch.randint(0, 9, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for warms in (False, True):
        processors = fl.LogitsProcessorList(LISTS[name]())
        run = processors.for_run()
        results.append([])
        for L in (5, 6, 9):
            if warms:
                seen = torch.get_rng_state()
                assert processors.warm_up(V, batch=2, device=DEVICE).needed
                assert torch.equal(torch.get_rng_state(), seen)
            results[-1].append(run(ids[:, :L], scores))
        unknown = [each.calls for each in processors if isinstance(each, Unknown)]
        assert unknown in ([], [3])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_triton
def test_a_watermark_keeps_its_state_and_functions_are_not_called(kernels):
    def allowed(batch_id, sent):
        raise AssertionError("called")

    processor = synthid()
    prefix = fl.PrefixConstrainedLogitsProcessor(allowed, 1)
    done = fl.LogitsProcessorList([processor, prefix, Unknown()]).warm_up(V, device=CPU)
    assert processor.state is None
    assert done.kernels
    assert done.skipped == (
        "PrefixConstrainedLogitsProcessor, which is some operations of torch",
        "Unknown, which fastlogits doesn't know",
    )
    assert "not rehearsed: Unknown, which fastlogits doesn't know" in str(done)


@needs_triton
def test_a_sampler_draws_the_same_after_it(kernels):
    logits = (torch.randn(3, V, generator=torch.Generator().manual_seed(2)) * 3).to(DEVICE)
    ids = torch.ones(3, 4, dtype=torch.int64, device=DEVICE)
    for name in ("T k p", "by row", "after a list"):
        cold, warm = (SAMPLERS[name](DEVICE, logprobs="processed", top_logprobs=2) for _ in range(2))
        warm.warm_up(V, batch=None if name == "by row" else 3, device=DEVICE)
        for found, wanted in zip(
            *(each(logits, 3, 4, ids, prompt_length=2) for each in (warm, cold)), strict=True
        ):  # fmt: skip
            assert torch.equal(found, wanted)


@pytest.mark.skipif(DEVICE == CPU, reason="needs CUDA")
def test_a_call_after_it_compiles_nothing(monkeypatch):
    """Neither does Triton, which is asked behind our back."""
    from triton.runtime import jit

    batch = fl.BatchProcessor(6, V, DEVICE, max_length=64, max_logprobs=3)
    processors, samplers = fl.LogitsProcessorList(LISTS["chain 8"]()), [fl.Sampler(), SAMPLERS["T k p"]()]
    for each in (processors, *samplers):
        assert not each.warm_up(V, torch.bfloat16, device=DEVICE).failed
    assert not batch.warm_up(torch.bfloat16, logprobs="raw", bitmask=False).failed

    def compiled(*_, **__):
        raise AssertionError("compiled")

    monkeypatch.setattr(Launcher, "compile", compiled)
    monkeypatch.setattr(jit.JITFunction, "_do_compile", compiled)
    slots = [batch.add(fl.RequestParams(logprobs=1, top_p=0.5, min_p=0.1), [1, 2, 3]) for _ in range(3)]
    for _ in range(3):
        for B in (1, 2, 17):
            logits = torch.randn(B, V, device=DEVICE).bfloat16()
            ids = torch.randint(0, V, (B, 9), device=DEVICE)
            processors(ids, logits, prompt_length=4)
            processors.apply_(ids, logits.clone(), prompt_length=4)
            for most in (2**24, 0):  # as of few rows, and of many
                monkeypatch.setattr(launch, "_MOST_SAMPLED", most)
                for sampler in samplers:
                    sampler(logits, torch.arange(B, device=DEVICE), 5)
            some = slots[: min(B, 3)]
            tokens = batch.sample(logits[:3], some, logprobs="raw").tokens
            batch.apply_(logits[:3], some)
            batch.append(some, tokens)
    torch.cuda.synchronize()


def test_collecting_is_a_matter_of_one_thread_and_ends():
    inside, done = threading.Event(), threading.Event()

    def collect():
        with collected():
            assert is_collecting()
            inside.set()
            assert done.wait(10)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(collect)
        assert inside.wait(10)
        assert runtime._collectors == 1
        assert not is_collecting()
        done.set()
        other.result()
    with pytest.raises(ZeroDivisionError), collected():
        raise ZeroDivisionError
    assert runtime._collectors == 0
    assert not is_collecting()
    with collected() as outer:
        with collected() as inner:
            Launcher(lambda: None)((CPU,), 1, ())
        assert is_collecting()
        assert len(inner) == 1
        assert not outer


# -- Compiling at once ------------------------------------------------------------------------------------------------


class Slow:
    """A kernel that compiles until another one compiles beside it, where they meet, or not at all."""

    def __init__(self, name, error=None, meeting=None):
        self.__name__, self.error, self.threads, self.launched, self.meeting = name, error, [], 0, meeting
        self.run = None

    def warmup(self, *args, grid, **options):
        if self.meeting is not None:
            self.meeting.wait()
        self.threads.append(threading.get_ident())
        if self.error is not None:
            raise self.error
        return self

    def __getitem__(self, grid):
        def run(*args, **options):
            self.launched += 1

        return run


def test_kernels_are_compiled_side_by_side_and_each_variant_once():
    meeting = threading.Barrier(2, timeout=300)
    kernels = [Slow(f"_number_{i}_kernel", meeting=meeting) for i in range(6)]
    launchers = [Launcher(kernel) for kernel in kernels]
    with collected() as launches:
        for launcher in launchers * 2:
            launcher((CPU, 1), 1, ())
    outcomes = prepare(launches)
    assert [launch.launcher for launch, error in outcomes] == launchers
    assert all(error is None for _, error in outcomes)
    assert [len(kernel.threads) for kernel in kernels] == [1] * 6
    assert not any(kernel.launched for kernel in kernels)
    assert len({kernel.threads[0] for kernel in kernels}) > 1
    if runtime._RELAUNCHES:
        assert prepare(launches) == []
    assert prepare([]) == []


def test_what_cannot_be_compiled_is_told_and_the_rest_is_there(monkeypatch):
    monkeypatch.setattr(warming, "no_kernels", lambda device: None)
    good, bad = Launcher(Slow("_good_kernel")), Launcher(Slow("_bad_kernel", RuntimeError("no C compiler")))

    def rehearse():
        for launcher in (bad, good):
            launcher((CPU, 2), 1, ())
        launch_together([runtime.Launch(launcher, (CPU, 3), 1, ()) for launcher in (bad, good)])

    done = warming.warmed(CPU, rehearse)
    assert (done.kernels, done.needed, len(done.failed)) == (("good", "good"), 4, 2)
    assert "the kernel _bad_kernel can't be compiled (RuntimeError: no C compiler)" in done.failed[0]
    assert str(done).startswith("2 of 4 kernels made ready on cpu in ")
    assert "good (2); FAILED: the kernel _bad_kernel" in repr(done)
    if runtime._RELAUNCHES:
        again = warming.warmed(CPU, lambda: good((CPU, 2), 1, ()))
        assert str(again) == "nothing to compile on cpu: the process has all 1 already"
    nothing = warming.warmed(CPU, lambda: None, ["X, which is some operations of torch"])
    assert str(nothing) == (
        "nothing to compile on cpu: the calls launch no kernel of fastlogits; not rehearsed: X, which is some "
        "operations of torch"
    )


def test_not_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(warming, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        fl.TopKLogitsWarper(3).warm_up(V, device="cpu")


# -- Without a GPU, and asked wrongly ---------------------------------------------------------------------------------


def test_on_a_cpu_it_says_that_there_is_nothing_to_do():
    found = [
        fl.LogitsProcessorList(LISTS["chain 8"]()).warm_up(V, device="cpu"),
        fl.TopKLogitsWarper(3).warm_up(V, torch.float16, device="cpu"),
        fl.Sampler(top_k=3).warm_up(V, device="cpu"),
        fl.Sampler(temperature=torch.ones(2)).warm_up(V),
        served().warm_up(),
    ]
    for done in found:
        assert repr(done) == "<WarmUp: nothing to compile on cpu: the kernels are for GPUs, and torch runs here>"
        assert done == fl.WarmUp(CPU, reason="the kernels are for GPUs, and torch runs here")


LIST = fl.LogitsProcessorList([fl.TopKLogitsWarper(3)])
WRONG = [
    (lambda: LIST.warm_up(0), "vocab_size must be an integer of at least 1, got 0"),
    (lambda: LIST.warm_up(V, "float32"), "dtype must be torch.float32, torch.float16 or torch.bfloat16, got 'float32'"),
    (lambda: LIST.warm_up(V, torch.float64), "got torch.float64: give that of the logits"),
    (lambda: LIST.warm_up(V, batch=0), "batch must be an integer of at least 1, got 0"),
    (lambda: LIST.warm_up(V, device="gpu"), "device must be a device that torch can use here"),
    (lambda: LIST.warm_up(V, row_stride=V - 1), "row_stride must be at least 1000, the size of the vocabulary, got"),
    (lambda: LIST.warm_up(V, device=CPU, input_ids=[1]), r"input_ids must be int32 or int64 of shape \(B, L\) on cpu"),
    (lambda: LIST.warm_up(V, device=CPU, input_ids=torch.zeros(2, 2)), "got torch.float32 of"),
    (lambda: fl.Sampler().warm_up(V, seeds=1.5), "seeds must be an integer"),
    (lambda: fl.Sampler().warm_up(V, positions=torch.arange(2)), r"positions must be a number for all rows"),
    (lambda: fl.Sampler(temperature=torch.ones(2)).warm_up(V, batch=3), "temperature must be a number for all rows"),
    (lambda: fl.Sampler(top_p=torch.ones(2)).warm_up(V, batch=3), "top_p"),
    (lambda: served().warm_up(calls="draw"), "calls must be one or several of 'sample', 'apply_', 'apply', 'append'"),
    (lambda: served().warm_up(calls=3), "calls must be one or several of"),
    (lambda: served().warm_up(logprobs=["raw", "all"]), "logprobs must be one or several of 'raw', 'processed'"),
    (lambda: served().warm_up(bitmask="yes"), "bitmask must be one of None, False, True, got 'yes'"),
    (lambda: served().warm_up(slots=torch.int16), "slots must be one of torch.int32, torch.int64, got torch.int16"),
    (lambda: served().warm_up(cache_position=7), "cache_position must be one of None, torch.int32, torch.int64, got 7"),
    (lambda: served().warm_up(torch.int32), "dtype must be torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("warm_up", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
def test_wrong_arguments_are_told(warm_up, message):
    with pytest.raises(ValueError, match=message):
        warm_up()


# -- The command ------------------------------------------------------------------------------------------------------


CONFIG = '{"max_requests": 4, "max_length": 64, "semantics": "vllm", "calls": "sample", "slots": "int32"}'
ON_CPU = ["--vocab", "1000", "--device", "cpu"]


@pytest.mark.parametrize(
    "what",
    [
        ["TemperatureLogitsWarper(0.7), TopKLogitsWarper(50)"],
        ["--list", "[TopPLogitsWarper(0.9)]"],
        ["--sampler", "[TopKLogitsWarper(3)], temperature=torch.ones(1), logprobs='raw'"],
        ["--serving", CONFIG],
    ],
)
def test_the_command_says_that_there_is_nothing_to_compile_here(what, capsys):
    assert main(["warm-up", *what, *ON_CPU, "--dtype", "float32", "bfloat16"]) == 0
    nothing = "nothing to compile on cpu: the kernels are for GPUs, and torch runs here\n"
    assert capsys.readouterr().out == f"float32: {nothing}bfloat16: {nothing}"


@needs_triton
def test_the_command_tells_what_it_made_ready_and_where(kernels, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(CONFIG)
    assert main(["warm-up", "--serving", str(tmp_path / "config.json"), *ON_CPU]) == 0
    printed = capsys.readouterr().out
    assert "kernels made ready on cpu in" in printed
    assert "slot_sets (2)" in printed
    assert printed.endswith(f"cache: {tmp_path / 'cache'}\n")
    monkeypatch.setattr(warming, "prepare", lambda launches: [(launches[0], backend.CompileError(CPU, "no ptxas"))])
    assert main(["warm-up", "TemperatureLogitsWarper(0.7)", *ON_CPU]) == 1
    assert "FAILED: no ptxas" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "warm-up needs one thing that will run, and only one: processors, --sampler or --serving, got none"),
        (["TopKLogitsWarper(3)", "--sampler", "top_k=3"], "and only one: processors, --sampler or --serving, got 2"),
        (["TopKLogitsWarper(3)", "--device", "cpu"], "--vocab must be the size of the vocabulary"),
        (["TopKLogitsWarper(0)", *ON_CPU], "got 'TopKLogitsWarper(0)': ValueError"),
        (["TopKLogitsWarper(3)", *ON_CPU, "--dtype", "int8"], "invalid choice: 'int8'"),
        (["TopKLogitsWarper(3)", *ON_CPU, "--row-stride", "9"], "row_stride must be at least 1000"),
        (["TopKLogitsWarper(3)", "--vocab", "9", "--device", "cuda:99"], "--device must be a device that torch"),
        (["--sampler", "top_q=3", *ON_CPU], "--sampler must be arguments of Sampler, got 'top_q=3': TypeError"),
        (["--sampler", "top_k=torch.ones(2).long()", *ON_CPU, "--batch", "3"], "top_k"),
        (["--serving", "/nope", *ON_CPU], "--serving must be a JSON file or a JSON object, got '/nope'"),
        (["--serving", "{", *ON_CPU], "--serving must be a JSON file or a JSON object, got '{'"),
        (["--serving", '{"history": 3}', *ON_CPU], "got 'history': what has no form in JSON"),
        (["--serving", '{"max_requests": 3}', *ON_CPU], "--serving must have max_length"),
        (["--serving", CONFIG, "--device", "cpu"], "--serving must have vocab_size (or --vocab)"),
        (["--serving", CONFIG.replace("int32", "int8"), *ON_CPU], '"int32" or "int64" as slots, got \'int8\''),
        (["--serving", CONFIG.replace("vllm", "tgi"), *ON_CPU], "semantics must be one of"),
        (["--serving", CONFIG, *ON_CPU, "--batch", "2"], "--batch is for processors and samplers, got 2"),
        (["--serving", CONFIG.replace("{", '{"vocab_size": 7, '), *ON_CPU], "--vocab must be the vocab_size of"),
    ],
)  # fmt: skip
def test_the_command_says_in_a_line_what_is_wrong(arguments, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(["warm-up", *arguments])
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_help_is_for_people_who_have_never_seen_it(capsys):
    with pytest.raises(SystemExit) as left:
        main(["warm-up", "--help"])
    assert left.value.code == 0
    printed = capsys.readouterr().out
    for words in ("TRITON_CACHE_DIR", "names of", "examples:", "--serving CONFIG", "max_requests"):
        assert words in printed
