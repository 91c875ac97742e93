"""The weights of a model directory under their names in GGUF, in the order of rows that llama.cpp computes with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from safetensors import safe_open

from pocl.errors import GgufUnsupported, ModelUnsupported
from pocl.export.gguf.architectures import Architecture

Array = np.ndarray[Any, np.dtype[Any]]

_ROPE_DIVISORS: Final = "rope_freqs.weight"
_HEAD: Final = "lm_head.weight"
_DERIVED: Final = ("rotary_emb.inv_freq", "masked_bias", ".attn.bias")
"""Buffers that old files hold and no model reads."""


@dataclass(frozen=True)
class StoredTensor:
    """A weight that is read when it is written."""

    name: str
    """Its name in GGUF."""
    shape: tuple[int, ...]
    file: Path | None
    """Where it is; None of one that is computed."""
    own_name: str
    """Its name in that file."""
    heads: int
    """Of queries or keys whose rows are put into another order: how many heads they have; 0 of all others."""
    values: tuple[float, ...] = ()

    def read(self) -> Array:
        """The weight in fp32."""
        if self.file is None:
            return np.array(self.values, dtype=np.float32)
        with safe_open(self.file, "pt") as stored:
            values: Array = stored.get_tensor(self.own_name).to(torch.float32).numpy()
        return _pairs(values, self.heads) if self.heads else values


def stored_tensors(directory: Path, architecture: Architecture) -> list[StoredTensor]:
    """Every weight of a model directory.

    Raises:
        GgufUnsupported: one has no name in GGUF.
        ModelUnsupported: there are none.
    """
    listed = list(_listed(directory))
    names = name_tensors([own_name for _, own_name, _ in listed], architecture)
    tensors = []
    for file, own_name, shape in listed:
        if own_name not in names:
            continue
        projection = f".{own_name}".split(".")[-2]
        heads = {"q_proj": architecture.heads, "k_proj": architecture.key_value_heads}.get(projection, 0)
        paired = heads if architecture.rotates_pairs else 0
        tensors.append(StoredTensor(names[own_name], shape, file, own_name, paired))
    if not tensors:
        raise ModelUnsupported("The model directory holds no safetensors.")
    if architecture.rope_divisors:
        divisors = architecture.rope_divisors
        tensors.append(StoredTensor(_ROPE_DIVISORS, (len(divisors),), None, "", 0, divisors))
    return sorted(tensors, key=lambda each: each.name)


def name_tensors(own_names: Sequence[str], architecture: Architecture) -> dict[str, str]:
    """The names in GGUF of weights, by their own; without an output head that is the embeddings.

    Raises:
        GgufUnsupported: one has no name in GGUF.
    """
    architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(architectures[architecture.name], architecture.layers)
    names = {}
    for own_name in own_names:
        if own_name == _HEAD and architecture.tied_embeddings:
            continue
        name = table.get_name(own_name, try_suffixes=(".weight", ".bias"))
        *_, projection, kind = ("", *own_name.rsplit(".", 2))
        if name is None or (kind == "bias" and projection not in architecture.biases):
            raise GgufUnsupported(f"llama.cpp reads no weight like {own_name[:80]!r} in models of this family.")
        names[own_name] = name
    return names


def _listed(directory: Path) -> Iterator[tuple[Path, str, tuple[int, ...]]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for own_name in stored.keys():  # noqa: SIM118 # It is no mapping.
                if not own_name.endswith(_DERIVED):
                    yield file, own_name, tuple(stored.get_slice(own_name).get_shape())


def _pairs(values: Array, heads: int) -> Array:
    """Rows of queries or keys, `[heads x size, ...]`, with the two halves of each head interleaved.

    transformers rotates element i of a head with element i + size/2, llama.cpp with its neighbour.
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
