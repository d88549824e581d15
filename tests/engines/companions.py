"""What the tests with other libraries share: a tiny random model, and plain transformers to compare with."""

import threading

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from tests.models import byte_level

PROMPTS = ["Room 101 has 8 chairs", "It's 1999"]


def tiny_tokenizer(pad_token: str = "<|end|>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<|end|>", pad_token=pad_token, padding_side="left"
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, beyond: int = 0, **changes) -> LlamaForCausalLM:
    """A random Llama, with ``beyond`` more logits than the tokenizer has tokens."""
    torch.manual_seed(0)
    config = {
        "vocab_size": len(tokenizer) + beyond,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        # Logits far enough apart that greedy choices differ from step to step.
        "initializer_range": 0.4,
    }
    return LlamaForCausalLM(LlamaConfig(**config | changes)).eval()


def inputs_of(tokenizer, prompts=PROMPTS):
    return tokenizer(prompts, return_tensors="pt", padding=True).to("cpu")


class Copying(LogitsProcessor):
    """Another's processor on a copy of the scores, so that it can write where it likes."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, input_ids, scores):
        return self.processor(input_ids, scores.clone())


EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def plain(model, inputs, processors=(), **asked):
    """What transformers gives without fastlogits, with raw logits that no processor has written into."""
    return generate(model, inputs, LogitsProcessorList(Copying(processor) for processor in processors), **asked)


def generate(model, inputs, processors=(), seed=0, **asked):
    """One call of ``generate`` with everything that it can give back."""
    torch.manual_seed(seed)
    return model.generate(**inputs, logits_processor=processors or None, **EVERYTHING | asked)


def assert_same(ours, theirs):
    """Tokens, processed scores and raw logits, bit for bit."""
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert len(mine) == len(other)
        for step, (a, b) in enumerate(zip(mine, other, strict=True)):
            assert torch.equal(a, b), f"{name} of step {step}"


def in_thread(work, seconds=60.0):
    """What ``work`` returns, from a thread; an error where it has not returned after ``seconds``."""
    result, error = [], []

    def run():
        try:
            result.append(work())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"still waiting after {seconds} s"
    if error:
        raise error[0]
    return result[0]
