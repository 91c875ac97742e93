"""Single tensors of a model directory, read without the rest of its weights."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from pocl.inspect.weights import INDEX, SINGLE
from pocl.models.heads import decoder_part, output_head, without_layers
from pocl.models.model_files import structure_of


def first_dtype(directory: Path) -> torch.dtype:
    """The format of the first floating-point tensor of a directory; fp32 where it has none."""
    for name, file in _files_by_tensor(directory).items():
        with safe_open(directory / file, "pt") as stored:
            # No number is read.
            dtype: torch.dtype = stored.get_slice(name)[:0].dtype
        if dtype.is_floating_point:
            return dtype
    return torch.float32


def read_tensors(structure: PreTrainedModel, directory: Path, names: Iterable[str]) -> dict[str, Tensor] | None:
    """The stored tensors of these names of `structure`, in the dtype that loading gives them; None in doubt.

    A tied tensor is stored under one of its names. In doubt is a name that the files do not have, or have in another
    shape: transformers then converts what is stored.
    """
    files = _files_by_tensor(directory)
    expected = structure.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        aliases.setdefault(id(tensor), []).append(name)
    sources = {}
    for name in names:
        stored = [alias for alias in aliases[id(expected[name])] if alias in files]
        if not stored:
            return None
        sources[name] = stored[0]
    read = _read(directory, files, set(sources.values()))
    if any(read[source].shape != expected[name].shape for name, source in sources.items()):
        return None
    dtype = structure.config.dtype
    if dtype is not None:
        read = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in read.items()}
    return {name: read[source] for name, source in sources.items()}


def read_head(directory: Path, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel | None:
    """A model without layers whose output head is read from its directory, and nothing else; None in doubt.

    Args:
        dtype: The dtype of the head's weights.
    """
    model = structure_of(directory)
    hollow = without_layers(model)
    head = output_head(model)
    prefix = next(name for name, module in model.named_modules() if module is head)
    names = {name: f"{prefix}.{name}" for name in head.state_dict()}
    tensors = read_tensors(model, directory, names.values())
    if tensors is None:
        return None
    original = dict(head.named_parameters())
    if original.keys() != names.keys():
        return None
    weights = {
        id(original[name]): nn.Parameter(tensors[stored].to(device, dtype), requires_grad=False)
        for name, stored in names.items()
    }
    _put(head, weights)
    for embedding in decoder_part(hollow).children():
        _put(embedding, weights)
        for parameter_name, parameter in list(embedding.named_parameters(recurse=False)):
            if parameter.is_meta:
                # An embedding that is not tied to the head is needed by the layers alone.
                nothing = torch.empty(0, *parameter.shape[1:], device=device, dtype=dtype)
                embedding.register_parameter(parameter_name, nn.Parameter(nothing, requires_grad=False))
        for buffer_name, buffer in list(embedding.named_buffers(recurse=False)):
            if buffer.is_meta:
                embedding.register_buffer(buffer_name, torch.empty(0, device=device))
    tensors_left = [*hollow.parameters(), *hollow.buffers()]
    if any(tensor.is_meta for tensor in tensors_left):
        return None
    hollow.config.dtype = dtype
    hollow.train(False)
    return hollow


def _put(module: nn.Module, weights: Mapping[int, nn.Parameter]) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if id(parameter) in weights:
            module.register_parameter(name, weights[id(parameter)])


def _files_by_tensor(directory: Path) -> dict[str, str]:
    # As whole models are read: an index beside a single file names files that are older.
    if (directory / SINGLE).is_file():
        with safe_open(directory / SINGLE, "pt") as stored:
            return dict.fromkeys(stored.keys(), SINGLE)
    weight_map = json.loads((directory / INDEX).read_bytes())["weight_map"]
    return {str(name): str(file) for name, file in weight_map.items()}


def _read(directory: Path, files: Mapping[str, str], names: set[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted({files[name] for name in names}):
        with safe_open(directory / file, "pt") as stored:
            tensors |= {name: stored.get_tensor(name) for name in sorted(names) if files[name] == file}
    return tensors
