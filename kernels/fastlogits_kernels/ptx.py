"""PTX for four tokens of a thread, where one branch saves what Triton would do for each of them."""

from __future__ import annotations

import re

from fastlogits_kernels._triton import tl, triton

TOKENS = 4


@triton.jit
def check_fours(x):
    """Not to be compiled where a thread has fewer than four tokens: what is missing is filled up with anything."""
    tl.static_assert(x.numel >= 4 * tl.extra.cuda.num_threads(), "a program has fewer than four tokens a thread")


def for_four_tokens(operands: str, body: str) -> tuple[tl.constexpr, tl.constexpr]:
    """Text and operands for ``tl.inline_asm_elementwise`` with ``pack=4``.

    Args:
        operands: names in their order, first the output, all of 32 bits but those followed by ``:l``, which are of 64.
        body: instructions. A line that holds a ``#`` stands for four, in which it is the token's number, 0 to 3.
            ``$x#`` is the operand of that name for the token, ``$x`` that of a name which is the same for all.
    """
    names, constraints = [], []
    for index, operand in enumerate(operands.split()):
        name, _, kind = operand.partition(":")
        names.append(name)
        constraints += ["=&r" if index == 0 else kind or "r"] * TOKENS

    def numbered(found: re.Match[str]) -> str:
        return f"${names.index(found[1]) * TOKENS + int(found[2] or 0)}"

    lines = []
    for line in body.strip().splitlines():
        lines += [line.replace("#", str(i)) for i in range(TOKENS)] if "#" in line else [line]
    text = re.sub(r"\$([a-z]+)(\d?)", numbered, "\n".join(lines))
    return tl.constexpr("{" + text + "}"), tl.constexpr(",".join(constraints))
