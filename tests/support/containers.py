"""The services of `docker-compose.yml` as processes of this machine: their own commands, environments, health checks,
start order, and stop signals. There are no containers: images, networks, limits and GPUs are not covered.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.compose_file import ROOT, ComposeFile, Service, image_environment
from tests.support.processes import ProcessHandle
from tests.support.waiting import eventually
from worker.processes import spawn, terminate

_HOME = "/var/lib/pocl"
# Modules that the image of the API lacks. A stub of the same name shadows the installed one.
_NOT_IN_THE_API_IMAGE = ("torch", "transformers", "safetensors", "numpy")
# Stands in for redis-cli where redis-tools is not installed.
_PING = """
import os, redis
print("PONG" if redis.Redis(port={port}, password=os.environ["REDISCLI_AUTH"]).ping() else "")
"""


@dataclass(frozen=True)
class HostPaths:
    """The paths and ports of this machine in place of those in containers: the only departures from the file."""

    root: Path
    models: Path
    redis: Path
    """The binary of the Valkey or Redis server."""
    postgres: Path
    """The directory of the PostgreSQL programs."""
    socket: Path
    """The directory of the PostgreSQL socket."""
    api_port: int
    redis_port: int
    postgres_port: int

    def translate(self, text: str, service: Service) -> str:
        replacements = {
            _HOME: str(self.root / service.name / "home"),
            "/tmp/": f"{self.root / service.name}/",
            "/etc/valkey/valkey.conf": str(self.root / "valkey.conf"),
            "/run/secrets": str(self.root / service.name / "secrets"),
            "/data": str(self.root / "data"),
            "0.0.0.0": "127.0.0.1",
            ":8000": f":{self.api_port}",
        }
        if text == "8000":
            return str(self.api_port)
        return re.sub("|".join(map(re.escape, replacements)), lambda match: replacements[match[0]], text)

    def command(self, words: list[str], service: Service) -> list[str]:
        programs = {
            "python": sys.executable,
            "pg_isready": str(self.postgres / "pg_isready"),
        }
        return [programs.get(words[0], words[0]), *(self.translate(word, service) for word in words[1:])]

    def environment(self, service: Service) -> dict[str, str]:
        variables = {**image_environment(), **service.environment} if service.target else service.environment
        # The code is in the checkout and not in the image. Engines run in another directory, and find it by this.
        code = [ROOT, self.root / "not-in-the-image"] if service.target == "api" else [ROOT]
        return {
            **{name: self.translate(value, service) for name, value in variables.items()},
            "PATH": f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(str(place) for place in reversed(code)),
            "PGPORT": str(self.postgres_port),
        }

    def provision(self, compose: ComposeFile) -> None:
        """Create what the images and the volumes hold."""
        for name in _NOT_IN_THE_API_IMAGE:
            module = self.root / "not-in-the-image" / name / "__init__.py"
            module.parent.mkdir(parents=True)
            module.write_text(f"raise ImportError('{name} is not in this image')\n")
        for volume in ("artifacts", "data", "bin"):
            (self.root / volume).mkdir()
        content = self.translate((ROOT / "deploy" / "valkey" / "valkey.conf").read_text(), compose.services["redis"])
        (self.root / "valkey.conf").write_text(f"{content}\nbind 127.0.0.1\nport {self.redis_port}\n")
        for service in compose.services.values():
            self._mount(service)
            secrets = self.root / service.name / "secrets"
            secrets.mkdir()
            for name in service.secrets:
                (secrets / name).symlink_to(compose.tree["secrets"][name]["file"])
        server = self.root / "bin" / "valkey-server"
        server.write_text(f'#!/bin/sh\nexec {self.redis} "$@"\n')
        server.chmod(0o755)
        self._provide_valkey_cli()

    def _mount(self, service: Service) -> None:
        home = self.root / service.name / "home"
        home.mkdir(parents=True)
        for volume in service.raw.get("volumes", ()):
            # Its third part says that it is read only.
            parts = volume.split(":") if isinstance(volume, str) else (volume["source"], volume["target"])
            source, target = parts[:2]
            if target.startswith(f"{_HOME}/"):
                place = self.models if source == str(self.models) else self.root / source
                (home / target.removeprefix(f"{_HOME}/")).symlink_to(place)

    def _provide_valkey_cli(self) -> None:
        client = self.root / "bin" / "valkey-cli"
        if path := shutil.which("valkey-cli") or shutil.which("redis-cli"):
            client.write_text(f'#!/bin/sh\nexec {path} -p {self.redis_port} "$@"\n')
        else:
            client.write_text(f"#!{sys.executable}\n{_PING.format(port=self.redis_port)}")
        client.chmod(0o755)


class Containers:
    """Starts services in the order that the file asks for. PostgreSQL must run already."""

    def __init__(self, compose: ComposeFile, host: HostPaths) -> None:
        self.compose = compose
        self.host = host
        self.processes: dict[str, ProcessHandle] = {}

    def up(self, *names: str) -> None:
        """Start services, each after those that it depends on."""
        for name in names:
            service = self.compose.services[name]
            for other, condition in service.dependencies.items():
                if other not in self.processes and other != "postgres":
                    self.up(other)
                if condition == "service_completed_successfully":
                    assert self.processes[other].wait_for_exit() == 0, self.processes[other].log
                else:
                    self.wait_until_healthy(other)
            self.processes[name] = self._start(service)

    def run(self, name: str, *command: str) -> str:
        """Run a command as `docker compose exec` does in a service; its output."""
        service = self.compose.services[name]
        completed = subprocess.run(
            self.host.command(list(command), service),
            env=self.host.environment(service),
            cwd=self.host.root / name / "home",
            capture_output=True,
            text=True,
            check=True,
        )
        return completed.stdout

    def is_healthy(self, name: str) -> bool:
        service = self.compose.services[name]
        kind, *test = service.raw["healthcheck"]["test"]
        command = self.host.command(test if kind == "CMD" else ["/bin/sh", "-c", *test], service)
        completed = subprocess.run(command, env=self.host.environment(service), cwd=self.host.root, capture_output=True)
        return completed.returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        def runs_and_is_healthy() -> bool:
            handle = self.processes.get(name)
            assert handle is None or handle.process.poll() is None, f"{name} exited: {handle.log[-3000:]}"
            return self.is_healthy(name)

        eventually(runs_and_is_healthy, within=60, every=0.2, what=f"{name} is healthy")

    def stop(self, name: str) -> int:
        """Stop a service as `docker compose stop` does; the exit status."""
        service, handle = self.compose.services[name], self.processes[name]
        handle.process.send_signal(signal.Signals[service.stop_signal])
        return handle.wait_for_exit(within=service.grace)

    def kill(self) -> None:
        for handle in self.processes.values():
            terminate(handle.process, grace=0)

    def _start(self, service: Service) -> ProcessHandle:
        log = self.host.root / f"{service.name}.log"
        with log.open("ab") as output:
            process = spawn(
                self.host.command(service.command, service),
                stdout=output,
                environment=self.host.environment(service),
                directory=self.host.root / service.name,
            )
        return ProcessHandle(process, log)


def lacks_engine_libraries(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment cannot import torch."""
    return (
        subprocess.run([sys.executable, "-c", "import torch"], env=dict(environment), capture_output=True).returncode
        != 0
    )
