"""A child process that answers requests by one of our own modules, with limits on memory, time and size of answers.

For work on what clients sent where no bound can be put on the work itself: rendering a chat template, decoding a
compressed file. A module that is run like this defines

    def answer(request: Any) -> Any: ...

with a request and an answer that JSON can hold. It is imported once, by a fresh interpreter that holds nothing of its
parent; what it keeps between two requests is lost where a request ran into a limit, since the next one begins a new
process.

    with LimitedProcess("pocl.prompting.template_process", memory_bytes=256 << 20) as child:
        text = child.call({"template": ..., "messages": ...}, seconds=2)

Messages are a kind (one byte), the length of the content (8 bytes, big-endian) and the content. Nothing is pickled.
"""

import importlib
import json
import os
import resource
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

_HEADER: Final = struct.Struct(">cQ")
_REQUEST, _READY, _ANSWER, _NO_MEMORY, _RAISED = b"Q", b"R", b"A", b"M", b"E"
_START_SECONDS: Final = 120
"""How long the start may take: on a machine with much other work Python takes seconds to import anything."""
_REAL_PER_PROCESSOR_SECOND: Final = 10
_PIPE_BYTES: Final = 1 << 16
_MAX_LOG_BYTES: Final = 4096
# Variables that a Python needs to run at all; the child gets no key, no password and no path of the service.
_ENVIRONMENT_ALLOWLIST: Final = frozenset(
    {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV", "PYTHONHOME", "LANG", "LC_ALL"}
)


class ProcessFailed(Exception):
    """The process could not answer a request. The text continues a sentence, as in `the template {error}`."""


class ProcessOutOfTime(ProcessFailed):
    """The request took more time than it may."""


class ProcessOutOfMemory(ProcessFailed):
    """The request took more memory than it may."""


class ProcessAnswerTooLarge(ProcessFailed):
    """The answer is larger than it may be."""


class ProcessCrashed(ProcessFailed):
    """The process died, or its module raised an exception that it does not foresee; `log` says what is known."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log
        """For whoever maintains the module: the end of the traceback. It may hold what the client sent."""


class LimitedProcess:
    """Runs `answer` of a module in a child process, which is started at the first call and ends with its parent.

    One thread at a time may use it. After a request that failed, the next one starts a new process.

    Args:
        module: the dotted name of the module; it imports all that it needs at its top, without torch.
        memory_bytes: address space that the process may take besides that which it has after its imports. Enforced on
            Linux alone.
        answer_bytes: size of an answer as JSON at most.
        file_bytes: size of each file that the process writes at most; beyond it writing raises `OSError` (EFBIG).
    """

    def __init__(self, module: str, *, memory_bytes: int, answer_bytes: int = 64 << 20, file_bytes: int = 0) -> None:
        self._module = module
        self._memory_bytes = memory_bytes
        self._answer_bytes = answer_bytes
        self._file_bytes = file_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """The number of the process; None while none runs."""
        return None if self._process is None else self._process.pid

    def call(self, request: Any, *, seconds: float) -> Any:  # Any: whatever JSON can hold.
        """The answer of the module to `request`.

        Args:
            seconds: of the processor that the answer may take. The limit is on the processor's time, so that the load
                of the machine decides nothing; ten times as many seconds may pass before the process is killed all the
                same.

        Raises:
            ProcessFailed: a limit was hit, or the process crashed.
        """
        content = _encode(request)
        if self._process is not None and self._process.poll() is not None:
            # It was killed from outside, between two requests.
            self.close()
        try:
            process = self._process or self._start()
            message = _HEADER.pack(_REQUEST, _SECONDS.size + len(content)) + _SECONDS.pack(seconds) + content
            deadline = time.monotonic() + seconds * _REAL_PER_PROCESSOR_SECOND
            kind, received = _exchange(process, message, deadline=deadline, max_bytes=self._answer_bytes)
            if kind == _ANSWER:
                return json.loads(received)
            if kind == _NO_MEMORY:
                raise ProcessOutOfMemory(f"needs more than {self._memory_bytes >> 20} MiB of memory")
            log = received.decode("utf-8", "replace")
            raise ProcessCrashed(f"fails unexpectedly ({log.rpartition(_LINE_END)[2][:200]})", log)
        except _PipeClosed:
            raise self._reason_of_death(seconds) from None
        except TimeoutError:
            self.close()
            raise _out_of_time(seconds) from None
        except _TooLarge:
            self.close()
            raise ProcessAnswerTooLarge(f"gives more than {self._answer_bytes >> 20} MiB") from None
        except BaseException:
            # Half an exchange may be in the pipes, also where the caller was interrupted.
            self.close()
            raise

    def kill(self) -> None:
        """Kill the process for good: a call of another thread, also one yet to begin, raises ProcessCrashed."""
        self._killed = True
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # The path is that of this interpreter, which the caller may have extended; -P adds no directory to it.
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        inherited = {name: value for name, value in os.environ.items() if name in _ENVIRONMENT_ALLOWLIST}
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-m", __name__, self._module, str(self._memory_bytes), str(self._file_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={
                **inherited,
                "PYTHONPATH": path,
                "PYTHONUTF8": "1",
                # Address space is limited: neither a heap for each thread, nor arenas reserved in advance.
                "MALLOC_ARENA_MAX": "1",
                "ARROW_DEFAULT_MEMORY_POOL": "system",
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        if self._killed:
            process.kill()
        try:
            kind, received = _exchange(process, b"", deadline=time.monotonic() + _START_SECONDS, max_bytes=0)
        except TimeoutError:
            raise ProcessCrashed(f"cannot run: its process did not start within {_START_SECONDS} s") from None
        if kind != _READY:
            raise ProcessCrashed("cannot run: its module cannot be imported", received.decode("utf-8", "replace"))
        return process

    def _reason_of_death(self, seconds: float) -> ProcessFailed:
        process = self._process
        assert process is not None
        status = process.wait()
        self.close()
        if status == -signal.SIGPROF:
            return _out_of_time(seconds)
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return ProcessCrashed(f"crashes ({how})")


class _PipeClosed(Exception):
    """The child closed its end: it has died."""


class _TooLarge(Exception):
    """The content of a message is larger than it may be."""


_SECONDS: Final = struct.Struct(">d")
_LINE_END: Final = "\n"


def _out_of_time(seconds: float) -> ProcessOutOfTime:
    return ProcessOutOfTime(f"takes more than {seconds:g} s")


def _encode(content: Any) -> bytes:
    # A lone surrogate, which a template can write, goes to and fro unchanged.
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _exchange(
    process: subprocess.Popen[bytes], sent: bytes, *, deadline: float, max_bytes: int
) -> tuple[bytes, bytearray]:
    """Send a message and receive the next one: its kind and content. Neither side waits for the other to read first.

    Raises:
        TimeoutError: the deadline has passed.
        _TooLarge: the content has more than `max_bytes`.
        _PipeClosed: the process has died.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    unsent = memoryview(sent)
    received = bytearray()
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if unsent:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while True:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    try:
                        unsent = unsent[os.write(key.fd, unsent[:_PIPE_BYTES]) :]
                    except BrokenPipeError:
                        raise _PipeClosed from None
                    if not unsent:
                        selector.unregister(process.stdin)
                    continue
                chunk = os.read(key.fd, _PIPE_BYTES)
                if not chunk:
                    raise _PipeClosed
                received += chunk
            if len(received) >= _HEADER.size:
                kind, length = _HEADER.unpack_from(received)
                if length > (max_bytes if kind == _ANSWER else _MAX_LOG_BYTES):
                    raise _TooLarge
                if len(received) == _HEADER.size + length:
                    del received[: _HEADER.size]
                    return kind, received


# --- The child -------------------------------------------------------------------------------------------


def _main(module: str, memory_bytes: int, file_bytes: int) -> None:
    # The parent decides what a Ctrl-C in its terminal ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = os.dup(1)
    # What the module prints must not get between the messages.
    os.dup2(2, 1)
    requests: SimpleQueue[bytes | None] = SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    try:
        answer: Callable[[Any], Any] = importlib.import_module(module).answer
        _set_limits(memory_bytes, file_bytes)
    except Exception:  # noqa: BLE001 # Whatever an import raises, the parent is told.
        _send(output, _RAISED, _traceback())
        return
    _send(output, _READY, b"")
    while True:
        request = requests.get()
        if request is None:
            _send(output, _NO_MEMORY, b"")
            return
        (seconds,) = _SECONDS.unpack_from(request)
        # The kernel ends the process by SIGPROF once the processor has worked on it for so long.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            kind, content = _ANSWER, _encode(answer(json.loads(request[_SECONDS.size :])))
        except MemoryError:
            kind, content = _NO_MEMORY, b""
        except Exception:  # noqa: BLE001 # Whatever the module raises, the parent is told.
            kind, content = _RAISED, _traceback()
        signal.setitimer(signal.ITIMER_PROF, 0)
        del request
        _send(output, kind, content)


def _read_requests(requests: "SimpleQueue[bytes | None]") -> None:
    """Hand each request to the main thread, null for one that does not fit into the memory.

    The end of the input is the end of the parent, and so of this process, whatever the main thread is at.
    """
    stream = open(0, "rb", closefd=False)  # noqa: SIM115 # It is open until the process ends.
    while len(header := stream.read(_HEADER.size)) == _HEADER.size:
        _, length = _HEADER.unpack(header)
        try:
            requests.put(stream.read(length))
        except MemoryError:
            requests.put(None)
    os._exit(0)


def _set_limits(memory_bytes: int, file_bytes: int) -> None:
    # No core dump, and no file that the parent does not know of: nothing of what a client sent is left on the disk.
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        limit = size + memory_bytes
        # A limited process may start another one, and cannot give it more than it has itself.
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _traceback() -> bytes:
    import traceback  # Needed for errors alone.

    return traceback.format_exc().strip().encode("utf-8", "replace")[-_MAX_LOG_BYTES:]


def _send(output: int, kind: bytes, content: bytes) -> None:
    for part in (_HEADER.pack(kind, len(content)), content):
        unsent = memoryview(part)
        while unsent:
            unsent = unsent[os.write(output, unsent) :]


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
