"""Secrets out of files: what is read, what is refused and how, and the passwords that become a part of addresses."""

import os
from pathlib import Path

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.utils.url import parse_url
from pydantic import SecretStr
from sqlalchemy import make_url

from domain.environment import SettingsInvalid, read_settings, refuse_unknown_variables
from domain.process_secrets import SECRET_VARIABLES
from domain.secret_files import file_variable, secret_files
from domain.settings import Settings
from tests.support.secret_values import VALID_SECRETS
from worker.app import broker_url, celery_app
from worker.settings import WorkerSettings

KEY = "a-key-of-decent-length"
PASSWORDS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=30)


def plain(value: object) -> object:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def field_of(variable: str) -> str:
    return variable.removeprefix("POCL_").lower()


def test_every_secret_of_the_settings_has_a_valid_example() -> None:
    fields = {f"POCL_{name}".upper() for name in Settings.model_fields}
    assert VALID_SECRETS.keys() == fields & set(SECRET_VARIABLES)


@pytest.mark.parametrize("variable", sorted(VALID_SECRETS))
@pytest.mark.parametrize("ending", ["", "\n", "\r\n", " \n\n"], ids=repr)
def test_each_secret_may_be_given_by_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, ending: str
) -> None:
    file = tmp_path / "secret"
    for name, value in VALID_SECRETS[variable].items():
        monkeypatch.setenv(name, value)
    by_variable = read_settings(Settings, home=tmp_path)
    value = os.environ.pop(variable)
    file.write_text(value + ending, encoding="utf-8")
    monkeypatch.setenv(f"{variable}_FILE", str(file))
    refuse_unknown_variables(Settings, WorkerSettings)
    by_file = read_settings(Settings, home=tmp_path)
    assert by_file == by_variable
    assert plain(getattr(by_file, field_of(variable))) == value
    assert secret_files(os.environ) == [file]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\xff\xfe\x00k", "UTF-8"),
        (b"first-line-of-decent-length\nsecond", "several lines"),
        (b"key\x00with-a-nul-inside-of-it", "control characters"),
        (b"k" * 70_000, "65536 bytes"),
        (b"''", "is blank"),
        (b"short-key", "at least 16 characters"),
    ],
    ids=["missing", "empty", "blank", "binary", "lines", "nul", "large", "quotes", "short"],
)
def test_a_file_that_holds_no_secret_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "a-secret-by-mistake"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("POCL_API_KEY_FILE", str(file))
    with pytest.raises(SettingsInvalid) as refused:
        read_settings(Settings, home=tmp_path)
    (sentence,) = str(refused.value).splitlines()
    assert sentence.startswith("POCL_API_KEY")
    assert said in sentence
    # Somebody may have given the secret itself for the path.
    assert file.name not in sentence


def test_a_directory_a_pipe_and_a_file_of_another_user_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe, closed = tmp_path / "pipe", tmp_path / "closed"
    os.mkfifo(pipe)
    closed.write_text(KEY)
    closed.chmod(0)
    unusable = [tmp_path, pipe, Path("/dev/null"), *([] if os.access(closed, os.R_OK) else [closed])]
    for path in unusable:
        monkeypatch.setenv("POCL_API_KEY_FILE", str(path))
        with pytest.raises(SettingsInvalid, match=r"^POCL_API_KEY_FILE: names "):
            read_settings(Settings, home=tmp_path)


def test_a_secret_that_is_given_twice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(KEY)
    monkeypatch.setenv("POCL_API_KEY_FILE", str(file))
    monkeypatch.setenv("POCL_API_KEY", KEY)
    with pytest.raises(SettingsInvalid, match=r"^POCL_API_KEY: is given twice, itself and by POCL_API_KEY_FILE"):
        read_settings(Settings, home=tmp_path)
    # Compose passes on variables that are empty.
    monkeypatch.setenv("POCL_API_KEY", "")
    assert plain(read_settings(Settings, home=tmp_path).api_key) == KEY
    monkeypatch.setenv("POCL_API_KEY_FILE", "")
    assert read_settings(Settings, home=tmp_path).api_key is None


def test_only_secrets_have_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert file_variable("POCL_PORT") is None
    with pytest.raises(SettingsInvalid, match="POCL_PORT_FILE: there is no such setting"):
        refuse_unknown_variables(Settings, WorkerSettings, environ={"POCL_PORT_FILE": "/x"})
    # This one is a setting of its own.
    monkeypatch.setenv("POCL_REDIS_CA_FILE", "/etc/ca.pem")
    assert read_settings(Settings, home=tmp_path).redis_ca_file == Path("/etc/ca.pem")


# --- Passwords beside addresses ---------------------------------------------------------------------


@given(PASSWORDS)
@settings(max_examples=30)
def test_any_password_reaches_the_drivers_as_it_is(password: str) -> None:
    read = Settings(
        database_url="postgresql+psycopg://pocl@db:5432/pocl?sslmode=require",
        database_password=password,
        redis_url="redis://r:6379/2",
        redis_password=password,
    )
    url = make_url(read.database_url)
    assert (url.password, url.username, url.host, url.port, url.database) == (password, "pocl", "db", 5432, "pocl")
    assert url.query == {"sslmode": "require"}
    assert read.redis_url is not None
    direct = redis.Redis.from_url(broker_url(read.redis_url)).connection_pool.connection_kwargs
    assert (direct["password"], direct["host"], direct["port"], direct["db"]) == (password, "r", 6379, 2)


def test_the_doorbell_gets_the_same_password() -> None:
    password = "p@ss:w/o#r?d%41 \u00e9"
    read = Settings(redis_url="rediss://user@r:6379/2", redis_password=password)
    assert read.redis_url is not None
    by_kombu = parse_url(celery_app(broker_url(read.redis_url), "pocl").conf.broker_url)
    assert (by_kombu["userid"], by_kombu["password"], by_kombu["hostname"]) == ("user", password, "r")


@pytest.mark.parametrize(
    ("values", "variable"),
    [
        ({"database_password": "p"}, "POCL_DATABASE_PASSWORD"),
        ({"database_password": "p", "database_url": "postgresql://u:q@db/x"}, "POCL_DATABASE_URL"),
        ({"database_password": "p", "database_url": "postgresql://u@db/x?password=q"}, "POCL_DATABASE_URL"),
        ({"database_password": "p", "database_url": "postgresql://db/x"}, "POCL_DATABASE_URL"),
        ({"redis_password": "p"}, "POCL_REDIS_PASSWORD"),
        ({"redis_password": "p", "redis_url": "unix:///run/redis.sock"}, "POCL_REDIS_PASSWORD"),
        ({"redis_password": "p", "redis_url": "redis://:q@r/0"}, "POCL_REDIS_URL"),
    ],
    ids=["sqlite", "twice", "twice as a parameter", "no user", "no broker", "socket", "broker twice"],
)
def test_a_password_that_has_no_place_in_its_address_is_refused(
    tmp_path: Path, values: dict[str, str], variable: str
) -> None:
    with pytest.raises(SettingsInvalid) as refused:
        read_settings(Settings, home=tmp_path, **values)
    (sentence,) = str(refused.value).splitlines()
    assert sentence.startswith(variable)
