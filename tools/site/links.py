"""Links of a page that was written for the repository, led to pages of the site.

What is no page of the site, such as a source file, becomes its path: the site is read without the repository, too.
"""

import posixpath
import re
from collections.abc import Collection, Mapping
from typing import Final
from urllib.parse import unquote

MOVED: Final[Mapping[str, str]] = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "reporting.md",
    "bench/results/README.md": "reference/figures.md",
}
"""Pages of the repository outside `docs/`, and where they are on the site."""
_LINK: Final = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^()\s]+)\)")
_FENCE: Final = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)


def site_path(repository_path: str, files: Collection[str]) -> str | None:
    """Where a file of the repository is on the site; null where it is not.

    Args:
        files: the paths of the site's files.
    """
    path = MOVED.get(repository_path, repository_path.removeprefix("docs/"))
    return path if path in files else None


def rewrite_links(markdown: str, source: str, page: str, files: Collection[str]) -> str:
    """The text of a page with its links led to the site.

    Args:
        source: the path of the page in the repository; links are relative to it.
        page: its path on the site.
        files: the paths of the site's files.

    Raises:
        ValueError: a link leads to a path outside of the repository.
    """

    def rewrite(match: re.Match[str]) -> str:
        path, hash_mark, anchor = match["target"].partition("#")
        if not path or re.match(r"[a-z]+:", path):
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(path)))
        if target.startswith(".."):
            raise ValueError(f"{source} links to {match['target']}, outside of the repository")
        found = site_path(target, files)
        if found is None:
            return match["text"] if "`" in match["text"] else f"{match['text']} (`{target}`)"
        relative = posixpath.relpath(found, posixpath.dirname(page) or ".")
        return f"{match['image']}[{match['text']}]({relative}{hash_mark}{anchor})"

    parts = _FENCE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(rewrite, part) for part in parts)
