"""Memory of a piece of work on its device: of the card as torch allocates it, or of this process."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from bench.memory import return_freed_memory, status_bytes


def held_bytes(device: torch.device) -> int:
    """What is held now."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return_freed_memory()
    return status_bytes("VmRSS")


def peak_increase(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `work` holds at once besides what is held before it."""
    before = held_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    # This resets the peak of the process.
    Path("/proc/self/clear_refs").write_text("5")
    work()
    return max(0, status_bytes("VmHWM") - before)
