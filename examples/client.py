"""A small client of the service: upload, submit, follow, download and verify."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

ENDED = {"succeeded", "failed", "cancelled"}
_CHUNK_BYTES = 1 << 20


class ServiceError(Exception):
    """The service answered with a problem; its message says what to do."""


class Client:
    """Talks to one service. `key` is the bearer key, where the service has one."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=60)

    def upload(self, path: Path) -> str:
        """Upload a JSONL file and return the id of the data set."""
        with path.open("rb") as rows:
            answer = self._http.post(
                "/v1/datasets",
                params={"name": path.name},
                content=iter(lambda: rows.read(_CHUNK_BYTES), b""),
                headers={"Content-Type": "application/jsonl"},
            )
        return str(_body(answer)["id"])

    def submit(self, spec: dict[str, Any], **fields: Any) -> dict[str, Any]:
        """Post a job."""
        return _body(self._http.post("/v1/jobs", json={"spec": spec, **fields}))

    def get(self, path: str, **parameters: Any) -> dict[str, Any]:
        """Any resource as JSON."""
        return _body(self._http.get(path, params=parameters))

    def pages(self, path: str, **parameters: Any) -> Iterator[dict[str, Any]]:
        """All entries of a list."""
        after: dict[str, Any] = {}
        while True:
            page = self.get(path, limit=100, **parameters, **after)
            yield from page["data"]
            if not page["has_more"]:
                return
            after = {"after": page["last_id"]}

    def cancel(self, job_id: str) -> dict[str, Any]:
        return _body(self._http.post(f"/v1/jobs/{job_id}/cancel"))

    def file(self, path: str, target: Path, on_bytes: Callable[[int], None] = lambda _: None) -> str:
        """Download one file and return its SHA-256 digest."""
        digest = hashlib.sha256()
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._http.stream("GET", path) as answer, target.open("wb") as out:
            if answer.is_error:
                answer.read()
                _body(answer)
            for piece in answer.iter_bytes(_CHUNK_BYTES):
                out.write(piece)
                digest.update(piece)
                on_bytes(len(piece))
        return digest.hexdigest()

    def checkpoint(self, checkpoint_id: str, directory: Path, on_bytes: Callable[[int], None] = lambda _: None) -> Path:
        """Download a checkpoint and check each file against the manifest."""
        manifest = self.get(f"/v1/checkpoints/{checkpoint_id}/manifest")
        for file in manifest["files"]:
            digest = self.file(
                f"/v1/checkpoints/{checkpoint_id}/files/{quote(file['path'])}", directory / file["path"], on_bytes
            )
            if digest != file["sha256"]:
                raise ServiceError(f"{file['path']} arrived damaged")
        return directory


def _body(answer: httpx2.Response) -> dict[str, Any]:
    if answer.is_success:
        body: dict[str, Any] = answer.json()
        return body
    try:
        problem = answer.json()
        detail = problem.get("detail") or problem.get("title")
        fields = [f"{each['pointer']}: {each['detail']}" for each in problem.get("errors", [])]
    except json.JSONDecodeError:
        raise ServiceError(f"HTTP {answer.status_code}") from None
    raise ServiceError("\n  ".join([f"{problem.get('code')}: {detail}", *fields]))
