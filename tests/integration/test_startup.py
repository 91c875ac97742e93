"""What keeps a command from starting is one sentence that names the setting, and never a traceback."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from domain.schema import upgrade
from domain.settings import Settings
from tests.support.api_process import ROOT, environment
from worker.embedded import CannotServe, ShutdownSignal, upgrade_when_possible, wait_until

COMMANDS = {
    "api serve": ("-m", "api", "serve"),
    "api migrate": ("-m", "api", "migrate"),
    "worker serve": ("-m", "worker", "serve", "--port", "0"),
    "worker run": ("-m", "worker", "run"),
    "worker scheduler": ("-m", "worker", "scheduler"),
}


def refusals(home: Path, *commands: str, **settings: str) -> dict[str, tuple[int, str]]:
    """Exit status and output of commands that are started together."""
    variables = environment(home, **settings)
    started = {
        name: subprocess.Popen(
            [sys.executable, *COMMANDS[name]],
            env=variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in commands
    }
    results = {}
    for name, process in started.items():
        output, _ = process.communicate(timeout=240)
        results[name] = (process.returncode, output)
    return results


def expect_sentence(results: dict[str, tuple[int, str]], variable: str) -> None:
    for name, (status, output) in results.items():
        assert (status, len(output.splitlines())) == (2, 1), f"{name}: {output}"
        assert output.startswith(variable), f"{name}: {output}"


def test_wrong_setting_is_one_sentence_of_every_command(tmp_path: Path) -> None:
    expect_sentence(refusals(tmp_path, *COMMANDS, lease_seconds="sixty"), "POCL_LEASE_SECONDS")
    assert list(tmp_path.iterdir()) == []


def test_alembic_says_it_as_well(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "alembic", "current"]
    variables = environment(tmp_path, database_url="nonsense")
    out = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.returncode != 0
    assert out.stderr.strip().startswith("POCL_DATABASE_URL")
    assert "Traceback" not in out.stderr


@pytest.mark.parametrize("fault", ["damaged", pytest.param("newer", marks=pytest.mark.slow)])
def test_unusable_database_is_one_sentence_of_every_command(tmp_path: Path, fault: str) -> None:
    # The other commands differ in what they run afterwards.
    commands = COMMANDS if fault == "newer" else ("worker serve",)
    if fault == "newer":
        upgrade(Settings(home=tmp_path))
        change_revision(tmp_path / "pocl.sqlite3")
    else:
        (tmp_path / "pocl.sqlite3").write_bytes(b"this is no database" * 400)
    before = (tmp_path / "pocl.sqlite3").read_bytes()
    expect_sentence(refusals(tmp_path, *commands, redis_url="redis://127.0.0.1:1"), "POCL_DATABASE_URL")
    assert (tmp_path / "pocl.sqlite3").read_bytes() == before


def change_revision(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
        connection.commit()


def test_database_that_is_away_is_waited_for_at_the_start(tmp_path: Path) -> None:
    waits: list[float] = []

    class Impatient(ShutdownSignal):
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            return len(waits) == 5

    settings = Settings(home=tmp_path, database_url="postgresql://pocl@127.0.0.1:1/pocl")
    upgrade_when_possible(settings, Impatient())
    assert waits == [1, 2, 4, 8, 8]


def test_broker_of_somebody_else_that_does_not_answer_is_one_sentence() -> None:
    with pytest.raises(CannotServe, match=r"the broker does not answer\..*POCL_REDIS_URL"):
        wait_until(lambda: False, [], ShutdownSignal(), "the broker", within=0)
