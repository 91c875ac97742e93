"""What makes a run exact on a GPU, and what a result says where it is not."""

import os
from pathlib import Path

import pytest
import torch

from bench.faults.outcome import RunOutcome
from bench.faults.small_runs import write_variant
from pocl.__main__ import read_spec
from pocl.determinism import CUBLAS_WORKSPACE, deterministic_kernels, reasons_not_exact
from pocl.errors import SpecInvalid
from pocl.events import ArtifactWritten, Event
from pocl.run import run
from pocl.spec import DistillationSpec, resolve
from tests.faults.runs import run_to_end, run_until

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
POSTED = {"teacher": {"random": {}}, "student": {"random": {}}, "data": {"train": {"path": "rows.jsonl"}}}
SIZES = {
    "training": {"micro_batch_tokens": 64, "loss_chunk_tokens": 8},
    "evaluation": {"batch_size": 4, "scoring_tokens": 64},
}


def flags() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


def test_deterministic_kernels_are_asked_for_on_a_gpu_until_the_run_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    before = flags()
    with deterministic_kernels(CUDA):
        assert flags() == (True, False, True, False, False)
        assert os.environ[CUBLAS_WORKSPACE] == ":4096:8"
    assert flags() == before


def test_nothing_is_asked_for_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS_WORKSPACE, raising=False)
    before = flags()
    with deterministic_kernels(CPU):
        assert flags() == before
        assert CUBLAS_WORKSPACE not in os.environ


def spec_with(**resources: object) -> DistillationSpec:
    return resolve(POSTED | SIZES | {"resources": resources})


def test_a_run_on_a_cpu_is_exact() -> None:
    assert reasons_not_exact(resolve(POSTED), CPU) == []


def test_a_run_on_a_gpu_is_exact_if_it_is_deterministic_and_names_its_sizes() -> None:
    assert reasons_not_exact(spec_with(deterministic=True), CUDA) == []
    assert len(reasons_not_exact(spec_with(), CUDA)) == 1
    assert len(reasons_not_exact(resolve(POSTED | {"resources": {"deterministic": True}}), CUDA)) == 1
    assert len(reasons_not_exact(spec_with(deterministic=True, generator="vllm"), CUDA)) == 1


def test_operation_without_a_deterministic_kernel_is_refused_by_the_field(tmp_path: Path) -> None:
    events: list[Event] = []

    def sink(event: Event) -> None:
        events.append(event)
        if isinstance(event, ArtifactWritten):
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    with pytest.raises(SpecInvalid) as caught:
        run(resolve(POSTED), tmp_path, sink)
    (error,) = caught.value.field_errors
    assert (error.pointer, error.code) == ("/resources/deterministic", "no_deterministic_kernel")
    assert "cumsum_cuda_kernel" in error.detail


@pytest.mark.cuda
@pytest.mark.system
@pytest.mark.parametrize("variant", ["restart", "carry"])
def test_deterministic_run_on_a_gpu_ends_in_the_same_bits_however_often_it_is_resumed(
    tmp_path: Path, variant: str
) -> None:
    spec = write_variant(
        tmp_path, variant, training={"precision": "bf16"}, resources={"device": "cuda", "deterministic": True}
    )
    run_to_end(spec, tmp_path / "undisturbed")
    for step in (3, 7):
        run_until(step, spec, tmp_path / "resumed")
    run_to_end(spec, tmp_path / "resumed")
    undisturbed, resumed = (RunOutcome.read(tmp_path / name) for name in ("undisturbed", "resumed"))
    assert resumed.differences(undisturbed) == []
    assert read_spec(spec).resources.deterministic
