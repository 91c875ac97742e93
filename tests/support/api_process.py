"""The service as a process of its own, on a real socket."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from tests.support.requests import KEY
from tests.support.waiting import eventually

ROOT = Path(__file__).parents[2]


def environment(home: Path, **settings: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("POCL_")}
    return inherited | {"POCL_HOME": str(home)} | {f"POCL_{name.upper()}": value for name, value in settings.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class ServiceProcess:
    """A running API and its address."""

    process: subprocess.Popen[bytes]
    address: str


@contextmanager
def serving(
    home: Path,
    log: Path,
    *,
    program: Sequence[str] = ("-m", "api", "serve"),
    expects_kill: bool = False,
    code: Path = ROOT,
    **settings: str,
) -> Iterator[ServiceProcess]:
    """A running service. At the end it must stop on SIGTERM, without an error in its log.

    Args:
        program: The arguments of Python, where they are not those of the plain service.
        code: Where the packages are that it runs.
        expects_kill: Whether the service kills itself before the end.
        settings: Those of the service; its key is that of `AUTHORIZED` unless they name another.
    """
    port = free_port()
    variables = environment(home, port=str(port), **{"api_key": KEY, **settings})
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *program], env=variables | {"PYTHONPATH": str(code)}, cwd=code, stderr=output
        )
    try:
        address = f"http://127.0.0.1:{port}"
        eventually(lambda: process.poll() is not None or _answers(address), within=120, what="the service answers")
        assert process.poll() is None, log.read_text(errors="replace")[-2000:]
        yield ServiceProcess(process, address)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if not expects_kill:
        process.send_signal(signal.SIGTERM)
    status = process.wait(30)
    # Once it has shut down, Uvicorn ends itself by the signal that it got.
    assert status in ((-signal.SIGKILL,) if expects_kill else (0, -signal.SIGTERM)), status
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line for line in lines if line["level"] in ("error", "critical")] == []


def _answers(address: str) -> bool:
    try:
        # Reading the certificates of the world takes a hundred times as long as the question.
        return httpx2.get(f"{address}/healthz", verify=False).status_code == 200
    except httpx2.TransportError:
        return False
