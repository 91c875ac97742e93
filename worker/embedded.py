"""The embedded set-up: broker, API, scheduler and worker under one command, stopped together.

All state lies below `POCL_HOME`. Every child has a process group of its own and is killed by the kernel if this
process dies, so nothing is left over however it ends.
"""

import fcntl
import http.client
import math
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from types import FrameType
from urllib.parse import quote

import redis
import structlog

from domain.database_errors import DatabaseUnavailable
from domain.local_key import FILE_NAME, secure_home
from domain.schema import is_for_operator, upgrade
from domain.secret_files import file_variable
from domain.settings import Settings
from domain.workers.models import Device
from pocl.container_limits import available_cpus, available_memory_bytes
from worker import valkey
from worker.app import broker_url
from worker.bounded_log import BoundedLog
from worker.devices import NoUsableGpu, detect_devices
from worker.processes import kill_group, spawn, terminate
from worker.python_path import child_python_path, module_command
from worker.settings import WorkerSettings
from worker.shares import TooManyWorkers, divide_machine

_log = structlog.get_logger(__name__)

_START_TIMEOUT_SECONDS = 60
_MAX_WAIT_SECONDS = 8
_POLL_SECONDS = 0.1
_MAX_RESTARTS = 3
_RESTART_WINDOW_SECONDS = 300
_MAX_LOG_BYTES = 8 * 2**20
# The kernel's limit of a unix socket's path is 107 bytes on Linux and 103 on macOS.
_MAX_SOCKET_PATH_BYTES = 100


_REPLACED_VARIABLES = frozenset(
    {
        *("POCL_API_KEY", "POCL_HOST", "POCL_PORT", "POCL_REDIS_URL", "POCL_REDIS_PASSWORD"),
        *(file_variable(name) for name in ("POCL_API_KEY", "POCL_REDIS_URL", "POCL_REDIS_PASSWORD")),
    }
)
"""What children are given anew, from the settings that this process has read."""
_PING_SECONDS = 2
_MAX_FAILED_PINGS = 3


class CannotServe(Exception):
    """The set-up cannot start or go on; the message says what to do."""


class ShutdownSignal:
    """Whether the user asked this process to end, and how often: the second request is for an end at once."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self.requests = 0

    def request(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Count one more request to end. It has the shape of a signal handler."""
        self.requests += 1
        self._requested.set()

    def wait(self, seconds: float) -> bool:
        """Sleep for `seconds`, or until the first request; whether there was one."""
        return self._requested.wait(seconds)

    def install(self) -> None:
        """Take Ctrl-C, a request to terminate and a closed terminal as requests to end.

        What this process was started to ignore it goes on ignoring: a closed terminal under `nohup`, Ctrl-C behind the
        `&` of a script.
        """
        signal.signal(signal.SIGTERM, self.request)
        for number in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.request)


@dataclass
class BrokerWatch:
    """Restarts a broker that runs and does not answer, as where its socket was removed. Jobs wait for it meanwhile."""

    answers: Callable[[], bool]
    restart: Callable[[], object]
    _checked_at: float = -math.inf
    _failed: int = 0

    def check_if_due(self, now: float) -> None:
        """Ask the broker once in a while, and restart it once it has not answered several times in a row.

        Args:
            now: seconds of a clock that only goes forward.
        """
        if now - self._checked_at < _PING_SECONDS:
            return
        self._checked_at = now
        self._failed = 0 if self.answers() else self._failed + 1
        if self._failed >= _MAX_FAILED_PINGS:
            _log.warning("broker_restarted", failed_pings=self._failed)
            self._failed = 0
            self.restart()


@dataclass
class _Child:
    """One process of the set-up, restarted with a growing pause where it exits by itself."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: BoundedLog
    prepare: Callable[[], None] = lambda: None
    """Called before each start."""
    process: subprocess.Popen[bytes] | None = None
    exit_times: deque[float] = field(default_factory=deque)
    """Monotonic seconds of the exits that nobody asked for, within the restart window."""

    def start(self) -> None:
        self.prepare()
        with self.log.open() as output:
            self.process = spawn(self.command, stdout=output, environment=self.environment)

    def restart(self) -> None:
        """End the process where it runs, and start it anew; this counts as no exit of its own."""
        self.kill()
        self.start()

    def restart_if_exited(self, now: float) -> None:
        """Bound the child's log, and start the child again if it exited by itself, with exponential backoff.

        Raises:
            CannotServe: it exits again and again.
        """
        self.log.trim()
        if self.process is None:
            backoff_seconds = min(0.25 * 2 ** len(self.exit_times), 10)
            if now - self.exit_times[-1] >= backoff_seconds:
                self.start()
            return
        status = self.process.poll()
        if status is None:
            return
        kill_group(self.process)
        self.process = None
        _log.warning("process_exited", process=self.name, status=status, log=str(self.log.path))
        self.exit_times.append(now)
        while now - self.exit_times[0] > _RESTART_WINDOW_SECONDS:
            self.exit_times.popleft()
        if len(self.exit_times) > _MAX_RESTARTS:
            raise CannotServe(f"The {self.name} ended {len(self.exit_times)} times. See {self.log.path}.")

    def terminate(self) -> None:
        if self.process is not None:
            self.process.terminate()

    def has_exited(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def kill(self) -> None:
        if self.process is not None:
            terminate(self.process, grace=0)


def serve(
    settings: Settings, options: WorkerSettings, *, shutdown: ShutdownSignal, announce: Callable[[str], None]
) -> None:
    """Run everything until `shutdown` is requested. Call it from the main thread.

    Args:
        announce: called once, when the API answers, with :func:`ready_message`.

    Raises:
        CannotServe: something cannot be started, or does not stay up.
    """
    with ExitStack() as stack:
        stack.enter_context(_exclusive_home(settings.home))
        port = _resolve_port(settings)
        upgrade_when_possible(settings, shutdown)
        environment = {
            **{name: value for name, value in os.environ.items() if name.upper() not in _REPLACED_VARIABLES},
            "POCL_HOME": str(settings.home),
            "TMPDIR": str(_empty_directory(settings.home / "tmp")),
            "PYTHONPATH": child_python_path(os.environ),
        }
        broker, redis_url = _broker(settings, environment, stack)
        # The key of the API reaches the API alone, and the API needs no broker.
        environment_of_api = {**environment, **_environment_of_api(settings, port)}
        environment["POCL_REDIS_URL"] = redis_url
        clients = [
            _child(settings, environment_of_api, "API", "api", "serve"),
            _child(settings, environment, "scheduler", "worker", "scheduler"),
            *_workers(settings, options, environment),
        ]
        children = [*broker, *clients]
        # Whatever happens below, no child stays.
        stack.callback(_kill, children)
        for child in broker:
            child.start()
        wait_until(lambda: _broker_answers(redis_url), broker, shutdown, "the broker")
        stack.enter_context(valkey.published_address(settings.home, redis_url))
        for child in clients:
            child.start()
        wait_until(lambda: _api_is_ready(settings.host, port), children, shutdown, "the API")
        if not shutdown.requests:
            announce(ready_message(settings, port, [child.log.path for child in children]))
        watches = [BrokerWatch(lambda: _broker_answers(redis_url), restart=child.restart) for child in broker]
        while not shutdown.wait(_POLL_SECONDS):
            _restart_exited(children)
            for watch in watches:
                watch.check_if_due(time.monotonic())
        _log.warning("service_stopping", hint="A running job saves its state. Ask again to stop at once.")
        # The broker outlives those that talk to it.
        _stop(clients, options.grace_seconds + 15, shutdown)
        _stop(broker, 5, shutdown)


def ready_message(settings: Settings, port: int, log_files: Sequence[Path]) -> str:
    """What `serve` prints once the API answers: `READY`, the address, and where everything is.

    Programs read the first line alone.
    """
    address = f"http://{_url_host(settings.host)}:{port}"
    models = os.pathsep.join(str(root) for root in settings.model_roots)
    if not any(_has_entries(root) for root in settings.model_roots):
        models += "   (none yet: `make model` gets one)"
    logs = f"{log_files[0].parent}   ({', '.join(path.name for path in log_files)})"
    places = {
        "API": f"{address}/v1",
        "reference": f"{address}/docs",
        "models": models,
        "artifacts": settings.artifact_store or str(settings.artifact_root),
        "key": "POCL_API_KEY" if settings.api_key is not None else str(settings.home / FILE_NAME),
        "logs": logs,
        "stop": "Ctrl-C; a running job saves its state and goes on at the next start",
    }
    return "\n".join([f"READY {address}", *(f"  {name:<11}{place}" for name, place in places.items())])


def upgrade_when_possible(settings: Settings, shutdown: ShutdownSignal) -> None:
    """Bring the database to this version, waiting for one that is away, with back-off, until a shutdown is requested.

    Raises:
        DatabaseUnavailable: an operator must look at the database.
        DatabaseRefused: this version cannot use the database.
        CannotServe: a directory cannot be made.
    """
    for seconds in chain((1, 2, 4), repeat(_MAX_WAIT_SECONDS)):
        try:
            return upgrade(settings)
        except DatabaseUnavailable as error:
            if is_for_operator(error):
                raise
            _log.warning("database_unavailable", error=str(error), retry_in_seconds=seconds)
        except OSError as error:
            raise CannotServe(f"POCL_HOME: {error.strerror}: {error.filename}") from None
        if shutdown.wait(seconds):
            return None
    return None


@contextmanager
def _exclusive_home(home: Path) -> Iterator[None]:
    secure_home(home)
    try:
        lock = os.open(home / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = error.strerror or "it cannot be used"
        raise CannotServe(f"POCL_HOME: {reason}: {home}. Set it to a directory that this user may write.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CannotServe(f"Another `worker serve` uses {home}. Stop it, or choose another POCL_HOME.") from None
    finally:
        os.close(lock)


def _resolve_port(settings: Settings) -> int:
    """The port of the settings, or a free one for 0.

    Raises:
        CannotServe: it cannot be bound.
    """
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
        return [], broker_url(settings.redis_url, settings.redis_ca_file)
    try:
        binary = valkey.find(environment)
    except valkey.ServerNotFound as error:
        raise CannotServe(str(error)) from None
    directory = settings.home / "run"
    if len(os.fsencode(directory / "redis.sock")) > _MAX_SOCKET_PATH_BYTES:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pocl-")))
    socket_path = directory / "redis.sock"

    def prepare() -> None:
        # A cleaner of temporary files may have removed the directory too.
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        socket_path.unlink(missing_ok=True)

    logfile = BoundedLog(settings.home / "logs" / "broker.log", _MAX_LOG_BYTES)
    command = valkey.command(binary.path, socket_path)
    return [_Child("broker", command, environment, logfile, prepare)], f"unix://{quote(str(socket_path))}"


def _child(settings: Settings, environment: Mapping[str, str], name: str, module: str, command: str) -> _Child:
    logfile = BoundedLog(settings.home / "logs" / f"{name.lower()}.log", _MAX_LOG_BYTES)
    return _Child(name, module_command(sys.executable, module, command), environment, logfile)


def _workers(settings: Settings, options: WorkerSettings, environment: Mapping[str, str]) -> list[_Child]:
    """The workers to start, each with its share of the machine.

    Raises:
        CannotServe: there are more than fit.
    """
    gpus: list[Device] = []
    if options.count != 0:
        try:
            # All that there are, and not those of one job.
            detected = detect_devices(options.model_copy(update={"gpus_per_job": 64}))
            gpus = [device for device in detected if device.kind == "cuda"]
        except NoUsableGpu as error:
            if (options.count or 1) > 1:
                raise CannotServe(str(error)) from None
            # One worker starts, and says on /v1/workers why it takes no job.
    available = options.memory_bytes or available_memory_bytes()
    try:
        shares = divide_machine(options, gpus, memory_bytes=available, processors=available_cpus())
    except TooManyWorkers as error:
        raise CannotServe(str(error)) from None
    names = ["worker"] if len(shares) == 1 else [f"worker-{number}" for number in range(1, len(shares) + 1)]
    return [
        _child(settings, {**environment, **share.variables()}, name, "worker", "run")
        for name, share in zip(names, shares, strict=True)
    ]


def _environment_of_api(settings: Settings, port: int) -> dict[str, str]:
    environment = {
        "POCL_HOST": settings.host,
        "POCL_PORT": str(port),
        "POCL_API_WORKERS": str(settings.api_workers),
    }
    if settings.api_key is not None:
        environment["POCL_API_KEY"] = settings.api_key.get_secret_value()
    return environment


def _empty_directory(directory: Path) -> Path:
    # Killed processes leave temporary files; no process of this home runs at this moment.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    return directory


def _has_entries(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def wait_until(
    condition: Callable[[], bool],
    children: list[_Child],
    shutdown: ShutdownSignal,
    what: str,
    within: float = _START_TIMEOUT_SECONDS,
) -> None:
    """Return once `condition` holds or a shutdown is requested.

    Args:
        children: the processes that are waited for; none where they are not of this set-up.
        within: seconds.

    Raises:
        CannotServe: it does not hold in time, or a child exits again and again.
    """
    deadline = time.monotonic() + within
    while not condition():
        if shutdown.wait(_POLL_SECONDS):
            return
        _restart_exited(children)
        if time.monotonic() > deadline:
            advice = "Nobody answers at POCL_REDIS_URL, or its user and password are refused: correct it."
            if children:
                advice = f"See {children[0].log.path.parent}."
            raise CannotServe(f"After {within:g} s {what} does not answer. {advice}")


def _restart_exited(children: list[_Child]) -> None:
    for child in children:
        child.restart_if_exited(time.monotonic())


def _stop(children: list[_Child], grace_seconds: float, shutdown: ShutdownSignal) -> None:
    """Terminate all and wait; kill them when time is up or the user asks once more."""
    for child in children:
        child.terminate()
    requests, deadline = shutdown.requests, time.monotonic() + grace_seconds
    while not all(child.has_exited() for child in children):
        if shutdown.requests > requests or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    _kill(children)


def _kill(children: list[_Child]) -> None:
    for child in children:
        child.kill()


def _broker_answers(redis_url: str) -> bool:
    with redis.Redis.from_url(redis_url, socket_timeout=2, socket_connect_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False


def _api_is_ready(host: str, port: int) -> bool:
    # A host that stands for all addresses is reached by way of loopback.
    connect_to = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    connection = http.client.HTTPConnection(connect_to, port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host
