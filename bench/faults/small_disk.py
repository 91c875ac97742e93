"""A disk of its own for a service into which faults are injected: small, real, and filled and freed at will."""

import os
import subprocess
import sys
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
    """Write a file until so many bytes of its disk are free."""
    disk = os.statvfs(ballast.parent)
    size = disk.f_bavail * disk.f_frsize - free_bytes
    with ballast.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, max(size, _PAGE))
