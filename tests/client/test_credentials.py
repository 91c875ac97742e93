"""Which service and which key a client takes."""

import stat
from pathlib import Path

import pytest

from pocl_client.credentials import (
    DEFAULT_URL,
    Credentials,
    CredentialsInvalid,
    checked_url,
    find_credentials,
    login_path,
    loopback_host,
    read_logins,
    write_login,
)

OTHER = "https://pocl.example.com"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"POCL_CONFIG_DIR": str(tmp_path / "config")}


def test_without_anything_it_is_the_service_of_this_machine(environment: dict[str, str]) -> None:
    assert find_credentials(environment=environment) == Credentials(DEFAULT_URL, None)


def test_what_is_nearer_to_the_call_counts(tmp_path: Path, environment: dict[str, str]) -> None:
    file = tmp_path / "key"
    file.write_text("key-of-file\n")
    write_login(login_path(environment), OTHER, "key-of-login")
    assert find_credentials(environment=environment) == Credentials(OTHER, "key-of-login")
    environment["POCL_API_KEY_FILE"] = str(file)
    assert find_credentials(environment=environment) == Credentials(OTHER, "key-of-file")
    environment["POCL_API_KEY"] = "key-of-variable"
    assert find_credentials(environment=environment) == Credentials(OTHER, "key-of-variable")
    environment["POCL_URL"] = "http://localhost:8001/"
    assert find_credentials(environment=environment) == Credentials("http://localhost:8001", "key-of-variable")
    found = find_credentials("http://localhost:8002/v1", "key-of-argument", environment)
    assert found == Credentials("http://localhost:8002", "key-of-argument")


def test_a_key_is_for_the_address_that_it_was_written_with(environment: dict[str, str]) -> None:
    write_login(login_path(environment), OTHER, "key-of-login")
    assert find_credentials("http://elsewhere.example.com", environment=environment).key is None


def test_a_login_is_for_its_user_alone(environment: dict[str, str]) -> None:
    path = login_path(environment)
    write_login(path, OTHER, "first")
    write_login(path, OTHER, "second")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert read_logins(path) == {OTHER: "second"}


def test_the_last_login_is_the_first(environment: dict[str, str]) -> None:
    path = login_path(environment)
    for url in (OTHER, DEFAULT_URL, OTHER):
        write_login(path, url, "key")
    assert list(read_logins(path)) == [OTHER, DEFAULT_URL]
    write_login(path, OTHER, None)
    assert list(read_logins(path)) == [DEFAULT_URL]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"logins": 3}', "\x00"])
def test_a_damaged_login_is_named(environment: dict[str, str], content: str) -> None:
    path = login_path(environment)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(CredentialsInvalid, match=str(path)):
        find_credentials(environment=environment)


@pytest.mark.parametrize(
    "text",
    ["", "service", "ftp://service", "http://", "http://user:secret@service", "http://s:99999", "http://s?x=1", "//s"],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(CredentialsInvalid, match="address"):
        checked_url(text)


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1"),
        ("http://127.0.0.2", "127.0.0.2"),
        ("https://localhost:8443/pocl", "localhost"),
        ("http://[::1]:8000", "[::1]"),
        ("http://localhost.example", None),
        ("http://10.0.0.1:8000", None),
        ("https://service.example", None),
    ],
)
def test_an_address_of_this_machine_is_told_from_others(url: str, host: str | None) -> None:
    assert loopback_host(url) == host


@pytest.mark.parametrize("key", ["", "two words", "line\nbreak", "schlüssel", "\x00"])
def test_what_is_no_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(CredentialsInvalid) as caught:
        find_credentials(key=key, environment={})
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CredentialsInvalid, match="POCL_API_KEY_FILE"):
        find_credentials(environment={"POCL_API_KEY_FILE": str(tmp_path / name)})


def test_no_representation_shows_a_key() -> None:
    assert "secret" not in repr(Credentials(OTHER, "secret"))
