"""A run that goes on with other samples, another model or another tokenizer trains nothing and keeps what it has."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.faults.outcome import RunOutcome
from bench.faults.small_runs import write_variant
from pocl.__main__ import read_spec
from pocl.errors import InputsChanged
from pocl.events import Event, RunEnded, Sink
from pocl.export.model_directory import save_model
from pocl.layout import EVENTS_FILE, INPUTS_FILE, LOCK_FILE
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.run import run
from pocl.spec import RandomModel
from pocl.storage.inputs import pinned_inputs
from tests.faults.runs import run_until

SHAPE = {"family": "llama", "layers": 2, "hidden_size": 16, "heads": 2, "max_positions": 64}
CHATML = (
    "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a specification, its inputs and a run that stopped after step 5; the models are on disk."""
    directory = tmp_path_factory.mktemp("stopped")
    for name, seed in (("teacher", 1), ("student", 2)):
        tokenizer = byte_level_tokenizer(64)
        tokenizer.chat_template = CHATML
        save_model(random_model(RandomModel.model_validate({**SHAPE, "seed": seed})), tokenizer, directory / name)
    models = {name: {"path": str(directory / name)} for name in ("teacher", "student")}
    write_variant(directory, "restart", **models)
    run_until(5, directory / "restart.yaml", directory / "run")
    return directory


def copied(stopped: Path, target: Path) -> Path:
    """A copy of the run, with inputs of its own."""
    shutil.copytree(stopped, target)
    spec = target / "restart.yaml"
    spec.write_text(spec.read_text().replace(str(stopped), str(target)))
    pinned = target / "run" / "spec.json"
    pinned.write_text(pinned.read_text().replace(str(stopped), str(target)))
    for state in target.rglob("state.json"):
        assert str(stopped) not in state.read_text()
    return target


def continue_run(inputs: Path, stopped: Path, sink: Sink = lambda _: None) -> None:
    """Continue a copied run, as on a machine with other paths: its specification names what the first one named."""
    run(read_spec(inputs / "restart.yaml"), inputs / "run", sink, posted_spec=read_spec(stopped / "restart.yaml"))


def append_rows(inputs: Path) -> None:
    with (inputs / "train.jsonl").open("a") as file:
        file.write(json.dumps({"instruction": "Say moon.", "output": "moon"}) + "\n")


def remove_rows(inputs: Path) -> None:
    path = inputs / "train.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))


def change_a_row(inputs: Path) -> None:
    path = inputs / "train.jsonl"
    path.write_text(path.read_text().replace("Say ", "Tell ", 1))


def change_validation(inputs: Path) -> None:
    path = inputs / "validation.jsonl"
    path.write_text(path.read_text().replace("Say ", "Tell ", 1))


def change_weights(name: str) -> Callable[[Path], None]:
    def change(inputs: Path) -> None:
        path = inputs / name / "model.safetensors"
        weights = load_file(path)
        first = next(iter(weights))
        save_file({**weights, first: weights[first] + torch.ones_like(weights[first])}, path, {"format": "pt"})

    return change


def change_config(inputs: Path) -> None:
    path = inputs / "teacher" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rms_norm_eps": 0.1}))


def change_template(inputs: Path) -> None:
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = inputs / "teacher" / name
        path.write_text(path.read_text().replace("'role'] + ", "'role'] + ':' + "))


def change_tokenizer(inputs: Path) -> None:
    path = inputs / "teacher" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps({**tokenizer, "normalizer": {"type": "Lowercase"}}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (append_rows, r"train samples \(18 rows then, 19 rows now\)"),
        (remove_rows, r"train samples \(18 rows then, 2 rows now\)"),
        (change_a_row, "train samples"),
        (change_validation, "validation samples"),
        (change_weights("teacher"), "the teacher"),
        (change_weights("student"), "the student"),
        (change_config, "the teacher"),
        (change_template, "the chat template"),
        (change_tokenizer, "the tokenizer"),
    ],
)
def test_changed_input_is_refused_and_the_run_keeps_what_it_has(
    change: Callable[[Path], None], named: str, stopped: Path, tmp_path: Path
) -> None:
    inputs = copied(stopped, tmp_path / "copy")
    before = files_of(inputs / "run")
    change(inputs)
    events: list[Event] = []
    with pytest.raises(InputsChanged, match=named):
        continue_run(inputs, stopped, events.append)
    end = events[-1]
    assert isinstance(end, RunEnded)
    assert (end.code, end.fault, end.retryable) == ("inputs_changed", "user", False)
    assert files_of(inputs / "run") == before


def test_other_order_of_rows_continues_to_the_same_bits(stopped: Path, tmp_path: Path) -> None:
    inputs, undisturbed = copied(stopped, tmp_path / "copy"), copied(stopped, tmp_path / "undisturbed")
    path = inputs / "train.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    random.Random(1).shuffle(lines)
    path.write_text("".join(lines))
    for directory in (inputs, undisturbed):
        continue_run(directory, stopped)
    outcome, expected = (RunOutcome.read(directory / "run") for directory in (inputs, undisturbed))
    assert (outcome.final, outcome.card) == (expected.final, expected.card)


def test_changed_input_is_refused_before_the_first_checkpoint_too(stopped: Path, tmp_path: Path) -> None:
    inputs = copied(stopped, tmp_path / "copy")
    shutil.rmtree(inputs / "run" / "checkpoints")
    append_rows(inputs)
    with pytest.raises(InputsChanged):
        continue_run(inputs, stopped)


def test_each_training_state_has_the_inputs_of_its_run(stopped: Path) -> None:
    pinned = pinned_inputs(stopped / "run")
    assert pinned is not None
    states = [json.loads(path.read_text())["inputs"] for path in stopped.rglob("state.json")]
    assert states
    assert all(state == pinned.model_dump() for state in states)


def files_of(directory: Path) -> dict[str, bytes]:
    """Every file but the log of events, and the lock and the cache, which belong to no run."""
    skipped = {EVENTS_FILE, LOCK_FILE}
    assert (directory / INPUTS_FILE).is_file()
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in skipped and "cache" not in path.relative_to(directory).parts
    }
