"""The digest of a model: equal for equal weights and config, so that equal digests mean equal outputs."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import PreTrainedModel

from pocl.models.heads import output_head

# Config entries that change no output: where the model was read from and by which version. The dtype is hashed with
# each tensor.
_IGNORED_ENTRIES = {"transformers_version", "_name_or_path", "dtype"}


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256, in hexadecimal, over the config and every weight and stored buffer: name, type, shape and bits.

    Tensors are hashed in threads (hashlib releases the interpreter lock), so this takes about as long as
    reading the weights from memory once.
    """
    tensors = _distinct_tensors(model)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_tensor_digest, tensors.values())
        digest = hashlib.sha256(_config_bytes(model))
        for name, tensor_digest in zip(tensors, digests, strict=True):
            digest.update(f"{name}\n".encode() + tensor_digest)
    return digest.hexdigest()


def head_digest(model: PreTrainedModel) -> str:
    """SHA-256, in hexadecimal, over the tensors of the output head: name, type, shape and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(output_head(model).state_dict().items()):
        digest.update(f"{name}\n".encode() + _tensor_digest(tensor))
    return digest.hexdigest()


def _distinct_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors by name, in the order of their names; of tied tensors the first name alone."""
    by_identity: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        by_identity.setdefault(id(tensor), (name, tensor))
    return dict(by_identity.values())


def _config_bytes(model: PreTrainedModel) -> bytes:
    config = {name: value for name, value in model.config.to_dict().items() if name not in _IGNORED_ENTRIES}
    return json.dumps(config, sort_keys=True, default=str).encode()


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{flat.dtype} {tuple(tensor.shape)}\n".encode())
    # numpy has no bfloat16, and the digest needs bytes alone.
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()
