"""One process of the API: the application on Uvicorn, within the limits of the settings."""

import gc
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import uvicorn
from limits.storage import Storage
from uvicorn.config import STARTUP_FAILURE

from api.access_log import AccessLog
from api.app import create_app
from api.http_limits import ConnectionLimits
from api.http_protocol import ConnectionTable, protocol_over
from api.jobs.watcher import JobWatcher
from api.metrics import catalog
from api.metrics.process_values import open_values
from api.metrics.recorder import MetricsRecorder
from domain.settings import Settings
from domain.tracing import create_tracer_provider

GRACE_SECONDS: Final = 10
"""How long requests under way may take once the process is asked to end."""
_YOUNG_OBJECTS: Final = 10_000
"""How many objects are made, and not freed, between two passes of the garbage collector over the youngest ones.

At CPython's 700 a pass comes in the midst of most requests, whose objects then count as old. Under load that has all
old objects traversed once more each second, for a hundredth of a second in which nothing is answered.
"""


def serve_http(
    settings: Settings,
    sockets: Sequence[socket.socket] | None = None,
    *,
    on_turn: Callable[[], None] = lambda: None,
    rate_counts: Storage | None = None,
) -> int:
    """Serve until a signal asks this process to end. Call it from the main thread.

    Args:
        settings: with limits that fit into the descriptors of the process.
        sockets: bound sockets that other processes may share; null: one of its own at the address of the settings.
        on_turn: called from the event loop, several times a second, once requests are accepted.
        rate_counts: where the processes that share the sockets count the requests of a key together; null: this one
            counts for itself.

    Returns:
        the exit status: 0, or that of Uvicorn where the server could not start.
    """
    access_log = None if settings.access_log == "off" else AccessLog(only_errors=settings.access_log == "errors")
    metrics = MetricsRecorder(open_values(settings.home / "metrics"))
    tracer_provider = None
    if settings.traces_endpoint is not None:
        tracer_provider = create_tracer_provider(
            settings.traces_endpoint, service="pocl-api", ratio=settings.traces_ratio
        )
    app = create_app(settings, access_log, metrics, tracer_provider, rate_counts=rate_counts)
    limits = ConnectionLimits(
        max_connections=settings.max_connections,
        head_seconds=settings.head_seconds,
        body_seconds=settings.body_seconds,
        idle_seconds=settings.idle_seconds,
        write_seconds=settings.write_seconds,
    )
    table = ConnectionTable(limits)
    metrics.add_readings(
        lambda: {
            (catalog.CONNECTIONS, ()): table.open_connections,
            (catalog.CAPACITY, ("connections",)): limits.max_connections,
            **{(catalog.REFUSALS, (reason,)): count for reason, count in table.refusals.items()},
        }
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol_over(table),
        # No route takes a websocket: a handshake is answered as any other request.
        ws="none",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
        access_log=False,
        # The logging of this process holds for uvicorn's loggers as well.
        log_config=None,
        server_header=False,
        timeout_keep_alive=limits.idle_seconds,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config, app.state.watcher, on_turn)
    # Imported modules live for ever: traversed by each garbage collection, they would delay all responses by a tenth of
    # a second.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)
    try:
        with suppress(KeyboardInterrupt):
            server.run(None if sockets is None else list(sockets))
    finally:
        if tracer_provider is not None:
            tracer_provider.shutdown()
    return 0 if server.started else STARTUP_FAILURE


class _Server(uvicorn.Server):
    """Uvicorn waits for the responses in progress when it stops, so long polls and streams must be ended."""

    def __init__(self, config: uvicorn.Config, watcher: JobWatcher, on_turn: Callable[[], None]) -> None:
        super().__init__(config)
        self._watcher = watcher
        self._on_turn = on_turn

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # A script starts `command &` with Ctrl-C ignored, and Uvicorn would end by it.
        ignores_interrupts = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with super().capture_signals():
            if ignores_interrupts:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            yield

    async def on_tick(self, counter: int) -> bool:
        self._on_turn()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.close()
        await super().shutdown(sockets)
