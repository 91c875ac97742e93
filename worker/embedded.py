"""The embedded set-up: broker, API, scheduler and worker under one command, stopped together.

All state lies below `POCL_HOME`. Every child has a process group of its own and is killed by the kernel if this
process dies, so nothing is left over however it ends.
"""

import fcntl
import http.client
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import redis

from domain.db import upgrade
from domain.settings import Settings
from worker import valkey
from worker.logs import BoundedLog
from worker.processes import end, kill_group, spawn
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

_START_SECONDS = 60
_TICK_SECONDS = 0.1
_RESTARTS = 3
_RESTARTS_WITHIN = 300
_LOG_BYTES = 8 * 2**20
# The kernel's limit is 107 bytes on Linux and 103 on macOS.
_SOCKET_PATH = 100


class CannotServe(Exception):
    """The set-up cannot start or go on; the message says what to do."""


class Stop:
    """Whether the user asked to end, and how often."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self.times = 0

    def ask(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        self.times += 1
        self._asked.set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but no longer than until the user asks."""
        return self._asked.wait(seconds)

    def listen(self) -> None:
        """Take Ctrl-C, a request to terminate and a closed terminal as asking."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self.ask)


@dataclass
class _Child:
    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: BoundedLog
    process: subprocess.Popen[bytes] | None = None
    ended: deque[float] = field(default_factory=deque)
    """When it ended by itself, of late."""

    def start(self) -> None:
        with self.log.open() as output:
            self.process = spawn(self.command, stdout=output, environment=self.environment)

    def tend(self, now: float) -> None:
        """Start it again if it ended by itself, after a pause that grows.

        Raises:
            CannotServe: it ends again and again.
        """
        self.log.trim()
        if self.process is None:
            if now - self.ended[-1] >= min(0.25 * 2 ** len(self.ended), 10):
                self.start()
            return
        status = self.process.poll()
        if status is None:
            return
        kill_group(self.process)
        self.process = None
        log.warning("the %s ended with status %d", self.name, status)
        self.ended.append(now)
        while now - self.ended[0] > _RESTARTS_WITHIN:
            self.ended.popleft()
        if len(self.ended) > _RESTARTS:
            raise CannotServe(f"The {self.name} ended {len(self.ended)} times. See {self.log.path}.")

    def ask_to_end(self) -> None:
        if self.process is not None:
            self.process.terminate()

    def has_ended(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def end(self, grace: float) -> None:
        if self.process is not None:
            end(self.process, grace)


def serve(settings: Settings, options: WorkerSettings, *, stop: Stop, announce: Callable[[str], None]) -> None:
    """Run everything until `stop` is asked for. Call it from the main thread.

    Args:
        announce: is told once, with a line, when the API answers.

    Raises:
        CannotServe: something cannot be started, or does not stay up.
    """
    with ExitStack() as stack:
        stack.enter_context(_only_one(settings.home))
        port = _port_for(settings)
        upgrade(settings)
        environment = {
            **os.environ,
            "POCL_HOME": str(settings.home),
            "POCL_HOST": settings.host,
            "POCL_PORT": str(port),
        }
        broker, environment["POCL_REDIS_URL"] = _broker(settings, environment, stack)
        environment["TMPDIR"] = str(_emptied(settings.home / "tmp"))
        others = [
            _child(settings, environment, "API", "api", "serve"),
            _child(settings, environment, "scheduler", "worker", "scheduler"),
            _child(settings, environment, "worker", "worker", "run"),
        ]
        children = [*broker, *others]
        # Whatever happens below, nothing stays.
        stack.callback(_kill, children)
        for child in broker:
            child.start()
        _until(lambda: _answers(environment["POCL_REDIS_URL"]), broker, stop, "the broker")
        for child in others:
            child.start()
        _until(lambda: _ready(settings.host, port), children, stop, "the API")
        if not stop.times:
            announce(f"READY http://{_spelled(settings.host)}:{port}")
        while not stop.wait(_TICK_SECONDS):
            _tend(children)
        log.warning("stopping; a running job saves its state. Ask again to stop at once.")
        # The broker outlives those that talk to it.
        _end(others, options.grace_seconds + 15, stop)
        _end(broker, 5, stop)


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(home / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CannotServe(f"Another `worker serve` uses {home}. Stop it, or choose another POCL_HOME.") from None
    finally:
        os.close(lock)


def _port_for(settings: Settings) -> int:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        # As the API will bind it: connections that linger from an earlier run are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            reason = error.strerror or "it cannot be used"
            raise CannotServe(
                f"Port {settings.port} of {settings.host}: {reason}. Choose another with --port; 0 takes a free one."
            ) from None
        return int(probe.getsockname()[1])


def _broker(settings: Settings, environment: Mapping[str, str], stack: ExitStack) -> tuple[list[_Child], str]:
    """The server to start, unless the settings name one that runs, and its URL."""
    if settings.redis_url is not None:
        return [], settings.redis_url
    try:
        binary = valkey.find(environment)
    except valkey.ServerNotFound as error:
        raise CannotServe(str(error)) from None
    directory = settings.home / "run"
    if len(os.fsencode(directory / "redis.sock")) > _SOCKET_PATH:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pocl-")))
    directory.mkdir(mode=0o700, exist_ok=True)
    place = directory / "redis.sock"
    place.unlink(missing_ok=True)
    logfile = BoundedLog(settings.home / "logs" / "broker.log", _LOG_BYTES)
    return [_Child("broker", valkey.command(binary.path, place), environment, logfile)], f"unix://{place}"


def _child(settings: Settings, environment: Mapping[str, str], name: str, module: str, command: str) -> _Child:
    logfile = BoundedLog(settings.home / "logs" / f"{name.lower()}.log", _LOG_BYTES)
    return _Child(name, [sys.executable, "-m", module, command], environment, logfile)


def _emptied(directory: Path) -> Path:
    # Killed processes leave temporary files; no process of this home runs at this moment.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    return directory


def _until(so: Callable[[], bool], children: list[_Child], stop: Stop, what: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not so():
        if stop.wait(_TICK_SECONDS):
            return
        _tend(children)
        if time.monotonic() > deadline:
            logs = children[0].log.path.parent
            raise CannotServe(f"After {_START_SECONDS} s {what} does not answer. See {logs}.")


def _tend(children: list[_Child]) -> None:
    for child in children:
        child.tend(time.monotonic())


def _end(children: list[_Child], grace: float, stop: Stop) -> None:
    """Ask all to end and wait for it; kill them when time is up or the user asks again."""
    for child in children:
        child.ask_to_end()
    asked, deadline = stop.times, time.monotonic() + grace
    while not all(child.has_ended() for child in children):
        if stop.times > asked or time.monotonic() > deadline:
            break
        time.sleep(_TICK_SECONDS)
    _kill(children)


def _kill(children: list[_Child]) -> None:
    for child in children:
        child.end(0)


def _answers(redis_url: str) -> bool:
    with redis.Redis.from_url(redis_url, socket_timeout=2, socket_connect_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def _ready(host: str, port: int) -> bool:
    # An address that stands for all of them is reached by way of loopback.
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(reached, port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _spelled(host: str) -> str:
    return f"[{host}]" if ":" in host else host
