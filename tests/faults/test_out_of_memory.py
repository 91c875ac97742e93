"""A run that runs out of memory in every phase ends as one with room for all, but for rounding; resumed, to the bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.faults.outcome import RunOutcome
from bench.faults.small_runs import write_variant
from pocl.errors import OutOfMemory
from pocl.models.loading import LoadedModel, load_student
from pocl.out_of_memory import HALVED_IS_NOT_EXACT
from pocl.report.result import Result
from tests.faults.runs import run_to_end, run_until, warning_codes

# With dropout, which is drawn for each micro-batch, runs with other micro-batches could not be compared.
CHANGES = {"training": {"dropout": 0.0, "micro_batch_size": 4}}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_variant(tmp_path_factory.mktemp("memory"), "restart", **CHANGES)


def out_of_memory() -> Iterator[Exception]:
    """As a GPU says that it has no more memory and, in turn, as PyTorch says that the host refuses it."""
    while True:
        yield torch.OutOfMemoryError("CUDA out of memory")
        yield RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes")
        yield MemoryError()


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out over more than three rows or 120 tokens, and the first time that the student is loaded."""
    attempts: list[str] = []
    errors = out_of_memory()

    def refuse_large(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        (ids,) = inputs
        if len(ids) > 3 or ids.numel() > 120:
            raise next(errors)

    def load_in_small_memory(*args: Any, **options: Any) -> LoadedModel:
        attempts.append("student")
        if len(attempts) == 1:
            raise next(errors)
        loaded = load_student(*args, **options)
        loaded.model.get_input_embeddings().register_forward_pre_hook(refuse_large)
        return loaded

    monkeypatch.setattr("pocl.prepare.load_student", load_in_small_memory)


def figures(workdir: Path) -> tuple[Result, list[float]]:
    """The result, and the numbers in it that are rounded."""
    result = Result.model_validate_json((workdir / "result.json").read_bytes())
    return result, [number for each in result.evaluations for number in (each.rouge_l, each.cross_entropy)]


def rows_in_order(workdir: Path) -> list[int]:
    return [json.loads(line)["row"] for line in (workdir / "ranking.jsonl").read_text().splitlines()]


@pytest.mark.system
def test_run_out_of_memory_in_every_phase_ends_as_one_with_room(
    spec: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    roomy, tight, resumed = (tmp_path / name for name in ("roomy", "tight", "resumed"))
    run_to_end(spec, roomy)
    request.getfixturevalue("small_memory")
    events = run_to_end(spec, tight)
    assert set(warning_codes(events)) == {"generation_rows_halved", "scoring_tokens_halved", "micro_batch_halved"}
    pinned = json.loads((tight / "spec.json").read_bytes())
    assert pinned["evaluation"]["batch_size"] == 2
    assert pinned["evaluation"]["scoring_tokens"] < 4096
    result, numbers = figures(tight)
    expected, expected_numbers = figures(roomy)
    assert numbers == pytest.approx(expected_numbers, rel=1e-3)
    assert rows_in_order(tight) == rows_in_order(roomy)
    assert (expected.not_exact, result.not_exact) == ((), (HALVED_IS_NOT_EXACT,))

    run_until(5, spec, resumed)
    later = run_to_end(spec, resumed)
    assert warning_codes(later) == []
    assert RunOutcome.read(resumed).differences(RunOutcome.read(tight)) == []


def test_model_that_never_fits_is_named(spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_lazily(*_: Any, **__: Any) -> LoadedModel:
        raise torch.OutOfMemoryError("always")

    monkeypatch.setattr("pocl.prepare.load_lazily", load_lazily)
    with pytest.raises(OutOfMemory, match="The teacher does not fit"):
        run_to_end(spec, tmp_path / "run")
