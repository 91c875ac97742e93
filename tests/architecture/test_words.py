"""Names are the glossary's: the check of `make check` passes, and refuses what it should."""

from pathlib import Path

import pytest

from tools.words import Glossary, complaints, main, read_glossary

GLOSSARY = Glossary(names=frozenset({"Claim"}), retired=frozenset({"tidy", "Rows", "by_turn"}))


def complaints_of(tmp_path: Path, file: str, source: str) -> list[str]:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return [each for each in complaints(tmp_path, [file], GLOSSARY) if "nowhere" not in each]


@pytest.mark.system
def test_every_name_of_the_project_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "source", ["tidy = 1", "def tidy_up(): ...", "x.tidy()", "class TidyLog: ...", "Rows = 1", "def by_turn(): ..."]
)
def test_a_retired_word_in_an_identifier_is_refused(source: str, tmp_path: Path) -> None:
    assert len(complaints_of(tmp_path, "bench/code.py", source)) == 1


@pytest.mark.parametrize("source", ["untidy = 1", "RowsRead = 1", "turn = 1", '"tidy"', "# tidy", "rows = 1"])
def test_other_names_and_prose_are_not_refused(source: str, tmp_path: Path) -> None:
    assert complaints_of(tmp_path, "bench/code.py", source) == []


def test_a_retired_word_in_the_name_of_a_file_is_refused(tmp_path: Path) -> None:
    assert len(complaints_of(tmp_path, "tests/test_tidy.py", "")) == 1


def test_a_migration_may_name_a_table_as_it_was(tmp_path: Path) -> None:
    assert complaints_of(tmp_path, "migrations/versions/0009_rename.py", "tidy = 1") == []


def test_a_class_without_a_row_is_refused(tmp_path: Path) -> None:
    assert len(complaints_of(tmp_path, "domain/code.py", "class Stray: ...\nclass Claim: ...\nclass _Own: ...")) == 1


def test_an_exception_says_itself_what_it_is(tmp_path: Path) -> None:
    assert complaints_of(tmp_path, "domain/code.py", "class Gone(Exception): ...") == []


def test_a_row_about_a_name_that_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("")
    assert list(complaints(tmp_path, ["code.py"], GLOSSARY)) == ["docs/glossary.md: `Claim` is nowhere in the code"]


def test_the_tables_of_the_glossary_are_read() -> None:
    page = (
        "| Term | Meaning | In the code | Retired |\n|---|---|---|---|\n| claim | a job | `Claim` | `Rows`, `tidy` |\n"
    )
    assert read_glossary(page) == Glossary(frozenset({"Claim"}), frozenset({"Rows", "tidy"}))
    with pytest.raises(ValueError, match="four columns"):
        read_glossary("| claim | takes a job |")


def test_a_term_has_one_row() -> None:
    with pytest.raises(ValueError, match="two rows for the term 'claim'"):
        read_glossary("| claim | a job | `Claim` | |\n| claim | a lease | `Lease` | |\n")
