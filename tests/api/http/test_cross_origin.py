"""Web pages elsewhere: those of the origins that the operator names may use the API, and no others."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from api.app import create_app
from api.cross_origin import EXPOSED_HEADERS
from domain.settings import Settings
from tests.clients.generated_client import DOCUMENT
from tests.support.requests import AUTHORIZED, LOOPBACK, expect_problem

PAGE = "https://app.example.com"
OTHERS = (
    *("https://app.example.com.evil.example", "https://evil.example", "http://app.example.com", "null"),
    *("https://app.example.com:8443", "HTTPS://APP.EXAMPLE.COM", "https://app.example.com/"),
)
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


@pytest.fixture
def sharing(settings: Settings) -> Iterator[TestClient]:
    app = create_app(settings.model_copy(update={"cors_origins": (PAGE,)}))
    with TestClient(app, base_url=LOOPBACK) as client:
        yield client
    app.state.database.close()


def shared_headers(response: Any) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


def test_a_page_of_a_named_origin_may_ask_and_read(sharing: TestClient) -> None:
    preflight = sharing.options("/v1/jobs", headers={"origin": PAGE, **PREFLIGHT})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(preflight.headers["access-control-allow-headers"].split(", "))
    response = sharing.get("/v1/methods", headers={"origin": PAGE, **AUTHORIZED})
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, PAGE)
    assert "Origin" in response.headers["vary"]


def test_no_origin_is_shared_with_all_and_no_cookie_is_taken(sharing: TestClient) -> None:
    for response in (
        sharing.options("/v1/jobs", headers={"origin": PAGE, **PREFLIGHT}),
        sharing.get("/v1/methods", headers={"origin": PAGE, **AUTHORIZED, "cookie": "a=b"}),
    ):
        assert "access-control-allow-credentials" not in response.headers
        assert response.headers["access-control-allow-origin"] != "*"


def test_a_page_may_read_a_refusal_but_needs_a_key(sharing: TestClient) -> None:
    response = sharing.post("/v1/jobs", json={}, headers={"origin": PAGE})
    expect_problem(response, 401, "unauthenticated")
    assert response.headers["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origin", OTHERS)
def test_to_other_pages_nothing_is_shared(sharing: TestClient, origin: str) -> None:
    preflight = sharing.options("/v1/jobs", headers={"origin": origin, **PREFLIGHT, **AUTHORIZED})
    expect_problem(preflight, 405, "method_not_allowed")
    response = sharing.get("/v1/methods", headers={"origin": origin, **AUTHORIZED})
    assert shared_headers(preflight) == shared_headers(response) == {}


def test_what_a_page_asks_for_that_there_is_not_is_a_problem(sharing: TestClient) -> None:
    headers = {"origin": PAGE, "access-control-request-method": "BREW", **AUTHORIZED}
    expect_problem(sharing.options("/v1/jobs", headers=headers), 405, "method_not_allowed")
    expect_problem(sharing.options("/v1/jobs", headers={"origin": PAGE}), 401, "unauthenticated")


def test_without_the_setting_nothing_is_shared(client: TestClient) -> None:
    response = client.get("/v1/methods", headers={"origin": PAGE})
    assert (response.status_code, shared_headers(response)) == (200, {})


def test_with_the_key_of_the_first_start_a_named_origin_is_served_too(settings: Settings) -> None:
    named = settings.model_copy(update={"cors_origins": ("http://localhost:5173",), "api_key": None})
    app = create_app(named)
    with TestClient(app, base_url=LOOPBACK) as client:
        own = client.options("/v1/jobs", headers={"origin": "http://localhost:5173", **PREFLIGHT})
        assert own.headers["access-control-allow-origin"] == "http://localhost:5173"
        other = client.options("/v1/jobs", headers={"origin": "http://localhost:3000", **PREFLIGHT})
        expect_problem(other, 403, "origin_refused")
        # A name that was rebound to loopback stays refused, whatever the origin.
        rebound = client.options(
            "/v1/jobs", headers={"host": "evil.example", "origin": named.cors_origins[0], **PREFLIGHT}
        )
        expect_problem(rebound, 403, "origin_refused")
    app.state.database.close()


@pytest.mark.parametrize(
    "value",
    ["*", "https://*", "https://*.example.com", "null", "app.example.com", f"{PAGE}/", f"{PAGE}/path", "ftp://a"],
)
def test_the_setting_takes_exact_origins_alone(value: str) -> None:
    with pytest.raises(ValidationError, match="POCL_CORS_ORIGINS takes origins"):
        Settings(cors_origins=value)


def test_the_setting_takes_several_origins_between_commas() -> None:
    taken = Settings(cors_origins="https://App.example.com, http://[::1]:5173").cors_origins
    assert taken == ("https://app.example.com", "http://[::1]:5173")


def test_a_page_may_read_every_header_field_that_is_documented() -> None:
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    documented = set(document["components"]["headers"])
    for path in document["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                documented |= set(response.get("headers", {}))
    assert documented == set(EXPOSED_HEADERS)
