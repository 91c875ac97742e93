"""The commands that the documents print, in order."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.compose_file import ROOT

README = ROOT / "README.md"
DOCUMENTS = (README, *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(?P<language>.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands: `bash` is a script, `console` a transcript with its answers."""

    document: Path
    line: int
    script: str
    """What a reader would type; of a transcript, the lines behind `$ `."""

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> Sequence[str]:
        """The lines, without comments: whole commands where none goes over several lines."""
        stripped = (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in self.script.splitlines())
        return [line for line in stripped if line]


def languages(document: Path) -> set[str]:
    return {fence["language"] for fence in _FENCE.finditer(document.read_text(encoding="utf-8"))}


def command_blocks(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = []
    for fence in _FENCE.finditer(text):
        script = fence["text"]
        if fence["language"] == "console":
            script = "".join(f"{line[2:]}\n" for line in script.splitlines() if line.startswith("$ "))
        if fence["language"] in ("bash", "console"):
            found.append(Block(document, text.count("\n", 0, fence.start()) + 1, script))
    return found
