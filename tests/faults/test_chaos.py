"""Under a storm of faults every accepted job ends once, in the weights of an undisturbed run."""

from pathlib import Path

import pytest

from bench.faults.chaos import run_chaos


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_job_ends_once_and_correctly_under_injected_faults(database_url: str, tmp_path: Path) -> None:
    # SQLite gets a file of the service's own.
    url = None if database_url.startswith("sqlite") else database_url
    storm = run_chaos(tmp_path / "chaos", seed=3, minutes=0.5, database_url=url)
    assert storm.failure is None, storm.text()
    assert storm.faults.total() > 0
