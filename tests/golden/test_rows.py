"""Golden rows: on each device, and by the kernels in the interpreter, what they have always been."""

import hashlib
import json

import pytest
import torch
from fastlogits_kernels.runtime import launcher
from fastlogits_kernels.selection import launch

from tests.golden import rows

KEPT = json.loads(rows.TABLE.read_text())
CASES = rows.cases()


def test_the_inputs_are_the_same_everywhere():
    digest = hashlib.sha256()
    for case in CASES:
        digest.update(rows.logits_of(case).float().numpy().tobytes())
    assert digest.hexdigest()[:16] == "b74804e3a25cae01"


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number].name)
def test_rows_are_what_they_were(number, device):
    assert rows.outcome(CASES[number], device) == KEPT[number]


@pytest.mark.slow
@pytest.mark.skipif(not launcher.HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("number", [1, 2, 3, 9, 24], ids=lambda number: CASES[number].name)
def test_the_kernels_say_the_same(number, monkeypatch):
    monkeypatch.setattr(launch, "FORCE_KERNEL", True)
    assert rows.outcome(CASES[number])["tokens"] == KEPT[number]["tokens"]


def test_a_row_does_not_depend_on_the_batch():
    case = CASES[2]
    logits = rows.logits_of(case)
    assert [bool(each.any()) for each in rows.kept_of(logits[:3], case)] == [True] * 3
    assert (rows.kept_of(logits[3:5], case) == rows.kept_of(logits, case)[3:5]).all()
