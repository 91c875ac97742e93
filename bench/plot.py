"""The ratios of the committed results as a bar chart: `python -m bench.plot` writes docs/images/bench.svg."""

import json
from pathlib import Path
from typing import Any

import matplotlib

from bench.protocol import OURS

matplotlib.use("svg")
# Text stays text, and equal figures give equal files.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pocl", "font.size": 9})

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
TARGET = ROOT / "docs" / "images" / "bench.svg"
_BAR, _LINE = 0.28, "#2f6f9f"

Bar = tuple[str, float]
"""(label, times ours)."""


def load_bars(results: Path) -> list[Bar]:
    """A bar for each rival of each result, grouped by result."""
    return [bar for file in sorted(results.glob("*.json")) for bar in _bars_of(json.loads(file.read_text()))]


def draw(bars: list[Bar], target: Path) -> None:
    """Draw a bar chart to `target`.

    Raises:
        ValueError: without a bar.
    """
    if not bars:
        raise ValueError("no result has a ratio")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 0.7 + _BAR * len(bars)))
    places = list(range(len(bars)))[::-1]
    # On a logarithmic scale twice as slow and twice as fast are equally far from 1.
    axes.set_xscale("log")
    rectangles = axes.barh(places, [ratio - 1 for _, ratio in bars], left=1, height=0.62, color=_LINE)
    axes.bar_label(rectangles, labels=[f"{ratio:.1f}x" for _, ratio in bars], padding=3)
    axes.axvline(1, color="#444444", linewidth=0.8)
    axes.set_yticks(places, [name for name, _ in bars])
    ticks = [1, 2, 5, 10, 20, 50, 100, 200]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("times what pocl takes (1 = pocl)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.1)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)


def _bars_of(record: dict[str, Any]) -> list[Bar]:
    label = record["command"]
    if "results" not in record:
        # The fault injections compare nothing.
        return []
    details = [str(record["settings"][name]) for name in ("size", "dtype") if name in record["settings"]]
    if details:
        label += f" ({', '.join(details)})"
    return [
        (f"{label}{_batch_of(row)}: {row['name']}", row["times_ours"])
        for row in record["results"]
        if row.get("name") != OURS and "times_ours" in row
    ]


def _batch_of(row: dict[str, Any]) -> str:
    return f", batch {row['batch']}" if "batch" in row else ""


if __name__ == "__main__":
    draw(load_bars(RESULTS), TARGET)
    print(TARGET.relative_to(ROOT))
