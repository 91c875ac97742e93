"""Models as they are published: the inspection, which has no transformers, accepts and refuses what the engine does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    GptOssConfig,
    LlamaConfig,
    Mistral3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2VLConfig,
)

from pocl.errors import ModelUnsupported
from pocl.export.model_directory import save_model
from pocl.inspect import ModelFacts, inspect_model
from pocl.inspect.families import family_table
from pocl.models.loading import load_student, load_teacher
from pocl.models.random import byte_level_tokenizer
from pocl.spec import ModelRef, StudentRef
from tools.causal_models import TABLE, render_table

CPU = torch.device("cpu")
IDS = torch.arange(3, 33).reshape(2, 15)
DELETED: Any = Ellipsis
SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 257, "eos_token_id": 258,
    "initializer_range": 0.3,
}  # fmt: skip


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """A model with random weights, in eval mode: equal configs give equal ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.train(False)
    return model


def llama() -> PreTrainedModel:
    return build(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as `save_pretrained` writes it."""
    directory = tmp_path_factory.mktemp("published")
    save_model(llama(), byte_level_tokenizer(64), directory)
    return directory


@pytest.fixture
def model(published: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    shutil.copytree(published, tmp_path / "model")
    return tmp_path / "model"


def edit(directory: Path, file: str = "config.json", **changes: object) -> None:
    content = {**json.loads((directory / file).read_text()), **changes}
    kept = {name: value for name, value in content.items() if value is not DELETED}
    (directory / file).write_text(json.dumps(kept))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})


def load(directory: Path) -> tuple[ModelFacts, PreTrainedModel]:
    """What the inspection says, and what the engine trains, which must have the sizes that were told."""
    facts = inspect_model(directory)
    loaded = load_student(StudentRef(path=str(directory)), None, device=CPU, dropout=0.0)
    assert facts.parameters == sum(weight.numel() for weight in loaded.model.parameters())
    assert facts.warnings == loaded.warnings
    return facts, loaded.model


def refusal(directory: Path) -> str:
    """The sentence with which both refuse, which names no path."""
    with pytest.raises(ModelUnsupported) as inspected:
        inspect_model(directory)
    with pytest.raises(ModelUnsupported) as loaded:
        load_teacher(ModelRef(path=str(directory)), device=CPU, dtype=torch.float32)
    assert loaded.value.message == inspected.value.message
    assert str(directory.parent) not in inspected.value.message
    return inspected.value.message


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.train(False)(IDS).logits
    return result


# --- config.json --------------------------------------------------------------------------------------------

LINEAR = {"rope_parameters": DELETED, "rope_theta": 10000}


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": "1e-6"},
        {"num_attention_heads": 4.0, "hidden_size": "32"},
        {"initializer_range": 1 << 40, "id2label": "x", "num_labels": 2.5, "problem_type": "guess"},
        {"initializer_range": 1, "attention_dropout": "0"},
        {"attention_bias": 0, "use_cache": None, "initializer_range": None},
        {"rope_parameters": DELETED, "rope_theta": "10000.0", "rope_scaling": None},
        {**LINEAR, "rope_scaling": {"type": "default"}},
        {**LINEAR, "rope_scaling": {"rope_type": None}},
        {"pad_token_id": -1},
        {"pad_token_id": 5000},
        {"pad_token_id": None, "eos_token_id": [1, 0]},
        {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_3"},
        {"output_attentions": True, "output_hidden_states": True, "return_dict": False},
        {"do_sample": True, "temperature": 0.7, "max_length": 4096},
        {"architectures": None},
        {"dtype": None, "torch_dtype": "auto"},
        {"dtype": DELETED, "torch_dtype": "torch.float32"},
        {"head_dim": None},
        {"tie_word_embeddings": None},
        {"auto_map": {"AutoConfig": "c.MyConfig", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
    ],
    ids=str,
)
def test_odd_entries_of_a_config_load_as_they_were_meant(changes: dict[str, Any], model: Path) -> None:
    edit(model, **changes)
    _, loaded = load(model)
    assert torch.equal(logits(loaded), logits(llama()))


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2},
        {"rope_type": "linear", "factor": "2.0"},
        {"type": "linear", "rope_type": "linear", "factor": 2.0},
    ],
    ids=str,
)
def test_old_and_new_spellings_of_rotary_scaling_are_one(scaling: dict[str, object], model: Path) -> None:
    edit(model, **LINEAR, rope_scaling=scaling)
    _, loaded = load(model)
    config = llama().config
    config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    expected = AutoModelForCausalLM.from_config(config)
    expected.load_state_dict(llama().state_dict())
    assert torch.equal(logits(loaded), logits(expected))
    assert not torch.equal(logits(loaded), logits(llama()))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "unheard-of"}, "model_type 'unheard-of'"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps 'tiny', which must be a number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
        ({"rms_norm_eps": None}, "rms_norm_eps null, which must be a number"),
        ({"num_attention_heads": 4.5}, "num_attention_heads 4.5"),
        ({"num_attention_heads": [4]}, "num_attention_heads"),
        ({"num_attention_heads": 5}, "do not divide"),
        ({"num_key_value_heads": 3}, "key-value heads"),
        ({"num_key_value_heads": None}, "has the shape [16, 32]"),
        ({"vocab_size": 260}, "vocab_size of 260"),
        ({"head_dim": 16}, "describes [32, 32]"),
        ({"intermediate_size": 1 << 60}, "intermediate_size"),
        ({"hidden_act": "magic"}, "'magic'"),
        ({**LINEAR, "rope_scaling": {"type": "su", "factor": 2.0}}, "longrope without short_factor"),
        ({**LINEAR, "rope_scaling": {"type": "spiral", "factor": 2.0}}, "'spiral'"),
        ({**LINEAR, "rope_scaling": {"type": "linear"}}, "without factor"),
        ({**LINEAR, "rope_scaling": {"type": "linear", "factor": "much"}}, "'much'"),
        ({**LINEAR, "rope_scaling": "linear"}, "must be null or an object"),
        ({**LINEAR, "rope_scaling": {"type": "linear", "factor": 0}}, "factor 0"),
        ({**LINEAR, "rope_scaling": {"type": "su", "short_factor": [1], "long_factor": [1]}}, "heads need 4"),
        ({"head_dim": 7}, "odd width 7"),
        ({"attention_bias": True}, "lack self_attn.k_proj.bias"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": -1}, "num_key_value_heads"),
        ({"head_dim": "x"}, "head_dim"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"sliding_window": {"a": 1}}, "sliding_window"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"per_layer_config": {"0": {"hidden_size": 3}}}, "per_layer_config"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3 + ["magic"]}, "'magic'"),
        ({"model_type": "bert", "architectures": None}, "both sides"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"quantization_config": {"load_in_4bit": True}}, "dequantize()"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "save_compressed=False"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.OtherForCausalLM"}}, "code of its own"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_used_are_refused_by_both(changes: dict[str, Any], says: str, model: Path) -> None:
    edit(model, **changes)
    assert says in refusal(model)


def test_own_code_of_a_published_class_is_not_run_and_that_is_said(model: Path) -> None:
    edit(model, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert [warning.code for warning in load(model)[0].warnings] == ["own_code_not_run"]


@pytest.mark.slow
def test_table_of_families_is_that_of_the_installed_transformers() -> None:
    assert TABLE.read_text() == render_table(), "run python -m tools.causal_models"


def test_every_class_that_transformers_builds_is_in_the_table() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == dict(family_table().classes)


# --- Names of weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: f"model.{name}",
        lambda name: name.replace("model.", "model._orig_mod.", 1),
        lambda name: f"_fsdp_wrapped_module.{name}".replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    ],
)
def test_prefixes_of_wrappers_are_taken_off_and_named(rename: Callable[[str], str], model: Path) -> None:
    edit_weights(model, lambda weights: {rename(name): tensor for name, tensor in weights.items()})
    facts, loaded = load(model)
    assert [warning.code for warning in facts.warnings] == ["weights_prefix_removed"]
    assert torch.equal(logits(loaded), logits(llama()))
    assert loaded.generation_config is not None
    save_model(loaded, byte_level_tokenizer(64), model.parent / "saved")
    assert set(load_file(model.parent / "saved" / "model.safetensors")) == set(llama().state_dict())


def test_weights_of_an_unknown_wrapper_are_refused_by_their_names(model: Path) -> None:
    edit_weights(model, lambda weights: {f"policy.{name}": tensor for name, tensor in weights.items()})
    assert "policy.lm_head.weight" in refusal(model)


def test_weights_without_the_head_are_refused(model: Path) -> None:
    edit_weights(
        model, lambda weights: {name: tensor for name, tensor in weights.items() if not name.startswith("lm_head")}
    )
    assert "lm_head.weight" in refusal(model)


def test_weights_of_the_body_alone_load_where_the_head_is_tied(tmp_path: Path) -> None:
    save_model(build(Qwen2Config(**SIZES, tie_word_embeddings=True)), byte_level_tokenizer(64), tmp_path)
    edit_weights(tmp_path, lambda weights: {name.removeprefix("model."): tensor for name, tensor in weights.items()})
    assert torch.equal(logits(load(tmp_path)[1]), logits(build(Qwen2Config(**SIZES, tie_word_embeddings=True))))


@pytest.mark.parametrize("lost", ["model.layers.2.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"])
def test_a_lost_weight_is_named_by_both(lost: str, model: Path) -> None:
    edit_weights(model, lambda weights: {name: tensor for name, tensor in weights.items() if name != lost})
    assert lost.split(".", 3)[3] in refusal(model)


def test_weights_that_the_config_does_not_describe_are_refused(model: Path) -> None:
    bias = {"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}
    edit_weights(model, lambda weights: {**weights, **bias})
    assert "q_proj.bias, which its config.json does not describe" in refusal(model)


# --- Other formats ------------------------------------------------------------------------------------------

ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "/home/me/secret/base", "task_type": "CAUSAL_LM"})


@pytest.mark.parametrize("beside_its_base", [True, False])
def test_an_adapter_is_refused_with_what_to_do(beside_its_base: bool, model: Path) -> None:
    (model / "adapter_config.json").write_text(ADAPTER)
    (model / "adapter_model.safetensors").write_bytes(b"")
    if not beside_its_base:
        (model / "config.json").unlink()
        (model / "model.safetensors").unlink()
    message = refusal(model)
    assert "LORA adapter" in message
    assert "'base'" in message
    assert "merge_and_unload" in message
    assert "secret" not in message


def test_adapter_weights_among_those_of_the_model_are_refused(model: Path) -> None:
    lora = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}
    edit_weights(model, lambda weights: {**weights, **lora})
    assert "merge_and_unload" in refusal(model)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("pytorch_model.bin", "pickled"),
        ("pytorch_model-00001-of-00002.bin", "pickled"),
        ("consolidated.00.pth", "format of transformers"),
        ("consolidated.safetensors", "format of transformers"),
        ("zero_to_fp32.py", "DeepSpeed"),
        ("__0_0.distcp", "FSDP"),
        ("pytorch_model_fsdp.bin", "FSDP"),
        ("model.Q4_K_M.gguf", "path of the .gguf file"),
        ("model.onnx", "ONNX"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("optimizer.pt", "state of a training"),
        ("weights.safetensors", "another name"),
        ("adapter_model.safetensors", "adapter"),
    ],
)
def test_weights_in_another_format_are_named(file: str, says: str, model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / file).write_bytes(b"")
    message = refusal(model)
    assert says in message
    assert file.lower() in message


def test_weights_in_integers_are_refused(model: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_weights(model, lambda weights: {**weights, name: weights[name].to(torch.int8)})
    assert "stored as I8" in refusal(model)


# --- Multi-token prediction -----------------------------------------------------------------------------------


def deepseek() -> PreTrainedModel:
    config = DeepseekV3Config(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, pad_token_id=0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return build(config)


def test_layers_for_multi_token_prediction_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    expected = deepseek()
    save_model(expected, byte_level_tokenizer(64), tmp_path)
    extra = {
        "model.layers.2.eh_proj.weight": torch.ones(32, 64),
        "model.layers.2.mlp.up_proj.weight": torch.ones(48, 32),
    }
    edit_weights(tmp_path, lambda weights: {**weights, **extra})
    edit(tmp_path, num_nextn_predict_layers=1)
    facts, loaded = load(tmp_path)
    assert [warning.code for warning in facts.warnings] == ["mtp_layers_ignored"]
    assert torch.equal(logits(loaded), logits(expected))
    edit(tmp_path, num_nextn_predict_layers=0)
    assert "more layers" in refusal(tmp_path)


# --- Ties that the config does not tell -----------------------------------------------------------------------


@pytest.mark.parametrize(("family", "is_tied"), [(Gemma2Config, True), (Gemma2Config, False), (LlamaConfig, False)])
def test_ties_are_those_of_the_weights_where_the_config_names_none(
    family: Callable[..., PreTrainedConfig], is_tied: bool, tmp_path: Path
) -> None:
    expected = build(family(tie_word_embeddings=is_tied, head_dim=8, **SIZES))
    save_model(expected, byte_level_tokenizer(64), tmp_path / "published")
    # Gemma 2 ties unless told otherwise, and Llama does not.
    edit(tmp_path / "published", tie_word_embeddings=DELETED)
    loaded = load_student(StudentRef(path=str(tmp_path / "published")), None, device=CPU).model
    assert torch.equal(logits(loaded), logits(expected))
    save_model(loaded, byte_level_tokenizer(64), tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"] is is_tied
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(expected))


# --- Models of several modalities -----------------------------------------------------------------------------

VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
WHOLE_MODELS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": lambda: Gemma3Config(
        text_config={**SIZES, "head_dim": 8, "sliding_window": 8}, vision_config=VISION, mm_tokens_per_image=4
    ),
    "mistral3": lambda: Mistral3Config(
        text_config={**SIZES, "model_type": "mistral", "head_dim": 8},
        vision_config={**VISION, "model_type": "pixtral"},
    ),
    "qwen2_vl": lambda: Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": dict(SECTIONS)},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
    ),
}


@pytest.mark.parametrize("family", WHOLE_MODELS)
def test_text_model_alone_gives_the_logits_of_the_whole_and_is_saved_as_such(family: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = AutoModelForImageTextToText.from_config(WHOLE_MODELS[family](), dtype=torch.float32)
    save_model(whole, byte_level_tokenizer(64), tmp_path / "whole")
    facts, loaded = load(tmp_path / "whole")
    assert [warning.code for warning in facts.warnings] == ["text_part_only"]
    torch.testing.assert_close(logits(loaded), logits(whole))
    save_model(loaded, byte_level_tokenizer(64), tmp_path / "saved")
    assert inspect_model(tmp_path / "saved").warnings == ()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(loaded))


def test_a_whole_that_uses_its_text_model_otherwise_is_refused(model: Path) -> None:
    text = {**json.loads((model / "config.json").read_text()), "model_type": "cohere2"}
    edit(model, model_type="aya_vision", architectures=["AyaVisionForConditionalGeneration"], text_config=text)
    assert "cohere2" in refusal(model)


# --- Quantised weights ----------------------------------------------------------------------------------------


def test_fp8_weights_are_made_full_by_their_scales(tmp_path: Path) -> None:
    full = llama()
    save_model(full, byte_level_tokenizer(64), tmp_path)
    stored = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        stored[name] = weight
        if name.endswith("_proj.weight"):
            scale = (weight.abs().amax() / 448).reshape(1, 1)
            stored[name] = (weight / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            full.get_parameter(name).data.copy_(stored[name].float() * scale)
    edit_weights(tmp_path, lambda _: stored)
    edit(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    facts, loaded = load(tmp_path)
    assert [warning.code for warning in facts.warnings] == ["dequantised"]
    assert torch.equal(logits(loaded), logits(full))
    save_model(loaded, byte_level_tokenizer(64), tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")[1]), logits(full))


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_weights_are_made_full_by_their_exponents(tmp_path: Path) -> None:
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_hidden_layers": 1}
    full = build(GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1, sliding_window=16))
    save_model(full, byte_level_tokenizer(64), tmp_path)
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        experts, width, outputs = weight.shape
        codes = torch.randint(0, 16, (experts, outputs, width // 32, 32), generator=generator)
        exponents = torch.randint(118, 123, codes.shape[:-1], generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"] = (codes[..., 0::2] | (codes[..., 1::2] << 4)).to(torch.uint8)
        stored[f"{name}_scales"] = exponents
        values = FP4[codes] * torch.exp2(exponents.float() - 127).unsqueeze(-1)
        full.get_parameter(name).data.copy_(values.reshape(experts, outputs, width).transpose(1, 2))
    edit_weights(tmp_path, lambda _: stored)
    edit(tmp_path, quantization_config={"quant_method": "mxfp4"})
    facts, loaded = load(tmp_path)
    assert [warning.code for warning in facts.warnings] == ["dequantised"]
    assert torch.equal(logits(loaded), logits(full))
    save_model(loaded, byte_level_tokenizer(64), tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")[1]), logits(full))
