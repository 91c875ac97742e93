"""Secrets out of files, as Docker, Kubernetes and systemd give them to a process: `POCL_API_KEY_FILE` names the file.

A variable is inherited by every child and shown by `docker inspect`; a file is read once, and can be kept from others.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from domain.process_secrets import SECRET_VARIABLES

_SUFFIX: Final = "_FILE"
_MAX_BYTES: Final = 64 * 1024


class SecretFileInvalid(Exception):
    """The file of a secret cannot be used. The message is the end of a sentence, and repeats neither path nor content:
    somebody may have given the secret itself as the path."""


def file_variable(variable: str) -> str | None:
    """The variable that names the file of a secret; null where `variable` holds no secret."""
    return f"{variable}{_SUFFIX}" if variable in SECRET_VARIABLES else None


def read_secret_file(path: str) -> str:
    """The one line that the file holds, without its end.

    Raises:
        SecretFileInvalid: it cannot be read, is empty, or holds more than one line of text.
    """
    try:
        # Without blocking: a pipe that nobody writes to would hold the start up for ever.
        descriptor = os.open(os.path.expanduser(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no path"
        raise SecretFileInvalid(f"names a file that cannot be read ({reason})") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SecretFileInvalid("names no regular file")
        content = os.read(descriptor, _MAX_BYTES + 1)
    except OSError as error:
        raise SecretFileInvalid(f"names a file that cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)
    if len(content) > _MAX_BYTES:
        raise SecretFileInvalid(f"names a file of more than {_MAX_BYTES} bytes, which is no secret")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise SecretFileInvalid("names a file that is not UTF-8") from None
    if not text:
        raise SecretFileInvalid("names an empty file; write the secret into it")
    if not text.isprintable():
        raise SecretFileInvalid("names a file of several lines, or with control characters: it has the secret alone")
    return text


def secret_files(environ: Mapping[str, str]) -> list[Path]:
    """The files with secrets that the variables of a process name."""
    variables = {file_variable(name) for name in SECRET_VARIABLES}
    return [Path(path).expanduser() for name, path in environ.items() if name.upper() in variables and path]
