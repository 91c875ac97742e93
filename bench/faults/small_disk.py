"""A disk of its own for a service into which faults are injected: small, real, and filled and freed at will."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

NAMESPACES: Final = (("unshare", "--user", "--map-root-user", "--mount"), ("unshare", "--mount"))
"""The commands that enter a mount namespace: for any user where user namespaces are allowed, and for root."""
_INSIDE: Final = "BENCH_INSIDE_NAMESPACE"
_PAGE: Final = 4096


def find_namespace() -> Sequence[str] | None:
    """The command that enters a mount namespace here; null where none is allowed."""
    for prefix in NAMESPACES:
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return None


def enter_namespace() -> bool:
    """Replace this process by one that may mount disks which nobody else sees; whether it may, now or already."""
    if _INSIDE in os.environ:
        return True
    prefix = find_namespace()
    if prefix is not None:
        os.environ[_INSIDE] = "1"
        os.execvp(prefix[0], [*prefix, sys.executable, *sys.orig_argv[1:]])
    return False


def mount(directory: Path, megabytes: int) -> None:
    """Mount an empty disk of this size over a directory; it goes with the namespace."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", directory], check=True)


def fill(ballast: Path, free_bytes: int) -> None:
    """Write a file until its disk, to which others write meanwhile, has no page more than so many bytes free."""
    with ballast.open("wb") as out:
        size = _free_bytes(ballast.parent) - free_bytes
        while size >= _PAGE:
            try:
                os.posix_fallocate(out.fileno(), os.fstat(out.fileno()).st_size, size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                # Somebody else has written since the free bytes were counted.
                size //= 2
            else:
                size = _free_bytes(ballast.parent) - free_bytes


def wait_for_space(directory: Path, free_bytes: int, *, within: float = 60) -> None:
    """Wait until a disk has as many bytes free again, of a large file that was removed: the kernel gives its pages back
    when it comes to it, which took 17 s on a busy machine.

    Raises:
        TimeoutError: it has not after so many seconds.
    """
    deadline = time.monotonic() + within
    while _free_bytes(directory) < free_bytes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{directory} has {_free_bytes(directory)} bytes free, and not {free_bytes}")
        time.sleep(0.05)


def _free_bytes(directory: Path) -> int:
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize
