"""The OpenAPI document, and the page `/docs` over it: Swagger UI, with every script and style out of this service."""

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from api.openapi import DocumentCache
from domain.errors import NotFound

router = APIRouter(include_in_schema=False)

_OWN: Final = Path(__file__).with_name("static")
_CONTENT_SECURITY_POLICY: Final = (
    # Swagger UI styles elements in place, and draws icons from data addresses.
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {"content-security-policy": _CONTENT_SECURITY_POLICY, "cache-control": "no-cache"}


def _swagger_ui() -> Path:
    # The package is not imported, since that would patch FastAPI: only its files are needed.
    spec = find_spec("fastapi_offline")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("static")


_FILES: Final = {
    "start.js": (_OWN, "text/javascript"),
    "swagger-ui-bundle.js": (_swagger_ui(), "text/javascript"),
    "swagger-ui.css": (_swagger_ui(), "text/css"),
    "favicon.png": (_swagger_ui(), "image/png"),
}


@router.get("/openapi.json")
async def get_openapi_document(request: Request) -> Response:
    """The document, built by a thread at the first request: everybody else is answered meanwhile."""
    documents: DocumentCache = request.app.state.document_cache
    return Response(await documents.get(None), media_type="application/json")


@router.get("/docs")
def show_reference() -> FileResponse:
    """The page."""
    return FileResponse(_OWN / "index.html", media_type="text/html; charset=utf-8", headers=_HEADERS)


@router.get("/docs/{name}")
def get_reference_file(name: str) -> FileResponse:
    """A script or style of the page."""
    if name not in _FILES:
        raise NotFound
    directory, media_type = _FILES[name]
    return FileResponse(directory / name, media_type=media_type, headers=_HEADERS)
