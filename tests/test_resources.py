"""Every kernel compiles for the GPUs we name, without spilling, with 16-byte accesses; no GPU is needed for that."""

import json
import os
import subprocess
import sys

import pytest
from fastlogits_kernels import _triton

pytestmark = pytest.mark.skipif(not _triton.HAS_TRITON, reason="needs Triton")

# In a process of its own: this one may have chosen the interpreter, which compiles nothing.
COMPILE = r"""
import json, re, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.backends.nvidia.compiler import get_ptxas
from fastlogits_kernels import bitmask, fold, keep, mask_tokens, pack_ids, report, select, settle, slot_sets, sweep
from fastlogits_kernels import synthid, token_sets

capability = int(sys.argv[1])
STREAMED = ("scores_ptr", "logits_ptr", "out_ptr", "rounds_like_ptr")
TYPES = {name: "i64" for name in ("ids_ptr", "tokens_ptr", "cache_position_ptr", "prompt_length_ptr")}
TYPES |= {name: "fp32" for name in ("planes_ptr", "row_values_ptr", "biases_ptr")}
TYPES |= {name: "fp32" for name in ("top_ptr", "sums_ptr", "next_sums_ptr")}
TYPES |= {"values_ptr": "fp64", "seeds_ptr": "i64", "positions_ptr": "i64", "temperature_ptr": "fp32"}
TYPES |= {"logprobs_ptr": "fp32", "top_logprobs_ptr": "fp32", "ranks_ptr": "i64", "top_tokens_ptr": "i64"}
TYPES |= {"floats_ptr": "fp32", "longs_ptr": "i64", "slots_ptr": "i64", "drafts_ptr": "i64", "local_ptr": "i64"}
TYPES |= {"values_ptr slot_sets": "fp32", "tokens_ptr append": "i64"}
SELECTION = select._launchers._asdict()  # with their warps and limits
ROW_VALUES = [f"r{i}" for i in range(8)]  # of rules
TYPES |= dict.fromkeys(ROW_VALUES, "fp32")
TYPES |= {"table_ptr synthid": "u8", "offsets_ptr": "i64", "skip_ptr": "i1"}


def compile_(case, kernel, dtype, absent, constants, warps=4):
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name in absent or name in ("stride_token", "stride_out_token"):
            signature[name], values[name] = "constexpr", constants.get(name, 1 if "stride" in name else None)
        elif name == "numbers_ptr":
            signature[name] = "*fp64" if "TASKS" in constants else "*fp32"
        elif name.endswith("_ptr") or name in ROW_VALUES:
            own = TYPES.get(f"{name} {case.split()[0]}", TYPES.get(name, "i32"))
            signature[name] = "*" + (dtype if name in STREAMED else own)
        else:
            signature[name] = {"multiplier": "i64", "share": "fp32", "capacity": "fp32"}.get(name, "i32")
        if name in STREAMED or name in ("V", "stride_row", "stride_out"):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    launcher = SELECTION.get(case.split()[0])
    options = {"num_warps": warps} if launcher is None else launcher._options
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


cases = {}
gated = {"GATES": 2, "BLOCK_W": 32}
for dtype in ("fp32", "fp16", "bf16"):
    everything = gated | {"IN_PLACE": False}
    cases[f"mask_tokens {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, (), everything)
    absent = ("windows_ptr", "blanks_ptr", "allowed_ptr", "ids_ptr", "cache_position_ptr", "prompt_length_ptr")
    cases[f"mask_tokens static {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, absent, everything | {"GATES": 1})
    in_place = gated | {"IN_PLACE": True, "BLOCK_W": 64}
    cases[f"mask_tokens_ {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, (), in_place)
    cases[f"bitmask {dtype}"] = (bitmask._bitmask_kernel, dtype, (), {"BLOCK_W": 64})
    cases[f"mask_listed_tokens {dtype}"] = (mask_tokens._mask_listed_tokens_kernel, dtype, (), {"BLOCK_N": 128})
    ops = tuple(n for kind in range(11) for n in (kind, kind % 3, 2, 1))
    chain = {"OPS": ops, "MAX": 65504.0, "BLOCK_W": 32}
    cases[f"fold {dtype}"] = (fold._fold_kernel, dtype, (), chain)
    short = {"OPS": (*(0, 0, 0, 0), *(2, 1, 0, 1), *(3, -1, 2, 3)), "MAX": 65504.0, "BLOCK_W": 32}
    absent = ("planes_ptr", "row_values_ptr", "biases_ptr")
    cases[f"fold short {dtype}"] = (fold._fold_kernel, dtype, absent, short)
    tasks = tuple(n for kind in range(11) for n in (kind, kind if kind < 9 else -1, 0, 2, 0, 0))
    search = {"TASKS": tasks, "SETS": 9, "ROW_VALUES": 1, "SPLITS": 4, "BLOCK": 1024}
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
for dtype in ("fp32", "bf16"):
    absent = tuple(f"r{i}" for i in range(8)) + ("bits_ptr", "planes_ptr", "biases_ptr", "row_values_ptr")
    chain = {"OPS": (3, -1, 2, 3), "MAX": 65504.0}
    rules = {"RULES": (0, 1, -1, 1, 1, -2), "SUMS": 1, "NORMALISE": False, "TILES": 64}
    fixed = {"BRACKETED": True, "GREEDY": False, "SAMPLE": 8192, "BITS": 20}
    swept = {"FILL": float("-inf"), "BANDED": False, "BRACKETED": True, "MAY_BE_FREE": False}
    swept |= {"BLOCK_W": 32, "PORTABLE": False}
    early = {"PDL": capability >= 90}
    more = ("temperature_ptr", "seeds_ptr", "positions_ptr", "tokens_ptr")
    cases[f"sums {dtype}"] = (sweep.sums_kernel, dtype, absent + more, chain | rules | fixed | early | {"SUMS": 3})
    cases[f"bound {dtype}"] = (sweep.bound_kernel, dtype, absent + more, chain | rules | fixed | early)
    unlisted = absent + more + ("listed_ptr", "spans_ptr")
    cases[f"sweep {dtype}"] = (sweep.sweep_kernel, dtype, unlisted, chain | swept | early)
    setup = (False, False, 65504.0, 1, True, False, float("-inf"), 1024)
    settled = chain | rules | early | {"SETUP": setup, "PARTS": 128}
    cases[f"settle {dtype}"] = (settle.settle_kernel, dtype, absent + more, settled)
    raw = ("temperature_ptr", "alive_ptr", "counts_ptr") + absent
    shape = {"FIRST": False, "GROUP": 128, "MAX": 65504.0}
    tiled, merged = {"GROUPED": True}, {"GROUPS": 2048, "TILES": 128, "SLOTS": 32}
    for form, gone, ops in (("raw", raw, ()), ("processed", absent, chain["OPS"])):
        shape |= {"OPS": ops, "BANDED": form == "processed"}
        cases[f"report tiles {form} {dtype}"] = (report.tiles_kernel, dtype, gone, shape | tiled)
        cases[f"report {form} {dtype}"] = (report.report_kernel, dtype, gone, shape | merged)
    # What follows the search of a serving step: edited logits, bans.
    served = {"OPS": (*(12, 1, 2047, 2), *(0, 0, -1, -1)), "MAX": 3.4028234663852886e38}
    absent = tuple(f"r{i}" for i in range(7, 8)) + ("biases_ptr", "row_values_ptr")
    summed = {"RULES": tuple(n for i, kind in enumerate((7, 0, 1, 2, 3, 4, 5)) for n in (kind, 1, i))}
    summed |= {"SUMS": 3, "GREEDY": True, "NORMALISE": False, "TILES": 64}
    cases[f"sums served {dtype}"] = (sweep.sums_kernel, dtype, absent, served | early | fixed | summed)
    swept |= {"MAY_BE_FREE": True, "BANDED": True}
    cases[f"bound served {dtype}"] = (sweep.bound_kernel, dtype, absent, served | early | fixed | summed)
    cases[f"sweep served {dtype}"] = (sweep.sweep_kernel, dtype, (*absent, "out_ptr"), served | swept | early)
    grouped = served | shape | tiled | {"OPS": served["OPS"], "MAX": served["MAX"], "BANDED": True}
    cases[f"report tiles served {dtype}"] = (report.tiles_kernel, dtype, absent, grouped)
    kept = served | {"FILL": float("-inf"), "FIRST": False, "BANDED": True, "BLOCK_W": 32}
    cases[f"keep served {dtype}"] = (keep._keep_kernel, dtype, absent, kept)
    cases[f"fold served {dtype}"] = (fold._fold_kernel, dtype, absent, served | {"BLOCK_W": 32})
    search = {"BIAS_LAST": False, "WORDS_IN_OUTPUT": True, "ROOM": 2048, "BLOCK": 1024, "LIST_BLOCK": 128} | early
    cases[f"slot_sets {dtype}"] = (slot_sets._slot_sets_kernel, dtype, (), search | {"DRAWS": dtype == "fp32"}, 8)
    absent = ("cache_position_ptr", "local_ptr", "drafts_ptr", "bitmask_ptr")
    cases[f"slot_sets plain {dtype}"] = (slot_sets._slot_sets_kernel, dtype, absent, search | {"DRAWS": False}, 8)
cases["append"] = (slot_sets._append_kernel, "fp32", (), {"BLOCK": 32})
cases["swap"] = (slot_sets._swap_kernel, "fp32", (), {"BLOCK": 1024})
cases["pack_ids"] = (pack_ids._pack_ids_kernel, "fp32", (), {"BLOCK_L": 256})

for form, (done, more, first, wraps) in {
    "first": (0, 3, True, False), "second": (3, 3, True, False), "middle": (3, 3, False, False),
    "last": (3, 0, False, False), "wraps": (3, 3, False, True),
}.items():
    step = {"DONE": done, "NEXT": more, "FROM_SCORES": first, "WRAPS": wraps}
    step |= {"WIDTH": 8, "BLOCKS": 64, "BLOCK_V": 2048} | ({} if wraps else {"multiplier": 1})
    cases[f"synthid {form}"] = (synthid._synthid_kernel, "fp32", (), step)

found = {}
for name, case in cases.items():
    compiled = compile_(name, *case)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        said = subprocess.run(
            [get_ptxas(capability).path, "-v", f"-arch={target}", ptx.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr
    found[name] = {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "wide": len(re.findall(r"(?:ld|st)\.global[^\s]*\.v4", compiled.asm["ptx"])),
    }
print(json.dumps(found))
"""


# A register or two may spill in a search of all kinds at once, which no list of processors is, in SynthID's rare form,
# and in a report, which for sm_100 is held to 64. Nine hashes of 64 bits are in flight in that form of SynthID, where a
# table's size is no power of two. Registers are the compiler's choice: each version has the limits that it was seen to
# keep, and another is only asked to compile.
SEARCHES = ("token_sets fp32", "token_sets fp16", "token_sets bf16")
REPORTS = ("report tiles processed fp32", "report tiles processed bf16")
SPILLED = {
    (3, 9): dict.fromkeys(SEARCHES, 4) | {"synthid wraps": 4} | dict.fromkeys(REPORTS, 8),
    (3, 6): dict.fromkeys(SEARCHES, 12) | {"synthid wraps": 4, "synthid first": 60} | dict.fromkeys(REPORTS, 8),
}
REGISTERS = {
    (3, 9): {"synthid wraps": 192},
    (3, 6): {"synthid wraps": 192, "report processed fp32": 192, "report processed bf16": 192},
}
VERSION = tuple(int(n) for n in _triton.triton.__version__.split(".")[:2]) if _triton.HAS_TRITON else ()
# Of a serving step all rules are compiled, and rows that are kept whole: limits keep these from costing the others.
SPILLING = ("bound served", "sweep served")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_registers_spills_and_widths(capability):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, str(capability)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if VERSION not in SPILLED:
        measured = " and ".join(".".join(map(str, version)) for version in SPILLED)
        pytest.skip(f"all compile; the limits are those of Triton {measured}")
    report = json.loads(done.stdout)
    for name, kernel in report.items():
        if name.startswith("settle"):  # rows that are settled as a whole may spill
            continue
        most = 256 if name.startswith(SPILLING) else SPILLED[VERSION].get(name, 0)
        assert kernel["spilled"] <= most, (name, kernel)
        assert kernel["registers"] <= REGISTERS[VERSION].get(name, 136), (name, kernel)
        if name.startswith(("mask_tokens", "bitmask", "fold", "sweep fp32", "report tiles raw")):
            assert kernel["wide"] >= 2, (name, kernel)
