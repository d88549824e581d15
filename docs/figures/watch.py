"""The picture of docs/watch.md: the page of a run of a real model, in headless Chromium.

Run it with ``python docs/figures/watch.py``. It needs a browser and the real model, see ``fastlogits.demo.real_model``.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).with_suffix(".png")
MOST = 150_000
"""Bytes."""
WIDTH = 1240
"""Of the window, in CSS pixels."""


def page(path: Path) -> None:
    """Write the page of the run that is shown."""
    import torch

    import fastlogits as fl
    from fastlogits.demo.real_model import PROMPT, load_real

    model, tokenizer = load_real()
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    first = fl.SuppressFirstTokens(fl.TokenMask.matching(tokenizer, r"\s*\d"))
    asked = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2}
    torch.manual_seed(0)
    with fl.watch(model, tokenizer) as watched:
        model.generate(**inputs, max_new_tokens=48, logits_processor=fl.LogitsProcessorList([first]), **asked)
    watched.save(path)


def main() -> None:
    """Draw the first step."""
    from PIL import Image

    from tests.chromium import Chromium

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        page(path)
        with Chromium() as browser:
            browser.open(path, WIDTH, scale=1.5)
            shown = browser.picture(browser.run("document.querySelector('footer').offsetTop"))
    picture = Image.open(io.BytesIO(shown)).convert("RGB")
    picture.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(OUT, optimize=True)
    size = OUT.stat().st_size
    if size > MOST:
        raise SystemExit(f"{OUT} has {size} bytes, and more than {MOST} are too many for a repository")
    print(f"{OUT}: {size} bytes")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    main()
