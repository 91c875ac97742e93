"""Of a teacher on disk only what is needed is read, and what is read is what the whole would give."""

import gc
import json
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pocl.export.model_directory import save_model
from pocl.models.digest import DigestStore, head_digest, model_digest
from pocl.models.heads import apply_head, output_head
from pocl.models.loading import LazyModel, load_lazily, load_student, load_teacher
from pocl.models.output_head import extract_head
from pocl.models.random import byte_level_tokenizer
from pocl.spec import ModelRef, RandomModel, StudentRef
from tests.pocl.tiny_models import CONFIGS, tiny

CPU = torch.device("cpu")
HOUR_NS = 3600 * 10**9


def saved(directory: Path, name: str = "llama", seed: int = 0) -> ModelRef:
    """A model on disk that is not new."""
    save_model(tiny(name, seed), byte_level_tokenizer(64), directory)
    settle(directory)
    return ModelRef(path=str(directory))


def settle(directory: Path) -> None:
    """Make files look as if they had been as they are for an hour."""
    for path in directory.iterdir():
        os.utime(path, ns=(0, path.stat().st_mtime_ns - HOUR_NS))


def lazily(ref: ModelRef, store: Path, dtype: torch.dtype = torch.float32) -> LazyModel:
    return load_lazily(ref, device=CPU, dtype=dtype, digests=DigestStore(store / "digests.json"))


def overwrite(directory: Path, is_doomed: Callable[[str], bool]) -> int:
    """Fill tensors of `model.safetensors` with NaN behind the back of the file's size, time and inode; their number."""
    path = directory / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        doomed = [entry["data_offsets"] for name, entry in header.items() if is_doomed(name)]
        for start, stop in doomed:
            file.seek(8 + length + start)
            file.write(b"\xff" * (stop - start))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return len(doomed)


def is_of_a_layer(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_head_alone_equals_that_of_the_whole_and_no_layer_is_read(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    ref = saved(tmp_path / "model", name)
    whole = lazily(ref, tmp_path, dtype).whole()
    digest = head_digest(whole)
    assert overwrite(tmp_path / "model", is_of_a_layer) > 4
    again = lazily(ref, tmp_path, dtype)
    assert all(weight.is_meta for weight in again.structure.parameters())
    head = again.head_only(digest)
    assert head is not None
    hidden = torch.randn(5, output_head(whole).get_parameter("weight").shape[1], dtype=dtype)
    assert torch.equal(apply_head(head, hidden), apply_head(whole, hidden))
    assert extract_head(head) is not None
    assert not head.training
    assert sum(weight.numel() for weight in head.parameters()) < sum(weight.numel() for weight in whole.parameters())


def test_structure_has_the_configs_of_the_whole(tmp_path: Path) -> None:
    model = tiny("llama")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [5, 6]
    save_model(model, byte_level_tokenizer(64), tmp_path / "model")
    settle(tmp_path / "model")
    ref = ModelRef(path=str(tmp_path / "model"))
    whole = lazily(ref, tmp_path).whole()
    structure = lazily(ref, tmp_path).structure
    assert structure.generation_config is not None
    assert whole.generation_config is not None
    assert structure.generation_config.to_dict() == whole.generation_config.to_dict()
    assert structure.config._attn_implementation == whole.config._attn_implementation
    assert [(name, weight.shape) for name, weight in structure.named_parameters()] == [
        (name, weight.shape) for name, weight in whole.named_parameters()
    ]


def test_head_of_another_digest_is_a_doubt(tmp_path: Path) -> None:
    ref = saved(tmp_path / "model")
    digest = head_digest(lazily(ref, tmp_path).whole())
    assert lazily(ref, tmp_path).head_only("0" * 64) is None
    overwrite(tmp_path / "model", lambda name: "lm_head" in name)
    assert lazily(ref, tmp_path).head_only(digest) is None


def test_digest_is_that_of_the_whole_and_known_at_the_next_start(tmp_path: Path) -> None:
    ref = saved(tmp_path / "model")
    expected = load_teacher(ref, device=CPU, dtype=torch.float32).digest
    assert lazily(ref, tmp_path).digest == expected
    overwrite(tmp_path / "model", is_of_a_layer)
    assert lazily(ref, tmp_path).digest == expected
    student = load_student(StudentRef(path=ref.path), None, device=CPU, digests=DigestStore(tmp_path / "digests.json"))
    assert student.digest == expected


def test_a_changed_file_has_a_new_digest(tmp_path: Path) -> None:
    before = lazily(saved(tmp_path / "model"), tmp_path).digest
    changed = saved(tmp_path / "model", seed=1)
    assert lazily(changed, tmp_path).digest != before
    assert lazily(changed, tmp_path).digest == load_teacher(changed, device=CPU, dtype=torch.float32).digest


@pytest.mark.parametrize("change", ["time", "size", "inode", "config"])
def test_key_of_a_model_names_what_may_have_changed(tmp_path: Path, change: str) -> None:
    directory, store = tmp_path / "model", DigestStore(tmp_path / "digests.json")
    saved(directory)
    before = store.key(directory)
    weights = directory / "model.safetensors"
    then = weights.stat().st_mtime_ns
    if change == "time":
        os.utime(weights, ns=(then, then + 1))
    elif change == "size":
        weights.write_bytes(weights.read_bytes() + b"\0")
        os.utime(weights, ns=(then, then))
    elif change == "inode":
        (directory / "copy").write_bytes(weights.read_bytes())
        (directory / "copy").rename(weights)
        os.utime(weights, ns=(then, then))
    else:
        (directory / "config.json").write_text("{}")
        os.utime(directory / "config.json", ns=(then, then))
    assert None not in (before, store.key(directory))
    assert store.key(directory) != before


def test_a_file_that_has_just_been_written_is_digested_anew(tmp_path: Path) -> None:
    store = DigestStore(tmp_path / "digests.json")
    saved(tmp_path / "model")
    os.utime(tmp_path / "model" / "config.json", (time.time(), time.time()))
    assert store.key(tmp_path / "model") is None
    store.keep(None, "d")
    assert store.find(None) is None
    assert not store.path.exists()


@pytest.mark.parametrize("content", ["", "[]", "{", "\0"])
def test_a_damaged_store_counts_as_empty_and_a_full_one_drops_the_oldest(tmp_path: Path, content: str) -> None:
    store = DigestStore(tmp_path / "digests.json")
    store.path.write_text(content)
    for index in range(300):
        store.keep(str(index), f"d{index}")
    assert store.find("0") is None
    assert store.find("299") == "d299"
    assert len(json.loads(store.path.read_bytes())) == 256


def test_a_store_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = DigestStore(tmp_path / "file" / "digests.json")
    store.keep("k", "d")
    assert store.find("k") is None


LAYERS = StudentRef.model_validate({"from_teacher": {"layers": [0, 2]}})


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_student_cut_out_of_a_known_teacher_reads_its_layers_alone(tmp_path: Path, name: str) -> None:
    ref = saved(tmp_path / "model", name)
    first = load_student(LAYERS, lazily(ref, tmp_path, torch.bfloat16), device=CPU)
    expected = load_student(LAYERS, load_teacher(ref, device=CPU, dtype=torch.float32), device=CPU)
    assert overwrite(tmp_path / "model", lambda name: ".1." in name) > 4
    teacher = lazily(ref, tmp_path, torch.bfloat16)
    again = load_student(LAYERS, teacher, device=CPU)
    assert first.digest == again.digest == expected.digest == model_digest(expected.model)
    for (one, weight), (other, same) in zip(
        expected.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert one == other
        assert torch.equal(weight, same)
    # A layer that is not as it was is a doubt: the whole is read, and has what the file has.
    overwrite(tmp_path / "model", lambda name: ".2." in name)
    assert load_student(LAYERS, lazily(ref, tmp_path, torch.bfloat16), device=CPU).digest != expected.digest


def test_released_layers_are_freed_and_read_again_if_asked_for() -> None:
    size = {"family": "llama", "hidden_size": 32, "max_positions": 64}
    ref = ModelRef(random=RandomModel.model_validate(size))
    teacher = load_lazily(ref, device=CPU, dtype=torch.float32, digests=DigestStore(Path("unused")))
    digest = head_digest(teacher.whole())
    layer = weakref.ref(teacher.whole().get_decoder().layers[0])
    teacher.release()
    gc.collect()
    assert layer() is None
    assert model_digest(teacher.whole()) == teacher.digest
    assert teacher.head_only(digest) is not None
