"""What a job names, on the machine of the worker: ids of rows and names of models become absolute paths."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from domain.artifacts import ArtifactStore
from domain.checkpoints.repository import get_checkpoint
from domain.datasets.models import Dataset
from domain.datasets.repository import get_dataset, stored_reference
from domain.errors import ApiError, NotFound
from domain.jobs.leases import Claim
from domain.jobs.models import Job
from domain.jobs.repository import get_artifact
from domain.jobs.states import EndReason
from domain.model_paths import locate_model
from domain.settings import Settings
from pocl.layout import ANSWERS_FILE, RESULT_FILE
from pocl.spec import RANKING_MODEL_POINTER, DataRef, DistillationSpec, ModelRef
from worker.engine_exit import STORAGE_FAILED


@dataclass(frozen=True)
class StoredInputs:
    """What a specification names of what is in the artifact store."""

    datasets: Mapping[str, Dataset]
    """By their ids."""
    checkpoint_keys: Mapping[str, str]
    """The store keys of checkpoints by their ids."""
    compared_keys: Mapping[str, str | None]
    """The store keys of what a report shows of the job that a control is compared with, by name, null for what is gone;
    empty without such a job."""
    run_name: Mapping[str, str]
    """How the report calls the run, as the engine's `about.json` has it."""


def find_inputs(session: Session, claim: Claim) -> StoredInputs:
    """The rows of the data sets and checkpoints that the claim's specification names, and the name of its job.

    Raises:
        DatasetNotFound, CheckpointNotFound: one of them was deleted.
    """
    named = [ref.dataset for ref in claim.spec.data_refs.values() if ref.dataset is not None]
    models = [ref.checkpoint for ref in claim.spec.model_refs.values() if ref.checkpoint is not None]
    return StoredInputs(
        {each: get_dataset(session, claim.project, each) for each in named},
        {each: get_checkpoint(session, claim.project, each).store_key for each in models},
        _find_compared(session, claim),
        _run_name(session, claim),
    )


def _find_compared(session: Session, claim: Claim) -> dict[str, str | None]:
    control = claim.spec.curriculum.control
    if control is None or control.budget_of is None:
        return {}
    # The job may be deleted meanwhile: the control has its steps, and says that the comparison is missing.
    stored = {RESULT_FILE: "result", ANSWERS_FILE: "answers"}
    artifacts = {name: get_artifact(session, control.budget_of, kind) for name, kind in stored.items()}
    return {name: None if artifact is None else artifact.store_key for name, artifact in artifacts.items()}


def _run_name(session: Session, claim: Claim) -> dict[str, str]:
    """The name of the job, its id where it has another, and when it began: at its first claim."""
    job = session.get_one(Job, claim.job_id)
    assert job.started_at is not None, "a claimed job has begun"
    named = {"name": job.name, "job": job.id} if job.name else {"name": job.id}
    return {**named, "began_at": job.started_at.isoformat()}


def localize_spec(
    inputs: StoredInputs, store: ArtifactStore, settings: Settings, spec: DistillationSpec, scratch: Path
) -> DistillationSpec:
    """The specification with ids and model names replaced by absolute paths.

    Args:
        scratch: where what a bucket has is fetched to, which takes long.

    Raises:
        ArtifactNotFound, ArtifactCorrupt: what it names was deleted or damaged.
        PathOutsideModelRoots, EngineRefusal: a model is not where the service may read it.
        OSError: the store is away or refuses, or the disk is full.
    """

    def data(reference: DataRef) -> DataRef:
        if reference.dataset is None:
            return reference
        dataset = inputs.datasets[reference.dataset]
        return stored_reference(dataset, store.provide_file(dataset.store_key, scratch))

    def model(pointer: str, reference: ModelRef) -> ModelRef:
        if reference.checkpoint is not None:
            path = store.provide_directory(inputs.checkpoint_keys[reference.checkpoint], scratch)
        elif reference.path is not None:
            path = locate_model(settings.model_roots, reference.path, pointer=f"{pointer}/path")
        else:
            return reference
        return reference.model_copy(update={"path": str(path), "checkpoint": None})

    localized = spec.with_data_refs({pointer: data(ref) for pointer, ref in spec.data_refs.items()})
    if localized.ranking_model is not None:
        localized = localized.with_ranking_model(model(RANKING_MODEL_POINTER, localized.ranking_model))
    return localized.model_copy(
        update={
            "teacher": None if localized.teacher is None else model("/teacher", localized.teacher),
            "student": model("/student", localized.student),
        }
    )


def explain_unusable(error: Exception) -> EndReason:
    """Why the job cannot run with what :func:`find_inputs` or :func:`localize_spec` raised."""
    if isinstance(error, NotFound):
        return EndReason(error.code, error.detail, "user", False, "Submit the job again with what exists.")
    if isinstance(error, ApiError):
        # The service had the model when it accepted the job: this worker lacks it.
        hint = "Give every worker the models of the API below POCL_MODEL_ROOTS."
        return EndReason(error.code, error.detail, "system", True, hint)
    # Where the store of this worker is not mounted, that of another may be.
    message = "A stored file that the job needs is gone, damaged or not to be had from this worker."
    return EndReason(STORAGE_FAILED.code, message, "system", True, "Look at POCL_ARTIFACT_ROOT of the worker.")
