"""The digest of a model: equal for equal weights and config, so that equal digests mean equal outputs.

The digest of a model on disk is kept by its files (:class:`DigestStore`), since computing it reads all weights.
"""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.errors import DiskFull
from pocl.models.heads import output_head
from pocl.storage.manifest import replace_file

# Config entries that change no output: where the model was read from and by which version. The dtype is hashed with
# each tensor.
_IGNORED_ENTRIES = {"transformers_version", "_name_or_path", "dtype"}
_MODEL_FILES = {".safetensors", ".json"}
_MAX_KEPT_DIGESTS = 256
_SETTLED_SECONDS = 2.0
"""A file that is younger may change once more without a change of its modification time."""


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


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, in hexadecimal, over what turns text into ids and ids into text, and over the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rule = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{rule}\n{special}".encode()).hexdigest()


@dataclass(frozen=True)
class DigestStore:
    """Digests of models on disk, by path, size, modification time and inode of their files."""

    path: Path
    """A file, which is made if need be; what is damaged counts as empty."""

    def key(self, model: Path, part: str = "") -> str | None:
        """The key of a model's files as they are now; None where they cannot be looked at, or are too new.

        Args:
            model: A directory, or a single file.
            part: Which part of the model the digest is of; the whole unless given.
        """
        try:
            files = (
                [model] if model.is_file() else sorted(path for path in model.iterdir() if path.suffix in _MODEL_FILES)
            )
            stats = [(path.name, path.stat()) for path in files]
        except OSError:
            return None
        newest = max((stat.st_mtime for _, stat in stats), default=0.0)
        if not stats or time.time() - newest < _SETTLED_SECONDS:
            return None
        facts = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats]
        content = [transformers.__version__, str(model.absolute()), part, facts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def find(self, key: str | None) -> str | None:
        """The digest that is kept under `key`."""
        return None if key is None else self._read().get(key)

    def keep(self, key: str | None, digest: str) -> None:
        """Keep a digest, and drop the oldest beyond a bound; a disk without room keeps nothing."""
        if key is None:
            return
        digests = {name: kept for name, kept in self._read().items() if name != key} | {key: digest}
        latest = dict(list(digests.items())[-_MAX_KEPT_DIGESTS:])
        with suppress(OSError, DiskFull):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(latest, indent=0) + "\n")

    def _read(self) -> dict[str, str]:
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return {str(key): str(digest) for key, digest in content.items()} if isinstance(content, dict) else {}


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
