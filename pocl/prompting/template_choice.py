"""Which template the samples of a job become text by, and the encoder for it."""

from datetime import date
from typing import Final

from pocl.errors import FieldError, SpecInvalid
from pocl.inspect.chat_templates import DEFAULT_TEMPLATE, TOOL_TEMPLATE
from pocl.prompting.chat_rendering import ChatRendering
from pocl.prompting.encoding import SampleEncoder
from pocl.prompting.profile import probe_template
from pocl.prompting.template_renderer import Call, TemplateRenderer
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.spec import Data

_NAMED_AT_MOST: Final = 20


def make_encoder(data: Data, tokenizer: TextTokenizer, call: Call) -> SampleEncoder:
    """The encoder of the samples of a specification: by a chat template, or by the Alpaca prompt.

    The dry run, the preview and the engine all use it, and nothing else: what it accepts, the engine trains.

    Args:
        call: renders templates: of a process of :func:`~pocl.prompting.template_renderer.template_process`.

    Raises:
        SpecInvalid: the specification names a template that is not there or cannot be used.
        ModelUnsupported: nothing can end an answer.
    """
    sources = chat_template_sources(data, tokenizer)
    chats = {key: _chat_rendering(key, source, data, tokenizer, call) for key, source in sources.items()}
    return SampleEncoder(
        tokenizer,
        chats.get(DEFAULT_TEMPLATE),
        data.system,
        data.max_length,
        data.max_prompt_length,
        tool_chat=chats.get(TOOL_TEMPLATE),
    )


def chat_template_sources(data: Data, tokenizer: TextTokenizer) -> dict[str, str]:
    """The sources of the chat templates that the samples are rendered by: `default`, and `tool_use` where samples with
    tools have one of their own; none for the Alpaca prompt. The same are to be saved with the student.

    Raises:
        SpecInvalid: the specification names a template that is not there, or has to name one.
    """
    if data.template == "alpaca":
        return {}
    if data.chat_template is not None:
        return {DEFAULT_TEMPLATE: data.chat_template}
    templates = tokenizer.templates
    if not templates:
        _refuse_settings_without_template(data)
        return {}
    names = ", ".join(sorted(templates)[:_NAMED_AT_MOST])
    if data.template_name is not None:
        if data.template_name not in templates:
            raise _refusal("/data/template_name", "template_unknown", f"the tokenizer's chat templates are {names}")
        return {DEFAULT_TEMPLATE: templates[data.template_name]}
    if DEFAULT_TEMPLATE not in templates:
        detail = f"the tokenizer has several chat templates and none is the default: name one of {names}"
        raise _refusal("/data/template_name", "template_name_missing", detail)
    return {key: templates[key] for key in (DEFAULT_TEMPLATE, TOOL_TEMPLATE) if key in templates}


def _refuse_settings_without_template(data: Data) -> None:
    """
    Raises:
        SpecInvalid: something is asked of a chat template, and there is none.
    """
    if data.template == "chat":
        detail = "the tokenizer has no chat template; give one as chat_template, or use alpaca or auto"
        raise _refusal("/data/template", "no_chat_template", detail)
    for name in ("template_name", "chat_template_kwargs"):
        if getattr(data, name):
            raise _refusal(f"/data/{name}", "no_chat_template", "the tokenizer has no chat template")


def _chat_rendering(key: str, source: str, data: Data, tokenizer: TextTokenizer, call: Call) -> ChatRendering:
    name = "of data.chat_template" if data.chat_template is not None else f"{data.template_name or key!r}"
    variables = {**tokenizer.special_tokens, **data.chat_template_kwargs}
    # The day is fixed when a job is submitted or first started; what only probes a template may leave it open.
    renderer = TemplateRenderer(name, source, variables, data.date or date(2000, 1, 1), call)
    profile = probe_template(renderer, tokenizer)
    read = renderer.variables_read()
    for kwarg in data.chat_template_kwargs:
        if kwarg not in read:
            detail = f"the chat template {name} reads no variable {kwarg!r}; it reads {', '.join(sorted(read)[:20])}"
            raise _refusal(f"/data/chat_template_kwargs/{kwarg}", "template_variable_unknown", detail)
    return ChatRendering(renderer, profile, tokenizer)


def _refusal(pointer: str, code: str, detail: str) -> SpecInvalid:
    return SpecInvalid([FieldError(pointer, code, detail)])
