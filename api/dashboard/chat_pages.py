"""The page to try what a job has made: a prompt, answered by its student and by its teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.parse import urlencode

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import StringConstraints
from sqlalchemy.orm import Session

from api.auth import Caller
from api.chat.schemas import ChatCompletionRequest
from api.dashboard.forms import Form, require_form_token
from api.dashboard.live_parts import ShownDigests, respond_with_parts
from api.dashboard.rendering import redirect
from api.dependencies import DatabaseDep, SettingsDep
from api.path_params import JobId
from api.request_checks import refuse_unknown_parameters
from api.sessions import TransactionSlot, WriteSession
from domain.chat.models import ChatRequest
from domain.chat.repository import ChatSnapshot, expire, snapshots
from domain.chat.submission import ask_checkpoint, ask_model
from domain.checkpoints.models import Checkpoint
from domain.checkpoints.repository import list_checkpoints
from domain.errors import NotFound, Unprocessable
from domain.jobs import repository
from domain.jobs.models import Job
from domain.settings import Settings
from pocl.errors import FieldError

router = APIRouter(prefix="/ui/jobs", include_in_schema=False)

_MAX_TOKENS: Final = 256
_MAX_PROMPT: Final = 16_384
_STUDENTS: Final = ("final", "best", "stage", "training")
"""The checkpoints that are tried, the first kind that there is."""
ChatIds = Annotated[
    tuple[Annotated[str, StringConstraints(pattern=r"^chat_[0-9a-z]{8,40}$")], ...], Query(max_length=2)
]


class NothingToTry(NotFound):
    """The job has saved no student yet: wait for its first checkpoint."""

    code = "nothing_to_try"


class ChatGone(NotFound):
    """The answers are deleted minutes after they were given: ask again."""

    code = "chat_not_found"


@dataclass(frozen=True)
class AskedModel:
    """A model that was asked, and what it has answered so far."""

    name: str
    snapshot: ChatSnapshot


@router.get("/{job_id}/try", dependencies=[Depends(refuse_unknown_parameters)])
def show_answers(
    request: Request,
    database: DatabaseDep,
    _slot: TransactionSlot,
    caller: Caller,
    settings: SettingsDep,
    job_id: JobId,
    chat: ChatIds = (),
    seen: ShownDigests = "",
) -> Response:
    """The prompt and its answers, as far as they are given."""
    with database.transaction(write=False) as session:
        row = repository.get_job(session, caller.project, job_id)
        student = _student(session, row)
        asked = _read(session, row, chat)
    if any(each.snapshot.overdue for each in asked):
        # No scheduler need run for people to hear that nobody answers.
        with database.transaction(write=True) as session:
            expire(session, worker_seconds=settings.lease_seconds, chat_ids=chat)
            asked = _read(session, row, chat)
    context = {
        "job": row,
        "student": student,
        "asked": asked,
        "prompt": _prompt(database, chat) if asked else "",
        "most_tokens": _MAX_TOKENS,
        "longest": _MAX_PROMPT,
    }
    is_over = all(each.snapshot.ended for each in asked)
    return respond_with_parts(request, "chat.html", ("chat-answers",), context, seen=seen, is_over=is_over)


@router.post("/{job_id}/try", dependencies=[Depends(require_form_token)])
def ask_models(
    request: Request, session: WriteSession, caller: Caller, settings: SettingsDep, job_id: JobId, form: Form
) -> Response:
    """Ask the student and, where it can be asked, the teacher."""
    row = repository.get_job(session, caller.project, job_id)
    student = _student(session, row)
    if student is None:
        raise NothingToTry
    prompt = form.get("prompt", "").strip()
    if not 0 < len(prompt) <= _MAX_PROMPT:
        raise Unprocessable(
            field_errors=[FieldError("/prompt", "wrong_length", f"write 1 to {_MAX_PROMPT} characters")]
        )
    body = ChatCompletionRequest.model_validate(
        {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": _MAX_TOKENS}
    )
    asked = [ask_checkpoint(session, settings, caller.project, student.id, body.question())]
    asked += _ask_teacher(session, settings, row, body)
    return redirect(request, f"/ui/jobs/{row.id}/try?{urlencode([('chat', each.id) for each in asked])}")


def _student(session: Session, row: Job) -> Checkpoint | None:
    """The student that is tried: the final one, else the best so far, else the newest."""
    for kind in _STUDENTS:
        found = list_checkpoints(session, row.project, job_id=row.id, kinds=[kind], limit=1).rows
        if found:
            return found[0]
    return None


def _ask_teacher(session: Session, settings: Settings, row: Job, body: ChatCompletionRequest) -> list[ChatRequest]:
    teacher: Mapping[str, Any] = row.spec.get("teacher") or {}
    try:
        if teacher.get("path"):
            return [ask_model(session, settings, row.project, teacher["path"], body.question())]
        if teacher.get("checkpoint"):
            return [ask_checkpoint(session, settings, row.project, teacher["checkpoint"], body.question())]
    except NotFound:
        # The page says that the student answers alone.
        return []
    return []


def _read(session: Session, row: Job, chat_ids: tuple[str, ...]) -> list[AskedModel]:
    """
    Raises:
        ChatGone: the project has no such request.
    """
    if not chat_ids:
        return []
    found = snapshots(session, chat_ids)
    if any(chat_id not in found or found[chat_id].project != row.project for chat_id in chat_ids):
        raise ChatGone
    names = ("distilled student", "teacher")
    return [AskedModel(name, found[chat_id]) for name, chat_id in zip(names, chat_ids, strict=False)]


def _prompt(database: DatabaseDep, chat_ids: tuple[str, ...]) -> str:
    """What was asked."""
    with database.transaction(write=False) as session:
        question = session.scalars(sa.select(ChatRequest.question).where(ChatRequest.id == chat_ids[0])).one_or_none()
    return "" if question is None else str(question["messages"][-1]["content"])
