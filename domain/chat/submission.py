"""What a client asks, as the question that a worker answers: which model, and how that was taught to be asked."""

from typing import Any

from sqlalchemy.orm import Session

from domain.chat.models import ChatRequest
from domain.chat.repository import ChatLimits, add_request
from domain.checkpoints.repository import get_checkpoint
from domain.errors import EngineRefusal, PathOutsideModelRoots
from domain.jobs.models import Job
from domain.model_catalog import ModelNotListed
from domain.model_paths import locate_model
from domain.settings import Settings
from pocl.chat.protocol import ChatQuestion, ChatTemplateSettings
from pocl.spec import ModelRef


def ask_checkpoint(
    session: Session, settings: Settings, project: str, checkpoint_id: str, question: ChatQuestion
) -> ChatRequest:
    """Queue a conversation with a checkpoint of the project. It is asked as its job evaluates it: with the system
    message, the day and the precision of the job's specification.

    Args:
        question: The conversation; its model is replaced.

    Raises:
        CheckpointNotFound, CheckpointExpired: the project has no such checkpoint, or has it no more.
        TooManyChats, ChatQueueFull: as many wait as may.
    """
    checkpoint = get_checkpoint(session, project, checkpoint_id)
    spec = session.get_one(Job, checkpoint.job_id).spec
    changes = {
        "model": ModelRef(checkpoint=checkpoint.id),
        "template": _template_settings(spec),
        "precision": spec.get("training", {}).get("precision", question.precision),
    }
    return add_request(session, project, question.model_copy(update=changes), limits_of(settings))


def ask_model(session: Session, settings: Settings, project: str, path: str, question: ChatQuestion) -> ChatRequest:
    """Queue a conversation with a model below the model roots.

    Args:
        question: The conversation; its model is replaced.

    Raises:
        ModelNotListed: there is no model of this path.
        TooManyChats, ChatQueueFull: as many wait as may.
    """
    try:
        locate_model(settings.model_roots, path, pointer="")
    except (EngineRefusal, PathOutsideModelRoots) as error:
        raise ModelNotListed from error
    asked = question.model_copy(update={"model": ModelRef(path=path)})
    return add_request(session, project, asked, limits_of(settings))


def limits_of(settings: Settings) -> ChatLimits:
    """The limits on chat requests that the service is set to."""
    return ChatLimits(settings.max_chats, settings.max_chats_per_project, settings.chat_wait_seconds)


def _template_settings(spec: dict[str, Any]) -> ChatTemplateSettings:
    data = spec.get("data", {})
    return ChatTemplateSettings(system=data.get("system"), date=data.get("date"))
