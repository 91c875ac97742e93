"""The licence that a model's card states in its YAML front matter (https://huggingface.co/docs/hub/model-cards)."""

import re
from pathlib import Path
from typing import Final

import yaml

_LIMIT: Final = 64 << 10
LICENCE_FIELDS: Final = ("license", "license_name", "license_link")
_MAX_LENGTH: Final = 200
_ENTRY: Final = re.compile(r"^(license|license_name|license_link):[ \t]*(.*(?:\n[ \t]*-[ \t].*)*)", re.MULTILINE)


def read_licence(directory: Path) -> dict[str, str]:
    """The fields `license`, `license_name` and `license_link` of the card `README.md`, as far as they are short texts.

    A card that is missing, or whose front matter cannot be read, states none: it is written by people, for people.
    """
    try:
        with (directory / "README.md").open("rb") as file:
            text = file.read(_LIMIT).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return {}
    front_matter = re.match(r"\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", text, re.DOTALL)
    if front_matter is None:
        return {}
    # Only these entries are parsed: YAML of strangers can take minutes.
    entries = dict(_ENTRY.findall(front_matter[1]))
    stated = {name: _short_text(entries[name]) for name in LICENCE_FIELDS if name in entries}
    return {name: text for name, text in stated.items() if text}


def _short_text(entry: str) -> str:
    try:
        value = yaml.safe_load(entry) if len(entry) <= 2 * _MAX_LENGTH else None
    except (ValueError, RecursionError, yaml.YAMLError):
        return ""
    texts = value if isinstance(value, list) else [value]
    text = ", ".join(each for each in texts if isinstance(each, str))
    return text if len(text) <= _MAX_LENGTH and text.isprintable() else ""
