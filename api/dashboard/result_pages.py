"""What came of a job, in parts that its page asks for: the difficulty of its samples, and the answers of its models."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy.orm import Session

from api.auth import Caller
from api.dashboard.rendering import is_fragment_request, render
from api.dashboard.stored_results import Difficulty, add_texts, read_answers, read_difficulty
from api.dependencies import StoreDep
from api.path_params import JobId
from api.request_checks import refuse_unknown_parameters
from api.sessions import HeavyReadSession
from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.datasets.repository import DatasetNotReady, get_dataset, require_ready
from domain.errors import DatasetNotFound
from domain.jobs import repository
from domain.jobs.models import Job

router = APIRouter(prefix="/ui/jobs", include_in_schema=False, dependencies=[Depends(refuse_unknown_parameters)])


@router.get("/{job_id}/difficulty")
def show_difficulty(
    request: Request, session: HeavyReadSession, caller: Caller, store: StoreDep, job_id: JobId
) -> Response:
    """How difficult the training samples are for the model that ranked them."""
    row = repository.get_job(session, caller.project, job_id)
    ranking = repository.find_ranking(session, row)
    difficulty = None
    if ranking is not None:
        try:
            difficulty = read_difficulty(store, ranking)
        except (ArtifactNotFound, ArtifactCorrupt):
            # The page says that there is none.
            difficulty = None
    if difficulty is not None:
        _add_texts(session, store, row, difficulty)
    return _respond(request, "difficulty", row, {"difficulty": difficulty})


@router.get("/{job_id}/answers")
def show_answers(
    request: Request, session: HeavyReadSession, caller: Caller, store: StoreDep, job_id: JobId
) -> Response:
    """The answers of teacher, untrained and trained student, side by side."""
    row = repository.get_job(session, caller.project, job_id)
    result = repository.get_artifact(session, row.id, "result")
    answers: list[dict[str, Any]] = []
    if result is not None:
        try:
            answers = read_answers(store, result)
        except (ArtifactNotFound, ArtifactCorrupt):
            answers = []
    return _respond(request, "answers", row, {"answers": answers})


def _respond(request: Request, name: str, row: Job, context: dict[str, Any]) -> Response:
    """The part alone for the page of the job; a page of its own for a browser without scripts."""
    template = f"{name}.html" if is_fragment_request(request) else "result_page.html"
    return render(request, template, part=f"{name}.html", job=row, **context)


def _add_texts(session: Session, store: ArtifactStore, row: Job, difficulty: Difficulty) -> None:
    """Add the texts of the shown samples, where the data set is one of the project that is here."""
    data = row.spec["data"]
    dataset_id = data["train"].get("dataset")
    if dataset_id is None:
        return
    try:
        dataset = require_ready(get_dataset(session, row.project, dataset_id))
        path = store.locate(dataset.store_key)
    except (DatasetNotFound, DatasetNotReady, ArtifactNotFound, ArtifactCorrupt):
        return
    add_texts([*difficulty.easiest, *difficulty.hardest], path, is_split=data.get("split") is not None)
