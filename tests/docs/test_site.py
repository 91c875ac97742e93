"""The site of the documentation: built offline and without a warning, it has every page and every error code."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.environment import variable_of
from domain.settings import Settings
from pocl.spec import KDMethod
from tests.support.compose_file import ROOT
from tools.site.api_reference import engine_errors, error_codes, operations
from tools.site.links import rewrite_links
from worker.settings import WorkerSettings

DOCUMENT = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


class Resources(HTMLParser):
    """What a browser loads to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in LOADED and values.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(values.get(LOADED[tag]) or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def pages(site: Path) -> Iterator[Path]:
    yield from site.rglob("*.html")


@pytest.mark.system
def test_every_page_of_the_repository_is_on_the_site(site: Path) -> None:
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    built = {path.relative_to(site) for path in pages(site)}
    assert {path.with_name("index.html") if path.name == "README.html" else path for path in written} <= built
    navigation = (site / "index.html").read_text(encoding="utf-8")
    missing = [path for path in written if path.parent == Path() and f'href="{path}"' not in navigation]
    assert missing == []


@pytest.mark.system
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    resources = Resources()
    for page in pages(site):
        resources.feed(page.read_text(encoding="utf-8"))
    assert len(resources.addresses) > 100
    assert [address for address in resources.addresses if re.match(r"(https?:)?//", address)] == []


@pytest.mark.system
def test_references_name_all_that_there_is(site: Path) -> None:
    api = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert [each["operationId"] for *_, each in operations(DOCUMENT) if f'id="{each["operationId"]}"' not in api] == []
    errors = (site / "reference" / "errors.html").read_text(encoding="utf-8")
    names = {*error_codes(DOCUMENT), *(error.code for error in engine_errors())}
    assert [name for name in names if f"<code>{name}</code>" not in errors] == []
    settings = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    variables = [variable_of(kind, name) for kind in (Settings, WorkerSettings) for name in kind.model_fields]
    assert [name for name in variables if f"<code>{name}</code>" not in settings] == []
    methods = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [method for method in KDMethod if methods.count(f"`{method}`") < 2] == []


def test_every_error_says_what_to_do() -> None:
    codes = error_codes(DOCUMENT)
    assert len(codes) > 40
    assert [name for name, code in codes.items() if not code.sentence.endswith(".")] == []
    assert [error.code for error in engine_errors() if not error.hint.endswith(".")] == []


@given(st.sampled_from(["docs/a.md", "docs/decisions/b.md", "README.md"]), st.sampled_from(["", "#part"]))
def test_links_lead_to_the_same_page_from_everywhere(source: str, anchor: str) -> None:
    files = {"a.md", "decisions/b.md", "index.md", "reference/figures.md"}
    page = {"docs/a.md": "a.md", "docs/decisions/b.md": "decisions/b.md", "README.md": "index.md"}[source]
    up = "../" * source.count("/")
    text = f"[one]({up}docs/a.md{anchor}) [two]({up}bench/results/README.md{anchor}) [`code`]({up}api/app.py) [x](#y)"
    rewritten = rewrite_links(text, source, page, files)
    back = "../" * page.count("/")
    assert rewritten == f"[one]({back}a.md{anchor}) [two]({back}reference/figures.md{anchor}) `code` [x](#y)"


def test_links_in_code_are_left_alone() -> None:
    text = "```bash\n[a](../x.py)\n```\n"
    assert rewrite_links(text, "docs/a.md", "a.md", {"a.md"}) == text
    with pytest.raises(ValueError, match="outside of the repository"):
        rewrite_links("[a](../../x)", "docs/a.md", "a.md", {"a.md"})
