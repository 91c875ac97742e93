"""The reference of the HTTP API and of its error codes, as Markdown, from the OpenAPI document."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pocl.errors import PoclError

Json = Mapping[str, Any]

_METHODS: Final = ("get", "post", "put", "patch", "delete")
_SHOWN: Final = 3
"""Operations that the row of an error code names."""
_CODE: Final = re.compile(r"^`(?P<code>[a-z0-9_]+)`: (?P<sentence>.*?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


@dataclass
class ErrorCode:
    """An error code of the API."""

    statuses: set[str] = field(default_factory=set)
    sentence: str = ""
    """What is wrong, and what to do about it."""
    operations: set[str] = field(default_factory=set)


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Method in capitals, path and operation of every operation, in the document's order."""
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                yield method.upper(), path, item[method]


def resolve(document: Json, node: Any) -> Any:
    """The node that a `$ref` leads to, or the node itself."""
    while isinstance(node, Mapping) and "$ref" in node:
        target: Any = document
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part.replace("~1", "/").replace("~0", "~")]
        node = target
    return node


def error_codes(document: Json) -> dict[str, ErrorCode]:
    """The error codes of all operations, by code."""
    codes: dict[str, ErrorCode] = defaultdict(ErrorCode)
    for _, _, operation in operations(document):
        for status, response in operation["responses"].items():
            for match in _CODE.finditer(resolve(document, response)["description"]) if status >= "400" else ():
                code = codes[match["code"]]
                code.statuses.add(status)
                code.sentence = match["sentence"]
                code.operations.add(operation["operationId"])
    return dict(sorted(codes.items()))


def render_api(document: Json) -> str:
    """A page with every operation: what it does, what it takes, what it answers."""
    lines = [
        "# HTTP API",
        "",
        f"Version {document['info']['version']}. The service itself has this as an OpenAPI document at `/openapi.json`"
        " and as a page to try it on at `/docs`. Every request but the probes carries `Authorization: Bearer <key>`;"
        " errors are [problem details with a code](errors.md).",
    ]
    described = {tag["name"]: tag.get("description", "") for tag in document.get("tags", ())}
    by_tag: dict[str, list[tuple[str, str, Json]]] = {name: [] for name in described}
    for each in operations(document):
        by_tag.setdefault((each[2].get("tags") or ["other"])[0], []).append(each)
    for tag, members in by_tag.items():
        if members:
            lines += ["", f"## {tag.capitalize()}", "", described.get(tag, "")]
        for method, path, operation in members:
            lines += _operation(document, method, path, operation)
    return "\n".join(lines) + "\n"


def _operation(document: Json, method: str, path: str, operation: Json) -> Iterator[str]:
    yield from ("", f"### {operation['summary']} {{ #{operation['operationId']} }}", "", f"`{method} {path}`", "")
    scopes = sorted({scope for need in operation.get("security", ()) for scope in need.get("bearer", ())})
    description = operation.get("description", "").strip()
    needed = f"Scope: {', '.join(f'`{scope}`' for scope in scopes)}." if scopes else "No key is needed."
    yield f"{description}\n\n{needed}" if description else needed
    parameters = [resolve(document, parameter) for parameter in operation.get("parameters", ())]
    if parameters:
        yield from ("", "| parameter | in | |", "|---|---|---|")
        yield from (
            f"| `{each['name']}` | {each['in']} | {_cell(each.get('description', ''))} |" for each in parameters
        )
    body = resolve(document, operation.get("requestBody", {})).get("content", {})
    if body:
        yield from ("", f"Body: {'; '.join(_media(*each) for each in body.items())}.")
    yield ""
    for status, response in sorted(operation["responses"].items()):
        found = resolve(document, response)
        codes = [match["code"] for match in _CODE.finditer(found["description"])]
        if status >= "400" and codes:
            yield f"- {status}: " + ", ".join(f"[`{code}`](errors.md#{code})" for code in codes)
        else:
            content = "; ".join(_media(*each) for each in found.get("content", {}).items())
            yield f"- {status}: {_cell(found['description'])}{f' {content}' if content else ''}"


def _media(media_type: str, content: Json) -> str:
    names = sorted(set(_schema_names(content.get("schema", {}))))
    schema = " or ".join(f"`{name}`" for name in names)
    return f"`{media_type}`{f', {schema}' if schema else ''}"


def _schema_names(schema: Json) -> Iterator[str]:
    if "$ref" in schema:
        yield schema["$ref"].rpartition("/")[2]
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key, ()):
            yield from _schema_names(part)


def render_errors(document: Json) -> str:
    """A page with every code that a client may meet: of responses, and of runs that failed."""
    lines = [
        "# Error codes",
        "",
        "Programs decide by `code`, which is stable; the sentence is for people and says what to do. An error of a"
        " response is an `application/problem+json`; a job that failed has the same fields as its `error`, with"
        " `fault`: `user` (change the request), `capacity` (it does not fit; take less or wait) or"
        " `system` (the operator's).",
        "",
        "## Of responses",
        "",
        "| code | status | what it says | operations |",
        "|---|---|---|---|",
    ]
    for name, code in error_codes(document).items():
        names = sorted(code.operations)
        where = ", ".join(f"[{each}](api.md#{each})" for each in names[:_SHOWN])
        if len(names) > _SHOWN:
            where += f" and {len(names) - _SHOWN} more"
        statuses = ", ".join(sorted(code.statuses))
        lines.append(f"| <a id='{name}'></a>`{name}` | {statuses} | {_cell(code.sentence)} | {where} |")
    lines += [
        "",
        "## Of runs",
        "",
        "| code | fault | may pass | what happened | remedy |",
        "|---|---|---|---|---|",
    ]
    for error in sorted(engine_errors(), key=lambda each: each.code):
        sentence = (error.__doc__ or "").strip().splitlines()[0]
        cells = (error.fault, "yes" if error.retryable else "no", _cell(sentence), _cell(error.hint))
        lines.append(f"| `{error.code}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def engine_errors() -> set[type[PoclError]]:
    """The errors of the engine that have a code of their own."""
    found: set[type[PoclError]] = set()
    pending = list(PoclError.__subclasses__())
    while pending:
        error = pending.pop()
        pending += error.__subclasses__()
        if "code" in vars(error):
            found.add(error)
    return found


def _cell(text: str) -> str:
    """A text as the cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
