"""The page `/docs` needs nothing from elsewhere, and no response lets a browser run what it should not."""

import re
from urllib.parse import urljoin

import pytest
from starlette.testclient import TestClient

from tests.support.requests import LOOPBACK


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
