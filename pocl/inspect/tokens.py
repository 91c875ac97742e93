"""The vocabulary out of a tokenizer's files."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.reading import JsonObject, bounded_int, read_object

# The largest known tokenizer.json, with 262,144 tokens, has 33 MiB.
_TOKENIZER_LIMIT = 64 << 20
_LARGEST_ID = 1 << 24


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
    return tokens


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
