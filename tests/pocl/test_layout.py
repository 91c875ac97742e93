"""The names that readers outside the engine go by."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pocl.layout import ExitCode, checkpoint_dir, checkpoint_name, checkpoints_in, step_of


@given(st.integers(min_value=0, max_value=99_999_999))
def test_step_is_read_back_from_the_directory_of_its_checkpoint(step: int) -> None:
    assert step_of(checkpoint_dir(step)) == step
    assert checkpoint_dir(step).as_posix() == f"checkpoints/step-{step:08d}"


@pytest.mark.parametrize("name", ["best", "step-", "step-1a", "mis-step-00000001", ".tmp-step-00000002-1"])
def test_step_of_another_directory_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a checkpoint"):
        step_of(Path("checkpoints") / name)


def test_checkpoints_come_by_ascending_step_and_without_scratch(tmp_path: Path) -> None:
    for name in (checkpoint_name(10), checkpoint_name(2), ".tmp-step-00000003-1", "notes"):
        (tmp_path / name).mkdir()
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [2, 10]


def test_exit_codes_are_those_that_scripts_compare_with() -> None:
    assert {code.name: code.value for code in ExitCode} == {"DONE": 0, "FAILED": 1, "USAGE": 2, "STOPPED": 75}
