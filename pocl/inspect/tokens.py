"""Token ids out of a tokenizer's files."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import JsonValue

from pocl.errors import ModelUnsupported
from pocl.inspect.reading import JsonObject, count, read_object

# The largest that is known, with 262,144 tokens, has 33 MiB.
_TOKENIZER_LIMIT = 64 << 20
_LARGEST_ID = 1 << 24


def read_tokens(directory: Path, tokenizer_config: JsonObject) -> dict[str, int]:
    """Every token and its id, added tokens included; of tokenizer.json, else of vocab.json.

    Raises:
        ModelUnsupported: there is neither, or it holds no vocabulary.
    """
    if (directory / "tokenizer.json").is_file():
        tokens = _of_tokenizer_json(read_object(directory / "tokenizer.json", limit=_TOKENIZER_LIMIT))
    elif (directory / "vocab.json").is_file():
        tokens = _of_vocab_json(directory)
    else:
        raise ModelUnsupported("The model directory has neither tokenizer.json nor vocab.json.")
    tokens.update(_of_added_tokens_decoder(tokenizer_config.get("added_tokens_decoder")))
    return tokens


def _of_tokenizer_json(tokenizer: JsonObject) -> dict[str, int]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        tokens = _checked(vocabulary.items())
    elif isinstance(vocabulary, list):
        # Unigram: pairs of token and score, the id is the position.
        pieces = [pair[0] if isinstance(pair, list) and pair else None for pair in vocabulary]
        tokens = _checked((piece, position) for position, piece in enumerate(pieces))
    else:
        raise _unusable()
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        raise _unusable()
    tokens.update(_checked((token.get("content"), token.get("id")) for token in added if isinstance(token, dict)))
    return tokens


def _of_vocab_json(directory: Path) -> dict[str, int]:
    tokens = _checked(read_object(directory / "vocab.json", limit=_TOKENIZER_LIMIT).items())
    added = directory / "added_tokens.json"
    if added.is_file():
        tokens.update(_checked(read_object(added, limit=_TOKENIZER_LIMIT).items()))
    return tokens


def _of_added_tokens_decoder(decoder: JsonValue) -> dict[str, int]:
    if not isinstance(decoder, dict):
        return {}
    # Its keys are ids, spelled as JSON spells keys.
    return _checked(
        (token["content"], int(key) if key.isascii() and key.isdigit() and len(key) < 9 else None)
        for key, token in decoder.items()
        if isinstance(token, dict) and "content" in token
    )


def _checked(pairs: Iterable[tuple[JsonValue, JsonValue]]) -> dict[str, int]:
    tokens: dict[str, int] = {}
    for token, id_ in pairs:
        number = count(id_, at_most=_LARGEST_ID)
        if not isinstance(token, str) or number is None:
            raise _unusable()
        tokens[token] = number
    return tokens


def _unusable() -> ModelUnsupported:
    return ModelUnsupported("The model's tokenizer files hold no vocabulary of tokens and ids.")
