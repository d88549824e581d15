"""A kernel that is wrong on purpose, for each tool of compute-sanitizer: one that finds nothing in it is blind.

    compute-sanitizer --tool memcheck python -m tests.campaign.sanitizer_control memcheck

Triton itself writes neither barriers for half a warp nor shared memory without barriers: those two are PTX.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_ASM = {
    # Each thread reads what one of another warp writes.
    "racecheck": """{
        .shared .align 4 .b32 place[128];
        .reg .b32 thread, here, there;
        mov.u32 thread, %tid.x; shl.b32 thread, thread, 2; mov.u32 here, place;
        xor.b32 there, thread, 128; add.u32 there, there, here; add.u32 here, here, thread;
        st.volatile.shared.b32 [here], $1; ld.volatile.shared.b32 $0, [there];
    }""",
    "synccheck": """{
        .reg .pred half; .reg .b32 thread;
        mov.u32 thread, %tid.x; and.b32 thread, thread, 16; setp.eq.u32 half, thread, 0; mov.b32 $0, $1;
        @half bar.sync 1, 64;
    }""",
}


@triton.jit
def _wrong_kernel(from_ptr, to_ptr, ASM: tl.constexpr):
    lane = tl.arange(0, 128)
    x = tl.load(from_ptr + lane)
    if ASM is not None:
        x = tl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(to_ptr + lane, x)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kernel that a tool has to find something in."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign.sanitizer_control", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("tool", choices=("memcheck", "initcheck", *_ASM))
    tool = parser.parse_args(arguments).tool
    read = torch.zeros(128, dtype=torch.int32, device="cuda")
    if tool == "initcheck":
        read = torch.empty(128, dtype=torch.int32, device="cuda")
    written = torch.empty(100 if tool == "memcheck" else 128, dtype=torch.int32, device="cuda")
    _wrong_kernel[1,](read, written, _ASM.get(tool), num_warps=4)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
