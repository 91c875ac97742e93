"""Hooks that give the fuzzer valid samples, and the ids of data sets and models that exist.

It would guess none of them, so that only refusals would be fuzzed.
"""

import json
import os
from contextlib import suppress
from typing import Any

import schemathesis
from hypothesis import strategies as st
from schemathesis import Case, HookContext, Response
from schemathesis.core.failures import Failure
from schemathesis.generation.meta import TestPhase
from schemathesis.openapi.checks import EnsureResourceAvailability

from tests.support.requests import TINY_MODEL

AnyCase = Case[Any]
_MAX_WAIT_SECONDS = 0.05
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
    if operation == "preview_dataset" and isinstance(case.query, dict):
        models = ("random", os.environ["FUZZ_CHECKPOINT"], case.query["model"])
        case.query = {**case.query, "model": models[len(str(case.query["model"])) % 3]}
    if case.meta.phase.name is not TestPhase.STATEFUL:
        # With the data set that all others use nothing could be submitted or previewed any more.
        dataset = "FUZZ_UNUSED_DATASET" if operation == "delete_dataset" else "FUZZ_DATASET"
        job = "FUZZ_ENDED" if operation == "follow_job_events" else "FUZZ_JOB"
        existing = {"job_id": job, "dataset_id": dataset, "checkpoint_id": "FUZZ_CHECKPOINT"}
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


def _existing(spec: Any) -> Any:
    if not isinstance(spec, dict):
        return spec
    existing = {
        "data": {"train": {"dataset": os.environ["FUZZ_DATASET"]}},
        "teacher": TINY_MODEL,
        "student": TINY_MODEL,
    }
    return {**spec, **existing}
