"""Writes one GGUF file, weight by weight: no more than one is in memory."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType

from pocl.errors import GgufUnsupported
from pocl.export.gguf.architectures import Architecture
from pocl.export.gguf.tensors import Array, StoredTensor
from pocl.export.gguf.vocabulary import Vocabulary
from pocl.inspect.chat_templates import DEFAULT_TEMPLATE
from pocl.spec import GgufFormat

_KINDS: Final[Mapping[GgufFormat, tuple[GGMLQuantizationType, LlamaFileType]]] = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_Q8_BLOCK: Final = 32
"""The elements of a row that share a scale; rows of other lengths are kept in fp16."""
_MAX_FP16: Final = 65504.0
_LARGEST: Final = {
    GGMLQuantizationType.F32: math.inf,
    GGMLQuantizationType.F16: _MAX_FP16,
    # The scale of a block, the 127th part of its largest value, is in fp16.
    GGMLQuantizationType.Q8_0: 127 * _MAX_FP16,
}


def write_file(
    path: Path,
    architecture: Architecture,
    vocabulary: Vocabulary,
    tensors: Sequence[StoredTensor],
    format_: GgufFormat,
) -> None:
    """Write a model.

    Args:
        format_: of the matrices.

    Raises:
        GgufUnsupported: a weight has no value in fp16.
    """
    writer = GGUFWriter(path, architecture.name)
    _add_shape(writer, architecture)
    _add_vocabulary(writer, vocabulary)
    wanted, file_type = _KINDS[format_]
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = [_kind_of(tensor, wanted) for tensor in tensors]
    for tensor, kind in zip(tensors, kinds, strict=True):
        shape = (
            gguf.quant_shape_to_byte_shape(tensor.shape, kind) if kind == GGMLQuantizationType.Q8_0 else tensor.shape
        )
        dtype = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind, np.uint8)
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in zip(tensors, kinds, strict=True):
            writer.write_tensor_data(_encode(tensor, kind))
    finally:
        writer.close()


def _kind_of(tensor: StoredTensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    if wanted == GGMLQuantizationType.Q8_0 and tensor.shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return wanted


def _encode(tensor: StoredTensor, kind: GGMLQuantizationType) -> Array:
    values = tensor.read()
    if not float(np.abs(values).max(initial=0)) <= _LARGEST[kind]:
        raise GgufUnsupported(f"The weight {tensor.own_name[:80]!r} has values beyond those of fp16: write f32.")
    encoded: Array = gguf.quantize(values, kind)
    return encoded


def _add_shape(writer: GGUFWriter, architecture: Architecture) -> None:
    writer.add_type("model")
    writer.add_block_count(architecture.layers)
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_feed_forward_length(architecture.inner_size)
    writer.add_head_count(architecture.heads)
    writer.add_head_count_kv(architecture.key_value_heads)
    writer.add_key_length(architecture.head_size)
    writer.add_value_length(architecture.head_size)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_freq_base(architecture.rope_base)
    writer.add_rope_dimension_count(architecture.head_size)
    writer.add_vocab_size(architecture.vocabulary_size)
    scaling: dict[str, Any] = dict(architecture.rope_scaling)
    if scaling:
        writer.add_rope_scaling_type(RopeScalingType(scaling["type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if "original_context_length" in scaling:
        writer.add_rope_scaling_orig_ctx_len(scaling["original_context_length"])


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.split)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    writer.add_token_merges(list(vocabulary.merges))
    for name, id_ in sorted(vocabulary.special_ids.items()):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", id_)
    writer.add_add_bos_token(vocabulary.adds_begin)
    writer.add_add_eos_token(vocabulary.adds_end)
    if vocabulary.templates:
        others = [{"name": name, "template": text} for name, text in vocabulary.templates.items()]
        only = vocabulary.templates.keys() == {DEFAULT_TEMPLATE}
        writer.add_chat_template(vocabulary.templates[DEFAULT_TEMPLATE] if only else others)
