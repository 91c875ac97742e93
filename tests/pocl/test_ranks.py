"""The gradient of an optimiser step does not depend on the micro-batches, nor on the processes that share it."""

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from pocl.data.batches import EncodedSample
from pocl.errors import OutOfMemory
from pocl.train.ranks import SingleProcess, assign_samples
from tests.pocl.one_step import (
    CASES,
    MEANS,
    SAMPLES,
    OutOfMemoryTeacher,
    as_tensor,
    make_accumulator,
    run_step,
    samples_of_lengths,
)

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for fp32 rounding: within 1e-5 of the largest gradient, and the means to 5 digits."""
    assert results.keys() == expected.keys()
    scale = max((value.abs().max().item() for name, value in expected.items() if name != MEANS), default=0.0)
    for name, value in expected.items():
        rtol, atol = (1e-5, 1e-7) if name == MEANS else (1e-4, 1e-5 * scale)
        torch.testing.assert_close(results[name], value, rtol=rtol, atol=atol, msg=f"{name}: {{}}".format)


def single_batch_step(samples: list[EncodedSample], student: str = "qwen2") -> dict[str, Tensor]:
    """One padded micro-batch in one process."""
    means, gradients = run_step(make_accumulator(packed=False, student=student), samples)
    return {MEANS: as_tensor(means), **gradients}


# --- One process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("samples", [1, 4, 16])
def test_micro_batches_of_any_size_give_one_gradient(samples: int, packed: bool) -> None:
    means, gradients = run_step(make_accumulator(packed=packed, micro_batch_size=samples), SAMPLES["sixteen"])
    assert_same({MEANS: as_tensor(means), **gradients}, single_batch_step(SAMPLES["sixteen"]))


def test_step_means_are_means_over_response_tokens() -> None:
    # The expectation is made of single samples, weighted by their tokens here and not by the accumulator.
    steps = [run_step(make_accumulator(packed=False), [sample]) for sample in SAMPLES["sixteen"]]
    tokens = [means.tokens for means, _ in steps]
    means, gradients = run_step(make_accumulator(packed=True), SAMPLES["sixteen"])
    assert means.tokens == sum(tokens)
    for name in ("loss", "cross_entropy", "divergence"):
        expected = sum(getattr(each, name) * count for (each, _), count in zip(steps, tokens, strict=True))
        assert getattr(means, name) == pytest.approx(expected / sum(tokens), rel=1e-5)
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        expected = sum(each[name].double() * count for (_, each), count in zip(steps, tokens, strict=True))
        torch.testing.assert_close(gradient.double(), expected / sum(tokens), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("packed", [False, True])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(packed: bool) -> None:
    halved: list[int] = []
    accumulator = make_accumulator(packed=packed, teacher=OutOfMemoryTeacher(max_samples=3), halved=halved)
    means, gradients = run_step(accumulator, SAMPLES["sixteen"])
    assert_same({MEANS: as_tensor(means), **gradients}, single_batch_step(SAMPLES["sixteen"]))
    assert halved == [8, 4, 2]
    assert accumulator.micro_batch_size == 2


def test_a_single_sample_out_of_memory_raises_out_of_memory() -> None:
    with pytest.raises(OutOfMemory):
        run_step(make_accumulator(packed=True, teacher=OutOfMemoryTeacher(max_samples=0)), SAMPLES["sixteen"])


def test_a_single_process_keeps_all_samples_and_sums() -> None:
    process, tensor = SingleProcess(), torch.ones(3)
    process.all_reduce_(tensor)
    process.all_reduce_gradients([tensor])
    assert process.local_samples(SAMPLES["sixteen"]) == SAMPLES["sixteen"]
    assert torch.equal(tensor, torch.ones(3))
    assert process.all_reduce_number(2.5) == 2.5


# --- Assignment to ranks ----------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 90), max_size=40), st.integers(1, 7), st.randoms(use_true_random=False))
def test_every_sample_is_assigned_once_and_ranks_differ_by_less_than_the_longest(
    lengths: list[int], ranks: int, random: Random
) -> None:
    samples = samples_of_lengths(*lengths)
    assigned = assign_samples(samples, ranks)
    assert len(assigned) == ranks
    assert sorted(sample.digest for rank in assigned for sample in rank) == [sample.digest for sample in samples]
    loads = [sum(len(sample.input_ids) for sample in rank) for rank in assigned]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert assign_samples(random.sample(samples, len(samples)), ranks) == assigned


# --- Two processes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rank_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Means and gradients of each of two real processes."""
    directory = tmp_path_factory.mktemp("ranks")
    outs = [directory / f"{rank}.safetensors" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.pocl.one_step",
                str(rank),
                str(WORLD),
                str(directory / "rendezvous"),
                str(out),
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [load_file(out) for out in outs]


def case_of(results: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{case}/"): value for name, value in results.items() if name.startswith(f"{case}/")}


@pytest.mark.system
@pytest.mark.parametrize(("name", "packed"), CASES)
def test_two_processes_give_the_gradient_and_the_means_of_one(
    rank_results: list[dict[str, Tensor]], name: str, packed: bool
) -> None:
    expected = single_batch_step(SAMPLES[name])
    for results in rank_results:
        assert_same(case_of(results, f"{name} {packed}"), expected)


@pytest.mark.system
def test_all_ranks_end_with_the_same_bits(rank_results: list[dict[str, Tensor]]) -> None:
    first, second = rank_results
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if name != "memory/size")


@pytest.mark.system
def test_a_parameter_without_gradient_on_one_rank_receives_that_of_the_others(
    rank_results: list[dict[str, Tensor]],
) -> None:
    expected = single_batch_step(SAMPLES["one silent of two"], student="mixtral")
    for results in rank_results:
        assert_same(case_of(results, "experts"), expected)


@pytest.mark.system
def test_out_of_memory_on_one_rank_halves_the_micro_batch_on_all(rank_results: list[dict[str, Tensor]]) -> None:
    expected = single_batch_step(SAMPLES["sixteen"])
    sizes = []
    for results in rank_results:
        case = case_of(results, "memory")
        sizes.append(case.pop("size").tolist())
        assert_same(case, expected)
    (first, no_failure), (second, failures) = sizes
    assert first == second == 1
    assert no_failure == 0 < failures
