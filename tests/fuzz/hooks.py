"""Hooks that give the fuzzer valid samples, and the ids of data sets, models, keys, projects and webhooks that exist.

It would guess none of them, so that only refusals would be fuzzed. Which operations were carried out is written to a
file, so that the tests see that none was refused alone.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, HookContext, Response
from schemathesis.core.failures import Failure
from schemathesis.generation.meta import TestPhase
from schemathesis.openapi.checks import EnsureResourceAvailability

from tests.support.requests import TINY_MODEL

AnyCase = Case[Any]
_carried_out: set[str] = set()
_MAX_WAIT_SECONDS = 0.05
_SEEDS = {
    "job_id": "FUZZ_JOB",
    "dataset_id": "FUZZ_DATASET",
    "checkpoint_id": "FUZZ_CHECKPOINT",
    "key_id": "FUZZ_KEY",
    "project_id": "FUZZ_PROJECT",
    "webhook_id": "FUZZ_WEBHOOK",
    "delivery_id": "FUZZ_DELIVERY",
}
"""The variables with the ids of the objects that path parameters name."""
_SPENT = {
    "follow_job_events": {"job_id": "FUZZ_ENDED"},
    "delete_dataset": {"dataset_id": "FUZZ_UNUSED_DATASET"},
    "delete_checkpoint": {"checkpoint_id": "FUZZ_UNUSED_CHECKPOINT"},
    "delete_key": {"key_id": "FUZZ_UNUSED_KEY"},
    "revoke_key": {"key_id": "FUZZ_UNUSED_KEY"},
    "delete_project": {"project_id": "FUZZ_UNUSED_PROJECT"},
    "delete_webhook": {"webhook_id": "FUZZ_UNUSED_WEBHOOK"},
    # Nothing is delivered to one that it disables.
    "update_webhook": {"webhook_id": "FUZZ_CHANGED_WEBHOOK"},
}
"""What operations take in their place that leave nothing for others to work on."""
_TEXT = st.text(max_size=20)
_SAMPLES = st.fixed_dictionaries({"instruction": _TEXT, "output": _TEXT | st.lists(_TEXT)}, optional={"input": _TEXT})
_LINES = (
    st.just(b'{"instruction": "a", "output": "b"}')
    | _SAMPLES.map(lambda sample: json.dumps(sample).encode())
    | st.binary(max_size=60)
)

schemathesis.openapi.media_type(
    "application/jsonl",
    st.lists(_LINES, max_size=5).map(b"\n".join),
    aliases=["application/x-ndjson", "application/x-jsonlines"],
)


@schemathesis.hook
def map_case(context: HookContext, case: AnyCase) -> AnyCase:
    """Put ids that exist into cases that fit the schema. In a chain of requests the earlier responses provide them."""
    operation = context.operation.definition.raw.get("operationId") if context.operation is not None else None
    _avoid_waiting(case, operation)
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return case
    if operation in ("create_job", "validate_job") and isinstance(case.body, dict):
        case.body = {**case.body, "spec": _existing(case.body.get("spec"))}
    if operation in ("create_webhook", "update_webhook", "create_key") and isinstance(case.body, dict):
        case.body = _accepted(case.body)
    if operation == "preview_dataset" and isinstance(case.query, dict):
        models = ("random", os.environ["FUZZ_CHECKPOINT"], case.query["model"])
        case.query = {**case.query, "model": models[len(str(case.query["model"])) % 3]}
    if case.meta.phase.name is not TestPhase.STATEFUL:
        existing = {**_SEEDS, **_SPENT.get(operation or "", {})}
        existing_ids = {name: os.environ[existing[name]] for name in case.path_parameters if name in existing}
        if "path" in case.path_parameters:
            # Half of the cases; the other half asks for files that do not exist.
            existing_ids |= {"path": "config.json"} if len(str(case.path_parameters["path"])) % 2 else {}
        case.path_parameters = {**case.path_parameters, **existing_ids}
    return case


def _avoid_waiting(case: AnyCase, operation: str | None) -> None:
    """Keep responses from taking long: the stream of a live job has no end, and a poll may wait."""
    if operation == "follow_job_events" and str(case.path_parameters.get("job_id", "")).startswith("job_"):
        case.path_parameters = {**case.path_parameters, "job_id": os.environ["FUZZ_ENDED"]}
    if operation == "get_job_logs" and isinstance(case.query, dict):
        case.query = {name: value for name, value in case.query.items() if name != "follow"}
    if operation == "get_job" and isinstance(case.query, dict):
        # The number may be given as text.
        with suppress(KeyError, TypeError, ValueError):
            if float(case.query["wait"]) > _MAX_WAIT_SECONDS:
                case.query = {**case.query, "wait": _MAX_WAIT_SECONDS}


@schemathesis.hook
def filter_failure(
    context: HookContext,  # noqa: ARG001 - the parameters of a hook are given by name
    failure: Failure,
    case: AnyCase,  # noqa: ARG001 - likewise
    response: Response,
) -> bool:
    """Ignore that a new job has no artifacts yet, or never will, although it is available."""
    without = {"artifact_not_ready", "artifact_not_planned"}
    not_yet = response.status_code == 404 and response.json().get("code") in without
    return not (not_yet and isinstance(failure, EnsureResourceAvailability))


@schemathesis.hook
def after_call(
    context: HookContext,  # noqa: ARG001 - likewise
    case: AnyCase,
    response: Response,
) -> None:
    """Note the name of an operation that was carried out."""
    name = case.operation.definition.raw.get("operationId")
    if 200 <= response.status_code < 300 and name not in _carried_out:
        _carried_out.add(name)
        with Path(os.environ["FUZZ_CARRIED_OUT"]).open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")


def _accepted(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a webhook or key with what no schema says: a public address, a known project, a time to come."""
    known = {"url": "https://hooks.example.com/fuzz", "project": None, "expires_at": "2999-01-01T00:00:00Z"}
    return {name: known[name] if name in known and value is not None else value for name, value in body.items()}


def _existing(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    existing = {
        "data": {"train": {"dataset": os.environ["FUZZ_DATASET"]}},
        "teacher": TINY_MODEL,
        "student": TINY_MODEL,
    }
    return {**spec, **existing}
