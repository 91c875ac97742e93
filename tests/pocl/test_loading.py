"""Models come from wherever a specification says, keep their weights, and go back to disk as they were."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from pocl.errors import (
    CheckpointCorrupt,
    EngineFailure,
    InputsChanged,
    ModelNotFound,
    ModelUnsupported,
    SpecInvalid,
    VocabularyMismatch,
)
from pocl.export.model_directory import save_model
from pocl.inspect import random_facts
from pocl.models.heads import has_tied_embeddings
from pocl.models.hub import HuggingFaceHub, PinnedHub, RepoType
from pocl.models.loading import (
    LoadedModel,
    load_student,
    load_teacher,
    load_weights,
    shared_vocabulary,
    token_limits,
)
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.spec import ModelRef, RandomModel, StudentRef
from tests.pocl.tiny_models import CONFIGS, VOCABULARY, tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 33).reshape(2, 15)
FAMILIES = ("gpt2", "opt", "llama", "qwen2")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def teacher_of(ref: ModelRef, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_teacher(ref, device=CPU, dtype=dtype)


def student_of(ref: StudentRef, teacher: LoadedModel | None = None, dropout: float | None = None) -> LoadedModel:
    return load_student(ref, teacher, device=CPU, dropout=dropout)


def saved(directory: Path, model: PreTrainedModel) -> ModelRef:
    save_model(model, byte_level_tokenizer(64), directory)
    return ModelRef(path=str(directory))


def layers_of_teacher(*layers: int) -> StudentRef:
    return StudentRef.model_validate({"from_teacher": {"layers": layers}})


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.train(False)(IDS).logits
    return logits


def tiny_ref(family: str = "llama", seed: int = 0) -> RandomModel:
    return RandomModel.model_validate({"family": family, "hidden_size": 32, "max_positions": 64, "seed": seed})


# --- From a directory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_and_loaded_model_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    loaded = teacher_of(saved(tmp_path, model))
    assert torch.equal(logits_of(loaded.model), logits_of(model))


def test_teacher_is_frozen_and_student_trains() -> None:
    ref = tiny_ref()
    teacher, student = teacher_of(ModelRef(random=ref)), student_of(StudentRef(random=ref))
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert student.model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.model.parameters())


def test_teacher_in_bf16_keeps_its_rotary_frequencies(tmp_path: Path) -> None:
    loaded = teacher_of(saved(tmp_path, tiny("llama")), torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in loaded.model.parameters())
    assert loaded.model.get_buffer("model.rotary_emb.inv_freq").dtype == torch.float32


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    ref = saved(tmp_path, tiny("llama"))
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnsupported, match="up_proj"):
        teacher_of(ref)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    ref = saved(tmp_path, tiny("llama"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 40}))
    with pytest.raises(ModelUnsupported, match=r"down_proj.weight has the shape \[32, 48\]"):
        teacher_of(ref)


def test_family_that_transformers_lacks_is_refused(tmp_path: Path) -> None:
    ref = saved(tmp_path, tiny("llama"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "unheard-of"}))
    with pytest.raises(ModelUnsupported) as raised:
        teacher_of(ref)
    assert str(tmp_path.parent) not in raised.value.message


@pytest.mark.parametrize("ref", [{"path": "/nowhere/at/all"}, {"checkpoint": "ckpt_0123456789"}])
def test_missing_paths_are_model_not_found(ref: dict[str, str]) -> None:
    with pytest.raises(ModelNotFound):
        teacher_of(ModelRef.model_validate(ref))


# --- Out of the teacher -----------------------------------------------------------------------------------


def silence(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Make layers pass their input on: what they add to the residual becomes zero."""
    for index in layers:
        for name, module in model.named_modules():
            writes = ("o_proj", "down_proj", "c_proj", "out_proj", "fc2")
            if f".{index}." in f"{name}." and name.endswith(writes):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "qwen2", "cohere", "granite"])
def test_cut_student_equals_the_teacher_with_the_other_layers_skipped(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(saved(tmp_path, tiny(name)))
    student = student_of(layers_of_teacher(0, 3), teacher)
    silence(teacher.model, (1, 2))
    torch.testing.assert_close(logits_of(student.model), logits_of(teacher.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_student_of_all_layers_equals_the_teacher(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(saved(tmp_path, tiny(name)))
    assert torch.equal(logits_of(student_of(layers_of_teacher(0, 1, 2, 3), teacher).model), logits_of(teacher.model))


@pytest.mark.parametrize("name", CONFIGS)
def test_cut_student_saves_and_loads_and_generates(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(saved(tmp_path / "teacher", tiny(name)))
    student = student_of(layers_of_teacher(1, 2), teacher)
    save_model(student.model, student.tokenizer, tmp_path / "student")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert again.config.num_hidden_layers == 2
    assert torch.equal(logits_of(again), logits_of(student.model))
    # A wrong layer number would mix up the cache.
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    mask = torch.ones_like(IDS)
    cached = again.generate(IDS, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, again.generate(IDS, attention_mask=mask, use_cache=False, **options))


def test_layer_types_in_the_config_follow_the_selected_layers(tmp_path: Path) -> None:
    teacher = teacher_of(saved(tmp_path, tiny("gemma2")))
    whole = teacher.model.config.layer_types
    assert len(set(whole)) == 2
    assert student_of(layers_of_teacher(1, 3), teacher).model.config.layer_types == [whole[1], whole[3]]
    assert teacher.model.config.layer_types == whole


def test_config_lists_of_the_same_length_that_are_not_per_layer_stay_whole(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = [4, 5, 6, 7]
    student = student_of(layers_of_teacher(0), teacher_of(saved(tmp_path, model)))
    assert student.model.config.eos_token_id == [4, 5, 6, 7]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_training_a_cut_student_does_not_change_the_teacher(name: str, tmp_path: Path) -> None:
    teacher = teacher_of(saved(tmp_path, tiny(name)))
    before = logits_of(teacher.model)
    student = student_of(layers_of_teacher(0, 1), teacher)
    for parameter in student.model.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(logits_of(teacher.model), before)
    tied = student.model.get_output_embeddings().weight is student.model.get_input_embeddings().weight
    assert tied is student.model.config.tie_word_embeddings


def test_student_of_a_rounded_teacher_starts_with_unrounded_weights(tmp_path: Path) -> None:
    ref = saved(tmp_path, tiny("llama"))
    from_exact = student_of(layers_of_teacher(0, 2), teacher_of(ref))
    from_rounded = student_of(layers_of_teacher(0, 2), teacher_of(ref, torch.bfloat16))
    assert torch.equal(logits_of(from_rounded.model), logits_of(from_exact.model))
    assert from_rounded.digest == from_exact.digest


def test_missing_teacher_layer_is_reported_with_its_pointer() -> None:
    teacher = teacher_of(ModelRef(random=tiny_ref()))
    with pytest.raises(SpecInvalid, match="/student/from_teacher/layers/1: the teacher has layers 0 to 1, not 2"):
        student_of(layers_of_teacher(0, 2), teacher)


def test_cut_student_needs_a_teacher() -> None:
    with pytest.raises(ModelNotFound, match="needs a teacher"):
        student_of(layers_of_teacher(0))


# --- Dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_dropout_acts_in_training_alone(family: str) -> None:
    ref = StudentRef(random=tiny_ref(family))
    model = student_of(ref, dropout=0.5).model
    assert not torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(logits_of(model), logits_of(student_of(ref).model))


def test_dropout_of_zero_overrides_the_config(tmp_path: Path) -> None:
    model = tiny("gpt2")
    assert model.config.resid_pdrop > 0
    saved(tmp_path, model)
    student = student_of(StudentRef(path=str(tmp_path)), dropout=0.0).model
    assert student.training
    assert torch.equal(student(IDS).logits, logits_of(model))


# --- Random -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_seeds_give_equal_models_and_others_do_not(family: str) -> None:
    one, same, other = (teacher_of(ModelRef(random=tiny_ref(family, seed))) for seed in (1, 1, 2))
    assert one.digest == same.digest != other.digest
    assert torch.equal(logits_of(one.model), logits_of(same.model))


def test_creating_a_random_model_does_not_advance_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    random_model(tiny_ref(seed=9))
    assert torch.equal(torch.rand(3), expected)


def test_byte_level_tokenizer_round_trips_any_text() -> None:
    tokenizer, text = byte_level_tokenizer(64), "Grüße, 世界 \x00\t🙂"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_byte_level_tokenizer_has_a_chat_template() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = byte_level_tokenizer(64).apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "user: hi\nassistant: ho<|eos|>\nassistant: "


# --- Vocabulary and digest --------------------------------------------------------------------------------


def test_shared_vocabulary_is_the_smaller_head() -> None:
    teacher = teacher_of(ModelRef(random=tiny_ref()))
    larger = LoadedModel(tiny("gpt2"), teacher.tokenizer, "", {})
    assert shared_vocabulary(teacher, teacher).size == random_facts(tiny_ref()).vocabulary_size
    assert shared_vocabulary(teacher, larger).size == VOCABULARY


def test_token_limits_are_the_rows_of_the_embeddings() -> None:
    teacher = teacher_of(ModelRef(random=tiny_ref()))
    smaller = LoadedModel(tiny("gpt2"), teacher.tokenizer, "", {})
    assert token_limits({"teacher": teacher, "student": smaller}, {}).embeddings == {"teacher": 259, "student": 50}


def test_different_token_ids_are_refused() -> None:
    teacher = teacher_of(ModelRef(random=tiny_ref()))
    other = byte_level_tokenizer(64)
    content = json.loads(other.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: (id_ + 1) % 256 if id_ < 256 else id_ for token, id_ in vocabulary.items()}
    moved = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(VocabularyMismatch, match="disagree about 256 tokens"):
        shared_vocabulary(teacher, LoadedModel(teacher.model, moved, "", {}))


def test_digest_depends_on_the_weights_and_not_on_their_path(tmp_path: Path) -> None:
    model = tiny("gpt2")
    here, there = teacher_of(saved(tmp_path / "a", model)), teacher_of(saved(tmp_path / "b", model))
    assert here.digest == there.digest
    model.get_parameter("transformer.ln_f.bias").data[3] = 1e-7
    assert teacher_of(saved(tmp_path / "c", model)).digest != here.digest


def test_digest_depends_on_the_config(tmp_path: Path) -> None:
    model = tiny("gpt2")
    one = teacher_of(saved(tmp_path / "a", model))
    model.config.layer_norm_epsilon = 1e-3
    assert teacher_of(saved(tmp_path / "b", model)).digest != one.digest


# --- Saving -----------------------------------------------------------------------------------------------

FRESH = """
import sys, torch, warnings
from transformers import AutoModelForCausalLM, AutoTokenizer
for directory in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    print(model(torch.tensor([[3, 4, 5]])).logits.double().sum().item(), text.strip(), tokenizer.eos_token_id,
          model.generation_config.eos_token_id)
"""


@pytest.mark.system
def test_a_saved_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    expected = []
    for family in FAMILIES:
        student = student_of(StudentRef(random=tiny_ref(family)))
        save_model(student.model, student.tokenizer, tmp_path / family)
        with torch.no_grad():
            logits = student.model.train(False)(torch.tensor([[3, 4, 5]])).logits
        expected.append(f"{logits.double().sum().item()} user: hi 258 258")
    command = [sys.executable, "-c", FRESH, *(str(tmp_path / family) for family in FAMILIES)]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    assert out.stdout.splitlines() == expected


def test_saving_twice_gives_the_same_bytes_without_a_path(tmp_path: Path) -> None:
    loaded = student_of(StudentRef(path=saved(tmp_path / "source", tiny("qwen2")).path))
    contents = []
    for name in ("one", "two"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / name)
        contents.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert contents[0] == contents[1]
    assert not any(str(tmp_path).encode() in content for content in contents[0].values())


def test_all_saved_files_have_the_same_permissions(tmp_path: Path) -> None:
    saved(tmp_path, tiny("llama"))
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1


def test_generation_config_and_chat_template_are_saved(tmp_path: Path) -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = [4, 5]
    student = student_of(layers_of_teacher(0), teacher_of(saved(tmp_path / "teacher", model)), dropout=0.0)
    save_model(student.model, student.tokenizer, tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert again.generation_config.eos_token_id == [4, 5]
    template = AutoTokenizer.from_pretrained(tmp_path / "student").chat_template
    assert template == byte_level_tokenizer(64).chat_template


@pytest.mark.parametrize("name", CONFIGS)
def test_load_weights_restores_bit_for_bit(name: str, tmp_path: Path) -> None:
    saved(tmp_path, tiny(name, seed=1))
    model = tiny(name, seed=2)
    load_weights(model, tmp_path)
    assert torch.equal(logits_of(model), logits_of(tiny(name, seed=1)))


def test_load_weights_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, tiny("gpt2"))
    with pytest.raises(CheckpointCorrupt):
        load_weights(tiny("llama"), tmp_path)


def test_load_damaged_weights_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, tiny("llama"))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointCorrupt):
        load_weights(tiny("llama"), tmp_path)


# --- The Hub ----------------------------------------------------------------------------------------------

HUB_REF = ModelRef.model_validate({"hub": {"repo": "someone/model"}})


def lay_out_cache(cache: Path, model: PreTrainedModel) -> Path:
    """A local cache in which `main` of someone/model is COMMIT, as huggingface_hub lays it out."""
    repository = cache / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    saved(snapshot, model)
    return snapshot


def test_commit_of_a_branch_is_recorded(tmp_path: Path) -> None:
    model = tiny("llama")
    lay_out_cache(tmp_path, model)
    hub = HuggingFaceHub(cache=tmp_path, offline=True)
    loaded = load_teacher(HUB_REF, device=CPU, dtype=torch.float32, hub=hub)
    assert loaded.origin == {"kind": "hub", "name": "someone/model", "revision": "main", "commit": COMMIT}
    assert torch.equal(logits_of(loaded.model), logits_of(model))


def test_unreachable_hub_is_a_retryable_failure(tmp_path: Path) -> None:
    with pytest.raises(EngineFailure) as raised:
        load_teacher(HUB_REF, device=CPU, dtype=torch.float32, hub=HuggingFaceHub(cache=tmp_path, offline=True))
    assert raised.value.retryable
    assert isinstance(raised.value.__cause__, LocalEntryNotFoundError)


class FakeHub:
    """Answers from a directory, and remembers what was asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.asked: list[tuple[str, Sequence[str]]] = []

    def snapshot(self, repo: str, revision: str, patterns: Sequence[str], *, repo_type: RepoType = "model") -> Path:
        assert (repo, repo_type) == ("someone/model", "model")
        self.asked.append((revision, patterns))
        return self.directory


def test_weights_are_fetched_at_the_inspected_commit(tmp_path: Path) -> None:
    hub = FakeHub(lay_out_cache(tmp_path, tiny("llama")))
    load_student(StudentRef(hub=HUB_REF.hub), None, device=CPU, hub=hub)
    assert [revision for revision, _ in hub.asked] == ["main", COMMIT]
    assert not any("safetensors" in pattern for pattern in hub.asked[0][1])


def test_remote_code_is_refused_before_weights_are_fetched(tmp_path: Path) -> None:
    snapshot = lay_out_cache(tmp_path, tiny("llama"))
    config = snapshot / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoConfig": "evil.Config"}}))
    hub = FakeHub(snapshot)
    with pytest.raises(ModelUnsupported, match="code of its own"):
        load_teacher(HUB_REF, device=CPU, dtype=torch.float32, hub=hub)
    assert len(hub.asked) == 1


# --- Ties and pinned commits ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("equal", [True, False])
def test_stored_head_beside_a_config_that_ties_keeps_its_weights(family: str, equal: bool, tmp_path: Path) -> None:
    model = tiny(family)
    embeddings = model.get_input_embeddings().get_parameter("weight")
    head = embeddings.detach().clone() if equal else torch.randn_like(embeddings)
    model.get_output_embeddings().weight = nn.Parameter(head)
    ref = saved(tmp_path, model)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    teacher = teacher_of(ref)
    assert torch.equal(logits_of(teacher.model), logits_of(model))
    # What transformers finds equal it ties.
    assert teacher.model.config.tie_word_embeddings is equal
    for student in (
        student_of(layers_of_teacher(0, 1, 2, 3), teacher),
        student_of(StudentRef(path=ref.path), None, 0.0),
    ):
        assert torch.equal(logits_of(student.model), logits_of(model))
        assert has_tied_embeddings(student.model) is equal


class HubWithRevisions:
    """A Hub of directories by revision."""

    def __init__(self, revisions: Mapping[str, Path]) -> None:
        self.revisions = revisions

    def snapshot(self, repo: str, revision: str, patterns: Sequence[str], *, repo_type: RepoType = "model") -> Path:
        assert (repo, repo_type, "config.json" in patterns or "*.json" in patterns) == ("owner/name", "model", True)
        if revision not in self.revisions:
            # Its initialiser wants the answer of a server.
            raise RevisionNotFoundError.__new__(RevisionNotFoundError)
        return self.revisions[revision]


def test_branch_that_moved_stays_at_the_pinned_commit(tmp_path: Path) -> None:
    old, new = (tmp_path / (letter * 40) for letter in "ab")
    for directory, seed in ((old, 0), (new, 1)):
        saved(directory, tiny("llama", seed))
    hub = HubWithRevisions({"main": new, old.name: old, new.name: new})
    ref = ModelRef.model_validate({"hub": {"repo": "owner/name"}})
    pinned = PinnedHub(hub, {"owner/name@main": old.name})
    loaded = load_teacher(ref, device=CPU, dtype=torch.float32, hub=pinned)
    assert (loaded.origin["revision"], loaded.origin["commit"]) == ("main", old.name)
    assert torch.equal(logits_of(loaded.model), logits_of(tiny("llama", 0)))
    assert load_teacher(ref, device=CPU, dtype=torch.float32, hub=hub).origin["commit"] == new.name


def test_pinned_commit_that_is_gone_is_a_changed_input(tmp_path: Path) -> None:
    saved(tmp_path / "b", tiny("llama"))
    pinned = PinnedHub(HubWithRevisions({"main": tmp_path / "b"}), {"owner/name@main": "a" * 40})
    ref = ModelRef.model_validate({"hub": {"repo": "owner/name"}})
    with pytest.raises(InputsChanged, match="aaaaaaaaaaaa"):
        load_teacher(ref, device=CPU, dtype=torch.float32, hub=pinned)


def test_licence_of_a_card_enters_the_origin(tmp_path: Path) -> None:
    ref = saved(tmp_path, tiny("llama"))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    teacher = teacher_of(ref)
    assert teacher.origin["license"] == "mit"
    assert student_of(layers_of_teacher(0), teacher).origin["license"] == "mit"
