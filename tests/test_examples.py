"""What the examples promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pocl.__main__ import read_spec
from pocl.samples.reading import read_samples

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


@pytest.mark.system
@pytest.mark.parametrize(("variable", "root"), [("POCL_HOME", "models"), ("POCL_MODEL_ROOTS", ".")])
def test_model_is_put_where_the_service_looks(tmp_path: Path, variable: str, root: str) -> None:
    directory = (tmp_path / root / "smollm2-135m-instruct").resolve()
    directory.mkdir(parents=True)
    # A model that is there already is not downloaded again.
    (directory / "manifest.json").touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POCL_")}
    program = [sys.executable, str(EXAMPLES / "prepare_model.py")]
    done = subprocess.run(
        program, env={**environment, variable: str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["model", str(directory)]
