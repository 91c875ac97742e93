"""Many concurrent requests: each is served, and none deadlocks."""

import asyncio
from collections import Counter

from fastapi import FastAPI

from domain.settings import Settings
from tests.support.requests import JSONL, jsonl, send_concurrently, specification

REQUESTS = 150


def test_more_readers_than_connections_and_threads_are_all_served(app: FastAPI, dataset: str) -> None:
    responses = asyncio.run(send_concurrently(app, [("GET", f"/v1/datasets/{dataset}", {})] * REQUESTS))
    assert Counter(response.status_code for response in responses) == {200: REQUESTS}


def test_more_writers_than_connections_and_threads_are_all_served(
    app: FastAPI, settings: Settings, dataset: str
) -> None:
    app.state.settings = settings.model_copy(update={"max_jobs_queued": REQUESTS})
    body: dict[str, object] = {"json": {"spec": specification(dataset)}}
    upload: dict[str, object] = {"content": jsonl(2), "headers": JSONL}
    requests = [("POST", "/v1/jobs", body), ("POST", "/v1/datasets", upload)] * (REQUESTS // 2)
    responses = asyncio.run(send_concurrently(app, requests))
    assert Counter(response.status_code for response in responses) == {201: REQUESTS}
    ids = [response.json()["id"] for response in responses]
    assert len(set(ids)) == REQUESTS
