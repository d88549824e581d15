"""Ask a chat model for a list, forbid it to begin with a digit, and see both answers step by step on one page.

It takes SmolLM2-135M-Instruct where that is installed, see docs/watch.md, else a tiny model that is trained here in a
minute. Run it with `python examples/watch_a_chat.py [page.html]`.
"""

import sys

import fastlogits as fl
from fastlogits.demo.real_model import PROMPT, NotInstalledError, load_real
from fastlogits.demo.tiny_model import load_or_train

TINY_PROMPT = "Summarise the article in one sentence: In Paris, Anton Pereira bought a piano. All of it cost 600 euros."


def main(path: str = "watch.html") -> None:
    try:
        (model, tokenizer), prompt = load_real(), PROMPT
    except NotInstalledError as error:
        print(f"{error}\nA tiny model takes its place.\n")
        (model, tokenizer), prompt = load_or_train(), TINY_PROMPT

    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    digits = fl.TokenMask.matching(tokenizer, r"\s*\d")
    print("user     ", prompt)
    with fl.watch(model, tokenizer) as watched:
        for name, processors in (("before   ", []), ("after    ", [fl.SuppressFirstTokens(digits)])):
            output = model.generate(
                **inputs,
                logits_processor=fl.LogitsProcessorList(processors),
                max_new_tokens=40,
                do_sample=False,
            )
            answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            print(name, answer.strip().replace("\n", "\n          "))
    print(f"\nEach step of both answers: {watched.save(path)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
