"""Landlock: a process gives up access to files for itself and all that it starts (Linux 5.19 and later, landlock(7)).

The engine reads models and data that clients name, with libraries that were written for trusted files. No way from
there to running foreign code is known. Were there one, that code could not read the database's file and logs in the
home of the service, change a file outside of its own directories, or signal or trace the processes of the service.
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_GET_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
# Rights of files, by the numbers of <linux/landlock.h>. To list directories and to execute files stay free.
_WRITE_FILE, _READ_FILE, _TRUNCATE = 1 << 1, 1 << 2, 1 << 14
_CHANGE_DIRECTORY: Final = sum(1 << bit for bit in (4, 5, 6, 7, 8, 9, 10, 11, 12, 13))
"""Remove and make files and directories of each kind, and move them to another directory."""
_SCOPE_SIGNALS: Final = 1 << 1
_OLDEST: Final = 2
"""With the first version no file can be moved to another directory, as a cache does with whole entries."""

# Looked up once, before any fork: the child may not take the loader's lock.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Landlock:
    """A set of rules that :meth:`restrict_self` enforces in a child, between fork and exec. To be closed by the parent.

    Args:
        hidden: files and directories whose content is not read, unless they are named as readable or writable too.
        readable: what may be read below them all the same.
        writable: directories that may be read and changed, without what is hidden in them. One that does not exist is
            left out.

    Raises:
        OSError: this kernel has no Landlock, or refuses the rules.
    """

    def __init__(self, *, hidden: Sequence[Path], readable: Sequence[Path], writable: Sequence[Path]) -> None:
        version = landlock_version()
        if version < _OLDEST:
            raise OSError("this kernel has no Landlock")
        self._file_rights = _READ_FILE | _WRITE_FILE | (_TRUNCATE if version >= 3 else 0)
        handled = self._file_rights | _CHANGE_DIRECTORY
        attributes = struct.pack("=QQQ", handled, 0, _SCOPE_SIGNALS) if version >= 6 else struct.pack("=Q", handled)
        self._ruleset = _system_call(_CREATE_RULESET, attributes, len(attributes), 0)
        try:
            opened = [path.resolve() for path in (*readable, *writable)]
            secrets = [path for path in map(Path.resolve, hidden) if path not in opened]
            for path in (Path("/"), *opened):
                self._allow_all(path, secrets, _READ_FILE)
            for path in writable:
                self._allow_all(path.resolve(), secrets, self._file_rights | _CHANGE_DIRECTORY)
        except BaseException:
            self.close()
            raise

    def restrict_self(self) -> None:
        """Enforce the rules in this process for good. Between fork and exec: it calls the kernel, and nothing else."""
        assert _libc is not None
        if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or _libc.syscall(_RESTRICT_SELF, self._ruleset, 0):
            raise OSError(ctypes.get_errno(), "Landlock refuses the rules")

    def close(self) -> None:
        """Give the rules back; children that enforce them keep them."""
        os.close(self._ruleset)

    def _allow_all(self, directory: Path, hidden: Sequence[Path], rights: int) -> None:
        for path in _outside(directory, hidden):
            self._allow(path, rights)

    def _allow(self, path: Path, rights: int) -> None:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            # It is gone by now, or was never there.
            return
        try:
            allowed = rights if path.is_dir() else rights & self._file_rights
            _system_call(_ADD_RULE, self._ruleset, _PATH_BENEATH, struct.pack("=Qi", allowed, handle), 0)
        finally:
            os.close(handle)


def landlock_version() -> int:
    """The version of the kernel's Landlock; 0 where it has none, or it is switched off."""
    if _libc is None or struct.calcsize("P") < 8:
        return 0
    try:
        return _system_call(_CREATE_RULESET, None, 0, _GET_VERSION)
    except OSError:
        return 0


def _outside(directory: Path, hidden: Sequence[Path]) -> Iterator[Path]:
    """The files and directories that together are all of `directory` but what is hidden. No link is followed: what it
    leads to has a place of its own.
    """
    if directory in hidden:
        return
    if not any(path.is_relative_to(directory) for path in hidden):
        yield directory
        return
    try:
        entries = [Path(entry.path) for entry in os.scandir(directory) if not entry.is_symlink()]
    except OSError:
        return
    for entry in entries:
        yield from _outside(entry, hidden)


def _system_call(number: int, *arguments: bytes | int | None) -> int:
    assert _libc is not None
    converted = [ctypes.c_size_t(each) if isinstance(each, int) else each for each in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
