"""Chat templates as they leave with a student: on any server they ask it as it was taught."""

import json
from collections.abc import Mapping
from typing import Final

from pydantic import JsonValue

from pocl.prompting.alpaca import PREAMBLE
from pocl.prompting.text_tokenizer import TextTokenizer

_ALPACA: Final = """\
{{- %(begin)s -}}
{%%- if messages[0]['role'] == 'system' and messages[0]['content'] -%%}
{{- messages[0]['content'] -}}
{%%- else -%%}
{{- %(preamble)s -}}
{%%- endif -%%}
{%%- for message in messages -%%}
{%%- if message['role'] == 'user' -%%}
{{- '\\n\\n### Instruction:\\n' + message['content'] -}}
{%%- elif message['role'] == 'assistant' -%%}
{{- '\\n\\n### Response:\\n' + message['content'] + %(end)s -}}
{%%- elif not loop.first -%%}
{{- '\\n\\n' + message['content'] -}}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}
{{- '\\n\\n### Response:\\n' -}}
{%%- endif -%%}
"""


def alpaca_chat_template(tokenizer: TextTokenizer) -> str:
    """The Alpaca prompt in Jinja, begun and ended by the tokens that the tokenizer begins and ends texts with.

    The input of an instruction has no place in a conversation; a client writes it below the instruction.
    """
    begin = "".join(tokenizer.backend.id_to_token(id_) or "" for id_ in tokenizer.begin_ids)
    end = "" if tokenizer.eos_id is None else tokenizer.backend.id_to_token(tokenizer.eos_id) or ""
    return _ALPACA % {"begin": _literal(begin), "preamble": _literal(PREAMBLE), "end": _literal(end)}


def with_defaults(template: str, variables: Mapping[str, JsonValue]) -> str:
    """The template with values for those variables that a caller leaves out."""
    defaults = (
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif -%}}"
        for name, value in sorted(variables.items())
    )
    return "".join(defaults) + template


def _literal(value: JsonValue) -> str:
    """A value of JSON as a literal of Jinja."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case str():
            escaped = json.dumps(value, ensure_ascii=False)[1:-1].replace("'", "\\'").replace('\\"', '"')
            return f"'{escaped}'"
        case list():
            return "[" + ", ".join(map(_literal, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{_literal(key)}: {_literal(each)}" for key, each in value.items()) + "}"
        case _:
            return json.dumps(value)
