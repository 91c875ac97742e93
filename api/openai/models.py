"""Models and chat completions as OpenAI's API has them."""

import re
from typing import Final

from anyio.to_thread import run_sync
from fastapi import APIRouter, Response

from api.auth import Caller
from api.chat.completions import ChatResponse, ChatWatcherDep, PendingAnswer
from api.chat.schemas import ChatCompletionRequest
from api.dependencies import DatabaseDep, SettingsDep
from api.models.routes import ModelId, ModelReaderDep
from api.openai.schemas import ListPage, Model, present_student
from api.pagination import MAX_LIMIT
from api.sessions import WriteSession, transaction_slot
from api.strict_json import StrictJsonRoute
from domain.chat.submission import ask_checkpoint, ask_model
from domain.checkpoints.repository import get_checkpoint, list_checkpoints
from domain.errors import Unprocessable
from pocl.errors import FieldError

router = APIRouter(include_in_schema=False, route_class=StrictJsonRoute)

_CHECKPOINT: Final = re.compile(r"ckpt_[0-9a-z]{8,40}")
_STUDENTS: Final = ("final", "best")
_OWNER: Final = "system"


@router.get("/models")
async def list_openai_models(caller: Caller, database: DatabaseDep, reader: ModelReaderDep) -> ListPage[Model]:
    """The newest 100 students of the project, and the first 100 models below the model roots that can be used."""

    def read_students() -> list[Model]:
        with database.transaction(write=False) as session:
            page = list_checkpoints(session, caller.project, kinds=_STUDENTS, limit=MAX_LIMIT)
            return [present_student(row) for row in page.rows]

    async with transaction_slot():
        students = await run_sync(read_students)
    listing = await reader.pages.get((None, MAX_LIMIT))
    paths = [each.path for each in listing.page.rows if each.description is not None]
    models = [*students, *(Model(id=path, created=0, owned_by=_OWNER) for path in paths)]
    return ListPage.of(models, [each.id for each in models], has_more=False)


@router.get("/models/{model_id:path}")
async def retrieve_openai_model(
    caller: Caller, database: DatabaseDep, reader: ModelReaderDep, model_id: ModelId
) -> Model:
    """A student of the project, by the id of its checkpoint, or a model below the model roots, by its path."""

    def read_student() -> Model:
        with database.transaction(write=False) as session:
            return present_student(get_checkpoint(session, caller.project, model_id))

    if _CHECKPOINT.fullmatch(model_id):
        async with transaction_slot():
            return await run_sync(read_student)
    model = await reader.models.get(model_id)
    return Model(id=model.path, created=0, owned_by=_OWNER)


@router.post("/chat/completions", response_class=Response)
def create_chat_completion(
    body: ChatCompletionRequest,
    session: WriteSession,
    caller: Caller,
    settings: SettingsDep,
    watcher: ChatWatcherDep,
) -> Response:
    """Have a worker answer a conversation with a checkpoint, by its id, or with a model, by its path."""
    if body.model is None:
        detail = "Name a checkpoint by its id, such as the fine_tuned_model of a job, or a model by its path."
        raise Unprocessable(field_errors=[FieldError("/model", "missing", detail)])
    if _CHECKPOINT.fullmatch(body.model):
        row = ask_checkpoint(session, settings, caller.project, body.model, body.question())
    else:
        row = ask_model(session, settings, caller.project, body.model, body.question())
    answer = PendingAnswer.of(row, body, model=body.model)
    return ChatResponse(watcher, answer, keep_alive_seconds=settings.keep_alive_seconds)
