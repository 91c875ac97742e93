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
    host: str
    port: int
    kind: str
    """`saturate`, `pace`, `follow` or `download`."""
    request: str
    """The head, and the body if there is one."""
    clients: int
    seconds: float = 5.0
    rate: float = 0.0
    """Requests a second of all clients together, for `pace`."""


@dataclass(frozen=True)
class LoadResult:
    status: int
    """Of every answer; another one is an error."""
    answers: int
    seconds: float
    octets: int = 0
    latencies_ms: tuple[float, ...] = ()
    """Sorted."""


class UnexpectedStatus(Exception):
    """An answer of another status than the first one."""


class _Client(asyncio.Protocol):
    """Sends requests one after the other over one connection."""

    def __init__(self) -> None:
        self.buffer = b""
        self.transport: asyncio.Transport | None = None
        self.answered: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found or self.answered is None:
            return
        if len(body) < _content_length(head):
            return
        self.buffer = b""
        if not self.answered.done():
            self.answered.set_result(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_exception(error or ConnectionResetError())

    async def ask(self, request: bytes) -> int:
        assert self.transport is not None
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answered


def _content_length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0


async def _connect(profile: LoadProfile) -> list[_Client]:
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(_Client, profile.host, profile.port) for _ in range(profile.clients)]
    return [client for _, client in made]


async def saturate(profile: LoadProfile) -> LoadResult:
    """Every client asks again as soon as it is answered."""
    request = profile.request.encode()
    clients = await _connect(profile)
    status = await clients[0].ask(request)
    latencies: list[float] = []
    start = time.perf_counter()

    async def run(client: _Client) -> None:
        while (sent := time.perf_counter()) - start < profile.seconds:
            _expect(await client.ask(request), status)
            latencies.append((time.perf_counter() - sent) * 1000)

    await asyncio.gather(*map(run, clients))
    seconds = time.perf_counter() - start
    return LoadResult(status, len(latencies), seconds, latencies_ms=tuple(sorted(latencies)))


async def pace(profile: LoadProfile) -> LoadResult:
    """Requests come at their times, answered or not; a late answer counts from when its request was due."""
    request = profile.request.encode()
    clients = await _connect(profile)
    status = await clients[0].ask(request)
    free: asyncio.Queue[_Client] = asyncio.Queue()
    for client in clients:
        free.put_nowait(client)
    latencies: list[float] = []
    start = time.perf_counter()

    async def one(due: float) -> None:
        client = await free.get()
        _expect(await client.ask(request), status)
        latencies.append((time.perf_counter() - due) * 1000)
        free.put_nowait(client)

    async with asyncio.TaskGroup() as group:
        for number in range(int(profile.seconds * profile.rate)):
            due = start + number / profile.rate
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(due))
    return LoadResult(status, len(latencies), time.perf_counter() - start, latencies_ms=tuple(sorted(latencies)))


async def follow(profile: LoadProfile) -> LoadResult:
    """Streams of events, each read to its end; the latency of an event is the time since its data says `at`."""
    latencies: list[float] = []
    start = time.perf_counter()

    async def one() -> tuple[int, int]:
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

    found = await asyncio.gather(*(one() for _ in range(profile.clients)))
    statuses = {status for status, _ in found}
    _expect(max(statuses), min(statuses))
    events = sum(count for _, count in found)
    return LoadResult(statuses.pop(), events, time.perf_counter() - start, latencies_ms=tuple(sorted(latencies)))


async def download(profile: LoadProfile) -> LoadResult:
    """One file for each client, thrown away."""
    start = time.perf_counter()

    async def one() -> tuple[int, int]:
        reader, writer = await asyncio.open_connection(profile.host, profile.port, limit=1 << 20)
        writer.write(profile.request.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        left = total = _content_length(head)
        while left > 0 and (chunk := await reader.read(1 << 20)):
            left -= len(chunk)
        writer.close()
        return int(head[9:12]), total - left

    found = await asyncio.gather(*(one() for _ in range(profile.clients)))
    statuses = {status for status, _ in found}
    _expect(max(statuses), min(statuses))
    octets = sum(read for _, read in found)
    return LoadResult(statuses.pop(), len(found), time.perf_counter() - start, octets)


def _expect(status: int, first: int) -> None:
    if status != first:
        raise UnexpectedStatus(f"{status} after {first}")


_KINDS: dict[str, Any] = {"saturate": saturate, "pace": pace, "follow": follow, "download": download}


def main() -> None:
    profile = LoadProfile(**json.load(sys.stdin))
    print(json.dumps(asdict(asyncio.run(_KINDS[profile.kind](profile)))))


if __name__ == "__main__":
    main()
