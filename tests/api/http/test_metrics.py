"""What `/metrics` and `/version` say, by the parser of Prometheus' own client and by the rows."""

import asyncio
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from api.metrics.catalog import METRICS
from api.principal import Principal
from domain.settings import Settings
from tests.support.requests import LOOPBACK, expect_problem, submit
from tests.support.scrapes import scrape, value

KEY = "a-key-of-sixteen-characters"
TOKEN = "a-token-for-scrapes-alone"


@pytest.fixture
def settings(sqlite_template: Path, tmp_path: Path) -> Settings:
    """Over SQLite alone, since what is read from a database is tried in test_figures.py; every scrape reads it anew."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copyfile(sqlite_template, home / "pocl.sqlite3")
    return Settings(home=home, api_key=SecretStr(KEY), encoding_check_seconds=0, metrics_cache_seconds=0)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    """A client with the key of the service."""
    headers = {"authorization": f"Bearer {KEY}"}
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False, headers=headers) as client:
        yield client


def test_the_exposition_is_valid_and_within_the_catalog(client: TestClient, dataset: str) -> None:
    submit(client, dataset)
    families = scrape(client)
    known = {
        metric.name.removesuffix("_total") if metric.type == "counter" else metric.name: metric for metric in METRICS
    }
    assert families.keys() <= known.keys()
    for name, family in families.items():
        metric = known[name]
        assert (family.type, family.documentation) == (metric.type, metric.help)
        assert re.fullmatch(r"pocl_[a-z0-9_]+", name)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels)
            assert math.isfinite(sample.value)
        identities = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(identities) == len(set(identities))
    assert value(families, "pocl_database_up") == 1


def test_buckets_of_a_histogram_rise_to_its_count(client: TestClient) -> None:
    for _ in range(3):
        client.get("/healthz")
    samples = [
        sample
        for sample in scrape(client)["pocl_http_request_duration_seconds"].samples
        if sample.labels["route"] == "/healthz"
    ]
    counts = [sample.value for sample in samples if sample.name.endswith("_bucket")]
    bounds = [float(sample.labels["le"]) for sample in samples if sample.name.endswith("_bucket")]
    assert counts == sorted(counts)
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == math.inf
    assert counts[-1] == next(sample.value for sample in samples if sample.name.endswith("_count")) == 3


def test_requests_count_by_the_template_of_their_route(client: TestClient, dataset: str) -> None:
    jobs = [submit(client, dataset)["id"] for _ in range(2)]
    for job in jobs:
        client.get(f"/v1/jobs/{job}")
        client.get(f"/v1/jobs/{job}/stages")
        client.get(f"/v1/jobs/{job}?wait=0.01")
    for path in ("/v1/jobs/job_00000000", "/nothing/at/all", "/nothing/else", "/v1/nothing"):
        client.get(path)
    client.request("BREW", "/healthz")
    samples = scrape(client)["pocl_http_request_duration_seconds"].samples
    counted = {
        (sample.labels["method"], sample.labels["route"], sample.labels["status"]): sample.value
        for sample in samples
        if sample.name.endswith("_count")
    }
    assert counted["POST", "/v1/jobs", "201"] == 2
    assert counted["GET", "/v1/jobs/{job_id}", "200"] == 2
    assert counted["GET", "/v1/jobs/{job_id}?wait", "200"] == 2
    assert counted["GET", "/v1/jobs/{job_id}", "404"] == 1
    assert counted["GET", "/v1/jobs/{job_id}/stages", "200"] == 2
    assert counted["GET", "none", "404"] == 3
    assert counted["other", "/healthz", "405"] == 1
    # No raw path is a label: whoever invents paths makes no series.
    assert not any(job in json.dumps(list(counted)) for job in [*jobs, "nothing"])


def test_a_service_without_its_database_says_so(bare: TestClient) -> None:
    families = scrape(bare)
    assert value(families, "pocl_database_up") == 0
    assert "pocl_jobs" not in families
    assert "pocl_http_request_duration_seconds" in scrape(bare)


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    """A service with a key and a token for scrapes."""
    app = create_app(settings.model_copy(update={"metrics_token": SecretStr(TOKEN)}))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
        yield client
    app.state.database.close()


def test_only_a_key_or_the_token_opens_the_metrics(guarded: TestClient) -> None:
    expect_problem(guarded.get("/metrics"), 401, "unauthenticated")
    expect_problem(guarded.get("/metrics", headers={"authorization": "Bearer wrong"}), 401, "unauthenticated")
    assert guarded.get("/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    families = scrape(guarded, authorization=f"Bearer {TOKEN}")
    assert value(families, "pocl_database_up") == 1
    assert guarded.head("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_key_that_does_not_administer_the_service_is_refused(
    guarded: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The figures are of all projects. A key of one project alone cannot be made here.
    monkeypatch.setattr(Principal, "administers_all", False, raising=False)
    expect_problem(guarded.get("/metrics", headers={"authorization": f"Bearer {KEY}"}), 403, "service_admin_required")
    scrape(guarded, authorization=f"Bearer {TOKEN}")


def test_the_token_opens_nothing_else(guarded: TestClient) -> None:
    authorized = {"authorization": f"Bearer {TOKEN}"}
    for method, path in (("GET", "/v1/jobs"), ("POST", "/metrics"), ("GET", "/metrics/"), ("DELETE", "/v1/jobs/job_1")):
        expect_problem(guarded.request(method, path, headers=authorized), 401, "unauthenticated")


def test_figures_are_read_once_for_all_scrapers(app: FastAPI) -> None:
    reads = 0
    cache = app.state.figures
    original = cache._read

    def counted() -> Any:
        nonlocal reads
        reads += 1
        return original()

    cache._read, cache._seconds = counted, 3600

    async def many() -> list[Any]:
        return await asyncio.gather(*(cache.get(patience=60) for _ in range(20)))

    figures = asyncio.run(many())
    assert reads == 1
    assert len({id(each[0]) for each in figures}) == 1


def test_the_version_is_open_and_names_no_secret(guarded: TestClient, tmp_path: Path) -> None:
    response = guarded.get("/version")
    assert response.status_code == 200
    shown = response.json()
    assert shown.keys() == {"version", "generation", "commit", "schema_revision", "api"}
    assert shown["api"] == "v1"
    assert shown["commit"] is None or re.fullmatch(r"[0-9a-f]{40}", shown["commit"])
    assert re.fullmatch(r"\d{4}", shown["schema_revision"])
    assert str(tmp_path) not in response.text
