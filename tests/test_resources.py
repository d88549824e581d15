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
from fastlogits_kernels import mask_tokens, pack_ids

capability = int(sys.argv[1])
STREAMED = ("scores_ptr", "out_ptr")


def compile_(kernel, dtype, absent, constants):
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants or name in absent or name == "stride_token":
            signature[name], values[name] = "constexpr", constants.get(name, 1 if name == "stride_token" else None)
        elif name.endswith("_ptr"):
            wide = name in ("ids_ptr", "tokens_ptr", "cache_position_ptr", "prompt_length_ptr")
            signature[name] = "*" + (dtype if name in STREAMED else "i64" if wide else "i32")
        else:
            signature[name] = "i32"
        if name in STREAMED or name in ("V", "stride_row", "stride_out"):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


cases = {}
gated = {"GATES": 2, "BLOCK_W": 32}
for dtype in ("fp32", "fp16", "bf16"):
    everything = gated | {"IN_PLACE": False}
    cases[f"mask_tokens {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, (), everything)
    absent = ("windows_ptr", "blanks_ptr", "allowed_ptr", "ids_ptr", "cache_position_ptr", "prompt_length_ptr")
    cases[f"mask_tokens static {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, absent, everything | {"GATES": 1})
    in_place = gated | {"IN_PLACE": True, "BLOCK_W": 64}
    cases[f"mask_tokens_ {dtype}"] = (mask_tokens._mask_tokens_kernel, dtype, (), in_place)
    cases[f"mask_listed_tokens {dtype}"] = (mask_tokens._mask_listed_tokens_kernel, dtype, (), {"BLOCK_N": 128})
cases["pack_ids"] = (pack_ids._pack_ids_kernel, "fp32", (), {"BLOCK_L": 256})

report = {}
for name, case in cases.items():
    compiled = compile_(*case)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"])
        ptx.flush()
        target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
        said = subprocess.run(
            [get_ptxas(capability).path, "-v", f"-arch={target}", ptx.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr
    report[name] = {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "wide": len(re.findall(r"(?:ld|st)\.global[^\s]*\.v4", compiled.asm["ptx"])),
    }
print(json.dumps(report))
"""


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
    report = json.loads(done.stdout)
    for name, kernel in report.items():
        assert kernel["spilled"] == 0, (name, kernel)
        assert kernel["registers"] <= 128, (name, kernel)
        if name.startswith("mask_tokens"):
            assert kernel["wide"] >= 2, (name, kernel)
