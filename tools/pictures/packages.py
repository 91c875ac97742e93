"""The packages as layers of modules, and what each imports of those below it.

The layers are those of the import contracts in pyproject.toml, and the imports those of the code.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grimp

from tools.pictures.svg import CHARACTER_WIDTH, PANEL, SOFT, Box, arrow, chip, document, rectangle, text

PACKAGES: Final = ("api", "worker", "domain", "pocl")
ABOUT: Final = {
    "api": "the HTTP face: routes, schemas, streams",
    "worker": "claims jobs and supervises the engine",
    "domain": "rows and rules of the job system: no HTTP, no torch",
    "pocl": "the engine: no HTTP, no database",
}
WIDTH: Final = 1040
HALF: Final = 490
GAP: Final = 20
CHIP_HEIGHT: Final = 26
CHIP_GAP: Final = 8
ROW_HEIGHT: Final = CHIP_HEIGHT + CHIP_GAP
TITLE_HEIGHT: Final = 56
BETWEEN: Final = 64
"""Height of the space between panels, in which the arrows are."""

Layers = list[list[str]]
"""Names of modules, from the uppermost layer to the lowest."""


@dataclass(frozen=True)
class Row:
    """Boxes beside one another, and what is written behind them."""

    chips: list[str]
    note: str


def draw(root: Path) -> str:
    """The picture of the packages below `root`."""
    widths = {"api": HALF, "worker": HALF, "domain": WIDTH - 2 * GAP, "pocl": WIDTH - 2 * GAP}
    rows = {each: list(_rows(root / each, layers_of(root, each), widths[each])) for each in PACKAGES}
    panels = _place_panels(rows)
    height = panels["pocl"].y + panels["pocl"].height + GAP
    shapes = [shape for package in PACKAGES for shape in _panel(panels[package], package, rows[package])]
    shapes += _arrows(panels, imported_modules())
    label = "Packages from top to bottom: api and worker import domain, and all three import pocl; never upward"
    return document(WIDTH, round(height), label, shapes)


def layers_of(root: Path, package: str) -> Layers:
    """The layers of a package's modules, as its exhaustive import contract orders them."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    (contract,) = (each for each in contracts if package in each.get("containers", ()) and each.get("exhaustive"))
    return [[name.strip(" ()") for name in re.split(r"[|:]", layer)] for layer in contract["layers"]]


def imported_modules() -> dict[tuple[str, str], list[str]]:
    """(importing package, imported package) -> the modules and packages right below the imported one."""
    graph = grimp.build_graph(*PACKAGES)
    found: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            package, _, rest = imported.partition(".")
            found[importer.partition(".")[0], package].add(rest.partition(".")[0])
    return {pair: sorted(names - {""}) for pair, names in found.items()}


def _place_panels(rows: dict[str, list[Row]]) -> dict[str, Box]:
    upper = max(_height(rows[package]) for package in ("api", "worker"))
    panels = {
        "api": Box(GAP, GAP, HALF, upper),
        "worker": Box(WIDTH - GAP - HALF, GAP, HALF, upper),
    }
    below = GAP + upper
    for package in ("domain", "pocl"):
        panels[package] = Box(GAP, below + BETWEEN, WIDTH - 2 * GAP, _height(rows[package]))
        below += BETWEEN + panels[package].height
    return panels


def _height(rows: list[Row]) -> float:
    return TITLE_HEIGHT + ROW_HEIGHT * len(rows) + CHIP_GAP


def _rows(directory: Path, layers: Layers, width: float) -> Iterator[Row]:
    """The rows of a panel: in a wide one each package has a row of its own, with its modules; else chips fill rows."""
    for layer in layers:
        row: list[str] = []
        for name in layer:
            inside = sorted(path.stem for path in (directory / name).glob("*.py") if path.stem != "__init__")
            if width > HALF and inside:
                yield Row([name], " · ".join(inside))
                continue
            if row and sum(map(_chip_width, [*row, name])) + CHIP_GAP * len(row) > width - 2 * GAP:
                yield Row(row, "")
                row = []
            row.append(name)
        if row:
            yield Row(row, "")


def _chip_width(name: str) -> float:
    return len(name) * CHARACTER_WIDTH + 20


def _panel(panel: Box, package: str, rows: list[Row]) -> Iterator[str]:
    yield rectangle(panel, fill=PANEL, radius=10)
    yield text(panel.x + GAP, panel.y + 26, package, size=16, bold=True)
    yield text(panel.x + GAP, panel.y + 44, ABOUT[package], color=SOFT)
    y = panel.y + TITLE_HEIGHT
    for row in rows:
        x = panel.x + GAP
        for name in row.chips:
            yield chip(Box(x, y, _chip_width(name), CHIP_HEIGHT), name)
            x += _chip_width(name) + CHIP_GAP
        if row.note:
            yield text(x + 6, y + 17, row.note, color=SOFT)
        y += ROW_HEIGHT


def _arrows(panels: dict[str, Box], imports: dict[tuple[str, str], list[str]]) -> Iterator[str]:
    """An arrow from each package to the one below, with what it imports of the engine written beside it."""
    for package in ("api", "worker", "domain"):
        names = " · ".join(imports.get((package, "pocl"), []))
        label = f"pocl: {names}" if package == "domain" else f"domain, and of pocl: {names}"
        yield from _arrow_down(panels[package], label)


def _arrow_down(panel: Box, label: str) -> Iterator[str]:
    x, top = panel.x + 3 * GAP, panel.y + panel.height
    yield arrow(f"M{x:g} {top + 6:g}v{BETWEEN - 14}")
    yield text(x + 12, top + 36, label, color=SOFT)
