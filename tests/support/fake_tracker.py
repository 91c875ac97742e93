"""A client of a tracker in place of the real one, by the same socket: `fake_tracker.py MODE`.

It answers each request with that request and the environment that it was given, unless it is to `hang` or to `die`.
"""

import json
import os
import socket
import sys
import time
from typing import Any


def main(mode: str) -> None:
    connection = socket.socket(fileno=os.dup(0))
    lines = connection.makefile("rb")
    environment = json.loads(lines.readline())
    answer: dict[str, Any]
    for line in lines:
        request = json.loads(line)
        if mode == "hang":
            time.sleep(3600)
        if mode == "die":
            sys.exit(1)
        if mode == "refuse":
            answer = {"error": "tracker_refused", "message": "The server refuses the credentials (403).", "detail": ""}
        elif request["do"] == "open":
            answer = {"run_id": "r1", "run_url": json.dumps([request, environment]), "last_steps": {"loss": 3}}
        else:
            answer = {"file": None}
        connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
