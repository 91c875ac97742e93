"""`python -m worker.publications`: pushes one student to the Hub for the scheduler, and ends.

The request is a line of JSON on the socket that is its standard input, with the token and the environment of the
client, so that no other process of this user reads them in `/proc`; the answer is another line.
"""

import json
import os
import resource
import socket
import sys
from collections.abc import Mapping
from typing import Any, Final

from worker.processes import hide_memory
from worker.publications.push import CannotPush, Push

_MEMORY_BYTES: Final = 4 * 1024**3
"""The address space of the process: files are read in pieces."""


def main() -> int:
    hide_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    request = json.loads(connection.makefile("rb").readline())
    os.environ.update(request["environment"])
    connection.sendall(json.dumps(_answer(request)).encode() + b"\n")
    return 0


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    # It reads its settings where it is imported.
    from worker.publications.hub_client import push

    try:
        pushed = push(Push.from_json(request["push"]), request["token"])
    except CannotPush as error:
        return {
            "error": error.code,
            "message": error.message,
            "is_final": error.is_final,
            "retry_after": error.retry_after,
            "detail": type(error.__cause__).__name__,
        }
    except Exception as error:  # noqa: BLE001 - whatever the client raises is told, and it is tried again later
        # Its text may hold addresses that are signed: the name alone is told.
        name = type(error).__name__
        return {"error": "push_failed", "message": f"The client of the Hub failed ({name}).", "detail": name}
    return {"commit": pushed.commit, "url": pushed.url, "is_new": pushed.is_new}


if __name__ == "__main__":
    sys.exit(main())
