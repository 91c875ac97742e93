"""What the production set-up promises, read from `docker-compose.yml` and the Dockerfile. Nothing is started."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from sqlalchemy import make_url

from domain.environment import read_settings, refuse_unknown_variables
from domain.settings import Settings
from tests.support.compose_file import (
    DOCKERFILE,
    EXAMPLE,
    ROOT,
    ComposeFile,
    Service,
    VariableMissing,
    dockerfile_stage,
    example_variables,
    image_environment,
    interpolate,
    seconds,
)
from tools.locks import read_lock
from worker.settings import WorkerSettings

MANUAL = ROOT / "docs" / "production.md"
SCHEMA = ROOT / "tests" / "support" / "compose_spec" / "compose-spec.json"
NEEDED = {"MODELS_DIRECTORY": "/srv/models"}
OURS = ("migrate", "api", "scheduler", "worker")
MONITORING = ("prometheus", "grafana")
STAY = ("api", "scheduler", "worker", "postgres", "redis", *MONITORING)
SERVICES = ("migrate", *STAY)
SECRETS = {
    "migrate": {"postgres-password"},
    "api": {"postgres-password", "metrics-token"},
    "scheduler": {"postgres-password", "redis-password"},
    "worker": {"postgres-password", "redis-password"},
    "postgres": {"postgres-password"},
    "redis": {"redis-password"},
    "prometheus": {"metrics-token"},
    "grafana": {"grafana-password"},
}
# One version of an image, and the digest where it is pinned: never a tag that moves on.
IMAGE = re.compile(r"[a-z0-9./_-]+:v?\d+\.\d+(?:\.\d+)?(?:-[a-z0-9.-]+)?(?:@sha256:[0-9a-f]{64})?")
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


def test_without_what_has_no_default_nothing_starts_and_the_message_names_it() -> None:
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


def test_no_secret_stands_in_the_repository_nor_in_a_variable(compose: ComposeFile) -> None:
    secret = re.compile(r"PASSWORD|TOKEN|_KEY|SECRET(?!S_DIRECTORY$)")
    assert [name for name in example_variables() if secret.search(name)] == []
    for each in compose.services.values():
        named = {name: value for name, value in each.environment.items() if secret.search(name)}
        assert set(named) == {name for name in named if name.endswith("_FILE")}
        assert all(value.startswith("/run/secrets/") for value in named.values())
        assert not re.search(r"://[^/@]*:[^/@]*@", json.dumps(each.raw)), "an address has a password"
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {".env", "/secrets/"} <= set(ignored)
    assert EXAMPLE.name not in ignored


def test_each_process_gets_only_the_secrets_that_it_needs(compose: ComposeFile) -> None:
    assert {name: set(each.secrets) for name, each in compose.services.items()} == SECRETS
    assert set(compose.tree["secrets"]) == set().union(*SECRETS.values())
    for name, each in compose.services.items():
        read = json.dumps(each.raw)
        if name == "prometheus":
            read += (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
        assert set(re.findall(r"/run/secrets/([a-z-]+)", read)) == SECRETS[name]


def test_what_a_container_reads_is_mounted_from_the_host(compose: ComposeFile) -> None:
    """Inline content and secrets out of variables are copied into a container, which cannot be where its root file
    system is read-only: docker/compose#12031, docker/compose#12303.
    """
    assert compose.tree.get("configs", {}) == {}
    assert {frozenset(secret) for secret in compose.tree["secrets"].values()} == {frozenset({"file"})}


@pytest.mark.parametrize("name", OURS)
def test_the_settings_are_known_and_valid(
    compose: ComposeFile, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for secret in service(compose, name).secrets:
        (tmp_path / secret).write_text("a secret with @ and #\n")
    for variable, value in {**image_environment(), **service(compose, name).environment}.items():
        monkeypatch.setenv(variable, value.replace("/run/secrets", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    refuse_unknown_variables(Settings, WorkerSettings, environ=service(compose, name).environment)
    settings = read_settings(Settings)
    assert settings.home == Path("/var/lib/pocl")
    assert make_url(settings.database_url).password == "a secret with @ and #"
    read_settings(WorkerSettings)


@pytest.mark.parametrize("name", STAY)
def test_what_stays_is_watched_and_started_again(compose: ComposeFile, name: str) -> None:
    raw = service(compose, name).raw
    assert raw["restart"] == "unless-stopped"
    check = raw["healthcheck"]
    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period"} <= check.keys()
    assert seconds(check["timeout"]) <= seconds(check["interval"])


@pytest.mark.parametrize("name", SERVICES)
def test_memory_processes_files_and_logs_are_bounded(compose: ComposeFile, name: str) -> None:
    raw = service(compose, name).raw
    assert re.fullmatch(r"[1-9]\d*[mg]", raw["mem_limit"])
    assert raw["pids_limit"] > 0
    assert raw["ulimits"]["nofile"] >= 6500, "the API serves 6000 connections, and the others lose nothing by it"
    assert raw["logging"]["options"].keys() == {"max-size", "max-file"}
    sizes = [mount.partition(":")[2] for mount in raw.get("tmpfs", ())]
    assert all("size=" in size for size in sizes), "a file system in memory has no bound"


@pytest.mark.parametrize("name", SERVICES)
def test_no_process_has_privileges(compose: ComposeFile, name: str) -> None:
    raw = service(compose, name).raw
    assert raw["cap_drop"] == ["ALL"]
    assert "cap_add" not in raw
    assert raw["security_opt"] == ["no-new-privileges:true"]
    assert raw["read_only"] is True
    if target := service(compose, name).target:
        assert "USER 10001:10001\n" in dockerfile_stage(target)
    else:
        assert re.fullmatch(r"[1-9]\d*:\d+", raw["user"]), "the first process is of a user that is not root"


def test_networks_let_through_what_is_needed_and_no_more(compose: ComposeFile) -> None:
    networks: dict[str, dict[str, Any]] = {name: each or {} for name, each in compose.tree["networks"].items()}
    assert all(each.networks and each.networks <= networks.keys() for each in compose.services.values())
    open_ones = {name for name, each in networks.items() if not each.get("internal")}
    assert open_ones == {"edge", "egress"}
    # Of these one lets nobody begin a connection beyond the host.
    assert networks["edge"]["driver_opts"] == {"com.docker.network.bridge.enable_ip_masquerade": "false"}
    assert {name for name, each in compose.services.items() if "egress" in each.networks} == {"scheduler", "worker"}
    # What is published can be reached, and what waits for another reaches it.
    for name, each in compose.services.items():
        assert ("ports" in each.raw) == ("edge" in each.networks), name
        for other in each.dependencies:
            assert other == "migrate" or each.networks & service(compose, other).networks, (name, other)
    assert service(compose, "grafana").networks & service(compose, "postgres").networks == set()


def test_what_is_mounted_from_the_host_is_read_only_and_labelled(compose: ComposeFile) -> None:
    binds = [
        volume
        for each in compose.services.values()
        for volume in each.raw.get("volumes", ())
        if not isinstance(volume, str)
    ]
    assert {volume["source"] for volume in binds} == {
        NEEDED["MODELS_DIRECTORY"],
        "./deploy/valkey/valkey.conf",
        "./deploy/prometheus",
        "./deploy/grafana/provisioning",
        "./deploy/grafana/dashboards",
    }
    for volume in binds:
        assert volume["type"] == "bind"
        assert volume["read_only"] is True
        assert volume["bind"] == {"create_host_path": False, "selinux": "z"}
        assert volume["source"].startswith("/") or (ROOT / volume["source"]).exists()


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
    assert published == {"api": ["127.0.0.1:8000:8000"], "grafana": ["127.0.0.1:3000:3000"]}


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


def test_every_image_is_of_one_version(compose: ComposeFile) -> None:
    images = {name: each.raw["image"] for name, each in compose.services.items()}
    images |= {name: value for name, value in example_variables().items() if name.endswith("_IMAGE")}
    assert {name: image for name, image in images.items() if not IMAGE.fullmatch(image)} == {}
    # Of the Dockerfile each stage begins with another, or with the image of the variable.
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert re.findall(r"^ARG PYTHON_IMAGE=(.*)$", text, re.MULTILINE) == [images["PYTHON_IMAGE"]]
    begun_with = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE))
    assert begun_with - set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE)) == {"${PYTHON_IMAGE}"}


@pytest.mark.parametrize(
    "image", ["postgres", "postgres:latest", "postgres:18", "grafana/grafana:main", "a/b@sha256:12"]
)
def test_a_tag_that_moves_on_is_no_version(image: str) -> None:
    assert IMAGE.fullmatch(image) is None


def test_images_may_be_given_with_their_digests() -> None:
    digest = f"@sha256:{'ab' * 32}"
    names = [name for name in example_variables() if name.endswith("_IMAGE")]
    pinned = {name: example_variables()[name] + digest for name in names}
    tree = ComposeFile.load().with_variables(example_variables(**NEEDED, **pinned)).tree
    for name, image in pinned.items():
        assert IMAGE.fullmatch(image)
        assert image in json.dumps(tree), name


def test_monitoring_starts_only_when_it_is_asked_for(compose: ComposeFile) -> None:
    profiles = {name: each.raw["profiles"] for name, each in compose.services.items() if "profiles" in each.raw}
    assert profiles == {name: ["monitoring"] for name in MONITORING}


def test_only_the_worker_installs_the_engine(compose: ComposeFile) -> None:
    assert re.findall(r"(\w+)\.lock", dockerfile_stage("api-build")) == ["api"]
    assert set(re.findall(r"(\w+)\.lock", dockerfile_stage("worker-build"))) == {"torch", "worker"}
    assert "COPY --from=api-build" in dockerfile_stage("api")
    assert "COPY --from=worker-build" in dockerfile_stage("worker")
    assert {name: service(compose, name).target for name in OURS} == {**dict.fromkeys(OURS, "api"), "worker": "worker"}


def test_what_the_api_image_installs_holds_no_torch() -> None:
    assert read_lock("api").keys() & ENGINE == set()
    assert read_lock("torch").keys() | read_lock("worker").keys() >= ENGINE
