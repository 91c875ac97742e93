"""The environment of a process that holds the client of a server elsewhere: what it needs to reach it, no secret."""

from collections.abc import Mapping
from typing import Final

from worker.python_path import child_python_path

_ALLOWED: Final = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    }
)


def client_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of `environ` that such a process is started with; credentials it is given otherwise."""
    allowed = {name: value for name, value in environ.items() if name in _ALLOWED}
    python_path = child_python_path(environ)
    return {**allowed, **({"PYTHONPATH": python_path} if python_path else {})}
