"""One name for equal weights: models with the same digest answer alike."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedModel

# Where a model was read from and by which version changes nothing about it; the type is hashed with each tensor.
_PASSING = {"transformers_version", "_name_or_path", "dtype"}


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256, in hexadecimal, over the config and every weight and stored buffer: name, type, shape and bits.

    Tensors are hashed in threads (hashlib lets go of the interpreter), so this takes about as long as
    reading the weights from memory once.
    """
    tensors = _distinct(model)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_tensor_digest, tensors.values())
        whole = hashlib.sha256(_config_bytes(model))
        for name, digest in zip(tensors, digests, strict=True):
            whole.update(f"{name}\n".encode() + digest)
    return whole.hexdigest()


def _distinct(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors by name, tied ones once, in the order of their names."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _config_bytes(model: PreTrainedModel) -> bytes:
    config = {name: value for name, value in model.config.to_dict().items() if name not in _PASSING}
    return json.dumps(config, sort_keys=True, default=str).encode()


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{flat.dtype} {tuple(tensor.shape)}\n".encode())
    # numpy has no bfloat16, but bytes are all that is wanted.
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
