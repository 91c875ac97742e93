"""Sizes of stored tensors, out of safetensors headers (https://huggingface.co/docs/safetensors)."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.facts import ModelWarning
from pocl.inspect.formats import explain_missing_weights, refuse_sharded_state
from pocl.inspect.reading import bounded_int, parse_object, read_object
from pocl.inspect.weight_names import WeightNames, model_names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_HEADER_LIMIT = 100_000_000  # The limit of the format itself.
_INDEX_LIMIT = 64 << 20
_SHARD_LIMIT = 4096
_MAX_TENSORS = 1_000_000
_LARGEST = 1 << 50
_BLOCK, _BLOCKS = 4096, 256
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip
_TRAINED = {"F16", "BF16", "F32", "F64"}
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|blk)\.(\d{1,4})\.")
# Masks and frequencies that older models stored beside their weights, and what routers count.
_BUFFERS = re.compile(
    r"\.attn\.(?:masked_)?bias$|\.rotary_emb\.inv_freq$|\.attention\.(?:masked_)?bias$|\.e_score_correction_bias$"
)
_HEADS = {"lm_head.weight", "embed_out.weight", "output.weight", "output_projection.weight", "head.weight"}
_EMBEDDINGS = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|tokens_embed|embeddings|token_embd)\.weight$"
    r"|^transformer\.w\.weight$"
)
# As safetensors and GGUF files name them; experts that every token is given to have other names.
_ROUTED = re.compile(r"\.experts\.|_exps\.")
_SCALES = re.compile(r"(?:_scale|_scale_inv|_scales|_zero_point)$")
# Layers of multi-token prediction of Qwen 3 Next and MiMo; those of DeepSeek and GLM are numbered behind the others.
_MTP = re.compile(r"^(?:model\.)?mtp\w*\.")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as its header describes it."""

    name: str
    """The name in the model, without prefixes of wrappers."""
    shape: tuple[int, ...]
    dtype: str
    file: str
    """The name of the safetensors file that holds it."""
    begin: int = 0
    """Where its bytes begin in that file."""


@dataclass(frozen=True)
class StoredWeights:
    """What the weights of one model hold."""

    parameters: int
    """All parameters; an output head that is stored is counted although it may be tied."""
    head_parameters: int
    """The parameters of an output head stored under its own name; 0 where there is none, which means tied."""
    layer_parameters: Mapping[int, int]
    expert_parameters: Mapping[int, int]
    """Of each layer, those of the experts among which a token is routed."""
    size_bytes: int

    def idle_parameters(self, layers: int, *, experts: int | None, chosen: int | None) -> tuple[int, ...]:
        """Of each layer, the parameters of experts that a token is not given to; empty where none are known to be.

        Args:
            experts: How many each layer has.
            chosen: How many of them a token is given to.
        """
        if not self.expert_parameters or not experts or not chosen or chosen >= experts:
            return ()
        return tuple(self.expert_parameters.get(index, 0) * (experts - chosen) // experts for index in range(layers))


@dataclass(frozen=True)
class StoredModel:
    """The headers of a model's safetensors."""

    tensors: tuple[StoredTensor, ...]
    """Those that are trained, or from which such ones are made."""
    buffers: tuple[StoredTensor, ...]
    """The others: masks, frequencies, counts of routers."""
    names: WeightNames
    size_bytes: int
    is_quantised: bool

    def sizes(self, layers: int) -> StoredWeights:
        """The sizes of the tensors that are loaded of a model with so many layers, beyond which there are those of
        multi-token prediction.
        """
        loaded = (
            tensor
            for tensor in self.tensors
            if not is_mtp(tensor.name, layers) and not (self.is_quantised and _SCALES.search(tensor.name))
        )
        return sum_tensor_sizes(((tensor.name, _elements(tensor)) for tensor in loaded), self.size_bytes)

    def dtype(self) -> str:
        """The format that holds the most bytes of the weights."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += prod(tensor.shape) * _BITS[tensor.dtype]
        return max(sizes, key=lambda dtype: (sizes[dtype], dtype), default="F32")

    def embeddings(self) -> StoredTensor | None:
        """The token embeddings; None where they have no name that is known."""
        found = [tensor for tensor in self.tensors if _EMBEDDINGS.search(tensor.name) and len(tensor.shape) == 2]
        return min(found, key=lambda tensor: len(tensor.name), default=None)

    def head(self) -> StoredTensor | None:
        """The output head; None where it is not stored under a name of its own."""
        return next((tensor for tensor in self.tensors if tensor.name in _HEADS), None)


def is_mtp(name: str, layers: int) -> bool:
    """Whether a tensor belongs to multi-token prediction, in a model of so many layers: it is not loaded."""
    match = _LAYER.search(name)
    return _MTP.search(name) is not None or (match is not None and int(match[1]) >= layers)


def unused_weights(names: Iterable[str], layers: int) -> tuple[ModelWarning, ...]:
    """A warning that names the stored weights that a model with so many layers has no place for; none of buffers and of
    what belongs to multi-token prediction.
    """
    unused = sorted(name for name in names if not is_mtp(name, layers) and not _BUFFERS.search(name))
    if not unused:
        return ()
    message = f"{len(unused)} stored weights have no place in the model and are not used, among them {unused[0][:80]}"
    return (ModelWarning("weights_not_used", message),)


def layer_of(name: str) -> int | None:
    """The number of the layer that a tensor belongs to; None outside of layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def name_within_layer(name: str) -> tuple[int, str] | None:
    """The number of a tensor's layer and the rest of its name; None outside of layers."""
    match = _LAYER.search(name)
    return (int(match[1]), name[match.end() :]) if match else None


def read_weights(directory: Path, *, text_part: bool = False, quantised_by: str | None = None) -> StoredModel:
    """Read the headers of `model.safetensors`, or of every shard that its index names.

    Args:
        text_part: Of a model of several modalities the text model alone is loaded.
        quantised_by: The method by which the weights are quantised; None for full weights.

    Raises:
        ModelUnsupported: there are no safetensors, a shard is missing, a header does not fit its file, or the tensors
            are not those of a whole model in full weights.
    """
    shards = list(shards_of(directory))
    stored: dict[str, StoredTensor] = {}
    for shard in shards:
        stored |= {tensor.name: tensor for tensor in _header(shard)}
        if len(stored) > _MAX_TENSORS:
            raise ModelUnsupported(f"The model has more than {_MAX_TENSORS} tensors.")
    names = model_names(stored, text_part=text_part)
    every = tuple(replace(stored[old], name=name) for name, old in names.stored.items())
    tensors = [tensor for tensor in every if not _BUFFERS.search(tensor.name)]
    if quantised_by is None:
        _check_full(tensors)
        tensors = [tensor for tensor in tensors if tensor.dtype in _TRAINED]
    trained = set(tensors)
    buffers = tuple(tensor for tensor in every if tensor not in trained)
    size_bytes = sum(shard.stat().st_size for shard in shards)
    return StoredModel(tuple(tensors), buffers, names, size_bytes, is_quantised=quantised_by is not None)


def stores_same(directory: Path, one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same bytes, as far as some hundred blocks of each show."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    size = _elements(one) * _BITS[one.dtype] // 8
    with (directory / one.file).open("rb") as first, (directory / other.file).open("rb") as second:
        for offset in range(0, size, max(_BLOCK, size // _BLOCKS)):
            first.seek(one.begin + offset)
            second.seek(other.begin + offset)
            length = min(_BLOCK, size - offset)
            if first.read(length) != second.read(length):
                return False
    return True


def sum_tensor_sizes(tensors: Iterable[tuple[str, int]], size_bytes: int) -> StoredWeights:
    """Sum the sizes of named tensors by layer, for the head and in all."""
    total = head = 0
    layers: Counter[int] = Counter()
    experts: Counter[int] = Counter()
    for name, size in tensors:
        if _BUFFERS.search(name):
            continue
        total += size
        if name in _HEADS:
            head = size
        if (layer := layer_of(name)) is not None:
            layers[layer] += size
            if _ROUTED.search(name):
                experts[layer] += size
    return StoredWeights(total, head, layers, experts, size_bytes)


def _elements(tensor: StoredTensor) -> int:
    # A byte of mxfp4 holds two weights.
    return prod(tensor.shape) * (2 if tensor.name.endswith("_blocks") else 1)


def _check_full(tensors: Iterable[StoredTensor]) -> None:
    for tensor in tensors:
        if tensor.name.endswith(".weight") and tensor.dtype not in _TRAINED:
            raise ModelUnsupported(
                f"The model's {tensor.name[:80]} is stored as {tensor.dtype}, which cannot be trained, and its "
                "config.json does not say how it is quantised; give the model in F32, BF16 or F16."
            )


def shards_of(directory: Path) -> Iterator[Path]:
    """The files with the weights of a model directory.

    Raises:
        ModelUnsupported: one is missing, or none is in safetensors.
        OSError: the index cannot be read.
    """
    refuse_sharded_state(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        yield single
        return
    if not index.is_file():
        raise ModelUnsupported(explain_missing_weights(directory))
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


def _header(shard: Path) -> list[StoredTensor]:
    size = shard.stat().st_size
    with shard.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise ModelUnsupported(f"{shard.name} is damaged: its header does not fit into the file.")
        header = parse_object(file.read(length), f"{shard.name} header")
    header.pop("__metadata__", None)
    tensors, ends = [], [0]
    for name, description in header.items():
        tensor, end = _tensor(name, description, shard.name, data=8 + length)
        ends.append(end)
        tensors.append(tensor)
    if max(ends) != size - 8 - length:
        raise ModelUnsupported(f"{shard.name} is damaged: its tensors and its size differ; copy it again.")
    return tensors


def _tensor(name: str, description: JsonValue, file: str, *, data: int) -> tuple[StoredTensor, int]:
    """A tensor and its end offset within the data, which begin at the byte `data` of the file."""
    bad = ModelUnsupported(f"{file} is damaged: its header describes a tensor that cannot be.")
    if not isinstance(description, dict):
        raise bad
    dtype = description.get("dtype")
    shape = _counts(description.get("shape"), 8)
    offsets = _counts(description.get("data_offsets"), 2)
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise bad
    begin, end = offsets
    if dtype not in _BITS:
        raise ModelUnsupported(f"{file} holds tensors of type {dtype[:16]!r}, which cannot be distilled.")
    if 8 * (end - begin) != prod(shape) * _BITS[dtype]:
        raise bad
    return StoredTensor(name, tuple(shape), dtype, file, data + begin), end


def _counts(value: JsonValue, longest: int) -> list[int] | None:
    if not isinstance(value, list) or len(value) > longest:
        return None
    counts = [number for item in value if (number := bounded_int(item, at_most=_LARGEST)) is not None]
    return counts if len(counts) == len(value) else None
