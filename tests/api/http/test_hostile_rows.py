"""Hostile samples in an upload: each bad one is named by line, and a refused upload stores nothing."""

import hashlib
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from api.datasets.upload import spool_directory
from domain.settings import Settings
from pocl.samples.file_formats import MAX_ROW_BYTES
from pocl.samples.reading import read_samples
from pocl.samples.stored import STORED
from tests.support.requests import JSONL, expect_problem, pointers, upload

GOOD = b'{"instruction": "a", "output": "b"}'
DEEP = 100_000

INVALID = {
    "a huge line": (b'{"instruction": "' + b"x" * 3 * MAX_ROW_BYTES + b'", "output": "b"}', "line_too_long"),
    "a huge line of blanks": (b" " * 3 * MAX_ROW_BYTES, "line_too_long"),
    "a huge line of nothing": (bytes(3 * MAX_ROW_BYTES), "line_too_long"),
    "deep lists": (b'{"instruction": "a", "output": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested_too_deeply"),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested_too_deeply"),
    "brackets that never close": (b"[" * DEEP, "nested_too_deeply"),
    "quotes that never close": (b'"\\' * DEEP, "not_json"),
    "NaN": (b'{"instruction": "a", "output": "b", "score": NaN}', "not_json"),
    "infinity": (b'{"instruction": "a", "output": "b", "score": -Infinity}', "not_json"),
    "a number beyond all bounds": (b'{"instruction": "a", "output": "b", "n": ' + b"9" * 5000 + b"e9999}", "not_json"),
    "half a surrogate": (rb'{"instruction": "\ud83d", "output": "b"}', "not_json"),
    "surrogates the wrong way round": (rb'{"instruction": "\ude00\ud83d", "output": "b"}', "not_json"),
    "an encoded surrogate": (b'{"instruction": "\xed\xa0\xbd", "output": "b"}', "not_utf8"),
    "an overlong slash": (b'{"instruction": "\xc0\xaf", "output": "b"}', "not_utf8"),
    "UTF-16": ('{"instruction": "a", "output": "b"}'.encode("utf-16-be"), "not_json"),
    "a mark in the middle": (b"\xef\xbb\xbf" + GOOD, "not_json"),
    "a NUL": (b'{"instruction": "a\x00", "output": "b"}', "not_json"),
    "a key twice": (b'{"instruction": "a", "instruction": "c", "output": "b"}', "duplicate_key"),
    "a key twice, spelled otherwise": (rb'{"output": "a", "\u006futput": "c", "instruction": "b"}', "duplicate_key"),
    "a key twice, far inside": (
        b'{"instruction": "a", "output": "b", "x": [{"y": {"z": 1, "z": 2}}]}',
        "duplicate_key",
    ),
    "two rows on a line": (GOOD + GOOD, "not_json"),
    "a comment": (b"// " + GOOD, "not_json"),
    "Python": (b"{'instruction': 'a', 'output': 'b'}", "not_json"),
    "a list": (b"[" + GOOD + b"]", "not_an_object"),
    "a prototype": (b'{"__proto__": {"instruction": "a"}, "output": "b"}', "missing"),
    "a role of its own": (b'{"messages": [{"role": "root", "content": "a"}]}', "role_unknown"),
    "a number for a text": (b'{"instruction": 1.5, "output": "b"}', "wrong_type"),
    "a thousand references": (b'{"instruction": "a", "output": [' + b'"b",' * 999 + b'"b"]}', "too_many"),
}

ODD_BUT_VALID = {
    "a mark at the start": (b"\xef\xbb\xbf" + GOOD, 1),
    "line ends of Windows": (GOOD + b"\r\n\r\n" + GOOD + b"\r\n", 2),
    "no end of the last line": (GOOD + b"\n" + GOOD, 2),
    "blank lines": (b"\n \n\t\n" + GOOD + b"\n\n", 1),
    "an escaped pair": (rb'{"instruction": "\ud83d\ude00", "output": "b"}', 1),
    "an escaped NUL": (rb'{"instruction": "a\u0000", "output": "b"}', 1),
    "a separator that is no line end": ('{"instruction": "a\u2028\x85", "output": "b"}'.encode(), 1),
    "brackets in a text": (b'{"instruction": "' + b"[" * 1000 + b'", "output": "b"}', 1),
    "the longest line": (GOOD[:-1] + b" " * (MAX_ROW_BYTES - len(GOOD)) + b"}\r\n", 1),
    "text that means something elsewhere": (b'{"instruction": "\'; DROP TABLE jobs; --", "output": "../../etc"}', 1),
}


@pytest.fixture
def large_uploads(app: FastAPI, settings: Settings) -> None:
    app.state.settings = settings.model_copy(update={"max_upload_bytes": 8 * MAX_ROW_BYTES})


def stored(settings: Settings) -> list[Path]:
    return [path for path in (settings.artifact_root / "datasets").rglob("*") if path.is_file()]


@pytest.mark.usefixtures("large_uploads")
def test_an_invalid_sample_is_named_and_its_neighbours_are_counted(client: TestClient, settings: Settings) -> None:
    stored_before = upload(client, rows=3)
    for kind, (line, code) in INVALID.items():
        response = client.post("/v1/datasets", content=b"\n".join([GOOD, line, GOOD, line, GOOD]), headers=JSONL)
        problem = expect_problem(response, 422, "dataset_invalid")
        assert pointers(problem) == ["/lines/2", "/lines/4"], kind
        assert {error["code"] for error in problem["errors"]} == {code}, kind
        assert problem["detail"].startswith("2 of 5 rows"), kind
    assert [path.stem for path in stored(settings)] == [stored_before]
    assert not any(spool_directory(settings).iterdir())
    assert [row["id"] for row in client.get("/v1/datasets").json()["data"]] == [stored_before]


@pytest.mark.usefixtures("large_uploads")
def test_an_odd_but_valid_sample_is_stored_without_loss(client: TestClient, settings: Settings, tmp_path: Path) -> None:
    for kind, (body, rows) in ODD_BUT_VALID.items():
        response = client.post("/v1/datasets", content=body, headers=JSONL)
        assert response.status_code == 201, (kind, response.text)
        dataset = response.json()
        assert (dataset["rows"], dataset["ingestion"]["sha256"]) == (rows, hashlib.sha256(body).hexdigest()), kind
        (path,) = (path for path in stored(settings) if path.stem == dataset["id"])
        sent = tmp_path / "sent"
        sent.write_bytes(body)
        assert read_samples(path, STORED) == read_samples(sent), kind
        assert len(read_samples(sent)) == rows, kind
    assert len(stored(settings)) == len(ODD_BUT_VALID)


def test_a_compressed_body_is_refused(client: TestClient) -> None:
    for compression in ("gzip", "br", "zstd"):
        headers = JSONL | {"content-encoding": compression}
        response = client.post("/v1/datasets", content=b"\x1f\x8b\x08\x00" + bytes(range(256)), headers=headers)
        expect_problem(response, 415, "content_encoding_unsupported")
