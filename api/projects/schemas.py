"""Projects as clients send and see them."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints

from api.pagination import Page, Resource
from domain.projects.models import PROJECT_ID

_Count = Annotated[StrictInt, Field(ge=0, lt=2**31)]
_Bytes = Annotated[StrictInt, Field(ge=0, le=2**53)]


class ProjectUpdate(BaseModel):
    """What is to change of a project; a quota of null is none, and for queued jobs that of the settings."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        json_schema_extra={"examples": [{"description": "search", "max_jobs_running": 2}]},
    )

    description: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{0,200}$")] | None = None
    """What the project is for, in printable characters."""
    max_jobs_running: _Count | None = None
    """How many jobs of the project workers may hold at once; others wait in the queue."""
    max_jobs_queued: _Count | None = None
    """How many jobs of the project may be queued at once; a submission beyond is refused."""
    max_uploads: _Count | None = None
    """How many uploads of the project one API process takes at once; one beyond is refused."""
    max_storage_bytes: _Bytes | None = None
    """How many bytes the data sets, checkpoints and results of the project may take. Beyond it uploads and submissions
    are refused; a job that runs goes on."""


class ProjectCreate(ProjectUpdate):
    """A project to make."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "search", "max_jobs_running": 2}]})

    id: Annotated[str, StringConstraints(pattern=rf"^{PROJECT_ID}$")]
    """Lower-case letters, digits and hyphens, at most 63."""


class ProjectView(Resource):
    """A project. A quota of null is none, and for queued jobs that of the settings; `/v1/quota` has figures and use."""

    id: str
    """The id of the project."""
    object: Literal["project"] = "project"
    """The kind of the resource."""
    description: str | None
    """What the project is for."""
    max_jobs_running: int | None
    """How many jobs of the project workers may hold at once; others wait in the queue."""
    max_jobs_queued: int | None
    """How many jobs of the project may be queued at once."""
    max_uploads: int | None
    """How many uploads of the project one API process takes at once."""
    max_storage_bytes: int | None
    """How many bytes the data sets, checkpoints and results of the project may take."""
    created_at: datetime
    """When the project was made."""


class ProjectPage(Page[ProjectView, str]):
    """Projects, by id."""
