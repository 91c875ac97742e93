"""A small client of the service: upload, submit, follow, download and verify."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

TERMINAL_STATES = {"succeeded", "failed", "cancelled"}
_CHUNK_BYTES = 1 << 20


class ServiceError(Exception):
    """The service answered with problem details; the message says what to do."""


class Client:
    """Talks to one service.

    Args:
        url: the address of the service, without `/v1`.
        key: the bearer key, where the service has one.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=60)

    def upload(self, path: Path) -> str:
        """Upload a JSONL file and return the id of the data set."""
        with path.open("rb") as file:
            response = self._http.post(
                "/v1/datasets",
                params={"name": path.name},
                content=iter(lambda: file.read(_CHUNK_BYTES), b""),
                headers={"Content-Type": "application/jsonl"},
            )
        return str(_parse(response)["id"])

    def submit(self, spec: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Submit a job with options such as `name` or `priority`, and return it."""
        return _parse(self._http.post("/v1/jobs", json={"spec": spec, **options}))

    def get(self, path: str, **parameters: Any) -> dict[str, Any]:
        """Get any resource as JSON."""
        return _parse(self._http.get(path, params=parameters))

    def list_items(self, path: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """Iterate over all items of a list, page by page."""
        cursor: dict[str, Any] = {}
        while True:
            page = self.get(path, limit=100, **parameters, **cursor)
            yield from page["data"]
            if not page["has_more"]:
                return
            cursor = {"after": page["last_id"]}

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job and return it."""
        return _parse(self._http.post(f"/v1/jobs/{job_id}/cancel"))

    def download_file(self, path: str, target: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
        """Download one file and return its SHA-256 digest, hexadecimal.

        Args:
            on_bytes: called with the size of each chunk that has arrived.
        """
        digest = hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._http.stream("GET", path) as response, target.open("wb") as out:
            if response.is_error:
                response.read()
                _parse(response)
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                out.write(chunk)
                digest.update(chunk)
                on_bytes(len(chunk))
        return digest.hexdigest()

    def download_checkpoint(
        self, checkpoint_id: str, directory: Path, on_bytes: Callable[[int], None] = lambda _: None
    ) -> Path:
        """Download a checkpoint and verify each file against the manifest; return its directory.

        Raises:
            ServiceError: a file arrived damaged.
        """
        manifest = self.get(f"/v1/checkpoints/{checkpoint_id}/manifest")
        for file in manifest["files"]:
            digest = self.download_file(
                f"/v1/checkpoints/{checkpoint_id}/files/{quote(file['path'])}", directory / file["path"], on_bytes
            )
            if digest != file["sha256"]:
                raise ServiceError(f"{file['path']} arrived damaged")
        return directory


def _parse(response: httpx2.Response) -> dict[str, Any]:
    """The JSON of a response, or the error that it stands for."""
    if response.is_success:
        body: dict[str, Any] = response.json()
        return body
    try:
        problem = response.json()
        detail = problem.get("detail") or problem.get("title")
        fields = [f"{each['pointer']}: {each['detail']}" for each in problem.get("errors", [])]
    except json.JSONDecodeError:
        raise ServiceError(f"HTTP {response.status_code}") from None
    raise ServiceError("\n  ".join([f"{problem.get('code')}: {detail}", *fields]))
