"""The clients of `python -m bench api`: `python -m bench.api_clients` is a process that takes a load profile on stdin.

Raw sockets and no HTTP library: a generator that is slower than the server would measure itself.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LoadProfile:
    """What load the clients put on a server."""

    host: str
    port: int
    kind: str
    """`closed_loop`, `open_loop`, `follow` or `download`."""
    request: str
    """The head of the request, and its body if it has one."""
    clients: int
    seconds: float = 5.0
    rate: float = 0.0
    """The requests a second of all clients together, for `open_loop`."""


@dataclass(frozen=True)
class LoadResult:
    """What came of a load."""

    status: int
    """The status of every response; a different one is an error."""
    responses: int
    seconds: float
    octets: int = 0
    latencies_ms: tuple[float, ...] = ()
    """The latency of each response, ascending."""


class UnexpectedStatus(Exception):
    """The status of a response differs from that of the first."""


class _Client(asyncio.Protocol):
    """Sends requests one after the other over one keep-alive connection."""

    def __init__(self) -> None:
        self.buffer = b""
        self.transport: asyncio.Transport | None = None
        self.response: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, body = self.buffer.partition(b"\r\n\r\n")
        if not separator or self.response is None:
            return
        if len(body) < _content_length(head):
            return
        self.buffer = b""
        if not self.response.done():
            self.response.set_result(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        if self.response is not None and not self.response.done():
            self.response.set_exception(error or ConnectionResetError())

    async def send(self, request: bytes) -> int:
        assert self.transport is not None
        self.response = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.response


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0


async def _connect(profile: LoadProfile) -> list[_Client]:
    loop = asyncio.get_running_loop()
    connections = [await loop.create_connection(_Client, profile.host, profile.port) for _ in range(profile.clients)]
    return [client for _, client in connections]


async def closed_loop(profile: LoadProfile) -> LoadResult:
    """Every client sends its next request as soon as it has a response."""
    request = profile.request.encode()
    clients = await _connect(profile)
    status = await clients[0].send(request)
    latencies: list[float] = []
    start = time.perf_counter()

    async def run(client: _Client) -> None:
        while (sent := time.perf_counter()) - start < profile.seconds:
            _expect(await client.send(request), status)
            latencies.append((time.perf_counter() - sent) * 1000)

    await asyncio.gather(*map(run, clients))
    seconds = time.perf_counter() - start
    return LoadResult(status, len(latencies), seconds, latencies_ms=tuple(sorted(latencies)))


async def open_loop(profile: LoadProfile) -> LoadResult:
    """Requests are sent on schedule, whether or not earlier ones have a response.

    A latency is measured from when its request was due, so that a slow server cannot hide it by delaying later requests
    (coordinated omission).
    """
    request = profile.request.encode()
    clients = await _connect(profile)
    status = await clients[0].send(request)
    free: asyncio.Queue[_Client] = asyncio.Queue()
    for client in clients:
        free.put_nowait(client)
    latencies: list[float] = []
    start = time.perf_counter()

    async def send(due: float) -> None:
        client = await free.get()
        _expect(await client.send(request), status)
        latencies.append((time.perf_counter() - due) * 1000)
        free.put_nowait(client)

    async with asyncio.TaskGroup() as group:
        for number in range(int(profile.seconds * profile.rate)):
            due = start + number / profile.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(send(due))
    return LoadResult(status, len(latencies), time.perf_counter() - start, latencies_ms=tuple(sorted(latencies)))


async def follow(profile: LoadProfile) -> LoadResult:
    """Read a stream of events for each client to its end; the latency of an event is the time since its `sent`."""
    latencies: list[float] = []
    start = time.perf_counter()

    async def read_one() -> tuple[int, int]:
        reader, writer = await asyncio.open_connection(profile.host, profile.port)
        writer.write(profile.request.encode())
        status, events = int((await reader.readline())[9:12]), 0
        while line := await reader.readline():
            if line.startswith(b'data: {"id"'):
                events += 1
                if b'"sent":' in line:
                    sent = json.loads(line[6:])["data"]["sent"]
                    latencies.append((time.time() - sent) * 1000)
            if line == b"0\r\n":
                break
        writer.close()
        return status, events

    results = await asyncio.gather(*(read_one() for _ in range(profile.clients)))
    statuses = {status for status, _ in results}
    _expect(max(statuses), min(statuses))
    events = sum(count for _, count in results)
    return LoadResult(statuses.pop(), events, time.perf_counter() - start, latencies_ms=tuple(sorted(latencies)))


async def download(profile: LoadProfile) -> LoadResult:
    """Download one file for each client, and discard it."""
    start = time.perf_counter()

    async def read_one() -> tuple[int, int]:
        reader, writer = await asyncio.open_connection(profile.host, profile.port, limit=1 << 20)
        writer.write(profile.request.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        remaining = total = _content_length(head)
        while remaining > 0 and (chunk := await reader.read(1 << 20)):
            remaining -= len(chunk)
        writer.close()
        return int(head[9:12]), total - remaining

    results = await asyncio.gather(*(read_one() for _ in range(profile.clients)))
    statuses = {status for status, _ in results}
    _expect(max(statuses), min(statuses))
    octets = sum(read for _, read in results)
    return LoadResult(statuses.pop(), len(results), time.perf_counter() - start, octets)


def _expect(status: int, first: int) -> None:
    if status != first:
        raise UnexpectedStatus(f"{status} after {first}")


_KINDS: dict[str, Any] = {
    "closed_loop": closed_loop,
    "open_loop": open_loop,
    "follow": follow,
    "download": download,
}


def main() -> None:
    profile = LoadProfile(**json.load(sys.stdin))
    print(json.dumps(asdict(asyncio.run(_KINDS[profile.kind](profile)))))


if __name__ == "__main__":
    main()
