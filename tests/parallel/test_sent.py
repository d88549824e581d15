"""What ranks send each other: all of it is written, so that nothing else of a rank's memory leaves it."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from fastlogits_kernels.runtime import launcher

from tests.campaign import sanitizer_cases

pytestmark = [
    pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="initcheck of tests.campaign.sanitizer says so there"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

BY_PARTS = [name for name in sanitizer_cases.OPERATIONS if "parts" in name]
BYTES = (0x00, 0x5A, 0xFF)
"""What memory holds before anyone writes it."""


def sent_of(case, byte):
    """What each rank sends, as bytes, where new tensors hold such a byte everywhere."""
    make = torch.empty

    def filled(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(byte)
        return tensor

    sent = []
    exchanged = partial(sanitizer_cases.exchanged, sent=sent)
    with patch.object(torch, "empty", filled), patch.object(sanitizer_cases, "exchanged", exchanged):
        sanitizer_cases.run_case(case, torch.device("cpu"), check=False)
    return [[each.contiguous().view(-1).view(torch.uint8) for each in of_rank] for of_rank in sent]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("operation", BY_PARTS)
def test_no_rank_sends_what_stood_in_its_memory(operation):
    torch.utils.deterministic.fill_uninitialized_memory = False
    case = next(case for case in sanitizer_cases.chosen([operation]) if case.B == 3 and 1000 <= case.V < 10000)
    first, *others = [sent_of(case, byte) for byte in BYTES]
    assert len(first) == 3
    assert all(len(each) for each in first)
    for other in others:
        for mine, its in zip(first, other, strict=True):
            assert [torch.equal(*pair) for pair in zip(mine, its, strict=True)] == [True] * len(mine)
