"""Draw the kinds of logits of the benchmarks: how much of a row's mass its likeliest tokens hold.

python docs/figures/logits.py
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

OUT = Path(__file__).with_name("logits.svg")
V = 128256
PANEL, GAP, LEFT, TOP, HEIGHT = 200, 24, 46, 34, 120
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .head { font-weight: 600 } .small { font-size: 10.5px }
.axis { stroke: #57606a; fill: none } .curve { stroke: #0b5fa5; stroke-width: 2; fill: none }
.grid { stroke: #8c959f; stroke-opacity: .35 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .axis { stroke: #9ea7b3 } .curve { stroke: #5aa9e6 }
}
"""


def kinds() -> dict[str, torch.Tensor]:
    """A row of each kind, in float64."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(V, generator=generator, dtype=torch.float64)
    rank = torch.arange(1, V + 1, dtype=torch.float64)
    return {
        "gauss: N(0, 3)": 3 * normal,
        "zipf: -1.5 ln(rank)": -1.5 * rank.log(),
        "mixture: -3 ln(rank), and flat": -3 * rank.log(),
        "flat: N(0, 1)": normal,
    }


def panel(index: int, name: str, logits: torch.Tensor) -> str:
    """The mass of the n likeliest tokens, n on a logarithmic axis."""
    x0 = LEFT + index * (PANEL + GAP)
    mass = logits.softmax(0).sort(descending=True).values.cumsum(0)

    def x_of(n: float) -> float:
        return x0 + PANEL * math.log(n) / math.log(V)

    def y_of(share: float) -> float:
        return TOP + HEIGHT * (1 - share)

    places = [round(V ** (i / 60)) for i in range(61)]
    curve = " ".join(f"{'L' if i else 'M'}{x_of(n):.1f} {y_of(float(mass[n - 1])):.1f}" for i, n in enumerate(places))
    drawn = [f'<text class="head" x="{x0}" y="{TOP - 14}">{name}</text>']
    drawn += [f'<line class="grid" x1="{x0}" y1="{y_of(s)}" x2="{x0 + PANEL}" y2="{y_of(s)}"/>' for s in (0.5, 0.9, 1)]
    drawn += [
        f'<path class="axis" d="M{x0} {TOP} V{TOP + HEIGHT} H{x0 + PANEL}"/>',
        f'<path class="curve" d="{curve}"/>',
    ]
    for n in (1, 100, 10_000):
        drawn.append(f'<text class="small" x="{x_of(n):.1f}" y="{TOP + HEIGHT + 15}" text-anchor="middle">{n:,}</text>')
    if index == 0:
        for share in (0, 0.5, 0.9):
            y = y_of(share) + 4
            drawn.append(f'<text class="small" x="{x0 - 6}" y="{y:.1f}" text-anchor="end">{share:.0%}</text>')
    return "".join(drawn)


def picture() -> str:
    """The whole picture."""
    width = LEFT + 4 * PANEL + 3 * GAP + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 42}" role="img">',
        "<title>The share of a row's mass that its likeliest tokens hold, for each kind of logits</title>",
        f"<style>{STYLE}</style>",
        *(panel(i, name, logits) for i, (name, logits) in enumerate(kinds().items())),
        f'<text class="small" x="{width / 2}" y="{TOP + HEIGHT + 36}" text-anchor="middle">likeliest tokens of '
        f"{V:,}, and the share of the mass that they hold after a temperature of 1</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    OUT.write_text(picture())
