"""Projects over HTTP: make, list, get, change their quotas, delete."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api.auth import Caller, ServiceAdminCaller, ServiceAdminRequired
from api.idempotency.keys import KEY_ERRORS
from api.idempotency.writes import IdempotentWriteDep, replayable_response
from api.pagination import Limit
from api.path_params import ProjectId
from api.prefix import location_of
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, problem_responses
from api.projects.schemas import ProjectCreate, ProjectPage, ProjectUpdate, ProjectView
from api.sessions import ReadSession, WriteSession
from api.strict_json import StrictJsonRoute
from domain.jobs import project_deletion
from domain.jobs.project_deletion import ProjectIsNeeded
from domain.projects import repository
from domain.projects.models import PROJECT_ID
from domain.projects.repository import ProjectExists, ProjectNotFound

router = APIRouter(prefix="/projects", tags=["projects"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

AfterProject = Annotated[
    str | None,
    Query(
        pattern=rf"^{PROJECT_ID}$",
        description="The id after whose project the page begins: `last_id` of the previous page.",
    ),
]


@router.post(
    "",
    status_code=201,
    summary="Make a project",
    response_model=ProjectView,
    responses=replayable_response(201, location=True)
    | BODY_PROBLEMS
    | problem_responses(ServiceAdminRequired, ProjectExists, *KEY_ERRORS),
)
def create_project(
    write: IdempotentWriteDep, caller: ServiceAdminCaller, body: ProjectCreate, request: Request
) -> Response:
    """A project has jobs, data sets, checkpoints and keys that no other project sees, and quotas of its own. It needs
    an admin key of the project `default`.
    """
    del caller
    with write.transaction() as session:
        project = repository.create_project(session, body.id, **body.model_dump(exclude={"id"}))
        location = location_of(request, "get_project", project_id=project.id)
        return write.respond(ProjectView.model_validate(project), status=201, location=location)


@router.get("", summary="List the projects")
def list_projects(session: ReadSession, caller: Caller, limit: Limit = 20, after: AfterProject = None) -> ProjectPage:
    """The sender's project; with an admin key of the project `default` all projects, by id."""
    only = None if caller.administers_all else caller.project
    page = repository.list_projects(session, only=only, limit=limit, after=after)
    return ProjectPage.from_rows(page, ProjectView.model_validate, lambda row: row.id)


@router.get("/{project_id}", summary="Get a project", responses=problem_responses(ProjectNotFound))
def get_project(session: ReadSession, caller: Caller, project_id: ProjectId) -> ProjectView:
    """One project with its quotas: the sender's own, or with an admin key of the project `default` any."""
    if project_id != caller.project and not caller.administers_all:
        raise ProjectNotFound
    return ProjectView.model_validate(repository.get_project(session, project_id))


@router.patch(
    "/{project_id}",
    summary="Change a project",
    responses=BODY_PROBLEMS | problem_responses(ServiceAdminRequired, ProjectNotFound),
)
def update_project(
    session: WriteSession, caller: ServiceAdminCaller, project_id: ProjectId, body: ProjectUpdate
) -> ProjectView:
    """Change description and quotas; what is left out stays. It needs an admin key of the project `default`."""
    del caller
    project = repository.lock_project(session, project_id)
    for name in body.model_fields_set:
        setattr(project, name, getattr(body, name))
    session.flush()
    return ProjectView.model_validate(project)


@router.delete(
    "/{project_id}",
    status_code=204,
    summary="Delete a project",
    responses=problem_responses(ServiceAdminRequired, ProjectNotFound, ProjectIsNeeded),
)
def delete_project(session: WriteSession, caller: ServiceAdminCaller, project_id: ProjectId) -> None:
    """Delete a project that has neither jobs, data sets nor checkpoints, and no key that is accepted. It needs an admin
    key of the project `default`, which itself stays.
    """
    del caller
    project_deletion.delete_project(session, project_id)
