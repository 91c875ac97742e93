"""Pages from templates: what all of them are given, and the headers that all of them have."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from api.browser_sessions import Session
from api.dashboard.formats import FILTERS
from api.dashboard.static_files import static_path

_CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _CONTENT_SECURITY_POLICY,
    "cache-control": "no-store",
    # Forms would have the origin `null` without a referrer.
    "referrer-policy": "same-origin",
    "vary": "cookie, hx-request",
}
FRAGMENT_HEADER: Final = "hx-request"
"""Has `true` where a script of a page asks for a part of it."""


@cache
def environment() -> Environment:
    """The templates of the pages; every text that they show is escaped."""
    made = Environment(
        loader=PackageLoader("api.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(FILTERS)
    made.globals["static_path"] = static_path
    return made


def render(
    request: Request, template: str, *, status_code: int = 200, headers: Mapping[str, str] | None = None, **context: Any
) -> HTMLResponse:
    """A page, or a part of one, as a response."""
    content = render_text(request.scope, template, **context)
    return HTMLResponse(content, status_code=status_code, headers={**_HEADERS, **(headers or {})})


def render_text(scope: Scope, template: str, **context: Any) -> str:
    """The same as text."""
    state = scope.get("state", {})
    session: Session | None = state.get("session")
    return (
        environment()
        .get_template(template)
        .render(
            base=base_of(scope),
            caller=state.get("principal"),
            form_token="" if session is None else session.form_token,
            **context,
        )
    )


def page_headers() -> Mapping[str, str]:
    """The header fields that every page has."""
    return _HEADERS


def base_of(scope: Scope) -> str:
    """The prefix under which the service is reached, without a slash at its end."""
    prefix: str = scope.get("root_path", "")
    return prefix.rstrip("/")


def is_fragment_request(request: Request) -> bool:
    """Whether a script of a page asks, for a part of it."""
    return request.headers.get(FRAGMENT_HEADER) == "true"


def redirect(request: Request, path: str) -> Response:
    """Have the browser show another page with GET.

    Args:
        path: below the prefix of the service.
    """
    address = f"{base_of(request.scope)}{path}"
    if is_fragment_request(request):
        return Response(status_code=204, headers={**_HEADERS, "hx-redirect": address})
    return RedirectResponse(address, status_code=303, headers=dict(_HEADERS))
