"""What all tests share: poisoned memory, and fixtures of tiny models and tokenizers."""

import gc
import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from fastlogits_kernels.runtime import backend
from fastlogits_kernels.runtime.launcher import HAS_TRITON
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, T5ForConditionalGeneration

from tests.models import BUILDERS, tiny_llama, tiny_t5

if HAS_TRITON:
    from tests import interpreter

    interpreter.speed_up()

pytest_plugins = ["tests.durations"]

# The same examples each time, so that a failure is a change's own; FASTLOGITS_FUZZ=1 looks for new ones, round after
# round in one process, where each makes the classes of tests anew.
settings.register_profile("same", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("new", suppress_health_check=[HealthCheck.differing_executors])
settings.load_profile("new" if os.environ.get("FASTLOGITS_FUZZ") else "same")


@pytest.fixture(autouse=True, scope="module")
def _older_objects_are_no_garbage():
    """What earlier files have imported and made stays: nobody looks through it again, as some tests do each call."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Triton's libraries complain of what is left at the end


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what ``torch.empty`` returns with NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _same_numbers():
    """What a test draws depends on no test before it."""
    torch.manual_seed(0)
    random.seed(0)


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


@pytest.fixture(scope="session", params=list(BUILDERS))
def raw_tokenizer(request) -> Tokenizer:
    return BUILDERS[request.param]()


@pytest.fixture(scope="session")
def tokenizer(raw_tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=raw_tokenizer)


@pytest.fixture(scope="session")
def sentencepiece() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=BUILDERS["sentencepiece"](),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="session")
def t5() -> T5ForConditionalGeneration:
    return tiny_t5()
