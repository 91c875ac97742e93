"""The artifact store in a bucket, against a real S3 server: whole or absent, whatever is killed, damaged or away."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from domain.artifact_stores import ArtifactStoreUnusable, check_artifact_store, open_artifact_store
from domain.artifacts import (
    ArtifactCorrupt,
    ArtifactExists,
    ArtifactNotFound,
    ArtifactStoreRefused,
    ArtifactStoreUnavailable,
)
from domain.bucket.faults import explain_refusal
from domain.bucket.location import Bucket
from domain.bucket.store import BucketArtifactStore
from domain.settings import Settings
from pocl.errors import is_disk_full
from pocl.storage.manifest import MANIFEST, ManifestFile, describe, write_manifest
from tests.support.s3_server import BUCKET, READER, SECRET, S3Server, relay_to
from tests.support.waiting import eventually

pytestmark = pytest.mark.system

OpenStore = Callable[..., BucketArtifactStore]
PART = 5 * 2**20
FILES = {
    "model.safetensors": random.Random(0).randbytes(PART + 70_000),
    "config.json": b"{}",
    "empty": b"",
    "training/position.json": b"[3]",
}
KEY = "jobs/job_1/attempt-1/training-00000003"
UPLOADER = """
import sys
from pathlib import Path
from domain.bucket.location import Bucket
from domain.bucket.store import BucketArtifactStore
root, source, address, key = sys.argv[1:]
BucketArtifactStore(Path(root), Bucket.parse(address), part_bytes=5 * 2**20).publish(Path(source), key)
"""


def write_source(directory: Path) -> Path:
    for name, content in FILES.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_manifest(directory / "training")
    write_manifest(directory)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def open_store(bucket_address: str, tmp_path: Path) -> OpenStore:
    """Opens the store as a process of another machine would."""
    machines = iter(range(100))

    def open_one(max_copied_bytes: int = 2**30) -> BucketArtifactStore:
        root = tmp_path / f"machine-{next(machines)}"
        return BucketArtifactStore(
            root, Bucket.parse(bucket_address), max_copied_bytes=max_copied_bytes, part_bytes=PART
        )

    return open_one


def names_in(server: S3Server, address: str) -> list[str]:
    return server.list_names(address.removeprefix(f"s3://{BUCKET}/"))


def test_what_one_machine_stores_another_gets_and_removes(
    open_store: OpenStore,
    s3_server: S3Server,
    bucket_address: str,
    source: Path,
    tmp_path: Path,
) -> None:
    here, there = open_store(), open_store()
    stored = here.publish(source, KEY)
    assert here.publish(source, KEY) == stored == there.manifest(KEY)
    assert there.checkout(KEY, tmp_path / "copy") == stored
    for name, content in FILES.items():
        assert (tmp_path / "copy" / name).read_bytes() == content
    assert b"".join(there.read(KEY, "model.safetensors", 99, PART + 99)) == FILES["model.safetensors"][99 : PART + 99]
    (source / "config.json").write_bytes(b"{ }")
    (source / MANIFEST).unlink()
    write_manifest(source)
    with pytest.raises(ArtifactExists):
        there.publish(source, KEY)
    # A single file, which a later one replaces.
    for content in (b"first", b"second"):
        (tmp_path / "file").write_bytes(content)
        assert here.publish_file(tmp_path / "file", "datasets/ds_1.jsonl") == describe(tmp_path / "file", "ds_1.jsonl")
        there.fetch_file("datasets/ds_1.jsonl", tmp_path / "fetched")
        assert (tmp_path / "fetched").read_bytes() == content
    assert there.locate("datasets/ds_1.jsonl").read_bytes() == b"second"
    assert there.list_keys("jobs/job_1") == ["jobs/job_1/attempt-1"]
    assert there.list_keys("jobs/job_1/attempt-1") == [KEY]
    assert (there.list_keys("datasets"), there.list_keys("datasets", older_than=3600)) == (["datasets/ds_1.jsonl"], [])
    there.remove("jobs/job_1")
    there.remove("jobs/job_1")
    there.remove("datasets/ds_1.jsonl")
    for read in (here.manifest, here.directory):
        with pytest.raises(ArtifactNotFound):
            read(KEY)
    with pytest.raises(ArtifactNotFound):
        here.fetch_file("datasets/ds_1.jsonl", tmp_path / "fetched")
    assert names_in(s3_server, bucket_address) == []


class Killed(BaseException):
    """The end of the process: nothing handles it."""


class DyingStore(BucketArtifactStore):
    """A store whose process is killed before it stores one more object."""

    left = 0

    def _put(self, name: str, content: bytes, attributes: dict[str, str]) -> None:
        self._live()
        super()._put(name, content, attributes)

    def _upload(self, source: Path, name: str, file: ManifestFile) -> None:
        self._live()
        super()._upload(source, name, file)

    def _live(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


def test_a_publisher_killed_between_any_two_objects_leaves_nothing_that_is_served(
    open_store: OpenStore, s3_server: S3Server, bucket_address: str, tmp_path: Path
) -> None:
    source = tmp_path / "small"
    source.mkdir()
    for name in ("a", "b"):
        (source / name).write_bytes(name.encode())
    write_manifest(source)
    reader = open_store()
    deaths = 0
    while True:
        dying = DyingStore(tmp_path / "dying", Bucket.parse(bucket_address))
        dying.left = deaths
        try:
            dying.publish(source, KEY)
            break
        except Killed:
            deaths += 1
        with pytest.raises(ArtifactNotFound):
            reader.manifest(KEY)
        # What is there is found by its key, and goes with it.
        assert reader.list_keys("jobs/job_1/attempt-1") == [KEY] * bool(names_in(s3_server, bucket_address))
        reader.remove(KEY)
        assert names_in(s3_server, bucket_address) == []
    assert deaths == 7
    assert reader.manifest(KEY).size_bytes > 0


@pytest.mark.parametrize("sent_bytes", [PART // 2, PART + 40_000], ids=["first-part", "last-part"])
def test_a_process_killed_while_it_uploads_leaves_what_garbage_collection_finds(
    open_store: OpenStore,
    s3_server: S3Server,
    bucket_address: str,
    source: Path,
    tmp_path: Path,
    sent_bytes: int,
) -> None:
    with relay_to(s3_server.endpoint) as relay:
        relay.stall_after = sent_bytes
        process = subprocess.Popen(
            [sys.executable, "-c", UPLOADER, str(tmp_path / "killed"), str(source), bucket_address, KEY],
            env={**os.environ, **s3_server.environment(endpoint=relay.endpoint)},
        )
        assert relay.stalled.wait(120)
        process.send_signal(signal.SIGKILL)
        process.wait()
    store = open_store()
    for read in (store.manifest, store.directory):
        with pytest.raises(ArtifactNotFound):
            read(KEY)
    name = f"{bucket_address.removeprefix(f's3://{BUCKET}/')}/{KEY}/model.safetensors"
    assert eventually(lambda: name in s3_server.list_uploads())
    assert store.remove_stale(3600) == 0
    assert store.remove_stale(0) == 1
    store.remove(KEY)
    assert name not in s3_server.list_uploads()
    assert names_in(s3_server, bucket_address) == []


def test_damage_is_detected_and_a_damaged_source_is_not_stored(
    open_store: OpenStore,
    s3_server: S3Server,
    bucket_address: str,
    source: Path,
    tmp_path: Path,
) -> None:
    store = open_store()
    prefix = bucket_address.removeprefix(f"s3://{BUCKET}/")
    damaged = bytearray(FILES["model.safetensors"])
    damaged[-1] ^= 1
    (source / "model.safetensors").write_bytes(damaged)
    with pytest.raises(ArtifactCorrupt, match=r"model\.safetensors"):
        store.publish(source, KEY)
    assert not any("safetensors" in name for name in (*names_in(s3_server, bucket_address), *s3_server.list_uploads()))
    (source / "model.safetensors").write_bytes(FILES["model.safetensors"])
    store.publish(source, KEY)
    s3_server.put(f"{prefix}/{KEY}/config.json", b"[]")
    with pytest.raises(ArtifactCorrupt, match=r"config\.json"):
        store.checkout(KEY, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    s3_server.put(f"{prefix}/datasets/ds_1.jsonl", b"not by this service")
    with pytest.raises(ArtifactCorrupt):
        store.fetch_file("datasets/ds_1.jsonl", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_copies_on_a_machine_are_bounded(open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(max_copied_bytes=25)
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(b"0123456789")
        store.publish_file(tmp_path / name, f"datasets/{name}", keep=True)
    root = store.locate("datasets/c").parent
    assert len(list(root.iterdir())) == 2
    os.utime(root / "c", (0, 0))
    store.remove_stale(3600)
    assert (root / "c").exists() is False
    assert store.locate("datasets/a").read_bytes() == b"0123456789"


def test_a_store_that_refuses_or_is_away_says_so_in_one_sentence(
    s3_server: S3Server, bucket_address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(home=tmp_path, artifact_store=bucket_address)
    assert open_artifact_store(settings).find_fault() is None
    missing = Settings(home=tmp_path, artifact_store="s3://no-such-bucket/x")
    assert "does not exist at this endpoint" in str(open_artifact_store(missing).find_fault())
    for name, value in s3_server.environment(READER).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArtifactStoreUnusable, match="refuses the credentials") as forbidden:
        check_artifact_store(settings)
    assert "\n" not in str(forbidden.value)
    assert SECRET not in str(forbidden.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    away = BucketArtifactStore(tmp_path / "copies", Bucket.parse(bucket_address), max_retries=0)
    for attempt in (
        away.find_fault,
        lambda: away.manifest(KEY),
        lambda: away.list_keys("jobs"),
        lambda: away.remove(KEY),
    ):
        with pytest.raises(ArtifactStoreUnavailable, match="does not answer"):
            attempt()
    away.discard(KEY)


@pytest.mark.parametrize(
    ("status", "code", "sentence", "full"),
    [
        (403, "AccessDenied", "refuses the credentials (AccessDenied)", False),
        (403, "QuotaExceeded", "is full (QuotaExceeded)", True),
        (400, "XMinioAdminBucketQuotaExceeded", "is full", True),
        (507, "XMinioStorageFull", "is full", True),
        (404, "NoSuchBucket", "does not exist", False),
        (301, "PermanentRedirect", "refuses the request (PermanentRedirect)", False),
    ],
)
def test_what_no_other_try_would_change_is_told_apart(status: int, code: str, sentence: str, full: bool) -> None:
    refusal = explain_refusal(
        f"Generic S3 error: Server returned non-2xx status code: {status} X: <Error><Code>{code}</Code></Error>"
    )
    assert isinstance(refusal, ArtifactStoreRefused)
    assert sentence in str(refusal)
    assert is_disk_full(refusal) == full


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
def test_what_may_pass_is_no_refusal(status: int) -> None:
    assert explain_refusal(f"Server returned non-2xx status code: {status} X: <Code>SlowDown</Code>") is None


def test_addresses_of_stores_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("POCL_ARTIFACT_ROOT", raising=False)
    for wrong in (
        "s3://",
        "s3://B",
        "s3://bucket?x=1",
        "s3://key:secret@bucket/x",
        "s3://bucket//x",
        "s3://bucket/a b",
    ):
        with pytest.raises(ValueError, match="POCL_ARTIFACT_STORE must be a directory or s3://bucket/prefix"):
            Settings(home=tmp_path, artifact_store=wrong)
    directory = Settings(home=tmp_path, artifact_store=str(tmp_path / "mine"))
    assert (directory.artifact_store, directory.artifact_root) == (None, tmp_path / "mine")
    bucket = Settings(home=tmp_path, artifact_store="s3://bucket/a/b/")
    # Never in the directory of a local store, whose files are no copies.
    assert bucket.artifact_root == tmp_path / "artifact-copies"
    assert (Bucket.parse("s3://bucket/a/b/").name, Bucket.parse("s3://bucket/a/b/").prefix) == ("bucket", "a/b")
    beside = Settings(home=tmp_path, artifact_store="s3://bucket", artifact_root=tmp_path / "root")
    assert beside.artifact_root == tmp_path / "root" / "artifact-copies"
    with pytest.raises(ValueError, match="both name a directory"):
        Settings(home=tmp_path, artifact_store=str(tmp_path / "mine"), artifact_root=tmp_path)
