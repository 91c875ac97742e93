"""The path prefix under which a proxy serves the API (`POCL_ROOT_PATH`), whether the proxy cuts it off or not."""

from starlette.requests import Request
from starlette.types import Scope


def path_below_prefix(scope: Scope) -> str:
    """The path of a request as the routes have it."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def location_of(request: Request, route: str, **path_params: str) -> str:
    """The address of a resource, as its client reaches it, without scheme and host."""
    return f"{request.scope.get('root_path', '')}{request.app.url_path_for(route, **path_params)}"
