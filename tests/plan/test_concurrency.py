"""One object used from several threads, processes, streams and devices, and copies of what has been used."""

import copy
import multiprocessing
import pickle
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fastlogits_kernels.pointwise import fold, search
from fastlogits_kernels.pointwise.fold import Chain, Op
from fastlogits_kernels.runtime import launcher
from tokenizers import Tokenizer, models
from transformers.generation import logits_process as reference

import fastlogits as fl
from fastlogits import BatchProcessor, RequestParams, TokenMask, sampling

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # of a process that has threads
]

V = 100
THREADS = 4


def processors(module=fl):
    return [
        module.RepetitionPenaltyLogitsProcessor(1.3),
        module.NoRepeatNGramLogitsProcessor(2),
        module.NoBadWordsLogitsProcessor([[3], [4, 5]]),
        module.TemperatureLogitsWarper(0.7),
        module.TopKLogitsWarper(20),
        module.TopPLogitsWarper(0.9),
    ]


def inputs(seed: int, device: str = "cpu", B: int = 3, V: int = V):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (B, 12), generator=generator)
    return ids.to(device), (torch.randn(B, V, generator=generator) * 3).to(device)


def one_by_one(ids, scores):
    for processor in processors(reference):
        scores = processor(ids, scores)
    return scores


@pytest.fixture
def switching():
    """Threads that take turns far more often than they do otherwise."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work, count: int = THREADS):
    """The results of ``work(i)`` in so many threads, which begin at once; an error of one is raised."""
    barrier = threading.Barrier(count, timeout=60)

    def begin(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count), timeout=120))


# -- Threads -------------------------------------------------------------------------------------------------------


def test_a_list_first_called_by_several_threads_at_once(switching, device):
    given = [inputs(i, device, B=1 + i) for i in range(THREADS)]
    expected = [one_by_one(*each) for each in given]
    for _ in range(20):
        listed = fl.LogitsProcessorList(processors())
        found = together(lambda i, listed=listed: listed(*given[i]))
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-6, atol=0)


def test_processors_and_a_plan_first_called_by_several_threads_at_once(switching, device):
    given = [inputs(i, device) for i in range(THREADS)]
    for make in (lambda: processors()[0], lambda: processors()[2], lambda: fl.LogitsProcessorList(processors()).plan):
        right = [make()(*each) for each in given]
        for _ in range(10):
            shared = make()
            found = together(lambda i, shared=shared: shared(*given[i]))
            assert all(map(torch.equal, found, right))


def test_a_sampler_first_called_by_several_threads_at_once(switching, device):
    given = [inputs(i, device) for i in range(THREADS)]

    def sampler():
        return fl.Sampler(processors()[:3], temperature=0.8, top_k=30, logprobs="processed", top_logprobs=2)

    def draw(sampler, i):
        ids, scores = given[i]
        return sampler(scores, seeds=7, positions=i, input_ids=ids)

    right = [draw(sampler(), i) for i in range(THREADS)]
    for _ in range(10):
        shared = sampler()
        for mine, each in zip(together(lambda i, shared=shared: draw(shared, i)), right, strict=True):
            assert all(map(torch.equal, mine, each))


def test_a_draw_called_while_another_thread_prepares_it(monkeypatch, device):
    ids, scores = inputs(0, device)
    at = torch.zeros(3, dtype=torch.int64, device=device)
    begun, ended = threading.Event(), threading.Event()

    fused = sampling.fused_to_token

    def slow(*arguments):
        if not begun.is_set():
            begun.set()
            assert ended.wait(60)
        return fused(*arguments)

    # Nothing but token 7 may come.
    only = fl.LogitsProcessorList([fl.SuppressTokensLogitsProcessor([t for t in range(V) if t != 7])])
    shared = sampling.FusedDraw(only)
    monkeypatch.setattr(sampling, "fused_to_token", slow)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(shared, scores, at, at, ids, None)
        assert begun.wait(60)
        try:
            mine, _ = shared(scores, at, at, ids, None)
        finally:
            ended.set()
        assert mine.tolist() == other.result(60)[0].tolist() == [7, 7, 7]


def test_a_mask_and_parameters_first_used_by_several_threads_at_once(switching, device):
    for _ in range(10):
        tokenizer = Tokenizer(models.WordLevel({f"{i}": i for i in range(V)}, unk_token="0"))
        found = together(lambda i, t=tokenizer: TokenMask.matching(t, r"1").bits(device).tolist())
        assert all(each == found[0] for each in found)
        params = RequestParams(banned_token_ids=TokenMask.from_ids(range(70), V), seed=1)

        def step(i, params=params):
            batch = BatchProcessor(1, V, device, max_length=16)
            batch.add(params, [1, 2])
            return batch.apply(torch.zeros(1, V, device=device), [0])

        assert all(int(each.isinf().sum()) == 70 for each in together(step))


class Interrupted(dict):
    """A dictionary before whose writing other threads have their turn."""

    def setdefault(self, key, value):
        time.sleep(1e-3)
        return super().setdefault(key, value)


def test_kernels_of_different_chains_are_never_taken_for_one(monkeypatch):
    """The number that a variant of a kernel is known by is nobody else's, whoever numbers at the same time."""
    monkeypatch.setattr(launcher, "_forms", Interrupted())
    chains = together(lambda i: [Chain([Op(fold.SCALE.value, -1, i, n)]) for n in range(20)])
    assert len({chain.form for each in chains for chain in each}) == len({c.flat for each in chains for c in each})
    searches = together(lambda i: [search.Search([], sets=1000 * (i + 1) + n) for n in range(20)])
    assert len({each.form for found in searches for each in found}) == 20 * THREADS


def test_an_accelerated_model_in_several_threads(llama):
    prompt = torch.tensor([[5, 9, 17, 5, 9]])
    wanted = [
        {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [5, 9, 17]},
        {"min_new_tokens": 9},
    ]  # fmt: skip

    def run(i):
        return llama.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, **wanted[i])

    right = [run(i) for i in range(THREADS)]
    assert len({tuple(each[0].tolist()) for each in right}) > 1
    with fl.accelerate(llama):
        assert all(map(torch.equal, together(run), right))


# -- Processes -----------------------------------------------------------------------------------------------------


def _work(connection, listed, mask):
    """What a process does with what it was given, and with what it makes itself."""
    torch.set_num_threads(1)
    made = fl.LogitsProcessorList(processors())
    tokenizer = Tokenizer(models.WordLevel({f"{i}": i for i in range(V)}, unk_token="0"))
    patterns = [list(TokenMask.matching(tokenizer, pattern)) for pattern in (r"1", r"1(2|3)+")]
    given = inputs(5)
    # Lists, since tensors would be shared by files that end with the process.
    connection.send([listed(*given).tolist(), made(*given).tolist(), list(mask), patterns])
    connection.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_two_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system can't {method}")
    if method == "fork" and torch.cuda.is_initialized():
        pytest.skip("a process that has used CUDA can't be forked")
    listed, mask = fl.LogitsProcessorList(processors()), TokenMask.from_ids([3, 7], V)
    given = inputs(5)
    right = listed(*given).tolist()
    mask.bits()
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(sender, listed, mask))
    process.start()
    try:
        assert listed(*given).tolist() == right  # this one goes on meanwhile
        assert receiver.poll(240), "no answer"
        of_given, of_made, of_mask, patterns = receiver.recv()
        process.join(60)
        assert process.exitcode == 0
    finally:
        process.kill()
    assert of_given == of_made == right
    assert of_mask == [3, 7]
    assert patterns == [[1, *range(10, 20)], [12, 13]]


# -- Copies --------------------------------------------------------------------------------------------------------


def _dill(thing):
    dill = pytest.importorskip("dill")
    return dill.loads(dill.dumps(thing))


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "dill": _dill,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_what_has_been_used(how, device):
    ids, scores = inputs(1, device)
    mask = TokenMask.from_ids(range(70), V)
    listed = fl.LogitsProcessorList([fl.SuppressFirstTokens(mask), *processors()])
    params = RequestParams(banned_token_ids=mask, logit_bias={80: 1.0}, bad_words=[[1, 2]], seed=3)
    sampler = fl.Sampler(processors()[:2], temperature=0.8, top_p=0.9)

    def use(listed, params, sampler, mask):
        batch = BatchProcessor(1, V, device, max_length=16)
        batch.add(params, ids[0].tolist())
        return [
            listed(ids, scores, prompt_length=ids.shape[1]),
            batch.apply(scores[:1], [0]),
            sampler(scores, seeds=5, positions=2, input_ids=ids).tokens,
            mask.bits(device),
        ]

    right = use(listed, params, sampler, mask)
    copies = [COPIES[how](each) for each in (listed, params, sampler, mask)]
    assert all(map(torch.equal, use(*copies), right))
    if how != "copy":  # of which one shares its processors
        copies[0][4].temperature = 2.0
        assert not torch.equal(use(*copies)[0], right[0])
    assert all(map(torch.equal, use(listed, params, sampler, mask), right))


# -- Streams, graphs and devices -----------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
WIDE = 32003


def captured(work):
    """A graph of ``work()``, and what it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    return graph, out


@gpu
def test_two_streams_at_once():
    listed = fl.LogitsProcessorList(processors())
    given = [inputs(i, "cuda", B=8 * (i + 1), V=WIDE) for i in range(2)]
    right = [fl.LogitsProcessorList(processors())(*each) for each in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, each in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                found.append(listed(*each))
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, right))


@gpu
def test_a_second_stream_does_not_read_what_the_first_has_yet_to_copy():
    """The first call puts its tables on the GPU, behind work that takes its time; the next is on another stream."""
    given = inputs(0, "cuda", V=WIDE)
    right = fl.LogitsProcessorList(processors())(*given)
    busy, free = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(5):
        listed = fl.LogitsProcessorList(processors())
        torch.cuda.synchronize()
        with torch.cuda.stream(busy):
            torch.cuda._sleep(200_000_000)
            first = listed(*given)
        with torch.cuda.stream(free):
            second = listed(*given)
        torch.cuda.synchronize()
        assert torch.equal(first, right)
        assert torch.equal(second, right)


@gpu
def test_several_graphs_alive_and_replayed_in_turn():
    """Of one list, for several batches; each goes on reading what it was captured with."""
    listed = fl.LogitsProcessorList(processors())
    sizes = (1, 4, 9)
    held = [inputs(i, "cuda", B, WIDE) for i, B in enumerate(sizes)]
    graphs = [captured(lambda each=each: listed(*each)) for each in held]
    listed(*inputs(99, "cuda", 5, V))  # another vocabulary in between
    for seed in range(3):
        for order in (range(3), reversed(range(3))):
            for i in order:
                ids, scores = inputs(10 * seed + i, "cuda", sizes[i], WIDE)
                for mine, new in zip(held[i], (ids, scores), strict=True):
                    mine.copy_(new)
                graphs[i][0].replay()
                assert torch.equal(graphs[i][1], listed(ids, scores))


@gpu
def test_threads_with_a_stream_each():
    listed = fl.LogitsProcessorList(processors())
    given = [inputs(i, "cuda", V=WIDE) for i in range(THREADS)]
    right = [fl.LogitsProcessorList(processors())(*each) for each in given]
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [listed(*given[i]) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return found

    for found, each in zip(together(work), right, strict=True):
        assert all(torch.equal(mine, each) for mine in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_devices_in_turn_and_at_once():
    listed = fl.LogitsProcessorList(processors())
    sampler = fl.Sampler(processors()[:3], temperature=0.8, top_k=30)
    ids, scores = inputs(3, V=WIDE)

    def work(i):
        here, mine = ids.to(f"cuda:{i}"), scores.to(f"cuda:{i}")
        batch = BatchProcessor(1, WIDE, f"cuda:{i}", max_length=16)
        batch.add(RequestParams(repetition_penalty=1.2, top_k=5, seed=1), ids[0].tolist())
        found = [
            listed(here, mine), sampler(mine, seeds=3, positions=1, input_ids=here).tokens, batch.apply(mine[:1], [0]),
        ]  # fmt: skip
        assert all(each.device == mine.device for each in found)
        torch.cuda.synchronize(i)
        return [each.cpu() for each in found]

    right = work(0)
    assert all(map(torch.equal, work(1), right))
    assert torch.cuda.current_device() == 0
    for found in together(work, 2):
        assert all(map(torch.equal, found, right))
