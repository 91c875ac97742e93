"""Small random models of the families of causal language models that are tried, as their configs in transformers."""

from copy import deepcopy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 64
WIDE = " (wide window)"
"""Ends the name of a model whose window is wider than any text."""
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA: dict[str, Any] = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large enough that a wrong mask or position moves the logits.
    "initializer_range": 0.3,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_WINDOWED = ("cohere2", "exaone4", "gemma3_text", "llama4_text", "mistral-window", "olmo3")


def _llama_like(name: str, **changes: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(transformers, name)(**{**_LLAMA, **changes})
    return config


def _config(name: str, **entries: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(transformers, name)(**{**_IDS, **entries})
    return config


def _with_wide_window(config: PreTrainedConfig) -> PreTrainedConfig:
    wide = deepcopy(config)
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(wide, name, None):
            setattr(wide, name, 512)
    return wide


CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": _config("GPT2Config", n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3),
    "gpt_neo": _config("GPTNeoConfig", hidden_size=32, num_layers=2, attention_types=[[["global", "local"], 1]],
        num_heads=4, window_size=8, max_position_embeddings=64, initializer_range=0.3),
    "gpt_neox": _llama_like("GPTNeoXConfig"),
    "gptj": _config("GPTJConfig", n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4,
        initializer_range=0.3, tie_word_embeddings=False),
    "gpt_bigcode": _config("GPTBigCodeConfig", n_embd=32, n_layer=3, n_head=4, n_positions=64,
        initializer_range=0.3),
    "codegen": _config("CodeGenConfig", n_embd=32, n_layer=3, n_head=4, n_positions=64, n_ctx=64, rotary_dim=4,
        initializer_range=0.3, tie_word_embeddings=False),
    "opt": _config("OPTConfig", hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, init_std=0.3),
    "bloom": _config("BloomConfig", hidden_size=32, n_layer=3, n_head=4, initializer_range=0.3),
    "falcon": _config("FalconConfig", hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.3, max_position_embeddings=64),
    "mpt": _config("MptConfig", d_model=32, n_layers=3, n_heads=4, max_seq_len=64, initializer_range=0.3),
    "xglm": _config("XGLMConfig", d_model=32, num_layers=3, attention_heads=4, ffn_dim=48,
        max_position_embeddings=64, init_std=0.3),
    "biogpt": _llama_like("BioGptConfig"),
    "llama": _llama_like("LlamaConfig"),
    "llama3-rope": _llama_like("LlamaConfig", rope_parameters=_LLAMA3_ROPE),
    "mistral": _llama_like("MistralConfig", sliding_window=None),
    "mistral-window": _llama_like("MistralConfig", sliding_window=8),
    "ministral": _llama_like("MinistralConfig", sliding_window=8, head_dim=8, rope_parameters=_ROPE),
    "mixtral": _llama_like("MixtralConfig", num_local_experts=4, sliding_window=None),
    "qwen2": _llama_like("Qwen2Config"),
    "qwen2-window": _llama_like("Qwen2Config", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen2_moe": _llama_like("Qwen2MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16),
    "qwen3": _llama_like("Qwen3Config", head_dim=8),
    "qwen3_moe": _llama_like("Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        head_dim=8),
    "qwen3_next": _llama_like("Qwen3NextConfig", num_hidden_layers=4, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, head_dim=8, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    "qwen3_5_text": _llama_like("Qwen3_5TextConfig", num_hidden_layers=4, head_dim=8, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8),
    "gemma": _llama_like("GemmaConfig", head_dim=8),
    "gemma2": _llama_like("Gemma2Config", head_dim=8, sliding_window=8, final_logit_softcapping=2.0),
    "gemma3_text": _llama_like("Gemma3TextConfig", head_dim=8, sliding_window=8),
    "gemma3-wide-window": _llama_like("Gemma3TextConfig", head_dim=8, sliding_window=512),
    "gemma3n_text": _llama_like("Gemma3nTextConfig", head_dim=8, sliding_window=8, num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=0,
        vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, laurel_rank=4, intermediate_size=48,
        activation_sparsity_pattern=[0.0] * 4),
    "phi": _llama_like("PhiConfig", num_key_value_heads=4),
    "phi3": _llama_like("Phi3Config", sliding_window=None),
    "phimoe": _llama_like("PhimoeConfig", num_local_experts=4, sliding_window=None),
    "stablelm": _llama_like("StableLmConfig"),
    "cohere": _llama_like("CohereConfig", logit_scale=0.25),
    "cohere2": _llama_like("Cohere2Config", logit_scale=0.25, sliding_window=8),
    "olmo": _llama_like("OlmoConfig"),
    "olmo2": _llama_like("Olmo2Config"),
    "olmo3": _llama_like("Olmo3Config", sliding_window=8),
    "olmoe": _llama_like("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "granite": _llama_like("GraniteConfig", logits_scaling=3.0),
    "granitemoe": _llama_like("GraniteMoeConfig", num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": _llama_like("GraniteMoeSharedConfig", num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=16),
    "granitemoehybrid": _llama_like("GraniteMoeHybridConfig", num_local_experts=4, num_experts_per_tok=2,
        shared_intermediate_size=16, layer_types=["mamba", "attention", "mamba"], mamba_n_heads=8,
        mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1),
    "starcoder2": _llama_like("Starcoder2Config", sliding_window=None),
    "deepseek_v2": _llama_like("DeepseekV2Config", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1),
    "deepseek_v3": _llama_like("DeepseekV3Config", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1, n_group=2, topk_group=1),
    "glm": _llama_like("GlmConfig", head_dim=8),
    "glm4": _llama_like("Glm4Config", head_dim=8),
    "glm4_moe": _llama_like("Glm4MoeConfig", head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1),
    "minicpm3": _llama_like("MiniCPM3Config", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    "nemotron": _llama_like("NemotronConfig"),
    "persimmon": _llama_like("PersimmonConfig"),
    "smollm3": _llama_like("SmolLM3Config"),
    "exaone4": _llama_like("Exaone4Config", sliding_window=8, sliding_window_pattern=2),
    "ernie4_5": _llama_like("Ernie4_5Config", head_dim=8),
    "ernie4_5_moe": _llama_like("Ernie4_5_MoeConfig", moe_num_experts=4, moe_k=2, moe_intermediate_size=16,
        moe_num_shared_experts=1),
    "gpt_oss": _llama_like("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, head_dim=8,
        sliding_window=8, rope_parameters=_ROPE),
    "arcee": _llama_like("ArceeConfig"),
    "apertus": _llama_like("ApertusConfig"),
    "bitnet": _llama_like("BitNetConfig"),
    "helium": _llama_like("HeliumConfig", head_dim=8),
    "diffllama": _llama_like("DiffLlamaConfig"),
    "doge": _llama_like("DogeConfig"),
    "dots1": _llama_like("Dots1Config", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1, n_shared_experts=1, n_group=1, topk_group=1),
    "hunyuan_v1_dense": _llama_like("HunYuanDenseV1Config", head_dim=8),
    "seed_oss": _llama_like("SeedOssConfig", head_dim=8),
    "jetmoe": _llama_like("JetMoeConfig", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        kv_channels=8),
    "nanochat": _llama_like("NanoChatConfig"),
    "dbrx": _config("DbrxConfig", d_model=32, n_heads=4, n_layers=3, max_seq_len=64, attn_config={"kv_n_heads":
        2, "clip_qkv": 8.0, "rope_theta": 10000.0}, ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4,
        "moe_top_k": 2}, initializer_range=0.3),
    "vaultgemma": _llama_like("VaultGemmaConfig", head_dim=8, sliding_window=8),
    "llama4_text": _llama_like("Llama4TextConfig", head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        intermediate_size_mlp=48, attention_chunk_size=16, interleave_moe_layer_step=1, num_hidden_layers=4),
    "mamba": _config("MambaConfig", hidden_size=32, num_hidden_layers=3, state_size=8, initializer_range=0.6),
    "mamba2": _config("Mamba2Config", hidden_size=32, num_hidden_layers=3, state_size=8, num_heads=8,
        head_dim=8, n_groups=1, chunk_size=8, initializer_range=0.3),
    "falcon_mamba": _config("FalconMambaConfig", hidden_size=32, num_hidden_layers=3, state_size=8,
        initializer_range=0.6),
    "rwkv": _config("RwkvConfig", hidden_size=32, num_hidden_layers=3, context_length=64),
    "recurrent_gemma": _llama_like("RecurrentGemmaConfig", lru_width=32, attention_window_size=8,
        num_key_value_heads=1),
    "falcon_h1": _llama_like("FalconH1Config", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=8),
    "jamba": _llama_like("JambaConfig", num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=4, mamba_d_state=8, mamba_dt_rank=4,
        use_mamba_kernels=False),
    "bamba": _llama_like("BambaConfig", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8,
        mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8),
    "zamba2": _llama_like("Zamba2Config", num_hidden_layers=4, mamba_d_state=8, mamba_ngroups=1,
        n_mamba_heads=4, mamba_headdim=16, chunk_size=8, num_key_value_heads=4, num_mem_blocks=1,
        hybrid_layer_ids=[1, 3], layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]),
    "lfm2": _llama_like("Lfm2Config", full_attn_idxs=[1], block_multiple_of=8, layer_types=["conv",
        "full_attention", "conv"]),
    "lfm2_moe": _llama_like("Lfm2MoeConfig", layer_types=["conv", "full_attention", "conv"], num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1),
    "nemotron_h": _llama_like("NemotronHConfig", hybrid_override_pattern="M*M-", num_hidden_layers=4,
        mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1, chunk_size=8, head_dim=8,
        layers_block_type=["mamba", "attention", "mamba", "mlp"]),
    "xlstm": _config("xLSTMConfig", hidden_size=32, num_blocks=3, num_hidden_layers=3, num_heads=4, chunk_size=8),
    "minimax": _llama_like("MiniMaxConfig", num_hidden_layers=3, layer_types=["full_attention",
        "linear_attention", "full_attention"], num_local_experts=4, block_size=8, head_dim=8),
    "exaone_moe": _llama_like("ExaoneMoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        sliding_window=8),
    "afmoe": _llama_like("AfmoeConfig", num_hidden_layers=4, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, sliding_window=8, num_shared_experts=1),
    "cwm": _llama_like("CwmConfig", head_dim=8, sliding_window=8),
    "hunyuan_v1_moe": _llama_like("HunYuanMoEV1Config", head_dim=8, num_experts=4, num_experts_per_tok=2),
    "hyperclovax": _llama_like("HyperCLOVAXConfig", head_dim=8),
    "internlm3": _llama_like("InternLM3Config", head_dim=8),
    "jais2": _llama_like("Jais2Config", head_dim=8),
    "minimax_m2": _llama_like("MiniMaxM2Config", head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "ministral3": _llama_like("Ministral3Config", head_dim=8, sliding_window=8),
    "flex_olmo": _llama_like("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2),
    "ctrl": _config("CTRLConfig", n_embd=32, n_layer=3, n_head=4, dff=48, n_positions=64,
        initializer_range=0.3),
    "openai-gpt": _config("OpenAIGPTConfig", n_embd=32, n_layer=3, n_head=4, n_positions=64,
        initializer_range=0.3),
    # Attends to both sides, and is no family of the table.
    "bert": _llama_like("BertConfig"),
}  # fmt: skip
CONFIGS |= {name + WIDE: _with_wide_window(CONFIGS[name]) for name in _WINDOWED}


def family_model(name: str) -> PreTrainedModel:
    """The model of this name, in eval mode and fp32; always the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[name]), dtype=torch.float32)
    model.train(False)
    return model
