"""A Llama-2-like tokenizer and a small Llama, trained on the corpus in well under a minute and cached."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fastlogits import LogitsProcessorList, SuppressFirstTokens, TokenMask
from fastlogits.demo import corpus

# The first seed learns to copy on the machines tried. So short a training can fail elsewhere; then the next is tried.
SEEDS = (0, 2, 4)
STEPS = 460
SINGLE_TURN_STEPS = 260
CHATS_PER_STEP = 32
PEAK_LEARNING_RATE = 7e-3

# Tokens that begin with a digit, whether or not a space comes before it.
DIGITS = r"\s*\d"

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]

# The space before the answer belongs to the answer, not to the prompt: so its first token is "▁1", and
# never a bare "▁" that would hide the digit from a rule about the first token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


def load_or_train(
    cache_dir: Path | None = None, *, console: Console | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the demo's model and tokenizer, after training them if the cache lacks them.

    Args:
        cache_dir: where trained models live; by default `$FASTLOGITS_CACHE`, else `fastlogits` in
            `$XDG_CACHE_HOME` or `~/.cache`.
        console: where the progress bar goes; by default standard output.

    Returns:
        The model, float32 on the CPU and in evaluation mode, and its tokenizer, which pads on the left.
    """
    root = _default_cache() if cache_dir is None else cache_dir
    folder = root / f"tiny-llama-{_recipe()}"
    with _quiet():
        if not folder.is_dir():
            tokenizer = build_tokenizer()
            for seed in SEEDS:
                model = train(tokenizer, seed, console=console)
                if _has_learned(model, tokenizer):
                    break
            _publish(model, tokenizer, folder)
        return LlamaForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer: byte pairs over "▁"-prefixed words, unknown characters as bytes."""
    rng = random.Random(0)
    chats = [corpus.sample_chat(rng, turns=2) for _ in range(2000)]
    texts = [f"[INST] {m['content']} [/INST]" if m["role"] == "user" else m["content"] for c in chats for m in c]
    texts += ["0 1 2 3 4 5 6 7 8 9"] * 2

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[.,:;!?]"), "isolated"),
        ]
    )
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, min_frequency=2, show_progress=False))

    # Byte tokens are plain vocabulary, as in Llama: given to the trainer they would become special
    # tokens, which decoding skips.
    learned = json.loads(tokenizer.to_str())["model"]
    tokens = SPECIAL_TOKENS + BYTE_TOKENS + sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokenizer.model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[(left, right) for left, right in learned["merges"]],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def train(tokenizer: PreTrainedTokenizerFast, seed: int, *, console: Console | None = None) -> LlamaForCausalLM:
    """Train the model from scratch on the CPU, deterministically, with a progress bar on `console`."""
    with _one_thread(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(seed)
        rng = random.Random(seed)
        model = LlamaForCausalLM(_config(tokenizer))
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK_LEARNING_RATE, STEPS, pct_start=0.08, anneal_strategy="linear", cycle_momentum=False
        )
        with _progress(console) as progress:
            task = progress.add_task("Training", total=STEPS, loss=float("nan"))
            for step in range(STEPS):
                # Copying is learned soonest on short sequences, and then carried over to a whole chat.
                turns = 1 if step < SINGLE_TURN_STEPS else 2
                loss = _loss(model, *_batch(tokenizer, rng, turns))
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                progress.update(task, advance=1, loss=loss.item())
    return model.eval()


def _has_learned(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether it answers new articles with a list, and with the sentence where no digit may come first."""
    rng = random.Random(1)
    articles = [corpus.sample_article(rng, held_out=True) for _ in range(8)]
    chats = [[{"role": "user", "content": corpus.FIRST_REQUEST + article.text}] for article in articles]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    digits = TokenMask.matching(tokenizer, DIGITS)
    right = 0
    for processors, answer in ((), "list_answer"), ((SuppressFirstTokens(digits),), "sentence_answer"):
        output = model.generate(
            **inputs, logits_processor=LogitsProcessorList(processors), max_new_tokens=64, do_sample=False
        )
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(said.strip() == getattr(article, answer) for said, article in zip(answers, articles, strict=True))
    return right >= 12


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: hardly slower on so small a model, the same sums everywhere, no waiting on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers, which flash by on so small a model."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        # Words to copy are found by what they are, at most a few hundred positions back.
        rope_theta=100.0,
        # Tied, a copied token's embedding is its own output direction.
        tie_word_embeddings=True,
        # With the default of 0.02, made for wider models, copying is not learned in this time.
        initializer_range=0.08,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, turns: int) -> tuple[Tensor, Tensor]:
    """Token ids, and where they belong to an answer, both [chats, tokens]."""
    batch = tokenizer.apply_chat_template(
        [corpus.sample_chat(rng, turns=turns) for _ in range(CHATS_PER_STEP // turns)],
        return_tensors="pt",
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=True,
        # Causal attention sees no padding on the right, and so needs no mask.
        tokenizer_kwargs={"padding_side": "right"},
    )
    return batch["input_ids"], batch["assistant_masks"].bool()


def _loss(model: LlamaForCausalLM, ids: Tensor, is_answer: Tensor) -> Tensor:
    """Mean cross entropy of the answers' tokens; the articles are random, there is nothing to learn."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    return cross_entropy(model.lm_head(hidden[is_answer[:, 1:]]), ids[:, 1:][is_answer[:, 1:]])


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )


def _default_cache() -> Path:
    if own := os.environ.get("FASTLOGITS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlogits"


def _recipe() -> str:
    """A hash of all that decides what is trained."""
    source = b"".join(Path(file).read_bytes() for file in (corpus.__file__, __file__))
    return hashlib.sha256(source + torch.__version__.split(".")[0].encode()).hexdigest()[:12]


def _publish(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under `folder`, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        draft = Path(temporary) / folder.name
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        try:
            draft.rename(folder)
        except OSError:
            # Another process may have trained the same model meanwhile.
            if not folder.is_dir():
                raise
