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
    listed = [
        {"path": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]
    (directory / "manifest.json").write_text(json.dumps({"format": 1, "files": listed}))
    return directory


def checkpoint(directory: Path) -> Path:
    write(directory / "training", {"state.safetensors": b"state", "position.json": b"{}"})
    return write(directory, {"model.safetensors": WEIGHTS, "config.json": b"{}"})


def test_what_is_published_comes_back_with_its_training_state(store: ArtifactStore, tmp_path: Path) -> None:
    listed = store.publish(checkpoint(tmp_path / "made"), KEY)
    assert store.checkout(KEY, tmp_path / "back") == listed == store.manifest(KEY)
    for file in listed.files:
        back = (tmp_path / "back" / file.path).read_bytes()
        assert (len(back), hashlib.sha256(back).hexdigest()) == (file.size, file.sha256)
    assert {"model.safetensors", "training/state.safetensors", "training/manifest.json", "manifest.json"} <= {
        file.path for file in listed.files
    }


def test_the_weights_alone_are_published_whatever_becomes_of_the_training_state(
    store: ArtifactStore, tmp_path: Path
) -> None:
    made = checkpoint(tmp_path / "made")
    (made / "training" / "state.safetensors").unlink()
    listed = store.publish(made, KEY, nested=False)
    assert {file.path for file in listed.files} == {"model.safetensors", "config.json", "manifest.json"}
    assert store.manifest(KEY) == listed


def test_only_what_a_manifest_names_is_stored(store: ArtifactStore, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "made")
    (made / "scratch.tmp").write_bytes(b"not finished")
    store.publish(made, KEY)
    with pytest.raises(ArtifactNotFound):
        store.locate(KEY, "scratch.tmp")


def test_publishing_twice_is_harmless_and_other_content_is_refused(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "made"), KEY)
    store.publish(checkpoint(tmp_path / "again"), KEY)
    with pytest.raises(ArtifactExists):
        store.publish(write(tmp_path / "other", {"model.safetensors": b"other"}), KEY)
    assert store.locate(KEY, "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link", "no manifest", "bad manifest", "bad folder"])
def test_a_damaged_directory_is_not_published_and_leaves_nothing(
    store: ArtifactStore, tmp_path: Path, damage: str
) -> None:
    made = checkpoint(tmp_path / "made")
    inflict(made, damage)
    with pytest.raises(ArtifactCorrupt):
        store.publish(made, KEY)
    with pytest.raises(ArtifactNotFound):
        store.manifest(KEY)
    assert store.remove_stale(older_than=-1) == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link", "no manifest", "bad folder"])
def test_damage_in_the_store_is_noticed_before_a_run_uses_it(store: ArtifactStore, tmp_path: Path, damage: str) -> None:
    store.publish(checkpoint(tmp_path / "made"), KEY)
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
def test_a_path_that_the_manifest_does_not_name_leads_nowhere(store: ArtifactStore, tmp_path: Path, path: str) -> None:
    store.publish(checkpoint(tmp_path / "made"), KEY)
    (tmp_path / "secret").write_text("secret")
    with pytest.raises(ArtifactNotFound):
        store.locate(KEY, path)


def test_a_link_in_the_store_is_not_followed(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "made"), KEY)
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


def test_a_copy_without_links_can_be_changed_without_harm(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "made"), KEY)
    store.checkout(KEY, tmp_path / "own", link=False)
    with (tmp_path / "own" / "model.safetensors").open("r+b") as file:
        file.write(b"changed")
    store.checkout(KEY, tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_destination_that_exists_is_kept(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "made"), KEY)
    with pytest.raises(FileExistsError):
        store.checkout(KEY, tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").read_bytes() == WEIGHTS


def test_removing_is_whole_and_repeatable(store: ArtifactStore, tmp_path: Path) -> None:
    store.publish(checkpoint(tmp_path / "made"), KEY)
    assert store.list_keys("jobs/job_1/checkpoints") == [KEY]
    store.remove(KEY)
    store.remove(KEY)
    assert store.list_keys("jobs/job_1/checkpoints") == []
    with pytest.raises(ArtifactNotFound):
        store.manifest(KEY)


def test_what_a_killed_publisher_left_is_removed_once_it_is_old(store: ArtifactStore, tmp_path: Path) -> None:
    left = tmp_path / "store" / ".staging" / "half"
    left.mkdir()
    assert store.remove_stale(older_than=3600) == 0
    os.utime(left, (0, 0))
    assert store.remove_stale(older_than=3600) == 1
    assert not left.exists()
