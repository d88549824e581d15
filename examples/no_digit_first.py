"""A chat model that may not begin its answer with a digit: one mask, and no global variable.

    python examples/no_digit_first.py                # a tiny model with random weights, which likes digits
    python examples/no_digit_first.py --model DIR    # a chat model of yours

It answers twice: as it is, and with the processor.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastlogits as fl


def tiny() -> tuple[Any, Any]:
    """A model with random weights that likes digits, and its tokenizer."""
    words = ["<pad>", "</s>", *(str(n) for n in range(10)), "the", "article", "is", "about", "cats", ".", "sum", "up"]
    spelling = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    spelling.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelling, pad_token="<pad>", eos_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight[2:12] *= 4  # so that digits are likely
    return model, tokenizer


def main() -> None:
    """Generate twice: as it is, and with the processor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a chat model; without it, a tiny one with random weights")
    parser.add_argument("--prompt", default="sum up the article")
    asked = parser.parse_args()
    if asked.model:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(asked.model), AutoTokenizer.from_pretrained(asked.model)
    else:
        model, tokenizer = tiny()

    inputs = tokenizer(asked.prompt, return_tensors="pt", return_token_type_ids=False)
    digits = fl.TokenMask.matching(tokenizer, r"\s*\d")
    processors = fl.LogitsProcessorList([fl.SuppressFirstTokens(digits)])
    for name, given in (("as it is", None), ("no digit first", processors)):
        torch.manual_seed(0)
        said = model.generate(**inputs, max_new_tokens=12, do_sample=False, logits_processor=given)
        print(f"{name}: {tokenizer.decode(said[0, inputs['input_ids'].shape[1] :])}")


if __name__ == "__main__":
    main()
