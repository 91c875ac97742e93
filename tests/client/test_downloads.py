"""Downloads against a service that breaks off, lies about ranges and sends damaged bytes."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl_client import (
    AsyncClient,
    DownloadDamaged,
    NotFound,
    ResponseInvalid,
    ServiceUnreachable,
    TargetExists,
    byte_ranges,
)
from pocl_client.byte_ranges import ByteRange, first_byte, split_ranges
from pocl_client.partial_file import PartialFile
from tests.client.fakes import KEY, URL, FakeService, connect, file_response, problem

FILES = {"config.json": b"{}", "model.safetensors": os.urandom(100_000), "empty": b"", "deep/er/file": b"x" * 70_000}
PART = 16_384


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartialFile.__init__, "__kwdefaults__", {"part_bytes": PART})


def manifest(files: dict[str, bytes]) -> dict[str, Any]:
    listed = [
        {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in files.items()
    ]
    return {"format": 1, "files": listed}


Fault = Callable[[httpx2.Request, bytes], httpx2.Response | Exception | None]


def store(files: dict[str, bytes], fault: Fault = lambda *_: None) -> FakeService:
    """A service with one checkpoint; `fault` may answer in its place."""

    def answer(request: httpx2.Request) -> httpx2.Response | Exception:
        path = request.url.path
        if path.endswith("/manifest"):
            return httpx2.Response(200, json=manifest(files))
        content = files[path.partition("/files/")[2]]
        return fault(request, content) or file_response(request, content)

    return FakeService(answer)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(each.relative_to(directory)): each.read_bytes() for each in directory.rglob("*") if each.is_file()}


def once(fault: Fault) -> Fault:
    """The fault for the first request for each range alone."""
    seen: set[tuple[str, str | None]] = set()

    def answer(request: httpx2.Request, content: bytes) -> httpx2.Response | Exception | None:
        key = (str(request.url), request.headers.get("range"))
        if key in seen:
            return None
        seen.add(key)
        return fault(request, content)

    return answer


FAULTS: dict[str, Fault] = {
    "none": lambda *_: None,
    "connection refused": once(lambda *_: httpx2.ConnectError("refused")),
    "breaks off in the middle": once(lambda request, content: file_response(request, content, break_after=5000)),
    "service restarts": once(lambda *_: problem(503, "unavailable")),
    "proxy without ranges": lambda request, content: (
        httpx2.Response(200, content=content) if request.method == "GET" else None
    ),
    "damaged bytes once": once(
        lambda request, content: file_response(request, bytes(len(content))) if len(content) == 100_000 else None
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("connections", [1, 4])
def test_a_checkpoint_arrives_whole(tmp_path: Path, fault: str, connections: int) -> None:
    progress: list[tuple[int, int]] = []
    target = tmp_path / "models" / "student"
    connect(store(FILES, FAULTS[fault])).checkpoints.download(
        "ckpt_1", target, connections=connections, on_progress=lambda *figures: progress.append(figures)
    )
    assert tree(target) == FILES
    assert list(target.parent.iterdir()) == [target]
    total = sum(map(len, FILES.values()))
    assert progress[-1] == (total, total)
    assert all(0 <= done <= total for done, _ in progress)


@pytest.mark.parametrize("fault", ["none", "damaged bytes once"])
def test_the_same_with_await(tmp_path: Path, fault: str) -> None:
    service = store(FILES, FAULTS[fault])

    async def download() -> None:
        async with AsyncClient(URL, KEY, transport=httpx2.MockTransport(service)) as client:
            await client.checkpoints.download("ckpt_1", tmp_path / "student")

    anyio.run(download)
    assert tree(tmp_path / "student") == FILES


def test_damaged_files_never_get_their_names(tmp_path: Path) -> None:
    def damaged(request: httpx2.Request, content: bytes) -> httpx2.Response:
        return file_response(request, bytes(len(content)))

    with pytest.raises(DownloadDamaged, match=r"model\.safetensors"):
        connect(store(FILES, damaged)).checkpoints.download("ckpt_1", tmp_path / "student")
    assert not (tmp_path / "student").exists()
    assert not list(tmp_path.rglob("model.safetensors"))


class Killed(BaseException):
    """Ends a download as a signal would."""


def test_a_killed_download_goes_on_where_it_was(tmp_path: Path) -> None:
    def kill(done: int, total: int) -> None:
        if done > total / 2:
            raise Killed

    target = tmp_path / "student"
    service = store(FILES)
    with pytest.raises(Killed):
        connect(service).checkpoints.download("ckpt_1", target, connections=1, on_progress=kill)
    assert not target.exists()
    before = len(service.requests)
    connect(service).checkpoints.download("ckpt_1", target)
    assert tree(target) == FILES
    again = sum(size_asked_for(request) for request in service.requests[before:])
    # What had arrived in whole parts is not asked for again.
    assert again <= sum(map(len, FILES.values())) / 2 + PART


def size_asked_for(request: httpx2.Request) -> int:
    if "range" not in request.headers:
        return 0
    first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
    return last - first + 1


def test_an_unreachable_service_leaves_what_has_arrived(tmp_path: Path) -> None:
    def fault(request: httpx2.Request, _: bytes) -> Exception | None:
        is_lost = request.headers.get("range", "").startswith("bytes=81920")
        return httpx2.ConnectError("refused") if is_lost else None

    target = tmp_path / "student"
    with pytest.raises(ServiceUnreachable):
        connect(store(FILES, fault)).checkpoints.download("ckpt_1", target)
    assert not target.exists()
    service = store(FILES)
    connect(service).checkpoints.download("ckpt_1", target)
    assert tree(target) == FILES
    assert sum(size_asked_for(request) for request in service.requests) < sum(map(len, FILES.values()))


def test_what_is_there_already_is_not_downloaded(tmp_path: Path) -> None:
    target = tmp_path / "student"
    connect(store(FILES)).checkpoints.download("ckpt_1", target)
    service = store(FILES)
    connect(service).checkpoints.download("ckpt_1", target)
    assert [request.url.path for request in service.requests] == ["/v1/checkpoints/ckpt_1/manifest"]


@pytest.mark.parametrize("change", ["another file", "one more file", "a file in its place"])
def test_nothing_is_overwritten(tmp_path: Path, change: str) -> None:
    target = tmp_path / "student"
    connect(store(FILES)).checkpoints.download("ckpt_1", target)
    if change == "a file in its place":
        shutil.rmtree(target)
        target.write_bytes(b"mine")
    else:
        (target / ("config.json" if change == "another file" else "notes")).write_bytes(b"mine")
    with pytest.raises(TargetExists, match="something else"):
        connect(store(FILES)).checkpoints.download("ckpt_1", target)
    assert b"mine" in (tree(target).values() if target.is_dir() else [target.read_bytes()])


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    connect(store(FILES)).checkpoints.download("ckpt_1", tmp_path / "student")
    assert tree(tmp_path / "student") == FILES


@pytest.mark.parametrize("path", ["../evil", "/evil", "a/../../evil", "C:\\evil", "a\\b", "", "nul\0"])
def test_a_manifest_never_leads_out_of_the_directory(tmp_path: Path, path: str) -> None:
    with pytest.raises(ResponseInvalid):
        connect(store({path: b"evil"})).checkpoints.download("ckpt_1", tmp_path / "in" / "student")
    assert not [each for each in tmp_path.rglob("*") if each.is_file()]


def test_another_range_than_asked_for_is_refused(tmp_path: Path) -> None:
    def wrong(request: httpx2.Request, content: bytes) -> httpx2.Response | None:
        headers = {"content-range": "bytes 7-16/100"}
        return httpx2.Response(206, content=content[:10], headers=headers) if request.method == "GET" else None

    with pytest.raises(ResponseInvalid, match="range"):
        connect(store(FILES, wrong)).checkpoints.download("ckpt_1", tmp_path / "student")


def test_the_first_failure_ends_the_others(tmp_path: Path) -> None:
    def gone(request: httpx2.Request, _: bytes) -> httpx2.Response | None:
        return problem(404, "file_not_found") if "model" in request.url.path else None

    with pytest.raises(NotFound):
        connect(store(FILES, gone)).checkpoints.download("ckpt_1", tmp_path / "student")


def test_one_file_replaces_what_has_its_name(tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    content = b"<html>" + os.urandom(50_000)
    service = FakeService(lambda request: file_response(request, content))
    connect(service).jobs.download("job_1", "report", target)
    assert target.read_bytes() == content
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_a_bucket_is_verified_by_what_the_service_says(tmp_path: Path) -> None:
    content = os.urandom(50_000)

    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "bucket.test":
            return file_response(request, content)
        promised = file_response(httpx2.Request("HEAD", URL), content).headers
        headers = {"location": "https://bucket.test/object?signature=1", "repr-digest": promised["repr-digest"]}
        return httpx2.Response(307, headers={**headers, "x-file-size": str(len(content)), "content-length": "0"})

    service = FakeService(answer)
    connect(service).jobs.download("job_1", "ranking", tmp_path / "ranking.jsonl")
    assert (tmp_path / "ranking.jsonl").read_bytes() == content
    sent = {request.url.host: request.headers.get("authorization") for request in service.requests}
    assert sent == {"service.test": f"Bearer {KEY}", "bucket.test": None}


# --- Parts -----------------------------------------------------------------------------------------------


@given(st.integers(0, 500), st.integers(1, 200))
def test_parts_are_the_whole_file_without_gaps(size: int, part_bytes: int) -> None:
    parts = list(split_ranges(size, part_bytes))
    assert [number for part in parts for number in range(part.start, part.stop)] == list(range(size))
    assert all(0 < part.size <= part_bytes for part in parts)


@pytest.mark.parametrize(
    ("text", "first"),
    [("bytes 16-31/64", 16), ("bytes 0-0/1", 0), ("bytes */64", None), ("lines 1-2/3", None), ("", None), ("16", None)],
)
def test_content_range_is_read(text: str, first: int | None) -> None:
    assert first_byte(text) == first


@settings(max_examples=40)
@given(st.binary(max_size=200), st.lists(st.integers(0, 12), max_size=8), st.integers(0, 120))
def test_a_journal_cut_anywhere_never_names_a_part_that_has_not_arrived(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, order: list[int], cut: int
) -> None:
    directory = tmp_path_factory.mktemp("partial")
    digest = hashlib.sha256(content).hexdigest()
    first = PartialFile(directory / "file", len(content), digest, part_bytes=16)
    first.open()
    parts = list(split_ranges(len(content), 16))
    arrived = [parts[index] for index in dict.fromkeys(order) if index < len(parts)]
    for part in arrived:
        first.write(part.start, content[part.start : part.stop])
        first.finish_part(part)
    journal = next(directory.glob("*.journal"))
    os.truncate(journal, min(cut, journal.stat().st_size))

    second = PartialFile(directory / "file", len(content), digest, part_bytes=16)
    second.open()
    assert set(parts) - set(second.missing()) <= set(arrived)
    for part in second.missing():
        second.write(part.start, content[part.start : part.stop])
        second.finish_part(part)
    third = PartialFile(directory / "file", len(content), digest, part_bytes=16)
    third.open()
    assert third.missing() == []
    third.publish()
    assert (directory / "file").read_bytes() == content
    assert list(directory.iterdir()) == [directory / "file"]


def test_a_part_is_small_beside_memory() -> None:
    assert byte_ranges.PART_BYTES <= 64 * 2**20
    assert ByteRange(3, 7).size == 4
