"""Arrays of the host as tensors of a device, in one copy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_WORD = 8
"""Bytes of an element of the buffer: every array begins at a multiple of it, so that any dtype can be viewed there."""
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.bool_): torch.bool}

Array = npt.NDArray[Any]


def to_device(arrays: Mapping[str, Array], device: torch.device | str | None) -> dict[str, Tensor]:
    """The arrays as tensors of the same shapes and dtypes on `device`, by the same names; the CPU where it is None.

    All share one buffer, which is copied once. For CUDA it is pinned and the copy is asynchronous: the host does not
    wait, and what is queued on the current stream afterwards sees the values.

    Raises:
        KeyError: for an array that is neither int64 nor int32 nor bool.
    """
    target = torch.device("cpu" if device is None else device)
    words = {name: -(-array.nbytes // _WORD) for name, array in arrays.items()}
    buffer = torch.empty(sum(words.values()), dtype=torch.int64, pin_memory=target.type == "cuda")
    host = buffer.numpy()
    start = 0
    for name, array in arrays.items():
        host[start : start + words[name]].view(array.dtype)[: array.size] = array.reshape(-1)
        start += words[name]
    copied = buffer.to(target, non_blocking=True)
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, array in arrays.items():
        flat = copied[start : start + words[name]].view(_DTYPES[array.dtype])
        tensors[name] = flat[: array.size].view(array.shape)
        start += words[name]
    return tensors
