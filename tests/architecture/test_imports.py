"""What may import what: the contracts are kept, and each of them can be broken."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors"}
CONTRACTS: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
    "contracts"
]
PACKAGES: list[str] = ["api", "bench", "domain", "pocl", "worker"]
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"

HISTORICAL = [
    ("worker.sink", "api.jobs.requests"),
    ("domain.jobs.leases", "api.jobs.requests"),
    ("pocl.data.batches", "pocl.models.heads"),
]
"""Imports that an earlier set of contracts let pass."""


def test_the_import_contracts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # The configuration is looked for, and the packages are found, in the working directory.
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


@pytest.mark.system
def test_an_import_through_any_wall_is_refused(tmp_path: Path) -> None:
    violations = [*HISTORICAL, *violations_of_layers(), *violations_of_forbidden()]
    assert len(violations) > 60
    copy_packages(tmp_path)
    for importer, imported in violations:
        plant(tmp_path, importer, f"import {imported}")
    # Two siblings that import each other through two of their modules make a cycle of packages.
    plant(tmp_path, "domain.checkpoints.models", "import domain.datasets.models")
    plant(tmp_path, "domain.datasets.models", "import domain.checkpoints.models")

    refused = lint(tmp_path)

    broken = set(re.findall(r"^(.+) BROKEN$", refused, re.MULTILINE))
    assert broken == {contract["name"] for contract in CONTRACTS}
    # Of external packages import-linter names the topmost module alone.
    missing = [edge for edge in violations if not re.search(rf"{edge[0]}(\.\S+)? -> {edge[1]}(\.\S+)? \(l\.", refused)]
    assert missing == []


@pytest.mark.system
def test_a_module_in_no_layer_is_refused(tmp_path: Path) -> None:
    containers = [name for contract in CONTRACTS if contract.get("exhaustive") for name in contract["containers"]]
    assert {"pocl", "domain", "domain.jobs", "api", "api.jobs", "worker"} <= set(containers)
    copy_packages(tmp_path)
    for container in containers:
        (tmp_path / container.replace(".", "/") / "stray.py").write_text("")
    refused = lint(tmp_path)
    assert [container for container in containers if f"- {container}.stray" not in refused] == []


@pytest.mark.system
@pytest.mark.parametrize("module", ["api.app", "api.__main__", "pocl", "pocl.spec", "pocl.plan", "pocl.inspect"])
def test_the_service_loads_no_part_of_the_engine(module: str) -> None:
    script = f"import sys, {module}; print(*({HEAVY!r} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == []


def violations_of_layers() -> Iterator[tuple[str, str]]:
    """An import from each layer into the one above it, and between siblings that must not meet."""
    for contract in CONTRACTS:
        if contract["type"] != "layers":
            continue
        for container in contract.get("containers", [""]):
            layers = [existing(container, layer) for layer in contract["layers"]]
            for upper, lower in pairwise(layer for layer in layers if layer):
                yield lower[0], upper[0]
            for layer in layers:
                yield from pairwise(layer)


def violations_of_forbidden() -> Iterator[tuple[str, str]]:
    """An import of each forbidden package by each package or module that must not reach it."""
    for contract in CONTRACTS:
        if contract["type"] == "forbidden":
            for source in contract["source_modules"]:
                for forbidden in contract["forbidden_modules"]:
                    yield source.removesuffix(".**"), forbidden


def existing(container: str, layer: str) -> list[str]:
    """The modules of a layer that are there: an optional one need not be."""
    names = [name.strip() for name in re.split(r"[|:]", layer)]
    modules = [f"{container}.{name.strip('()')}".lstrip(".") for name in names]
    return [module for module in modules if file_of(ROOT, module).is_file()]


def file_of(root: Path, module: str) -> Path:
    path = root / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def copy_packages(directory: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", directory)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__", "results"))


def plant(root: Path, module: str, statement: str) -> None:
    path = file_of(root, module)
    path.write_text(f"{path.read_text()}\n{statement}\n")


def lint(directory: Path) -> str:
    """What the linter prints of the packages in `directory`, which it must refuse."""
    ran = subprocess.run([sys.executable, "-c", LINT], capture_output=True, text=True, check=False, cwd=directory)
    assert ran.returncode == 1, ran.stderr
    return ran.stdout
