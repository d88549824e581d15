"""Ask a chat model, forbid it to begin its answer with a digit, and see both answers step by step on one page.

    python examples/watch_a_chat.py             # the page goes to the folder for temporary files
    python examples/watch_a_chat.py page.html

It asks SmolLM2-135M-Instruct where that is installed, see docs/watch.md. Else it trains a tiny model, in a minute.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import fastlogits as fl
from fastlogits.demo.real_model import PROMPT, NotInstalledError, load_real
from fastlogits.demo.tiny_model import load_or_train

TINY_PROMPT = "Summarise the article in one sentence: In Paris, Anton Pereira bought a piano. All of it cost 600 euros."


def main() -> None:
    """Generate twice, as it is and with the processor, and watch both."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.gettempdir()) / "watch.html"
    try:
        (model, tokenizer), prompt = load_real(), PROMPT
    except NotInstalledError as error:
        print(f"{error}\nA tiny model takes its place.\n")
        (model, tokenizer), prompt = load_or_train(), TINY_PROMPT

    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    digits = fl.TokenMask.matching(tokenizer, r"\s*\d")
    first = fl.LogitsProcessorList([fl.SuppressFirstTokens(digits)])
    print(f"prompt: {prompt}")
    with fl.watch(model, tokenizer) as watched:
        for name, processors in (("as it is", None), ("no digit first", first)):
            said = model.generate(**inputs, max_new_tokens=40, do_sample=False, logits_processor=processors)
            answer = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(f"\n{name}:\n{answer.strip()}")

    for call in watched.calls:
        step = call.rows[0][0]
        print(f"\ncall {call.number + 1}, first step: {tokenizer.decode([step.token])!r} was drawn,", end=" ")
        print(f"place {step.rank} of {step.left:,}; by the model alone place {step.rank_before} of {step.candidates:,}")
    print(f"\nevery step: {watched.save(path)}")


if __name__ == "__main__":
    main()
