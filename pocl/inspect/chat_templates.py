"""The chat templates that lie beside a model, by name."""

from pathlib import Path

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.reading import JsonObject, read_object

DEFAULT_TEMPLATE = "default"
"""The name of the template that is used unless another is named."""
TOOL_TEMPLATE = "tool_use"
"""The name of the template that transformers takes for conversations with tools."""
_LIMIT = 4 << 20
_MAX_TEMPLATES = 64


def read_chat_templates(directory: Path, tokenizer_config: JsonObject) -> dict[str, str]:
    """Read the chat templates of a model directory; the only one, or the one without a name, is "default".

    As in transformers, templates in files of their own (`chat_template.jinja` and `additional_chat_templates/`) take
    the place of those in `tokenizer_config.json`. Where a tokenizer has none, that of its processor is taken
    (`chat_template.json`). A blank template counts as none.

    Raises:
        ModelUnsupported: a template is not text, or there are too many or too large ones.
        OSError: a file cannot be read.
    """
    templates = _templates_in_files(directory) or _named(tokenizer_config.get("chat_template"))
    if not templates and (directory / "chat_template.json").is_file():
        templates = _named(read_object(directory / "chat_template.json", limit=_LIMIT).get("chat_template"))
    if len(templates) > _MAX_TEMPLATES:
        raise ModelUnsupported(f"The model has more than {_MAX_TEMPLATES} chat templates.")
    return {name: template for name, template in templates.items() if template.strip()}


def _templates_in_files(directory: Path) -> dict[str, str]:
    default = directory / "chat_template.jinja"
    templates = {DEFAULT_TEMPLATE: _read(default)} if default.is_file() else {}
    # Sorted: the order in which a file system lists them must not show.
    others = sorted((directory / "additional_chat_templates").glob("*.jinja"))[: _MAX_TEMPLATES + 1]
    return templates | {path.stem: _read(path) for path in others if path.is_file()}


def _read(path: Path) -> str:
    with path.open("rb") as file:
        raw = file.read(_LIMIT + 1)
    if len(raw) > _LIMIT:
        raise ModelUnsupported(f"The model's {path.name} is larger than {_LIMIT >> 20} MiB.")
    try:
        # As text files are read: Jinja and transformers see line feeds alone.
        return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        raise ModelUnsupported(f"The model's {path.name} is not UTF-8.") from None


def _named(value: JsonValue) -> dict[str, str]:
    """The templates of a `chat_template` entry: one text, a list of names and texts, or an object of them."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    pairs: list[tuple[JsonValue, JsonValue]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        pairs = [(item.get("name"), item.get("template")) for item in value if isinstance(item, dict)]
    templates = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    if len(templates) != len(value if isinstance(value, dict | list) else pairs) or not templates:
        raise ModelUnsupported("The model's chat_template is neither a text nor a list of names and templates.")
    return templates
