"""Limits of an engine's memory: it is told that there is no more before the machine runs out, and dies first."""

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

_OOM_SCORE: Final = 900
"""Of 1000: where memory runs out the kernel ends the process with the highest score, by its memory plus this."""
_BASE_BYTES: Final = 6 << 30
"""What an engine may take besides its job's share: libraries, stacks and buffers, however small its models are."""


def memory_limit(estimate_bytes: int | None, factor: float, available_bytes: int) -> int | None:
    """How many bytes of memory of its own an engine on the CPU may have; None for no limit.

    An estimate leaves out what activations take, so a job may have half of the machine whatever its estimate is. One
    without an estimate may have what there is.

    Args:
        estimate_bytes: what the plan of the job says; None where its models were not at hand.
        factor: how many times its estimate a job may take; 0 sets no limit.
        available_bytes: the memory that this worker may use.
    """
    if not factor:
        return None
    if estimate_bytes is None:
        return available_bytes
    return max(_BASE_BYTES + int(estimate_bytes * factor), available_bytes // 2)


def limit_engine(pid: int, memory_bytes: int | None) -> None:
    """Limit a process that has just been started, and with it all that it will start. It does nothing without Linux.

    An allocation beyond the limit fails in the process, which the engine reports as `out_of_memory`. No core dump is
    written: it would hold the token of the Hub.
    """
    if sys.platform != "linux":
        return
    # A process that has ended already needs no limits.
    with suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(_OOM_SCORE))
    with suppress(OSError, ValueError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        with suppress(OSError, ValueError):
            # Private memory that can be written: mapped files and the address space of a GPU do not count.
            resource.prlimit(pid, resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
