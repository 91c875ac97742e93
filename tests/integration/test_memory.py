"""What a service and a model's inspection may take of the memory, whatever is sent to them or lies in a file."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from tests.support.api_process import ROOT, ServiceProcess, serving
from tests.support.requests import JSONL, write_model

MEBIBYTE = 1 << 20
GOOD = b'{"instruction": "Count to three.", "output": "One, two, three."}\n'
BAD = b'{"instruction": "Count to three."}\n'
# What a process of this kind may take at once, the interpreter and its libraries included.
ADDRESS_SPACE = 768 * MEBIBYTE


@pytest.fixture
def served(database_url: str, tmp_path: Path) -> Iterator[ServiceProcess]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    with serving(home, tmp_path / "log", database_url=database_url) as served:
        # What the first request of a kind loads is not counted.
        assert httpx2.post(f"{served.address}/v1/datasets", content=GOOD, headers=JSONL).status_code == 201
        yield served


def peak(served: ServiceProcess) -> int:
    """The most that the service ever held, in bytes."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def repeated(line: bytes, times: int) -> Iterator[bytes]:
    piece = line * 1000
    for _ in range(times // 1000):
        yield piece


def send(served: ServiceProcess, body: Iterator[bytes], headers: dict[str, str] = JSONL) -> tuple[httpx2.Response, int]:
    """The answer, and by how much the peak grew."""
    before = peak(served)
    answer = httpx2.post(f"{served.address}/v1/datasets", content=body, headers=headers, timeout=280)
    return answer, peak(served) - before


LINES = [10**5, pytest.param(10**6, marks=pytest.mark.slow)]


@pytest.mark.parametrize("lines", LINES)
def test_many_lines_are_read_one_at_a_time(served: ServiceProcess, lines: int) -> None:
    answer, grown = send(served, repeated(GOOD, lines))
    assert (answer.status_code, answer.json()["rows"]) == (201, lines)
    assert grown < 16 * MEBIBYTE


@pytest.mark.parametrize("lines", LINES)
def test_many_bad_lines_are_counted_and_not_collected(served: ServiceProcess, lines: int) -> None:
    answer, grown = send(served, repeated(BAD, lines))
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(f"{lines} of {lines} rows")
    assert len(answer.json()["errors"]) == 20
    assert grown < 16 * MEBIBYTE


@pytest.mark.parametrize("character", [b"x", b"[", b'"', b"\0", b" "], ids=repr)
def test_one_huge_line_is_never_held(served: ServiceProcess, character: bytes) -> None:
    answer, grown = send(served, repeated(character * 1024, 128 * 1024))
    assert answer.status_code == 422
    assert [error["code"] for error in answer.json()["errors"]] == ["line_too_long"]
    assert grown < 16 * MEBIBYTE


def test_a_form_whose_headers_never_end_is_cut_off(served: ServiceProcess) -> None:
    def form() -> Iterator[bytes]:
        yield b"--cut\r\ncontent-disposition: form-data; name="
        yield from repeated(b"x" * 1024, 64 * 1024)

    try:
        answer, grown = send(served, form(), {"content-type": "multipart/form-data; boundary=cut"})
        assert answer.status_code in (413, 422)
    except httpx2.TransportError:
        # Cut off while it was still sending.
        grown = 0
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
def test_a_file_of_a_model_takes_no_more_than_a_bound(
    tmp_path: Path, put: Callable[[Path, bytes], None], content: Callable[[], bytes]
) -> None:
    model = write_model(tmp_path / "m", tokens={"a": 0, "b": 1})
    put(model, content())
    assert inspected(model) == "ModelUnsupported"


def test_files_of_many_gigabytes_are_not_read(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        model = write_model(tmp_path / name, tokens={"a": 0, "b": 1})
        with (model / name).open("r+b" if name.startswith("model") else "wb") as file:
            file.truncate(1 << 40)
        assert inspected(model) == "ModelUnsupported", name


def test_the_largest_vocabulary_that_is_known_fits(tmp_path: Path) -> None:
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
