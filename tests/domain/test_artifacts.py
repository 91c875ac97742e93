"""The artifact store: whole or absent, verified both ways, and closed to paths that lead out."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.artifacts import ArtifactCorrupt, ArtifactExists, ArtifactNotFound, ArtifactStore
from pocl.storage.manifest import ManifestFile

KEY = "jobs/job_1/checkpoints/step-000001"
WEIGHTS = b"weights" * 1000


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def write(directory: Path, files: dict[str, bytes]) -> Path:
    """A directory with these files and the manifest of them."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    manifest = [
        {"path": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]
    (directory / "manifest.json").write_text(json.dumps({"format": 1, "files": manifest}))
    return directory


def checkpoint(directory: Path) -> Path:
    write(directory / "training", {"state.safetensors": b"state", "position.json": b"{}"})
    return write(directory, {"model.safetensors": WEIGHTS, "config.json": b"{}"})


def test_checkout_returns_published_weights_with_their_training_state(store: ArtifactStore, tmp_path: Path) -> None:
    manifest = store.publish(checkpoint(tmp_path / "source"), KEY)
    assert store.checkout(KEY, tmp_path / "back") == manifest == store.manifest(KEY)
    for file in manifest.files:
        back = (tmp_path / "back" / file.path).read_bytes()
        assert (len(back), hashlib.sha256(back).hexdigest()) == (file.size, file.sha256)
    assert {"model.safetensors", "training/state.safetensors", "training/manifest.json", "manifest.json"} <= {
        file.path for file in manifest.files
    }


def test_weights_are_published_without_their_training_state(store: ArtifactStore, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    (source / "training" / "state.safetensors").unlink()
    manifest = store.publish(source, KEY, nested=False)
    assert {file.path for file in manifest.files} == {"model.safetensors", "config.json", "manifest.json"}
    assert store.manifest(KEY) == manifest


def test_only_files_of_the_manifest_are_stored(store: ArtifactStore, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    (source / "scratch.tmp").write_bytes(b"not finished")
    store.publish(source, KEY)
    with pytest.raises(ArtifactNotFound):
        store.locate(KEY, "scratch.tmp")


def test_publishing_twice_is_harmless_and_other_content_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "source"), KEY)
    store.publish(checkpoint(tmp_path / "again"), KEY)
    with pytest.raises(ArtifactExists):
        store.publish(write(tmp_path / "other", {"model.safetensors": b"other"}), KEY)
    assert store.locate(KEY, "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link", "no manifest", "bad manifest", "bad folder"])
def test_a_damaged_directory_is_not_published_and_leaves_nothing(
    store: ArtifactStore, tmp_path: Path, damage: str
) -> None:
    source = checkpoint(tmp_path / "source")
    inflict(source, damage)
    with pytest.raises(ArtifactCorrupt):
        store.publish(source, KEY)
    with pytest.raises(ArtifactNotFound):
        store.manifest(KEY)
    assert store.remove_stale(older_than=-1) == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link", "no manifest", "bad folder"])
def test_checkout_detects_damage_in_the_store(store: ArtifactStore, tmp_path: Path, damage: str) -> None:
    store.publish(checkpoint(tmp_path / "source"), KEY)
    inflict(tmp_path / "store" / KEY, damage)
    with pytest.raises(ArtifactCorrupt):
        store.checkout(KEY, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def inflict(directory: Path, damage: str) -> None:
    weights = directory / "model.safetensors"
    match damage:
        case "flip":
            weights.write_bytes(b"W" + WEIGHTS[1:])
        case "truncate":
            weights.write_bytes(WEIGHTS[:-1])
        case "remove":
            weights.unlink()
        case "link":
            weights.rename(directory / "elsewhere")
            weights.symlink_to(directory / "elsewhere")
        case "no manifest":
            (directory / "manifest.json").unlink()
        case "bad manifest":
            (directory / "manifest.json").write_text('{"format": 1, "files": [{"path": "../../etc/passwd"}]}')
        case "bad folder":
            (directory / "training" / "state.safetensors").write_bytes(b"other")


@pytest.mark.parametrize("path", ["../../../secret", "/etc/passwd", "training/../model.safetensors", ".", "", "a\0b"])
def test_a_path_that_the_manifest_does_not_list_is_not_found(store: ArtifactStore, tmp_path: Path, path: str) -> None:
    store.publish(checkpoint(tmp_path / "source"), KEY)
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ArtifactNotFound):
        store.locate(KEY, path)


def test_a_link_in_the_store_is_not_followed(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "source"), KEY)
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "store" / KEY / "config.json").unlink()
    (tmp_path / "store" / KEY / "config.json").symlink_to(tmp_path / "secret")
    (tmp_path / "store" / "link").symlink_to(tmp_path)
    with pytest.raises(ArtifactNotFound):
        store.locate(KEY, "config.json")
    with pytest.raises(ArtifactNotFound):
        store.locate("link/secret")


@given(st.text(max_size=40))
def test_a_key_never_leads_out_of_the_store(tmp_path_factory: pytest.TempPathFactory, key: str) -> None:
    root = tmp_path_factory.getbasetemp() / "one-store"
    store = ArtifactStore(root)
    try:
        stored = store.publish_file(Path(__file__), key)
    except (ArtifactNotFound, IsADirectoryError, FileExistsError, NotADirectoryError):
        return
    assert store.locate(key).is_relative_to(root.resolve())
    assert stored.size == Path(__file__).stat().st_size


def test_a_file_is_stored_with_its_digest_and_replaced_whole(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "result.json"
    for content in (b"first", b"second"):
        source.write_bytes(content)
        expected = ManifestFile(path="result.json", size=len(content), sha256=hashlib.sha256(content).hexdigest())
        assert store.publish_file(source, "jobs/job_1/result.json") == expected
    source.write_bytes(b"third")
    assert store.locate("jobs/job_1/result.json").read_bytes() == b"second"


def test_a_copy_without_links_can_be_changed(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "source"), KEY)
    store.checkout(KEY, tmp_path / "own", link=False)
    with (tmp_path / "own" / "model.safetensors").open("r+b") as file:
        file.write(b"changed")
    store.checkout(KEY, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == WEIGHTS


def test_checkout_into_an_existing_directory_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "source"), KEY)
    with pytest.raises(FileExistsError):
        store.checkout(KEY, tmp_path / "source")
    assert (tmp_path / "source" / "model.safetensors").read_bytes() == WEIGHTS


def test_removal_is_atomic_and_idempotent(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "source"), KEY)
    assert store.list_keys("jobs/job_1/checkpoints") == [KEY]
    store.remove(KEY)
    store.remove(KEY)
    assert store.list_keys("jobs/job_1/checkpoints") == []
    with pytest.raises(ArtifactNotFound):
        store.manifest(KEY)


def test_stale_staging_directories_are_removed(store: ArtifactStore, tmp_path: Path) -> None:
    staged = tmp_path / "store" / ".staging" / "half"
    staged.mkdir()
    assert store.remove_stale(older_than=3600) == 0
    os.utime(staged, (0, 0))
    assert store.remove_stale(older_than=3600) == 1
    assert not staged.exists()
