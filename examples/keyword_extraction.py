"""Keywords that stand in the text: only tokens of the source may be generated, another set for each row.

    python examples/keyword_extraction.py

The model has random weights, so the keywords mean nothing; they are all from the text.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastlogits as fl

COMMA, END, PAD = 1, 2, 0


def main() -> None:
    """Extract from two texts at once."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, pad_token_id=PAD, eos_token_id=END, **sizes)).eval()

    sources = torch.tensor([[17, 230, 44, 391], [88, 90, 412, 90]])
    ask = torch.tensor([[3, 4]]).expand(2, -1)
    prompt = torch.cat([ask, sources], 1)

    # Tokens of the source, and a comma between them; the end is always allowed.
    processors = fl.LogitsProcessorList([fl.OnlyTokensFrom(sources, [COMMA], eos_token_id=END)])
    said = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=True, logits_processor=processors
    )
    for source, row in zip(sources.tolist(), said[:, prompt.shape[1] :].tolist(), strict=True):
        assert set(row) <= {*source, COMMA, END, PAD}
        print(f"from {source}: {row}")


if __name__ == "__main__":
    main()
