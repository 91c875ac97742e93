"""The key of the first start, in a directory of one user alone."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from domain.environment import SettingsInvalid
from domain.local_key import FILE_NAME, make_local_key, read_local_key, replace_local_key, secure_home


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_processes_that_start_together_make_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(make_local_key, [tmp_path] * 32))
    assert keys == {read_local_key(tmp_path)}
    assert mode(tmp_path / FILE_NAME) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_replaced_key_is_another_with_the_same_mode(tmp_path: Path) -> None:
    first = make_local_key(tmp_path)
    second = replace_local_key(tmp_path)
    assert second != first
    assert make_local_key(tmp_path) == second
    assert mode(tmp_path / FILE_NAME) == 0o600


@pytest.mark.parametrize("fault", ["readable", "writable", "symbolic link", "directory", "no key"])
def test_a_key_that_others_could_read_or_plant_is_refused(tmp_path: Path, fault: str) -> None:
    home, file = tmp_path / "home", tmp_path / "home" / FILE_NAME
    secure_home(home)
    key = make_local_key(home)
    match fault:
        case "readable":
            file.chmod(0o640)
        case "writable":
            file.chmod(0o602)
        case "symbolic link":
            file.rename(tmp_path / "elsewhere")
            file.symlink_to(tmp_path / "elsewhere")
        case "directory":
            file.unlink()
            file.mkdir()
        case "no key":
            file.write_text("")
    with pytest.raises(SettingsInvalid, match="POCL_HOME") as raised:
        make_local_key(home)
    assert key not in str(raised.value)


def test_an_existing_home_is_closed_to_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    secure_home(tmp_path)
    assert mode(tmp_path) == 0o700


def test_a_home_of_somebody_else_that_others_may_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o770)

    def refuse(_path: Path, _mode: int) -> None:
        raise PermissionError

    # Only its owner and root may change a mode, and the tests may run as either.
    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(SettingsInvalid, match="others may write"):
        secure_home(tmp_path)


def test_a_home_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsInvalid, match="POCL_HOME"):
        secure_home(tmp_path / "file" / "home")
