"""Figures and moments as the pages show them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Final

from markupsafe import Markup, escape

from pocl.preview.encoder import PreviewToken

_UNITS: Final = ("B", "kB", "MB", "GB", "TB", "PB")
NONE: Final = "\N{EN DASH}"
"""Stands where there is no value."""
_SIGNS: Final = {
    "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
    # How byte-level vocabularies, and those of SentencePiece, spell a space and a line end.
    "\u0120": "\N{MIDDLE DOT}",
    "\u010a": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
    "\u2581": "\N{MIDDLE DOT}",
}


def count(value: int | None) -> str:
    """A number of things, its thousands apart by a thin space."""
    return NONE if value is None else f"{value:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with so many digits after the point."""
    return NONE if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share that is given in per cent."""
    return NONE if value is None else f"{value:.0f} %"


def size(value: float | None) -> str:
    """A number of bytes, in powers of 1000."""
    if value is None:
        return NONE
    for unit in _UNITS:
        if value < 1000 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit returns")


def duration(seconds: float | None) -> str:
    """A number of seconds in the two largest units that it has."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    hours, minutes = divmod(whole // 60, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def moment(value: datetime | None) -> str:
    """A moment in UTC, to the second."""
    return NONE if value is None else f"{value:%Y-%m-%d %H:%M:%S}"


def short(identifier: str) -> str:
    """An id without the middle, where a column is narrow."""
    prefix, _, body = identifier.partition("_")
    return f"{prefix}_{body[:4]}…{body[-4:]}" if len(body) > 10 else identifier


@dataclass(frozen=True)
class TokenRun:
    """Tokens in a row that are all trained on, or all not."""

    trained: bool
    texts: Sequence[str]


def token_runs(tokens: Sequence[PreviewToken]) -> list[TokenRun]:
    """The tokens of a sample in runs, as their vocabulary spells them; line ends and spaces are shown as signs."""
    return [
        TokenRun(trained, [_spelled(token.token) for token in run])
        for trained, run in groupby(tokens, key=lambda token: token.trained)
    ]


def _spelled(token: str) -> str:
    for sign, shown in _SIGNS.items():
        token = token.replace(sign, shown)
    return token


def with_code(text: str) -> Markup:
    """A sentence as HTML, escaped, with what stands between backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    code = Markup("<code>{}</code>")
    return Markup("").join(code.format(part) if index % 2 else escape(part) for index, part in enumerate(parts))


FILTERS: Final[Mapping[str, object]] = {
    "count": count,
    "decimal": decimal,
    "percent": percent,
    "size": size,
    "duration": duration,
    "moment": moment,
    "short": short,
    "token_runs": token_runs,
    "with_code": with_code,
}
"""By the names that templates use."""
