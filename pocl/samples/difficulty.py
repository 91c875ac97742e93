"""The difficulty that a row gives its sample: a number in the column `difficulty`."""

import math

from pocl.samples.values import Fields

DIFFICULTY_COLUMN = "difficulty"


def difficulty_of(fields: Fields) -> float | None:
    """The difficulty of a row, a number or, as in CSV, its text; None where the column is missing or no finite number.

    Data sets in public have words there too, such as `hard`; these are no difficulty that samples could be ranked by.
    """
    value = fields.get(DIFFICULTY_COLUMN)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
