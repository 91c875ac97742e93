"""Writes down which tables and columns this code uses: `python -m tools.pin_generation`, at a release.

The migrations of the next generation may take nothing of it away: `tests/domain/test_generations.py`.
"""

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any, Final

import domain
from domain.db import Base
from domain.generations import GENERATION
from domain.schema import newest_revision

DIRECTORY: Final = Path(__file__).parents[1] / "migrations" / "generations"


def used_schema() -> dict[str, Any]:
    """The newest revision, and each column that the rows of this code declare, with its type and whether it is null."""
    for module in pkgutil.walk_packages(domain.__path__, "domain."):
        if module.name.endswith((".models", "generations")):
            importlib.import_module(module.name)
    tables = {
        table.name: {
            column.name: {"type": str(column.type.compile()), "nullable": bool(column.nullable)}
            for column in table.columns
        }
        for table in sorted(Base.metadata.tables.values(), key=lambda table: table.name)
    }
    return {"revision": newest_revision(), "tables": tables}


def main() -> int:
    file = DIRECTORY / f"{GENERATION}.json"
    file.write_text(json.dumps(used_schema(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
