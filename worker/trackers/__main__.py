"""`python -m worker.trackers KIND`: holds the client of a tracker for the scheduler, one request at a time.

Requests and answers are lines of JSON on the socket that is its standard input. The first line has the environment of
the client, so that no other process of this user reads its secrets in `/proc`.
"""

import json
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from domain.logs import redact_addresses
from worker.processes import hide_memory
from worker.trackers.client import CannotTrack, TrackerClient


def main() -> int:
    hide_memory()
    connection = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    requests = connection.makefile("rb")
    os.environ.update(json.loads(requests.readline()))
    client: TrackerClient | None = None
    for line in requests:
        try:
            client = client or _create(sys.argv[1])
            answer = _answer(client, json.loads(line))
        except CannotTrack as error:
            answer = {"error": error.code, "message": error.message, "detail": redact_addresses(repr(error.__cause__))}
        except Exception as error:  # noqa: BLE001 - whatever the client raises is told, and it is tried again later
            message = f"The client failed ({type(error).__name__})."
            answer = {"error": "tracker_error", "message": message, "detail": redact_addresses(repr(error))}
        connection.sendall(json.dumps(answer).encode() + b"\n")
    return 0


def _create(kind: str) -> TrackerClient:
    # Each is imported in its own process alone: they take long, and start threads.
    if kind == "tensorboard":
        from worker.trackers.tensorboard_client import TensorBoardClient

        return TensorBoardClient()
    if kind == "mlflow":
        from worker.trackers.mlflow_client import MlflowTrackerClient

        return MlflowTrackerClient()
    from worker.trackers.wandb_client import WandbTrackerClient

    return WandbTrackerClient()


def _answer(client: TrackerClient, request: Mapping[str, Any]) -> dict[str, Any]:
    match request["do"]:
        case "open":
            opened = client.open(request["run"], Path(request["directory"]))
            return {"run_id": opened.run_id, "run_url": opened.run_url, "last_steps": opened.last_steps}
        case "send":
            client.send(request["job_id"], [(step, values) for step, values in request["points"]])
            return {}
        case _:
            file = client.close(request["job_id"], request["status"], request["tags"])
            return {"file": None if file is None else str(file)}


if __name__ == "__main__":
    sys.exit(main())
