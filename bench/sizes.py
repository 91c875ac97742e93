"""The models of the benchmarks: pairs of freshly initialised models, nothing to download."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config


@dataclass(frozen=True)
class Size:
    """The sizes of a pair of models."""

    name: str
    student: dict[str, Any] = field(hash=False)
    teacher: dict[str, Any] = field(hash=False)
    vocabulary: int
    family: str = "llama"
    """One of `FAMILIES`."""

    @property
    def student_config(self) -> PreTrainedConfig:
        return FAMILIES[self.family](self.student, self.vocabulary)

    @property
    def teacher_config(self) -> PreTrainedConfig:
        return FAMILIES[self.family](self.teacher, self.vocabulary)


def llama_shape(layers: int, width: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
    }


SIZES = {
    "tiny": Size("tiny", llama_shape(2, 32, 2, 2, 64), llama_shape(2, 64, 2, 2, 128), 512),
    "ci": Size("ci", llama_shape(6, 384, 6, 6, 1024), llama_shape(12, 768, 12, 12, 2048), 8192),
    "lab": Size("lab", llama_shape(30, 576, 9, 3, 1536), llama_shape(32, 960, 15, 5, 2560), 49152),
}
"""`lab` has the shapes of SmolLM2 135M and 360M, `ci` is small enough for whole runs on two cores, and `tiny` shows
that a benchmark runs, while its figures mean nothing."""


def llama(shape: dict[str, Any], vocabulary: int) -> LlamaConfig:
    return LlamaConfig(vocab_size=vocabulary, **_ROTARY, **shape)


def qwen2(shape: dict[str, Any], vocabulary: int) -> Qwen2Config:
    return Qwen2Config(vocab_size=vocabulary, **_ROTARY, **shape)


_ROTARY: dict[str, Any] = {
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gpt2(layers: int, width: int, heads: int, vocabulary: int) -> GPT2Config:
    """A GPT-2 without dropout, which has no products."""
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=1024, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[dict[str, Any], int], PreTrainedConfig]] = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": lambda shape, vocabulary: gpt2(**shape, vocabulary=vocabulary),
}
"""From a shape and the number of tokens to a config, by family."""


def build_model(
    config: PreTrainedConfig,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A model with random weights, drawn on `device`; equal seeds give equal weights on one kind of device."""
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
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
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _models: dict[str, PreTrainedModel] = field(default_factory=dict)

    @property
    def student(self) -> PreTrainedModel:
        """The student, in train mode."""
        return set_mode(self._model("student", self.size.student_config, torch.float32), train=True)

    @property
    def teacher(self) -> PreTrainedModel:
        """The teacher, in eval mode and without gradients."""
        teacher = set_mode(self._model("teacher", self.size.teacher_config, self.teacher_dtype), train=False)
        return teacher.requires_grad_(False)

    def _model(self, name: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
        if name not in self._models:
            self._models[name] = build_model(config, seed=len(name), device=self.device, dtype=dtype)
        return self._models[name]
