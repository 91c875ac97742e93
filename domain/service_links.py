"""Environment variables that Kubernetes, as Docker's links before it, sets for each service of a namespace.

A service named `pocl` sets `POCL_PORT=tcp://10.3.0.7:8000` in every pod, and `pocl-worker` sets `POCL_WORKER_PORT`:
names of settings that nobody wrote.
"""

import re
from collections.abc import Mapping
from typing import Final

import structlog

_log = structlog.get_logger(__name__)

_NAME: Final = re.compile(
    r"POCL_(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)",
    re.IGNORECASE,
)
_PORT: Final = re.compile(r"POCL_(?:\w+_)?PORT", re.IGNORECASE)
_ADDRESS: Final = re.compile(r"(?:tcp|udp|sctp)://\S+", re.IGNORECASE)


def is_service_link(name: str, value: str) -> bool:
    """Whether a variable has the form of one that describes a service of the cluster."""
    if _NAME.fullmatch(name):
        return True
    # `POCL_PORT` is a setting as well: there the value tells.
    return _PORT.fullmatch(name) is not None and _ADDRESS.fullmatch(value) is not None


def service_links(environment: Mapping[str, str]) -> list[str]:
    """The names of the variables of that form."""
    return sorted(name for name, value in environment.items() if is_service_link(name, value))


def log_service_links(environment: Mapping[str, str]) -> None:
    """Say which variables of that form are ignored, if there are any."""
    if links := service_links(environment):
        _log.warning("service_links_ignored", variables=links, hint="Kubernetes sets them for services named pocl.")
