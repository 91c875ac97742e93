"""Logging in with a key, and out."""

from typing import Annotated, Final

from fastapi import APIRouter, Query, Request, Response

from api.auth import CrossSiteRequest
from api.browser_sessions import (
    COOKIE,
    LOGIN_PATH,
    BrowserSessions,
    comes_from_own_page,
    cookie_of,
    form_token,
    is_open_page,
    is_page,
)
from api.client_shares import host_of, network_of
from api.dashboard.forms import TOKEN_FIELD, Form
from api.dashboard.rendering import base_of, redirect, render
from api.principal import Principal
from api.rate_limits import WrongKeyRates
from api.verified_keys import VerifiedKeys, digest_of
from domain.browser_sessions.repository import SESSION_SECONDS

router = APIRouter(include_in_schema=False)

_FIRST_PAGE: Final = "/"
_MAX_KEY: Final = 1024
_MAX_NEXT: Final = 2048


@router.get(LOGIN_PATH)
async def show_login(request: Request, next: Annotated[str, Query(max_length=_MAX_NEXT)] = _FIRST_PAGE) -> Response:
    """The form; for somebody who is logged in already, the page that was asked for."""
    sessions: BrowserSessions = request.app.state.sessions
    cookie = cookie_of(request.scope)
    if cookie is not None and await sessions.find(cookie) is not None:
        return redirect(request, _own_page(next))
    return render(request, "login.html", next=_own_page(next), refused=False)


@router.post(LOGIN_PATH)
async def log_in(request: Request, form: Form) -> Response:
    """Begin a session of the key."""
    _require_own_page(request)
    keys: VerifiedKeys = request.app.state.keys
    sessions: BrowserSessions = request.app.state.sessions
    rates: WrongKeyRates = request.app.state.wrong_keys
    key, next_page = form.get("key", "").strip()[:_MAX_KEY].encode(), _own_page(form.get("next", _FIRST_PAGE))
    client = network_of(host_of(request.scope))
    await rates.slow_down(client)
    outcome = await keys.verify(key, digest_of(key))
    if not isinstance(outcome, Principal):
        rates.count(client)
        return render(request, "login.html", status_code=401, next=next_page, refused=True)
    token = await sessions.begin(key, outcome)
    former = cookie_of(request.scope)
    if former is not None:
        await sessions.end(former)
    response = redirect(request, next_page)
    response.set_cookie(
        COOKIE,
        token,
        max_age=SESSION_SECONDS,
        path=f"{base_of(request.scope)}/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


@router.post("/ui/logout")
async def log_out(request: Request, form: Form) -> Response:
    """End the session."""
    _require_own_page(request)
    cookie = cookie_of(request.scope)
    if cookie is not None:
        if form.get(TOKEN_FIELD) != form_token(cookie):
            raise CrossSiteRequest
        sessions: BrowserSessions = request.app.state.sessions
        await sessions.end(cookie)
    response = redirect(request, LOGIN_PATH)
    response.delete_cookie(
        COOKIE,
        path=f"{base_of(request.scope)}/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )
    return response


def _require_own_page(request: Request) -> None:
    if not comes_from_own_page(request.headers):
        raise CrossSiteRequest


def _own_page(address: str) -> str:
    """The address, where it is that of a page of the dashboard; else that of the first page."""
    path = address.partition("?")[0]
    plain = address.isascii() and address.isprintable() and "\\" not in address and "//" not in path
    return address if plain and is_page(path) and not is_open_page(path) else _FIRST_PAGE
