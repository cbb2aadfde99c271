"""Draws docs/relay.svg: what a decode step reads from memory, with and without relay attention."""

from __future__ import annotations

import sys
from pathlib import Path

REQUESTS = 4
ROW = 30
PREFIX_WIDTH = 250
CONTEXT_WIDTHS = [62, 38, 76, 50]
INK, PREFIX, CONTEXT, LINE = "#1f2933", "#7aa6d8", "#f2b36b", "#8894a3"


class Svg:
    """Collects SVG elements; sizes in pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str, label: str = "") -> None:
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{INK}"/>'
        )
        if label:
            self.text(x + width / 2, y + height / 2 + 4, label, anchor="middle")

    def text(self, x: float, y: float, label: str, anchor: str = "start", weight: str = "normal") -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" fill="{INK}" text-anchor="{anchor}" font-weight="{weight}">{label}</text>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{LINE}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def draw() -> str:
    """The whole figure as SVG text."""
    svg = Svg(960, 330)
    rows = [70 + i * (ROW + 14) for i in range(REQUESTS)]

    svg.text(20, 28, "Ordinary attention: the prompt is read once per request", weight="bold")
    for i, y in enumerate(rows):
        svg.text(20, y + ROW / 2 + 4, f"q{i + 1}")
        svg.arrow(42, y + ROW / 2, 66, y + ROW / 2)
        svg.box(70, y, PREFIX_WIDTH, ROW, PREFIX, "prefix K, V (copy)" if i else "prefix K, V")
        svg.box(70 + PREFIX_WIDTH, y, CONTEXT_WIDTHS[i], ROW, CONTEXT, "own")
    svg.text(20, 262, "bytes per layer and step: B · 2(P + C) · Hkv · D")

    left = 500
    middle = rows[0] + (rows[-1] + ROW - rows[0]) / 2
    svg.text(left, 28, "Relay attention: once per batch, as one matrix product", weight="bold")
    svg.box(left + 55, rows[0], 150, rows[-1] + ROW - rows[0], PREFIX)
    svg.text(left + 130, middle - 4, "prefix K, V", anchor="middle")
    svg.text(left + 130, middle + 14, "one copy", anchor="middle")
    for i, y in enumerate(rows):
        svg.text(left, y + ROW / 2 + 4, f"q{i + 1}")
        svg.arrow(left + 22, y + ROW / 2, left + 51, y + ROW / 2)
        svg.box(left + 215, y, CONTEXT_WIDTHS[i], ROW, CONTEXT, "own")
        svg.arrow(left + 222 + CONTEXT_WIDTHS[i], y + ROW / 2, left + 318, y + ROW / 2)
        svg.box(left + 322, y, 118, ROW, "#e4ebe0", "fuse by LSE")
    svg.text(left, 262, "bytes per layer and step: 2P · Hkv · D + B · 2C · Hkv · D")
    svg.text(
        20,
        302,
        "exact fusion:  o = (w1 · o_prefix + w2 · o_own) / (w1 + w2),   w = e^(lse - m),   "
        "m = max(lse_prefix, lse_own)",
    )
    return str(svg)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "docs" / "relay.svg"
    target.write_text(draw(), encoding="utf-8")
    print(f"wrote {target}")
