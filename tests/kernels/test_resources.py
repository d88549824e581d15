"""Every kernel compiles for the GPUs we name, without spilling, with 16-byte accesses; no GPU is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fastlogits_kernels.runtime import launcher

ROOT = Path(__file__).parents[2]
# Slow whatever was measured: what Triton has compiled before, it takes from its cache.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not launcher.HAS_TRITON, reason="needs Triton")]

# In a process of its own: this one may have chosen the interpreter, which compiles nothing.
COMPILE = r"""
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastlogits_kernels.pointwise import bitmask, dense
from fastlogits_kernels.pointwise import fold
from fastlogits_kernels.pointwise import mask as mask_tokens
from fastlogits_kernels.pointwise import pack_ids
from fastlogits_kernels.serving import history as slot_histories
from fastlogits_kernels.serving import search as slot_sets
from fastlogits_kernels.pointwise import search as token_sets
from fastlogits_kernels import synthid

from tests.kernels.launches import brief, measured, pairs, taken

capability = int(sys.argv[1])
# Of all types for one capability, and for the others each kernel with one. fp16 is as wide as bf16: where numbers are
# only read and written, it compiles to the same.
DTYPES = ("fp32", "fp16", "bf16") if capability == 90 else ("bf16",)
STREAMED = ("scores_ptr", "logits_ptr", "out_ptr", "rounds_like_ptr")
TYPES = {name: "i64" for name in ("ids_ptr", "tokens_ptr", "cache_position_ptr", "prompt_length_ptr")}
TYPES |= {name: "fp32" for name in ("planes_ptr", "row_values_ptr", "biases_ptr")}
TYPES |= {name: "fp32" for name in ("top_ptr", "sums_ptr", "next_sums_ptr", "added_ptr", "scales_ptr")}
TYPES |= {"values_ptr": "fp64", "seeds_ptr": "i64", "positions_ptr": "i64", "temperature_ptr": "fp32"}
TYPES |= {"floats_ptr": "fp32", "longs_ptr": "i64", "slots_ptr": "i64", "drafts_ptr": "i64", "local_ptr": "i64"}
TYPES |= {"values_ptr slot_sets": "fp32", "tokens_ptr append": "i64"}
TYPES |= {"table_ptr synthid": "u8", "offsets_ptr": "i64", "skip_ptr": "i1"}


def compile_(case, kernel, dtype, absent, constants, warps=4):
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name in absent or name in ("stride_token", "stride_out_token"):
            signature[name], values[name] = "constexpr", constants.get(name, 1 if "stride" in name else None)
        elif name == "numbers_ptr":
            signature[name] = "*fp64" if "TASKS" in constants else "*fp32"
        elif name.endswith("_ptr"):
            own = TYPES.get(f"{name} {case.split()[0]}", TYPES.get(name, "i32"))
            signature[name] = "*" + (dtype if name in STREAMED else own)
        else:
            signature[name] = {"multiplier": "i64"}.get(name, "i32")
        if name in STREAMED or name in ("V", "stride_row", "stride_out"):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


cases = {}
gated = {"GATES": 2, "BLOCK_W": 32}
for dtype in DTYPES:
    cases[f"dense {dtype}"] = (dense._dense_kernel, dtype, (), {"BLOCK_W": 32})
    kinds = (*range(11), fold.SUBTRACT.value)
    ops = tuple(n for kind in kinds for n in (kind, kind % 3, 2, 1))
    chain = {"OPS": ops, "MAX": 65504.0, "BLOCK_W": 32}
    cases[f"fold {dtype}"] = (fold._fold_kernel, dtype, (), chain)
    short = {"OPS": (*(0, 0, 0, 0), *(2, 1, 0, 1), *(3, -1, 2, 3)), "MAX": 65504.0, "BLOCK_W": 32}
    absent = ("planes_ptr", "row_values_ptr", "biases_ptr")
    cases[f"fold short {dtype}"] = (fold._fold_kernel, dtype, absent, short)
for dtype in [each for each in DTYPES if each != "fp16"]:
    everything = gated | {"IN_PLACE": False}
    cases[f"mask_tokens {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, (), everything)
    absent = ("windows_ptr", "blanks_ptr", "allowed_ptr", "ids_ptr", "cache_position_ptr", "prompt_length_ptr")
    cases[f"mask_tokens static {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, absent, everything | {"GATES": 1})
    in_place = gated | {"IN_PLACE": True, "BLOCK_W": 64}
    cases[f"mask_tokens_ {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, (), in_place)
    cases[f"bitmask {dtype}"] = (bitmask._bitmask_kernel, dtype, (), {"BLOCK_W": 64})
    cases[f"mask_listed_tokens {dtype}"] = (mask_tokens._mask_listed_tokens_kernel, dtype, (), {"BLOCK_N": 128})
    of_sets = (*range(9), token_sets.REPETITIONS.value)
    tasks = tuple(n for found, kind in enumerate(of_sets) for n in (kind, found, 0, 2, 0, 0))
    tasks += tuple(n for kind in (9, 10) for n in (kind, -1, 0, 2, 0, 0))
    search = {"TASKS": tasks, "SETS": len(of_sets), "ROW_VALUES": 1, "SPLITS": 4, "BLOCK": 1024}
    cases[f"token_sets {dtype}"] = (token_sets._token_sets_kernel, dtype, (), search, 8)
    tasks = (*(0, 1, -1, 0, -1, -1), *(3, 0, -1, 0, -1, -1), *(5, 1, -1, 3, -1, -1), *(7, 2, -1, 0, -1, -1))
    search = {"TASKS": tasks, "SETS": 3, "ROW_VALUES": 0, "SPLITS": 4, "BLOCK": 1024}
    absent = ("rows_ptr", "sources_ptr", "starts_ptr", "gates_ptr", "numbers_ptr", "allowed_ptr", "planes_ptr")
    absent += ("cache_position_ptr", "prompt_length_ptr", "row_values_ptr")
    cases[f"token_sets short {dtype}"] = (token_sets._token_sets_kernel, dtype, absent, search, 8)
# n-grams that are longer than what is compared without a loop; a size may be any.
tasks = (*(5, 0, -1, 17, -1, -1), *(5, 0, -1, 100000, -1, -1), *(6, 0, -1, 2147483647, 0, -1))
search = {"TASKS": tasks, "SETS": 1, "ROW_VALUES": 0, "SPLITS": 4, "BLOCK": 1024}
cases["token_sets long"] = (token_sets._token_sets_kernel, "fp32", tuple(set(absent) - {"sources_ptr"}), search, 8)
early = {"PDL": capability >= 90}
for dtype in {"fp32", "bf16"} & set(DTYPES):
    search = {"BIAS_LAST": False, "WORDS_IN_OUTPUT": True, "ROOM": 2048, "BLOCK": 1024, "LIST_BLOCK": 128} | early
    search["COUNTS"] = dtype == "fp32"
    cases[f"slot_sets {dtype}"] = (slot_sets._slot_sets_kernel, dtype, (), search | {"DRAWS": dtype == "fp32"}, 8)
    absent = ("cache_position_ptr", "local_ptr", "drafts_ptr", "bitmask_ptr", "index_ptr")
    cases[f"slot_sets plain {dtype}"] = (slot_sets._slot_sets_kernel, dtype, absent, search | {"DRAWS": False}, 8)
grown = {"COUNTS": True, "INDEX_BLOCK": 1024}
cases["append"] = (slot_histories._append_kernel, "fp32", (), {"BLOCK": 256} | grown)
cases["append short"] = (slot_histories._append_kernel, "fp32", ("index_ptr",), {"BLOCK": 256} | grown)
cases["accept"] = (slot_histories._accept_kernel, "fp32", (), {"APPENDS": True, "BLOCK": 32} | grown)
cases["cover"] = (slot_histories._cover_kernel, "fp32", (), {"BLOCK": 256} | grown)
cases["swap"] = (slot_histories._swap_kernel, "fp32", (), {"BLOCK": 1024})
cases["pack_ids"] = (pack_ids._pack_ids_kernel, "fp32", (), {"BLOCK_L": 256})

for form, (done, more, first, wraps) in {
    "first": (0, 3, True, False), "second": (3, 3, True, False), "middle": (3, 3, False, False),
    "last": (3, 0, False, False), "wraps": (3, 3, False, True),
}.items():
    step = {"DONE": done, "NEXT": more, "FROM_SCORES": first, "WRAPS": wraps}
    step |= {"WIDTH": 8, "BLOCKS": 64, "BLOCK_V": 2048} | ({} if wraps else {"multiplier": 1})
    cases[f"synthid {form}"] = (synthid._synthid_kernel, "fp32", (), step)

with measured():
    found = {name: taken(compile_(name, *case)) for name, case in cases.items()}
print(json.dumps([found, (pairs if capability == 90 else brief)(capability)]))
"""


# A register or two may spill in a search of all kinds at once, which no list of processors is, and in SynthID's rare
# form: nine hashes of 64 bits are in flight there, where a table's size is no power of two. Registers are the
# compiler's choice: each version has the limits that it was seen to keep, and another is only asked to compile.
SEARCHES = ("token_sets fp32", "token_sets bf16")
STEPS = ("slot_sets fp32", "slot_sets bf16", "slot_sets plain fp32", "slot_sets plain bf16")
SPILLED = {
    # What a serving step looks for spills where its compiler gives a program 80 or 128 registers, of 255 that it may.
    (3, 9): dict.fromkeys(SEARCHES, 4) | {"synthid wraps": 4} | dict.fromkeys(STEPS, 28),
    # The last for sm_100 alone, where its compiler gives a program of 16-bit logits 80 registers, of 255 that it may.
    (3, 6): dict.fromkeys(SEARCHES, 12)
    | {"synthid wraps": 4, "synthid first": 60}
    | dict.fromkeys(STEPS, 36)
    | {"append": 8, "accept": 8},
}
REGISTERS = {"synthid wraps": 192}
# Of the selection, by call and kernel. Bounds and the filter are held to fewer registers, so that more programs run at
# once: where all rules are compiled, the rare branches spill. So does that of tiles of many survivors. Rows that take
# several passes take all that 16 warps may.
LIMITS = {
    "refine_rows": (128, 768), "bounds typical": (64, 256), "bounds serving": (64, 256), "filter serving": (48, 256),
    "bounds": (64, 40), "filter": (48, 8), "refine": (128, 0), "report": (192, 8), "tiles": (136, 8),
    "slot_sets": (136, 28), "masses": (136, 4), "selected": (136, 16), "given": (136, 12), "given_sums": (136, 8),
    "survivors": (96, 640),
}  # fmt: skip
VERSION = tuple(int(n) for n in launcher.triton.__version__.split(".")[:2]) if launcher.HAS_TRITON else ()


def told(*command):
    """What a process that compiles has printed."""
    command = [sys.executable, "-W", "ignore", *map(str, command)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compiled(*command):
    """The same, where the limits are those of this version of Triton."""
    found = told(*command)
    if VERSION not in SPILLED:
        measured = " and ".join(".".join(map(str, version)) for version in SPILLED)
        pytest.skip(f"all compile; the limits are those of Triton {measured}")
    return found


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_registers_spills_and_widths(capability):
    """Of all calls on Hopper, and of each kernel on the others; each with every dtype on one of them."""
    kernels, selection = compiled("-c", COMPILE, capability)
    for name, kernel in kernels.items():
        assert kernel["spilled"] <= SPILLED[VERSION].get(name, 0), (name, kernel)
        assert kernel["registers"] <= REGISTERS.get(name, 136), (name, kernel)
        if name.startswith(("mask_tokens", "bitmask", "fold", "dense")):
            assert kernel["wide"] >= 2, (name, kernel)
    calls = {"serving", "sample", "parts"}
    if capability == 90:
        calls |= {"list", "draw", "typical", "train"}
    assert {name.split()[1] for name in selection} == calls
    for name, kernel in selection.items():
        kind, call, _ = name.split()
        registers, spilled = LIMITS.get(f"{kind} {call}") or LIMITS.get(kind) or (136, 0)
        assert kernel["registers"] <= registers, (name, kernel)
        assert kernel["spilled"] <= spilled, (name, kernel)
        if kind in ("sums", "filter", "tiles"):
            assert kernel["wide"] >= 2, (name, kernel)
    if launcher._RELAUNCHES:
        assert not {name: each["unfit"] for name, each in (kernels | selection).items() if each["unfit"]}


@pytest.fixture(scope="module")
def in_two_processes():
    """What each of two processes says, which compile kernels in orders of their own."""
    launches = "-m", "tests.kernels.launches"
    first = told(*launches, "sources", 1, "keys", "smallest", 90)
    second = told(*launches, "sources", 2, "clashes", "amd")
    return dict(zip(("sources", "keys", "smallest"), first, strict=True)), dict(
        zip(("sources", "clashes", "amd"), second, strict=True)
    )


def test_a_key_says_all_that_a_kernel_is_compiled_for(in_two_processes):
    """Two launches of one key are one to Triton: else the second would run what was compiled for the first."""
    assert in_two_processes[0]["keys"] == []


def test_another_process_finds_what_this_one_has_compiled(in_two_processes):
    """Whatever either compiled first, and side by side: else a cache on disk is of no use."""
    first, second = in_two_processes
    assert first["sources"] == second["sources"]
    # In Triton 3.6 their order is one of addresses.
    assert second["clashes"] == []


def test_one_row_of_one_token_compiles(in_two_processes):
    """Of an integer that is 1 Triton makes a constant, and no tensor."""
    found = in_two_processes[0]["smallest"]
    assert {"refine_kernel", "refine_rows_kernel", "report_kernel", "_slot_sets_kernel", "_fold_kernel"} <= set(found)


def test_a_selection_compiles_for_amd(in_two_processes):
    kernels = {"bounds_kernel", "filter_kernel", "refine_kernel", "refine_rows_kernel", "sample_parts_kernel"}
    kernels.add("sample_rows_kernel")
    assert {name: set(found) for name, found in in_two_processes[1]["amd"].items()} == {
        "gfx942": kernels,
        "gfx950": kernels,
    }
