"""What all tests share: poisoned memory, tiny tokenizers of each kind, tiny models made on the spot."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from fastlogits_kernels.runtime import backend
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

# The same examples each time, so that a failure is a change's own; FASTLOGITS_FUZZ=1 looks for new ones, round after
# round in one process, where each makes the classes of tests anew.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", suppress_health_check=[HealthCheck.differing_executors])
settings.load_profile("new" if os.environ.get("FASTLOGITS_FUZZ") else "same")

CORPUS = [
    "In 1990 the number 7 tram ran 12 km and cost 3.50 in 2 zones.",
    "Room 101 has 8 chairs, 64 books and 0 windows; rooms 9 and 5 have 4 and 6.",
    "It's 1999 or 2024: 1 2 3 4 5 6 7 8 9 0 and 10 20 30.",
]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what ``torch.empty`` returns with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _kernels_again():
    """A test in which a kernel fails leaves the kernels to the others, and each that falls back says so."""
    yield
    for operation in backend._operations:
        operation.lost.clear()
    backend._warned = False


@pytest.fixture(scope="module")
def one_thread():
    """Threads cost more than they save on small tensors, above all where the cores have other work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def accelerates_nothing_after():
    """No test leaves anything accelerated or wrapped."""
    from transformers import GenerationMixin

    from fastlogits.transformers import accelerate as acceleration

    methods = {name: getattr(GenerationMixin, name, None) for name in acceleration._WRAPPERS}
    yield
    assert not acceleration._state.everything
    assert not len(acceleration._state.models)
    assert methods == {name: getattr(GenerationMixin, name, None) for name in acceleration._WRAPPERS}


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sentencepiece() -> Tokenizer:
    """Llama-2's kind: metaspace, byte fallback, digits apart."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special[:3], initial_alphabet=["1", "▁"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = tokenizer.get_vocab()
    for piece in special[3:] + [f"▁{digit}" for digit in range(10)]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer.model = models.BPE(
        vocab=vocabulary, merges=[("▁", str(digit)) for digit in range(10)], byte_fallback=True, unk_token="<unk>"
    )
    return tokenizer


def _byte_level() -> Tokenizer:
    """GPT-2's kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|reserved_1|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _wordpiece() -> Tokenizer:
    """BERT's kind."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


BUILDERS = {"sentencepiece": _sentencepiece, "byte_level": _byte_level, "wordpiece": _wordpiece}


@pytest.fixture(scope="session", params=list(BUILDERS))
def raw_tokenizer(request) -> Tokenizer:
    return BUILDERS[request.param]()


@pytest.fixture(scope="session")
def tokenizer(raw_tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer)


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=_sentencepiece(), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


VOCAB_SIZE = 97


def tiny_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # Logits far enough apart that greedy choices differ from step to step.
        initializer_range=0.4,
        **changes,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
        initializer_factor=4.0,
    )
    return T5ForConditionalGeneration(config).eval()
