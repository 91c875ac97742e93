"""Renders many conversations by a chat template; run in a child process, since templates come from whoever posts a job.

See :mod:`pocl.limited_process`. A request holds `source`, `variables`, `today` (an ISO date) and `conversations`, each
with `messages`, `tools`, `add_generation_prompt` and `marks`. The answer holds for each conversation its `text`, or the
`error` that the template raised. A request without conversations asks what the template is.
"""

from datetime import date
from typing import Any, Final

from pocl.prompting.jinja_templates import has_generation_blocks, render, variables_read

MAX_ERROR_CHARACTERS: Final = 300


def answer(request: dict[str, Any]) -> dict[str, Any]:  # Any: JSON.
    """Render the conversations of a request."""
    if "conversations" not in request:
        return _described(request["source"])
    today = date.fromisoformat(request["today"])
    return {"rendered": [_rendered(request, conversation, today) for conversation in request["conversations"]]}


def _described(source: str) -> dict[str, Any]:  # Any: JSON.
    try:
        names = sorted(variables_read(source))
        return {"has_generation_blocks": has_generation_blocks(source), "variables_read": names}
    except Exception:  # noqa: BLE001 - A template that cannot be read says so where it is rendered.
        return {"has_generation_blocks": False, "variables_read": []}


def _rendered(request: dict[str, Any], conversation: dict[str, Any], today: date) -> dict[str, str]:  # Any: JSON.
    try:
        text = render(
            request["source"],
            conversation["messages"],
            tools=conversation["tools"],
            variables=request["variables"],
            today=today,
            add_generation_prompt=conversation["add_generation_prompt"],
            marks=conversation["marks"],
        )
        text.encode("utf-8")
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - A template may raise anything, and that is its fault.
        return {"error": _sentence(error)}
    return {"text": text}


def _sentence(error: Exception) -> str:
    """What the template raised, with the class for errors that are not Jinja's own: `'int' object is not iterable` says
    little without it.
    """
    text = " ".join(str(error).split())
    name = type(error).__name__
    says_enough = name in ("TemplateError", "UndefinedError", "TemplateSyntaxError") and text
    sentence = text if says_enough else f"{name}: {text}"
    return sentence[:MAX_ERROR_CHARACTERS]
