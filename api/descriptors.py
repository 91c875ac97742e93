"""How many connections fit into the file descriptors that the process may have.

A process that runs out of descriptors accepts nobody, health probes included, and says nothing of it.
"""

import resource
from typing import Final

import structlog

from domain.settings import Settings

_OWN_DESCRIPTORS: Final = 256
"""For database connections, logs, libraries, and connections that are told that they are too many."""
_MIN_CONNECTIONS: Final = 64
_MOST_FOLLOWERS: Final = 2 / 3
"""The part of the connections that may follow jobs; the others are for short requests."""

_log = structlog.get_logger(__name__)


class TooFewDescriptors(Exception):
    """The limit on open files leaves no room to serve; the message says what to do."""


def fit_to_descriptors(settings: Settings, available: int) -> Settings:
    """The settings with limits that fit.

    Args:
        available: how many descriptors the process may have.

    Raises:
        TooFewDescriptors: not even a few connections would fit.
    """
    fitting = available - _OWN_DESCRIPTORS - settings.max_transfers
    if fitting < _MIN_CONNECTIONS:
        needed = _OWN_DESCRIPTORS + settings.max_transfers + _MIN_CONNECTIONS
        raise TooFewDescriptors(
            f"This process may open {available} files and needs {needed} to serve at all: raise its limit"
            " (ulimit -n, LimitNOFILE=, ulimits of Compose), or lower POCL_MAX_TRANSFERS."
        )
    connections = min(settings.max_connections, fitting)
    followers = min(settings.max_followers, int(connections * _MOST_FOLLOWERS))
    return settings.model_copy(update={"max_connections": connections, "max_followers": followers})


def claim_descriptors(settings: Settings) -> Settings:
    """Raise the soft limit on open files as far as the settings need it and the hard limit allows, and log what had
    to be lowered.

    Returns:
        the settings with limits that fit.

    Raises:
        TooFewDescriptors: the hard limit is too low to serve at all.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = settings.max_connections + settings.max_transfers + _OWN_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        _log.info("open_files_raised", before=soft, now=raised)
        soft = raised
    fitted = settings if soft == resource.RLIM_INFINITY else fit_to_descriptors(settings, soft)
    for name in ("max_connections", "max_followers"):
        wanted, given = getattr(settings, name), getattr(fitted, name)
        if given < wanted:
            _log.warning(
                "limit_lowered",
                setting=f"POCL_{name.upper()}",
                wanted=wanted,
                now=given,
                open_files=soft,
                hint="Raise the hard limit on open files of the API (ulimit -Hn).",
            )
    return fitted
