"""Hostile model directories are refused with a reason; nothing in them is executed or shown."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from domain.settings import Settings
from tests.support.requests import expect_problem, specification, write_model

SECRET = "SECRET"
FILES = ("config.json", "tokenizer.json", "model.safetensors")


class Evil:
    """An object that runs code when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self._marker),)


@pytest.fixture
def model(settings: Settings) -> Path:
    return write_model(settings.home / "models" / "m", tokens={"a": 0, "b": 1}, layers=2)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the server outside of the model roots."""
    place = tmp_path / "secret"
    place.mkdir()
    (place / "config.json").write_text(json.dumps({"vocab": {SECRET: 0}, "model_type": SECRET}))
    return place / "config.json"


def post(client: TestClient, dataset: str, written: str = "m", address: str = "/v1/jobs") -> Any:
    spec = specification(dataset) | {
        "teacher": {"path": written},
        "student": {"from_teacher": {"layers": [0]}},
    }
    return client.post(address, json={"spec": spec})


def refuse(client: TestClient, dataset: str, settings: Settings, code: str = "model_unsupported") -> None:
    for address in ("/v1/jobs", "/v1/jobs/validate"):
        response = post(client, dataset, address=address)
        (error,) = expect_problem(response, 422, code)["errors"]
        assert error["pointer"] == "/spec/teacher/path"
        assert str(settings.home) not in response.text
        assert SECRET not in response.text
    assert client.get("/v1/jobs").json()["data"] == []


def test_the_honest_model_is_accepted(client: TestClient, dataset: str, model: Path) -> None:
    assert model.is_dir()
    assert post(client, dataset).status_code == 201


LIES: list[dict[str, object]] = [
    {"num_hidden_layers": 3},
    {"num_hidden_layers": 1},
    {"num_hidden_layers": -2},
    {"num_hidden_layers": 2.5},
    {"num_hidden_layers": "two"},
    {"num_hidden_layers": 10**30},
    {"vocab_size": 1 << 24},
    {"hidden_size": 1 << 24},
    {"hidden_size": None},
    {"model_type": "\ud800"},
    {"model_type": ["llama"]},
    {"architectures": ["\ud800"]},
    {"architectures": [{"\ud800": SECRET * 100}]},
    {"architectures": {"LlamaForCausalLM": 1}},
    {"auto_map": {"AutoModelForCausalLM": "evil--code.Model"}},
    {"quantization_config": {"quant_method": "evil"}},
    {"is_encoder_decoder": True},
]


def test_a_config_that_lies_is_refused(client: TestClient, dataset: str, settings: Settings, model: Path) -> None:
    honest = (model / "config.json").read_text()
    for lie in LIES:
        (model / "config.json").write_text(json.dumps(json.loads(honest) | lie))
        refuse(client, dataset, settings)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors"])
def test_a_pickle_is_refused_and_not_opened(
    client: TestClient, dataset: str, settings: Settings, model: Path, name: str
) -> None:
    marker = settings.home / "ran"
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Evil(marker)))
    refuse(client, dataset, settings)
    assert not marker.exists()
    pickle.loads((model / name).read_bytes())
    assert marker.exists(), "the pickle runs no code, so this test would show nothing"


def test_a_link_out_of_the_roots_is_not_followed(
    client: TestClient, dataset: str, settings: Settings, model: Path, secret: Path
) -> None:
    for name in FILES:
        original = (model / name).rename(model.parent / "original")
        (model / name).symlink_to(secret)
        refuse(client, dataset, settings, "path_outside_model_roots")
        (model / name).unlink()
        original.rename(model / name)


def test_links_within_the_roots_are_followed_as_in_a_hub_cache(client: TestClient, dataset: str, model: Path) -> None:
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for file in list(model.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("..", "blobs", file.name))
    assert post(client, dataset).status_code == 201


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("pipe", "model_unsupported"),
        ("directory", "model_unsupported"),
        ("circle", "model_not_found"),
        ("device", "path_outside_model_roots"),
    ],
)
def test_an_irregular_file_is_refused_without_blocking(
    client: TestClient, dataset: str, settings: Settings, model: Path, kind: str, code: str
) -> None:
    make: dict[str, Callable[[Path], None]] = {
        "pipe": os.mkfifo,
        "directory": Path.mkdir,
        "circle": lambda place: place.symlink_to(place),
        "device": lambda place: place.symlink_to("/dev/zero"),
    }
    for name in FILES:
        original = (model / name).rename(model.parent / "original")
        make[kind](model / name)
        refuse(client, dataset, settings, code)
        (model / name).rmdir() if kind == "directory" else (model / name).unlink()
        original.rename(model / name)


@pytest.mark.parametrize(
    "shard", ["../../secret/x.safetensors", "/etc/passwd", "a/b.safetensors", "\0.safetensors", ""]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(
    client: TestClient, dataset: str, settings: Settings, model: Path, shard: str
) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    refuse(client, dataset, settings)


@pytest.mark.parametrize("length", [0, 1, 1 << 31, (1 << 63) - 1, (1 << 64) - 1])
def test_a_header_that_lies_about_its_length_is_refused(
    client: TestClient, dataset: str, settings: Settings, model: Path, length: int
) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", length) + weights.read_bytes()[8:])
    refuse(client, dataset, settings)


SPELLINGS = [
    ("../secret", "path_outside_model_roots"),
    ("m/../../secret", "path_outside_model_roots"),
    ("{tmp}/secret", "path_outside_model_roots"),
    ("/", "path_outside_model_roots"),
    ("/proc/self/root", "path_outside_model_roots"),
    ("/dev/zero", "path_outside_model_roots"),
    ("out", "path_outside_model_roots"),
    ("out/../m", "path_outside_model_roots"),
    ("%2e%2e/secret", "model_not_found"),
    ("..%2fsecret", "model_not_found"),
    ("~/secret", "model_not_found"),
    ("..\\secret", "model_not_found"),
    ("file:///etc/passwd", "model_not_found"),
    ("\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/secret", "model_not_found"),
]


def test_no_spelling_of_a_path_leads_out_of_the_roots(
    client: TestClient, dataset: str, settings: Settings, model: Path, secret: Path
) -> None:
    (model.parent / "out").symlink_to(secret.parent)
    for written, code in SPELLINGS:
        response = post(client, dataset, written.format(tmp=secret.parents[1]))
        expect_problem(response, 422, code)
        assert SECRET not in response.text
        assert str(settings.home) not in response.text


def test_a_nul_in_a_path_is_refused(client: TestClient, dataset: str) -> None:
    expect_problem(post(client, dataset, "m\0/../../secret"), 400, "json_invalid")
