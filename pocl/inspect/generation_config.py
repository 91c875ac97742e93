"""generation_config.json of a model: which of its entries mean something, and which are passed over."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from pocl.inspect.config_values import number
from pocl.inspect.facts import ModelWarning
from pocl.inspect.reading import JsonObject, read_object

_FILE = "generation_config.json"
_LIMIT = 4 << 20
_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_MAX_NAMED = 3


@dataclass(frozen=True)
class GenerationEntries:
    """What a model's files say about the generation of texts."""

    entries: JsonObject
    """The entries that can be used."""
    in_file: bool
    """Whether they are of generation_config.json; where there is none, config.json may have some among its own."""
    warnings: tuple[ModelWarning, ...]
    """A warning that names the entries of generation_config.json that are passed over."""


def read_generation_config(directory: Path, config: JsonObject, vocabulary: int) -> GenerationEntries:
    """Read generation_config.json, or without it what the entries of `config` say.

    Ids of tokens are whole numbers below `vocabulary`, the rows of the output head: a text never ends at another one.
    Objects, which say how `generate` runs on a machine, are passed over.

    Raises:
        ModelUnsupported: the file is no JSON object, or too large.
        OSError: the file cannot be read.
    """
    path = directory / _FILE
    in_file = path.is_file()
    # What the file does not say of them the config does.
    used: JsonObject = {name: _as_entry(token_ids(config.get(name), vocabulary)[0]) for name in _IDS}
    ignored = []
    for name, value in (read_object(path, limit=_LIMIT) if in_file else config).items():
        if name in _IDS:
            ids, rest = token_ids(value, vocabulary)
            used[name] = _as_entry(ids) if ids else used[name]
            ignored += [f"{name} {str(each)[:40]} (no token has that id)" for each in rest]
        elif isinstance(value, dict):
            ignored += [f"{name[:40]} (an object)"] if in_file else []
        elif not name.startswith("_"):
            used[name] = value
    if not ignored:
        return GenerationEntries(used, in_file, ())
    named = "; ".join(ignored[:_MAX_NAMED]) + ("; ..." if len(ignored) > _MAX_NAMED else "")
    message = f"entries of {_FILE if in_file else 'config.json'} are not used: {named}"
    return GenerationEntries(used, in_file, (ModelWarning("generation_entries_ignored", message),))


def token_ids(value: JsonValue, vocabulary: int) -> tuple[list[int], list[JsonValue]]:
    """The ids below `vocabulary` in an entry that is one id, a list of them, or null; and what is no such id."""
    ids: list[int] = []
    rest: list[JsonValue] = []
    for each in value if isinstance(value, list) else [value]:
        id_ = number(each)
        if id_ is not None and id_ == int(id_) and 0 <= id_ < vocabulary:
            ids.append(int(id_))
        # -1 has long stood for no padding token.
        elif each is not None and id_ != -1:
            rest.append(each)
    return ids, rest


def _as_entry(ids: list[int]) -> JsonValue:
    """Ids as transformers has them."""
    return list(ids) if len(ids) > 1 else ids[0] if ids else None
