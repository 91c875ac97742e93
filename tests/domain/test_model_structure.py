"""Models are built once as long as their files stay as they are, and what was not tried is said."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from domain.model_structure import StructureChecker
from pocl.errors import ModelUnsupported
from pocl.export.model_directory import save_model
from pocl.inspect import ModelWarning
from pocl.limited_process import LimitedProcess, ProcessFailed, ProcessOutOfTime
from pocl.models.random import byte_level_tokenizer
from pocl.preview.encoder import describe_refusal
from tests.pocl.families import family_model


@dataclass
class FakeProcess:
    """Answers as it is told to, and counts."""

    answer: dict[str, Any] = field(default_factory=dict)
    error: ProcessFailed | None = None
    asked: list[str] = field(default_factory=list)
    closed: int = 0

    def call(self, request: Any, *, seconds: float) -> Any:  # noqa: ARG002 # The process that it stands for has it.
        self.asked.append(request["path"])
        if self.error is not None:
            raise self.error
        return self.answer

    def close(self) -> None:
        self.closed += 1

    def checker(self) -> StructureChecker:
        return StructureChecker(lambda: self)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_a_model_is_tried_again_once_a_file_of_it_changed(model: Path) -> None:
    process = FakeProcess()
    checker = process.checker()
    assert checker.check(model) == checker.check(model) == ()
    assert process.asked == [str(model)]
    (model / "model.safetensors").write_text("other")
    checker.check(model)
    assert process.asked == [str(model)] * 2
    assert process.closed == 2


def test_a_refusal_is_that_of_a_run_each_time(model: Path) -> None:
    process = FakeProcess({"refusal": describe_refusal(ModelUnsupported("It lacks a weight."))})
    checker = process.checker()
    for _ in range(2):
        with pytest.raises(ModelUnsupported, match=r"It lacks a weight\."):
            checker.check(model)
    assert len(process.asked) == 1


@pytest.mark.parametrize(
    ("open_process", "reason"),
    [
        (lambda: FakeProcess(error=ProcessOutOfTime("takes more than 60 s")), "takes more than 60 s"),
        (lambda: None, "not installed"),
    ],
    ids=["out of time", "no engine"],
)
def test_what_was_not_tried_is_a_warning_and_tried_the_next_time(
    open_process: Callable[[], FakeProcess | None], reason: str, model: Path
) -> None:
    checker = StructureChecker(open_process)
    for _ in range(2):
        (warning,) = checker.check(model)
        assert warning.code == "model_not_built"
        assert reason in warning.message


@pytest.mark.system
def test_the_process_builds_models_and_names_what_they_lack(tmp_path: Path) -> None:
    whole, lacking = tmp_path / "whole", tmp_path / "lacking"
    save_model(family_model("gpt2"), byte_level_tokenizer(64), whole)
    shutil.copytree(whole, lacking)
    weights = load_file(whole / "model.safetensors")
    lost = "transformer.h.1.mlp.c_fc.weight"
    assert isinstance(weights.pop(lost), torch.Tensor)
    save_file(weights, lacking / "model.safetensors", metadata={"format": "pt"})
    with LimitedProcess("pocl.models.structure_process", memory_bytes=4 << 30) as process:
        assert process.call({"path": str(whole)}, seconds=60) == {"warnings": []}
        refused = process.call({"path": str(lacking)}, seconds=60)["refusal"]
    assert refused["code"] == "model_unsupported"
    assert lost in refused["message"]


def test_no_more_models_are_built_at_a_time_than_there_is_room_for(model: Path) -> None:
    answers: list[tuple[ModelWarning, ...]] = []

    class Nested(FakeProcess):
        """Asks for another model while its own is built, as other requests would."""

        def call(self, request: Any, *, seconds: float) -> Any:
            (model / f"other-{len(self.asked)}.safetensors").write_text("{}")
            answer = super().call(request, seconds=seconds)
            if len(self.asked) <= 2:
                answers.append(checker.check(model))
            return answer

    process = Nested()
    checker = StructureChecker(lambda: process, wait_seconds=0)
    checker.check(model)
    assert len(process.asked) == 2
    assert [warning.code for warning in answers[0]] == ["model_not_built"]
    assert "as many others as it can" in answers[0][0].message
