"""The environment of an engine: an allowed part of the worker's, a home of its own where the worker has none.

The engine gets no key of the API, no address of the database or the broker. What it needs to reach the Hub it gets:
token, endpoint, proxies and certificates. Of these the token and the passwords in addresses are kept out of what
clients see of its log.
"""

import os
import pwd
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from domain.logs import redact_addresses
from worker.python_path import child_python_path

ENGINE_HOME: Final = "engine-home"
"""The directory below the home of the service that an engine gets as its own, where the worker has none to share."""
_ALLOWLIST: Final = frozenset(
    {
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF"),
        *("NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "OMP_NUM_THREADS", "MKL_NUM_THREADS"),
        *("XDG_CACHE_HOME", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"),
    }
)
# All that configures the client of the Hub: the token or its file, endpoint, cache, timeouts.
_ALLOWED_PREFIX: Final = "HF_"
_PATHS: Final = frozenset(
    {
        *("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "XDG_CACHE_HOME"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    }
)
_TOKENS: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_REDACTED: Final = b"<secret>"


def engine_environment(
    environ: Mapping[str, str],
    temporary: Path,
    *,
    home: Path,
    visible_devices: str | None = None,
    user_id: Callable[[], int] = os.getuid,
) -> dict[str, str]:
    """The environment of an engine.

    Args:
        environ: the environment of the worker.
        temporary: where the engine puts temporary files.
        home: the home that the engine gets where the worker's cannot be used; made if need be.
        visible_devices: `CUDA_VISIBLE_DEVICES`; None leaves it as the worker's.
        user_id: the number of the user as whom the engine runs.
    """
    allowed = {name: value for name, value in environ.items() if name in _ALLOWLIST or name.startswith(_ALLOWED_PREFIX)}
    # The engine runs in a directory of its own.
    allowed |= {name: _absolute(value) for name, value in allowed.items() if name in _PATHS and value}
    # CUDA counts by the bus, as the driver does, unless the worker says otherwise.
    allowed.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if visible_devices is not None:
        allowed["CUDA_VISIBLE_DEVICES"] = visible_devices
    _name_certificates(allowed)
    if not _is_home(allowed.get("HOME")):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        allowed["HOME"] = str(home)
    if not _has_passwd_entry(user_id()):
        # Caches of torch are named after the user, whom nothing else names here.
        for name in ("USER", "LOGNAME"):
            allowed.setdefault(name, f"uid-{user_id()}")
    if path := child_python_path(environ):
        allowed["PYTHONPATH"] = path
    # The defaults of both lie beside the caches of others, which the sandbox does not let an engine write.
    allowed.setdefault("TRITON_CACHE_DIR", str(Path(allowed["HOME"], ".cache", "triton")))
    allowed.setdefault("CUDA_CACHE_PATH", str(Path(allowed["HOME"], ".cache", "nv")))
    return {**allowed, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def hub_cache_directories(environment: Mapping[str, str]) -> list[Path]:
    """Where the Hub's client keeps files by this environment of an engine."""
    named = [environment[name] for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") if name in environment]
    return [Path(each) for each in (*named, environment.get("XDG_CACHE_HOME") or f"{environment['HOME']}/.cache")]


def redact_secrets(log: bytes, environ: Mapping[str, str]) -> bytes:
    """`log` without the tokens in `environ`, and without the user and password of any address."""
    for name in _TOKENS:
        token = environ.get(name, "").strip()
        if len(token) >= 8:
            log = log.replace(token.encode(), _REDACTED)
    # Each byte is a character of latin-1, whatever the log is encoded as.
    return redact_addresses(log.decode("latin-1")).encode("latin-1")


def _name_certificates(environment: dict[str, str]) -> None:
    """The Hub's client reads `SSL_CERT_FILE` and `SSL_CERT_DIR` alone: give it what other clients are told."""
    if "SSL_CERT_FILE" in environment or "SSL_CERT_DIR" in environment:
        return
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if bundle := environment.get(name):
            environment["SSL_CERT_DIR" if os.path.isdir(bundle) else "SSL_CERT_FILE"] = bundle
            return


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _is_home(path: str | None) -> bool:
    return bool(path) and os.path.isabs(str(path)) and os.access(str(path), os.W_OK | os.X_OK)


def _has_passwd_entry(user_id: int) -> bool:
    try:
        pwd.getpwuid(user_id)
    except KeyError:
        return False
    return True
