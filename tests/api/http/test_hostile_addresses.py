"""Ids of other types, and paths that try to traverse directories, lead to nothing."""

from collections.abc import Iterator
from typing import Any

from starlette.testclient import TestClient

from domain.ids import new_id
from tests.support.requests import JOB_RESOURCES, expect_problem, pointers, specification, submit

TRAVERSALS = [
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "..%5c..%5cetc%5cpasswd",
    "%252e%252e%252fetc%252fpasswd",
    "%c0%ae%c0%ae%c0%afetc%c0%afpasswd",
    "%2fetc%2fpasswd",
    "%2Fproc%2Fself%2Fenviron",
    "%00",
    "manifest.json%00.html",
    "manifest.json%0d%0aset-cookie:%20a=b",
    "%ff%fe",
    "~root",
    "C:%5cwindows",
    "x" * 4000,
]


def other_ids(own: str) -> Iterator[str]:
    """Ids of the other resource types, and malformed spellings of an id of this type."""
    yield from (new_id(prefix) for prefix in ("job", "ds", "ckpt") if prefix != own)
    body = new_id("job").removeprefix("job_")
    yield from (f"{own}_{body.upper()}", f"{own.upper()}_{body}", f"{own}_{body} ", f" {own}_{body}", f"{own}-{body}")
    yield from (body, own, f"{own}_", f"{own}_{'0' * 41}", "0", "-1", "1.0", "null", "None", "true", "[]", "{}", "*")
    # Digits that are not those of ASCII; a quote for SQL; a pattern for LIKE.
    yield from (f"{own}_{'٣' * 26}", f"{own}_' OR '1'='1", f"{own}_%25", f"{own}_%00{body}")


def test_an_id_of_another_type_names_no_job(client: TestClient, dataset: str) -> None:
    submit(client, dataset)
    for other in other_ids("job"):
        for below in JOB_RESOURCES:
            expect_problem(client.get(f"/v1/jobs/{other}{below}"), 404, "job_not_found")
        expect_problem(client.post(f"/v1/jobs/{other}/cancel"), 404, "job_not_found")


def test_an_id_of_another_type_names_no_data_set(client: TestClient, dataset: str) -> None:
    expect_problem(client.get(f"/v1/jobs/{dataset}"), 404, "job_not_found")
    for other in other_ids("ds"):
        expect_problem(client.get(f"/v1/datasets/{other}"), 404, "dataset_not_found")


def test_an_id_of_another_type_names_no_checkpoint(client: TestClient, dataset: str) -> None:
    expect_problem(client.get(f"/v1/checkpoints/{dataset}"), 404, "checkpoint_not_found")
    for other in other_ids("ckpt"):
        for below in ("", "/manifest", "/files/config.json"):
            expect_problem(client.get(f"/v1/checkpoints/{other}{below}"), 404, "checkpoint_not_found")


def test_a_reference_of_another_json_type_is_refused_at_its_field(client: TestClient, dataset: str) -> None:
    values: list[Any] = [0, 1.5, True, None, [], {}, "", "x", "ds", "ds_", "../ds_00000000", "/etc/passwd"]
    for value in values:
        for field, reference, pointer in (
            ("data", {"train": {"dataset": value}}, "/spec/data/train/dataset"),
            ("teacher", {"checkpoint": value}, "/spec/teacher/checkpoint"),
        ):
            spec = specification(dataset) | {field: reference}
            problem = expect_problem(client.post("/v1/jobs", json={"spec": spec}), 422, "spec_invalid")
            assert all(pointer.startswith(each) for each in pointers(problem)), problem


def test_a_reference_to_another_resource_type_is_refused_at_its_field(client: TestClient, dataset: str) -> None:
    job = submit(client, dataset)["id"]
    for other in (job, new_id("ckpt"), new_id("ds")):
        problem = expect_problem(client.post("/v1/jobs", json={"spec": specification(other)}), 422, "spec_invalid")
        assert pointers(problem) == ["/spec/data/train/dataset"]


def test_any_id_is_a_valid_cursor(client: TestClient, dataset: str) -> None:
    submit(client, dataset)
    for after in (dataset, new_id("ckpt"), new_id("job"), "0", "z" * 64):
        for kind in ("jobs", "datasets"):
            response = client.get(f"/v1/{kind}", params={"after": after})
            assert response.status_code == 200
            assert response.json()["object"] == "list"


def test_no_spelling_of_an_address_leads_to_a_file(client: TestClient, dataset: str) -> None:
    checkpoint = new_id("ckpt")
    for path in TRAVERSALS:
        for address in (
            f"/{path}",
            f"/v1/{path}",
            f"/v1/jobs/{path}",
            f"/v1/datasets/{path}",
            f"/v1/datasets/{dataset}/{path}",
            f"/v1/checkpoints/{path}/manifest",
            f"/v1/checkpoints/{checkpoint}/files/{path}",
        ):
            response = client.get(address)
            problem = expect_problem(response, 404, response.json()["code"])
            assert problem["code"].endswith("not_found"), address
            assert "root:" not in response.text
            assert "set-cookie" not in response.headers
