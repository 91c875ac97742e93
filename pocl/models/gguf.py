"""Models from GGUF files, de-quantised, with the gaps of the conversion by transformers filled."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from pocl.errors import ModelUnsupported
from pocl.inspect.gguf import CONTROL, USER_DEFINED, GGUFHeader, read_header
from pocl.models.model_files import check_loaded, loading_foreign, remove_quantiser

# Values of tokenizer.ggml.pre, which name the rule that splits text before byte-level BPE. A wrong rule raises no error
# and costs quality, so a value that is in none of these sets is refused.
_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_PLAIN = {"gpt-2", "mpt", "olmo", "jais"}
_SPLIT_BY_TRANSFORMERS = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "lfm2", "dbrx", "smaug-bpe", "tekken", "qwen2",
    "deepseek-r1-qwen", "qwen35", "gpt-4o", "llama4", "minimax-m2",
}  # fmt: skip
_NORMALISED = {"qwen2", "deepseek-r1-qwen", "qwen35"}

_NAMED_ALIKE = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "starcoder2", "olmo2"}
"""Architectures of whose tensors each is one of transformers', by the table of names of the gguf package."""


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The de-quantised model, in the type that the file stores unquantised weights in, and its tokenizer.

    Raises:
        ModelUnsupported: transformers cannot convert the architecture, the quantisation or the tokenizer, or the file
            lacks a weight.
    """
    tokenizer = _load_tokenizer(path)
    with loading_foreign(path, "The GGUF file"):
        # By default transformers may keep the weights quantised, and those cannot be trained.
        dequantized = GgufConfig(dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            path.parent,
            quantization_config=dequantized,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **_options(path),
        )
    # With `output_loading_info` it returns a pair, which its annotation does not say.
    model, loading_info = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    check_loaded(loading_info, path)
    remove_quantiser(model)
    return model, tokenizer


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file that :func:`load_gguf` would refuse for its header; of its weights none is read.

    Raises:
        ModelUnsupported: with what to do about it.
    """
    _load_tokenizer(path)
    with loading_foreign(path, "The GGUF file"):
        config = AutoConfig.from_pretrained(path.parent, **_options(path))
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config)
    if _architecture(path) in _NAMED_ALIKE:
        names = get_gguf_hf_weights_map(model, TensorProcessor())
        stored = read_header(path).tensors
        tied = set(model.all_tied_weights_keys)
        lost = sorted(name for name, own in names.items() if name not in stored and own not in tied)
        if lost:
            raise ModelUnsupported(f"{path.name} lacks {len(lost)} weights, among them {lost[0]}.")


def _options(path: Path) -> dict[str, Any]:
    return {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}


def _architecture(path: Path) -> str:
    return read_header(path).architecture()


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    header = read_header(path)
    _refuse_unknown_pre_tokenizer(header)
    with loading_foreign(path, "The GGUF file"):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **_options(path))
    _remove_added_tokens(tokenizer, header)
    _set_pre_tokenizer(tokenizer, header)
    _refuse_lost_special_tokens(tokenizer, header)
    return tokenizer


def _refuse_unknown_pre_tokenizer(header: GGUFHeader) -> None:
    split = _split(header)
    if split is not None and split not in _SINGLE_DIGITS | _PLAIN | _SPLIT_BY_TRANSFORMERS:
        raise ModelUnsupported(
            f"The GGUF file's tokenizer splits text by the rules {split[:40]!r}, which are not known here; give the "
            "model as safetensors."
        )


def _remove_added_tokens(tokenizer: PreTrainedTokenizerBase, header: GGUFHeader) -> None:
    """Remove tokens that the conversion adds, such as GPT-2's end of text, under ids past the embeddings."""
    known = len(header.tokens())
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = [token for token in content["added_tokens"] if token["id"] < known]
    if len(added) == len(content["added_tokens"]):
        return
    content["added_tokens"] = added
    content["model"]["unk_token"] = None
    # The library has no way to remove a token, and none to set another backend.
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


def _refuse_lost_special_tokens(tokenizer: PreTrainedTokenizerBase, header: GGUFHeader) -> None:
    vocabulary = tokenizer.get_vocab()
    for token in header.tokens():
        # The conversion respells names outside the byte alphabet, and no text is then tokenised to their ids.
        if token.kind in (CONTROL, USER_DEFINED) and vocabulary.get(token.name) != token.id:
            raise ModelUnsupported(
                f"The GGUF file's special token {token.name[:40]!r} cannot be converted; give the model as safetensors."
            )


def _set_pre_tokenizer(tokenizer: PreTrainedTokenizerBase, header: GGUFHeader) -> None:
    """Split text before byte-level BPE as the merges were learned; the conversion has some of the rules only."""
    split = _split(header)
    backend = tokenizer.backend_tokenizer
    if split in _SINGLE_DIGITS:
        digits = Digits(individual_digits=True)
        backend.pre_tokenizer = Sequence([digits, ByteLevel(add_prefix_space=False, use_regex=True)])
    elif split in _PLAIN:
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    if split in _NORMALISED:
        backend.normalizer = NFC()


def _split(header: GGUFHeader) -> str | None:
    """The name of the pre-tokenisation rule; None for tokenizers other than byte-level BPE, which have none."""
    if header.text("tokenizer.ggml.model") != "gpt2":
        return None
    named = header.text("tokenizer.ggml.pre")
    # Files of GPT-2 itself are older than the key.
    return "gpt-2" if named is None and header.architecture() == "gpt2" else named or "unnamed"
