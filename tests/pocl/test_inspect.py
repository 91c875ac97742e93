"""What a model directory says is read right, and nothing in it can do more than be refused."""

import json
import struct
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pocl.errors import ModelNotFound, ModelUnsupported, PoclError, SpecInvalid
from pocl.export.model_directory import save_model
from pocl.inspect import facts_of_selected_layers, inspect_model, random_facts
from pocl.inspect.random import SPECIAL_TOKENS
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.spec import RandomModel
from tests.pocl.families import CONFIGS as FAMILY_CONFIGS
from tests.pocl.tiny_models import CONFIGS, tiny

FAMILIES = ("gpt2", "opt", "llama", "qwen2")


def ref_of(family: str, layers: int = 2) -> RandomModel:
    return RandomModel.model_validate(
        {"family": family, "layers": layers, "hidden_size": 32, "heads": 4, "max_positions": 64}
    )


def saved(directory: Path, family: str = "llama", **options: Any) -> Path:
    ref = ref_of(family)
    random_model(ref).save_pretrained(directory, **options)
    byte_level_tokenizer(64).save_pretrained(directory)
    return directory


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(path: Path) -> str:
    """The message with which the model is refused, having checked that it gives no path away."""
    with pytest.raises(ModelUnsupported) as raised:
        inspect_model(path)
    assert str(path.parent) not in raised.value.message
    return raised.value.message


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_of_a_saved_model_equal_the_predicted_ones(family: str, tmp_path: Path) -> None:
    foretold, found = random_facts(ref_of(family)), inspect_model(saved(tmp_path, family))
    assert found.tokens == foretold.tokens
    assert found == type(found)(**{**vars(foretold), "size_bytes": found.size_bytes})
    assert found.size_bytes == (tmp_path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_as_torch_counts_them(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    save_model(model, byte_level_tokenizer(64), tmp_path)
    facts = inspect_model(tmp_path)
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.layers == 4
    assert facts.tied_embeddings is model.config.tie_word_embeddings


def test_parameters_of_a_cut_student_are_counted_as_torch_counts_them() -> None:
    teacher = random_facts(ref_of("opt", layers=5))
    model = random_model(ref_of("opt", layers=3))
    cut = facts_of_selected_layers(teacher, (0, 2, 4))
    assert cut.parameters == sum(p.numel() for p in model.parameters())
    assert (cut.layers, cut.size_bytes) == (3, 4 * cut.parameters)


def test_missing_teacher_layer_is_reported_with_its_pointer() -> None:
    with pytest.raises(SpecInvalid) as raised:
        facts_of_selected_layers(random_facts(ref_of("llama")), (0, 2))
    assert [problem.pointer for problem in raised.value.field_errors] == ["/student/from_teacher/layers/1"]


def test_tokens_equal_those_of_the_loaded_tokenizer(tmp_path: Path) -> None:
    saved(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path)
    assert inspect_model(tmp_path).tokens == tokenizer.get_vocab()


def test_shards_are_summed(tmp_path: Path) -> None:
    whole = inspect_model(saved(tmp_path / "whole"))
    parts = inspect_model(saved(tmp_path / "parts", max_shard_size="40KB"))
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert parts.parameters == whole.parameters


def test_vocabulary_files_without_tokenizer_json_are_read(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder={"3": {"content": "<y>"}})
    tokens = inspect_model(tmp_path).tokens
    assert {token: tokens[token] for token in ("a", "b", "<x>", "<y>")} == {"a": 0, "b": 1, "<x>": 2, "<y>": 3}
    # Those that tokenizer_config.json names and the vocabulary lacks follow, as transformers adds them.
    assert sorted(tokens.values()) == list(range(4 + len(SPECIAL_TOKENS)))
    assert tokens.keys() >= SPECIAL_TOKENS.keys()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "code of its own"),
        ({"architectures": ["BertForMaskedLM"]}, "not a causal language model"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"model_type": None}, "model_type"),
        ({"vocab_size": True}, "vocab_size"),
        ({"hidden_size": 1 << 60}, "hidden_size"),
        ({"num_hidden_layers": 9}, "lack 7"),
        ({"num_hidden_layers": 1}, "more layers"),
        ({"num_hidden_layers": 1 << 20}, "more than 1024 layers"),
    ],
)
def test_unsupported_configs_are_refused(changes: dict[str, object], says: str, tmp_path: Path) -> None:
    edit(saved(tmp_path) / "config.json", **changes)
    assert says in refusal(tmp_path)


def test_tokenizer_with_remote_code_is_refused(tmp_path: Path) -> None:
    edit(saved(tmp_path) / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    assert "code of its own" in refusal(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (saved(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickled" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "/etc/passwd", "model.bin", ""])
def test_shards_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    (saved(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert "no safetensors file beside it" in refusal(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b" " * (5 << 20)],
    ids=["empty", "broken", "list", "latin", "deep", "huge-number", "huge-file"],
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_json_is_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (saved(tmp_path) / name).write_bytes(content)
    assert name in refusal(tmp_path)


@pytest.mark.parametrize(
    "length", [0, 7, 1 << 20, 1 << 62, (1 << 64) - 1], ids=["empty", "short", "beyond", "huge", "largest"]
)
def test_safetensors_header_with_a_wrong_length_is_refused(length: int, tmp_path: Path) -> None:
    weights = saved(tmp_path) / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    assert "model.safetensors" in refusal(tmp_path)


def test_weights_cut_short_are_refused(tmp_path: Path) -> None:
    weights = saved(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "damaged" in refusal(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        None,
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 4]},
        {"dtype": "X", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4]},
        {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]},
    ],
)
def test_impossible_tensors_are_refused(tensor: object, tmp_path: Path) -> None:
    header = json.dumps({"w": tensor}).encode()
    (saved(tmp_path) / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "model.safetensors" in refusal(tmp_path)


@given(junk=st.binary(max_size=200), name=st.sampled_from(["config.json", "tokenizer.json", "model.safetensors"]))
def test_arbitrary_bytes_in_any_file_are_refused_or_read(
    junk: bytes, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = saved(tmp_path_factory.mktemp("fuzz"))
    (directory / name).write_bytes(junk)
    with pytest.raises(PoclError):
        inspect_model(directory)


def test_stored_attention_masks_are_not_counted_as_parameters(tmp_path: Path) -> None:
    model = random_model(ref_of("gpt2"))
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    saved(tmp_path, "gpt2")
    save_file({**tensors, **masks}, tmp_path / "model.safetensors")
    assert inspect_model(tmp_path).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("copied", [True, False], ids=["copy", "other weights"])
@pytest.mark.parametrize("family", ["biogpt", "rwkv", "ctrl", "llama"])
def test_stored_head_counts_unless_it_is_a_copy_of_tied_embeddings(family: str, copied: bool, tmp_path: Path) -> None:
    config = deepcopy(FAMILY_CONFIGS[family])
    config.tie_word_embeddings = True
    model = AutoModelForCausalLM.from_config(config)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings().weight
    (name,) = (name for name, module in model.named_modules() if module is head)
    save_model(model, byte_level_tokenizer(64), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"{name}.weight"] = embeddings.detach().clone() if copied else torch.randn_like(embeddings)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    edit(tmp_path / "config.json", tie_word_embeddings=True)
    facts, loaded = inspect_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert facts.tied_embeddings is copied
    assert facts.parameters == loaded.num_parameters()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_experts_that_a_token_is_not_given_to_are_idle(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(deepcopy(FAMILY_CONFIGS[family]))
    save_model(model, byte_level_tokenizer(64), tmp_path)
    experts = {
        each: sum(weight.numel() for name, weight in layer.named_parameters() if ".experts." in f".{name}")
        for each, layer in enumerate(model.get_decoder().layers)
    }
    config = model.config
    count = next(
        getattr(config, name)
        for name in ("num_local_experts", "num_experts", "n_routed_experts")
        if hasattr(config, name)
    )
    facts = inspect_model(tmp_path)
    assert facts.idle_layer_parameters == tuple(
        each * (count - config.num_experts_per_tok) // count for each in experts.values()
    )
    assert sum(facts.idle_layer_parameters) > 0


@pytest.mark.parametrize("name", ["absent", "a" * 300, "nul\0byte"])
def test_missing_models_are_not_found(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as raised:
        inspect_model(tmp_path / name)
    assert str(tmp_path) not in raised.value.message


def test_empty_directory_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refusal(tmp_path)


@pytest.mark.system
def test_inspecting_loads_neither_torch_nor_transformers_nor_numpy(tmp_path: Path) -> None:
    saved(tmp_path)
    script = (
        "import sys, pathlib; from pocl.inspect import inspect_model; inspect_model(pathlib.Path(sys.argv[1]));"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 0


def test_saved_model_loads_with_the_counted_parameters(tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved(tmp_path, "qwen2"))
    assert inspect_model(tmp_path).parameters == loaded.num_parameters()
