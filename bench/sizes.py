"""The models of the benchmarks: pairs of freshly initialised Llamas, nothing to download."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Size:
    """The sizes of a pair of models."""

    name: str
    student: dict[str, Any] = field(hash=False)
    teacher: dict[str, Any] = field(hash=False)
    vocabulary: int


def _llama(layers: int, width: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }


SIZES = {
    "tiny": Size("tiny", _llama(2, 32, 2, 2, 64), _llama(2, 64, 2, 2, 128), 512),
    "ci": Size("ci", _llama(6, 384, 6, 6, 1024), _llama(12, 768, 12, 12, 2048), 8192),
    "lab": Size("lab", _llama(30, 576, 9, 3, 1536), _llama(32, 960, 15, 5, 2560), 49152),
}
"""`lab` has the shapes of SmolLM2 135M and 360M, `ci` is small enough for whole runs on two cores, and `tiny` shows
that a benchmark runs, while its figures mean nothing."""


def llama(shape: dict[str, Any], vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )


def gpt2(layers: int, width: int, heads: int, vocabulary: int) -> GPT2Config:
    """A GPT-2 without dropout, which has no products."""
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=1024, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def build_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model with random fp32 weights; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def set_mode(model: PreTrainedModel, *, train: bool) -> PreTrainedModel:
    """Put a model into train or eval mode; the model itself."""
    model.train(train)
    return model


@dataclass
class ModelPair:
    """Student and teacher, built lazily and shared by all rivals of a run."""

    size: Size
    teacher_dtype: torch.dtype
    _models: dict[str, PreTrainedModel] = field(default_factory=dict)

    @property
    def student(self) -> PreTrainedModel:
        """The student, in train mode."""
        return set_mode(self._model("student", self.size.student), train=True)

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher, in eval mode and without gradients."""
        teacher = set_mode(self._model("teacher", self.size.teacher), train=False)
        for weight in teacher.parameters():
            weight.data = weight.data.to(self.teacher_dtype)
        return teacher.requires_grad_(False)

    def _model(self, name: str, shape: dict[str, Any]) -> PreTrainedModel:
        if name not in self._models:
            self._models[name] = build_model(llama(shape, self.size.vocabulary), seed=len(name))
        return self._models[name]
