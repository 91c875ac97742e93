"""Which service is talked to, and with which key: arguments, the environment, and the file that `pocl login` writes."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from pocl_client.errors import ClientError

DEFAULT_URL: Final = "http://127.0.0.1:8000"
"""Where `make serve` and `pocl serve` listen."""
_MAX_KEY_BYTES: Final = 4096


class CredentialsInvalid(ClientError):
    """There is no usable address or key; the text says which variable or file to look at."""


@dataclass(frozen=True)
class Credentials:
    """The address of a service, and the key that is sent to it."""

    url: str
    """Without `/v1`, and without a slash at its end."""
    key: str | None
    """Null where none was found: only health and version are answered without one."""

    def __repr__(self) -> str:
        return f"Credentials(url={self.url!r}, key={'***' if self.key else None})"


def find_credentials(
    url: str | None = None, key: str | None = None, environment: Mapping[str, str] | None = None
) -> Credentials:
    """The service and the key: what is given, else the environment, else what `pocl login` wrote.

    The address is `POCL_URL`, the key `POCL_API_KEY` or the content of the file `POCL_API_KEY_FILE`. A key that
    `pocl login` wrote is used for the address that it was written with, and for no other.

    Raises:
        CredentialsInvalid: an address is no HTTP URL, or a file cannot be read.
    """
    variables = os.environ if environment is None else environment
    address = find_url(url, variables)
    if key is None:
        key = variables.get("POCL_API_KEY") or None
    if key is None and (file := variables.get("POCL_API_KEY_FILE")):
        key = _read_key(Path(file))
    if key is None:
        key = read_logins(login_path(variables)).get(address)
    return Credentials(address, None if key is None else _checked_key(key))


def find_url(url: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """The address of the service alone, as :func:`find_credentials` finds it.

    Raises:
        CredentialsInvalid: it is no HTTP URL, or the file of `pocl login` cannot be read.
    """
    variables = os.environ if environment is None else environment
    address = url or variables.get("POCL_URL")
    return checked_url(address or next(iter(read_logins(login_path(variables))), DEFAULT_URL))


def checked_url(text: str) -> str:
    """The address without a slash at its end.

    Raises:
        CredentialsInvalid: it is no address of HTTP, or has a query or a user in it.
    """
    parts = urlsplit(text)
    try:
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_usable = False
    if not is_usable or parts.query or parts.fragment or parts.username is not None:
        raise CredentialsInvalid(f"{text!r} is not the address of a service: it should be like {DEFAULT_URL}.")
    return text.rstrip("/").removesuffix("/v1")


def loopback_host(url: str) -> str | None:
    """The host of an address that only this machine has, as it stands there; null for any other address."""
    host = urlsplit(url).hostname or ""
    try:
        is_loopback = ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback:
        return None
    return f"[{host}]" if ":" in host else host


def login_path(environment: Mapping[str, str] | None = None) -> Path:
    """The file of `pocl login`: `credentials.json` in `POCL_CONFIG_DIR`, or where the system has such files."""
    variables = os.environ if environment is None else environment
    if directory := variables.get("POCL_CONFIG_DIR"):
        return Path(directory) / "credentials.json"
    if sys.platform == "win32":
        base = Path(variables.get("APPDATA") or Path.home())
    else:
        base = Path(variables.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "pocl" / "credentials.json"


def read_logins(path: Path) -> dict[str, str]:
    """The key of each address that `pocl login` wrote, the last one first; nothing where there is no file.

    Raises:
        CredentialsInvalid: the file cannot be read.
    """
    try:
        logins = json.loads(path.read_text(encoding="utf-8"))["logins"]
        return {str(url): str(key) for url, key in logins.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CredentialsInvalid(f"{path} cannot be read: remove it, and run `pocl login` again.") from None


def write_login(path: Path, url: str, key: str | None) -> None:
    """Keep the key of an address as the first one, in a file that its user alone can read; null forgets it.

    Raises:
        OSError: the file cannot be written.
    """
    logins = {each: kept for each, kept in read_logins(path).items() if each != url}
    if key is not None:
        logins = {url: key, **logins}
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    # Never open to others, not for a moment.
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"logins": logins}, file, indent=2)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _read_key(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KEY_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds no key"
        raise CredentialsInvalid(f"POCL_API_KEY_FILE: {path}: {reason}.") from None


def _checked_key(key: str) -> str:
    # Characters that no header may have would be refused further down, in an error that shows the key.
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise CredentialsInvalid("The key is no key: it should be like pocl_..., without spaces or line breaks.")
    return key
