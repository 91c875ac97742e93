"""While faults are injected into the service, every accepted job ends once, in the weights of a run without faults."""

from pathlib import Path

import pytest

from bench.faults.chaos import run_chaos


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_job_ends_once_and_correctly_under_injected_faults(database_url: str, tmp_path: Path) -> None:
    # On SQLite the service creates a file of its own.
    url = None if database_url.startswith("sqlite") else database_url
    result = run_chaos(tmp_path / "chaos", seed=3, minutes=0.5, database_url=url, away_seconds=10)
    assert result.failure is None, result.text()
    assert result.faults.total() > 0
