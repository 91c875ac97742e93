"""`docker-compose.yml` as Docker Compose reads it: parsed and interpolated, without Docker."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from dotenv import dotenv_values

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker-compose.yml"
EXAMPLE = ROOT / ".env.example"
DOCKERFILE = ROOT / "docker" / "Dockerfile"

Condition = Literal["service_started", "service_healthy", "service_completed_successfully"]

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_REFERENCE = re.compile(
    rf"\$(?:(?P<dollar>\$)|(?P<bare>{_NAME})|\{{(?P<name>{_NAME})(?:(?P<operator>:?[-?+])(?P<rest>[^}}$]*))?\}})"
)
_DURATION = re.compile(r"(?=\d)(?:(\d+)m)?(?:(\d+)s)?")


class VariableMissing(Exception):
    """A required variable has no value; the message is that of the file."""


@dataclass(frozen=True)
class Service:
    name: str
    raw: Mapping[str, Any]

    @property
    def command(self) -> list[str]:
        return list(self.raw["command"])

    @property
    def environment(self) -> dict[str, str]:
        return dict(self.raw.get("environment", {}))

    @property
    def secrets(self) -> list[str]:
        """The names of the secrets that it mounts below /run/secrets."""
        return list(self.raw.get("secrets", ()))

    @property
    def networks(self) -> set[str]:
        return set(self.raw.get("networks", ()))

    @property
    def target(self) -> str | None:
        """The target of the Dockerfile; null where the image is not built from it."""
        target: str | None = self.raw.get("build", {}).get("target")
        return target

    @property
    def dependencies(self) -> dict[str, Condition]:
        return {name: dependency["condition"] for name, dependency in self.raw.get("depends_on", {}).items()}

    @property
    def stop_signal(self) -> str:
        return str(self.raw["stop_signal"])

    @property
    def grace(self) -> float:
        return seconds(self.raw["stop_grace_period"])


@dataclass(frozen=True)
class ComposeFile:
    tree: Mapping[str, Any]

    @classmethod
    def load(cls) -> "ComposeFile":
        """Parse the file, without interpolating its variables."""
        return cls(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")))

    @cached_property
    def services(self) -> dict[str, Service]:
        return {name: Service(name, raw) for name, raw in self.tree["services"].items()}

    @property
    def variables(self) -> set[str]:
        return {match["bare"] or match["name"] for text in _texts(self.tree) for match in _REFERENCE.finditer(text)} - {
            None
        }

    def with_variables(self, variables: Mapping[str, str]) -> "ComposeFile":
        """The file with its variables interpolated.

        Raises:
            VariableMissing: a required variable is missing or empty.
        """
        return ComposeFile(_interpolated(self.tree, variables))


def example_variables(**filled_in: str) -> dict[str, str]:
    """`.env.example` with some of its variables filled in."""
    variables = {name: value or "" for name, value in dotenv_values(EXAMPLE, interpolate=False).items()}
    assert filled_in.keys() <= variables.keys()
    return {**variables, **filled_in}


def dockerfile_stage(name: str) -> str:
    """The part of the Dockerfile that makes a stage."""
    text = DOCKERFILE.read_text(encoding="utf-8")
    (found,) = re.findall(rf"^(FROM \S+ AS {name}\n(?:(?!FROM).*\n)*)", text, re.MULTILINE)
    return str(found)


def image_environment() -> dict[str, str]:
    """The variables that the Dockerfile sets for both images, except PATH."""
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", dockerfile_stage("base"), re.MULTILINE)
    pairs = dict(pair.split("=", 1) for pair in block.replace("\\\n", " ").split())
    return {name: value for name, value in pairs.items() if name != "PATH"}


def seconds(duration: str) -> float:
    """A duration such as `1m30s`."""
    match = _DURATION.fullmatch(duration)
    assert match, f"{duration!r} is not a duration that is used here"
    return 60 * int(match[1] or 0) + int(match[2] or 0)


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match["dollar"]:
            return "$"
        name, operator, rest = match["bare"] or match["name"], match["operator"] or "", match["rest"] or ""
        setting = variables.get(name)
        # With a colon an empty value counts as none.
        present = bool(setting) if operator.startswith(":") else setting is not None
        match operator[-1:]:
            case "-":
                return str(setting) if present else rest
            case "+":
                return rest if present else ""
            case "?" if not present:
                raise VariableMissing(f"{name}: {rest}")
        return setting or ""

    # A dollar that is left starts no reference that Compose knows.
    assert "$" not in _REFERENCE.sub("", text), f"cannot be interpolated: {text}"
    return _REFERENCE.sub(value, text)


def _interpolated(tree: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(tree, str):
        return interpolate(tree, variables)
    if isinstance(tree, dict):
        return {key: _interpolated(value, variables) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_interpolated(value, variables) for value in tree]
    return tree


def _texts(tree: Any) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return [text for each in below for text in _texts(each)]
