"""Memory and processors of a container, out of trees of files as the two versions of control groups lay them out."""

from pathlib import Path

import pytest

from pocl.container_limits import available_cpus, available_memory_bytes, count_oom_kills

GIB = 1 << 30
UNLIMITED_V1 = "9223372036854771712"
V2 = {"proc/self/cgroup": "0::/"}
V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:memory:/pod/box\n3:cpu,cpuacct:/pod/box\n0::/"}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 16 * GIB, id="no control groups"),
        pytest.param({**V2, "sys/fs/cgroup/memory.max": "max"}, 16 * GIB, id="v2 without a limit"),
        pytest.param({**V2, "sys/fs/cgroup/memory.max": str(2 * GIB)}, 2 * GIB, id="v2"),
        pytest.param({**V2, "sys/fs/cgroup/memory.max": str(64 * GIB)}, 16 * GIB, id="limit beyond the machine"),
        pytest.param(
            {**V2, "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/memory.high": str(3 * GIB)}, 3 * GIB, id="v2 high"
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/memory.max": str(GIB),
                "sys/fs/cgroup/a/b/memory.max": "max",
            },
            GIB,
            id="limit of the group above",
        ),
        pytest.param(
            {"proc/self/cgroup": "0::/docker/0123", "sys/fs/cgroup/memory.max": str(GIB)},
            GIB,
            id="path of the machine, seen from within the container",
        ),
        pytest.param(
            {**V1, "sys/fs/cgroup/memory/pod/box/memory.limit_in_bytes": UNLIMITED_V1}, 16 * GIB, id="v1 no limit"
        ),
        pytest.param({**V1, "sys/fs/cgroup/memory/pod/box/memory.limit_in_bytes": str(GIB)}, GIB, id="v1"),
        pytest.param({**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GIB)}, GIB, id="v1 mounted root"),
        pytest.param({**V2, "sys/fs/cgroup/memory.max": "nonsense"}, 16 * GIB, id="unreadable"),
        pytest.param({"proc/meminfo": "MemTotal:  4194304 kB\nMemFree:  1 kB"}, 4 * GIB, id="table of a container"),
        pytest.param({"proc/meminfo": "MemTotal:\nMemFree: 1 kB"}, 16 * GIB, id="table that is cut off"),
        pytest.param(
            {
                "proc/self/cgroup": "12:cpuset:/\n5:memory:/lxc/box\n0::/../../box",
                "sys/fs/cgroup/memory/lxc/memory.limit_in_bytes": str(2 * GIB),
                "sys/fs/cgroup/unified/box/cgroup.controllers": "",
            },
            2 * GIB,
            id="v1 and v2 side by side",
        ),
    ],
)
def test_memory_is_that_of_the_narrowest_group(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_memory_bytes(tree(tmp_path, files), physical_bytes=16 * GIB) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 8, id="no control groups"),
        pytest.param({**V2, "sys/fs/cgroup/cpu.max": "max 100000"}, 8, id="v2 without a limit"),
        pytest.param({**V2, "sys/fs/cgroup/cpu.max": "250000 100000"}, 2, id="v2 two and a half"),
        pytest.param({**V2, "sys/fs/cgroup/cpu.max": "20000 100000"}, 1, id="v2 a fifth"),
        pytest.param({**V2, "sys/fs/cgroup/cpu.max": "6400000 100000"}, 8, id="v2 more than there are"),
        pytest.param(
            {
                **V1,
                "sys/fs/cgroup/cpu/pod/box/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/pod/box/cpu.cfs_period_us": "100000",
            },
            8,
            id="v1 without a limit",
        ),
        pytest.param(
            {
                **V1,
                "sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs_period_us": "100000",
            },
            4,
            id="v1 joint mount",
        ),
    ],
)
def test_processors_are_those_of_the_narrowest_quota(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_cpus(tree(tmp_path, files), allowed=8) == expected


def test_this_machine_has_memory_and_a_processor() -> None:
    assert available_memory_bytes() > 1 << 28
    assert available_cpus() >= 1


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        pytest.param({**V2, "sys/fs/cgroup/memory.events": "low 0\noom 3\noom_kill 2"}, 2, id="v2"),
        pytest.param(
            {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.events": "oom_kill 4"}, 4, id="v2 group of its own"
        ),
        pytest.param({**V1, "sys/fs/cgroup/memory/pod/box/memory.oom_control": "under_oom 0\noom_kill 1"}, 1, id="v1"),
        pytest.param({**V2, "sys/fs/cgroup/memory.events": "nonsense"}, 0, id="unreadable"),
        pytest.param({}, 0, id="no control groups"),
    ],
)
def test_oom_kills_are_read_from_the_control_group(tmp_path: Path, files: dict[str, str], kills: int) -> None:
    assert count_oom_kills(tree(tmp_path, files)) == kills
