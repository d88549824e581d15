"""Draw the pictures of the kernel folders: ``python docs/figures/kernel_folders.py`` writes them beside the READMEs.

Lines and letters are of a grey that is readable on light and on dark ground; the ground itself is left as it is.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

_KERNELS = Path(__file__).parents[2] / "kernels" / "fastlogits_kernels"
_GREY, _BLUE, _ORANGE = "#808890", "#3b82f6", "#e07b22"
_ROW = 64
"""Height of a row of boxes."""

# Boxes: column, row, title, what stands below it, colour. Arrows: from box to box, by column and row.
Box = tuple[float, float, str, str, str]
Arrow = tuple[str, str]

POINTWISE: tuple[list[Box], list[Arrow]] = (
    [
        (0, 0, "history, gates, masks", "token ids, positions", _GREY),
        (1, 0, "search", "one launch", _BLUE),
        (2, 0, "sets", "1 bit a token", _GREY),
        (2, 1, "planes", "4 bytes a found token", _GREY),
        (0, 2, "logits", "read once", _GREY),
        (1, 2, "fold", "maps in the user's order", _ORANGE),
        (2, 2, "logits", "written once", _GREY),
    ],
    [("0,0", "1,0"), ("1,0", "2,0"), ("1,0", "2,1"), ("2,0", "1,2"), ("2,1", "1,2"), ("0,2", "1,2"), ("1,2", "2,2")],
)
SERVING: tuple[list[Box], list[Arrow]] = (
    [
        (0, 0, "slots", "record, masks, history", _GREY),
        (0, 1, "rows of the step", "slot, drafts, bitmask", _GREY),
        (1, 0, "search", "one launch", _BLUE),
        (2, 0, "banned", "1 bit a token", _GREY),
        (2, 1, "edited, ranks, values", "a ring for each row", _GREY),
        (2, 2, "numbers", "temperature, rules, seed", _GREY),
        (1, 2, "selection", "replace, ban, truncate, sample", _ORANGE),
        (0, 2, "logits", "read by the selection", _GREY),
    ],
    [
        ("0,0", "1,0"), ("0,1", "1,0"), ("1,0", "2,0"), ("1,0", "2,1"), ("1,0", "2,2"), ("2,0", "1,2"), ("2,1", "1,2"),
        ("2,2", "1,2"), ("0,2", "1,2"),
    ],
)  # fmt: skip
PARALLEL: tuple[list[Box], list[Arrow]] = (
    [
        (0, 0, "logits of rank 0", "a part of each row", _GREY),
        (0, 1, "logits of rank 1", "a part of each row", _GREY),
        (1, 0, "selection, pack", "what the part may keep", _BLUE),
        (1, 1, "selection, pack", "what the part may keep", _BLUE),
        (2, 0.5, "exchange", "some tokens of each rank", _GREY),
        (3, 0, "union", "rules, noise: the token", _ORANGE),
        (3, 1, "union", "the same token", _ORANGE),
    ],
    [("0,0", "1,0"), ("0,1", "1,1"), ("1,0", "2,0.5"), ("1,1", "2,0.5"), ("2,0.5", "3,0"), ("2,0.5", "3,1")],
)


def drawn(boxes: list[Box], arrows: list[Arrow]) -> str:
    """An SVG of boxes and of arrows between their middles, which are drawn first."""
    width, gap, height = 190, 60, 44
    at = {f"{column:g},{row:g}": (column * (width + gap) + 4, row * _ROW + 4) for column, row, *_ in boxes}
    right, below = max(x for x, _ in at.values()) + width + 4, max(y for _, y in at.values()) + height + 4
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right:g} {below:g}" width="{right:g}" '
        f'height="{below:g}" font-family="sans-serif" font-size="13" text-anchor="middle">',
        f'<defs><marker id="end" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{_GREY}"/></marker></defs>',
    ]
    for first, second in arrows:
        (x1, y1), (x2, y2) = at[first], at[second]
        begin, end = (x1 + width, x2) if x1 < x2 else (x1, x2 + width)
        parts.append(
            f'<line x1="{begin:g}" y1="{y1 + height / 2:g}" x2="{end:g}" y2="{y2 + height / 2:g}" stroke="{_GREY}" '
            'stroke-width="1.5" marker-end="url(#end)"/>'
        )
    for column, row, title, text, colour in boxes:
        x, y = at[f"{column:g},{row:g}"]
        middle = x + width / 2
        parts += [
            f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="6" fill="{colour}" fill-opacity="0.12" '
            f'stroke="{colour}" stroke-width="1.5"/>',
            f'<text x="{middle:g}" y="{y + 19:g}" fill="{colour}" font-weight="bold">{escape(title)}</text>',
            f'<text x="{middle:g}" y="{y + 36:g}" fill="{_GREY}" font-size="11">{escape(text)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Write the pictures."""
    for name, picture in (("pointwise", POINTWISE), ("serving", SERVING), ("parallel", PARALLEL)):
        (_KERNELS / name / f"{name}.svg").write_text(drawn(*picture))


if __name__ == "__main__":
    main()
