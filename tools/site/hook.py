"""MkDocs calls these while it builds the site (`hooks` in mkdocs.yml)."""

import json
import sys
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT: Final = Path(__file__).resolve().parents[2]
# MkDocs loads this file by its path; the code that pages are made of is beside it.
sys.path.insert(0, str(ROOT))

from tools.site.api_reference import render_api, render_errors  # noqa: E402 - after the path is set
from tools.site.links import MOVED, rewrite_links  # noqa: E402 - as above
from tools.site.settings_reference import render_settings  # noqa: E402 - as above


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    document = json.loads((ROOT / "docs" / "openapi.json").read_text(encoding="utf-8"))
    pages = {
        "reference/api.md": render_api(document),
        "reference/errors.md": render_errors(document),
        "reference/settings.md": render_settings(),
    }
    for source, page in MOVED.items():
        if files.get_file_from_path(page) is None:
            pages[page] = (ROOT / source).read_text(encoding="utf-8")
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - by name
    """Lead the links of a page to the site."""
    path = page.file.src_uri
    source = next((name for name, moved in MOVED.items() if moved == path), f"docs/{path}")
    if path.startswith("reference/") and source.startswith("docs/"):
        return markdown
    return rewrite_links(markdown, source, path, {file.src_uri for file in files})
