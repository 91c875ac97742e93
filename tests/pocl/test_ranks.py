"""The gradient of an optimiser step does not depend on its cut into micro-batches, nor on that into processes."""

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
    ROWS,
    OutOfMemoryTeacher,
    as_tensor,
    make_accumulator,
    run_step,
    samples_of_lengths,
)

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for fp32 rounding: within 1e-5 of the largest gradient, and the means to 5 digits."""
    assert found.keys() == expected.keys()
    scale = max((value.abs().max().item() for name, value in expected.items() if name != MEANS), default=0.0)
    for name, value in expected.items():
        rtol, atol = (1e-5, 1e-7) if name == MEANS else (1e-4, 1e-5 * scale)
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=f"{name}: {{}}".format)


def whole(rows: list[EncodedSample], student: str = "qwen2") -> dict[str, Tensor]:
    """One padded micro-batch in one process."""
    means, gradients = run_step(make_accumulator(packed=False, student=student), rows)
    return {MEANS: as_tensor(means), **gradients}


# --- One process -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("samples", [1, 4, 16])
def test_micro_batches_of_any_size_give_one_gradient(samples: int, packed: bool) -> None:
    means, gradients = run_step(make_accumulator(packed=packed, micro_batch_size=samples), ROWS["sixteen"])
    assert_same({MEANS: as_tensor(means), **gradients}, whole(ROWS["sixteen"]))


def test_a_step_is_the_mean_over_its_response_tokens() -> None:
    # Against single rows, weighted by their tokens here and not by the loop.
    steps = [run_step(make_accumulator(packed=False), [row]) for row in ROWS["sixteen"]]
    tokens = [means.tokens for means, _ in steps]
    means, gradients = run_step(make_accumulator(packed=True), ROWS["sixteen"])
    assert means.tokens == sum(tokens)
    for name in ("loss", "cross_entropy", "divergence"):
        of_rows = sum(getattr(each, name) * count for (each, _), count in zip(steps, tokens, strict=True))
        assert getattr(means, name) == pytest.approx(of_rows / sum(tokens), rel=1e-5)
    scale = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, gradient in gradients.items():
        of_rows = sum(each[name].double() * count for (_, each), count in zip(steps, tokens, strict=True))
        torch.testing.assert_close(gradient.double(), of_rows / sum(tokens), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("packed", [False, True])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(packed: bool) -> None:
    halved: list[int] = []
    accumulation = make_accumulator(packed=packed, teacher=OutOfMemoryTeacher(rows=3), halved=halved)
    means, gradients = run_step(accumulation, ROWS["sixteen"])
    assert_same({MEANS: as_tensor(means), **gradients}, whole(ROWS["sixteen"]))
    assert halved == [8, 4, 2]
    assert accumulation.micro_batch_size == 2


def test_a_row_that_does_not_fit_by_itself_ends_the_run() -> None:
    with pytest.raises(OutOfMemory):
        run_step(make_accumulator(packed=True, teacher=OutOfMemoryTeacher(rows=0)), ROWS["sixteen"])


def test_alone_there_is_nothing_to_share() -> None:
    alone, tensor = SingleProcess(), torch.ones(3)
    alone.all_reduce_(tensor)
    alone.all_reduce_gradients([tensor])
    assert alone.local_samples(ROWS["sixteen"]) == ROWS["sixteen"]
    assert torch.equal(tensor, torch.ones(3))
    assert alone.all_reduce_number(2.5) == 2.5


# --- Dealing ---------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 90), max_size=40), st.integers(1, 7), st.randoms(use_true_random=False))
def test_every_row_is_dealt_once_and_ranks_differ_by_less_than_the_longest(
    lengths: list[int], ranks: int, random: Random
) -> None:
    rows = samples_of_lengths(*lengths)
    hands = assign_samples(rows, ranks)
    assert len(hands) == ranks
    assert sorted(row.digest for hand in hands for row in hand) == [row.digest for row in rows]
    loads = [sum(len(row.input_ids) for row in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert assign_samples(random.sample(rows, len(rows)), ranks) == hands


# --- Two processes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two real processes ended with."""
    directory = tmp_path_factory.mktemp("ranks")
    outs = [directory / f"{rank}.safetensors" for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.pocl.one_step", str(rank), str(WORLD), str(directory / "meeting"), str(out)],
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


def case_of(found: dict[str, Tensor], case: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{case}/"): value for name, value in found.items() if name.startswith(f"{case}/")}


@pytest.mark.parametrize(("name", "packed"), CASES)
def test_two_processes_give_the_gradient_and_the_means_of_one(
    of_ranks: list[dict[str, Tensor]], name: str, packed: bool
) -> None:
    expected = whole(ROWS[name])
    for found in of_ranks:
        assert_same(case_of(found, f"{name} {packed}"), expected)


def test_all_ranks_end_with_the_same_bits(of_ranks: list[dict[str, Tensor]]) -> None:
    first, second = of_ranks
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first if name != "memory/size")


def test_a_parameter_without_gradient_on_one_rank_has_that_of_the_others(of_ranks: list[dict[str, Tensor]]) -> None:
    expected = whole(ROWS["one silent of two"], student="mixtral")
    for found in of_ranks:
        assert_same(case_of(found, "experts"), expected)


def test_out_of_memory_on_one_rank_halves_the_micro_batch_on_all(of_ranks: list[dict[str, Tensor]]) -> None:
    expected = whole(ROWS["sixteen"])
    sizes = []
    for found in of_ranks:
        case = case_of(found, "memory")
        sizes.append(case.pop("size").tolist())
        assert_same(case, expected)
    (first, no_failure), (second, failures) = sizes
    assert first == second == 1
    assert no_failure == 0 < failures
