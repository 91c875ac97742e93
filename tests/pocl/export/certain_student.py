"""A student whose next token is certain: after id n comes id n + 1."""

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM


def certain_student(
    vocabulary: int, *, generation: GenerationConfig | None = None, positions: int = 512
) -> LlamaForCausalLM:
    """A model without any layer's contribution, whose head maps the embedding of each id to the next id."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=vocabulary + vocabulary % 2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, config.hidden_size))
        model.lm_head.weight.copy_(torch.roll(torch.eye(vocabulary, config.hidden_size), 1, dims=0))
    if generation is not None:
        model.generation_config = generation
    model.train(False)
    return model
