"""PTX for the tokens that a thread holds, where one branch saves what Triton would do for each of them."""

from __future__ import annotations

import re

from fastlogits_kernels.runtime.launcher import tl, triton


@triton.jit
def check_tokens(x, TOKENS: tl.constexpr):
    """Not to be compiled where a thread has fewer tokens than that: what is missing is filled up with anything."""
    tl.static_assert(x.numel >= TOKENS * tl.extra.cuda.num_threads(), "a program has too few tokens for its threads")


# Registers of an operand, for each token.
_REGISTERS = {"": 1.0, "l": 1.0, "h": 0.5, "b": 0.25}


def for_tokens(operands: str, body: str, tokens: int) -> tuple[tl.constexpr, tl.constexpr]:
    """Text and operands for ``tl.inline_asm_elementwise`` with ``pack=tokens``.

    Args:
        operands: names in their order, first the output. Those followed by ``:l`` are of 64 bits, by ``:h`` of 16, by
            ``:b`` of 8, the others of 32.
        body: instructions. A line that holds a ``#`` stands for one for each token, in which it is the token's number.
            ``$x#`` is the operand of that name for the token, ``$x`` that of a name which is the same for all, and
            ``$x1`` the second register of any.
        tokens: how many there are, 4 or 8.
    """
    names, first, constraints = [], [0], []
    for index, operand in enumerate(operands.split()):
        name, _, kind = operand.partition(":")
        registers = int(tokens * _REGISTERS[kind])
        names.append(name)
        constraints += ["=&r" if index == 0 else "l" if kind == "l" else "r"] * registers
        first.append(first[-1] + registers)

    def numbered(found: re.Match[str]) -> str:
        return f"${first[names.index(found[1])] + int(found[2] or 0)}"

    lines = []
    for line in body.strip().splitlines():
        lines += [line.replace("#", str(i)) for i in range(tokens)] if "#" in line else [line]
    text = re.sub(r"\$([a-z]+)(\d?)", numbered, "\n".join(lines))
    return tl.constexpr("{" + text + "}"), tl.constexpr(",".join(constraints))


def logits_of(dtype: str) -> str:
    """PTX that leaves the largest of the logits ``$x`` in ``largest``, NaN where one is, and all of them in ``value#``.

    For ``fp32`` of four tokens, ``bf16`` and ``fp16`` of eight.
    """
    if dtype == "fp32":
        return """
            .reg .f32 largest, value<4>;
            max.NaN.f32 largest, $x0, $x1; max.NaN.f32 value0, $x2, $x3; max.NaN.f32 largest, largest, value0;
            mov.f32 value#, $x#;
        """
    # A bfloat16 number is the upper half of a float32 one.
    halves = {
        "bf16": "mov.b32 value{0}, {{zero, half{0}}};",
        "fp16": "cvt.f32.f16 value{0}, half{0};",
    }[dtype]
    packed = {"bf16": "bf16x2", "fp16": "f16x2"}[dtype]
    return (
        f"""
            .reg .f32 largest, value<8>;
            .reg .b16 zero, half<8>;
            .reg .b32 two, four;
            mov.b16 zero, 0;
            max.NaN.{packed} two, $x0, $x1; max.NaN.{packed} four, $x2, $x3; max.NaN.{packed} two, two, four;
            mov.b32 {{half0, half1}}, two;
            {halves.format(0)}
            {halves.format(1)}
            max.NaN.f32 largest, value0, value1;
        """
        + "".join(f"mov.b32 {{half{2 * i}, half{2 * i + 1}}}, $x{i};\n" for i in range(4))
        + "".join(halves.format(i) + "\n" for i in range(8))
    )
