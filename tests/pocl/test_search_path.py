"""No file of the working directory runs in the place of one of our modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocl.search_path import without_working_directory

ROOT = Path(__file__).parents[2]


def test_working_directory_is_taken_off_the_path_unless_our_packages_lie_in_it() -> None:
    assert without_working_directory(["/work", "/site"], "/work", Path("/site")) == ["/site"]
    assert without_working_directory(["", "/site"], "/work", Path("/site")) == ["/site"]
    assert without_working_directory(["/bin", "/site"], "/work", Path("/site")) == ["/bin", "/site"]
    assert without_working_directory([str(ROOT), "/site"], str(ROOT), ROOT) == [str(ROOT), "/site"]


@pytest.mark.system
@pytest.mark.parametrize("module", ["pocl", "api", "worker"])
def test_foreign_modules_of_the_working_directory_do_not_run(tmp_path: Path, module: str) -> None:
    for name in ("yaml.py", "pydantic.py", "structlog.py", "domain.py", "migrations.py"):
        (tmp_path / name).write_text("open('ran', 'w').close()\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, "--help"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert not (tmp_path / "ran").exists()
