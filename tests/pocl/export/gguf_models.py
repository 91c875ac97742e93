"""Tiny models of the families that are written as GGUF, as directories with tokenizers like those of their authors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pocl.export.model_directory import save_model
from tests.pocl.byte_tokenizers import CHATML, SENTENCES

SPECIAL: Final = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
_SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Large enough that every rotation and every norm moves the logits.
    "initializer_range": 0.2,
}
LLAMA3_ROPE: Final = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """A family with the rule by which its tokenizer splits text."""

    config: type[PreTrainedConfig]
    split: str
    settings: dict[str, Any]
    begins: bool = False
    """Whether the tokenizer puts its begin token before a text."""


CASES: Final = {
    "llama": Case(LlamaConfig, "llama-bpe", {"tie_word_embeddings": False}, begins=True),
    "smollm": Case(LlamaConfig, "smollm", {"tie_word_embeddings": True}),
    "mistral": Case(MistralConfig, "tekken", {"head_dim": 32, "sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": Case(Qwen2Config, "qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case(Qwen3Config, "qwen2", {"head_dim": 128, "tie_word_embeddings": False}),
}


def tokenizer_like(split: str, *, begins: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level tokenizer that splits text by a rule."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split not in GGUF_PRE_TOKENIZER_SPLITS)
    backend = Tokenizer(models.BPE(ignore_merges=split in ("llama-bpe", "tekken")))
    if split in GGUF_PRE_TOKENIZER_SPLITS:
        first = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[split]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    elif split == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        backend.pre_tokenizer = byte_level
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*SENTENCES, "In 2010, 10 of 101 had 3.14."] * 3, trainer)
    backend.add_tokens(["<think>"])
    if begins:
        begin = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")


def model_directory(name: str, directory: Path, **settings: Any) -> Path:
    """A model of a case, saved as a student leaves a run: its answers end with the turn, and with the text."""
    case = CASES[name]
    tokenizer = tokenizer_like(case.split, begins=case.begins)
    # More embeddings than tokens, as many models have.
    ids = {"vocab_size": len(tokenizer) + 5, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = case.config(**{**_SHAPE, **ids, **case.settings, **settings})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                # They begin as ones and zeros, which would hide that one is lost.
                parameter.data += torch.randn_like(parameter) * 0.2
    turn_end = tokenizer.get_vocab()["<|im_end|>"]
    save_model(model, tokenizer, directory, end_ids=[turn_end], chat_templates={"default": CHATML})
    return directory
