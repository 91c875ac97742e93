"""Data sets on the Hugging Face Hub, pinned to a commit: which of their files are read. Their code is never run."""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from pocl.errors import DatasetInvalid, DiskFull, is_disk_full
from pocl.models.hub import HUB_UNREACHABLE, HubClient, hub_failure
from pocl.samples.file_formats import format_of_name
from pocl.spec import FileFormat, HubDataset

_CARD: Final = "README.md"
_DEFAULT_SPLIT: Final = "train"
_SUFFIXES: Final = ("parquet", "jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "tsv")
"""In this order: where a data set has a split in several formats, the first is read."""


def fetch_dataset(ref: HubDataset, file_format: FileFormat | None, hub: HubClient) -> tuple[str, list[Path]]:
    """The commit that the revision names now, and the files that are read, in the order of their names.

    Args:
        file_format: the only format that is read; None for any.

    Raises:
        DatasetInvalid: there is no such data set or revision, it is gated, or it has no such files.
        DiskFull, HubCacheFull: the files do not fit.
        EngineFailure: the Hub cannot be reached, and the files are not in its cache.
    """
    try:
        directory = hub.snapshot(ref.repo, ref.revision, [_CARD], repo_type="dataset")
        # The files are fetched by commit, since the branch may have moved.
        commit = directory.name
        listed = ref.files or _files_on_card(directory / _CARD, ref.split or _DEFAULT_SPLIT, ref.repo)
        for patterns in [listed] if listed else _conventional(ref.split or _DEFAULT_SPLIT, file_format):
            directory = hub.snapshot(ref.repo, commit, patterns, repo_type="dataset")
            files = sorted(_matching(directory, patterns))
            if not listed:
                files = [file for file in files if _has_split(file.relative_to(directory), ref.split or _DEFAULT_SPLIT)]
            if files:
                return commit, files
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise DatasetInvalid(
            f"The Hub has no data set {ref.repo} at {ref.revision} that this machine may read; "
            "a gated one needs a token."
        ) from error
    except HUB_UNREACHABLE as error:
        if is_disk_full(error):
            raise DiskFull() from error
        raise hub_failure(ref.repo, error) from error
    wanted = f"named {', '.join(ref.files)}" if ref.files else f"of the split {ref.split or _DEFAULT_SPLIT}"
    raise DatasetInvalid(
        f"The data set {ref.repo} has no Parquet, JSONL, JSON or CSV files {wanted}: name them with `files`."
    )


def _conventional(split: str, file_format: FileFormat | None) -> Iterator[Sequence[str]]:
    """Patterns of the files that have the split in their names, format by format."""
    for suffix in _SUFFIXES:
        if file_format is None or format_of_name(f"x.{suffix}") == file_format:
            yield [f"*{split}*.{suffix}"]


def _files_on_card(card: Path, split: str, repo: str) -> Sequence[str]:
    """The files of a split as the head of the data set's card says; empty where it does not.

    Raises:
        DatasetInvalid: there are several configurations, or the card has no such split.
    """
    configurations = _configurations(card)
    if not configurations:
        return []
    default = [each for each in configurations if each.get("default") or each.get("config_name") == "default"]
    if len(configurations) > 1 and len(default) != 1:
        names = ", ".join(str(each.get("config_name")) for each in configurations[:8])
        raise DatasetInvalid(f"The data set {repo} has the configurations {names}: name the files of one with `files`.")
    chosen = (default or configurations)[0]
    files = chosen.get("data_files")
    if isinstance(files, str) or (isinstance(files, list) and all(isinstance(each, str) for each in files)):
        files = [{"split": _DEFAULT_SPLIT, "path": files}]
    if not isinstance(files, list):
        return []
    splits = {str(each.get("split")): each.get("path") for each in files if isinstance(each, dict)}
    if split not in splits:
        raise DatasetInvalid(f"The data set {repo} has the splits {', '.join(splits)}, and no {split}: choose another.")
    path = splits[split]
    return [path] if isinstance(path, str) else [str(each) for each in path or ()]


def _configurations(card: Path) -> list[Mapping[str, Any]]:  # Any: whatever the card holds.
    try:
        head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text("utf-8", "replace"), re.DOTALL)
        configurations = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
    except (OSError, yaml.YAMLError, AttributeError):
        return []
    return [each for each in configurations or () if isinstance(each, dict)]


def _matching(directory: Path, patterns: Sequence[str]) -> Iterator[Path]:
    for path in directory.rglob("*"):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            yield path


def _has_split(path: Path, split: str) -> bool:
    """Whether the split is a folder or a word of the name: `train/0.parquet`, `data/train-00000-of-00001.parquet`."""
    return split in path.parts or bool(re.search(rf"(^|[^a-zA-Z0-9]){re.escape(split)}([^a-zA-Z0-9]|$)", path.name))
