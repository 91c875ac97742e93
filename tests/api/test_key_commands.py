"""`python -m api keys`: keys without the service, and beside it."""

import sys
from pathlib import Path

import pytest

from api.__main__ import main
from domain.db import Database
from domain.keys.repository import VerifiedKey, verify
from domain.keys.tokens import parse_token
from domain.local_key import make_local_key, read_local_key
from domain.settings import Settings


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that is not there yet."""
    monkeypatch.setenv("POCL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["api", "keys", *arguments])
    return main()


def verified(home: Path, text: str) -> object:
    token = parse_token(text)
    assert token is not None
    database = Database(Settings(home=home).database_url)
    with database.transaction(write=False) as session:
        outcome = verify(session, token.key_id, token.sha256)
    database.close()
    return outcome


def test_first_key_is_made_before_the_service_ever_ran_and_lives_until_it_is_revoked(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "create", "--scope", "submit", "--name", "ci", "--days", "30") == 0
    first = capsys.readouterr().out.strip()
    made = verified(home, first)
    assert isinstance(made, VerifiedKey)
    assert (made.project, made.scopes) == ("default", ("submit",))
    assert run(monkeypatch, "rotate", made.key_id, "--grace-seconds", "0") == 0
    second = capsys.readouterr().out.strip()
    assert (verified(home, first), type(verified(home, second))) == ("wrong_secret", VerifiedKey)
    assert run(monkeypatch, "list") == 0
    listed = capsys.readouterr().out
    assert made.key_id in listed
    assert "scopes=submit" in listed
    assert second not in listed
    assert run(monkeypatch, "revoke", made.key_id) == 0
    assert verified(home, second) == "revoked_key"
    assert run(monkeypatch, "rotate", made.key_id) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "--project", "nobody"),
        ("create", "--days", "-1"),
        ("create", "--days", "nan"),
        ("revoke", "key_00000000"),
        ("rotate", "nonsense"),
    ],
    ids=" ".join,
)
def test_what_is_wrong_is_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    del home
    assert run(monkeypatch, *arguments) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


def test_key_of_the_first_start_is_replaced_by_a_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(mode=0o700)
    before = make_local_key(home)
    assert run(monkeypatch, "rotate", "local") == 0
    assert read_local_key(home) not in (None, before)
