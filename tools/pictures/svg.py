"""Shapes of the pictures as SVG text. Equal calls give equal text, so a picture can be compared with its file."""

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import Final

INK: Final = "#1c2733"
SOFT: Final = "#4b5a69"
LINE: Final = "#9fb0c0"
PANEL: Final = "#eaf1f8"
PAPER: Final = "#f6f9fc"
ACCENT: Final = "#2f6f9f"
ALARM: Final = "#b4552d"
HEADS: Final = {SOFT: "head-soft", ACCENT: "head-accent", ALARM: "head-alarm", LINE: "head-line"}
"""Color of a line -> id of its arrow head: a head cannot take the color of its line in every viewer."""
CHARACTER_WIDTH: Final = 6.9
"""Pixels of a character at 12 px, rounded up."""


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def center(self) -> tuple[float, float]:
        return self.x + self.width / 2, self.y + self.height / 2


def rectangle(box: Box, *, fill: str = "#fff", stroke: str = LINE, radius: int = 6) -> str:
    return (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" '
        f'rx="{radius}" fill="{fill}" stroke="{stroke}"/>'
    )


def text(
    x: float, y: float, content: str, *, size: int = 12, color: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
        f"{escape(content)}</text>"
    )


def chip(box: Box, label: str, *, fill: str = "#fff", color: str = INK, stroke: str = LINE) -> str:
    """A box with a label in its middle."""
    x, y = box.center
    return rectangle(box, fill=fill, stroke=stroke) + text(x, y + 4, label, color=color, anchor="middle")


def arrow(path: str, *, color: str = SOFT, width: float = 1.4, dashed: bool = False) -> str:
    """A line along an SVG path, with a head at its end; the color is one of `HEADS`."""
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    head = f"url(#{HEADS[color]})"
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{dash} marker-end="{head}"/>'


def document(width: int, height: int, label: str, shapes: Iterable[str]) -> str:
    """A whole picture; `label` is read to those who do not see it."""
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto" '
        f'markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z" fill="{color}"/></marker>'
        for color, name in HEADS.items()
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(label)}">',
            f"<defs>{heads}</defs>",
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
            *shapes,
            "</svg>",
            "",
        ]
    )
