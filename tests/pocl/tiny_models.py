"""Small random models of every shape that the engine must treat right."""

from copy import deepcopy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

VOCABULARY = 50
BOS, EOS, PAD = 0, 1, 2
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_LLAMA: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large enough that soft-capping and scaling move the logits.
    "initializer_range": 0.3,
}
_OPT: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.3, **_IDS),
    "opt": OPTConfig(word_embed_proj_dim=32, **_OPT),
    "llama": LlamaConfig(**_LLAMA),
    "qwen2": Qwen2Config(tie_word_embeddings=True, **_LLAMA),
    # The head of this one is narrower than its layers.
    "opt-350m": OPTConfig(word_embed_proj_dim=16, do_layer_norm_before=False, **_OPT),
    "gemma2": Gemma2Config(head_dim=8, sliding_window=8, final_logit_softcapping=2.0, **_LLAMA),
    "cohere": CohereConfig(logit_scale=0.25, **_LLAMA),
    "granite": GraniteConfig(logits_scaling=3.0, **_LLAMA),
    "mixtral": MixtralConfig(num_local_experts=2, **_LLAMA),
}
FOUR_FAMILIES = ("gpt2", "opt", "llama", "qwen2")


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """The model of this name, in eval mode and fp32; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), dtype=torch.float32)
    model.train(False)
    return model
