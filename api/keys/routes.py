"""API keys over HTTP: make, list, rename, rotate, revoke, delete."""

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from api.auth import AdminCaller
from api.keys.schemas import KeyCreate, KeyPage, KeyRotation, KeyUpdate, KeyView, KeyWithSecret
from api.pagination import After, Limit
from api.path_params import KeyId
from api.prefix import location_of
from api.principal import Principal
from api.problems import BODY_PROBLEMS, COMMON_PROBLEMS, problem_responses
from api.sessions import ReadSession, WriteSession
from api.strict_json import StrictJsonRoute
from domain.errors import Unprocessable
from domain.keys import repository
from domain.keys.models import ApiKey
from domain.keys.repository import KeyNotActive, KeyNotFound, TooManyKeys
from domain.keys.tokens import KeyToken
from domain.projects.models import PROJECT_ID
from domain.projects.repository import ProjectNotFound, get_project
from pocl.errors import FieldError

router = APIRouter(prefix="/keys", tags=["keys"], responses=COMMON_PROBLEMS, route_class=StrictJsonRoute)

_KEY_PROBLEMS = problem_responses(KeyNotFound)

ProjectFilter = Annotated[
    str | None,
    Query(
        pattern=rf"^{PROJECT_ID}$",
        description="The project whose keys to list. An admin key of the project `default` lists all unless given.",
    ),
]


async def _refuse_idempotency_key(
    key: Annotated[str | None, Header(alias="Idempotency-Key", include_in_schema=False)] = None,
) -> None:
    """
    Raises:
        Unprocessable: the response would have to be stored, and with it a secret.
    """
    if key is not None:
        detail = "The response has a secret, which is not stored: leave the header out, and delete a lost key."
        raise Unprocessable(field_errors=[FieldError("/header/Idempotency-Key", "not_repeatable", detail)])


@router.post(
    "",
    status_code=201,
    summary="Make a key",
    response_model=KeyWithSecret,
    responses=BODY_PROBLEMS | problem_responses(TooManyKeys),
    dependencies=[Depends(_refuse_idempotency_key)],
)
def create_key(
    session: WriteSession, caller: AdminCaller, body: KeyCreate, request: Request, response: Response
) -> KeyWithSecret:
    """The response shows the key's text, this once: the service keeps its digest alone. An `Idempotency-Key` is
    refused, since the secret would have to be kept for it.
    """
    project, scopes = body.project or caller.project, list(dict.fromkeys(body.scopes))
    _require_administered(caller, project, "/project")
    try:
        key, token = repository.create_key(
            session,
            project=project,
            name=body.name,
            scopes=scopes,
            expires_at=body.expires_at,
        )
    except ProjectNotFound as error:
        raise _unknown_project("/project") from error
    response.headers["Location"] = location_of(request, "get_key", key_id=key.id)
    return _with_secret(key, token)


@router.get("", summary="List the keys")
def list_keys(
    session: ReadSession, caller: AdminCaller, project: ProjectFilter = None, limit: Limit = 20, after: After = None
) -> KeyPage:
    """The keys of the sender's project, newest first; with an admin key of the project `default` those of all."""
    if project is not None:
        _require_administered(caller, project, "/query/project")
        if caller.administers_all:
            try:
                get_project(session, project)
            except ProjectNotFound as error:
                raise _unknown_project("/query/project") from error
    page = repository.list_keys(session, project=project or _administered(caller), limit=limit, after=after)
    return KeyPage.from_rows(page, KeyView.model_validate, lambda row: row.id)


@router.get("/{key_id}", summary="Get a key", responses=_KEY_PROBLEMS)
def get_key(session: ReadSession, caller: AdminCaller, key_id: KeyId) -> KeyView:
    """One key without its secret: its scopes, when it expires, and when it was last used."""
    return KeyView.model_validate(repository.get_key(session, key_id, project=_administered(caller)))


@router.patch("/{key_id}", summary="Rename a key", responses=BODY_PROBLEMS | _KEY_PROBLEMS)
def update_key(session: WriteSession, caller: AdminCaller, key_id: KeyId, body: KeyUpdate) -> KeyView:
    """Change what the key is said to be for. Its scopes and its project stay: make another key for others."""
    return KeyView.model_validate(repository.rename_key(session, key_id, body.name, project=_administered(caller)))


@router.post(
    "/{key_id}/rotate",
    summary="Rotate a key",
    response_model=KeyWithSecret,
    responses=BODY_PROBLEMS | problem_responses(KeyNotFound, KeyNotActive),
    dependencies=[Depends(_refuse_idempotency_key)],
)
def rotate_key(
    session: WriteSession, caller: AdminCaller, key_id: KeyId, body: KeyRotation | None = None
) -> KeyWithSecret:
    """Give the key a new secret, which the response shows, this once. Within the grace time both are accepted."""
    grace = (body or KeyRotation()).grace_seconds
    key, token = repository.rotate_key(session, key_id, grace_seconds=grace, project=_administered(caller))
    return _with_secret(key, token)


@router.post("/{key_id}/revoke", summary="Revoke a key", responses=_KEY_PROBLEMS)
def revoke_key(session: WriteSession, caller: AdminCaller, key_id: KeyId) -> KeyView:
    """Have the key accepted no more: each process refuses it within five seconds. It stays listed for thirty days."""
    return KeyView.model_validate(repository.revoke_key(session, key_id, project=_administered(caller)))


@router.delete("/{key_id}", status_code=204, summary="Delete a key", responses=_KEY_PROBLEMS)
def delete_key(session: WriteSession, caller: AdminCaller, key_id: KeyId) -> None:
    """Have the key accepted no more, as revoking it does, and listed no more."""
    repository.delete_key(session, key_id, project=_administered(caller))


def _administered(caller: Principal) -> str | None:
    """The project whose keys the sender administers; null for all."""
    return None if caller.administers_all else caller.project


def _require_administered(caller: Principal, project: str, pointer: str) -> None:
    if _administered(caller) not in (None, project):
        # As if there were none.
        raise _unknown_project(pointer)


def _unknown_project(pointer: str) -> Unprocessable:
    return Unprocessable(field_errors=[FieldError(pointer, ProjectNotFound.code, str(ProjectNotFound.__doc__))])


def _with_secret(key: ApiKey, token: KeyToken) -> KeyWithSecret:
    return KeyWithSecret(**KeyView.model_validate(key).model_dump(), key=str(token))
