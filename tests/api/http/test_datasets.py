"""Uploads: streamed, checked line by line, and stored whole or not at all."""

import errno
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import anyio
import pytest
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from api.datasets.upload import remove_stale_spool_files, spool_directory
from domain.artifacts import ArtifactStore
from domain.settings import Settings
from pocl.samples.reading import read_samples
from pocl.storage.manifest import ManifestFile
from tests.support.requests import JSONL, expect_problem, http_scope, jsonl, pointers, specification, submit, upload


def stored_files(settings: Settings) -> list[Path]:
    """All files of the spool and of the artifact store."""
    return [
        path
        for root in (spool_directory(settings), settings.artifact_root)
        for path in root.rglob("*")
        if path.is_file()
    ]


def test_samples_of_an_upload_are_stored_and_described(client: TestClient, settings: Settings) -> None:
    body = jsonl(5) + b"\n  \n"
    response = client.post("/v1/datasets", params={"name": "five"}, content=body, headers=JSONL)
    assert response.status_code == 201
    dataset = response.json()
    (stored,) = stored_files(settings)
    assert (dataset["name"], dataset["rows"], dataset["size_bytes"]) == ("five", 5, stored.stat().st_size)
    assert dataset["sha256"] == hashlib.sha256(stored.read_bytes()).hexdigest()
    assert dataset["created_at"].endswith("Z")
    assert dataset["ingestion"] == {
        "format": "jsonl",
        "compressed": False,
        "size_bytes": len(body),
        "sha256": hashlib.sha256(body).hexdigest(),
        "forms": {"instruction": 5},
        "ignored_columns": [],
        "more_ignored": 0,
        "skipped": 0,
        "first_skipped": [],
        "with_difficulty": 0,
        "reasoning_columns": [],
    }
    assert client.get(response.headers["location"]).json() == dataset


CSV_BODY = b"question;best;topic\nWhy?;So.;x\nWho?;;y\nWhat?;That.;\n"


@pytest.mark.parametrize("in_form", [False, True])
def test_options_are_given_in_the_query_or_in_the_form(client: TestClient, settings: Settings, in_form: bool) -> None:
    options = {
        "name": "csv",
        "columns": '{"instruction": "question", "output": "best"}',
        "on_bad_rows": "skip",
        "form": "instruction",
        "format": "csv",
        "delimiter": ";",
    }
    if in_form:
        response = client.post("/v1/datasets", data=options, files={"file": ("rows.csv", CSV_BODY)})
    else:
        response = client.post("/v1/datasets", params=options, content=CSV_BODY, headers={"content-type": "text/csv"})
    assert response.status_code == 201, response.text
    dataset, ingestion = response.json(), response.json()["ingestion"]
    assert (dataset["name"], dataset["rows"], dataset["prompts"]) == ("csv", 2, 0)
    assert (ingestion["format"], ingestion["forms"], ingestion["skipped"]) == ("csv", {"instruction": 2}, 1)
    assert ingestion["ignored_columns"] == [{"name": "topic", "rows": 1}]
    assert [(error["pointer"], error["code"]) for error in ingestion["first_skipped"]] == [("/lines/3", "missing")]
    (stored,) = stored_files(settings)
    assert [sample.references for sample in read_samples(stored)] == [("So.",), ("That.",)]


def test_options_that_cannot_be_are_refused_with_their_pointers(client: TestClient, settings: Settings) -> None:
    for parameters, pointer in (
        ({"form": "alpaca"}, "/query/form"),
        ({"on_bad_rows": "ignore"}, "/query/on_bad_rows"),
        ({"colums": "{}"}, "/query/colums"),
        ({"columns": "question"}, "/columns"),
        ({"columns": '{"output": 1}'}, "/columns/output"),
        ({"columns": '{"answers": "a"}'}, "/columns"),
    ):
        response = client.post("/v1/datasets", params=parameters, content=jsonl(1), headers=JSONL)
        (found,) = pointers(expect_problem(response, 422, "invalid"))
        assert found.startswith(pointer) or pointer == "/columns", (parameters, found)
    file = {"file": ("a.jsonl", jsonl(1))}
    response = client.post("/v1/datasets", data={"form": "alpaca"}, files=file)
    assert pointers(expect_problem(response, 422, "invalid")) == ["/form"]
    response = client.post("/v1/datasets", params={"name": "a"}, data={"name": "b"}, files=file)
    assert pointers(expect_problem(response, 422, "invalid")) == ["/name"]
    response = client.post("/v1/datasets", data={"form": "x" * 9000}, files=file)
    assert pointers(expect_problem(response, 422, "multipart_invalid")) == ["/form"]
    assert stored_files(settings) == []


def test_several_media_types_are_accepted_and_the_content_decides(client: TestClient) -> None:
    for media_type in (
        *("application/jsonl", "application/x-ndjson; charset=utf-8", "Application/X-JSONLines"),
        *("application/json", "text/csv", "application/gzip", "application/octet-stream"),
    ):
        response = client.post("/v1/datasets", content=jsonl(1), headers={"content-type": media_type})
        assert response.status_code == 201, media_type
        assert response.json()["ingestion"]["format"] == "jsonl"


def test_every_format_that_is_text_has_an_example_that_is_accepted(client: TestClient) -> None:
    content = client.get("/openapi.json").json()["paths"]["/v1/datasets"]["post"]["requestBody"]["content"]
    examples = {name: each["example"] for name, each in content.items() if "example" in each}
    form = examples.pop("multipart/form-data")
    digests = set()
    for media_type, example in examples.items():
        response = client.post("/v1/datasets", content=example, headers={"content-type": media_type})
        assert response.status_code == 201, (media_type, response.text)
        digests.add(response.json()["sha256"])
    assert len(examples) == 6
    assert len(digests) == 1
    sent = client.post("/v1/datasets", files={"file": ("a.jsonl", form.pop("file"))}, data=form)
    assert (sent.status_code, sent.json()["name"]) == (201, "capitals")


def test_equal_samples_have_equal_digests_in_whatever_form_they_come(client: TestClient) -> None:
    rows = [json.loads(line) for line in jsonl(3).splitlines()]
    chats = [[{"from": "human", "value": row["instruction"]}, {"from": "gpt", "value": row["output"]}] for row in rows]
    conversations = json.dumps([{"conversations": chat} for chat in chats]).encode()
    bodies = (jsonl(3), json.dumps(rows, indent=1).encode(), gzip.compress(conversations))
    digests = {client.post("/v1/datasets", content=body, headers=JSONL).json()["sha256"] for body in bodies}
    assert len(digests) == 1


def test_prompts_alone_are_stored_and_a_job_that_trains_on_them_is_refused(client: TestClient) -> None:
    body = b'{"prompt": "Why?", "topic": "x"}\n'
    dataset = client.post("/v1/datasets", content=body, headers=JSONL).json()
    assert (dataset["prompts"], dataset["ingestion"]["forms"]) == (1, {"prompt_only": 1})
    response = client.post("/v1/jobs", json={"spec": specification(dataset["id"])})
    assert pointers(expect_problem(response, 422, "spec_invalid")) == ["/spec/data/train/dataset"]


def test_data_set_is_deleted_with_its_file_once_no_job_needs_it(client: TestClient, settings: Settings) -> None:
    dataset, other = upload(client), upload(client)
    job = submit(client, dataset)
    address = f"/v1/datasets/{dataset}"
    assert job["id"] in expect_problem(client.delete(address), 409, "dataset_is_needed")["detail"]
    assert client.get(address).status_code == 200
    assert client.delete(f"/v1/datasets/{other}").status_code == 204
    assert client.post(f"/v1/jobs/{job['id']}/cancel").status_code in (200, 202)
    assert client.delete(address).status_code == 204
    for each in (dataset, other):
        expect_problem(client.get(f"/v1/datasets/{each}"), 404, "dataset_not_found")
        expect_problem(client.delete(f"/v1/datasets/{each}"), 404, "dataset_not_found")
    assert stored_files(settings) == []
    expect_problem(client.post(f"/v1/jobs/{job['id']}/retry"), 422, "spec_invalid")


def test_file_of_a_data_set_stays_where_the_deletion_is_not_committed(client: TestClient, settings: Settings) -> None:
    dataset = upload(client)

    def fail(_session: Session) -> None:
        raise OperationalError("COMMIT", {}, Exception("the database went away"))

    event.listen(Session, "before_commit", fail)
    try:
        expect_problem(client.delete(f"/v1/datasets/{dataset}"), 503, "unavailable")
    finally:
        event.remove(Session, "before_commit", fail)
    assert len(stored_files(settings)) == 1
    assert client.get(f"/v1/datasets/{dataset}").status_code == 200


def test_a_chunked_body_is_accepted(client: TestClient) -> None:
    pieces = (jsonl(3)[at : at + 7] for at in range(0, len(jsonl(3)), 7))
    response = client.post("/v1/datasets", content=pieces, headers=JSONL)
    assert response.json()["rows"] == 3


def test_a_form_carries_a_file_and_its_name(client: TestClient) -> None:
    response = client.post("/v1/datasets", files={"file": ("../a/dolly.jsonl", jsonl(4), "text/plain")})
    assert response.status_code == 201, response.text
    dataset = response.json()
    assert (dataset["name"], dataset["rows"]) == ("dolly.jsonl", 4)
    assert dataset["ingestion"]["sha256"] == hashlib.sha256(jsonl(4)).hexdigest()


def test_a_form_with_another_part_is_refused(client: TestClient, settings: Settings) -> None:
    files = {"file": ("a.jsonl", jsonl(1)), "more": ("b.jsonl", jsonl(1))}
    expect_problem(client.post("/v1/datasets", files=files), 422, "multipart_invalid")
    expect_problem(client.post("/v1/datasets", files={"rows": ("a.jsonl", jsonl(1))}), 422, "multipart_invalid")
    assert stored_files(settings) == []


def test_a_form_without_a_usable_boundary_is_refused(client: TestClient) -> None:
    for content_type in ("multipart/form-data", "multipart/form-data; boundary=" + "x" * 999):
        response = client.post("/v1/datasets", content=jsonl(1), headers={"content-type": content_type})
        expect_problem(response, 422, "multipart_invalid")


def test_a_truncated_form_is_refused(client: TestClient, settings: Settings) -> None:
    whole = b'--cut\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + jsonl(2)
    response = client.post("/v1/datasets", content=whole, headers={"content-type": "multipart/form-data; boundary=cut"})
    expect_problem(response, 422, "multipart_invalid")
    assert stored_files(settings) == []


def test_bad_lines_are_named_by_number_and_nothing_is_stored(client: TestClient, settings: Settings) -> None:
    lines = jsonl(4).splitlines()
    lines[1] = b'{"instruction": "SECRET"}'
    lines[3] = b"SECRET"
    response = client.post("/v1/datasets", content=b"\n".join(lines), headers=JSONL)
    problem = expect_problem(response, 422, "dataset_invalid")
    assert pointers(problem) == ["/lines/2", "/lines/4"]
    assert [error["code"] for error in problem["errors"]] == ["missing", "not_json"]
    assert "2 of 4" in problem["detail"]
    assert "SECRET" not in response.text
    assert stored_files(settings) == []
    assert client.get("/v1/datasets").json()["data"] == []


def test_many_bad_lines_are_counted_and_the_first_twenty_named(client: TestClient) -> None:
    problem = expect_problem(client.post("/v1/datasets", content=b"{}\n" * 50, headers=JSONL), 422, "dataset_invalid")
    assert pointers(problem) == [f"/lines/{number}" for number in range(1, 21)]
    assert "50 of 50" in problem["detail"]


def test_a_file_without_samples_is_refused(client: TestClient, settings: Settings) -> None:
    for body in (b"", b"\n", b"\xef\xbb\xbf \r\n\r\n"):
        expect_problem(client.post("/v1/datasets", content=body, headers=JSONL), 422, "dataset_invalid")
    assert stored_files(settings) == []


def test_an_upload_over_the_limit_is_refused(client: TestClient, settings: Settings) -> None:
    body = b" " * settings.max_upload_bytes + jsonl(1)
    expect_problem(client.post("/v1/datasets", content=body, headers=JSONL), 413, "upload_too_large")
    pieces = iter([body[:1000], body[1000:]])
    expect_problem(client.post("/v1/datasets", content=pieces, headers=JSONL), 413, "upload_too_large")
    assert stored_files(settings) == []


def test_a_file_in_a_form_has_the_same_limit(client: TestClient, settings: Settings) -> None:
    files = {"file": ("a.jsonl", jsonl(1) + b" " * settings.max_upload_bytes)}
    expect_problem(client.post("/v1/datasets", files=files), 413, "upload_too_large")
    assert stored_files(settings) == []


def test_other_media_types_are_refused(client: TestClient) -> None:
    for media_type in ("text/html", "application/x-www-form-urlencoded", "image/png", ""):
        response = client.post("/v1/datasets", content=jsonl(1), headers={"content-type": media_type})
        expect_problem(response, 415, "unsupported_media_type")


def test_an_unprintable_name_is_refused(client: TestClient) -> None:
    for name in ("", "a\nb", "nul\0", "x" * 201):
        response = client.post("/v1/datasets", params={"name": name}, content=jsonl(1), headers=JSONL)
        assert pointers(expect_problem(response, 422, "invalid")) == ["/query/name"]


def test_a_disconnected_upload_leaves_nothing(app: FastAPI, client: TestClient, settings: Settings) -> None:
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": jsonl(3), "more_body": True},
        {"type": "http.disconnect"},
    ]
    scope = http_scope("POST", "/v1/datasets", JSONL | {"content-length": "999"})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(_message: Any) -> None:
        """Drop the response: the client has disconnected."""

    anyio.run(app, scope, receive, send)
    assert messages == []
    assert stored_files(settings) == []
    assert client.get("/v1/datasets").json()["data"] == []


def test_a_failed_commit_removes_the_published_file(client: TestClient, settings: Settings) -> None:
    def fail(_session: Session) -> None:
        raise OperationalError("COMMIT", {}, Exception("the database went away"))

    event.listen(Session, "before_commit", fail)
    try:
        response = client.post("/v1/datasets", content=jsonl(3), headers=JSONL)
    finally:
        event.remove(Session, "before_commit", fail)
    assert expect_problem(response, 503, "unavailable")["retryable"] is True
    assert stored_files(settings) == []
    assert client.get("/v1/datasets").json()["data"] == []


class FullStore(ArtifactStore):
    """A store on a full disk."""

    def publish_file(self, source: Path, key: str, *, link: bool = False, keep: bool = False) -> ManifestFile:
        del link, keep
        raise OSError(errno.ENOSPC, "No space left on device", f"{source} {key}")


def test_a_full_disk_is_reported_and_leaves_nothing(app: FastAPI, client: TestClient, settings: Settings) -> None:
    app.state.store = FullStore(settings.artifact_root)
    response = client.post("/v1/datasets", content=jsonl(1), headers=JSONL)
    assert expect_problem(response, 507, "storage_full")["retryable"] is True
    assert str(settings.home) not in response.text
    assert stored_files(settings) == []


def test_pages_hold_every_data_set_once_while_others_arrive(client: TestClient) -> None:
    expected = [upload(client, rows=1, name=f"set {n}") for n in range(5)]
    listed: list[str] = []
    after = None
    while True:
        page = client.get("/v1/datasets", params={"limit": 2} | ({"after": after} if after else {})).json()
        assert page["object"] == "list"
        ids = [item["id"] for item in page["data"]]
        assert (page["first_id"], page["last_id"]) == (ids[0], ids[-1])
        listed += ids
        upload(client, rows=1, name="late")
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert listed == expected[::-1]


def test_a_limit_out_of_bounds_is_refused(client: TestClient) -> None:
    for limit in ("0", "101", "-1", "many"):
        problem = expect_problem(client.get("/v1/datasets", params={"limit": limit}), 422, "invalid")
        assert pointers(problem) == ["/query/limit"]


def test_an_unknown_data_set_is_not_found(client: TestClient) -> None:
    for unknown in ("ds_00000000000000000000000000", "job_00000000", "ds_%00", "x", "ds_" + "1" * 99):
        expect_problem(client.get(f"/v1/datasets/{unknown}"), 404, "dataset_not_found")


def test_only_stale_spool_files_are_removed(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    spool = spool_directory(settings)
    spool.mkdir()
    (spool / "old").touch()
    (spool / "new").touch()
    os.utime(spool / "old", (0, 0))
    remove_stale_spool_files(settings)
    assert [path.name for path in spool.iterdir()] == ["new"]


def test_the_engine_reads_what_the_service_accepted(client: TestClient, settings: Settings) -> None:
    upload(client, rows=3)
    (stored,) = stored_files(settings)
    assert [sample.references for sample in read_samples(stored)] == [("0 it is",), ("1 it is",), ("2 it is",)]
