"""Reads the files of a tokenizer, bounded and without transformers: they come from whoever posts a job."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from pydantic import JsonValue
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from pocl.errors import ModelUnsupported
from pocl.inspect.chat_templates import read_chat_templates
from pocl.inspect.generation_config import token_ids
from pocl.inspect.reading import (
    JsonObject,
    bounded_int,
    check_value_count,
    read_bytes,
    read_object,
    read_optional_object,
)
from pocl.inspect.tokens import further_tokens, named_special_tokens, token_text
from pocl.prompting.text_tokenizer import TextTokenizer

_CONFIG_LIMIT = 4 << 20
_TOKENIZER_CONFIG_LIMIT = 16 << 20
_TOKENIZER_LIMIT = 64 << 20
_LARGEST_ID = 1 << 24

_END_OF_TEXT = "<|endoftext|>"
_GPT2 = {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT}
_QWEN2 = {"eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT}
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CLASS_DEFAULTS: Final[Mapping[str, Mapping[str, str]]] = {
    "GPT2Tokenizer": _GPT2,
    "CodeGenTokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2 | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": _QWEN2,
    "Qwen3_5Tokenizer": _QWEN2,
    "LlamaTokenizer": _SENTENCEPIECE,
    "XGLMTokenizer": _SENTENCEPIECE | {"pad_token": "<pad>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>", "pad_token": "<PAD>",
    },
}  # fmt: skip
"""The special tokens that a tokenizer class of transformers has where no file names them."""

CLASS_FAMILIES: Final[Mapping[str, frozenset[str]]] = {
    "GPT2Tokenizer": frozenset({"codegen", "dbrx", "gpt2", "gpt_neo", "gptj", "opt", "phi", "starcoder2"}),
    "GPTNeoXTokenizer": frozenset({"falcon_mamba", "gpt_neox", "mamba", "mamba2", "mpt", "olmo", "olmoe", "rwkv"}),
    "Qwen2Tokenizer": frozenset({"qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"}),
    "GemmaTokenizer": frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma"}),
    "CohereTokenizer": frozenset({"cohere", "cohere2"}),
    "XGLMTokenizer": frozenset({"xglm"}),
}
"""The families whose tokenizer is of a class where no file names another."""


def _is_side(value: JsonValue) -> bool:
    return value in ("left", "right")


def _is_flag(value: JsonValue) -> bool:
    return isinstance(value, bool)


_SETTINGS: Final[Mapping[str, Callable[[JsonValue], bool]]] = {
    "model_max_length": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "padding_side": _is_side,
    "truncation_side": _is_side,
    "clean_up_tokenization_spaces": _is_flag,
    "add_prefix_space": _is_flag,
    "model_input_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "split_special_tokens": _is_flag,
}
"""Entries of tokenizer_config.json that say nothing about ids and are kept for the exported model, and which of their
values mean something."""

GPT2_FILES: Final = ("vocab.json", "merges.txt")

_T = TypeVar("_T")


def read_tokenizer(directory: Path) -> TextTokenizer:
    """Read the tokenizer of a model directory.

    The ids are as tokenizer.json says. Without it, vocab.json and merges.txt are read where the tokenizer is GPT-2's.
    Tokens that the other files name and tokenizer.json lacks are added at the end, as transformers adds them.

    Raises:
        ModelUnsupported: naming the file that is missing or wrong, and what to do.
        OSError: a file cannot be read.
    """
    config = read_optional_object(directory / "tokenizer_config.json", limit=_TOKENIZER_CONFIG_LIMIT)
    model_config = read_optional_object(directory / "config.json", limit=_CONFIG_LIMIT)
    tokenizer_class = _tokenizer_class(config, model_config)
    named = _special_tokens(directory, config)
    defaults = CLASS_DEFAULTS.get(tokenizer_class, {})
    if (directory / "tokenizer.json").is_file():
        backend = _backend_of_tokenizer_json(directory)
    else:
        backend = _backend_of_gpt2_files(directory, tokenizer_class, config, {**defaults, **_texts(named)})
    for name, text in defaults.items():
        if name not in named and backend.token_to_id(text) is not None:
            named[name] = AddedToken(text, special=True)
    _add_missing_tokens(backend, config, [token for token in named.values() if token is not None])
    special_tokens = _texts(named)
    end_ids = _end_ids(directory, model_config)
    if "eos_token" not in special_tokens:
        spelled = next((token for id_ in end_ids if (token := backend.id_to_token(id_)) is not None), None)
        if spelled is not None:
            special_tokens["eos_token"] = spelled
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    return TextTokenizer.from_backend(
        backend,
        special_tokens,
        templates=read_chat_templates(directory, config),
        configured_end_ids=end_ids,
        settings={name: config[name] for name, is_valid in _SETTINGS.items() if is_valid(config.get(name))},
    )


def _backend_of_tokenizer_json(directory: Path) -> Tokenizer:
    raw = read_bytes(directory / "tokenizer.json", limit=_TOKENIZER_LIMIT)
    check_value_count(raw, "tokenizer.json")
    return _built(lambda: Tokenizer.from_buffer(raw), "tokenizer.json is not one that the tokenizers library reads")


def _backend_of_gpt2_files(
    directory: Path, tokenizer_class: str, config: JsonObject, special_tokens: Mapping[str, str]
) -> Tokenizer:
    """Byte-level BPE out of vocab.json and merges.txt, split as GPT-2 splits."""
    if tokenizer_class != "GPT2Tokenizer" or not all((directory / name).is_file() for name in GPT2_FILES):
        raise ModelUnsupported(
            "The model has no tokenizer.json; load its tokenizer with transformers where its other files can be "
            "converted (AutoTokenizer.from_pretrained), and save it beside the weights (save_pretrained)."
        )
    vocabulary = {
        token: number
        for token, id_ in read_object(directory / "vocab.json", limit=_TOKENIZER_LIMIT).items()
        if (number := bounded_int(id_, at_most=_LARGEST_ID)) is not None
    }
    lines = read_bytes(directory / "merges.txt", limit=_TOKENIZER_LIMIT).decode("utf-8", "replace").split("\n")
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    merges = [(pair[0], pair[1]) for pair in pairs if len(pair) == 2]
    if len(merges) != len(pairs):
        raise ModelUnsupported("The model's merges.txt has lines that are no pair of tokens.")
    model = _built(
        lambda: models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False),
        "vocab.json and merges.txt do not fit together",
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space") is True)
    backend.decoder = decoders.ByteLevel()
    begin = special_tokens.get("bos_token")
    if config.get("add_bos_token") is True and begin is not None and backend.token_to_id(begin) is not None:
        token = (begin, backend.token_to_id(begin))
        backend.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[token])
    return backend


def _built(build: Callable[[], _T], problem: str) -> _T:
    try:
        return build()
    except BaseException as error:
        # The library raises plain exceptions, and panics of Rust, which derive from BaseException.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelUnsupported(f"The model's {problem}.") from error
        raise


def _tokenizer_class(config: JsonObject, model_config: JsonObject) -> str:
    """The tokenizer class that the files name, or else that of the family; empty where there is neither."""
    for named in (config.get("tokenizer_class"), model_config.get("tokenizer_class")):
        if isinstance(named, str) and named:
            return named.removesuffix("Fast")
    family = model_config.get("model_type")
    return next((name for name, families in CLASS_FAMILIES.items() if family in families), "")


def _special_tokens(directory: Path, config: JsonObject) -> dict[str, AddedToken | None]:
    """The special tokens that the files name, by name; None where a file says that there is none."""
    named = named_special_tokens(directory, config)
    return {name: _added_token(value, special=True) for name, value in named.items()}


def _texts(named: Mapping[str, AddedToken | None]) -> dict[str, str]:
    return {name: token.content for name, token in named.items() if token is not None}


def _added_token(value: JsonValue, *, special: bool) -> AddedToken | None:
    """A token as the files spell it: its text, or an object with its text and flags; None if it is neither."""
    content = token_text(value)
    if content is None:
        return None
    if not isinstance(value, dict):
        return AddedToken(content, special=special)
    flags = {name: value.get(name) is True for name in ("single_word", "lstrip", "rstrip")}
    normalized = value.get("normalized")
    is_special = special or value.get("special") is True
    return AddedToken(
        content, special=is_special, normalized=normalized if isinstance(normalized, bool) else not is_special, **flags
    )


def _add_missing_tokens(backend: Tokenizer, config: JsonObject, named: Iterable[AddedToken]) -> None:
    """Let the backend find the tokens that the tokenizer's config names; those that its vocabulary lacks get new ids.

    Raises:
        ModelUnsupported: the config gives one an id that it would not have.
    """
    found = {token.content for token in backend.get_added_tokens_decoder().values()}
    decoder = config.get("added_tokens_decoder")
    listed = decoder.items() if isinstance(decoder, dict) else ()
    numbered = [
        (int(key), token)
        for key, value in listed
        if key.isascii() and key.isdigit() and len(key) < 9 and (token := _added_token(value, special=False))
    ]
    for id_, token in sorted(numbered, key=lambda pair: pair[0]):
        if token.content not in found:
            backend.add_tokens([token])
        actual = backend.token_to_id(token.content)
        if actual != id_:
            raise ModelUnsupported(
                f"tokenizer_config.json gives the token {token.content[:40]!r} the id {id_}, and tokenizer.json the id "
                f"{actual}; save the tokenizer anew, so that both agree."
            )
    found |= {token.content for _, token in numbered}
    others = [token for value in further_tokens(config) if (token := _added_token(value, special=True)) is not None]
    missing = {token.content: token for token in (*named, *others) if token.content not in found}
    if missing:
        backend.add_special_tokens(list(missing.values()))


def _end_ids(directory: Path, model_config: JsonObject) -> tuple[int, ...]:
    """The end-of-sequence ids of the generation config, or else of the model's config, in their order."""
    generation = read_optional_object(directory / "generation_config.json", limit=_CONFIG_LIMIT)
    inner = model_config.get("text_config")
    for source in (generation, model_config, inner if isinstance(inner, dict) else {}):
        ids, _ = token_ids(source.get("eos_token_id"), _LARGEST_ID)
        if ids:
            return tuple(ids)
    return ()
