"""The token of each row where no rule drops anything: the best of each rank's part, and the best of these.

A perturbed logit and its token are one number of 64 bits, whose order is that in which tokens win: the key above, and
below it how far the token is from the last one that could be. So the largest number is the winner's.

Bytes moved: one read of the logits, and 8 bytes a row from each rank.
"""

from __future__ import annotations

from fastlogits_kernels.parallel.layout import NOBODY
from fastlogits_kernels.runtime.launcher import tl, triton
from fastlogits_kernels.selection.noise import store_token
from fastlogits_kernels.selection.row import HIGHEST, let_next_launch, wait_for_launch
from fastlogits_kernels.selection.sample_rows import best_of_parts


@triton.jit
def best_number(key, token):
    """One number for the key of a perturbed logit and its token, ordered as tokens win."""
    return (key.to(tl.int64) << 32) + (token ^ HIGHEST).to(tl.int64)


@triton.jit(do_not_specialize=["parts", "stride_work"], do_not_specialize_on_alignment=["work_ptr", "best_ptr"])
def best_kernel(work_ptr, best_ptr, parts, stride_work, PARTS: tl.constexpr, PDL: tl.constexpr):
    """The best token of a rank's part of a row, as one number."""
    let_next_launch(PDL)
    row = tl.program_id(0).to(tl.int64)
    wait_for_launch(PDL)
    key, token = best_of_parts(work_ptr + row * stride_work, parts, PARTS)
    tl.store(best_ptr + row, best_number(key, token))


@triton.jit(do_not_specialize=["ranks", "rows"], do_not_specialize_on_alignment=["best_ptr", "tokens_ptr"])
def winner_kernel(best_ptr, tokens_ptr, ranks, rows, RANKS: tl.constexpr):
    """The token of a row, the best of those of the ranks."""
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, RANKS)
    best = tl.max(tl.load(best_ptr + rank * rows + row, mask=rank < ranks, other=NOBODY))
    store_token(tokens_ptr + row, (best & 0xFFFFFFFF).to(tl.int32) ^ HIGHEST)
