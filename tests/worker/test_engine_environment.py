"""What an engine is given of the environment of its worker."""

import os
import sysconfig
from pathlib import Path

import pytest

from tests.support.harness import ServiceHarness
from worker.engine_environment import engine_environment, redact_secrets
from worker.python_path import child_python_path

PROXY = "http://user:p%40ss@proxy.example:3128"


def environment_of(tmp_path: Path, environ: dict[str, str], *, user_id: int = 0) -> dict[str, str]:
    return engine_environment(environ, tmp_path / "tmp", home=tmp_path / "home", user_id=lambda: user_id)


def test_engine_gets_no_key_and_no_address_of_the_service(tmp_path: Path) -> None:
    secrets = ("POCL_API_KEY", "POCL_DATABASE_URL", "POCL_REDIS_URL", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY")
    environment = environment_of(tmp_path, {"PATH": "/bin", **dict.fromkeys(secrets, "secret")})
    assert "secret" not in environment.values()
    assert environment["PATH"] == "/bin"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE"),
        *("HF_HUB_OFFLINE", "HF_HUB_DOWNLOAD_TIMEOUT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
        *("http_proxy", "https_proxy", "all_proxy", "no_proxy"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    ],
)
def test_what_the_hub_needs_reaches_the_engine(tmp_path: Path, name: str) -> None:
    assert environment_of(tmp_path, {name: "/some/value"})[name] == "/some/value"


def test_certificates_of_other_clients_are_those_of_the_hub(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle.pem"
    bundle.touch()
    assert environment_of(tmp_path, {"REQUESTS_CA_BUNDLE": str(bundle)})["SSL_CERT_FILE"] == str(bundle)
    assert environment_of(tmp_path, {"CURL_CA_BUNDLE": str(tmp_path)})["SSL_CERT_DIR"] == str(tmp_path)
    named = {"REQUESTS_CA_BUNDLE": str(bundle), "SSL_CERT_FILE": "/other.pem"}
    assert environment_of(tmp_path, named)["SSL_CERT_FILE"] == "/other.pem"


def test_relative_paths_lead_where_they_led_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = environment_of(tmp_path, {"HF_HOME": "hub", "SSL_CERT_FILE": "ca.pem", "PYTHONPATH": "code::"})
    assert environment["HF_HOME"] == str(tmp_path / "hub")
    assert environment["SSL_CERT_FILE"] == str(tmp_path / "ca.pem")
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "code")


def test_devices_are_counted_as_the_driver_counts_them(tmp_path: Path) -> None:
    assert environment_of(tmp_path, {})["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize("home", [None, "", "/nonexistent", "relative"])
def test_engine_without_a_home_gets_one_of_its_own(tmp_path: Path, home: str | None) -> None:
    environment = environment_of(tmp_path, {} if home is None else {"HOME": home})
    assert environment["HOME"] == str(tmp_path / "home")
    assert (tmp_path / "home").is_dir()


def test_home_that_can_be_written_stays(tmp_path: Path) -> None:
    assert environment_of(tmp_path, {"HOME": str(tmp_path)})["HOME"] == str(tmp_path)


def test_user_that_no_table_names_gets_a_name(tmp_path: Path) -> None:
    nobody = environment_of(tmp_path, {}, user_id=54321)
    assert (nobody["USER"], nobody["LOGNAME"]) == ("uid-54321", "uid-54321")
    assert environment_of(tmp_path, {"USER": "me"}, user_id=54321)["USER"] == "me"
    assert "USER" not in environment_of(tmp_path, {}, user_id=0)


def test_tokens_and_passwords_of_proxies_are_kept_out_of_the_log() -> None:
    log = f"ProxyError: {PROXY} refused (token hf_abcdefghijk)\nhttps://hub.example/a@b\n\xff".encode("latin-1")
    redacted = redact_secrets(log, {"HF_TOKEN": "hf_abcdefghijk\n"})
    assert b"p%40ss" not in redacted
    assert b"hf_abcdefghijk" not in redacted
    assert b"proxy.example:3128 refused" in redacted
    assert redacted.endswith(b"https://hub.example/a@b\n\xff")


@pytest.mark.system
def test_stored_log_of_an_attempt_names_no_secret(harness: ServiceHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijk")
    job = harness.submit()
    harness.supervisor("--echo", "HTTPS_PROXY", "--echo", "HF_TOKEN").work_one()
    tail = harness.log(job)
    assert "HTTPS_PROXY=http://<secret>@proxy.example:3128" in tail
    assert "HF_TOKEN=<secret>" in tail


def test_checkout_is_found_by_children_and_an_installation_needs_no_path(tmp_path: Path) -> None:
    assert child_python_path({}, root=tmp_path) == str(tmp_path)
    assert child_python_path({"PYTHONPATH": f"{tmp_path}:"}, root=tmp_path) == str(tmp_path)
    assert child_python_path({}, root=Path(sysconfig.get_path("purelib"))) == ""
