"""The module that a limited process is tried with: a request names one of its functions."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_calls: list[str] = []


def answer(request: Any) -> Any:  # Any: whatever JSON can hold.
    _calls.append(request["name"])
    return _FUNCTIONS[request["name"]](*request.get("arguments", ()))


def _loop() -> None:
    while True:
        pass


def _keep_allocating() -> None:
    blocks = []
    while True:
        blocks.append(bytearray(1 << 20))


def _raise() -> None:
    raise RuntimeError("not foreseen")


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "echo": lambda value: value,
    "calls": lambda: len(_calls),
    "loop": _loop,
    "sleep": time.sleep,
    "allocate": lambda size: len(bytearray(size)),
    "keep allocating": _keep_allocating,
    "long answer": lambda length: "x" * length,
    "raise": _raise,
    "abort": os.abort,
    "print": lambda: sys.stdout.write("between the messages") and None,
    "write file": lambda path: Path(path).write_bytes(b"x"),
    "environment": lambda: dict(os.environ),
    "modules": lambda: sorted(sys.modules),
}
