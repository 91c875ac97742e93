"""Ids in paths. A text that is not shaped like an id names nothing, so it is a 404 like any unknown id."""

import re
from collections.abc import Callable
from typing import Annotated, TypeAlias

from fastapi import Path
from pydantic import AfterValidator

from domain.errors import CheckpointNotFound, DatasetNotFound, JobNotFound, NotFound
from domain.exports.repository import ExportNotFound
from domain.ids import Prefix
from domain.keys.repository import KeyNotFound
from domain.projects.models import PROJECT_ID
from domain.projects.repository import ProjectNotFound
from domain.webhooks.deliveries import DeliveryNotFound
from domain.webhooks.repository import WebhookNotFound


def _require_id(prefix: Prefix, not_found: type[NotFound]) -> Callable[[str], str]:
    pattern = re.compile(rf"{prefix}_[0-9a-z]{{8,40}}")

    def check(value: str) -> str:
        # Before any SQL: PostgreSQL takes no text with U+0000.
        if not pattern.fullmatch(value):
            raise not_found
        return value

    return check


def _require_project_id(value: str) -> str:
    if not re.fullmatch(PROJECT_ID, value):
        raise ProjectNotFound
    return value


JobId: TypeAlias = Annotated[
    str,
    AfterValidator(_require_id("job", JobNotFound)),
    Path(description="The id of a job, for instance `job_06f2k...`."),
]
DatasetId: TypeAlias = Annotated[
    str,
    AfterValidator(_require_id("ds", DatasetNotFound)),
    Path(description="The id of a data set, for instance `ds_06f2k...`."),
]
CheckpointId: TypeAlias = Annotated[
    str,
    AfterValidator(_require_id("ckpt", CheckpointNotFound)),
    Path(description="The id of a checkpoint, for instance `ckpt_06f2k...`."),
]
ExportId: TypeAlias = Annotated[
    str,
    AfterValidator(_require_id("exp", ExportNotFound)),
    Path(description="The id of an export, for instance `exp_06f2k...`."),
]
WebhookId: TypeAlias = Annotated[
    str,
    AfterValidator(_require_id("wh", WebhookNotFound)),
    Path(description="The id of a webhook, for instance `wh_06f2k...`."),
]
DeliveryId: TypeAlias = Annotated[
    str,
    AfterValidator(_require_id("msg", DeliveryNotFound)),
    Path(description="The id of a message, the `webhook-id` that it is sent with, for instance `msg_06f2k...`."),
]
KeyId: TypeAlias = Annotated[
    str,
    AfterValidator(_require_id("key", KeyNotFound)),
    Path(description="The id of a key, for instance `key_06f2k...`."),
]
ProjectId: TypeAlias = Annotated[
    str,
    AfterValidator(_require_project_id),
    Path(description="The id of a project, for instance `default`."),
]
