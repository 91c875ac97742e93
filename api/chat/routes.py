"""Conversations with checkpoints and models over HTTP, as OpenAI's API has them."""

from typing import Any, Final

from fastapi import APIRouter, Response

from api.auth import Caller
from api.chat.completions import ANSWER_ERRORS, ChatRequestLost, ChatResponse, ChatWatcherDep, PendingAnswer
from api.chat.schemas import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
from api.dependencies import SettingsDep
from api.models.routes import ModelId
from api.path_params import CheckpointId
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, problem_responses
from api.sessions import WriteSession
from api.strict_json import StrictJsonRoute
from domain.chat.repository import ChatQueueFull, TooManyChats
from domain.chat.submission import ask_checkpoint, ask_model
from domain.checkpoints.repository import get_checkpoint
from domain.errors import CheckpointExpired, CheckpointNotFound, Unprocessable
from domain.model_catalog import ModelNotListed
from pocl.errors import FieldError

router = APIRouter(tags=["chat"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

_ERRORS: Final = (TooManyChats, ChatQueueFull, ChatRequestLost, *ANSWER_ERRORS)
_STREAM_SCHEMA: Final[dict[str, Any]] = {
    "type": "string",
    "description": "Messages `data: {...}`, and `data: [DONE]` at the end. One with `error` in place of `choices` ends "
    "an answer that fails on its way.",
    "contentMediaType": "application/json",
    "contentSchema": {"$ref": f"#/components/schemas/{ChatCompletionChunk.__name__}"},
}
_ANSWER: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "model": ChatCompletion,
        "description": "The answer; with `stream` server-sent events, each `data` a `ChatCompletionChunk`.",
        "content": {"text/event-stream": {"schema": _STREAM_SCHEMA}},
    }
}


@router.post(
    "/checkpoints/{checkpoint_id}/chat/completions",
    summary="Talk to a checkpoint",
    response_class=Response,
    responses={
        **_ANSWER,
        **BODY_PROBLEMS,
        **problem_responses(CheckpointNotFound, CheckpointExpired, *_ERRORS),
    },
)
def create_checkpoint_chat_completion(
    body: ChatCompletionRequest,
    session: WriteSession,
    caller: Caller,
    settings: SettingsDep,
    watcher: ChatWatcherDep,
    checkpoint_id: CheckpointId,
) -> Response:
    """Have a worker that is free answer a conversation with a checkpoint, by the template, system message and precision
    that its job evaluates it with: an aid to try what a job has made, and no serving. It comes before the next job and
    stops none; where every worker is at work for half a minute the response is 503. A client that disconnects cancels
    the answer.
    """
    get_checkpoint(session, caller.project, checkpoint_id)
    _check_model(body, checkpoint_id)
    row = ask_checkpoint(session, settings, caller.project, checkpoint_id, body.question())
    answer = PendingAnswer.of(row, body, model=checkpoint_id)
    return ChatResponse(watcher, answer, keep_alive_seconds=settings.keep_alive_seconds)


@router.post(
    "/models/{model_id:path}/chat/completions",
    summary="Talk to a model",
    response_class=Response,
    responses={**_ANSWER, **BODY_PROBLEMS, **problem_responses(ModelNotListed, *_ERRORS)},
)
def create_model_chat_completion(
    body: ChatCompletionRequest,
    session: WriteSession,
    caller: Caller,
    settings: SettingsDep,
    watcher: ChatWatcherDep,
    model_id: ModelId,
) -> Response:
    """Have a worker that is free answer a conversation with a model below the model roots, such as a teacher, to see
    its answer beside that of its student. Otherwise it is as for checkpoints.
    """
    _check_model(body, model_id)
    row = ask_model(session, settings, caller.project, model_id, body.question())
    answer = PendingAnswer.of(row, body, model=model_id)
    return ChatResponse(watcher, answer, keep_alive_seconds=settings.keep_alive_seconds)


def _check_model(body: ChatCompletionRequest, name: str) -> None:
    """
    Raises:
        Unprocessable: the body names another model than the path.
    """
    if body.model not in (None, name):
        detail = "It is not the model of the path: leave it out, or name that one."
        raise Unprocessable(field_errors=[FieldError("/model", "model_differs", detail)])
