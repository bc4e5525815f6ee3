# SPDX-License-Identifier: Apache-2.0
"""Draw the loss gaps of the arms of `gpt2.py` as an SVG: a row an arm, a dot a seed, a bar at the mean.

python -m experiments.nvfp4_pretraining.picture
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "benchmarks" / "results" / "nvidia-h200" / "nvfp4_pretraining.json"
TARGET = ROOT / "docs" / "papers" / "images" / "nvfp4-gaps.svg"
WORDS = {
    "bf16": "bf16",
    "nvfp4": "NVFP4",
    "nvfp4+keep.last=0.15": "NVFP4, last 15 % of blocks in bf16",
    "nvfp4+80%:forward=off": "NVFP4, before its switch at 80 %",
    "mxfp4": "MXFP4, same recipe",
    "nvfp4_naive": "FP4 without the four measures",
    "nvfp4_sr_forward": "NVFP4, forward rounded stochastically",
}
WIDTH, LEFT, RIGHT, TOP, ROW = 780, 280, 30, 64, 40
INK, FAINT, DOT, MEAN = "#1f2937", "#e5e7eb", "#93c5fd", "#1d4ed8"


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 13, weight: int = 400) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{INK}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def rows(losses: dict[str, list[float]], base: float, low: float, high: float) -> Iterator[str]:
    """One row an arm, the smallest mean gap on top."""

    def place(gap: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (gap - low) / (high - low)

    end = TOP + ROW * len(losses)
    for tick in (-0.02, 0.0, 0.02, 0.04, 0.06):
        x = place(tick)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{end}" stroke="{INK if tick == 0 else FAINT}"/>'
        yield text(x, end + 18, f"{tick:+.2f}" if tick else "0", "middle", 12)
    for number, (arm, found) in enumerate(sorted(losses.items(), key=lambda item: fmean(item[1]))):
        y = TOP + ROW * (number + 0.5)
        yield text(LEFT - 14, y + 4, WORDS.get(arm, arm), "end")
        for loss in found:
            tip = f"<title>{escape(f'{arm}: {loss:.4f}, {loss - base:+.4f}')}</title>"
            yield f'<circle cx="{place(loss - base):.1f}" cy="{y}" r="6" fill="{DOT}" stroke="#ffffff">{tip}</circle>'
        x = place(fmean(found) - base)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 12}" y2="{y + 12}" stroke="{MEAN}" stroke-width="3"/>'
        yield text(WIDTH - RIGHT + 26, y + 4, f"{fmean(found) - base:+.3f}", "end", 12)


def main() -> None:
    told = json.loads(SOURCE.read_text(encoding="utf-8"))
    losses, base = told["losses"], fmean(told["losses"]["bf16"])
    tokens = told["compared_at_step"] * told["run"]["batch_size"] * told["run"]["block"]
    height = TOP + ROW * len(losses) + 34
    title = f"Validation loss above bf16's mean, nats: GPT-2 small after {tokens / 1e6:.1f}M tokens, three seeds"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 10} {height}" font-family="sans-serif">',
        f'<rect width="100%" height="100%" fill="#ffffff"/><title>{escape(title)}</title>',
        text(16, 30, title, size=15, weight=600), *rows(losses, base, -0.025, 0.072), "</svg>",
    ]  # fmt: skip
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
