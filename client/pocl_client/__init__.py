"""Typed client of the POCL distillation service: `Client`, and the same with `await` as `AsyncClient`.

from pocl_client import Client

with Client("http://127.0.0.1:8000", key="pocl_...") as client:
    train = client.datasets.upload("train.jsonl")
    job = client.jobs.create({"preset": "quick", "data": {"train": {"dataset": train.id}}, ...}, name="first")
    job = client.jobs.wait(job.id)
    best = client.checkpoints.newest(job.id, "best")
    client.checkpoints.download(best.id, "model")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pocl_client import models
    from pocl_client._async.client import AsyncClient
    from pocl_client._sync.client import Client
    from pocl_client.credentials import CredentialsInvalid
    from pocl_client.errors import (
        ApiError,
        AuthenticationFailed,
        ClientError,
        Conflict,
        DatasetRefused,
        DownloadDamaged,
        ExportFailed,
        FieldProblem,
        Forbidden,
        Gone,
        NotFound,
        RateLimited,
        RequestInvalid,
        ResponseInvalid,
        ServerFault,
        ServiceUnreachable,
        TargetExists,
        TooLarge,
        WaitTimedOut,
    )
    from pocl_client.retries import RetryPolicy

_HOMES = {
    "AsyncClient": "pocl_client._async.client",
    "Client": "pocl_client._sync.client",
    "CredentialsInvalid": "pocl_client.credentials",
    "RetryPolicy": "pocl_client.retries",
}

__all__ = [
    "ApiError",
    "AsyncClient",
    "AuthenticationFailed",
    "Client",
    "ClientError",
    "Conflict",
    "CredentialsInvalid",
    "DatasetRefused",
    "DownloadDamaged",
    "ExportFailed",
    "FieldProblem",
    "Forbidden",
    "Gone",
    "NotFound",
    "RateLimited",
    "RequestInvalid",
    "ResponseInvalid",
    "RetryPolicy",
    "ServerFault",
    "ServiceUnreachable",
    "TargetExists",
    "TooLarge",
    "WaitTimedOut",
    "models",
]


def __getattr__(name: str) -> Any:
    # What is named is imported when it is first used: the command line answers `--help` without an HTTP library.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "models":
        return importlib.import_module("pocl_client.models")
    return getattr(importlib.import_module(_HOMES.get(name, "pocl_client.errors")), name)
