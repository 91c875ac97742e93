"""Chat templates rendered as transformers renders them: the same sandbox, filters, functions and extensions.

Two things differ. `strftime_now` gives the day that is asked for, not today. And the places of `{% generation %}`
blocks are marked in the text itself, which is right inside macros, captured blocks and calls too, where counting the
characters rendered so far is not.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes

MARK_START, MARK_STOP = "\U0010fffc", "\U0010fffd"
"""Stand around what a `{% generation %}` block renders, where marks are asked for. Private-use characters that no text
is known to hold; a conversation that does hold one is not rendered with marks."""
_MARKS_VARIABLE = "__pocl_marks"
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    today: date,
    add_generation_prompt: bool = False,
    marks: bool = False,
) -> str:
    """Render a conversation.

    Args:
        variables: The special tokens, and whatever else the template may read.
        today: What `strftime_now` formats.
        add_generation_prompt: Whether the text ends where the assistant begins to answer.
        marks: Whether :data:`MARK_START` and :data:`MARK_STOP` stand around what `{% generation %}` blocks render.

    Raises:
        Exception: whatever the template raises: errors of Jinja, and any other error of the expressions in it.
    """
    template = _compile(source)
    return template.render(
        messages=[_with_reasoning_aliases(message) for message in messages],
        tools=None if tools is None else list(tools),
        documents=None,
        add_generation_prompt=add_generation_prompt,
        **{
            **(variables or {}),
            "strftime_now": datetime.combine(today, time()).strftime,
            _MARKS_VARIABLE: marks,
        },
    )


def has_generation_blocks(source: str) -> bool:
    """Whether the template marks what the assistant says with `{% generation %}`.

    Raises:
        jinja2.TemplateSyntaxError: it is no template.
    """
    tree = _environment().parse(source)
    return any(
        isinstance(call.call.node, nodes.ExtensionAttribute) and call.call.node.name == "_generated"
        for call in tree.find_all(nodes.CallBlock)
    )


def variables_read(source: str) -> frozenset[str]:
    """The names that a template reads, its own among them.

    Raises:
        jinja2.TemplateSyntaxError: it is no template.
    """
    names = _environment().parse(source).find_all(nodes.Name)
    return frozenset(name.name for name in names if name.ctx == "load")


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@lru_cache(maxsize=1)
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _Namespace
    return environment


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` around what the assistant says."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads it so.

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_generated"), [], [], body)
        block.set_lineno(line)
        return block

    @jinja2.pass_context
    def _generated(self, context: jinja2.runtime.Context, caller: jinja2.runtime.Macro) -> str:
        text = str(caller())
        return f"{MARK_START}{text}{MARK_STOP}" if context.get(_MARKS_VARIABLE) else text


class _Dict:
    """`dict` as templates may call it; the class itself would let them reach into the interpreter."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # Any: whatever a template passes.
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # Any: whatever a template passes.
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that holds no attribute beginning with an underscore."""

    # Positional alone, so that `namespace(self=...)` works.
    def __init__(self, /, *args: Any, **kwargs: Any) -> None:  # Any: whatever a template passes.
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_underscore(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:  # Any: whatever a template passes.
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no attribute {name!r} with an underscore in front")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,  # Any: whatever a template passes.
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _with_reasoning_aliases(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the two names that templates read."""
    reasoning = next((message[name] for name in _REASONING_FIELDS if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
