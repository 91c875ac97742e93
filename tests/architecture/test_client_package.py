"""The client is a distribution of its own: what it may import, and that what is generated of it is current."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

from tools import cli_reference, client_models, client_twin
from tools.formatting import format_source

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "client"
SERVICE: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETTINGS: dict[str, Any] = tomllib.loads((CLIENT / "pyproject.toml").read_text())
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
FORBIDDEN, LAYERS = SETTINGS["tool"]["importlinter"]["contracts"]


def test_the_contracts_of_the_client_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CLIENT)
    assert lint_imports(no_cache=True) == 0


@pytest.mark.system
def test_an_import_of_the_service_by_the_client_is_refused(tmp_path: Path) -> None:
    assert {"api", "domain", "fastapi", "pocl", "torch", "worker"} <= set(FORBIDDEN["forbidden_modules"])
    shutil.copytree(CLIENT, tmp_path / "client", ignore=shutil.ignore_patterns("__pycache__"))
    package = tmp_path / "client" / "pocl_client"
    for module in FORBIDDEN["forbidden_modules"]:
        (package / "cli" / f"imports_{module}.py").write_text(f"import {module}\n")
    (package / "errors.py").write_text((package / "errors.py").read_text() + "\nimport pocl_client.cli\n")
    (package / "stray.py").write_text("")
    ran = subprocess.run([sys.executable, "-c", LINT], capture_output=True, text=True, cwd=package.parent)
    assert ran.returncode == 1
    assert set(re.findall(r"^(.+) BROKEN$", ran.stdout, re.MULTILINE)) == {FORBIDDEN["name"], LAYERS["name"]}
    modules = FORBIDDEN["forbidden_modules"]
    assert [module for module in modules if f"imports_{module} -> {module} (l.1)" not in ran.stdout] == []


def test_client_and_service_are_of_one_version() -> None:
    version = SETTINGS["project"]["version"]
    assert version == SERVICE["version"]
    assert f"pocl-client[cli]=={version}" in SERVICE["dependencies"]


@pytest.mark.system
def test_the_models_are_those_of_the_openapi_document() -> None:
    document = json.loads(client_models.DOCUMENT.read_text(encoding="utf-8"))
    written = format_source(client_models.ModelWriter(document).write(), client_models.MODELS)
    assert client_models.MODELS.read_text(encoding="utf-8") == written, "run `make client`"


@pytest.mark.system
def test_the_client_without_await_is_made_of_the_other() -> None:
    for path, source in client_twin.twins().items():
        assert path.read_text(encoding="utf-8") == source, "run `make client`"
    modules = {path.name for path in (client_twin.PACKAGE / "_sync").glob("*.py")}
    assert modules == {path.name for path in (client_twin.PACKAGE / "_async").glob("*.py")}


def test_the_reference_of_the_commands_is_current() -> None:
    assert cli_reference.REFERENCE.read_text(encoding="utf-8") == cli_reference.write(), "run `make client`"
