"""What the production set-up promises, read from `docker-compose.yml` and the Dockerfile. Nothing is started."""

import json
import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement

from domain.settings import Settings
from tests.support.compose_file import (
    DOCKERFILE,
    EXAMPLE,
    ROOT,
    ComposeFile,
    Service,
    VariableMissing,
    example_variables,
    image_environment,
    interpolate,
    seconds,
)
from worker.settings import WorkerSettings

MANUAL = ROOT / "docs" / "production.md"
SCHEMA = ROOT / "tests" / "support" / "compose_spec" / "compose-spec.json"
SECRETS = {"POSTGRES_PASSWORD": "postgres1", "REDIS_PASSWORD": "redis1", "POCL_API_KEY": "a-key-of-16-letters"}
NEEDED = {**SECRETS, "MODELS_DIRECTORY": "/srv/models"}
OURS = ("migrate", "api", "scheduler", "worker")
STAY = ("api", "scheduler", "worker", "postgres", "redis")
ENGINE = {"torch", "transformers", "accelerate", "safetensors", "numpy"}


@pytest.fixture(scope="module")
def compose() -> ComposeFile:
    return ComposeFile.load().with_variables(example_variables(**NEEDED))


def service(compose: ComposeFile, name: str) -> Service:
    return compose.services[name]


@pytest.fixture(scope="module")
def specification() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_it_keeps_to_the_compose_specification(compose: ComposeFile, specification: jsonschema.Draft7Validator) -> None:
    specification.validate(ComposeFile.load().tree)
    specification.validate(compose.tree)


def test_so_does_what_the_manual_puts_beside_it(
    compose: ComposeFile, specification: jsonschema.Draft7Validator
) -> None:
    overrides = re.findall(r"^```yaml\n(.*?)^```$", MANUAL.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(overrides) == 2
    for override in map(yaml.safe_load, overrides):
        specification.validate(override)
        changed = {each.get("extends", {}).get("service", name) for name, each in override["services"].items()}
        assert changed <= compose.services.keys()
        assert override.get("volumes", {}).keys() <= compose.tree["volumes"].keys()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$A ${A} $$A ${B-x} ${B:-x} ${C-x} ${C:-x} ${A:+y}${C+z}", "1 1 $A x x  x yz"),
        ("${A:?m}${C?m}", "1"),
    ],
)
def test_variables_are_filled_in_as_compose_does(text: str, expected: str) -> None:
    assert interpolate(text, {"A": "1", "C": ""}) == expected


def test_without_the_secrets_nothing_starts_and_the_message_names_what_is_missing() -> None:
    parsed = ComposeFile.load()
    for name in NEEDED:
        with pytest.raises(VariableMissing, match=name):
            parsed.with_variables(example_variables(**{**NEEDED, name: ""}))


def test_the_example_names_every_variable_and_no_other() -> None:
    assert set(example_variables()) == ComposeFile.load().variables


def test_the_example_and_the_file_agree_on_the_defaults() -> None:
    given = ComposeFile.load().with_variables(example_variables(**NEEDED))
    left_out = ComposeFile.load().with_variables({**NEEDED, "POCL_VERSION": example_variables()["POCL_VERSION"]})
    assert given == left_out


def test_no_secret_stands_in_the_repository() -> None:
    assert {name: example_variables()[name] for name in SECRETS} == dict.fromkeys(SECRETS, "")
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert ".env" in ignored
    assert EXAMPLE.name not in ignored


def test_each_process_gets_only_the_secrets_that_it_needs(compose: ComposeFile) -> None:
    held = {
        name: {secret for secret, value in SECRETS.items() if value in json.dumps(each.environment)}
        for name, each in compose.services.items()
    }
    assert held == {
        "migrate": {"POSTGRES_PASSWORD"},
        "api": {"POSTGRES_PASSWORD", "POCL_API_KEY"},
        "scheduler": {"POSTGRES_PASSWORD", "REDIS_PASSWORD"},
        "worker": {"POSTGRES_PASSWORD", "REDIS_PASSWORD"},
        "postgres": {"POSTGRES_PASSWORD"},
        "redis": {"REDIS_PASSWORD"},
    }
    # A list of processes is read by everyone on the machine.
    commands = json.dumps([each.raw.get("command") for each in compose.services.values()])
    assert [secret for secret in SECRETS.values() if secret in commands] == []


@pytest.mark.parametrize("name", OURS)
def test_the_settings_are_known_and_valid(
    compose: ComposeFile, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable, value in {**image_environment(), **service(compose, name).environment}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    known = {f"POCL_{field}".upper() for field in Settings.model_fields}
    known |= {f"POCL_WORKER_{field}".upper() for field in WorkerSettings.model_fields}
    assert {variable for variable in service(compose, name).environment if variable.startswith("POCL_")} <= known
    assert Settings().home == Path("/var/lib/pocl")
    WorkerSettings()


@pytest.mark.parametrize("name", STAY)
def test_what_stays_is_watched_and_started_again(compose: ComposeFile, name: str) -> None:
    raw = service(compose, name).raw
    assert raw["restart"] == "unless-stopped"
    check = raw["healthcheck"]
    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period"} <= check.keys()
    assert seconds(check["timeout"]) <= seconds(check["interval"])


@pytest.mark.parametrize("name", [*OURS, "postgres", "redis"])
def test_logs_are_bounded(compose: ComposeFile, name: str) -> None:
    assert service(compose, name).raw["logging"]["options"].keys() == {"max-size", "max-file"}


def test_migrations_run_once_and_before_all_that_reads_the_database(compose: ComposeFile) -> None:
    assert service(compose, "migrate").raw["restart"] == "no"
    assert service(compose, "migrate").dependencies == {"postgres": "service_healthy"}
    for name in ("api", "scheduler", "worker"):
        waited = service(compose, name).dependencies
        assert waited["migrate"] == "service_completed_successfully"
        assert waited["postgres"] == "service_healthy"
        # A request is a transaction of the database; it needs no broker.
        assert ("redis" in waited) == (name != "api") == ("POCL_REDIS_URL" in service(compose, name).environment)


def test_a_worker_has_time_to_save_and_to_store(compose: ComposeFile) -> None:
    worker = service(compose, "worker")
    assert worker.stop_signal == "SIGTERM"
    assert worker.raw["init"] is True
    assert worker.grace >= 2 * float(worker.environment["POCL_WORKER_GRACE_SECONDS"])


def test_a_worker_reserves_the_gpus_and_uses_one(compose: ComposeFile) -> None:
    (device,) = service(compose, "worker").raw["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert {"gpu", "compute"} <= set(device["capabilities"])
    assert service(compose, "worker").environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert [name for name in compose.services if "deploy" in service(compose, name).raw] == ["worker"]


def test_only_the_api_is_published_and_on_loopback(compose: ComposeFile) -> None:
    published = {name: each.raw["ports"] for name, each in compose.services.items() if "ports" in each.raw}
    assert published == {"api": ["127.0.0.1:8000:8000"]}


def test_models_are_read_only_and_artifacts_are_shared(compose: ComposeFile) -> None:
    def mounted(name: str) -> dict[str, bool]:
        """Target -> whether it is writable."""
        found = {}
        for volume in service(compose, name).raw.get("volumes", ()):
            if isinstance(volume, str):
                source, target = volume.split(":")
                assert source in compose.tree["volumes"]
                found[target] = True
            else:
                found[volume["target"]] = not volume["read_only"]
        return found

    artifacts, models = "/var/lib/pocl/artifacts", "/var/lib/pocl/models"
    assert mounted("scheduler") == {artifacts: True}
    assert mounted("api") == mounted("worker") == {"/var/lib/pocl": True, artifacts: True, models: False}
    assert list(mounted("postgres")) == ["/var/lib/postgresql"]


@pytest.mark.parametrize("name", OURS)
def test_our_processes_have_no_privileges(compose: ComposeFile, name: str) -> None:
    raw = service(compose, name).raw
    assert raw["cap_drop"] == ["ALL"]
    assert raw["security_opt"] == ["no-new-privileges:true"]
    assert raw.get("read_only", False) == (name != "worker")
    assert "USER 10001:10001\n" in stage(str(service(compose, name).target))


def test_every_image_names_its_version(compose: ComposeFile) -> None:
    images = {each.raw["image"] for each in compose.services.values()}
    images |= set(re.findall(r"^FROM (\S+:\S+)", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE))
    assert {image for image in images if not re.search(r":\d+\.\d+\.?\d*", image)} == set()


def test_only_the_worker_installs_the_engine(compose: ComposeFile) -> None:
    assert re.findall(r"pip install .* (\S+)\n", stage("api-build")) == ["."]
    assert re.findall(r"pip install .* (\S+)\n", stage("worker-build"))[-1] == "'.[engine]'"
    assert "COPY --from=api-build" in stage("api")
    assert {name: service(compose, name).target for name in OURS} == {**dict.fromkeys(OURS, "api"), "worker": "worker"}


def test_what_the_api_image_installs_holds_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert installed_by(project["dependencies"]) & ENGINE == set()
    assert installed_by(project["optional-dependencies"]["engine"]) >= ENGINE


def installed_by(requirements: list[str]) -> set[str]:
    """The names of all that pip would install, by what the installed packages say of themselves."""
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(each), "") for each in requirements]
    while left:
        requirement, asked_for = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": asked_for}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        for extra in {"", *requirement.extras} - {extra for each, extra in seen if each == name}:
            seen.add((name, extra))
            left += [(Requirement(each), extra) for each in distribution(name).requires or ()]
    return {name for name, _ in seen}


def stage(name: str) -> str:
    """The part of the Dockerfile that makes a stage."""
    (found,) = re.findall(rf"^(FROM \S+ AS {name}\n(?:(?!FROM).*\n)*)", DOCKERFILE.read_text("utf-8"), re.MULTILINE)
    return str(found)
