"""The number format of products; weights and optimiser stay fp32."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import transformers

from pocl.errors import DeviceUnavailable


@dataclass(frozen=True)
class Precision:
    """`bf16`: products of activations and weights in bf16 under autocast; `fp32`: everything in fp32."""

    name: Literal["fp32", "bf16"]
    device: torch.device

    @property
    def weights(self) -> torch.dtype:
        """The dtype of frozen weights: rounding them once loses nothing over rounding them at each product."""
        return torch.bfloat16 if self.name == "bf16" else torch.float32

    def autocast(self) -> AbstractContextManager[None]:
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def choose_precision(requested: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """The precision of a run; `auto` is bf16 only where the hardware multiplies it, since emulation is much slower."""
    if requested == "auto":
        return Precision("bf16" if _multiplies_bf16(device) else "fp32", device)
    return Precision(requested, device)


def choose_device(requested: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of a run.

    Raises:
        DeviceUnavailable: the specification names a GPU, and torch can open none.
    """
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable()
    return torch.device(requested)


def machine_fingerprint(device: torch.device, *, with_threads: bool = True) -> str:
    """What the bits of a result depend on besides its inputs: versions, hardware and threads.

    Args:
        with_threads: Whether threads of the host count: they divide the sums of a CPU, and none of a GPU.
    """
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    parts = [f"torch {torch.__version__}", f"transformers {transformers.__version__}", hardware]
    if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        # Other kernels, whose results a run must not take from the cache for its own.
        parts.append("deterministic")
    if with_threads:
        parts.append(f"{torch.get_num_threads()} threads")
    return ", ".join(parts)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
