"""Draw the picture of the selection's README: how a row is divided, and which launch does what.

python docs/figures/selection.py
"""

from __future__ import annotations

import math
from pathlib import Path

OUT = Path(__file__).parents[2] / "kernels/fastlogits_kernels/selection/selection.svg"
ON_THE_SITE = Path(__file__).with_name("selection.svg")
"""The same, where the site has its pictures."""
WIDTH, HEIGHT = 920, 430
LEFT, RIGHT, TOP, BASE = 60, 890, 44, 240

# Mid-tones, and text that follows the reader's background.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.small { font-size: 11.5px } .head { font-weight: 600 }
.axis { stroke: #57606a; fill: none } .curve { stroke: #57606a; stroke-width: 2; fill: none }
.certain { fill: #2da44e; opacity: .35 } .open { fill: #d4a72c; opacity: .45 } .dropped { fill: #8c959f; opacity: .22 }
.bound { stroke: #57606a; stroke-dasharray: 4 4 } .cutoff { stroke: #cf222e; stroke-width: 2 } .red { fill: #cf222e }
.box { fill: #8c959f; fill-opacity: .14; stroke: #8c959f }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .axis, .curve, .bound { stroke: #9ea7b3 } .red { fill: #ff7b72 } .cutoff { stroke: #ff7b72 }
}
"""
# Where the bounds and the cut-off are, as shares of the axis.
UPPER, CUTOFF, LOWER = 0.24, 0.33, 0.43
LAUNCHES = (
    ("sums", "reads the row", "only if the first", "rule needs the mass"),
    ("bounds", "reads a sample", "guesses two bounds", "from 8192 tokens"),
    ("filter", "reads the row, writes", "fill and certain tokens,", "collects candidates"),
    ("refine", "reads the candidates", "applies the rules", "in registers"),
    ("refine_rows", "reads what is left open", "applies the rules", "block by block"),
)


def x_of(share: float) -> float:
    """Where a share of the tokens ends on the axis."""
    return LEFT + share * (RIGHT - LEFT)


def y_of(share: float) -> float:
    """The logit there: a long tail."""
    return TOP + 22 + (BASE - TOP - 40) * math.log1p(24 * share) / math.log(25)


def area(low: float, high: float, kind: str) -> str:
    """What is under the curve between two shares."""
    steps = [low + (high - low) * i / 24 for i in range(25)]
    top = " ".join(f"L{x_of(s):.1f} {y_of(s):.1f}" for s in steps)
    return f'<path class="{kind}" d="M{x_of(low):.1f} {BASE} {top} L{x_of(high):.1f} {BASE} Z"/>'


def line(share: float, kind: str, label: str, row: int) -> str:
    """A vertical line with its name above."""
    x, y = x_of(share), TOP - 24 + 16 * row
    words = f'<text class="small{" red" if kind == "cutoff" else ""}" x="{x + 5:.1f}" y="{y + 4}">{label}</text>'
    return f'<line class="{kind}" x1="{x:.1f}" y1="{y - 6}" x2="{x:.1f}" y2="{BASE}"/>{words}'


def words(x: float, y: float, text: str, kind: str = "") -> str:
    """A centred text."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>'


def box(index: int, name: str, *lines: str) -> str:
    """A launch, and an arrow to the next one."""
    width, gap = 152, 17.5
    x, y = LEFT + index * (width + gap), 318
    drawn = f'<rect class="box" x="{x:.1f}" y="{y}" width="{width}" height="88" rx="6"/>'
    drawn += words(x + width / 2, y + 22, name, "head")
    drawn += "".join(words(x + width / 2, y + 42 + 16 * i, each, "small") for i, each in enumerate(lines))
    if index < len(LAUNCHES) - 1:
        end = x + width + gap
        drawn += f'<path class="axis" d="M{x + width + 2:.1f} {y + 44} H{end - 2:.1f} m-5 -4 l5 4 l-5 4"/>'
    return drawn


def picture() -> str:
    """The whole picture."""
    shares = [i / 120 for i in range(121)]
    curve = " ".join(f"{'L' if i else 'M'}{x_of(s):.1f} {y_of(s):.1f}" for i, s in enumerate(shares))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>A row between its bounds, and the launches of a selection</title>",
        f"<style>{STYLE}</style>",
        area(0, UPPER, "certain"),
        area(UPPER, LOWER, "open"),
        area(LOWER, 1, "dropped"),
        f'<path class="curve" d="{curve}"/>',
        f'<path class="axis" d="M{LEFT} {TOP} V{BASE} H{RIGHT}"/>',
        line(UPPER, "bound", "upper bound", 0),
        line(CUTOFF, "cutoff", "cut-off", 1),
        line(LOWER, "bound", "lower bound", 2),
        words(x_of(UPPER / 2), BASE + 20, "kept for certain"),
        words(x_of((UPPER + LOWER) / 2), BASE + 20, "candidates"),
        words(x_of((1 + LOWER) / 2), BASE + 20, "dropped unseen"),
        words(x_of(0.5), BASE + 44, "tokens of a row, the most likely first", "small"),
        f'<text class="small" x="{LEFT - 8}" y="{TOP + 60}" text-anchor="end">logit</text>',
        *(box(i, *launch) for i, launch in enumerate(LAUNCHES)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    for path in (OUT, ON_THE_SITE):
        path.write_text(picture())
