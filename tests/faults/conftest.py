from pathlib import Path

import pytest

from bench.faults.outcome import RunOutcome
from bench.faults.small_runs import write_variant
from tests.faults.runs import run_to_end


@pytest.fixture(scope="session")
def restart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A specification whose stages end at steps 2, 5 and 10, and which saves every second step."""
    return write_variant(tmp_path_factory.mktemp("restart"), "restart")


@pytest.fixture(scope="session")
def baseline(restart: Path) -> RunOutcome:
    """The outcome of that specification without a fault."""
    workdir = restart.parent / "baseline"
    run_to_end(restart, workdir)
    return RunOutcome.read(workdir)
