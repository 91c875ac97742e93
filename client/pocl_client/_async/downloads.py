"""Downloads: in parts side by side, resumed, verified, and under their final names only when they are whole."""

import base64
import binascii
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

import httpx2

from pocl_client._async.concurrency import in_thread, run_all
from pocl_client._async.transport import AsyncTransport, Outage
from pocl_client.byte_ranges import ByteRange, first_byte
from pocl_client.errors import ClientError, DownloadDamaged, ResponseInvalid, TargetExists
from pocl_client.models import ManifestFile
from pocl_client.partial_file import PartialFile, sha256_of

DEFAULT_CONNECTIONS: Final = 4
OnProgress = Callable[[int, int], None]
"""Called with the bytes that have been transferred and with all that there are."""
_WRITE_BYTES: Final = 1 << 20
_OUTAGE_SECONDS: Final = 120.0


class Download:
    """Several files, downloaded by the same connections.

    Args:
        on_progress: called from the threads that write, by one of them at a time.
    """

    def __init__(self, transport: AsyncTransport, connections: int, on_progress: OnProgress | None) -> None:
        if connections < 1:
            raise ValueError("a download needs a connection")
        self._transport = transport
        self._connections = connections
        self._on_progress = on_progress
        self._done = 0
        self._total = 0
        self._counting = threading.Lock()

    async def fetch(self, files: Sequence[tuple[str, PartialFile]]) -> None:
        """Download files by their paths below the address of the service.

        Raises:
            DownloadDamaged: a file arrived damaged twice.
            ApiError, ServiceUnreachable: a file cannot be had; what has arrived stays for the next time.
            OSError: a file cannot be written.
        """
        self._total = sum(partial.size for _, partial in files)
        for _, partial in files:
            await in_thread(partial.open)
        self._done = self._total - sum(part.size for _, partial in files for part in partial.missing())
        self._report(0)
        damaged = await self._fetch_missing(files)
        if damaged:
            # A part may have been written by a machine that crashed: once more, from the beginning.
            for _, partial in damaged:
                self._done -= partial.size
                await in_thread(partial.open)
            still_damaged = await self._fetch_missing(damaged)
            if still_damaged:
                names = ", ".join(partial.target.name for _, partial in still_damaged)
                raise DownloadDamaged(f"{names}: what arrives has not the SHA-256 that the service names, twice.")

    async def _fetch_missing(self, files: Sequence[tuple[str, PartialFile]]) -> list[tuple[str, PartialFile]]:
        """Download what is missing, and name each file that is whole; those that are damaged."""
        damaged: list[tuple[str, PartialFile]] = []
        tasks = []
        for path, partial in files:
            missing = partial.missing()
            tasks += [self._task(path, partial, part, damaged) for part in missing]
            if not missing:
                await self._publish(path, partial, damaged)
        await run_all(tasks, self._connections)
        return damaged

    def _task(
        self, path: str, partial: PartialFile, part: ByteRange, damaged: list[tuple[str, PartialFile]]
    ) -> Callable[[Callable[[], bool]], Awaitable[None]]:
        async def fetch(should_stop: Callable[[], bool]) -> None:
            await self._fetch_part(path, partial, part, should_stop)
            if not should_stop() and await in_thread(partial.finish_part, part):
                await self._publish(path, partial, damaged)

        return fetch

    async def _publish(self, path: str, partial: PartialFile, damaged: list[tuple[str, PartialFile]]) -> None:
        try:
            await in_thread(partial.publish)
        except DownloadDamaged:
            damaged.append((path, partial))

    async def _fetch_part(
        self, path: str, partial: PartialFile, part: ByteRange, should_stop: Callable[[], bool]
    ) -> None:
        """Write one part, going on where a connection breaks off."""
        outage = Outage(self._transport.clock, _OUTAGE_SECONDS)
        writer = _PartWriter(partial, part)
        failures = 0
        while not writer.is_full and not should_stop():
            before = writer.position
            try:
                # Compressed bytes could not be counted.
                headers = {"Range": f"bytes={before}-{part.stop - 1}", "Accept-Encoding": "identity"}
                async with self._transport.stream(path, headers=headers) as response:
                    await self._write_body(response, writer, should_stop)
            except ClientError as error:
                if writer.position > before:
                    outage.end()
                    failures = 0
                outage.failed(error)
                failures += 1
                wait = self._transport.retries.wait_after(min(failures, self._transport.retries.attempts - 1))
                await self._transport.clock.sleep(wait or 0)

    async def _write_body(
        self, response: httpx2.Response, writer: "_PartWriter", should_stop: Callable[[], bool]
    ) -> None:
        # A proxy that knows no ranges sends the whole file.
        offset = _offset_of(response, writer.position)
        try:
            async for piece in response.aiter_bytes():
                self._report(await writer.add(offset, piece))
                offset += len(piece)
                if writer.is_full or should_stop():
                    return
        finally:
            # What has arrived counts, also where the connection breaks.
            await writer.flush()
        raise ResponseInvalid(f"{writer.name} ends before its promised size.")

    def _report(self, size: int) -> None:
        with self._counting:
            self._done += size
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)


class _PartWriter:
    """Writes the bytes of a part as they arrive, many of them at a time."""

    def __init__(self, partial: PartialFile, part: ByteRange) -> None:
        self._partial = partial
        self._stop = part.stop
        self._written = part.start
        self._waiting = bytearray()

    @property
    def name(self) -> str:
        """That of the file."""
        return self._partial.target.name

    @property
    def position(self) -> int:
        """The first byte that has not arrived."""
        return self._written + len(self._waiting)

    @property
    def is_full(self) -> bool:
        """Whether the part has arrived."""
        return self.position >= self._stop

    async def add(self, offset: int, content: bytes) -> int:
        """Take bytes from a place in the file; how many of them are new and of this part."""
        wanted = content[max(0, self.position - offset) : max(0, self._stop - offset)]
        self._waiting += wanted
        if len(self._waiting) >= _WRITE_BYTES:
            await self.flush()
        return len(wanted)

    async def flush(self) -> None:
        """Write what waits."""
        content, self._waiting = bytes(self._waiting), bytearray()
        if content:
            await in_thread(self._partial.write, self._written, content)
            self._written += len(content)


async def download_file(
    transport: AsyncTransport,
    path: str,
    target: Path,
    *,
    connections: int = DEFAULT_CONNECTIONS,
    on_progress: OnProgress | None = None,
) -> Path:
    """Download one file, whose size and digest the service says, in place of what has the name.

    Raises:
        as :meth:`Download.fetch`.
    """
    response = await transport.send("HEAD", path)
    size, sha256 = _promised(response.headers)
    await Download(transport, connections, on_progress).fetch([(path, PartialFile(target, size, sha256))])
    return target


async def download_directory(
    transport: AsyncTransport,
    files: Sequence[ManifestFile],
    path_of: Callable[[str], str],
    directory: Path,
    staging: Path,
    *,
    connections: int = DEFAULT_CONNECTIONS,
    on_progress: OnProgress | None = None,
) -> Path:
    """Download files into a directory that appears under its name when all of them are whole and verified.

    Args:
        path_of: the path below the address of the service of each file of the manifest.
        staging: where the files are meanwhile, on the same disk; a later download goes on there.

    Raises:
        TargetExists: the directory holds something else.
        as :meth:`Download.fetch`.
    """
    wanted = {_checked_path(file.path): file for file in files}
    if await in_thread(_holds, directory, wanted):
        return directory
    partials = []
    for path, file in wanted.items():
        place = staging / path
        if not (place.is_file() and place.stat().st_size == file.size):
            partials.append((path_of(file.path), PartialFile(place, file.size, file.sha256)))
    await Download(transport, connections, on_progress).fetch(partials)
    if directory.is_dir():
        directory.rmdir()
    staging.mkdir(parents=True, exist_ok=True)
    os.rename(staging, directory)
    return directory


def _holds(directory: Path, wanted: Mapping[PurePosixPath, ManifestFile]) -> bool:
    """Whether the directory has these very files already; false where it is empty, or not there.

    Raises:
        TargetExists: it has others.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return False
    if directory.is_dir():
        present = {
            PurePosixPath(each.relative_to(directory).as_posix()) for each in directory.rglob("*") if each.is_file()
        }
        if present == wanted.keys() and all(
            sha256_of(directory / path) == file.sha256 for path, file in wanted.items()
        ):
            return True
    raise TargetExists(f"{directory} holds something else already: remove it, or name another directory.")


def _checked_path(text: str) -> PurePosixPath:
    path = PurePosixPath(text)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\\" in text or ":" in text or "\0" in text:
        raise ResponseInvalid(f"The manifest names the file {text!r}, which would lie outside of the directory.")
    return path


def _offset_of(response: httpx2.Response, position: int) -> int:
    """The position in the file of the first byte of a response."""
    if response.status_code == 200:
        return 0
    start = first_byte(response.headers.get("content-range", ""))
    if response.status_code != 206 or start != position:
        raise ResponseInvalid("The response to a request for a range has another range.")
    return position


def _promised(headers: Mapping[str, str]) -> tuple[int, str]:
    """The size and the digest of a file, as the response to a HEAD names them: its own, or where it leads to."""
    size = headers.get("x-file-size") or headers.get("content-length") or ""
    digest = headers.get("repr-digest", "").partition("sha-256=:")[2].partition(":")[0]
    try:
        return int(size), base64.b64decode(digest, validate=True).hex()
    except (ValueError, binascii.Error):
        raise ResponseInvalid("The service does not say how large the file is, and what its SHA-256 is.") from None
