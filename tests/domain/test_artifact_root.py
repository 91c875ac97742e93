"""The directory of artifacts was called `artefacts`: an upgrade renames it, and its setting's old name is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from domain.schema import upgrade
from domain.settings import Settings

KEY = Path("jobs/job_1/result.json")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def store(home: Path, directory: str, content: str) -> None:
    (home / directory / KEY).parent.mkdir(parents=True)
    (home / directory / KEY).write_text(content)


def test_the_former_directory_is_renamed_with_its_files(home: Path) -> None:
    store(home, "artefacts", "kept")
    settings = Settings(home=home)
    for _ in range(2):
        upgrade(settings)
        assert (settings.artifact_root / KEY).read_text() == "kept"
        assert not (home / "artefacts").exists()


def test_a_directory_of_the_new_name_is_left_alone(home: Path) -> None:
    store(home, "artefacts", "old")
    store(home, "artifacts", "new")
    upgrade(Settings(home=home))
    assert (home / "artifacts" / KEY).read_text() == "new"
    assert (home / "artefacts" / KEY).read_text() == "old"


def test_a_root_that_was_chosen_is_left_alone(home: Path, tmp_path: Path) -> None:
    store(home, "artefacts", "somebody else's")
    upgrade(Settings(home=home, artifact_root=tmp_path / "store"))
    assert (home / "artefacts" / KEY).exists()
    assert not (home / "artifacts").exists()


@pytest.mark.system
def test_processes_that_start_together_rename_the_former_directory_once(home: Path) -> None:
    store(home, "artefacts", "kept")
    program = "from domain.schema import upgrade; from domain.settings import Settings; upgrade(Settings())"
    environment = {**os.environ, "POCL_HOME": str(home)}
    started = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert (home / "artifacts" / KEY).read_text() == "kept"
    assert not (home / "artefacts").exists()


@pytest.mark.parametrize("name", ["POCL_ARTEFACT_ROOT", "pocl_artefact_root"])
def test_the_former_setting_is_refused_with_the_name_of_the_new_one(
    monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(ValidationError, match="POCL_ARTEFACT_ROOT is now called POCL_ARTIFACT_ROOT"):
        Settings()
    # An empty variable counts as not set.
    monkeypatch.setenv(name, "")
    assert Settings().artifact_root.name == "artifacts"
