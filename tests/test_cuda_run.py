"""A run of the tests marked `cuda` needs the engine's packages and a few of pytest, and nothing of the service."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRESENT = {
    "httpcore2",
    "httpx2",
    "huggingface-hub",
    "jinja2",
    "hypothesis",
    "idna",
    "orjson",
    "pydantic",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "pyyaml",
    "structlog",
    "tokenizers",
}
"""Of what the service and the developers need, what a machine with a GPU has too."""
MODULES = {"psycopg": "psycopg", "python-multipart": "multipart", "celery": "celery", "import-linter": "importlinter"}
"""Where a package has another name than its module and is imported by this project."""
WITHOUT = """
import sys
from importlib.machinery import PathFinder

ABSENT = frozenset(sys.argv.pop(1).split(","))


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.system
def test_the_tests_marked_cuda_are_collected_without_the_packages_of_the_service() -> None:
    absent = absent_modules()
    assert {"fastapi", "sqlalchemy", "celery", "redis", "rouge_score", "schemathesis"} <= absent
    command = [sys.executable, "-c", WITHOUT, ",".join(sorted(absent))]
    ran = subprocess.run(
        [*command, "-q", "-m", "cuda", "--collect-only", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"test_\S+\[.*cuda", ran.stdout)
    assert "error" not in ran.stdout


def absent_modules() -> set[str]:
    """The modules of the packages that the service, its clients and the developers need beyond `PRESENT`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    client = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *client["dependencies"], *client["optional-dependencies"]["cli"]]
    wanted += [*extras["embedded"], *extras["dev"]]
    names = {re.match(r"[\w.-]+", requirement).group().lower() for requirement in wanted}  # type: ignore[union-attr]
    return {MODULES.get(name, name.replace("-", "_")) for name in names - PRESENT}
