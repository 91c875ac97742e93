"""An exported directory is read by the current transformers as it was, and by 4.57 with the same logits and ids."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from pocl.export.compatibility import required_transformers
from pocl.export.model_directory import save_model
from pocl.models.heads import has_tied_embeddings
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer
from tests.pocl.families import family_model
from tests.pocl.tiny_models import CONFIGS

OLD_PYTHON = "OLD_TRANSFORMERS_PYTHON"
"""The variable with the path of a Python that has transformers 4.57."""
VOCABULARY = 400
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_THETA = {"rope_type": "default", "rope_theta": 54321.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 54321.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LAYER_TYPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 98765.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5432.0},
}
_NEOX = {name: value for name, value in _SHAPE.items() if name != "num_key_value_heads"}
READ_BY_BOTH: dict[str, PreTrainedConfig] = {
    **{name: CONFIGS[name] for name in ("gpt2", "opt")},
    "llama": LlamaConfig(rope_parameters=_THETA, **_SHAPE),
    "llama, scaled": LlamaConfig(rope_parameters=_LLAMA3, **_SHAPE),
    "qwen2": Qwen2Config(rope_parameters=_THETA, tie_word_embeddings=True, **_SHAPE),
    "qwen3_moe": Qwen3MoeConfig(
        rope_parameters=_THETA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **_SHAPE
    ),
    "mistral": MistralConfig(rope_parameters=_THETA, **_SHAPE),
    "gemma2": Gemma2Config(head_dim=8, sliding_window=8, final_logit_softcapping=2.0, **_SHAPE),
    "gemma3_text": Gemma3TextConfig(rope_parameters=_LAYER_TYPES, head_dim=8, sliding_window=8, **_SHAPE),
    "gpt_neox": GPTNeoXConfig(rope_parameters={**_THETA, "partial_rotary_factor": 0.5}, **_NEOX),
}


def random_of(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train(False)
    return model


def exported(name: str, directory: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    model = random_of(READ_BY_BOTH[name])
    saved = save_model(model, byte_tokenizer(CHATML), directory, end_ids=[1])
    assert saved.requirement == "transformers>=4.57"
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return model, config


@pytest.mark.parametrize("name", READ_BY_BOTH)
def test_current_version_reads_the_same_model(name: str, tmp_path: Path) -> None:
    model, _ = exported(name, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, model(ids).logits)
    rope = getattr(model.config, "rope_parameters", None)
    assert getattr(AutoConfig.from_pretrained(tmp_path), "rope_parameters", None) == rope


def test_names_of_transformers_4_stand_beside_those_of_5(tmp_path: Path) -> None:
    _, config = exported("llama, scaled", tmp_path)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 54321.0
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_config_with_an_infinity_is_saved(tmp_path: Path) -> None:
    model = family_model("falcon_h1")
    assert float("inf") in model.config.time_step_limit
    save_model(model, byte_tokenizer(), tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert list(again.config.time_step_limit) == list(model.config.time_step_limit)


def test_what_only_the_current_version_reads_says_so(tmp_path: Path) -> None:
    model = random_of(Olmo3Config(rope_parameters=_LAYER_TYPES, sliding_window=8, **_SHAPE))
    requirement = save_model(model, byte_tokenizer(CHATML), tmp_path).requirement
    assert requirement.startswith("transformers>=5.")
    assert requirement == required_transformers({"model_type": "published next year"})


def test_tokenizer_is_of_a_class_that_both_versions_have(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|box|>"]})
    save_model(random_of(READ_BY_BOTH["llama"]), tokenizer, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|box|>"]
    assert "extra_special_tokens" not in config
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.all_special_ids == tokenizer.all_special_ids
    text = "The answer is<|box|> a word. <|im_end|>"
    assert read(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("kwargs", [{}, {"default": "{{ 'used' }}", "tool_use": "{{ 'tools' }}"}])
def test_saved_chat_template_is_the_one_that_was_used(kwargs: dict[str, str], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    save_model(random_of(READ_BY_BOTH["llama"]), tokenizer, tmp_path, chat_templates=kwargs or None)
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert read.chat_template == (kwargs or CHATML)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]


@pytest.mark.parametrize("stored", ["tied", "untied"])
@pytest.mark.parametrize("configured", [True, False])
def test_config_says_whether_embeddings_are_tied(stored: str, configured: bool, tmp_path: Path) -> None:
    model = random_of(LlamaConfig(tie_word_embeddings=stored == "tied", **_SHAPE))
    # As a config that is wrong about its weights.
    model.config.tie_word_embeddings = configured
    save_model(model, byte_tokenizer(CHATML), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is (stored == "tied")
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert has_tied_embeddings(read) is (stored == "tied")
    assert torch.equal(read.lm_head.weight, model.get_parameter("lm_head.weight"))


_READ = """
import json, sys, torch, warnings
from transformers import AutoModelForCausalLM, AutoTokenizer
directory, text = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(directory)
ids = torch.arange(3, 43)[None]
with torch.no_grad():
    logits = model.eval()(ids).logits[0, -1].tolist()
    mask = torch.ones_like(ids[:, :8])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new = [model.generate(ids[:, :8], attention_mask=mask, do_sample=False, max_new_tokens=2).shape[1] - 8]
    new += [model.generate(ids[:, :8], attention_mask=mask, do_sample=False).shape[1] - 8]
print(json.dumps({
    "logits": logits, "missing": sorted(info["missing_keys"]), "ids": tokenizer(text)["input_ids"],
    "chat": tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    ),
    "eos": model.generation_config.eos_token_id, "special": tokenizer.all_special_tokens, "new": new,
    "caught": [str(each.message) for each in caught],
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(OLD_PYTHON not in os.environ, reason=f"{OLD_PYTHON} names no Python with transformers 4.57")
@pytest.mark.parametrize("name", READ_BY_BOTH)
def test_4_57_reads_the_same_model_and_tokenizer(name: str, tmp_path: Path) -> None:
    model, _ = exported(name, tmp_path)
    text = "The answer is <|im_start|> a word. "
    done = subprocess.run(
        [os.environ[OLD_PYTHON], "-c", _READ, str(tmp_path), text], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = json.loads(done.stdout.splitlines()[-1])
    with torch.no_grad():
        logits = model(torch.arange(3, 43)[None]).logits[0, -1]
    assert read["missing"] == []
    assert read["caught"] == []
    assert "max_new_tokens" not in done.stderr, done.stderr
    assert (read["new"][0] <= 2, read["new"][1] <= 64) == (True, True)
    torch.testing.assert_close(torch.tensor(read["logits"]), logits, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert read["ids"] == tokenizer(text)["input_ids"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    assert read["chat"] == chat
    # The current version gives some families special tokens of its own, which the written vocabulary lacks.
    written = set(byte_tokenizer(CHATML).get_vocab())
    assert set(read["special"]) == set(tokenizer.all_special_tokens) & written
    assert read["eos"] == AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
