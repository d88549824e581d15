"""What vLLM's newer sampler leaves to vLLM, with a stand-in for vLLM's own class."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastlogits.integrations import vllm_sampler as ours
from fastlogits.integrations.vllm import FastLogitsProcessor
from tests.integrations.test_vllm_step import L, S, Sampling, V


class Buffer:
    """A tensor on the device, and the host's view of it."""

    def __init__(self, *shape, dtype=torch.int32):
        self.gpu = torch.ones(shape, dtype=dtype)
        self.np = self.gpu.numpy()


class Theirs:
    """vLLM's class, as far as it is looked at."""

    def __init__(self, config, *, processors=(), replays=False, reports=False, mode="raw_logprobs"):
        self.req_states = SimpleNamespace(
            all_token_ids=Buffer(S, L), prompt_len=Buffer(S), total_len=Buffer(S), prefill_len=Buffer(S)
        )
        seeds = SimpleNamespace(np=np.arange(S))
        self.sampling_states = SimpleNamespace(max_num_reqs=S, vocab_size=V, seeds=seeds)
        self.logprobs_mode = mode
        self.logits_processors = [object(), object(), object(), *processors]
        self.thinking_budget_state = SimpleNamespace(enabled=True)
        self.trace_replay_state = object() if replays else None
        self.return_sampling_mask = reports
        self.num_speculative_tokens = 1
        self.compute_nans = False

    def add_request(self, req_idx, sampling_params):
        for processor in self.logits_processors[3:]:
            processor.add_request(req_idx, sampling_params)

    def apply_staged_writes(self):
        pass

    def __call__(self, logits, input_batch):
        return "vLLM's"


class Asking:
    """A processor of others that acts where it is asked to."""

    def add_request(self, req_idx, sampling_params):
        return sampling_params.temperature == 0.5


CONFIG = SimpleNamespace(model_config=SimpleNamespace(max_logprobs=20, dtype=torch.float32), parallel_config=None)


@pytest.fixture(autouse=True)
def _told_nothing_yet():
    ours._tell.cache_clear()


def made(**given):
    return ours.newer_sampler(Theirs)(CONFIG, **given)


def served(sampler, *slots):
    batch = SimpleNamespace(idx_mapping_np=np.array(slots))
    return sampler.is_served_by_vllm(torch.zeros(len(slots), V), batch)


@pytest.mark.parametrize("given", [{"replays": True}, {"reports": True}])
def test_engines_that_keep_their_own(given, caplog):
    with caplog.at_level(logging.WARNING):
        sampler = made(**given)
        sampler.add_request(0, Sampling())
    sampler.apply_staged_writes()
    assert sampler(torch.zeros(1, V), SimpleNamespace(idx_mapping_np=np.array([0]))) == "vLLM's"
    assert [record.getMessage() for record in caplog.records] == [caplog.records[0].getMessage()]
    assert "vLLM's own sampler runs: the engine" in caplog.text


def test_requests_that_are_served_by_vllm(caplog):
    class Newer(Sampling):
        __struct_fields__ = (*Sampling.__struct_fields__, "mirostat")

    sampler = made()
    with caplog.at_level(logging.WARNING):
        sampler.add_request(0, Sampling(temperature=0.7))
        for _ in range(2):
            sampler.add_request(1, Newer(mirostat=2))
        sampler.add_request(2, Sampling(logit_bias={V: 1.0}))
    assert [served(sampler, slot) for slot in range(3)] == [False, True, True]
    assert served(sampler, 0, 1)  # a step that they share
    assert sampler(torch.zeros(1, V), SimpleNamespace(idx_mapping_np=np.array([1]))) == "vLLM's"
    assert len(caplog.records) == 2
    assert "requests with mirostat, which fastlogits doesn't know" in caplog.text
    assert "a request that fastlogits refuses: logit_bias must have token ids of the vocabulary" in caplog.text
    sampler.add_request(1, Sampling())
    assert not served(sampler, 0, 1)


def test_reports_are_asked_for_where_a_request_wants_them():
    sampler, asked = made(), []
    sampler.get_logprobs_dims = lambda slots, **more: asked.append(slots.tolist()) or (2, 0)

    def dims(*slots):
        return sampler.dims(SimpleNamespace(idx_mapping_np=np.array(slots)))

    sampler.add_request(0, Sampling())
    sampler.add_request(1, Sampling(logprobs=0))
    sampler.add_request(2, Sampling(logprob_token_ids=[3]))
    assert [dims(0), dims(0, 1), dims(2)] == [None, (2, 0), (2, 0)]
    sampler.add_request(1, Sampling())
    sampler.add_request(2, Sampling())
    assert dims(0, 1, 2) is None
    assert asked == [[0, 1], [2]]


def test_logits_of_another_shape(caplog):
    sampler = made()
    batch = SimpleNamespace(idx_mapping_np=np.array([0]))
    with caplog.at_level(logging.ERROR):
        assert sampler(torch.zeros(1, V + 1), batch) == "vLLM's"
        assert sampler(torch.zeros(S + 1, V), batch) == "vLLM's"
    assert "at most 6 rows of 40 were announced" in caplog.text


def test_what_runs_between_two_passes(caplog):
    sampler = made(processors=[Asking()])
    with caplog.at_level(logging.WARNING):
        sampler.add_request(0, Sampling())
        sampler.add_request(1, Sampling(temperature=0.5))
        sampler.add_request(2, Sampling(thinking_token_budget=7))
        sampler.add_request(3, Sampling(min_tokens=2, structured_outputs=object()))
    assert sampler._served_by.numbers[:4].tolist() == [0, 1, 1, 1]
    assert not served(sampler, 0, 1, 2, 3)
    assert [record.getMessage().split(" of requests")[0] for record in caplog.records] == [
        "Asking", "thinking_token_budget"
    ]  # fmt: skip
    sampler.add_request(1, Sampling())
    assert sampler._served_by.numbers[1] == 0


def test_the_processor_waits_where_the_step_does_its_work():
    states = SimpleNamespace(
        device=torch.device("cpu"), max_num_reqs=S, vocab_size=V, all_token_ids=Buffer(S, L), prompt_len=Buffer(S),
        total_len=Buffer(S),
    )  # fmt: skip
    processor = FastLogitsProcessor(SimpleNamespace(), states)
    sampler = made(processors=[processor])
    options = {"fastlogits": {"banned_token_ids": [3]}}
    sampler.add_request(0, Sampling(extra_args=options))
    sampler.add_request(1, Sampling())
    processor.apply_staged_writes()
    assert sampler._served_by.numbers[:2].tolist() == [0, 0]
    assert sampler._step._params[0].banned_token_ids == (3,)
    assert processor._newer._tables is None  # no memory for what isn't needed
    # A step of vLLM's own asks it after all.
    context = SimpleNamespace(
        idx_mapping_np=np.array([1, 0]), expanded_idx_mapping=torch.tensor([1, 0]), pos=torch.zeros(2).long(),
        input_ids=torch.ones(2, dtype=torch.int32), expanded_local_pos=torch.zeros(2, dtype=torch.int32),
    )  # fmt: skip
    logits = processor.apply(torch.zeros(2, V), context)
    assert logits.isneginf().nonzero().tolist() == [[1, 3]]
    sampler.add_request(0, Sampling())
    assert not processor.apply(torch.zeros(2, V), context).isneginf().any()


def test_drafts_of_vllms_own_sampler():
    """A watermark's sampler isn't ours; rates of acceptance that are made up are not for ours."""

    class Verifying:
        synthetic_conditional_rates = None

        def __call__(self, *given):
            return "vLLM's"

    rejection = ours.newer_rejection_sampler(Verifying)()
    rejection.sampler = object()
    assert rejection(torch.zeros(1, V), None) == "vLLM's"
    rejection.sampler, rejection.synthetic_conditional_rates = made(), torch.ones(2)
    assert rejection(torch.zeros(1, V), None) == "vLLM's"
