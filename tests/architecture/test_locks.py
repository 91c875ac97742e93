"""What the images install: every package of one version, with hashes, and nothing that the locks leave out."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.compose_file import DOCKERFILE, ROOT
from tools.locks import read_constraints, read_lock

LOCKS = ("build", "api", "torch", "worker")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_of_a_lock_is_a_version_with_hashes(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8").splitlines()[1:]
    packages = [line for line in lines if not line.startswith(" ")]
    assert len(packages) == len(read_lock(name)) > 0
    assert [line for line in lines if not re.fullmatch(r"\S+==\S+ \\|    --hash=sha256:[0-9a-f]{64}( \\)?", line)] == []


@pytest.mark.parametrize("name", LOCKS)
def test_versions_are_those_of_the_constraints(name: str) -> None:
    constraints = read_constraints()
    differing = {
        package: version
        for package, version in read_lock(name).items()
        # What makes the wheel, and the CUDA libraries, which no test environment has, are pinned by their lock alone.
        if constraints.get(package, version if name in ("build", "torch") else None) != version
    }
    assert differing == {}, "run `make locks`"


def test_the_locks_have_all_that_is_needed() -> None:
    dependencies, engine = PROJECT["dependencies"], PROJECT["optional-dependencies"]["engine"]
    with_engine = [*dependencies, *engine]
    # Our own sources come with the checkout.
    locked = {"pocl-client", *read_lock("api")}
    assert installed_by(dependencies) - locked == set(), "run `make locks`"
    assert installed_by(with_engine) - locked - read_lock("worker").keys() - read_lock("torch").keys() == set(), (
        "run `make locks`"
    )
    # A torch of another index brings libraries of its own; the rest is in the other lock.
    assert {"torch", "triton"} & read_lock("worker").keys() == set()
    shared = read_lock("torch").keys() & read_lock("worker").keys()
    assert {package: read_lock("torch")[package] for package in shared} == {
        package: read_lock("worker")[package] for package in shared
    }


@pytest.mark.system
def test_the_images_install_by_hashes_alone() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert "PIP_REQUIRE_HASHES=1" in text
    assert "PIP_NO_DEPS=1" in text
    unchecked = re.findall(r"PIP_REQUIRE_HASHES=0 (pip .*?)(?:; fi|\\)?$", text, re.MULTILINE)
    # Our own sources, and torch from an index that whoever builds the image names.
    assert sorted(set(unchecked)) == [
        'pip install --index-url "$TORCH_INDEX" ',
        "pip install /wheels/*.whl",
        "pip wheel --no-build-isolation --wheel-dir /wheels ./client .",
    ]
    line = re.search(r"sed -n '(.*)' requirements/torch.lock", text)
    assert line is not None
    named = subprocess.run(
        ["sed", "-n", line[1], ROOT / "requirements" / "torch.lock"], capture_output=True, text=True, check=True
    )
    assert named.stdout.strip() == f"torch=={read_constraints()['torch']}"


@pytest.mark.system
def test_pip_takes_the_locks_as_they_are() -> None:
    """Read by pip itself: the versions that this environment has count as installed, and nothing is fetched."""
    arguments = ["--no-deps", "--require-hashes", "--dry-run", "--no-index", "-r", "requirements/api.lock"]
    completed = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr


def installed_by(requirements: list[str]) -> set[str]:
    """The names of all that pip would install, by what the installed packages say of themselves."""
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(each), "") for each in requirements]
    while left:
        requirement, asked_for = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": asked_for}):
            continue
        name = str(canonicalize_name(requirement.name))
        for extra in {"", *requirement.extras} - {extra for each, extra in seen if each == name}:
            seen.add((name, extra))
            left += [(Requirement(each), extra) for each in distribution(name).requires or ()]
    return {name for name, _ in seen}
