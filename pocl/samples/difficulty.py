"""The difficulty that a row gives its sample: a number in the column `difficulty`, or in one that is mapped to it."""

import math
import re
from typing import Final

from pocl.samples.row_invalid import RowInvalid
from pocl.samples.values import Fields, is_blank

DIFFICULTY_COLUMN = "difficulty"
_NUMBER: Final = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
"""What a number may be written as. Python reads more: underscores between digits, and digits of other scripts."""


def difficulty_of(fields: Fields) -> float | None:
    """The difficulty of a row, a number or, as in CSV, its text; None where the column is missing or no finite number.

    Data sets in public have words there too, such as `hard`; these are no difficulty that samples could be ranked by.
    """
    value = fields.get(DIFFICULTY_COLUMN)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and not _NUMBER.fullmatch(value):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    # Zero has one sign, as equal samples have one digest.
    return number + 0.0 if math.isfinite(number) else None


def required_difficulty(fields: Fields, column: str) -> float:
    """The difficulty of a row whose column was named as the one that has it.

    Args:
        column: the name of the column, for errors.

    Raises:
        RowInvalid: the row has nothing there, or what is no finite number.
    """
    number = difficulty_of(fields)
    if number is not None:
        return number
    named = column[:40]
    if is_blank(fields.get(DIFFICULTY_COLUMN)):
        raise RowInvalid("missing", f"{named} is empty, and `columns` names it as the difficulty of each row.")
    raise RowInvalid("wrong_type", f"{named} is not a finite number, and `columns` names it as the difficulty.")
