"""The pages of the docs name what is there."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from domain.environment import refuse_unknown_variables
from domain.settings import Settings
from worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")
PATH = re.compile(r"`((?:api|bench|docs|domain|examples|migrations|pocl|tests|tools|worker)/[\w./-]*)`")
DIFF = re.compile(r"^```diff\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    linked = {target for target in LINK.findall(text) if not (page.parent / target).exists()}
    named = {path for path in PATH.findall(text) if not (ROOT / path).exists()}
    assert linked | named == set()


def test_settings_that_the_pages_name_exist() -> None:
    """But for the list of changes, which names former ones."""
    named = {
        name: "x"
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for name in re.findall(r"POCL_[A-Z0-9]+(?:_[A-Z0-9]+)*(?![*_\w])", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 50
    refuse_unknown_variables(Settings, WorkerSettings, environ=named)


def test_every_line_that_is_shown_as_a_diff_stands_in_its_file() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = [line for diff in DIFF.findall(page) for line in added_lines(diff)]
    assert len(shown) > 20
    assert [(file, line) for file, line in shown if line not in (ROOT / file).read_text(encoding="utf-8")] == []


def added_lines(diff: str) -> Iterator[tuple[str, str]]:
    """(file, line) of each added line."""
    file = ""
    for line in diff.splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ ").strip()
        elif line.startswith("+"):
            yield file, line[1:]


def test_the_modules_of_a_step_are_those_of_the_training_loop() -> None:
    loop = (ROOT / "pocl" / "train" / "loop.py").read_text(encoding="utf-8")
    listed = re.findall(r"^    (\w+/\w+) +(\S.*)$", loop.partition("import ")[0], re.MULTILINE)
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(listed) > 20
    assert re.findall(r"^\| `pocl/(\w+/\w+)\.py` \| (.*) \|$", page, re.MULTILINE) == listed
