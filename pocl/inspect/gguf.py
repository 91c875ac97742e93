"""Facts of a GGUF file, out of its header (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

The package `gguf` is not used: it needs numpy and trusts the counts in the file.
"""

import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, NamedTuple

from pocl.errors import ModelUnsupported
from pocl.inspect.facts import MAX_LAYERS, ModelFacts
from pocl.inspect.weights import StoredWeights, sum_tensor_sizes

Value = int | float | bool | str | list["Value"] | None

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_HEADER_LIMIT = 128 << 20
_ENTRIES_LIMIT = 100_000
_ELEMENTS_LIMIT = 8 << 20
_DIMENSIONS_LIMIT = 8
_LARGEST = 1 << 50
# Formats of tensors, by their numbers in ggml.h.
_FORMATS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip
# Token types of the format. An unused token fills a gap in the vocabulary, and its name means nothing.
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5

# Arrays are large: all but these are skipped.
_READ_ARRAYS = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"}


class Token(NamedTuple):
    """An entry of the vocabulary."""

    name: str
    id: int
    kind: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key, and the elements of each tensor by name."""

    metadata: dict[str, Value]
    tensors: dict[str, tuple[int, ...]]
    """Dimensions, fastest-moving first."""
    size_bytes: int
    formats: dict[str, int]
    """The number of the format of each tensor, by name."""

    def text(self, key: str) -> str | None:
        """The string under a key; None where there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> int | None:
        """The positive whole number under a key; None where there is none."""
        value = self.metadata.get(key)
        return value if type(value) is int and value > 0 else None

    def architecture(self) -> str:
        """The name of the model family.

        Raises:
            ModelUnsupported: the file names none.
        """
        name = self.text("general.architecture")
        if not name:
            raise ModelUnsupported("The GGUF file names no architecture.")
        return name

    def dtype(self) -> str:
        """The format of most weights, by its name in GGML; its number where it is not known."""
        sizes: Counter[int] = Counter()
        for name, shape in self.tensors.items():
            sizes[self.formats[name]] += prod(shape)
        number = max(sizes, key=lambda each: (sizes[each], each), default=0)
        return _FORMATS.get(number, f"GGML {number}")

    def tokens(self) -> list[Token]:
        """The entries of the vocabulary.

        Raises:
            ModelUnsupported: the file holds no vocabulary.
        """
        names = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(names, list) or not names:
            raise ModelUnsupported("The GGUF file holds no tokenizer.")
        kinds = self.metadata.get("tokenizer.ggml.token_type")
        if not isinstance(kinds, list) or len(kinds) != len(names):
            kinds = [0] * len(names)
        return [
            Token(name, index, kind if isinstance(kind, int) else 0)
            for index, (name, kind) in enumerate(zip(names, kinds, strict=True))
            if isinstance(name, str)
        ]


def inspect_gguf(path: Path) -> ModelFacts:
    """Read the facts out of a GGUF header.

    Raises:
        ModelUnsupported: see :func:`pocl.inspect.inspect_model`.
        OSError: the file cannot be read.
    """
    header = read_header(path)
    architecture = header.architecture()
    if (header.number("split.count") or 1) > 1:
        raise ModelUnsupported("The GGUF file is one part of several; merge them into one file.")
    weights = sum_tensor_sizes(((name, prod(shape)) for name, shape in header.tensors.items()), header.size_bytes)
    layers = _required(header, f"{architecture}.block_count", at_most=MAX_LAYERS)
    return ModelFacts(
        family=architecture,
        vocabulary_size=_vocabulary_size(header),
        layers=layers,
        hidden_size=_required(header, f"{architecture}.embedding_length", at_most=1 << 24),
        parameters=weights.parameters,
        layer_parameters=_parameters_by_layer(weights, layers),
        size_bytes=header.size_bytes,
        max_positions=header.number(f"{architecture}.context_length"),
        has_chat_template=header.text("tokenizer.chat_template") is not None,
        tied_embeddings=weights.head_parameters == 0,
        dtype=header.dtype(),
        idle_layer_parameters=weights.idle_parameters(
            layers,
            experts=header.number(f"{architecture}.expert_count"),
            chosen=header.number(f"{architecture}.expert_used_count"),
        ),
        tokens=MappingProxyType(_tokens(header)),
        is_described=False,
    )


def read_header(path: Path) -> GGUFHeader:
    """Read the metadata and the tensor table of a GGUF file; no tensor is read.

    Raises:
        ModelUnsupported: it is no GGUF file of version 2 or 3, or a count in it does not fit the file.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        if reader.take(4) != b"GGUF":
            raise ModelUnsupported("A model file must be GGUF; give safetensors as a directory.")
        version = reader.scalar("<I")
        if version not in _VERSIONS:
            raise ModelUnsupported("The GGUF file is of a version that is not read; convert the model again.")
        tensors, entries = reader.bounded_count(_ENTRIES_LIMIT), reader.bounded_count(_ENTRIES_LIMIT)
        metadata = {}
        for _ in range(entries):
            key = reader.string()
            metadata[key] = reader.value(keep=key in _READ_ARRAYS)
        described = [reader.tensor() for _ in range(tensors)]
        shapes = {name: shape for name, shape, _ in described}
        return GGUFHeader(metadata, shapes, reader.size, {name: number for name, _, number in described})


class _Reader:
    """Reads forward through a header, never past its limits."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        self._left = min(size, _HEADER_LIMIT)
        self._elements_left = _ELEMENTS_LIMIT

    def take(self, length: int) -> bytes:
        self._spend(length)
        raw = self._file.read(length)
        if len(raw) != length:
            raise _damaged()
        return raw

    def skip(self, length: int) -> None:
        self._spend(length)
        self._file.seek(length, 1)

    def scalar(self, code: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        return value

    def bounded_count(self, limit: int) -> int:
        """A count of the file, refused above `limit`."""
        number = int.from_bytes(self.take(8), "little")
        if number > limit:
            raise _damaged()
        return number

    def string(self) -> str:
        try:
            return self.take(self.bounded_count(_HEADER_LIMIT)).decode("utf-8")
        except UnicodeDecodeError:
            raise _damaged() from None

    def value(self, *, keep: bool) -> Value:
        kind = int.from_bytes(self.take(4), "little")
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(keep=keep)
        if kind not in _SCALARS:
            raise _damaged()
        return self.scalar(_SCALARS[kind])

    def tensor(self) -> tuple[str, tuple[int, ...], int]:
        """The name, the dimensions and the number of the format of a tensor."""
        name = self.string()
        dimensions = int.from_bytes(self.take(4), "little")
        if dimensions > _DIMENSIONS_LIMIT:
            raise _damaged()
        shape = tuple(self.bounded_count(_LARGEST) for _ in range(dimensions))
        number = int.from_bytes(self.take(4), "little")
        self.bounded_count(self.size)
        return name, shape, number

    def _array(self, *, keep: bool) -> list[Value] | None:
        kind = int.from_bytes(self.take(4), "little")
        length = self.bounded_count(self._elements_left)
        self._elements_left -= length
        if kind in _SCALARS:
            code = _SCALARS[kind]
            size = length * struct.calcsize(code)
            if not keep:
                self.skip(size)
                return None
            return list(struct.unpack(f"<{length}{code[1]}", self.take(size)))
        if kind != _STRING:
            # The format allows arrays of arrays; no model uses them.
            raise _damaged()
        if keep:
            return [self.string() for _ in range(length)]
        for _ in range(length):
            self.skip(self.bounded_count(_HEADER_LIMIT))
        return None

    def _spend(self, length: int) -> None:
        self._left -= length
        if self._left < 0:
            raise _damaged()


def _required(header: GGUFHeader, key: str, *, at_most: int) -> int:
    number = header.number(key)
    if number is None or number > at_most:
        raise ModelUnsupported(f"The GGUF file has no usable {key[:80]}.")
    return number


def _vocabulary_size(header: GGUFHeader) -> int:
    shape = header.tensors.get("token_embd.weight")
    if shape is None or len(shape) != 2 or shape[1] < 1:
        raise ModelUnsupported("The GGUF file has no token embeddings.")
    return shape[1]


def _parameters_by_layer(weights: StoredWeights, layers: int) -> tuple[int, ...]:
    if set(weights.layer_parameters) != set(range(layers)):
        raise ModelUnsupported("The GGUF file does not hold the layers that its header counts.")
    return tuple(weights.layer_parameters[index] for index in range(layers))


def _tokens(header: GGUFHeader) -> dict[str, int]:
    tokens = [(token.name, token.id) for token in header.tokens() if token.kind != UNUSED]
    if header.text("tokenizer.ggml.model") != "llama":
        return dict(tokens)
    # Converters write a run of spaces as it is, where SentencePiece writes a run of U+2581.
    return {name if name.strip(" ") else "\u2581" * len(name): id_ for name, id_ in tokens}


def _damaged() -> ModelUnsupported:
    return ModelUnsupported("The GGUF file is damaged or cut short; copy it again.")
