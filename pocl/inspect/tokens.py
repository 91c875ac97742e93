"""The vocabulary out of a tokenizer's files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.reading import JsonObject, bounded_int, read_object, read_optional_object

# The largest known tokenizer.json, with 262,144 tokens, has 33 MiB.
_TOKENIZER_LIMIT = 64 << 20
_MAP_LIMIT = 4 << 20
_LARGEST_ID = 1 << 24

NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer may have; a model may name others, as `image_token`."""


def read_tokens(directory: Path, tokenizer_config: JsonObject) -> dict[str, int]:
    """Read every token and its id, added tokens included, out of tokenizer.json or else vocab.json.

    Raises:
        ModelUnsupported: there is neither, or it holds no vocabulary.
    """
    if (directory / "tokenizer.json").is_file():
        tokens = _tokens_of_tokenizer_json(read_object(directory / "tokenizer.json", limit=_TOKENIZER_LIMIT))
    elif (directory / "vocab.json").is_file():
        tokens = _tokens_of_vocab_json(directory)
    else:
        raise ModelUnsupported("The model directory has neither tokenizer.json nor vocab.json.")
    tokens.update(_tokens_of_added_tokens_decoder(tokenizer_config.get("added_tokens_decoder")))
    special = [*named_special_tokens(directory, tokenizer_config).values(), *further_tokens(tokenizer_config)]
    # As the tokenizers library numbers tokens that are added.
    free = max(tokens.values(), default=-1) + 1
    for value in special:
        text = token_text(value)
        if text is not None and text not in tokens:
            tokens[text] = free
            free += 1
    return tokens


def named_special_tokens(directory: Path, tokenizer_config: JsonObject) -> dict[str, JsonValue]:
    """The special tokens that the files name, by name; None where a file says that there is none.

    They are in the order in which transformers adds those that the vocabulary lacks. As in transformers,
    special_tokens_map.json overrides a tokenizer_config.json that is older than its list of added tokens. Otherwise it
    fills in names that tokenizer_config.json leaves out.

    Raises:
        ModelUnsupported: special_tokens_map.json is no JSON object.
    """
    in_map = read_optional_object(directory / "special_tokens_map.json", limit=_MAP_LIMIT)
    listed = "added_tokens_decoder" in tokenizer_config
    named: dict[str, JsonValue] = {}
    for source in [tokenizer_config, in_map] if listed else [in_map, tokenizer_config]:
        extra = source.get("extra_special_tokens")
        entries = source | (extra if isinstance(extra, dict) else {})
        for name, value in entries.items():
            is_special = name in NAMED_TOKENS or name.endswith("_token") or (isinstance(extra, dict) and name in extra)
            if is_special and name not in named and (value is None or token_text(value) is not None):
                named[name] = value
    first = [name for name in NAMED_TOKENS if name in named]
    return {name: named[name] for name in (*first, *(name for name in named if name not in first))}


def further_tokens(tokenizer_config: JsonObject) -> list[JsonValue]:
    """The special tokens without a name that the tokenizer's config lists."""
    values = (tokenizer_config.get(key) for key in ("extra_special_tokens", "additional_special_tokens"))
    return [token for value in values if isinstance(value, list) for token in value]


def token_text(value: JsonValue) -> str | None:
    """The text of a token as the files spell it: as text, or as an object with its text and flags; None of neither."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _tokens_of_tokenizer_json(tokenizer: JsonObject) -> dict[str, int]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        tokens = _validated(vocabulary.items())
    elif isinstance(vocabulary, list):
        # A Unigram vocabulary is a list of pairs of token and score; the id is the position.
        pieces = [pair[0] if isinstance(pair, list) and pair else None for pair in vocabulary]
        tokens = _validated((piece, position) for position, piece in enumerate(pieces))
    else:
        raise _no_vocabulary()
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        raise _no_vocabulary()
    tokens.update(_validated((token.get("content"), token.get("id")) for token in added if isinstance(token, dict)))
    return tokens


def _tokens_of_vocab_json(directory: Path) -> dict[str, int]:
    tokens = _validated(read_object(directory / "vocab.json", limit=_TOKENIZER_LIMIT).items())
    added = directory / "added_tokens.json"
    if added.is_file():
        tokens.update(_validated(read_object(added, limit=_TOKENIZER_LIMIT).items()))
    return tokens


def _tokens_of_added_tokens_decoder(decoder: JsonValue) -> dict[str, int]:
    if not isinstance(decoder, dict):
        return {}
    # The keys of the decoder are ids, and JSON spells keys as strings.
    return _validated(
        (token["content"], int(key) if key.isascii() and key.isdigit() and len(key) < 9 else None)
        for key, token in decoder.items()
        if isinstance(token, dict) and "content" in token
    )


def _validated(pairs: Iterable[tuple[JsonValue, JsonValue]]) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for token, id_ in pairs:
        number = bounded_int(id_, at_most=_LARGEST_ID)
        if not isinstance(token, str) or number is None:
            raise _no_vocabulary()
        tokens[token] = number
    return tokens


def _no_vocabulary() -> ModelUnsupported:
    return ModelUnsupported("The model's tokenizer files hold no vocabulary of tokens and ids.")
