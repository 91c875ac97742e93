"""Many requests at once: each is served, none waits for another for ever."""

import asyncio
from collections import Counter

from fastapi import FastAPI

from domain.settings import Settings
from tests.support.requests import JSONL, jsonl, send_concurrently, specification

CROWD = 150


def test_more_readers_than_connections_and_threads(app: FastAPI, dataset: str) -> None:
    answers = asyncio.run(send_concurrently(app, [("GET", f"/v1/datasets/{dataset}", {})] * CROWD))
    assert Counter(answer.status_code for answer in answers) == {200: CROWD}


def test_more_writers_than_connections_and_threads(app: FastAPI, settings: Settings, dataset: str) -> None:
    app.state.settings = settings.model_copy(update={"max_jobs_queued": CROWD})
    body: dict[str, object] = {"json": {"spec": specification(dataset)}}
    upload: dict[str, object] = {"content": jsonl(2), "headers": JSONL}
    requests = [("POST", "/v1/jobs", body), ("POST", "/v1/datasets", upload)] * (CROWD // 2)
    answers = asyncio.run(send_concurrently(app, requests))
    assert Counter(answer.status_code for answer in answers) == {201: CROWD}
    ids = [answer.json()["id"] for answer in answers]
    assert len(set(ids)) == CROWD
