"""The data sets, checkpoints and repositories that a specification names, found in the project."""

from collections.abc import Iterable
from typing import Final

from sqlalchemy.orm import Session

from domain.checkpoints import repository as checkpoints
from domain.datasets import repository as datasets
from domain.errors import CheckpointNotFound, DatasetNotFound
from domain.jobs.data_checks import StoredRows
from domain.jobs.publication_checks import check_publication
from domain.settings import Settings
from pocl.errors import FieldError, SpecInvalid
from pocl.spec import ANSWERED_DATA, DistillationSpec
from pocl.spec.hub_allowlist import REPOSITORY_NOT_ALLOWED, allows_repository, refusal

ASSUMED_SAMPLES: Final = 10_000
"""What a plan assumes of a data set of the Hub, which is fetched by the worker; the engine's table of stages counts."""


def resolve_references(
    session: Session, settings: Settings, project: str, spec: DistillationSpec, *, lock: bool = False
) -> tuple[dict[str, StoredRows], dict[str, str]]:
    """The data sets by the pointers to their fields, and the store key of each checkpoint that is named.

    Args:
        lock: let nobody delete these data sets and checkpoints until the transaction ends.

    Raises:
        SpecInvalid: the project has no such data set or checkpoint, the data are not an uploaded data set, or a
            repository of the Hub is not one of those that jobs may read, or have their student pushed to.
    """
    field_errors = [*_refuse_repositories(settings, spec), *check_publication(session, settings, spec)]
    get_checkpoint = checkpoints.get_checkpoint_for_share if lock else checkpoints.get_checkpoint
    get_dataset = datasets.get_dataset_for_share if lock else datasets.get_dataset
    rows: dict[str, StoredRows] = {}
    for pointer, data in spec.data_refs.items():
        if data.hub is not None:
            rows[pointer] = StoredRows(None, ASSUMED_SAMPLES)
            continue
        if data.dataset is None:
            detail = "upload the rows as a data set and give its id as `dataset`; the service reads no other files"
            field_errors.append(FieldError(f"{pointer}/path", "dataset_required", detail))
            continue
        try:
            dataset = datasets.require_ready(get_dataset(session, project, data.dataset))
            path = settings.artifact_root / dataset.store_key
            rows[pointer] = StoredRows(datasets.stored_reference(dataset, path), dataset.rows, dataset.sha256)
            if dataset.prompts and pointer in ANSWERED_DATA:
                detail = f"{dataset.prompts} of its samples are prompts without an answer, from which nothing is learnt"
                field_errors.append(FieldError(f"{pointer}/dataset", "answers_missing", detail))
            if pointer == "/data/train" and spec.curriculum.ranks_by_column:
                # Where skipped prompts were counted too, the engine counts again.
                without = dataset.rows - (dataset.ingestion or {}).get("with_difficulty", dataset.rows)
                if without > 0:
                    detail = (
                        f"{without} of {dataset.rows} samples have no number in the column `difficulty`: upload them "
                        "with one, or with `columns` that name the column which has it"
                    )
                    field_errors.append(FieldError("/curriculum/ranking/ranker", "difficulty_missing", detail))
        except (DatasetNotFound, datasets.DatasetNotReady) as error:
            field_errors.append(FieldError(f"{pointer}/dataset", error.code, error.detail))
    keys: dict[str, str] = {}
    for pointer, model in spec.model_refs.items():
        if model.checkpoint is None:
            continue
        try:
            keys[model.checkpoint] = get_checkpoint(session, project, model.checkpoint).store_key
        except CheckpointNotFound as error:
            field_errors.append(FieldError(f"{pointer}/checkpoint", error.code, error.detail))
    if field_errors:
        raise SpecInvalid(field_errors)
    return rows, keys


def share_references(session: Session, project: str, specs: Iterable[DistillationSpec]) -> bool:
    """Let nobody delete what these specifications name, by one statement; whether all of it is there.

    Where it is not, and where they name checkpoints, it is to be looked at one by one.
    """
    datasets_named: set[str] = set()
    for spec in specs:
        if any(model.checkpoint is not None for model in spec.model_refs.values()):
            return False
        datasets_named |= {data.dataset for data in spec.data_refs.values() if data.dataset is not None}
    if not datasets_named:
        return True
    return datasets.share_datasets(session, project, datasets_named) == len(datasets_named)


def _refuse_repositories(settings: Settings, spec: DistillationSpec) -> list[FieldError]:
    """What is wrong with the repositories of the Hub that the specification names, if anything."""
    patterns = settings.hub_repositories
    models = {pointer: ref.hub.repo for pointer, ref in spec.model_refs.items() if ref.hub is not None}
    datasets_of_hub = {pointer: ref.hub.repo for pointer, ref in spec.data_refs.items() if ref.hub is not None}
    repos = models | datasets_of_hub
    return [
        FieldError(f"{pointer}/hub/repo", REPOSITORY_NOT_ALLOWED, refusal(patterns or (), repo))
        for pointer, repo in repos.items()
        if not allows_repository(patterns, repo)
    ]
