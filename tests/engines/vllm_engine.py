"""Runs a real engine in a process of its own: what it is and what it is asked for come as JSON, tokens go back so."""

import json
import os
import sys


class _InterpretedDriver:
    """What vLLM asks of a Triton driver before it takes its newer runner; the kernels run in Triton's interpreter."""

    @staticmethod
    def is_active() -> bool:
        return True


def samplers_of(worker) -> list[str]:
    """The modules of a worker's sampler and of its rejection sampler."""
    runner = worker.model_runner
    return [type(each).__module__ for each in (runner.sampler, getattr(runner, "rejection_sampler", None)) if each]


def serve(llm, call, all_params) -> list:
    """Give all requests to the engine at once, and abort some after so many steps.

    Of each request: the tokens and the log-probabilities of its outputs; None for one that was aborted.
    """
    engine, found, steps = llm.llm_engine, [None] * len(call), 0
    for index, (request, params) in enumerate(zip(call, all_params, strict=True)):
        engine.add_request(str(index), {"prompt_token_ids": request["prompt"]}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = {
                    "tokens": [list(each.token_ids) for each in output.outputs],
                    "texts": [each.text for each in output.outputs],
                    "logprobs": [as_json(each.logprobs) for each in output.outputs],
                    "prompt_logprobs": as_json(output.prompt_logprobs),
                }
        steps += 1
        leaving = [str(index) for index, request in enumerate(call) if request.get("abort_after") == steps]
        if leaving:
            engine.abort_request(leaving)
    return found


def as_json(steps) -> list | None:
    """Of each step the log-probability and the rank of each token, those that can't come left out."""
    return steps and [
        step and {token: [each.logprob, each.rank] for token, each in step.items() if each.logprob > -float("inf")}
        for step in steps
    ]


def watched_places() -> dict[str, int]:
    """Of steps without drafts, the rows whose tokens count, and those of them that aren't at the end of their text.

    Our sampler takes the end for their place, and doesn't read it.
    """
    from fastlogits.integrations.vllm_sampler import NewerSampler

    seen, draw = {"rows": 0, "elsewhere": 0}, NewerSampler.draw

    def watched(self, logits, input_batch, *more):
        if len(logits) == input_batch.num_reqs:
            lengths = input_batch.positions.index_select(0, input_batch.logits_indices) + 1
            slots, states = input_batch.expanded_idx_mapping, self.req_states
            counts = lengths >= states.prefill_len.gpu.index_select(0, slots)
            seen["rows"] += int(counts.sum())
            seen["elsewhere"] += int((counts & (lengths != states.total_len.gpu.index_select(0, slots))).sum())
        return draw(self, logits, input_batch, *more)

    NewerSampler.draw = watched
    return seen


def main() -> None:
    asked = json.load(sys.stdin)
    newer = asked["runner"] == "newer"
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(newer)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "TRITON_INTERPRET": str(int(newer)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    if newer:
        from types import SimpleNamespace

        import triton.backends

        triton.backends.backends["cpu"] = SimpleNamespace(driver=_InterpretedDriver, compiler=None)

    from vllm import LLM, SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    if asked.get("asynchronous"):
        # vLLM turns it off where it gains nothing, on the CPU; what it does to logits processors can be seen there too.
        from vllm.platforms.cpu import CpuPlatform

        update = CpuPlatform.check_and_update_config

        def keep_asynchronous(vllm_config):
            update(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        CpuPlatform.check_and_update_config = staticmethod(keep_asynchronous)

    engine = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 64 << 20,
        "disable_log_stats": False,
    }
    ours = newer and os.environ.get("FASTLOGITS_VLLM_SAMPLER") == "1"  # else nothing of ours is imported yet
    places = watched_places() if ours else {}
    llm = LLM(**engine | asked["engine"])
    results, working = [], []
    for call in asked["calls"]:
        prompts = [{"prompt_token_ids": request["prompt"]} for request in call]
        for request in call:  # JSON has no keys but text
            bias = request["params"].get("logit_bias")
            if bias:
                request["params"]["logit_bias"] = {int(token): value for token, value in bias.items()}
        defaults = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "detokenize": False}
        if asked.get("serves"):
            requests = [
                {"temperature": 0, "output_kind": RequestOutputKind.FINAL_ONLY} | each["params"] for each in call
            ]
            for request in requests:
                if "structured_outputs" in request:
                    request["structured_outputs"] = StructuredOutputsParams(**request["structured_outputs"])
            results.append(serve(llm, call, [SamplingParams(**request) for request in requests]))
            continue
        try:
            params = [SamplingParams(**defaults | request["params"]) for request in call]
            outputs = llm.generate(prompts, params, use_tqdm=False)
            results.append([list(output.outputs[0].token_ids) for output in outputs])
        except VLLMValidationError as error:
            results.append(str(error))
        working.append("fastlogits.serving.batch" in sys.modules)
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    samplers = llm.collective_rpc(samplers_of)
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    answer = {
        "results": results,
        "preemptions": metrics.get("vllm:num_preemptions"),
        "drafted": metrics.get("vllm:spec_decode_num_draft_tokens"),
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens"),
        "asynchronous": scheduler.async_scheduling,
        "loaded": "fastlogits.integrations.vllm" in sys.modules,
        "working": working,
        "samplers": samplers[0],
        "places": places,
    }
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
