"""The report of a command: one aligned table, and the same figures as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from bench.machine import Machine
from bench.memory import Memory
from bench.protocol import OURS, Timing

Figure = str | float | int | None
_MIB = 1 << 20


class Reported(Protocol):
    """What `run` of every command returns."""

    @property
    def failure(self) -> str | None:
        """Why the benchmark failed; the command then exits with 1. None if it did not fail."""
        ...

    def text(self) -> str:
        """For the terminal."""
        ...

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        ...


@dataclass(frozen=True)
class Report:
    """The figures of a benchmark and what they depend on."""

    command: str
    settings: dict[str, Any]
    """The size of the work."""
    results: Sequence[Mapping[str, Figure]]
    """The rows of the table, with equal keys; `ours` comes first."""
    machine: Machine | None = None
    checks: Mapping[str, Figure] = field(default_factory=dict)
    """How far the results of the rivals differ."""
    notes: tuple[str, ...] = ()
    failure: str | None = None

    def text(self) -> str:
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        parts = [f"{self.command}: {settings}"]
        if self.machine is not None:
            parts.append(self.machine.text())
        parts.append(table(self.results))
        if self.checks:
            parts.append("\n".join(f"{name}: {_cell(value)}" for name, value in self.checks.items()))
        if self.notes:
            parts.append("\n".join(self.notes))
        return "\n\n".join(parts)

    def record(self) -> dict[str, Any]:
        return asdict(self)


def to_json(report: Reported) -> str:
    return json.dumps(report.record(), indent=1) + "\n"


def table(rows: Sequence[Mapping[str, Figure]]) -> str:
    """A table with aligned columns, text to the left and numbers to the right, headed by the keys."""
    keys = list(rows[0])
    heads = [key.replace("_", " ") for key in keys]
    cells = [[_cell(row[key]) for key in keys] for row in rows]
    widths = [max(len(line[column]) for line in [heads, *cells]) for column in range(len(keys))]
    is_text = [all(isinstance(row[key], str | None) for row in rows) for key in keys]

    def line(parts: Sequence[str]) -> str:
        padded = (
            part.ljust(width) if text else part.rjust(width)
            for part, width, text in zip(parts, widths, is_text, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join(map(line, [heads, *cells]))


def timing_rows(
    timings: Mapping[str, Timing], memories: Mapping[str, Memory] | None = None, *, once: float = 0.0
) -> list[dict[str, Figure]]:
    """A row for each rival, with the ratios of its seconds to ours: of medians, and of the fastest rounds.

    Args:
        once: Seconds that are added to ours in these ratios: our share of work done outside of the timed unit.
    """
    ours = timings[OURS]
    rows: list[dict[str, Figure]] = []
    for name, timing in timings.items():
        extra = once if name == OURS else 0.0
        row: dict[str, Figure] = {
            "name": name,
            "median_s": timing.median,
            "min_s": timing.fastest,
            "iqr_s": timing.iqr,
            "times_ours": (timing.median + extra) / (ours.median + once),
            "times_ours_min": (timing.fastest + extra) / (ours.fastest + once),
        }
        if memories is not None:
            memory, our_memory = memories[name], memories[OURS]
            row["peak_MiB"] = memory.increase / _MIB
            row["times_ours_peak"] = memory.increase / max(1, our_memory.increase)
        rows.append(row)
    return rows


def _cell(value: Figure) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
