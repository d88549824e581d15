"""The demo, as a newcomer runs it; the model is trained where the cache does not hold it yet."""

import random
import re
import subprocess
import sys

import pytest
import torch

from fastlogits.demo import tiny_model
from fastlogits.demo.corpus import sample_article, sample_chat


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "fastlogits", "demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(output: str) -> list[str]:
    return re.findall(r"^model   (.*)$", output, re.MULTILINE)


@pytest.fixture(scope="module")
def output() -> str:
    return run()


def test_demo(output):
    assert [answer.startswith("1. ") for answer in answers(output)] == [True, True, False, False]
    assert all(re.match(r"[A-Z][a-z]+ [A-Z][a-z]+ ", answer) for answer in answers(output)[2:])
    assert "step 0 bans 0 -> ▁1" in output
    assert re.search(r"step 0 bans \d\d -> ▁[A-Z][a-z]+; 1 bans 0", output)
    assert "1 processor, 1 fused part" in output
    assert "loop / fastlogits" in output


def test_demo_with_a_model_of_ones_own(tmp_path, output):
    model, tokenizer = tiny_model.load_or_train()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert answers(run("--model", str(tmp_path), "--device", "cpu")) == answers(output)


def test_the_corpus_is_the_same_every_time():
    chats = [sample_chat(random.Random(5), turns=2) for _ in range(2)]
    assert chats[0] == chats[1]
    assert [message["role"] for message in chats[0]] == ["user", "assistant"] * 2
    article = sample_article(random.Random(5))
    assert article.list_answer.startswith("1. ")
    assert not article.sentence_answer[0].isdigit()


def test_an_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny_model, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_model.load_or_train(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_training_is_tried_again(tmp_path, monkeypatch):
    tried = []

    def cheap(tokenizer, seed, *, console=None):
        tried.append(seed)
        torch.manual_seed(seed)
        return tiny_model.LlamaForCausalLM(tiny_model._config(tokenizer)).eval()

    monkeypatch.setattr(tiny_model, "train", cheap)
    tiny_model.load_or_train(tmp_path)
    assert tried == list(tiny_model.SEEDS)
