"""`python -m tools.family_tables`: writes the tables of docs/families.md out of `pocl.inspect.family_support`."""

import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Final

from pocl.inspect.family_support import FAMILIES, REFUSED_FAMILIES

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "families.md"
_TABLE = r"(<!-- table: {name} -->\n).*?(<!-- end of table -->)"
_PACKING = {
    "packed": "packed",
    "within its window": "packed where no sample is longer than the window",
    "padded": "padded",
}
_DECODING = {
    "continuous": "continuous batching",
    "padded": "padded batches",
    "single": "one by one",
    "uncached": "without a cache",
}


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str) -> str:
    """The page with its tables as the code says."""
    for name, rows in (("tried", _tried()), ("refused", _refused())):
        place = re.search(_TABLE.format(name=name), page, re.DOTALL)
        if place is None:
            raise ValueError(f"{PAGE.name} has no place for the table {name!r}")
        body = "\n".join(rows)
        page = f"{page[: place.start()]}{place[1]}{body}\n{place[2]}{page[place.end() :]}"
    return page


def _tried() -> Iterable[str]:
    yield "| families | samples in training and scoring | answers | a student cut out of it |"
    yield "|---|---|---|---|"
    order = sorted(FAMILIES, key=lambda family: (str(FAMILIES[family]), family))
    for support, families in groupby(order, key=FAMILIES.__getitem__):
        layers = "yes" if support.layers else "no"
        names = ", ".join(f"`{family}`" for family in families)
        yield f"| {names} | {_PACKING[support.packing]} | {_DECODING[support.decoding]} | {layers} |"


def _refused() -> Iterable[str]:
    yield "| families | a model of them |"
    yield "|---|---|"
    order = sorted(REFUSED_FAMILIES, key=lambda family: (REFUSED_FAMILIES[family], family))
    for reason, families in groupby(order, key=REFUSED_FAMILIES.__getitem__):
        yield f"| {', '.join(f'`{family}`' for family in families)} | {reason} |"


if __name__ == "__main__":
    main()
