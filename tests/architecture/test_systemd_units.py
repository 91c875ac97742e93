"""What the units of deploy/systemd promise, read from the files; `systemd-analyze` looks at them where it is there."""

import shutil
import subprocess
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from domain.environment import read_settings, refuse_unknown_variables
from domain.process_secrets import SECRET_VARIABLES
from domain.settings import Settings
from tests.support.compose_file import ROOT, ComposeFile, Service
from worker.settings import WorkerSettings

UNITS = ROOT / "deploy" / "systemd"
SERVICES = sorted(file.name for file in UNITS.glob("*.service"))
STAY = [name for name in SERVICES if name != "pocl-migrate.service"]
COMPOSE_SERVICES = {
    "pocl-api.service": "api",
    "pocl-migrate.service": "migrate",
    "pocl-scheduler.service": "scheduler",
    "pocl-worker@.service": "worker",
}
CLOSED = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "SystemCallArchitectures": "native",
    "UMask": "0077",
}
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt-get install systemd"
)


def options(name: str) -> dict[str, list[str]]:
    """The values of each option of a unit; several where it is given several times."""
    found = defaultdict(list)
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            option, _, value = line.partition("=")
            found[option].append(value)
    return dict(found)


def one(name: str, option: str) -> str:
    (value,) = options(name)[option]
    return value


def variables(name: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for line in options(name)["Environment"] for pair in line.split())


@cache
def compose_services() -> dict[str, Service]:
    return ComposeFile.load().services


def test_there_is_a_unit_for_each_of_our_services() -> None:
    assert sorted(COMPOSE_SERVICES) == SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_runs_the_command_of_compose(name: str) -> None:
    program, *arguments = one(name, "ExecStart").split()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module = scripts[Path(program).name].partition(".")[0]
    command = compose_services()[COMPOSE_SERVICES[name]].command
    assert ["python", "-m", module, *arguments] == command


@pytest.mark.parametrize("name", SERVICES)
def test_a_unit_has_no_privileges_and_bounds(name: str) -> None:
    given = options(name)
    assert {option: given[option] for option in CLOSED} == {option: [value] for option, value in CLOSED.items()}
    assert one(name, "User") == one(name, "Group") == "pocl"
    assert {"MemoryMax", "TasksMax", "LimitNOFILE"} <= given.keys()
    assert one(name, "SystemCallFilter").startswith("@system-service")
    if name == "pocl-worker@.service":
        assert one(name, "DevicePolicy") == "closed"
        assert given["DeviceAllow"] == ["char-nvidia* rw"]
    else:
        assert one(name, "PrivateDevices") == "yes"


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_are_credentials_and_the_settings_are_valid(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = dict(line.split(":", 1) for line in options(name)["LoadCredential"])
    given = variables(name)
    assert not given.keys() & set(SECRET_VARIABLES)
    assert {value.removeprefix("%d/") for value in given.values() if value.startswith("%d/")} == loaded.keys()
    assert loaded == {credential: f"/etc/pocl/credentials/{credential}" for credential in loaded}
    # Compose has passwords where these have addresses.
    alike = {"database-url": "postgres-password", "redis-url": "redis-password", "metrics-token": "metrics-token"}
    assert {alike[credential] for credential in loaded} == set(compose_services()[COMPOSE_SERVICES[name]].secrets)
    contents = {"database-url": "postgresql://pocl:p@db/pocl", "redis-url": "redis://:p@redis/0"}
    for credential in loaded:
        (tmp_path / credential).write_text(contents.get(credential, "a-secret-of-decent-length"))
    refuse_unknown_variables(Settings, WorkerSettings, environ=given)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value.replace("%d", str(tmp_path)).replace("%i", "GPU-8f3a-1"))
    assert read_settings(Settings).home == Path("/var/lib/pocl")
    options_of_worker = read_settings(WorkerSettings)
    if name == "pocl-worker@.service":
        assert options_of_worker.gpus == ("GPU-8f3a-1",)
    if options_of_worker.pulse_file is not None:
        directory = one(name, "RuntimeDirectory").replace("%i", "GPU-8f3a-1")
        assert options_of_worker.pulse_file.parent == Path("/run") / directory


@pytest.mark.parametrize("name", STAY)
def test_a_unit_starts_again_unless_a_setting_is_wrong(name: str) -> None:
    assert one(name, "Restart") == "always"
    assert one(name, "StartLimitIntervalSec") == "0"
    # What the commands exit with where waiting does not help.
    assert one(name, "RestartPreventExitStatus") == "2"
    # A migration that fails is a matter of the database, which may come back: it must not keep them from starting.
    assert "Requires" not in options(name)
    assert "pocl-migrate.service" in one(name, "After").split()


@pytest.mark.parametrize("name", STAY)
def test_a_unit_has_the_time_of_compose_to_end(name: str) -> None:
    assert float(one(name, "TimeoutStopSec")) >= compose_services()[COMPOSE_SERVICES[name]].grace
    # The engine is asked to stop by its worker, and by nobody else.
    assert one(name, "KillMode") == "mixed"


def test_an_engine_that_takes_too_much_memory_does_not_end_its_worker() -> None:
    assert one("pocl-worker@.service", "OOMPolicy") == "continue"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a file system with the units and the programs that they start."""
    root = tmp_path_factory.mktemp("machine")
    units, programs = root / "etc" / "systemd" / "system", root / "opt" / "pocl" / "bin"
    units.mkdir(parents=True)
    programs.mkdir(parents=True)
    for unit in (*UNITS.glob("*.service"), *UNITS.glob("*.target")):
        (units / unit.name).write_bytes(unit.read_bytes())
    # What they are ordered by stands in for that of the distribution.
    for target in ("sysinit", "basic", "shutdown", "multi-user", "network-online"):
        (units / f"{target}.target").write_text("[Unit]\nDescription=stands in\n")
    for name in SERVICES:
        program = programs / Path(one(name, "ExecStart").split()[0]).name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    return root


@needs_systemd
@pytest.mark.system
def test_systemd_takes_the_units(machine: Path) -> None:
    names = [name.replace("@", "@0") for name in SERVICES]
    completed = subprocess.run(
        ["systemd-analyze", f"--root={machine}", "--man=no", "verify", *names, "pocl.target"],
        capture_output=True,
        text=True,
    )
    said = [line for line in completed.stderr.splitlines() if "pocl" in line]
    assert (completed.returncode, said) == (0, []), completed.stderr


@needs_systemd
@pytest.mark.system
@pytest.mark.parametrize("name", SERVICES)
def test_systemd_finds_little_that_is_open(machine: Path, name: str) -> None:
    unit = name.replace("@", "@0")
    # The exposure is from 0 to 10, and a threshold is given in tenths.
    command = [
        "systemd-analyze",
        f"--root={machine}",
        "security",
        "--offline=true",
        "--no-pager",
        "--threshold=20",
        unit,
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
