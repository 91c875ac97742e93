"""A directory is whole or absent, and a manifest knows every byte of it."""

from pathlib import Path

import pytest

from pocl.errors import CheckpointCorrupt, DiskFull
from pocl.storage import manifest


def make_directory(target: Path) -> Path:
    with manifest.new_directory(target) as scratch:
        (scratch / "weights.bin").write_bytes(b"\x00\x01" * 500)
        (scratch / "deep").mkdir()
        (scratch / "deep" / "note.txt").write_text("hello")
    return target


def test_new_directory_verifies(tmp_path: Path) -> None:
    files = manifest.verify(make_directory(tmp_path / "one")).files
    assert [(file.path, file.size) for file in files] == [("deep/note.txt", 5), ("weights.bin", 1000)]


def test_error_leaves_neither_target_nor_scratch(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), manifest.new_directory(tmp_path / "one") as scratch:
        _ = 1 / (scratch / "half").write_text("")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_raises_disk_full_and_keeps_the_old_directory(tmp_path: Path) -> None:
    target = make_directory(tmp_path / "one")
    with pytest.raises(DiskFull), manifest.new_directory(target):
        raise OSError(28, "No space left on device")
    manifest.verify(target)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link"])
def test_damage_is_detected(tmp_path: Path, damage: str) -> None:
    target = make_directory(tmp_path / "one")
    file = target / "weights.bin"
    content = file.read_bytes()
    match damage:
        case "flip":
            file.write_bytes(content[:-1] + b"\xff")
        case "truncate":
            file.write_bytes(content[:-1])
        case "remove":
            file.unlink()
        case "link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointCorrupt, match=r"weights\.bin"):
        manifest.verify(target)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "a\\b", ""])
def test_manifest_cannot_point_outside(tmp_path: Path, path: str) -> None:
    entry = manifest.ManifestFile.model_construct(path=path, size=1, sha256="0" * 64)
    listing = manifest.Manifest.model_construct(format=1, files=(entry,))
    (tmp_path / "manifest.json").write_text(listing.model_dump_json())
    with pytest.raises(CheckpointCorrupt):
        manifest.verify(tmp_path)


def test_nested_manifest_owns_its_directory(tmp_path: Path) -> None:
    with manifest.new_directory(tmp_path / "outer") as scratch:
        (scratch / "mine").write_text("a")
        (scratch / "inner").mkdir()
        (scratch / "inner" / "its").write_text("b")
        manifest.write_manifest(scratch / "inner")
    manifest.discard(tmp_path / "outer" / "inner")
    assert [file.path for file in manifest.verify(tmp_path / "outer").files] == ["mine"]


def test_copied_manifest_is_kept(tmp_path: Path) -> None:
    source = make_directory(tmp_path / "one")
    with manifest.new_directory(tmp_path / "two") as scratch:
        for file in (*manifest.read_manifest(source).files, None):
            path = manifest.MANIFEST if file is None else file.path
            (scratch / path).parent.mkdir(exist_ok=True)
            (scratch / path).hardlink_to(source / path)
    assert manifest.verify(tmp_path / "two") == manifest.verify(source)


def test_replacing_a_file_leaves_no_scratch(tmp_path: Path) -> None:
    manifest.replace_file(tmp_path / "a.json", "1")
    manifest.replace_file(tmp_path / "a.json", "2")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "2")]


def test_directory_that_was_about_to_be_replaced_is_taken_back(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "one"
    make_directory(target)
    # As a process leaves it that is killed between the two renames.
    target.rename(target.with_name(".tmp-replaced-one-77"))
    make_directory(tmp_path / "two")
    (tmp_path / "two").rename(tmp_path / ".tmp-replaced-two-77")
    make_directory(tmp_path / "two")
    manifest.sweep(tmp_path)
    assert len(manifest.verify(target).files) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "two"]


def test_sweep_removes_what_killed_processes_left(tmp_path: Path) -> None:
    target = make_directory(tmp_path / "one")
    make_directory(tmp_path / ".tmp-two-123")
    manifest.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [target]
