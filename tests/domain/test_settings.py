"""Settings: which values are refused, and where directories lie."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import make_url

from domain.settings import Settings

KEY = "a-key-of-decent-length"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_key(host: str) -> None:
    assert Settings(host=host).on_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "gpu-box", "localhost.example.org"])
def test_listening_beyond_loopback_needs_a_key(host: str) -> None:
    with pytest.raises(ValidationError, match="POCL_API_KEY"):
        Settings(host=host)
    assert not Settings(host=host, api_key=KEY).on_loopback


def test_a_short_key_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValidationError) as raised:
        Settings(api_key="hunter2")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("wrapped", ["{}\n", "{}\r\n", '"{}"', "'{}'", ' "{}"\n', "\t{} "])
def test_space_and_quotes_around_a_key_are_dropped(wrapped: str) -> None:
    key = Settings(api_key=wrapped.format(KEY)).api_key
    assert key is not None
    assert key.get_secret_value() == KEY


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY}é", f"{KEY}\x7f", f"{KEY}\tb"], ids=ascii)
def test_a_key_that_no_header_carries_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ValidationError, match="printable ASCII") as raised:
        Settings(api_key=key)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("key", [" " * 24, f'"{" " * 20}"', "'short'" + " " * 20], ids=repr)
def test_a_key_that_is_mostly_space_and_quotes_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="at least 16 characters"):
        Settings(api_key=key)


def test_root_path_has_no_slash_at_its_end() -> None:
    assert [Settings(root_path=path).root_path for path in ("", "/", "/pocl", "/a/b.c/")] == ["", "", "/pocl", "/a/b.c"]


@pytest.mark.parametrize("path", ["pocl", "//evil.example", "/a//b", "/a?b", "/a b", "https://a.example/pocl"])
def test_root_path_of_another_form_is_refused(path: str) -> None:
    with pytest.raises(ValidationError, match="root_path"):
        Settings(root_path=path)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_API_KEY", "")
    assert Settings().api_key is None


def test_secrets_are_kept_out_of_the_repr() -> None:
    settings = Settings(
        api_key=KEY, database_url="postgresql://pocl:password@db/pocl", redis_url="redis://:password@r/0"
    )
    assert KEY not in repr(settings)
    assert "password" not in repr(settings)


def test_directories_lie_below_home_unless_they_are_set(tmp_path: Path) -> None:
    home = tmp_path / "a home?100%#"
    settings = Settings(home=home, work_root=tmp_path / "scratch")
    assert settings.model_roots == (home / "models",)
    assert settings.artifact_root == home / "artifacts"
    assert settings.work_root == tmp_path / "scratch"
    assert make_url(settings.database_url).database == str(home / "pocl.sqlite3")


def test_home_does_not_move_with_the_working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings().home == tmp_path / ".pocl"


def test_model_roots_are_separated_like_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_MODEL_ROOTS", "/srv/models:/data/more models:")
    assert Settings().model_roots == (Path("/srv/models"), Path("/data/more models"))


@pytest.mark.parametrize("url", ["mysql://db/x", "sqlite://", "sqlite:///:memory:", "nonsense", "postgresql:/x y"])
def test_an_unusable_database_url_is_refused(url: str) -> None:
    with pytest.raises(ValidationError, match="POCL_DATABASE_URL"):
        Settings(database_url=url)


def test_a_lease_must_outlast_two_heartbeats() -> None:
    with pytest.raises(ValidationError, match="HEARTBEAT"):
        Settings(lease_seconds=10, heartbeat_seconds=6)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"lease_second": 10})
