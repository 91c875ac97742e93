"""The page `/docs` needs nothing from elsewhere, and no response lets a browser run what it should not."""

import asyncio
import re
import threading
from typing import Any
from urllib.parse import urljoin

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.testclient import TestClient

from tests.support.requests import LOOPBACK, start_get


def directives(policy: str) -> dict[str, list[str]]:
    parts = (part.split() for part in policy.split(";"))
    return {name: sources for name, *sources in parts}


@pytest.mark.parametrize("base", [LOOPBACK, f"{LOOPBACK}/pocl"])
def test_all_that_the_page_loads_is_served_here(bare: TestClient, base: str) -> None:
    page = bare.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(loaded) == 4
    for address in loaded:
        absolute = urljoin(f"{base}/docs", address)
        assert absolute.startswith(f"{base}/docs/")
        response = bare.get(absolute.removeprefix(base))
        assert response.status_code == 200
        if address.endswith(".css"):
            # Nor does it load more.
            assert not re.search(r"@import|url\((?!\"?data:)", response.text)


def test_the_page_runs_no_script_in_line_or_from_elsewhere(bare: TestClient) -> None:
    page = bare.get("/docs")
    policy = directives(page.headers["content-security-policy"])
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == policy["connect-src"] == ["'self'"]
    assert policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=", page.text)


@pytest.mark.parametrize("path", ["/healthz", "/v1/methods", "/v1/nothing", "/openapi.json", "/docs", "/docs/start.js"])
def test_responses_say_what_a_browser_may_do(bare: TestClient, path: str) -> None:
    headers = bare.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    policy = directives(headers["content-security-policy"])
    assert policy["frame-ancestors"] == ["'none'"]
    assert policy.get("script-src", policy["default-src"]) == (["'self'"] if path.startswith("/docs") else ["'none'"])


@pytest.mark.parametrize("name", ["..%2f..%2fsettings.py", "nothing.js", "%2e%2e", "index.html"])
def test_no_other_file_is_served(bare: TestClient, name: str) -> None:
    assert bare.get(f"/docs/{name}").status_code == 404


def test_the_page_needs_no_key_and_the_framework_serves_none(bare: TestClient) -> None:
    assert bare.get("/redoc").status_code == 404
    assert "cdn" not in bare.get("/docs").text


def test_the_document_is_built_once_and_others_are_answered_meanwhile(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds: list[str] = []
    begun, built = threading.Event(), threading.Event()

    def build_when_told(**arguments: Any) -> dict[str, Any]:
        builds.append(threading.current_thread().name)
        begun.set()
        assert built.wait(60)
        return get_openapi(**arguments)

    # The builder is FastAPI's; the test has to say when it ends.
    monkeypatch.setattr("api.openapi.get_openapi", build_when_told)

    async def ask() -> list[httpx2.Response]:
        documents = [start_get(app, "/openapi.json") for _ in range(5)]
        assert await asyncio.to_thread(begun.wait, 60)
        alive = await start_get(app, "/healthz")
        refused = await start_get(app, "/v1/jobs/validate")
        assert (alive.status_code, refused.status_code, len(builds)) == (200, 405, 1)
        built.set()
        return await asyncio.gather(*documents)

    responses = asyncio.run(ask())
    assert len(builds) == 1
    assert builds != [threading.main_thread().name]
    assert {response.status_code for response in responses} == {200}
    assert responses[0].json()["paths"]["/v1/jobs"]
