"""`python -m tools.client_twin`: write the client without `await`, which is made from the one with it.

Every module of `pocl_client._async` has a twin in `pocl_client._sync` by these replacements; `concurrency`, where the
two differ, is written by hand in both.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tools.formatting import format_source

PACKAGE: Final = Path(__file__).resolve().parents[1] / "client" / "pocl_client"
BY_HAND: Final = {"__init__.py", "concurrency.py"}
_REPLACEMENTS: Final = (
    (r"\basync (def|with|for)\b", r"\1"),
    (r"\bawait ", ""),
    (r"\bAwaitable\[None\]", "None"),
    (r"\bAwaitable\b, |, \bAwaitable\b", ""),
    (r"\b_async\b", "_sync"),
    (r"\bAsync([A-Z]\w*)", r"\1"),
    (r"\basynccontextmanager\b", "contextmanager"),
    (r"__aenter__", "__enter__"),
    (r"__aexit__", "__exit__"),
    (r"\baclose\b", "close"),
    (r"\baiter_bytes\b", "iter_bytes"),
)


def without_await(source: str) -> str:
    """The same code for a caller that may be blocked."""
    for pattern, replacement in _REPLACEMENTS:
        source = re.sub(pattern, replacement, source)
    return source


def twins() -> Mapping[Path, str]:
    """What each module of `pocl_client._sync` should be."""
    modules = [path for path in sorted((PACKAGE / "_async").glob("*.py")) if path.name not in BY_HAND]
    targets = {PACKAGE / "_sync" / path.name: path for path in modules}
    return {
        target: format_source(without_await(path.read_text(encoding="utf-8")), target)
        for target, path in targets.items()
    }


def main() -> None:
    for path, source in twins().items():
        path.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    main()
