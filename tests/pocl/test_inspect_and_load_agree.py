"""What the dry run says of a model's files is what a run finds as it loads them: one refuses what the other does.

The dry run reads configs and headers (`inspect_model`), and builds models of families whose layers no table describes
without their weights (`structure_process`, in this process). The oracle loads the model and runs it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pocl.errors import ModelUnsupported, PoclError
from pocl.export.model_directory import save_model
from pocl.inspect import inspect_model
from pocl.models import structure_process
from pocl.models.loading import LoadedModel, load_student
from pocl.models.random import byte_level_tokenizer
from pocl.spec import StudentRef
from tests.pocl.families import family_model
from tests.pocl.tiny_gguf import write_gguf

FAMILIES: Final = ("llama", "qwen3", "gpt2", "mixtral", "deepseek_v3", "falcon_h1", "mamba")
"""Two whose layers a table describes, and others: an older one, two of experts, a hybrid and a recurrent one."""
FILES: Final = ("config.json", "generation_config.json")
FURTHER: Final = {
    "config.json": (
        "head_dim", "layer_types", "num_key_value_heads", "rope_scaling", "sliding_window", "text_config",
        "torch_dtype", "transformers_weights", "fusion_config", "is_decoder",
    ),
    "generation_config.json": (
        "cache_implementation", "early_stopping", "max_new_tokens", "stop_strings", "temperature",
        "watermarking_config",
    ),
}  # fmt: skip
"""Entries that the files of the families lack."""
ODD: Final[list[Any]] = [..., None, "x", "3", "", -1, 0, 3, 1 << 60, 1.5, [1], [], {}, {"a": 1}, True, False]
"""What an entry is changed to; `...` removes it."""

CPU = torch.device("cpu")


def dry_run(model: Path) -> str:
    """What the dry run says: `accepted`, or the code of its refusal."""
    try:
        if not inspect_model(model).is_described and "refusal" in (
            answer := structure_process.answer({"path": str(model)})
        ):
            return f"{answer['refusal']['code']} (user)"
    except PoclError as error:
        return f"{error.code} ({error.fault})"
    return "accepted"


def load(model: Path) -> LoadedModel:
    return load_student(StudentRef(path=str(model)), None, device=CPU)


def run(model: Path) -> str:
    """The same of a run that loads it."""
    try:
        load(model)
    except PoclError as error:
        return f"{error.code} ({error.fault})"
    return "accepted"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory of a model of each family, which no test changes for longer than it lasts."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_model(family_model(family), byte_level_tokenizer(64), root / family)
    return {family: root / family for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_models_are_accepted_by_both(family: str, models: dict[str, Path]) -> None:
    assert dry_run(models[family]) == run(models[family]) == "accepted"


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_an_odd_entry_is_judged_alike(data: st.DataObject, models: dict[str, Path]) -> None:
    model = models[data.draw(st.sampled_from(FAMILIES), "family")]
    file = model / data.draw(st.sampled_from(FILES), "file")
    before = file.read_text()
    entries = json.loads(before)
    name = data.draw(st.sampled_from(sorted({*entries, *FURTHER[file.name]})), "entry")
    value = data.draw(st.sampled_from(ODD), "value")
    try:
        file.write_text(json.dumps({key: each for key, each in {**entries, name: value}.items() if each is not ...}))
        assert dry_run(model) == run(model)
    finally:
        file.write_text(before)


@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_lost_or_misshapen_weight_is_judged_alike(data: st.DataObject, models: dict[str, Path]) -> None:
    model = models[data.draw(st.sampled_from(FAMILIES), "family")]
    file = model / "model.safetensors"
    before = file.read_bytes()
    weights = load_file(file)
    name = data.draw(st.sampled_from(sorted(weights)), "weight")
    changes: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
        "lost": lambda _: {},
        "longer": lambda weight: {name: torch.cat([weight, weight])},
        "flat": lambda weight: {name: weight.flatten()},
        "renamed": lambda weight: {f"{name}_old": weight},
    }
    change = data.draw(st.sampled_from(sorted(changes)), "change")
    others = {other: weight for other, weight in weights.items() if other != name}
    try:
        save_file({**others, **changes[change](weights[name])}, file, metadata={"format": "pt"})
        assert dry_run(model) == run(model)
    finally:
        file.write_bytes(before)


# --- Generation configs ---------------------------------------------------------------------------------------


@pytest.fixture
def model(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a Llama that a test may change."""
    shutil.copytree(models["llama"], tmp_path / "model")
    return tmp_path / "model"


def write_generation(model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)


@pytest.mark.parametrize(
    ("entries", "ends", "named"),
    [
        ({}, 1, None),
        ({"eos_token_id": [2, 1]}, [2, 1], None),
        ({"eos_token_id": "2"}, 2, None),
        ({"eos_token_id": [2, 99999]}, 2, "99999"),
        ({"eos_token_id": 99999}, 1, "99999"),
        ({"eos_token_id": {"a": 1}}, 1, "eos_token_id"),
        ({"eos_token_id": None}, 1, None),
        ({"eos_token_id": 2, "pad_token_id": -1}, 2, None),
        ({"eos_token_id": 2, "watermarking_config": {"no": 1}}, 2, "watermarking_config"),
        ({"eos_token_id": 2, "max_new_tokens": -5, "early_stopping": "x", "cache_implementation": "x"}, 2, None),
    ],
    ids=str,
)
def test_generation_configs_are_used_as_far_as_they_can_be(
    entries: dict[str, Any], ends: object, named: str | None, model: Path
) -> None:
    write_generation(model, json.dumps(entries))
    # This tokenizer has more tokens than the model.
    warnings = [each for each in inspect_model(model).warnings if each.code != "tokens_without_embedding"]
    assert [warning.code for warning in warnings] == ([] if named is None else ["generation_entries_ignored"])
    assert named is None or named in warnings[0].message
    loaded = load(model).model
    assert loaded.generation_config is not None
    assert loaded.generation_config.eos_token_id == ends
    save_model(loaded, byte_level_tokenizer(64), model.parent / "saved")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"eos_token_id": 2'])
def test_generation_configs_that_are_no_json_are_refused_by_both(content: str, model: Path) -> None:
    write_generation(model, content)
    assert dry_run(model) == run(model) == "model_unsupported (user)"


# --- Weights that are not where config.json says --------------------------------------------------------------


def test_a_config_cannot_name_another_file_for_the_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, model / "zeros.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "transformers_weights": "zeros.safetensors"}))
    assert load(model).model.get_input_embeddings().get_parameter("weight").abs().sum() > 0


def test_a_sharded_training_state_beside_the_model_is_refused(model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(ModelUnsupported, match="sharded training state"):
        inspect_model(model)
    assert run(model) == "model_unsupported (user)"


def test_more_experts_for_a_token_than_there_are_is_the_fault_of_the_config(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(models["mixtral"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 99}))
    assert dry_run(model) == run(model) == "model_unsupported (user)"


# --- GGUF -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ({}, "accepted"),
        ({"quantised": True}, "accepted"),
        ({"pre": "new-rules"}, "model_unsupported (user)"),
        ({"control": "<\uff5cUser\uff5c>"}, "model_unsupported (user)"),
    ],
    ids=str,
)
def test_gguf_files_are_judged_alike(options: dict[str, Any], outcome: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", **options)
    assert dry_run(path) == run(path) == outcome


def test_a_weight_that_a_gguf_file_lacks_is_not_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_tensor = gguf.GGUFWriter.add_tensor

    def without_one(writer: gguf.GGUFWriter, name: str, *args: Any, **options: Any) -> None:
        if name != "blk.1.ffn_up.weight":
            add_tensor(writer, name, *args, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", without_one)
    path = write_gguf(tmp_path / "tiny.gguf")
    assert dry_run(path) == run(path) == "model_unsupported (user)"
