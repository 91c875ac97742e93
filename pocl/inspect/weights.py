"""Sizes of stored tensors, out of safetensors headers (https://huggingface.co/docs/safetensors)."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.reading import bounded_int, parse_object, read_object

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # The limit of the format itself.
_INDEX_LIMIT = 64 << 20
_SHARD_LIMIT = 4096
_MAX_TENSORS = 1_000_000
_LARGEST = 1 << 50
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
_TRAINED = {"F16", "BF16", "F32", "F64"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|blk)\.(\d{1,4})\.")
# Masks and frequencies that older models stored beside their weights.
_BUFFERS = re.compile(r"\.attn\.(?:masked_)?bias$|\.rotary_emb\.inv_freq$|\.attention\.(?:masked_)?bias$")
_HEADS = {"lm_head.weight", "embed_out.weight", "output.weight"}


@dataclass(frozen=True)
class StoredWeights:
    """What the weights of one model hold."""

    parameters: int
    """All parameters; an output head that is stored is counted although it may be tied."""
    head_parameters: int
    """The parameters of an output head stored under its own name; 0 where there is none, which means tied."""
    layer_parameters: Mapping[int, int]
    size_bytes: int


def read_weights(directory: Path) -> StoredWeights:
    """Read the headers of `model.safetensors`, or of every shard that its index names.

    Raises:
        ModelUnsupported: there are no safetensors, a shard is missing, or a header does not fit its file.
    """
    shards = list(_shards(directory))
    tensors: list[tuple[str, int]] = []
    for shard in shards:
        tensors += _header(shard)
        if len(tensors) > _MAX_TENSORS:
            raise ModelUnsupported(f"The model has more than {_MAX_TENSORS} tensors.")
    return sum_tensor_sizes(tensors, sum(shard.stat().st_size for shard in shards))


def sum_tensor_sizes(tensors: Iterable[tuple[str, int]], size_bytes: int) -> StoredWeights:
    """Sum the sizes of named tensors by layer, for the head and in all."""
    total = head = 0
    layers: Counter[int] = Counter()
    for name, size in tensors:
        if _BUFFERS.search(name):
            continue
        total += size
        if name in _HEADS:
            head = size
        if match := _LAYER.search(name):
            layers[int(match[1])] += size
    return StoredWeights(total, head, layers, size_bytes)


def _shards(directory: Path) -> Iterator[Path]:
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        yield single
        return
    if not index.is_file():
        raise ModelUnsupported(_explain_no_weights(directory))
    weight_map = read_object(index, limit=_INDEX_LIMIT).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelUnsupported(f"The model's {INDEX} names no shards.")
    names = sorted({name if isinstance(name, str) else "" for name in weight_map.values()})
    if len(names) > _SHARD_LIMIT:
        raise ModelUnsupported(f"The model has more than {_SHARD_LIMIT} shards.")
    for name in names:
        # A shard elsewhere would let a model read any file of the server.
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise ModelUnsupported(f"The model's {INDEX} names a shard that is no safetensors file beside it.")
        if not (directory / name).is_file():
            raise ModelUnsupported(f"The shard {name} that the model's index names is missing.")
        yield directory / name


def _explain_no_weights(directory: Path) -> str:
    pickled = any(path.suffix in {".bin", ".pt", ".pth", ".ckpt"} for path in directory.iterdir())
    if pickled:
        return "The model's weights are pickled, which can run code; save them as safetensors."
    return f"The model directory has neither {SINGLE} nor {INDEX}."


def _header(shard: Path) -> list[tuple[str, int]]:
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise ModelUnsupported(f"{shard.name} is damaged: its header does not fit into the file.")
        header = parse_object(file.read(length), f"{shard.name} header")
    header.pop("__metadata__", None)
    tensors, ends = [], [0]
    for name, description in header.items():
        elements, end, is_trained = _tensor(description, shard.name)
        ends.append(end)
        if is_trained:
            tensors.append((name, elements))
    if max(ends) != size - 8 - length:
        raise ModelUnsupported(f"{shard.name} is damaged: its tensors and its size differ; copy it again.")
    return tensors


def _tensor(description: JsonValue, file: str) -> tuple[int, int, bool]:
    """The elements and the end offset of a tensor, and whether its type can be trained."""
    bad = ModelUnsupported(f"{file} is damaged: its header describes a tensor that cannot be.")
    if not isinstance(description, dict):
        raise bad
    dtype = description.get("dtype")
    shape = _counts(description.get("shape"), 8)
    offsets = _counts(description.get("data_offsets"), 2)
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise bad
    elements, (begin, end) = prod(shape), offsets
    if dtype not in _BITS:
        raise ModelUnsupported(f"{file} holds tensors of type {dtype[:16]!r}, which cannot be distilled.")
    if 8 * (end - begin) != elements * _BITS[dtype]:
        raise bad
    return elements, end, dtype in _TRAINED


def _counts(value: JsonValue, longest: int) -> list[int] | None:
    if not isinstance(value, list) or len(value) > longest:
        return None
    counts = [number for item in value if (number := bounded_int(item, at_most=_LARGEST)) is not None]
    return counts if len(counts) == len(value) else None
