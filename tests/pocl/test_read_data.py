"""The samples of a run: from files and from the Hub, with what was left out told, and prompts alone refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils._paths import filter_repo_objects

from pocl.errors import DatasetInvalid, EngineFailure
from pocl.models.hub import RepoType
from pocl.read_data import RunData, read_data
from pocl.spec import DistillationSpec, resolve

COMMIT = "c" * 40


def spec_of(**data: Any) -> DistillationSpec:
    return resolve({"preset": "quick", "method": "sft", "student": {"random": {}}, "data": data})


def write_rows(path: Path, *texts: str, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": text, "output": "So.", **columns} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(data: RunData) -> list[list[str]]:
    splits = data.splits
    parts = (splits.train, splits.validation, splits.test)
    return [[sample.conversation[0].content for sample in part] for part in parts]


class FakeHub:
    """A hub with one data set, which gives the files that are asked for."""

    def __init__(self, directory: Path, files: Sequence[str], card: str = "") -> None:
        self.directory = directory / COMMIT
        self.files = [*files, "README.md"]
        self.card = card
        self.revisions: list[str] = []

    def snapshot(self, repo: str, revision: str, patterns: Sequence[str], *, repo_type: RepoType = "model") -> Path:
        assert (repo, repo_type) == ("someone/rows", "dataset")
        self.revisions.append(revision)
        for name in filter_repo_objects(self.files, allow_patterns=list(patterns)):
            write_rows(self.directory / name, name)
            if name == "README.md":
                (self.directory / name).write_text(self.card)
        return self.directory


def read_from_hub(hub: FakeHub, **reference: Any) -> RunData:
    return read_data(spec_of(train={"hub": {"repo": "someone/rows", **reference}}), hub)


def test_what_was_left_out_of_files_is_told(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "a", "b", topic="x")
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text() + "{}\n")
    data = read_data(spec_of(train={"path": path, "on_bad_rows": "skip"}, test={"path": path, "on_bad_rows": "skip"}))
    assert questions(data) == [["a", "b"], [], ["a", "b"]]
    assert [(code, pointer) for code, _, pointer in data.notes] == [
        (code, f"/data/{part}") for part in ("train", "test") for code in ("rows_skipped", "columns_ignored")
    ]
    assert "topic (2 rows)" in data.notes[1][1]


def test_prompts_without_answers_are_refused_where_answers_are_needed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", "a")
    with pytest.raises(DatasetInvalid, match=r"1 samples of /data/train are prompts"):
        read_data(spec_of(train={"path": path, "form": "prompt_only"}))


def test_split_that_leaves_a_part_empty_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *map(str, range(100)))
    train, validation, test = questions(read_data(spec_of(train={"path": path}, split={"validation": 0.2})))
    assert sorted([*train, *validation], key=int) == [str(n) for n in range(100)]
    assert (len(validation) > 5, test) == (True, [])
    one = write_rows(tmp_path / "one.jsonl", "a")
    with pytest.raises(DatasetInvalid, match="leaves no sample"):
        read_data(spec_of(train={"path": one}, split={"validation": 0.5}))


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/part-*.jsonl
  - split: check
    path: [more/held.jsonl]
---
# Rows
"""
SEVERAL = (
    "---\nconfigs:\n- config_name: main\n  data_files: a.jsonl\n- config_name: other\n  data_files: b.jsonl\n---\n"
)


def test_files_of_a_split_are_those_of_the_card(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, ["data/part-1.jsonl", "data/part-0.jsonl", "more/held.jsonl", "train.jsonl"], CARD)
    data = read_from_hub(hub)
    assert questions(data)[0] == ["data/part-0.jsonl", "data/part-1.jsonl"]
    assert data.commits == {"/data/train": COMMIT}
    # The files are fetched at the commit that the branch had when it was asked for.
    assert hub.revisions == ["main", COMMIT]
    assert questions(read_from_hub(hub, split="check"))[0] == ["more/held.jsonl"]
    with pytest.raises(DatasetInvalid, match="splits train, check"):
        read_from_hub(hub, split="test")
    assert questions(read_from_hub(hub, files=["train.jsonl"]))[0] == ["train.jsonl"]


def test_files_of_a_split_are_those_that_have_it_in_their_names(tmp_path: Path) -> None:
    files = ["data/train-0-of-2.jsonl", "data/train-1-of-2.jsonl", "data/constraint.jsonl", "test/0.jsonl", "x.txt"]
    hub = FakeHub(tmp_path, files)
    assert questions(read_from_hub(hub))[0] == files[:2]
    assert questions(read_from_hub(hub, split="test"))[0] == ["test/0.jsonl"]
    with pytest.raises(DatasetInvalid, match="of the split dev: name them with `files`"):
        read_from_hub(hub, split="dev")


def test_data_set_of_several_configurations_needs_its_files_named(tmp_path: Path) -> None:
    hub = FakeHub(tmp_path, ["a.jsonl", "b.jsonl"], SEVERAL)
    with pytest.raises(DatasetInvalid, match="main, other"):
        read_from_hub(hub)
    assert questions(read_from_hub(hub, files=["b.jsonl"]))[0] == ["b.jsonl"]


def test_hub_that_cannot_be_reached_is_no_fault_of_the_user(tmp_path: Path) -> None:
    class Unreachable(FakeHub):
        def snapshot(self, *_arguments: object, **_options: object) -> Path:
            raise ConnectionError

    with pytest.raises(EngineFailure):
        read_from_hub(Unreachable(tmp_path, []))


def test_names_of_files_stay_within_the_data_set() -> None:
    for reference in ({"files": ["../a"]}, {"files": ["/a"]}, {"files": ["a"], "split": "train"}):
        with pytest.raises(Exception, match="files"):
            spec_of(train={"hub": {"repo": "someone/rows", **reference}})
    with pytest.raises(Exception, match="would change nothing"):
        spec_of(train={"dataset": "ds_00000000", "form": "messages"})
