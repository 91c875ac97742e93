"""Exported weights are those that were trained, rounded once to the format that was asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bench.faults.small_runs import write_variant
from pocl.__main__ import read_spec
from pocl.events import CheckpointSaved, Event
from pocl.export.model_card import CardFacts, Progress
from pocl.export.model_directory import save_model
from pocl.export.student import StudentExport
from pocl.export.weight_format import choose_export_dtype
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.plan import stage_table
from pocl.run import run
from pocl.spec import RandomModel, resolve
from pocl.storage import manifest
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer
from tests.pocl.tiny_models import tiny

SPEC = resolve({"preset": "quick", "method": "sft", "student": {"random": {}}, "data": {"train": {"path": "x"}}})
FACTS = CardFacts(SPEC, stage_table(SPEC, 12), {"kind": "random", "name": "llama"}, None, "chat", [])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exported_weights_are_the_trained_ones_rounded_once(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny(family)
    source, target = tmp_path / "source", tmp_path / "target"
    export = StudentExport(byte_tokenizer(CHATML), end_ids=(1,), facts=FACTS, dtype=dtype)
    with manifest.new_directory(source) as scratch:
        written = export.write(model, scratch, Progress(0, [], []))
        manifest.write_manifest(scratch, weights=written.weights)
    exported = export.link(model, source, target, Progress(0, [], []))
    trained, stored = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    assert stored.keys() == trained.keys()
    assert all(torch.equal(stored[name], trained[name].to(dtype)) for name in trained)
    read = AutoModelForCausalLM.from_pretrained(target)
    assert read.dtype == dtype
    for name, parameter in model.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter.detach().to(dtype)), name
    name = str(dtype).removeprefix("torch.")
    listed, config = manifest.verify(target), json.loads((target / "config.json").read_text())
    assert {listed.dtype, exported.dtype, config["dtype"], config["torch_dtype"]} == {name}
    assert listed.tied_embeddings is exported.tied_embeddings is config["tie_word_embeddings"]
    card = (target / "README.md").read_text()
    assert f"the weights are {name} in safetensors" in card
    assert ("rounded from those that were trained in float32" in card) is (dtype != torch.float32)
    # What a run continues from is as it was trained.
    assert manifest.verify(source).dtype == "float32"


def test_weight_beyond_the_format_leaves_the_directory_as_it_was_trained(tmp_path: Path) -> None:
    model = tiny("llama")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = 70_000.0
    export = StudentExport(byte_tokenizer(CHATML), dtype=torch.float16)
    with manifest.new_directory(tmp_path / "source") as scratch:
        manifest.write_manifest(scratch, weights=export.write(model, scratch, Progress(0, [], [])).weights)
    exported = export.link(model, tmp_path / "source", tmp_path / "target", Progress(0, [], []))
    assert exported.dtype == manifest.verify(tmp_path / "target").dtype == "float32"


@pytest.mark.parametrize(
    ("wanted", "stored", "chosen"),
    [
        ("fp32", torch.bfloat16, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("as_loaded", torch.float16, torch.float16),
        ("as_loaded", torch.bfloat16, torch.bfloat16),
        ("as_loaded", torch.float64, torch.float32),
    ],
)
def test_format_is_the_one_that_was_asked_for(wanted: Any, stored: torch.dtype, chosen: torch.dtype) -> None:
    assert choose_export_dtype(wanted, stored) == chosen


@pytest.mark.system
def test_run_leaves_the_format_of_its_student_and_says_so(tmp_path: Path) -> None:
    size = RandomModel.model_validate({"family": "gpt2", "layers": 2, "hidden_size": 16, "heads": 2, "seed": 1})
    model: Any = random_model(size)
    save_model(model.to(torch.bfloat16), byte_level_tokenizer(64), tmp_path / "teacher")
    path = write_variant(
        tmp_path, "restart", teacher={"path": str(tmp_path / "teacher")}, export={"dtype": "as_loaded"}
    )
    events: list[Event] = []
    result = run(read_spec(path), tmp_path / "run", events.append)
    assert result.export is not None
    assert (result.export.dtype, result.export.tied_embeddings) == ("bfloat16", True)
    assert result.export.requires == manifest.verify(tmp_path / "run" / "final").requires == "transformers>=4.57"
    saved = {event.kind: event for event in events if isinstance(event, CheckpointSaved)}
    for kind in ("best", "final"):
        directory, source = (
            tmp_path / "run" / saved[kind].path,
            tmp_path / "run" / f"checkpoints/step-{saved[kind].step:08d}",
        )
        assert manifest.verify(directory).dtype == "bfloat16"
        trained, stored = load_file(source / "model.safetensors"), load_file(directory / "model.safetensors")
        assert all(torch.equal(stored[name], trained[name].to(torch.bfloat16)) for name in trained)
    report = (tmp_path / "run" / "report.html").read_text()
    assert "bfloat16, input and output embeddings one tensor" in report
    assert "transformers&gt;=4.57" in report
