"""Settings: which values are refused, and where directories lie."""

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import make_url

from domain.environment import SettingsInvalid, read_settings, refuse_unknown_variables
from domain.settings import Settings
from worker.settings import WorkerSettings

KEY = "a-key-of-decent-length"


def test_addresses_that_this_machine_alone_reaches_are_loopback() -> None:
    assert all(Settings(host=host).on_loopback for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"))
    beyond = ("0.0.0.0", "::", "192.168.1.4", "gpu-box", "localhost.example.org")
    assert not any(Settings(host=host).on_loopback for host in beyond)


def test_a_short_key_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValidationError) as raised:
        Settings(api_key="hunter2")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("wrapped", ["{}\n", "{}\r\n", '"{}"', "'{}'", ' "{}"\n', "\t{} "])
def test_space_and_quotes_around_a_key_are_dropped(wrapped: str) -> None:
    key = Settings(api_key=wrapped.format(KEY)).api_key
    assert key is not None
    assert key.get_secret_value() == KEY


def test_owners_of_the_hub_are_named_exactly_and_its_token_is_not_repeated() -> None:
    settings = Settings(hub_publish_to="acme, my-team", hub_write_token="hf_of-decent-length")
    assert settings.hub_publish_to == ("acme", "my-team")
    assert "hf_of" not in repr(settings)
    for wrong in ("acme/*", "*", "acme/model", ".."):
        with pytest.raises(ValidationError, match="POCL_HUB_PUBLISH_TO"):
            Settings(hub_publish_to=wrong)
    with pytest.raises(ValidationError, match="POCL_HUB_WRITE_TOKEN") as raised:
        Settings(hub_write_token="hf_two words of it")
    assert "words" not in str(raised.value)


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


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("", ""),
        ("*", "*"),
        ("10.0.0.1", "10.0.0.1/32"),
        ("10.0.0.1, 192.168.0.7/16", "10.0.0.1/32,192.168.0.0/16"),
        ("::1,fd00::/8", "::1/128,fd00::/8"),
    ],
)
def test_proxies_are_addresses_and_networks(given: str, read: str) -> None:
    assert Settings(trusted_proxies=given).trusted_proxies == read


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_API_KEY", "")
    assert Settings().api_key is None


def test_secrets_are_kept_out_of_the_repr() -> None:
    settings = Settings(
        api_key=KEY,
        database_url="postgresql://pocl@db/pocl",
        database_password="hunter2",
        redis_url="redis://:hunter2@r/0",
    )
    assert "hunter2" in settings.database_url
    assert KEY not in repr(settings)
    assert "hunter2" not in repr(settings)


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


# --- What people, Compose and Kubernetes write --------------------------------------------------------

WRONG = {
    "POCL_PORT": ["http", "99999", "1.5"],
    "POCL_HOST": ["http://127.0.0.1", "a b", "[]"],
    "POCL_API_KEY": ["short", " " * 24, "k" * 24 + "\x7f", "kéy-of-a-decent-length", "key\twith a tab inside"],
    "POCL_TRUSTED_PROXIES": ["nginx", "10.0.0.0/33", "10.0.0.1, nginx", "http://10.0.0.1", "*,10.0.0.1"],
    "POCL_LEASE_SECONDS": ["nan", "inf", "-1", "0", "sixty", "1e300"],
    "POCL_MAX_ATTEMPTS": ["0", "1000000"],
    "POCL_HOME": ["~no-such-user-here/x", "''", "s3://bucket/home", "/srv/p\udcffocl"],
    "POCL_MODEL_ROOTS": ["~no-such-user-here/models", "s3://bucket/models", "/srv/models:hf://acme/model"],
    "POCL_ARTIFACT_ROOT": ["s3://bucket/artifacts", "file:///srv/artifacts"],
    "POCL_ARTIFACT_STORE": [
        "S3://bucket/prefix",
        "gs://bucket",
        "https://minio.example/bucket",
        "s3://key:secret@bucket",
    ],
    "POCL_WORK_ROOT": ["nfs://filer/work"],
    "POCL_DATABASE_URL": [
        "mysql://db/x",
        "postgresql+psycopg2://db/x",
        "postgresql://db:port/x",
        "postgresql://me:p@ss@db/x",
        "postgresql://db/x?sslmod=require",
        "sqlite://x.db",
        "sqlite:///x.db?mode=ro",
        "sqlite:///file:x.db",
        "/var/lib/pocl.sqlite3",
    ],
    "POCL_REDIS_URL": [
        "localhost:6379",
        "http://localhost",
        "redis://localhost:port/0",
        "redis://:p#w@localhost/0",
        "redis://localhost/zero",
        "redis://localhost?db=two",
        "redis://localhost?retries=3",
        "redis://",
        "unix://",
        "redis://local host/0",
    ],
    "POCL_WORKER_GPUS": ["[0", "zero", "0;1"],
    "POCL_WORKER_THREADS": ["two", "0"],
    "POCL_WORKER_QUEUE": ["Pocl_A"],
    "POCL_WORKER_ENGINE": ["'python -m", "[1, 2"],
    "POCL_WORKER_GRACE_SECONDS": ["nan"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]])
def test_wrong_value_is_named_by_its_variable_and_not_repeated(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    kind = WorkerSettings if name.startswith("POCL_WORKER_") else Settings
    with pytest.raises(SettingsInvalid) as raised:
        read_settings(kind)
    (sentence,) = str(raised.value).splitlines()
    assert sentence.startswith(name)
    assert len(value) < 4 or value.endswith("://") or value not in sentence


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", "  {} ", "'{}'", '"{}"', '"{} "\n'])
def test_white_space_and_quotes_around_a_value_are_no_part_of_it(monkeypatch: pytest.MonkeyPatch, around: str) -> None:
    values = {
        "POCL_API_KEY": KEY,
        "POCL_HOST": "127.0.0.1",
        "POCL_PORT": "8001",
        "POCL_LEASE_SECONDS": "30",
        "POCL_DATABASE_URL": "postgresql://pocl@db/pocl",
        "POCL_REDIS_URL": "redis://r/1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, around.format(value))
    settings = read_settings(Settings)
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == KEY
    assert (settings.host, settings.port, settings.lease_seconds) == ("127.0.0.1", 8001, 30)
    assert (settings.database_url, settings.redis_url) == ("postgresql://pocl@db/pocl", "redis://r/1")


def test_every_path_is_expanded_and_absolute_when_it_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "ARTIFACT_ROOT", "WORK_ROOT", "CACHE_ROOT"):
        monkeypatch.setenv(f"POCL_{name}", f"~/{name}")
    monkeypatch.setenv("POCL_MODEL_ROOTS", "~/models:models")
    monkeypatch.setenv("POCL_DATABASE_URL", "sqlite:///rows/a %23.db")
    monkeypatch.setenv("POCL_WORKER_PULSE_FILE", "pulse")
    settings = read_settings(Settings)
    assert [settings.home, settings.artifact_root, settings.work_root, settings.cache_root] == [
        tmp_path / name for name in ("HOME", "ARTIFACT_ROOT", "WORK_ROOT", "CACHE_ROOT")
    ]
    assert settings.model_roots == (tmp_path / "models", tmp_path / "models")
    assert make_url(settings.database_url).database == str(tmp_path / "rows" / "a #.db")
    assert read_settings(WorkerSettings).pulse_file == tmp_path / "pulse"


@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        ("0,1", (0, 1)),
        ("0", (0,)),
        ("[0, 1]", (0, 1)),
        (" 0 , 1\n", (0, 1)),
        ("'1'", (1,)),
        ("GPU-ab-1,2", ("GPU-ab-1", 2)),
    ],
)
def test_devices_are_listed_as_json_or_between_commas(
    monkeypatch: pytest.MonkeyPatch, value: str, gpus: tuple[int | str, ...]
) -> None:
    monkeypatch.setenv("POCL_WORKER_GPUS", value)
    assert read_settings(WorkerSettings).gpus == gpus


@pytest.mark.parametrize("value", ["python -m pocl run", '["python", "-m", "pocl", "run"]', "python -m 'pocl' run"])
def test_engine_is_a_json_list_or_a_line_of_a_shell(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("POCL_WORKER_ENGINE", value)
    assert read_settings(WorkerSettings).engine == ("python", "-m", "pocl", "run")


@pytest.mark.parametrize(
    "url",
    [
        "postgres://u:p%40%23@[::1]:5432/db?sslmode=require",
        "postgresql:///db?host=/run/postgresql",
        "postgresql+psycopg://u@a,b:5433/db",
    ],
)
def test_address_of_a_server_is_taken_in_each_form_of_libpq(url: str) -> None:
    assert Settings(database_url=url).database_url == url.replace("postgres://", "postgresql://")


def test_misspelt_variable_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SettingsInvalid) as raised:
        refuse_unknown_variables(
            Settings, WorkerSettings, environ={"POCL_LEASE_SECOND": "1", "pocl_worker_gpu": "0", "POCL_HOME": "/x"}
        )
    first, second = str(raised.value).splitlines()
    assert first.startswith("POCL_LEASE_SECOND: ")
    assert "POCL_LEASE_SECONDS?" in first
    assert second.startswith("POCL_WORKER_GPU: ")
    assert "POCL_WORKER_GPUS?" in second


def test_variables_of_kubernetes_and_of_opencl_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {
        "POCL_PORT": "tcp://10.3.0.7:8000",
        "POCL_SERVICE_HOST": "10.3.0.7",
        "POCL_PORT_8000_TCP_ADDR": "10.3.0.7",
        "POCL_API_SERVICE_PORT_HTTP": "8000",
        "POCL_DEVICES": "basic",
        "POCL_CACHE_DIR": "/tmp/cl",
    }
    refuse_unknown_variables(Settings, WorkerSettings, environ=environ)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert read_settings(Settings).port == 8000


def test_traces_without_their_extra_are_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POCL_TRACES_ENDPOINT", "http://collector:4318")
    assert read_settings(Settings, home=tmp_path).traces_endpoint == "http://collector:4318"
    # As where it is not installed; there is no other way to try it here.
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsInvalid, match=r"POCL_TRACES_ENDPOINT needs the extra `traces`"):
        read_settings(Settings, home=tmp_path)


@pytest.mark.parametrize("name", ["POCL_API_KEY", "POCL_METRICS_TOKEN"])
def test_a_short_secret_is_refused_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(name, "short")
    with pytest.raises(SettingsInvalid, match=name) as refused:
        read_settings(Settings, home=tmp_path)
    assert "short" not in str(refused.value).replace("shorter", "")
