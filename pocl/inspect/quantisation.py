"""Which quantised models are taken apart into full weights, and what is said of the others."""

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.reading import JsonObject, bounded_int

_FULL_WEIGHTS = "give the model from which it was quantised, or a GGUF file"
_ADVICE = {
    "bitsandbytes": "load it with transformers and bitsandbytes, call dequantize() and save_pretrained(), or "
    + _FULL_WEIGHTS,
    "hqq": _FULL_WEIGHTS,
    "gptq": _FULL_WEIGHTS,
    "awq": _FULL_WEIGHTS,
    "compressed-tensors": "save it decompressed (llm-compressor's save_pretrained with save_compressed=False), or "
    + _FULL_WEIGHTS,
    "modelopt": _FULL_WEIGHTS,
}
DEQUANTISED = frozenset({"fp8", "mxfp4"})
"""Methods whose weights are made full as they are read."""


def quantisation_method(config: JsonObject) -> str | None:
    """The method by which the weights of a config are quantised and from which they are made full; None for full ones.

    Raises:
        ModelUnsupported: by a method that cannot be undone here; the message says what to do.
    """
    entry = config.get("quantization_config") or config.get("compression_config")
    if not entry:
        return None
    method = _method(entry)
    if method in DEQUANTISED:
        _check_settings(entry)
        return method
    named = repr(method[:40]) if method else "a method that its config.json does not name"
    advice = _ADVICE.get(method, _FULL_WEIGHTS)
    raise ModelUnsupported(f"The model is quantised by {named}, which cannot be trained or undone here: {advice}.")


def _check_settings(entry: JsonValue) -> None:
    """Check the settings that transformers reads of the methods that are undone."""
    assert isinstance(entry, dict)  # It names a method.
    scheme, block = entry.get("activation_scheme", "dynamic"), entry.get("weight_block_size")
    if not isinstance(scheme, str):
        raise ModelUnsupported("The model's quantization_config has an activation_scheme that is no text.")
    is_block = isinstance(block, list) and len(block) == 2 and all(bounded_int(each, at_most=1 << 24) for each in block)
    if block is not None and not is_block:
        raise ModelUnsupported("The model's quantization_config has a weight_block_size that is no pair of sizes.")


def _method(entry: JsonValue) -> str:
    if not isinstance(entry, dict):
        return ""
    if entry.get("load_in_4bit") or entry.get("load_in_8bit"):
        return "bitsandbytes"
    method = entry.get("quant_method")
    return method if isinstance(method, str) else ""
