"""A database file on a network file system is refused before anything is written."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from domain import settings as settings_module
from domain.mounts import network_file_system
from domain.settings import Settings

MOUNTS = r"""22 1 259:2 / / rw,relatime - ext4 /dev/nvme0n1p2 rw
41 22 0:36 / /srv rw,relatime shared:20 - nfs4 10.0.0.1:/srv rw,vers=4.2
42 41 8:1 / /srv/local rw - xfs /dev/sda1 rw
43 22 0:37 / /mnt/with\040space rw - cifs //nas/share rw
44 22 0:38 / /covered rw - nfs nas:/x rw
45 22 8:2 / /covered rw - ext4 /dev/sdb rw
a line of tomorrow
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    return tmp_path / "mountinfo"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/pocl.sqlite3", None),
        ("/srv/pocl/pocl.sqlite3", "nfs4"),
        ("/srv/local/pocl.sqlite3", None),
        ("/srvx/pocl.sqlite3", None),
        ("/mnt/with space/pocl.sqlite3", "cifs"),
        ("/covered/pocl.sqlite3", None),
    ],
)
def test_file_system_is_that_of_the_innermost_mount(mounts: Path, path: str, kind: str | None) -> None:
    assert network_file_system(Path(path), mounts=mounts) == kind


class Automounted(type(Path())):  # type: ignore[misc] # Path() is of the class of this system's paths.
    """A path that an automounter mounts once something looks into it."""

    table: Path

    def resolve(self, strict: bool = False) -> Path:  # noqa: ARG002 - as pathlib has it
        self.table.write_text("41 22 0:36 / /net/home rw - nfs4 10.0.0.1:/home rw\n")
        return Path(self)


def test_what_an_automounter_mounts_is_seen(mounts: Path) -> None:
    path = Automounted("/net/home/pocl.sqlite3")
    path.table = mounts
    assert network_file_system(path, mounts=mounts) == "nfs4"


def test_without_a_table_of_mounts_nothing_is_known(tmp_path: Path) -> None:
    assert network_file_system(tmp_path, mounts=tmp_path / "none") is None


def test_sqlite_on_a_network_file_system_is_refused_by_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(settings_module, "network_file_system", lambda _path: "nfs4")
    with pytest.raises(ValidationError, match=r"network file system \(nfs4\).*use PostgreSQL"):
        Settings(home=tmp_path)
    assert Settings(home=tmp_path, database_url="postgresql://host/pocl").home == tmp_path
