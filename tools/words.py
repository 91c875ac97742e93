"""`python -m tools.words`: what the code is called is what docs/glossary.md says.

The glossary's tables have four columns: a term, what it means, where it is in the code, and the words that it replaced.
This check refuses

- a retired word in an identifier or in the name of a file. One in lower case is refused as a part of any name
  (`tidy` in `tidy_up` and `TidyLog`), one with a capital or an underscore as a whole name (`Rows`, `by_turn`);
- a class of the domain, the worker or the engine that no row of the glossary names; and
- a name in the glossary's third column that is nowhere in the code.
"""

import ast
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
GLOSSARY: Final = ROOT / "docs" / "glossary.md"
PACKAGES: Final = ("domain", "worker", "pocl")
"""Packages whose public classes are the nouns of the product."""
OLD_SCHEMA: Final = re.compile(r"migrations/versions/.*")
"""Migrations name tables and columns as they were."""

_CODE = re.compile(r"`([^`]+)`")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


@dataclass(frozen=True)
class Glossary:
    names: frozenset[str]
    """Names of the code that rows explain."""
    retired: frozenset[str]


def read_glossary(markdown: str) -> Glossary:
    """Read every table row of the page.

    Raises:
        ValueError: a row has not four columns, or a term has two rows.
    """
    terms: set[str] = set()
    names: set[str] = set()
    retired: set[str] = set()
    for line in markdown.splitlines():
        if not line.startswith("|") or line.startswith(("|--", "| Term")):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 4:
            raise ValueError(f"a row of the glossary has four columns: {line}")
        if cells[0] in terms:
            raise ValueError(f"the glossary has two rows for the term {cells[0]!r}")
        terms.add(cells[0])
        names |= set(_CODE.findall(cells[2]))
        retired |= set(_CODE.findall(cells[3]))
    return Glossary(frozenset(names), frozenset(retired))


def retired_in(identifier: str, retired: Set[str]) -> str | None:
    """The retired word that a name is, or has as a part; None where there is none."""
    if identifier in retired:
        return identifier
    parts = {part.lower() for part in _WORDS.findall(identifier)}
    # Only whole words are in `parts`, so the retired `crew` is not found in `screw`.
    return next((word for word in sorted(retired) if word.islower() and word.isalpha() and word in parts), None)


def complaints(root: Path, files: Iterable[str], glossary: Glossary) -> Iterator[str]:
    """One sentence for each fault."""
    known: set[str] = set()
    bases: dict[str, list[str]] = {}
    places: dict[str, str] = {}
    for file in files:
        path = PurePosixPath(file)
        word = retired_in(path.stem, glossary.retired)
        if word is not None:
            yield f"{file}: the retired word `{word}` in the file's name"
        if path.suffix != ".py":
            continue
        known |= {path.stem, *path.parts[:-1]}
        for line, identifier in identifiers(root / file):
            known.add(identifier)
            word = None if OLD_SCHEMA.fullmatch(file) else retired_in(identifier, glossary.retired)
            if word is not None:
                yield f"{file}:{line}: the retired word `{word}` in `{identifier}`"
        if path.parts[0] in PACKAGES:
            for name, parents in classes(root / file):
                bases[name], places[name] = parents, file
    for name, file in places.items():
        # An exception's name says what went wrong: it needs no row.
        if not (name.startswith("_") or name in glossary.names or is_exception(name, bases)):
            yield f"{file}: no row of docs/glossary.md names the class `{name}`"
    for name in sorted(glossary.names):
        if not set(name.rstrip("()").split(".")) <= known:
            yield f"docs/glossary.md: `{name}` is nowhere in the code"


def is_exception(name: str, bases: Mapping[str, list[str]]) -> bool:
    """Whether a class is an exception, by the names of what it inherits from."""
    return name.endswith(("Exception", "Error")) or any(is_exception(base, bases) for base in bases.get(name, ()))


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of each name in a Python file."""
    with tokenize.open(path) as source:
        for token in tokenize.generate_tokens(source.readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string


def classes(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(name, names of its bases) of each class at the top of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            yield node.name, [base.id for base in node.bases if isinstance(base, ast.Name)]


def tracked_files(root: Path) -> list[str]:
    """Files that git tracks or would: those that are ignored are nobody's words."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    return [file for file in listed.stdout.splitlines() if (root / file).is_file()]


def main() -> int:
    glossary = read_glossary(GLOSSARY.read_text(encoding="utf-8"))
    faults = list(complaints(ROOT, tracked_files(ROOT), glossary))
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
