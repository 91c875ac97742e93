"""Every operation of the OpenAPI document, and of OpenAI's API below `/openai/v1`, which that leaves out, visited with
every kind of key: a new route is found by itself.

The project `alpha` has an object of each kind. Its keys, those of the project `beta` and those of `default` visit each
of them, and so do requests without a key that is accepted. A path parameter that this module does not know fails
the test: whoever adds one says here what it names, and makes an object for it.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.routing import iter_route_contexts
from pydantic import SecretStr
from starlette.testclient import TestClient

from api.app import create_app
from api.rate_limits import WrongKeyRates
from domain.checkpoints.models import Checkpoint
from domain.db import Database, db_now
from domain.exports.models import CheckpointExport
from domain.ids import new_id
from domain.jobs.models import Job
from domain.jobs.states import JobStatus
from domain.keys.models import SCOPES_INCLUDED, ApiKey, Scope
from domain.keys.repository import create_key, revoke_key
from domain.projects.repository import create_project
from domain.settings import Settings
from domain.webhooks.deliveries import add_test_delivery
from domain.webhooks.models import WebhookEndpoint
from domain.webhooks.repository import database_time
from domain.workers.models import Device
from domain.workers.repository import register_worker
from pocl.storage.manifest import write_manifest
from tests.support.requests import JSONL, KEY, LOOPBACK, jsonl, specification
from tests.support.rows import add_job, insert_dataset

OWNER, STRANGER = "alpha", "beta"
UNKNOWN_KEYS = ("none", "wrong", "expired", "revoked")
SHARED = {"name": "worker-1", "model_id": "nothing"}
"""Path parameters that name what all projects share."""
CHOSEN = {"path": "config.json", "kind": "tensorboard"}
"""Path parameters that name a part of the object before them."""
KINDS = ("job", "dataset", "checkpoint", "export", "key", "project", "webhook", "delivery")
NOT_FOUND_CODES = {f"{kind}_not_found" for kind in KINDS}
BODIES: dict[str, Callable[[Mapping[str, str]], Any]] = {
    "validate_job": lambda ids: {"spec": specification(ids["dataset_id"])},
    "create_job": lambda ids: {"spec": specification(ids["dataset_id"])},
    "update_job": lambda _: {"priority": 1},
    "branch_job": lambda _: {"stage": 0, "changes": {"method": "js"}},
    "create_key": lambda ids: {"name": "mine", "scopes": ["read"], "project": ids["project_id"]},
    "update_key": lambda _: {"name": "other"},
    "create_project": lambda ids: {"id": ids["project_id"]},
    "update_project": lambda _: {"description": "other"},
    # Of another model than the path's, so that no request waits for a worker.
    "create_checkpoint_chat_completion": lambda _: {"messages": [{"role": "user", "content": "?"}], "model": "other"},
    "create_model_chat_completion": lambda _: {"messages": [{"role": "user", "content": "?"}]},
    "create_export": lambda _: {"format": "f16"},
    "create_webhook": lambda _: {"url": "https://hooks.example.com/jobs"},
    "update_webhook": lambda _: {"description": "other"},
}
"""Bodies of the operations that need one, with the ids of the owner's objects."""
NAMES_NOTHING = {"create_project", "create_webhook", "create_model_chat_completion"}
"""Of these, those whose body names no object of a project."""
QUERIES = {"preview_dataset": {"model": "random"}}
UPLOADS = {"upload_dataset"}


@dataclass(frozen=True)
class Operation:
    method: str
    path: str
    name: str
    scope: str | None
    """The scope that it needs, as the document says; None for what needs no key."""
    parameters: tuple[str, ...]
    needs_service_admin: bool

    @property
    def owned(self) -> list[str]:
        """The path parameters that name an object of a project."""
        return [name for name in self.parameters if name not in SHARED and name not in CHOSEN]


@dataclass(frozen=True)
class Role:
    """A kind of key."""

    name: str
    project: str | None
    """Null where the key is not accepted."""
    scope: Scope | None = None


@dataclass
class Service:
    client: TestClient
    database: Database
    ids: dict[str, str]
    """The ids of the owner's objects by the names of path parameters."""
    tokens: dict[Role, str | None] = field(default_factory=dict)

    def visit(self, operation: Operation, role: Role) -> Any:
        path = operation.path.format(**SHARED, **CHOSEN, **self.ids)
        token = self.tokens[role]
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        content: dict[str, Any] = {"headers": headers, "params": QUERIES.get(operation.name)}
        if operation.name in UPLOADS:
            content |= {"content": jsonl(1), "headers": {**headers, **JSONL}}
        elif operation.name in BODIES:
            content |= {"json": BODIES[operation.name](self.ids)}
        return self.client.request(operation.method, path, **content)


@pytest.fixture
def service(sqlite_template: Path, tmp_path: Path) -> Iterator[Service]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copyfile(sqlite_template, home / "pocl.sqlite3")
    settings = Settings(home=home, api_key=SecretStr(KEY), encoding_check_seconds=0)
    database = Database(settings.database_url)

    async def no_wait(_seconds: float) -> None:
        """Let wrong keys be answered at once."""

    app = create_app(settings, wrong_keys=WrongKeyRates(no_wait))
    with TestClient(app, base_url=LOOPBACK, raise_server_exceptions=False) as client:
        made = Service(client, database, ids=make_objects(database, settings.artifact_root))
        made.tokens = make_keys(database)
        yield made
    database.close()


def make_objects(database: Database, artifacts: Path) -> dict[str, str]:
    """An object of each kind in the project of the owner."""
    with database.transaction(write=True) as session:
        create_project(session, OWNER)
        create_project(session, STRANGER)
        stored = insert_dataset(session, project=OWNER)
        dataset, content = stored.id, jsonl(2)
        stored.size_bytes, stored.sha256 = len(content), hashlib.sha256(content).hexdigest()
        (artifacts / "datasets").mkdir(parents=True)
        (artifacts / "datasets" / f"{dataset}.jsonl").write_bytes(content)
        # One that has ended, since the events of a live job have no end.
        job = add_job(session, project=OWNER).id
        session.execute(sa.update(Job).where(Job.id == job).values(status=JobStatus.SUCCEEDED))
        checkpoint = new_id("ckpt")
        session.add(
            Checkpoint(
                id=checkpoint,
                project=OWNER,
                job_id=job,
                attempt=1,
                kind="final",
                step=1,
                store_key=f"jobs/{job}/checkpoints/{checkpoint}",
                size_bytes=1,
                manifest_sha256="0" * 64,
            )
        )
        directory = artifacts / "jobs" / job / "checkpoints" / checkpoint
        directory.mkdir(parents=True)
        (directory / CHOSEN["path"]).write_bytes(b"{}")
        write_manifest(directory)
        export = new_id("exp")
        store_key = f"jobs/{job}/checkpoints/{checkpoint}/exports/{export}-1"
        session.flush()
        session.add(
            CheckpointExport(
                id=export,
                project=OWNER,
                job_id=job,
                checkpoint_id=checkpoint,
                format="q8_0",
                state="complete",
                expires_at=db_now(),
                store_key=store_key,
                size_bytes=1,
                manifest_sha256="0" * 64,
            )
        )
        (artifacts / store_key).mkdir(parents=True)
        (artifacts / store_key / CHOSEN["path"]).write_bytes(b"{}")
        write_manifest(artifacts / store_key)
        key, _ = create_key(session, project=OWNER, name="visited", scopes=["read"])
        webhook = WebhookEndpoint(
            id=new_id("wh"), project=OWNER, url="https://hooks.example.com", secret="whsec_" + "A" * 32
        )
        session.add(webhook)
        session.flush()
        delivery = add_test_delivery(session, OWNER, webhook.id, now=database_time(session))
        register_worker(session, SHARED["name"], [Device("cpu", "cpu", None)])
    return {
        "project_id": OWNER,
        "dataset_id": dataset,
        "job_id": job,
        "checkpoint_id": checkpoint,
        "export_id": export,
        "key_id": key.id,
        "webhook_id": webhook.id,
        "delivery_id": delivery.id,
    }


def make_keys(database: Database) -> dict[Role, str | None]:
    tokens: dict[Role, str | None] = {Role("none", None): None, Role("wrong", None): "pocl_00000000_" + "0" * 64}
    with database.transaction(write=True) as session:
        for name in ("expired", "revoked"):
            key, token = create_key(session, project=OWNER, name=name, scopes=["admin"])
            tokens[Role(name, None)] = str(token)
            if name == "revoked":
                revoke_key(session, key.id, project=None)
            else:
                session.execute(sa.update(ApiKey).where(ApiKey.id == key.id).values(expires_at=db_now(-1)))
        for project in (OWNER, STRANGER, "default"):
            for scope in SCOPES_INCLUDED:
                _, token = create_key(session, project=project, name="visitor", scopes=[scope])
                tokens[Role(f"{project} {scope}", project, scope)] = str(token)
    return tokens


def operations(client: TestClient) -> list[Operation]:
    found = []
    document = client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            scopes = [scope for each in described.get("security", []) for scope in each["bearer"]]
            names = tuple(each["name"] for each in described.get("parameters", []) if each["in"] == "path")
            refusal = described["responses"].get("403", {"description": ""})
            # What several operations have is a component, which is called after its code.
            refusal = document["components"]["responses"].get(refusal.get("$ref", "").rpartition("/")[2], refusal)
            needs_service_admin = "`service_admin_required`" in refusal["description"]
            # HEAD is answered by the very function of GET.
            found.append(
                Operation(
                    method.upper(),
                    path,
                    described["operationId"],
                    scopes[0] if scopes else None,
                    names,
                    needs_service_admin,
                )
            )
    return found


OF_OPENAI = {"file_id": "dataset_id", "model_id:path": "checkpoint_id"}
"""What the path parameters of OpenAI's API name here."""


def operations_of_openai(client: TestClient) -> list[Operation]:
    found = []
    for route in iter_route_contexts(client.app.routes):  # type: ignore[attr-defined] # Of the application, which it has.
        if not (route.path or "").startswith("/openai/"):
            continue
        path = str(route.path)
        for theirs, ours in OF_OPENAI.items():
            path = path.replace(f"{{{theirs}}}", f"{{{ours}}}")
        names = tuple(re.findall(r"{(\w+)}", path))
        for method in set(route.methods or ()) - {"HEAD"}:
            scope = "read" if method == "GET" else "submit"
            found.append(Operation(method, path, f"{method} {path}", scope, names, needs_service_admin=False))
    return found


def fault_of(service: Service, operation: Operation, role: Role) -> str | None:
    """What is wrong with the response to a role; None where it is right."""
    response = service.visit(operation, role)
    status = response.status_code
    code = None
    if status >= 400 and "json" in response.headers.get("content-type", ""):
        content = response.json()
        code = content.get("error", content)["code"]
    expected: str | None = None
    if operation.scope is None:
        expected = None if status < 300 else "2xx"
    elif role.project is None or role.scope is None:
        expected = None if status == 401 else "401"
    elif operation.scope not in SCOPES_INCLUDED[role.scope]:
        expected = None if status == 403 and code in (None, "insufficient_scope") else "403 insufficient_scope"
    elif operation.needs_service_admin and role.project != "default":
        expected = None if status == 403 and code == "service_admin_required" else "403 service_admin_required"
    elif status >= 500 or status in (401, 403):
        expected = "no 401, 403 or 5xx"
    elif role.project == STRANGER or (role.project == "default" and not administers(operation, role)):
        expected = fault_of_stranger(service, operation, response, code)
    elif operation.method == "GET" and operation.owned:
        expected = "its own object" if code in NOT_FOUND_CODES else None
    return (
        None
        if expected is None
        else f"{operation.method} {operation.path} as {role.name}: {status} {code}, not {expected}"
    )


def administers(operation: Operation, role: Role) -> bool:
    """Whether an admin key of the project `default` sees the keys and projects of all."""
    return role.scope == "admin" and operation.path.startswith(("/v1/keys", "/v1/projects"))


def administers_objects(role: Role) -> bool:
    """Whether a role may change the owner's objects, or take them away."""
    return role.project == OWNER or (role.project == "default" and role.scope == "admin")


def fault_of_stranger(service: Service, operation: Operation, response: Any, code: str | None) -> str | None:
    if operation.owned:
        return None if response.status_code == 404 and code in {None, *NOT_FOUND_CODES} else "404"
    if operation.name in BODIES and operation.name not in NAMES_NOTHING:
        return None if response.status_code == 422 else "422, since it names another's object"
    named = [value for name, value in service.ids.items() if name != "project_id" and value in response.text]
    return f"without {named}" if named else None


@pytest.mark.system
def test_every_operation_answers_every_role_as_it_should(service: Service) -> None:
    of_openai = operations_of_openai(service.client)
    assert len(of_openai) >= 15
    visited = operations(service.client) + of_openai
    unknown = {name for operation in visited for name in operation.owned} - set(service.ids)
    assert unknown == set(), "Make an object of the project `alpha` for these path parameters."
    # The owner's changes come last, since they take objects away.
    visits = sorted(
        ((role, operation) for operation in visited for role in service.tokens),
        key=lambda visit: administers_objects(visit[0]) and visit[1].method != "GET",
    )
    faults = [fault for role, operation in visits if (fault := fault_of(service, operation, role)) is not None]
    assert faults == []
    assert len(service.tokens) == 13
    assert len(visits) > 1200


@pytest.mark.system
def test_head_is_answered_as_get_without_a_body(service: Service) -> None:
    role = Role(f"{OWNER} admin", OWNER, "admin")
    differing = {"date", "x-request-id", "ratelimit", "ratelimit-policy"}
    faults, served = [], 0
    for operation in (each for each in operations(service.client) if each.method == "GET"):
        got, headed = (service.visit(replace(operation, method=method), role) for method in ("GET", "HEAD"))
        headers = [{name: each.headers[name] for name in set(each.headers) - differing} for each in (got, headed)]
        if (got.status_code, headers[0], b"") != (headed.status_code, headers[1], headed.content):
            faults.append(f"{operation.path}: {got.status_code} {headers[0]}; HEAD: {headed.status_code} {headers[1]}")
        served += got.status_code == 200
    assert faults == []
    assert served > 30
