"""Ids in addresses. What cannot be an id names nothing, so it is a 404 like any unknown one."""

import re
from collections.abc import Callable
from typing import Annotated, TypeAlias

from fastapi import Path
from pydantic import AfterValidator

from domain.errors import CheckpointNotFound, DatasetNotFound, JobNotFound, NotFound
from domain.ids import Prefix


def _id_validator(prefix: Prefix, missing: type[NotFound]) -> Callable[[str], str]:
    shape = re.compile(rf"{prefix}_[0-9a-z]{{8,40}}")

    def check(value: str) -> str:
        # Before any SQL: PostgreSQL takes no text with U+0000.
        if not shape.fullmatch(value):
            raise missing
        return value

    return check


JobId: TypeAlias = Annotated[
    str, AfterValidator(_id_validator("job", JobNotFound)), Path(description="For instance `job_06f2k...`.")
]
DatasetId: TypeAlias = Annotated[
    str, AfterValidator(_id_validator("ds", DatasetNotFound)), Path(description="For instance `ds_06f2k...`.")
]
CheckpointId: TypeAlias = Annotated[
    str, AfterValidator(_id_validator("ckpt", CheckpointNotFound)), Path(description="For instance `ckpt_06f2k...`.")
]
