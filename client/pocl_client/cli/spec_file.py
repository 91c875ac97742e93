"""A job as a file: its specification, or a whole request with name and options, and `--set` on top."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pocl_client.errors import ClientError

_MAX_BYTES: Final = 16 * 2**20


class SpecUnreadable(ClientError):
    """A file or a `--set` is no specification; the text says what to write."""


def read_request(path: Path, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The body of a submission: `spec`, and beside it the options that the file has.

    A file with a field `spec` is a whole body; any other is a specification alone.

    Args:
        path: of a YAML or JSON file; `-` is standard input.
        settings: `a.b=value`, below `spec`.

    Raises:
        SpecUnreadable: the file or a setting cannot be read.
    """
    import yaml

    try:
        text = sys.stdin.read(_MAX_BYTES + 1) if str(path) == "-" else path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecUnreadable(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise SpecUnreadable(f"{path} is no text in UTF-8.") from None
    try:
        # YAML takes 5e-4 for a text, JSON does not.
        content = json.loads(text)
    except ValueError:
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SpecUnreadable(f"{path} is neither YAML nor JSON: {error}") from None
    if not isinstance(content, dict):
        raise SpecUnreadable(f"{path} must hold one object, with the fields of a specification.")
    _check_json(content, str(path))
    request = content if isinstance(content.get("spec"), dict) else {"spec": content}
    for setting in settings:
        apply_setting(request["spec"], setting)
    return request


def apply_setting(spec: dict[str, Any], setting: str) -> None:
    """Set the field that `a.b=value` names; the value is YAML, so `1`, `true`, `[0, 1]` and `text` are what they look
    like.

    Raises:
        SpecUnreadable: the setting is none, or leads through something that is no object.
    """
    import yaml

    dotted, separator, text = setting.partition("=")
    *parents, last = dotted.split(".")
    if not separator or not all((*parents, last)):
        raise SpecUnreadable(f"--set takes A.B=VALUE, and not {setting!r}.")
    target = spec
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            raise SpecUnreadable(f"--set {dotted}: {parent} is not an object.")
        target = child
    try:
        # As in a file: YAML takes the numbers of [1e-3, 5e-4] for texts, JSON does not.
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        try:
            value = _number(text) if _number(text) is not None else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise SpecUnreadable(f"--set {dotted}: the value {text!r} is not YAML.") from None
    _check_json(value, f"--set {dotted}")
    target[last] = value


def _check_json(value: Any, place: str) -> None:
    """Refuse what YAML has and JSON has not, such as dates and names that are no text."""
    try:
        json.dumps(value, allow_nan=False)
        is_plain = not isinstance(value, dict) or all(isinstance(name, str) for name in value)
    except (TypeError, ValueError, RecursionError):
        is_plain = False
    if not is_plain:
        raise SpecUnreadable(f"{place}: JSON has no such value: write dates in quotation marks, and names as text.")


def _refuse_constant(name: str) -> None:
    """For `NaN` and its like, which Python takes for JSON."""
    raise ValueError(name)


def _number(text: str) -> float | None:
    """A number like 5e-4, which YAML 1.1 takes for a text."""
    import re

    return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else None
