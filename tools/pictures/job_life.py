"""The states of a job and every transition between them, from `domain.jobs.states`."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Final, TypedDict

from domain.jobs.states import TERMINAL, TRANSITIONS, JobStatus
from tools.pictures.svg import ACCENT, ALARM, CHARACTER_WIDTH, LINE, PANEL, SOFT, Box, arrow, chip, document, text

WIDTH: Final = 1040
HEIGHT: Final = 520
COLUMN: Final = 215
ROW: Final = 110
BOX_WIDTH: Final = 120
BOX_HEIGHT: Final = 38

PLACES: Final = {
    JobStatus.QUEUED: (0, 1),
    JobStatus.PREPARING: (1, 1),
    JobStatus.RUNNING: (2, 1),
    JobStatus.SUCCEEDED: (4, 0),
    JobStatus.FAILED: (4, 1),
    JobStatus.CANCELLED: (4, 3),
    JobStatus.RECOVERING: (1.5, 0),
    JobStatus.PAUSING: (2, 2),
    JobStatus.PAUSED: (0.6, 2),
    JobStatus.CANCELLING: (2.9, 3),
}
"""(column, row) of each state. A state without a place is a KeyError, so the picture cannot leave one out."""


class Style(TypedDict, total=False):
    color: str
    width: float
    dashed: bool


SUCCESS: Final = (JobStatus.QUEUED, JobStatus.PREPARING, JobStatus.RUNNING, JobStatus.SUCCEEDED)
LEGEND: Final = (
    ("to success", ACCENT, 2.4, False),
    ("pause, resume, retry after a loss", SOFT, 1.4, False),
    ("failure", ALARM, 1.2, False),
    ("cancel", SOFT, 1.2, True),
)


def draw() -> str:
    """The picture of all states and transitions."""
    boxes = {status: _box(status) for status in JobStatus}
    arrows = [
        arrow(_curve(boxes[source], boxes[target], both_ways=source in TRANSITIONS[target]), **_style(source, target))
        for source in JobStatus
        for target in sorted(TRANSITIONS[source])
    ]
    chips = [_state(status, box) for status, box in boxes.items()]
    label = "States of a job: " + "; ".join(
        f"{source} to {', '.join(sorted(targets))}" for source, targets in TRANSITIONS.items() if targets
    )
    return document(WIDTH, HEIGHT, label, [*arrows, *chips, *_legend()])


def _box(status: JobStatus) -> Box:
    column, row = PLACES[status]
    return Box(24 + column * COLUMN, 40 + row * ROW, BOX_WIDTH, BOX_HEIGHT)


def _state(status: JobStatus, box: Box) -> str:
    if status in TERMINAL:
        return chip(box, status, fill=ACCENT, color="#fff", stroke=ACCENT)
    return chip(box, status, fill="#fff" if status is not JobStatus.QUEUED else PANEL, stroke=LINE)


def _style(source: JobStatus, target: JobStatus) -> Style:
    if (source, target) in pairwise(SUCCESS):
        return {"color": ACCENT, "width": 2.4}
    if target is JobStatus.FAILED:
        return {"color": ALARM, "width": 1.2}
    if target in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        return {"color": SOFT, "width": 1.2, "dashed": True}
    return {"color": SOFT, "width": 1.4}


def _legend() -> Iterator[str]:
    x, y = 24.0, HEIGHT - 24
    for label, color, width, dashed in LEGEND:
        yield arrow(f"M{x:g} {y}h44", color=color, width=width, dashed=dashed)
        yield text(x + 54, y + 4, label, color=SOFT)
        x += 54 + len(label) * CHARACTER_WIDTH + 28


def _curve(source: Box, target: Box, *, both_ways: bool) -> str:
    """A curve from the border of one box to that of another, bent to its right so that opposite ones do not meet."""
    (x0, y0), (x1, y1) = source.center, target.center
    length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
    # Long ones bend more, since they pass boxes that lie in between.
    bend = 0.10 * length if both_ways or length > 1.3 * COLUMN else 0.0
    middle = ((x0 + x1) / 2 - (y1 - y0) / length * bend * 2, (y0 + y1) / 2 + (x1 - x0) / length * bend * 2)
    start, end = _border(source, middle), _border(target, middle)
    return f"M{start[0]:.1f} {start[1]:.1f}Q{middle[0]:.1f} {middle[1]:.1f} {end[0]:.1f} {end[1]:.1f}"


def _border(box: Box, toward: tuple[float, float]) -> tuple[float, float]:
    """Where the line from the middle of the box to a point leaves it, two pixels outside."""
    x, y = box.center
    dx, dy = toward[0] - x, toward[1] - y
    scale = min(
        (box.width / 2 + 2) / abs(dx) if dx else float("inf"), (box.height / 2 + 2) / abs(dy) if dy else float("inf")
    )
    return x + dx * scale, y + dy * scale
