"""The artifact store that the settings name: a directory or a bucket."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import structlog

from domain.artifacts import ArtifactStore, ArtifactStoreUnavailable
from domain.bucket.store import BucketArtifactStore
from domain.settings import Settings

_log = structlog.get_logger(__name__)


class ArtifactStoreUnusable(Exception):
    """Nothing can be stored, and an operator must look at it: one sentence says why."""


def open_artifact_store(settings: Settings) -> ArtifactStore:
    """The artifact store of the settings."""
    if settings.artifact_store is None:
        return ArtifactStore(settings.artifact_root)
    return BucketArtifactStore.from_settings(settings)


def check_artifact_store(settings: Settings) -> None:
    """Try to store something in the bucket, if it is one. A store that is away is logged: it is waited for later.

    A process of its own tries it, since one that has used a bucket must not fork afterwards.

    Raises:
        ArtifactStoreUnusable: the bucket is full, forbidden or not there.
    """
    if settings.artifact_store is None:
        return
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        try:
            fault = processes.submit(_find_fault, settings).result()
        except ArtifactStoreUnavailable as error:
            _log.warning("artifact_store_unavailable", error=str(error))
            return
    if fault is not None:
        raise ArtifactStoreUnusable(fault)


def _find_fault(settings: Settings) -> str | None:
    return open_artifact_store(settings).find_fault()
