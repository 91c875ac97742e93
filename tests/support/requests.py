"""Requests that tests send to the service, and checks of its responses."""

import asyncio
import json
import struct
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient, Response
from starlette.testclient import TestClient

LOOPBACK = "http://127.0.0.1:8000"
KEY = "a-key-of-all-tests"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}
"""The header that a request to a service with this key carries."""
JSONL = {"content-type": "application/jsonl"}
TINY_MODEL = {"random": {"layers": 2, "hidden_size": 16, "heads": 2}}
JOB_RESOURCES = (
    "",
    "/stages",
    "/events",
    "/metrics",
    "/attempts",
    "/checkpoints",
    "/logs",
    "/ranking",
    "/answers",
    "/report",
    "/result",
)
"""Paths of a job's resources, below that of the job."""


def jsonl(rows: int) -> bytes:
    """So many valid samples as the body of an upload."""
    lines = (json.dumps({"instruction": f"Count to {n}", "output": f"{n} it is"}) for n in range(rows))
    return "".join(f"{line}\n" for line in lines).encode()


def upload(client: TestClient, *, rows: int = 8, name: str = "rows") -> str:
    """Upload a data set of so many samples; its id."""
    response = client.post("/v1/datasets", params={"name": name}, content=jsonl(rows), headers=JSONL)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def specification(dataset: str, **fields: Any) -> dict[str, Any]:
    """A specification of a quick job with tiny models, with `fields` in place of its own."""
    return {
        "preset": "quick",
        "teacher": TINY_MODEL,
        "student": TINY_MODEL,
        "data": {"train": {"dataset": dataset}},
        **fields,
    }


def submit(client: TestClient, dataset: str, **fields: Any) -> dict[str, Any]:
    """Submit a job on a data set, with `fields` beside its specification; the job as JSON."""
    response = client.post("/v1/jobs", json={"spec": specification(dataset), **fields})
    assert response.status_code == 201, response.text
    job: dict[str, Any] = response.json()
    return job


def http_scope(method: str, path: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """The ASGI scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [
            (name.encode(), value.encode()) for name, value in {"host": "127.0.0.1", **AUTHORIZED, **headers}.items()
        ],
        "state": {},
    }


async def send_concurrently(app: FastAPI, requests: Sequence[tuple[str, str, dict[str, Any]]]) -> list[Response]:
    """Send all requests at the same time; the responses in the order of the requests."""
    transport = ASGITransport(app=app, raise_app_exceptions=False)
    async with AsyncClient(transport=transport, base_url=LOOPBACK, headers=AUTHORIZED, timeout=120) as client:
        pending = (client.request(method, path, **fields) for method, path, fields in requests)
        return await asyncio.gather(*pending)


def start_get(
    app: FastAPI, path: str, headers: Mapping[str, str] | None = None, client: str = "127.0.0.1"
) -> "asyncio.Task[Response]":
    """Start a GET request on the running event loop, from the address `client`."""

    async def request() -> Response:
        transport = ASGITransport(app=app, raise_app_exceptions=False, client=(client, 123))
        async with AsyncClient(transport=transport, base_url=LOOPBACK, headers=AUTHORIZED, timeout=60) as sender:
            return await sender.get(path, headers=headers)

    return asyncio.create_task(request())


def expect_problem(response: Response, status: int, code: str) -> dict[str, Any]:
    """Check that a response is a problem of this status and code; its problem details."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance", "code", "retryable", "request_id", "errors"} <= set(
        problem
    )
    assert problem["status"] == status
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["code"] == code, problem
    return problem


def pointers(problem: Mapping[str, Any]) -> list[str]:
    """The pointers to the wrong fields."""
    return [error["pointer"] for error in problem["errors"]]


def write_model(directory: Path, *, tokens: Mapping[str, int], layers: int = 1, hidden: int = 4) -> Path:
    """A model directory as `save_pretrained` lays it out, with weights of zero."""
    directory.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokens),
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": dict(tokens)}}))
    within_layer: dict[str, list[int]] = {
        **{f"self_attn.{name}_proj.weight": [hidden, hidden] for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": [hidden, hidden] for name in ("gate", "up", "down")},
        **{f"{name}_layernorm.weight": [hidden] for name in ("input", "post_attention")},
    }
    shapes = {"model.embed_tokens.weight": [len(tokens), hidden], "model.norm.weight": [hidden]}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in within_layer.items()}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    described = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(described)) + described + bytes(at))
    return directory
