"""Parts of a page that change while it is shown: only those that are others than the shown ones are sent again."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Query, Request, Response

from api.dashboard.rendering import base_of, is_fragment_request, page_headers, render, render_text
from api.prefix import path_below_prefix

ShownDigests = Annotated[str, Query(pattern=r"^[0-9a-f.]{0,200}$")]
"""Names the content of the parts that a page shows already."""


@dataclass(frozen=True)
class LivePart:
    """A part of a page as HTML."""

    name: str
    """The id of its element, and the name of its template."""
    content: str
    digest: str
    """Names its content."""


def render_parts(request: Request, names: Sequence[str], context: Mapping[str, Any]) -> list[LivePart]:
    """The parts of a page, each from the template `NAME.html`."""
    parts = []
    for name in names:
        content = render_text(request.scope, f"{name.replace('-', '_')}.html", **context)
        digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        parts.append(LivePart(name, content, digest))
    return parts


def respond_with_parts(
    request: Request,
    template: str,
    names: Sequence[str],
    context: Mapping[str, Any],
    *,
    seen: str,
    is_over: bool = False,
    poll_path: str | None = None,
) -> Response:
    """A page with its parts; to its script, those parts alone that it has not seen.

    Args:
        seen: the digests of the parts that are shown, in their order, with points between them.
        is_over: whether nothing changes any more, so that the page need not ask again.
        poll_path: what the script asks; null: the page itself.
    """
    parts = render_parts(request, names, context)
    digests = ".".join(part.digest for part in parts)
    if is_fragment_request(request) and digests == seen and not is_over:
        return unchanged()
    path = poll_path or f"{base_of(request.scope)}{path_below_prefix(request.scope)}"
    query = [(name, value) for name, value in request.query_params.multi_items() if name != "seen" and value]
    poll = {"path": path, "query": [*query, ("seen", digests)], "is_over": is_over}
    if is_fragment_request(request):
        shown = dict(zip(names, seen.split("."), strict=False))
        changed = [part for part in parts if part.digest != shown.get(part.name)]
        return render(request, "live.html", parts=changed, poll=poll)
    return render(request, template, parts={part.name: part.content for part in parts}, poll=poll, **context)


def unchanged() -> Response:
    """The response to a script whose page shows everything already."""
    return Response(status_code=204, headers=dict(page_headers()))
