"""The limits of an engine's memory."""

import subprocess
import sys

import pytest

from worker.engine_limits import limit_engine, memory_limit

GIB = 1 << 30


def test_limit_follows_from_the_estimate_and_leaves_half_of_the_machine() -> None:
    assert memory_limit(10 * GIB, 4, 64 * GIB) == 46 * GIB
    assert memory_limit(GIB, 4, 64 * GIB) == 32 * GIB
    assert memory_limit(None, 4, 64 * GIB) == 64 * GIB
    assert memory_limit(GIB, 0, 64 * GIB) is None


@pytest.mark.system
@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
def test_process_is_told_that_there_is_no_more_memory_and_would_die_first() -> None:
    code = (
        "input()\n"
        "print(open('/proc/self/oom_score_adj').read().strip())\n"
        "try: bytearray(1 << 30)\n"
        "except MemoryError: print('no memory')"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        limit_engine(process.pid, GIB // 2)
        output, _ = process.communicate("\n")
    assert output.split("\n")[:2] == ["900", "no memory"]
