"""A server under test: in a process of its own, on one core, over a database of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.api_clients import LoadProfile, LoadResult
from worker.processes import spawn, terminate

ROOT = Path(__file__).resolve().parent.parent
KEY = "a-key-of-the-benchmarks"
AUTHORIZATION = f"Bearer {KEY}"
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    name: str
    port: int
    process: "subprocess.Popen[bytes]"

    @property
    def peak_bytes(self) -> int:
        """The peak resident memory so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))

    def reset_peak(self) -> None:
        """Let the peak begin at the present memory."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")


@contextmanager
def running_server(
    name: str, command: Sequence[str], environment: Mapping[str, str], port: int, probe: str, core: int
) -> Iterator[Server]:
    """Run a server while the block runs; it begins once the server answers at `probe`."""
    with tempfile.TemporaryFile() as log:
        process = spawn(["taskset", "-c", str(core), *command], stdout=log, environment=environment, directory=ROOT)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not _answers(f"http://127.0.0.1:{port}{probe}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{name} does not start: {log.read()[-2000:].decode(errors='replace')}")
                time.sleep(0.1)
            yield Server(name, port, process)
        finally:
            terminate(process, 15)


def run_load(profile: LoadProfile, core: int) -> LoadResult:
    """Put a load on a server, from a process of clients on `core`."""
    command = ["taskset", "-c", str(core), sys.executable, "-m", "bench.api_clients"]
    clients = subprocess.run(command, input=json.dumps(asdict(profile)), stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if clients.returncode:
        raise RuntimeError(f"the clients failed at {profile.request.splitlines()[0]!r}")
    return LoadResult(**json.loads(clients.stdout))


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pocl_environment(home: Path, database_url: str, port: int) -> dict[str, str]:
    """The environment of our server, without settings of the shell."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("POCL_")}
    return {
        **inherited,
        "POCL_HOME": str(home),
        "POCL_DATABASE_URL": database_url,
        "POCL_PORT": str(port),
        "POCL_API_KEY": KEY,
        "POCL_MAX_JOBS_QUEUED": "1000000",
    }


@contextmanager
def scratch_home() -> Iterator[Path]:
    """A temporary POCL_HOME, removed with all that is in it."""
    directory = Path(tempfile.mkdtemp(prefix="pocl-bench-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
