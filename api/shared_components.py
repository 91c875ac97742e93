"""The OpenAPI document's header fields, and the responses that many operations have in common.

What several operations share is a component of the document, to which they refer: half of it would be repetitions
otherwise, and a generated client would have a type for each.
"""

import re
from collections import Counter
from typing import Any, Final

import orjson

Schema = dict[str, Any]

_TEXT: Final = {"type": "string"}
_HEADERS: Final[dict[str, Schema]] = {
    "X-Request-Id": {
        "description": "The id under which the logs of the service have the request: the client's own, where it sent "
        "one of at most 64 letters, digits, `.`, `_` and `-`.",
        "schema": _TEXT,
    },
    "ETag": {
        "description": "The entity tag of this state. Send it back as `If-None-Match` to get 304 until it changes.",
        "schema": _TEXT,
    },
    "Retry-After": {
        "description": "How long to wait before the request is sent again, in seconds; absent where that would not "
        "help.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {
        "description": "The scheme `Bearer`, and with `insufficient_scope` the scope that the key lacks.",
        "schema": _TEXT,
    },
    "Content-Range": {
        "description": "The range of bytes that this is, and the size of the whole; with 416 the size alone.",
        "schema": _TEXT,
    },
    "Accept-Ranges": {"description": "`bytes`: a part of the file may be asked for by `Range`.", "schema": _TEXT},
    "Content-Disposition": {"description": "The name of the file.", "schema": _TEXT},
    "Repr-Digest": {
        "description": "The SHA-256 of the whole file in base64, as RFC 9530 has it; absent of an archive, whose "
        "digest is its `ETag`.",
        "schema": _TEXT,
    },
    "X-File-Size": {"description": "The size of the file in bytes.", "schema": {"type": "integer", "minimum": 0}},
    "Location": {"description": "Where the file is for a while: a secret, since it needs no key.", "schema": _TEXT},
}
_PARAMETERS: Final[dict[str, Schema]] = {
    "If-None-Match": {
        "description": "The `ETag` of what the client has: the response is 304 while it is still the same.",
        "schema": _TEXT,
    },
    "Range": {
        "description": "The range of bytes to get, for instance `bytes=1000-` to go on after the first thousand. Of "
        "several ranges at once none is taken, and the whole file comes.",
        "schema": _TEXT,
    },
    "If-Range": {
        "description": "The `ETag` of the file of which the client has a part: where it is another one by now, the "
        "whole comes and not the range.",
        "schema": _TEXT,
    },
}
_OF_FILES: Final = ("ETag", "Accept-Ranges", "Content-Disposition", "Repr-Digest")
_RETRIED: Final = frozenset({"429", "503", "507"})
_MAX_NAMED_CODES: Final = 3
_CODE: Final = re.compile("^`([a-z_]+)`: ", re.MULTILINE)


def share_components(document: Schema) -> None:
    """Describe the header fields, and put references in the place of what several operations repeat.

    Args:
        document: the OpenAPI document, which is changed in place.
    """
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    for operation in operations:
        _describe_headers(operation)
    components = document["components"]
    components["headers"] = {name: _HEADERS[name] for name in sorted(_HEADERS)}
    components["responses"] = dict(sorted(_share_problems(operations).items()))


def _describe_headers(operation: Schema) -> None:
    """Name the header fields that an operation reads and answers with, as the statuses of its responses tell them."""
    responses: dict[str, Schema] = operation["responses"]
    is_file, is_conditional = "206" in responses, "304" in responses
    for status, response in responses.items():
        names = ["X-Request-Id"]
        if is_file and status in ("200", "206"):
            names += _OF_FILES
        if is_file and status == "307":
            names += ["Location", "ETag", "Repr-Digest", "X-File-Size", "Content-Disposition"]
        if status in ("206", "416"):
            names.append("Content-Range")
        if is_conditional and status in ("200", "304"):
            names.append("ETag")
        if status in _RETRIED:
            names.append("Retry-After")
        if status == "401" or "`insufficient_scope`" in response["description"]:
            names.append("WWW-Authenticate")
        described = {name: {"$ref": f"#/components/headers/{name}"} for name in dict.fromkeys(names)}
        response["headers"] = {**described, **response.get("headers", {})}
    read = ["If-None-Match"] * is_conditional + ["Range", "If-Range"] * is_file
    if read:
        fields = [{"name": name, "in": "header", "required": False, **_PARAMETERS[name]} for name in read]
        operation["parameters"] = [*operation.get("parameters", []), *fields]


def _share_problems(operations: list[Schema]) -> dict[str, Schema]:
    """Move the problem responses that several operations have to the components that are returned."""
    problems = [
        (operation["responses"], status)
        for operation in operations
        for status in operation["responses"]
        if status >= "400"
    ]
    uses = Counter(_key(responses[status]) for responses, status in problems)
    shared: dict[str, Schema] = {}
    for responses, status in problems:
        response = responses[status]
        if uses[_key(response)] == 1:
            continue
        name = _name_after_codes(_CODE.findall(response["description"]))
        assert shared.setdefault(name, response) == response, f"two responses would be named {name}"
        responses[status] = {"$ref": f"#/components/responses/{name}"}
    return shared


def _key(response: Schema) -> bytes:
    return orjson.dumps(response, option=orjson.OPT_SORT_KEYS)


def _name_after_codes(codes: list[str]) -> str:
    names = ["".join(part.capitalize() for part in code.split("_")) for code in codes]
    return "Or".join(names if len(names) <= _MAX_NAMED_CODES else [*names[: _MAX_NAMED_CODES - 1], "Others"])
