"""The scripts of deploy/, run by the shell, with a `docker` that writes down what it is asked for."""

import os
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.compose_file import ROOT, ComposeFile, example_variables

pytestmark = pytest.mark.system

DOCKER = """#!/bin/sh
echo "$*" >> "{log}"
case "$*" in {failing}) exit 7 ;; esac
case "$*" in
  "compose config --services") printf '%s\\n' {services} ;;
  "buildx imagetools inspect"*) for image; do :; done; echo "sha256:$(printf %s "$image" | sha256sum | cut -c1-64)" ;;
esac
"""


@dataclass(frozen=True)
class Checkout:
    """The scripts in a checkout of their own, and what they asked Docker for."""

    root: Path

    def run(
        self, script: str, *, services: tuple[str, ...] = (), failing: str = "never", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of deploy/.

        Args:
            services: what the compose file has.
            failing: the pattern of the shell that a call of Docker which fails matches.
        """
        docker = self.root / "bin" / "docker"
        docker.parent.mkdir(exist_ok=True)
        docker.write_text(DOCKER.format(log=self.root / "asked", services=" ".join(services), failing=failing))
        docker.chmod(0o755)
        environment = {"PATH": f"{docker.parent}{os.pathsep}{os.environ['PATH']}", **variables}
        return subprocess.run(
            [self.root / "deploy" / script], cwd=self.root, env=environment, capture_output=True, text=True
        )

    @property
    def asked(self) -> list[str]:
        file = self.root / "asked"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "deploy").mkdir()
    for script in (ROOT / "deploy").glob("*.sh"):
        copy = tmp_path / "deploy" / script.name
        copy.write_bytes(script.read_bytes())
        copy.chmod(0o755)
    (tmp_path / ".env.example").write_bytes((ROOT / ".env.example").read_bytes())
    return Checkout(tmp_path)


def test_secrets_are_made_once_and_closed_to_others(checkout: Checkout) -> None:
    assert checkout.run("make-secrets.sh").returncode == 0
    directory = checkout.root / "secrets"
    made = {file.name: file.read_text() for file in directory.iterdir()}
    assert made.keys() == ComposeFile.load().tree["secrets"].keys()
    assert all(len(secret) == 49 and secret.endswith("\n") for secret in made.values())
    assert len(set(made.values())) == len(made)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    # Read by the users of containers, who see the files and not the directory.
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o444}
    own = directory / "redis-password"
    own.chmod(0o600)
    own.write_text("my own password\n")
    (directory / "metrics-token").unlink()
    again = checkout.run("make-secrets.sh")
    assert again.returncode == 0
    assert own.read_text() == "my own password\n"
    assert (directory / "postgres-password").read_text() == made["postgres-password"]
    assert f"made {Path('secrets') / 'metrics-token'}" in again.stdout


def test_images_are_pinned_and_the_rest_of_the_settings_stays(checkout: Checkout) -> None:
    assert "copy .env.example" in checkout.run("pin-images.sh").stderr
    settings = checkout.root / ".env"
    settings.write_text("POCL_VERSION=1.2.3\nVALKEY_IMAGE=valkey/valkey:9.1.9@sha256:old\nMODELS_DIRECTORY=/srv/m\n")
    assert checkout.run("pin-images.sh").returncode == 0
    lines = settings.read_text().splitlines()
    assert lines[:2] == ["POCL_VERSION=1.2.3", "MODELS_DIRECTORY=/srv/m"]
    pinned = dict(line.split("=", 1) for line in lines[2:])
    expected = {name: image for name, image in example_variables().items() if name.endswith("_IMAGE")}
    expected["VALKEY_IMAGE"] = "valkey/valkey:9.1.9"
    assert {name: image.partition("@")[0] for name, image in pinned.items()} == expected
    assert all(len(image.partition("@sha256:")[2]) == 64 for image in pinned.values())
    assert stat.S_IMODE(settings.stat().st_mode) == 0o600
    before = settings.read_text()
    assert checkout.run("pin-images.sh", failing="*prometheus*").returncode != 0
    assert settings.read_text() == before
    assert sorted(path.name for path in checkout.root.glob(".env*")) == [".env", ".env.example"]


def test_an_upgrade_migrates_first_and_goes_from_the_api_to_the_workers(checkout: Checkout) -> None:
    services = ("worker-1", "redis", "worker", "migrate", "api-2", "api", "postgres", "scheduler", "grafana")
    assert checkout.run("upgrade.sh", services=services).returncode == 0
    up = "compose up --detach --no-deps --wait"
    assert checkout.asked == [
        "compose config --services",
        "compose build migrate worker worker-1",
        "compose run --rm migrate",
        *(f"{up} {name}" for name in ("api", "api-2", "scheduler", "worker", "worker-1")),
    ]


@pytest.mark.parametrize("failing", ["*build*", "*migrate", "*wait?api", "*wait?scheduler"])
def test_an_upgrade_ends_at_the_first_failure(checkout: Checkout, failing: str) -> None:
    services = ("api", "migrate", "scheduler", "worker")
    assert checkout.run("upgrade.sh", services=services, failing=failing).returncode == 7
    whole = Checkout(checkout.root)
    stopped_at = len(whole.asked)
    assert checkout.run("upgrade.sh", services=services).returncode == 0
    assert stopped_at < len(whole.asked) - stopped_at
