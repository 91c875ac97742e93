"""`docs/guarantees.md` names tests that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def test_what_is_guaranteed_is_tested() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named = NAMED.findall(page)
    assert len(named) > 40
    missing = [
        f"{file}::{test}" for file, test in named if f"\ndef {test}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    assert missing == []
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| Fault |"))]
    assert all("`" in row.split("|")[2] for row in rows if not row.startswith("| Guarantee |"))
