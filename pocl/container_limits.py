"""How much of its machine this process may use: memory and processors by its control groups (cgroup v1 and v2).

A container sees the memory and the processors of the whole machine; its limits stand in files of its control groups.
A group is limited by those that it lies in, too. Within a container the path of a group in `/proc/self/cgroup` may be
that of the machine, which is not mounted: the mounted root is then the container's own group.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_FILES: Final = Path("/")
_MOUNT: Final = Path("sys/fs/cgroup")
_UNLIMITED: Final = ("max", "-1")


def available_memory_bytes(files: Path = _FILES, *, physical_bytes: int | None = None) -> int:
    """The memory that this process may take at most, in bytes.

    Args:
        files: the root of the file system.
        physical_bytes: the memory of the machine; asked of the system unless given.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if physical_bytes is None else physical_bytes]
    # In a system container (LXC) this table is of the container, whose groups are not to be seen from within.
    for line in _text(files / "proc/meminfo").splitlines():
        if total := re.fullmatch(r"MemTotal:\s*(\d+) kB", line.rstrip()):
            limits.append(int(total[1]) * 1024)
    for group in _groups(files, "memory"):
        # Without a limit version 2 has the word `max`, version 1 a number beyond every machine's memory. Above
        # `memory.high` a group is slowed down until it has given memory back.
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += _numbers(group / name)[:1]
    return min(limits)


def available_cpus(files: Path = _FILES, *, allowed: int | None = None) -> int:
    """How many processors this process may keep busy, 1 or more; a quota is rounded down to whole processors.

    Args:
        files: the root of the file system.
        allowed: the processors in the affinity mask of this process; asked of the system unless given.
    """
    cpus = float(_affinity() if allowed is None else allowed)
    for group in _groups(files, "cpu"):
        quota = _numbers(group / "cpu.max") or [
            *_numbers(group / "cpu.cfs_quota_us"),
            *_numbers(group / "cpu.cfs_period_us"),
        ]
        # Microseconds of processor time in each period of so many.
        if len(quota) == 2 and quota[1] > 0:
            cpus = min(cpus, quota[0] / quota[1])
    return max(1, int(cpus))


def count_oom_kills(files: Path = _FILES) -> int:
    """Processes of this control group that the kernel has killed for want of memory so far; 0 where unknown."""
    # The first of the groups is the process's own, which counts those of the groups in it.
    for group in _groups(files, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            for line in _text(group / name).splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill" and count.isdigit():
                    return int(count)
    return 0


def _groups(files: Path, controller: str) -> Iterator[Path]:
    """The directories of the groups of this process for a controller, each before the one that it lies in."""
    for line in _text(files / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        # Version 2 has one tree of all controllers, and no controllers in its line.
        mounts = [_MOUNT / controllers, _MOUNT / controller] if controllers else [_MOUNT, _MOUNT / "unified"]
        mount = next((files / each for each in mounts if (files / each).is_dir()), None)
        if mount is None:
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for length in range(len(parts), -1, -1):
            directory = mount.joinpath(*parts[:length])
            if directory.is_dir():
                yield directory


def _numbers(path: Path) -> list[int]:
    """The whole numbers in a file, in their order; none where it is not there or says that there is no limit."""
    words = _text(path).split()
    if not words or words[0] in _UNLIMITED or not all(word.isdigit() for word in words):
        return []
    return [int(word) for word in words]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _affinity() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
