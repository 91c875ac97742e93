"""README and docs say what is true: every command that they print is run, or checked by a rule that says why not.

The commands run in order, as they are printed, in one shell, against a fresh service. Two things are smaller or
elsewhere than a reader's: the model has the name and the layers of the README's and random weights of a few kilobytes,
and `curl` and `pocl` are led from the port 8000 to the one where the service listens.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pocl.export.model_directory import save_model
from pocl.models.loading import load_teacher
from pocl.spec import ModelRef, RandomModel
from pocl.storage.manifest import new_directory
from tests.docs.blocks import DOCUMENTS, README, Block, command_blocks, languages
from tests.support.compose_file import ROOT, ComposeFile
from tests.support.processes import Processes
from worker.processes import spawn, terminate

MODEL = "smollm2-135m-instruct"
LAYERS = 30
PRINTED_PORT = 8000

CURL_WRITE_ERROR = "23"
"""curl's exit status where the pipe that it writes to was closed."""

CURL = """\
#!/usr/bin/env bash
# curl, led to where the service listens; a problem as the answer is a failure.
"{curl}" --connect-to 127.0.0.1:{printed}:127.0.0.1:{port} --fail-with-body "$@"
status=$?
echo "$status curl $*" >> "{log}"
# A pipe that `head` closed is no failure.
[ $status = {write_error} ] && exit 0
exit $status
"""


# --- Commands that are not run -------------------------------------------------------------------------


def recipe(command: str) -> str:
    """What `make` would run for one of its targets in an environment that is installed.

    Raises:
        CalledProcessError: there is no such target.
    """
    dry_run = ["make", "--dry-run", "--no-print-directory", "RUNTIME=", "STAMP=", *shlex.split(command)[1:]]
    # Not as a part of the `make test` that this may be run by.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(dry_run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def make_target_runs_what_is_there(command: str) -> None:
    """The target exists, and the Python program that its recipe starts does too."""
    programs = re.findall(r"^.*\.venv/bin/python (?:-m (\S+)|(\S+\.py))", recipe(command), re.MULTILINE)
    assert programs, recipe(command)
    for module, file in programs:
        place = ROOT / (file or module.replace(".", "/"))
        assert place.exists() or place.with_suffix(".py").is_file() or module == "pytest"


def compose_has_what_it_names(command: str) -> None:
    """The sub-command and its options are known, and every service is one of `docker-compose.yml`."""
    known = {
        "build": set(),
        "up": {"--detach", "--no-deps", "--wait"},
        "stop": set(),
        "logs": {"--timestamps"},
        "exec": {"-T"},
        "run": {"--rm", "--no-deps", "-T"},
    }
    _, _, name, *rest = shlex.split(re.split(r"\s[<>]\s", command)[0])
    options = [word for word in rest if word.startswith("-")] if name not in ("exec", "run") else []
    if name in ("exec", "run"):
        while rest[0].startswith("-"):
            options.append(rest.pop(0))
        # What follows the service is run in its container: tests/integration/test_compose.py runs these.
        rest = rest[:1]
    assert set(options) <= known[name], command
    assert {word for word in rest if not word.startswith("-")} <= ComposeFile.load().services.keys(), command


def file_is_there(command: str) -> None:
    assert (ROOT / next(word for word in shlex.split(command) if "." in word)).is_file()


def repository_files_are_there(command: str) -> None:
    """Each path below `deploy` or `requirements` names a file, or a pattern that some file has."""
    named = [word for word in shlex.split(command, comments=True) if word.startswith(("deploy/", "requirements/"))]
    assert all(list(ROOT.glob(word)) for word in named), command


def address_is_served(command: str) -> None:
    (path,) = re.findall(r"http://127\.0\.0\.1:8000(/\w+)$", command)
    assert path in json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))["paths"]


def nothing_is_checked(_command: str) -> None:
    return


@dataclass(frozen=True)
class NotRun:
    pattern: str
    reason: str
    check: Callable[[str], None]
    """Holds the command to what can be known without running it."""


NOT_RUN = (
    NotRun(r"make model", "downloads 93 MB; a random model of the same name stands in", make_target_runs_what_is_there),
    NotRun(r"make serve", "stays; the fixture runs the command of its recipe", make_target_runs_what_is_there),
    NotRun(r"make demo", "downloads a model and trains it for minutes", make_target_runs_what_is_there),
    NotRun(r"make test", "is the run that this test is part of", make_target_runs_what_is_there),
    NotRun(r"deploy/[a-z-]+\.sh", "is run in a checkout of its own by test_deploy_scripts.py", file_is_there),
    NotRun(r"docker compose .*", "needs Docker", compose_has_what_it_names),
    NotRun(r"cp \.env\.example \.env && chmod 600 \.env", "is for Docker, and would replace a reader's", file_is_there),
    NotRun(r"curl .*/readyz", "asks the service that Docker would have started", address_is_served),
    NotRun(
        r"(install|systemctl|python3\.11 -m venv|/opt/pocl/bin/pip) .*",
        "changes the machine, as root",
        repository_files_are_there,
    ),
    NotRun(r"git pull", "changes the checkout", nothing_is_checked),
)


def rule_for(command: str) -> NotRun | None:
    return next((rule for rule in NOT_RUN if re.fullmatch(rule.pattern, command)), None)


def is_run(block: Block) -> bool:
    """Whether a shell runs the block as it stands: none of its lines falls under a rule."""
    return not any(rule_for(command) for command in block.commands)


ALL_BLOCKS = [block for document in DOCUMENTS for block in command_blocks(document)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_shell_blocks_are_marked_as_such(document: Path) -> None:
    assert languages(document) <= {"bash", "console", "yaml", "ini", "json", "python"}


@pytest.mark.parametrize("block", [block for block in ALL_BLOCKS if not is_run(block)], ids=str)
def test_command_that_is_not_run_is_checked(block: Block) -> None:
    for command in block.commands:
        rule = rule_for(command)
        assert rule is not None, f"{block}: a block is run whole or not at all, and no rule is for: {command}"
        rule.check(command)


def test_every_rule_is_for_a_command_that_is_printed() -> None:
    printed = [command for block in ALL_BLOCKS for command in block.commands]
    assert [rule.pattern for rule in NOT_RUN if not any(rule_for(command) is rule for command in printed)] == []


@pytest.mark.parametrize(
    ("command", "arguments"), [("make serve", "serve"), ("make serve PORT=8001", "serve --port 8001")]
)
def test_make_serve_takes_a_port(command: str, arguments: str) -> None:
    assert recipe(command).strip() == f".venv/bin/python -m worker {arguments}"


# --- Commands that are run -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sandbox:
    """A directory with the examples and the environment, as in a checkout, and a shell that reaches a fresh service."""

    directory: Path
    environment: dict[str, str]
    curl_log: Path

    def run(self, script: str, within: float) -> None:
        """Run `script` in a shell that ends at the first command that fails.

        Raises:
            AssertionError: a command failed, or an answer was a problem.
        """
        log = self.directory / "shell.log"
        with log.open("wb") as output:
            command = ["bash", "-xeuo", "pipefail", "-c", script]
            shell = spawn(command, stdout=output, environment=self.environment, directory=self.directory)
            try:
                status: int | str = shell.wait(within)
            except subprocess.TimeoutExpired:
                status = "timeout"
            finally:
                terminate(shell, grace=0)
        printed = log.read_text(errors="replace")
        requests = self.curl_log.read_text().splitlines()
        assert [line for line in requests if line.split()[0] not in ("0", CURL_WRITE_ERROR)] == [], printed[-6000:]
        assert status == 0, f"{status}: {printed[-6000:]}"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    for program in ("curl", "jq", "make", "sha256sum"):
        assert shutil.which(program), f"{program} is not on PATH: the README's commands need it, and so does this test."
    root = tmp_path_factory.mktemp("sandbox")
    write_model(root / "home" / "models" / MODEL)
    checkout = root / "checkout"
    checkout.mkdir()
    (checkout / "examples").symlink_to(ROOT / "examples")
    (checkout / ".venv").symlink_to(sys.prefix)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("POCL_")},
        "POCL_HOME": str(root / "home"),
        "OMP_NUM_THREADS": "1",
    }
    processes = Processes(root / "processes")
    try:
        address = processes.start("serve", environment, "--port", "0").wait_for_log("READY").removeprefix("READY ")
        programs, log = root / "bin", root / "curl.log"
        programs.mkdir()
        log.touch()
        wrapper = programs / "curl"
        port = address.rpartition(":")[2]
        wrapper.write_text(
            CURL.format(
                curl=shutil.which("curl"), printed=PRINTED_PORT, port=port, log=log, write_error=CURL_WRITE_ERROR
            )
        )
        wrapper.chmod(0o755)
        path = f"{programs}{os.pathsep}{environment['PATH']}"
        yield Sandbox(checkout, {**environment, "PATH": path, "POCL_URL": address}, log)
    finally:
        processes.kill_all()


def write_model(directory: Path) -> None:
    """A model that has what the README's job asks of SmolLM2: its name and its number of layers."""
    size = RandomModel(layers=LAYERS, hidden_size=16, heads=2)
    loaded = load_teacher(ModelRef(random=size), device=torch.device("cpu"), dtype=torch.float32)
    directory.parent.mkdir(parents=True)
    with new_directory(directory) as scratch:
        save_model(loaded.model, loaded.tokenizer, scratch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_readme_runs_from_top_to_bottom(sandbox: Sandbox) -> None:
    scripts = [block.script for block in command_blocks(README) if is_run(block)]
    assert len(scripts) > 4
    sandbox.run("\n".join(scripts), 1140)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", ["operations.md", "recipes.md"])
def test_page_runs_from_top_to_bottom(sandbox: Sandbox, page: str) -> None:
    scripts = [block.script for block in command_blocks(ROOT / "docs" / page) if is_run(block)]
    assert len(scripts) > 1
    sandbox.run("\n".join(scripts), 570)
