"""Which models of the Hub count as being on this machine."""

import json
from pathlib import Path

import pytest

from pocl.inspect import cached_snapshot
from pocl.spec import HubModel

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


def snapshot(cache: Path, revision: str = COMMIT) -> Path:
    directory = cache / "models--owner--name" / "snapshots" / revision
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def find(cache: Path, revision: str = COMMIT) -> Path | None:
    return cached_snapshot(HubModel(repo="owner/name", revision=revision), cache)


def test_model_counts_once_all_of_its_weights_are_there(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    directory = snapshot(tmp_path)
    assert find(tmp_path) is None
    (directory / "model.safetensors.index.json").write_text(json.dumps(WEIGHTS))
    for name in WEIGHTS["weight_map"].values():
        assert find(tmp_path) is None
        (directory / name).write_bytes(b"weights")
    assert find(tmp_path) == directory
    # A file of the cache is a link to where its content is.
    (directory / name).unlink()
    (directory / name).symlink_to(tmp_path / "evicted")
    assert find(tmp_path) is None
    (directory / "model.safetensors").write_bytes(b"weights")
    assert find(tmp_path) == directory


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12], COMMIT[:-1] + "g"])
def test_branch_may_have_moved_and_is_not_looked_for(tmp_path: Path, revision: str) -> None:
    (snapshot(tmp_path, revision) / "model.safetensors").write_bytes(b"weights")
    assert find(tmp_path, revision) is None
