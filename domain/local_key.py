"""The key of a service that nobody gave one: made at its first start, and kept in `POCL_HOME` for its user alone.

The service, its examples and its commands read the same file. Whoever can read it may do everything, so neither the
file nor the directory may be open to others.
"""

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final

import structlog

from domain.environment import SettingsInvalid

FILE_NAME: Final = "api-key"
_SECRET_BYTES: Final = 32
_MAX_BYTES: Final = 1024
_KEY: Final = re.compile(r"pocl_local_[0-9a-f]{64}")
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO

_log = structlog.get_logger(__name__)


def secure_home(home: Path) -> None:
    """Make the directory with mode 0700, or take the access of others away from one that exists.

    Raises:
        SettingsInvalid: it cannot be made, or others may write to it and this user cannot change that.
    """
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or "it cannot be used"
        raise SettingsInvalid(f"POCL_HOME: {reason}: {home}. Set it to a directory that this user may write.") from None
    status = home.stat()
    mode = stat.S_IMODE(status.st_mode)
    if not mode & _OTHERS:
        return
    try:
        home.chmod(mode & ~_OTHERS)
    except OSError:
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise SettingsInvalid(
                f"POCL_HOME: others may write to {home} (mode {mode:o}), which belongs to user {status.st_uid}: name a"
                " directory of this user's own, or take that away by chmod 700."
            ) from None
        _log.warning("home_open_to_others", home=str(home), mode=f"{mode:o}", hint="Run: chmod 700 on it.")
    else:
        _log.warning("home_closed_to_others", home=str(home), mode_before=f"{mode:o}", mode=f"{mode & ~_OTHERS:o}")


def make_local_key(home: Path) -> str:
    """The key of the service below `home`: the one that is there, or a new one.

    Processes that start together get the same one.

    Raises:
        SettingsInvalid: as :func:`read_local_key` says, or the file cannot be written.
    """
    file = home / FILE_NAME
    if (present := read_local_key(home)) is not None:
        return present
    try:
        written = _write_new(home)
    except OSError as error:
        raise SettingsInvalid(f"POCL_HOME: no key can be written below {home}: {error.strerror}.") from None
    try:
        # Unlike a rename, this fails where another process was quicker.
        os.link(written, file)
    except FileExistsError:
        pass
    finally:
        written.unlink()
    present = read_local_key(home)
    assert present is not None, "the file was there a moment ago"
    return present


def replace_local_key(home: Path) -> str:
    """Write a new key in place of the one below `home`, and return it.

    Raises:
        OSError: the file cannot be written.
    """
    written = _write_new(home)
    os.replace(written, home / FILE_NAME)
    return (home / FILE_NAME).read_text(encoding="ascii").strip()


def read_local_key(home: Path) -> str | None:
    """The key below `home`; null where there is none.

    Raises:
        SettingsInvalid: the file is no file of this user alone, or holds no key.
    """
    file = home / FILE_NAME
    advice = "remove it, and the next start makes another, or run: chmod 600 on it, if nobody else can have read it."
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsInvalid(f"POCL_HOME: the key {file} cannot be read ({error.strerror}): {advice}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _OTHERS:
            raise SettingsInvalid(
                f"POCL_HOME: the key {file} is not readable and writable by this user alone: {advice}"
            )
        text = os.read(descriptor, _MAX_BYTES).decode("ascii", errors="replace").strip()
    finally:
        os.close(descriptor)
    if not _KEY.fullmatch(text):
        raise SettingsInvalid(f"POCL_HOME: {file} holds no key: {advice}")
    return text


def _write_new(home: Path) -> Path:
    """A new key in a file of this user alone, beside the one that it is for."""
    file = home / f".{FILE_NAME}-{secrets.token_hex(8)}"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as opened:
        opened.write(f"pocl_local_{secrets.token_hex(_SECRET_BYTES)}\n")
        opened.flush()
        os.fsync(descriptor)
    return file
