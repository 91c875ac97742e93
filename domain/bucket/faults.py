"""Errors of the client of a bucket, as those of an artifact store."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from domain.artifacts import ArtifactNotFound, ArtifactStoreRefused, ArtifactStoreUnavailable

_FULL_CODES: Final = re.compile("quota|storagefull|insufficientstorage|nospace", re.IGNORECASE)


@contextmanager
def translating_store_errors() -> Iterator[None]:
    """
    Raises:
        ArtifactNotFound: there is no such object.
        ArtifactStoreUnavailable: the store does not answer, or asks to come back later.
        ArtifactStoreRefused: it is full, forbidden, or there is no such bucket.
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        if error.filename is not None:
            # A file of this machine.
            raise
        raise (explain_refusal(str(error)) or ArtifactNotFound("There is no such file.")) from None
    except BaseError as error:
        raise (explain_refusal(str(error)) or ArtifactStoreUnavailable()) from None


def explain_refusal(text: str) -> ArtifactStoreRefused | None:
    """What the store's error says that no other try would change; null for any other error."""
    found = re.search(r"status code: (\d{3})", text)
    code = re.search(r"<Code>([A-Za-z0-9]{1,64})</Code>", text)
    status, name = int(found[1]) if found else 0, code[1] if code else ""
    said = name or str(status)
    if status == 507 or (400 <= status < 600 and _FULL_CODES.search(name)):
        return ArtifactStoreRefused(
            errno.ENOSPC, f"The bucket of POCL_ARTIFACT_STORE is full ({said}): free space, or raise its quota."
        )
    if name == "NoSuchBucket":
        return ArtifactStoreRefused(
            errno.ENODEV,
            "The bucket of POCL_ARTIFACT_STORE does not exist at this endpoint: create it, or correct the name or"
            " AWS_ENDPOINT_URL.",
        )
    if status in (401, 403):
        return ArtifactStoreRefused(
            errno.EACCES,
            f"The bucket of POCL_ARTIFACT_STORE refuses the credentials ({said}): give them the rights to list, read,"
            " write and delete below its prefix.",
        )
    if 300 <= status < 500 and status not in (404, 408, 409, 429):
        return ArtifactStoreRefused(
            errno.EPROTO,
            f"The store of POCL_ARTIFACT_STORE refuses the request ({said}): check AWS_ENDPOINT_URL and AWS_REGION.",
        )
    return None
