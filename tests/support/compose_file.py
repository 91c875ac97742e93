"""`docker-compose.yml` as Docker Compose reads it: parsed and interpolated. No Docker is needed, and none is asked."""

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
    """A variable that the file asks for has no value; the message is the file's."""


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
    def target(self) -> str | None:
        """Of the Dockerfile; null where the image is another's."""
        target: str | None = self.raw.get("build", {}).get("target")
        return target

    @property
    def waits_for(self) -> dict[str, Condition]:
        return {name: waited["condition"] for name, waited in self.raw.get("depends_on", {}).items()}

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
    def parsed(cls) -> "ComposeFile":
        """As it stands: the variables are still in it."""
        return cls(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")))

    @cached_property
    def services(self) -> dict[str, Service]:
        return {name: Service(name, raw) for name, raw in self.tree["services"].items()}

    @property
    def variables(self) -> set[str]:
        return {found["bare"] or found["name"] for text in _texts(self.tree) for found in _REFERENCE.finditer(text)} - {
            None
        }

    def with_variables(self, variables: Mapping[str, str]) -> "ComposeFile":
        """Interpolated.

        Raises:
            VariableMissing: a variable that is needed is not there or empty.
        """
        return ComposeFile(_interpolated(self.tree, variables))


def example_variables(**filled_in: str) -> dict[str, str]:
    """`.env.example` with some of its variables filled in."""
    found = {name: value or "" for name, value in dotenv_values(EXAMPLE, interpolate=False).items()}
    assert filled_in.keys() <= found.keys()
    return {**found, **filled_in}


def image_environment() -> dict[str, str]:
    """What the Dockerfile sets for both images, PATH excepted."""
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    pairs = dict(pair.split("=", 1) for pair in block.replace("\\\n", " ").split())
    return {name: value for name, value in pairs.items() if name != "PATH"}


def seconds(duration: str) -> float:
    """A duration such as `1m30s`."""
    found = _DURATION.fullmatch(duration)
    assert found, f"{duration!r} is not a duration that is used here"
    return 60 * int(found[1] or 0) + int(found[2] or 0)


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        name, operator, rest = found["bare"] or found["name"], found["operator"] or "", found["rest"] or ""
        given = variables.get(name)
        # With a colon an empty value counts as none.
        present = bool(given) if operator.startswith(":") else given is not None
        match operator[-1:]:
            case "-":
                return str(given) if present else rest
            case "+":
                return rest if present else ""
            case "?" if not present:
                raise VariableMissing(f"{name}: {rest}")
        return given or ""

    # A dollar that is left begins nothing that Compose knows.
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
