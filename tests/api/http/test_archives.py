"""A checkpoint as one tar stream: whole, in ranges, and without holding it in memory."""

import hashlib
import io
import tarfile
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from api.archives import TarArchive
from domain.artifacts import ArtifactStore
from domain.checkpoints.models import Checkpoint
from domain.db import Database
from domain.jobs.event_recorder import add_checkpoint
from domain.settings import Settings
from pocl.storage.manifest import MANIFEST, Manifest, ManifestFile, read_manifest, sha256_of, write_manifest
from tests.support.requests import expect_problem, submit
from tests.support.worker_actions import claim_queued_job

FILES = {
    "model.safetensors": bytes(range(256)) * 700,
    "config.json": b"{}",
    "empty": b"",
    "block": b"x" * 512,
    "folder/käse-1.txt": b"cheese",
    "folder/" + "long-" * 40 + "name": b"pax",
}
TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def write_files(directory: Path) -> None:
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_manifest(directory)


@pytest.fixture
def stored(app: FastAPI, client: TestClient, database: Database, dataset: str, tmp_path: Path) -> Checkpoint:
    submit(client, dataset)
    claim = claim_queued_job(database)
    write_files(tmp_path / "checkpoint")
    key = f"jobs/{claim.job_id}/checkpoints/final"
    size = app.state.store.publish(tmp_path / "checkpoint", key).size_bytes
    with database.transaction(write=True) as session:
        return add_checkpoint(
            session, claim, kind="final", step=9, stage=1, store_key=key, size_bytes=size,
            manifest_sha256=sha256_of(tmp_path / "checkpoint" / MANIFEST),
        )  # fmt: skip


def test_an_archive_unpacks_to_the_files_of_the_checkpoint(
    client: TestClient, stored: Checkpoint, tmp_path: Path
) -> None:
    response = client.get(f"/v1/checkpoints/{stored.id}/archive")
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-tar")
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["content-disposition"] == f'attachment; filename="{stored.id}.tar"'
    with tarfile.open(fileobj=io.BytesIO(response.content), mode="r:") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
        assert {member.uname for member in archive.getmembers()} == {""}
    unpacked = tmp_path / "unpacked" / stored.id
    found = {str(path.relative_to(unpacked)): path.read_bytes() for path in unpacked.rglob("*") if path.is_file()}
    assert {name: content for name, content in found.items() if name != MANIFEST} == FILES
    for file in read_manifest(unpacked).files:
        assert hashlib.sha256(found[file.path]).hexdigest() == file.sha256


def test_head_of_an_archive_has_its_length_and_reads_no_file(client: TestClient, stored: Checkpoint) -> None:
    address = f"/v1/checkpoints/{stored.id}/archive"
    got, headed = client.get(address), client.head(address)
    assert headed.content == b""
    for name in ("etag", "content-length", "content-type", "accept-ranges", "content-disposition"):
        assert headed.headers[name] == got.headers[name]
    assert client.get(address, headers={"if-none-match": got.headers["etag"]}).status_code == 304


@pytest.mark.parametrize("resource", ["archive", "files/model.safetensors"])
def test_eight_ranges_at_once_make_up_the_whole(client: TestClient, stored: Checkpoint, resource: str) -> None:
    address = f"/v1/checkpoints/{stored.id}/{resource}"
    head = client.head(address).headers
    size = int(head["content-length"])
    edges = [size * part // 8 for part in range(9)]

    def fetch(part: int) -> bytes:
        wanted = {"range": f"bytes={edges[part]}-{edges[part + 1] - 1}", "if-range": head["etag"]}
        response = client.get(address, headers=wanted)
        assert response.status_code == 206
        assert response.headers["content-range"] == f"bytes {edges[part]}-{edges[part + 1] - 1}/{size}"
        return bytes(response.content)

    with ThreadPoolExecutor(8) as threads:
        together = b"".join(threads.map(fetch, range(8)))
    assert hashlib.sha256(together).digest() == hashlib.sha256(client.get(address).content).digest()
    expect_problem(client.get(address, headers={"range": f"bytes={size}-"}), 416, "range_not_satisfiable")


def test_an_archive_of_a_damaged_checkpoint_is_refused(
    client: TestClient, settings: Settings, stored: Checkpoint
) -> None:
    (settings.artifact_root / stored.store_key / "config.json").write_bytes(b"{} ")
    expect_problem(client.get(f"/v1/checkpoints/{stored.id}/archive"), 500, "artifact_damaged")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> tuple[ArtifactStore, TarArchive, bytes]:
    directory = tmp_path_factory.mktemp("archive")
    write_files(directory / "source")
    store = ArtifactStore(directory / "store")
    layout = TarArchive.create(store.publish(directory / "source", "model"), folder="ckpt_1", modified_at=TIME)
    return store, layout, b"".join(layout.read(store, "model", 0, layout.size_bytes))


@given(first=st.integers(0, 200_000), length=st.integers(0, 200_000))
def test_any_range_of_an_archive_is_that_part_of_it(
    archive: tuple[ArtifactStore, TarArchive, bytes], first: int, length: int
) -> None:
    store, layout, whole = archive
    assert len(whole) == layout.size_bytes
    stop = min(first + length, layout.size_bytes)
    assert b"".join(layout.read(store, "model", first, stop)) == whole[first:stop]


def test_an_archive_is_read_in_constant_memory(tmp_path: Path) -> None:
    size = 192 * 2**20
    directory = tmp_path / "store" / "model"
    store = ArtifactStore(tmp_path / "store")
    directory.mkdir()
    with (directory / "model.safetensors").open("wb") as sparse:
        sparse.truncate(size)
    manifest = Manifest(files=(ManifestFile(path="model.safetensors", size=size, sha256="0" * 64),))
    (directory / MANIFEST).write_text(manifest.model_dump_json())
    layout = TarArchive.create(manifest, folder="ckpt_1", modified_at=TIME)
    tracemalloc.start()
    try:
        total = sum(len(piece) for piece in layout.read(store, "model", 0, layout.size_bytes))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert total == layout.size_bytes > size
