"""What the examples promise."""

import json
from pathlib import Path

import pytest

from pocl.__main__ import read_spec
from pocl.data.samples import read_samples

EXAMPLES = Path(__file__).parents[1] / "examples"
DOLLY = EXAMPLES / "dolly-short"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.jsonl")), ids=lambda path: path.stem)
def test_every_sample_is_usable(path: Path) -> None:
    assert len(read_samples(path)) == len(path.read_text().splitlines())


def test_instructions_of_two_files_are_disjoint() -> None:
    files = [
        {json.loads(line)["instruction"].strip().lower() for line in path.read_text().splitlines()}
        for path in sorted(DOLLY.glob("*.jsonl"))
    ]
    assert len(files) == 3
    assert sum(map(len, files)) == len(set.union(*files))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_specification_resolves(path: Path) -> None:
    assert read_spec(path).curriculum.stages >= 1


@pytest.mark.parametrize("folder", ["dolly-short", "tiny"])
def test_data_names_its_licence(folder: str) -> None:
    assert "Licence" in (EXAMPLES / folder / "README.md").read_text()
