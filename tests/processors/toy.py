"""A tokenizer of sixteen tokens, and scores as a fixed function of the text: what loops over rows are tested with."""

from contextlib import contextmanager

import torch
from hypothesis import settings
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
few = settings(deadline=None, max_examples=60)

V = 16
PAD, EOS, STOP, LINE, ONE, TWO, A, B, C = 0, 2, 3, 4, 5, 6, 7, 8, 9
VOCABULARY = {"<pad>": PAD, "<s>": 1, "</s>": EOS, ".": STOP, "\n": LINE, "1": ONE, "2": TWO, "a": A, "b": B, "c": C}
PHRASE = (LINE, A, B)  # begins with a token that texts hold anyway


def make_tokenizer():
    rest = {f"w{i}": i for i in range(len(VOCABULARY), V)}
    raw = Tokenizer(models.WordLevel({**VOCABULARY, **rest}, unk_token="w15"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" "), "removed"), pre_tokenizers.Split(Regex(r"\n|\."), "isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>", bos_token="<s>")


TOKENIZER = make_tokenizer()


def same(a, b):
    a, b = a.cpu(), b.cpu()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def scores_of(text, dtype=torch.float32):
    """What the model says after a text: a fixed function of it; some tokens are likelier than others."""
    generator = torch.Generator().manual_seed(hash(tuple(text)) % 2**40)
    scores = torch.randn(V, generator=generator) * 2
    scores[[EOS, C, LINE]] += 1.0
    return scores.to(dtype)


def add(row, token, value):
    """Rounded once, to the dtype of the row."""
    row[token] = row[token].to(torch.promote_types(row.dtype, torch.float32)) + value


@contextmanager
def as_on_a_device():
    """Take the ways that are for devices, where nothing may wait."""
    torch.Tensor.is_cpu = False
    try:
        yield
    finally:
        del torch.Tensor.is_cpu


def only(row, token):
    forced = torch.full_like(row, -INF)
    forced[token] = 0
    return forced


def captured(call):
    """A CUDA graph of a call that has been made before, and what it returns; nothing may wait for the device."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph, result
