"""Freshly initialised models with a byte-level tokenizer: nothing to download."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from pocl.inspect.random import SPECIAL_TOKENS, TIED_FAMILIES, byte_level_vocabulary, intermediate_size
from pocl.models.tokenizers import transformers_tokenizer
from pocl.prompting.byte_level import BOS, EOS, PAD, byte_level_text_tokenizer
from pocl.spec import RandomModel


def random_model(ref: RandomModel) -> PreTrainedModel:
    """A model of the family and sizes that `ref` names; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ref.seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_config(ref), dtype=torch.float32)
    return model


def byte_level_tokenizer(max_positions: int) -> PreTrainedTokenizerFast:
    """One token for each byte, and pad, begin and end of sequence."""
    return transformers_tokenizer(byte_level_text_tokenizer(max_positions))


def _config(ref: RandomModel) -> PreTrainedConfig:
    inner = intermediate_size(ref)
    shared: dict[str, Any] = {
        "vocab_size": len(byte_level_vocabulary()),
        "pad_token_id": SPECIAL_TOKENS[PAD],
        "bos_token_id": SPECIAL_TOKENS[BOS],
        "eos_token_id": SPECIAL_TOKENS[EOS],
        "tie_word_embeddings": ref.family in TIED_FAMILIES,
    }
    match ref.family:
        case "gpt2":
            # No dropout: a random model is for experiments, which should give the same result each time.
            return GPT2Config(
                n_positions=ref.max_positions, n_embd=ref.hidden_size, n_layer=ref.layers, n_head=ref.heads,
                n_inner=inner, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
            )  # fmt: skip
        case "opt":
            return OPTConfig(
                max_position_embeddings=ref.max_positions, hidden_size=ref.hidden_size, ffn_dim=inner,
                word_embed_proj_dim=ref.hidden_size, num_hidden_layers=ref.layers, num_attention_heads=ref.heads,
                dropout=0.0, **shared,
            )  # fmt: skip
        case "llama" | "qwen2":
            family = LlamaConfig if ref.family == "llama" else Qwen2Config
            return family(
                max_position_embeddings=ref.max_positions, hidden_size=ref.hidden_size, intermediate_size=inner,
                num_hidden_layers=ref.layers, num_attention_heads=ref.heads, num_key_value_heads=ref.heads, **shared,
            )  # fmt: skip
