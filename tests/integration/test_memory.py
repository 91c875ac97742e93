"""What a service and a model's inspection may take of the memory, whatever is sent to them or lies in a file."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.api_process import ROOT, ServiceProcess, serving
from tests.support.process_memory import MEBIBYTE, peak_bytes
from tests.support.requests import AUTHORIZED, JSONL, write_model
from tests.support.waiting import eventually

GOOD = b'{"instruction": "Count to three.", "output": "One, two, three."}\n'
# What a process of this kind may take at once, the interpreter and its libraries included.
ADDRESS_SPACE = 768 * MEBIBYTE


@dataclass(frozen=True)
class MeasuredService:
    """A running service whose memory is watched."""

    process: ServiceProcess
    peak_at_start: int

    def send(self, body: Iterator[bytes], headers: dict[str, str] = JSONL | AUTHORIZED) -> tuple[httpx2.Response, int]:
        """Upload `body`; the answer, and by how many bytes the peak has grown since the start of the service."""
        answer = httpx2.post(f"{self.process.address}/v1/datasets", content=body, headers=headers, timeout=280)
        return answer, self.growth()

    def growth(self) -> int:
        return peak_bytes(self.process.process.pid) - self.peak_at_start


@pytest.fixture(scope="module")
def service(shared_database_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeasuredService]:
    """One for all tests of a database: together they must not outgrow what each of them may take."""
    place = tmp_path_factory.mktemp("service")
    (place / "home").mkdir(mode=0o700)
    with serving(place / "home", place / "log", database_url=shared_database_url) as process:
        # What the first request of a kind loads is not counted.
        assert (
            httpx2.post(f"{process.address}/v1/datasets", content=GOOD, headers=JSONL | AUTHORIZED).status_code == 201
        )
        yield MeasuredService(process, peak_bytes(process.process.pid))


def repeated(line: bytes, times: int) -> Iterator[bytes]:
    piece = line * 1000
    for _ in range(times // 1000):
        yield piece


def test_large_upload_is_never_held_in_memory(service: MeasuredService) -> None:
    answer, _ = service.send(repeated(b"x" * 1024, 128 * 1024))
    assert answer.status_code == 202
    address = f"{service.process.address}{answer.headers['location']}"

    def dataset() -> dict[str, Any]:
        found: dict[str, Any] = httpx2.get(address, headers=AUTHORIZED).json()
        return found

    eventually(lambda: dataset()["status"] != "validating", what="the file is read", within=280)
    refusal = dataset()["refusal"]
    assert [error["code"] for error in refusal["errors"]] == ["line_too_long"]
    assert service.growth() < 16 * MEBIBYTE


def test_multipart_form_with_endless_headers_is_cut_off(service: MeasuredService) -> None:
    def form() -> Iterator[bytes]:
        yield b"--cut\r\ncontent-disposition: form-data; name="
        yield from repeated(b"x" * 1024, 64 * 1024)

    try:
        answer, grown = service.send(form(), {"content-type": "multipart/form-data; boundary=cut"} | AUTHORIZED)
        assert answer.status_code in (413, 422)
    except httpx2.TransportError:
        # Cut off while it was still sending.
        grown = service.growth()
    assert grown < 16 * MEBIBYTE


def many_lists() -> bytes:
    return b"[" + b"[]," * (20 * MEBIBYTE) + b"[]]"


def many_objects() -> bytes:
    return b"[" + b'{"":0},' * (8 * MEBIBYTE) + b"{}]"


def many_numbers() -> bytes:
    return b"[" + b"1.5," * (15 * MEBIBYTE) + b"1]"


def in_tokenizer(model: Path, content: bytes) -> None:
    (model / "tokenizer.json").write_bytes(b'{"model": ' + content + b"}")


def in_config(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(b'{"x": ' + content + b"}")


def in_index(model: Path, content: bytes) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_bytes(b'{"weight_map": ' + content + b"}")


def in_weights(model: Path, content: bytes) -> None:
    header = b'{"w": ' + content + b"}"
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("content", [many_lists, many_objects, many_numbers])
@pytest.mark.parametrize("put", [in_tokenizer, in_config, in_index, in_weights])
def test_inspection_of_a_model_file_has_bounded_memory(
    tmp_path: Path, put: Callable[[Path, bytes], None], content: Callable[[], bytes]
) -> None:
    model = write_model(tmp_path / "m", tokens={"a": 0, "b": 1})
    put(model, content())
    assert inspected(model) == "ModelUnsupported"


def test_model_files_of_a_tebibyte_are_not_read(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        model = write_model(tmp_path / name, tokens={"a": 0, "b": 1})
        with (model / name).open("r+b" if name.startswith("model") else "wb") as file:
            file.truncate(1 << 40)
        assert inspected(model) == "ModelUnsupported", name


def test_largest_known_vocabulary_fits(tmp_path: Path) -> None:
    tokens = {f"token-{n}": n for n in range(262_144)}
    model = write_model(tmp_path / "m", tokens=tokens)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [[f"token-{n % 1000}", f"token-{n % 999}"] for n in range(515_000)]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert inspected(model) == "inspected"


def inspected(model: Path) -> str:
    """What an inspection within a bounded address space comes to."""
    program = (
        "import pathlib, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({ADDRESS_SPACE}, {ADDRESS_SPACE}))\n"
        "from pocl.inspect import inspect_model\n"
        "try:\n    inspect_model(pathlib.Path(sys.argv[1]))\n    print('inspected')\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, model], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout.strip()
