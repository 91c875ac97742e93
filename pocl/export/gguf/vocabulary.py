"""The tokenizer of a model directory as GGUF has it: byte-level BPE, whose rule for splitting text has a name."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gguf import TokenType
from tokenizers import Tokenizer, models
from transformers import GenerationConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pocl.errors import GgufUnsupported
from pocl.inspect.chat_templates import DEFAULT_TEMPLATE
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.tokenizer_files import read_tokenizer

_SPLITS: Final = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
"""The names of rules that split by one regular expression, which transformers has."""
_BYTES_ALONE: Final = ([("ByteLevel", True)], [("ByteLevel", False)])
_NORMALISED: Final = frozenset({"qwen2"})
"""Rules under which text is normalised to NFC in transformers. llama.cpp normalises none, and converters of models say
nothing of it: text that is in NFC, as nearly all is, gives the same tokens."""
_WHOLE_TOKENS_FIRST: Final = frozenset({"llama-bpe", "tekken"})
"""Rules under which llama.cpp takes a word that is a token for that token, whatever the merges."""
GENERATION_CONFIG: Final = "generation_config.json"
_MAX_ENDS: Final = 3
"""The kinds of end tokens that GGUF has keys for: of text, of turn, of message."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model, and how text becomes them."""

    tokens: tuple[str, ...]
    """One for each row of the embeddings."""
    kinds: tuple[TokenType, ...]
    merges: tuple[str, ...]
    split: str
    """`tokenizer.ggml.pre`: the rule by which text is split before the merges."""
    special_ids: Mapping[str, int]
    """The ids of special tokens, by their names in GGUF without `_token_id`: `bos`, `eos`, `eot`, ..."""
    adds_begin: bool
    adds_end: bool
    end_ids: tuple[int, ...]
    """Every token that ends an answer, the one that was taught first."""
    stop_text: str
    """The plain text that ends an answer; empty where a token does."""
    templates: Mapping[str, str]
    """Chat templates in Jinja by name; `default` is used unless another is named."""
    template_tokens: Mapping[str, str]
    """Special tokens as templates see them, by their names: `bos_token`, `eos_token`, ..."""
    notes: tuple[str, ...] = ()


def vocabulary_of(directory: Path, rows: int) -> Vocabulary:
    """The vocabulary of a model directory.

    Args:
        rows: of the embeddings.

    Raises:
        GgufUnsupported: the tokenizer works in a way that GGUF has no name for.
        ModelUnsupported: it cannot be read.
    """
    text = read_tokenizer(directory)
    content: dict[str, Any] = json.loads(text.backend.to_str())
    split = _split_of(content, text.backend)
    tokens, kinds = _tokens_of(text, rows)
    adds_begin, adds_end = _added_around(text)
    generation = _generation(directory)
    ends = _end_ids(text, generation)
    stop_strings = generation.stop_strings or ()
    return Vocabulary(
        tokens=tokens,
        kinds=kinds,
        merges=_merges_of(content),
        split=split,
        special_ids=_special_ids(text, ends),
        adds_begin=adds_begin,
        adds_end=adds_end,
        end_ids=ends,
        stop_text=stop_strings if isinstance(stop_strings, str) else next(iter(stop_strings), ""),
        templates=dict(text.templates) if DEFAULT_TEMPLATE in text.templates else {},
        template_tokens=dict(text.special_tokens),
        notes=tuple(_notes(text, split, content, ends)),
    )


def _split_of(content: Mapping[str, Any], backend: Tokenizer) -> str:
    model = content["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise GgufUnsupported(
            f"Only byte-level BPE tokenizers are written as GGUF here; this one is {model['type']}"
            f"{' with a fallback to bytes, as SentencePiece has it' if model.get('byte_fallback') else ''}."
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise GgufUnsupported("The tokenizer marks parts of words, which GGUF has no name for.")
    steps_here = _significant(content.get("pre_tokenizer"))
    normaliser = (content.get("normalizer") or {}).get("type")
    for name, steps in _steps_by_split().items():
        # Without merges it is all one how text is split.
        if steps_here != steps and not (model["merges"] == [] and steps_here in _BYTES_ALONE):
            continue
        if normaliser is not None and not (normaliser == "NFC" and name in _NORMALISED):
            break
        if bool(model.get("ignore_merges")) != (name in _WHOLE_TOKENS_FIRST) and not _merges_reach(model, backend):
            break
        return name
    raise GgufUnsupported("The tokenizer splits or normalises text by rules that GGUF has no name for.")


def _steps_by_split() -> dict[str, list[tuple[Any, ...]]]:
    by_regex: dict[str, list[tuple[Any, ...]]] = {
        name: [("Split", GGUF_PRE_TOKENIZER_SPLITS[name]), ("ByteLevel", False)] for name in _SPLITS
    }
    return {**by_regex, "smollm": [("Digits", True), ("ByteLevel", True)], "gpt-2": [("ByteLevel", True)]}


def _significant(step: Mapping[str, Any] | None) -> list[tuple[Any, ...]]:
    """What of the rules for splitting text decides about tokens; rules that are not known are named, and equal none."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            return [each for inner in steps for each in _significant(inner)]
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return [("Split", regex)]
        case {"type": "Digits", "individual_digits": individual}:
            return [("Digits", individual)]
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}:
            return [("ByteLevel", splits)]
        case _:
            return [("unknown",)]


def _merges_reach(model: Mapping[str, Any], backend: Tokenizer) -> bool:
    """Whether merges alone make every token out of its bytes, so that it is all one whether whole words come first."""
    pairs = (each.split(" ", 1) if isinstance(each, str) else each for each in model["merges"])
    merges = [(left, right) for left, right in pairs]
    bare = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges))
    added = backend.get_added_tokens_decoder()
    tokens = [token for token, id_ in model["vocab"].items() if id_ not in added]
    return all(len(each.ids) == 1 for each in bare.encode_batch(tokens, add_special_tokens=False))


def _merges_of(content: Mapping[str, Any]) -> tuple[str, ...]:
    merges = [each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]]
    if any(each.count(" ") != 1 for each in merges):
        raise GgufUnsupported("A merge of the tokenizer holds a space, which GGUF cannot spell.")
    return tuple(merges)


def _tokens_of(text: TextTokenizer, rows: int) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    by_id = {id_: token for token, id_ in text.vocabulary.items()}
    if max(by_id, default=-1) >= rows:
        raise GgufUnsupported(f"The tokenizer has ids up to {max(by_id)}, and the model {rows} embeddings.")
    tokens, kinds = [], []
    for id_ in range(rows):
        added = text.added_tokens.get(id_)
        # The gaps have names that no text can be tokenised to.
        tokens.append(by_id.get(id_, f"[PAD{id_}]") if added is None else str(added.content))
        if id_ not in by_id:
            kinds.append(TokenType.UNUSED)
        elif added is None:
            kinds.append(TokenType.NORMAL)
        else:
            kinds.append(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
    return tuple(tokens), tuple(kinds)


def _added_around(text: TextTokenizer) -> tuple[bool, bool]:
    """Whether the begin token stands before a text, and the end token after it."""
    if text.post_processor is None:
        return False, False
    whole = Tokenizer.from_str(text.backend.to_str())
    whole.post_processor = text.post_processor
    ids, inner = whole.encode("a").ids, whole.encode("a", add_special_tokens=False).ids
    start = next(index for index in range(len(ids)) if ids[index : index + len(inner)] == inner)
    before, after = ids[:start], ids[start + len(inner) :]
    if before not in ([], [text.bos_id]) or after not in ([], [text.eos_id]):
        raise GgufUnsupported("The tokenizer puts other tokens around a text than its begin and end token.")
    return bool(before), bool(after)


def _generation(directory: Path) -> GenerationConfig:
    if not (directory / GENERATION_CONFIG).is_file():
        return GenerationConfig()
    return GenerationConfig.from_pretrained(directory, local_files_only=True)


def _end_ids(text: TextTokenizer, generation: GenerationConfig) -> tuple[int, ...]:
    taught = generation.eos_token_id
    listed = taught if isinstance(taught, list) else [] if taught is None else [taught]
    return tuple(dict.fromkeys((*listed, *sorted(text.end_ids))))


def _special_ids(text: TextTokenizer, ends: Sequence[int]) -> dict[str, int]:
    unknown = text.id_of(text.special_tokens["unk_token"]) if "unk_token" in text.special_tokens else None
    found = {"bos": text.bos_id, "unknown": unknown, "padding": text.pad_id}
    # A template may print the tokenizer's own end, so that it stays `eos`; where answers end by others, these follow.
    eos = text.eos_id if text.eos_id is not None else next(iter(ends), None)
    others = [id_ for id_ in ends if id_ != eos]
    found |= {"eos": eos, **dict(zip(("eot", "eom"), others, strict=False))}
    return {name: id_ for name, id_ in found.items() if id_ is not None}


def _notes(text: TextTokenizer, split: str, content: Mapping[str, Any], ends: Sequence[int]) -> list[str]:
    notes = []
    if content.get("normalizer") is not None:
        notes.append(f"llama.cpp normalises no text: under the rule {split!r} give it text in NFC.")
    stripping = [each.content for each in text.added_tokens.values() if each.lstrip or each.rstrip or each.single_word]
    if stripping:
        notes.append(f"llama.cpp keeps white space beside {stripping[0][:40]!r}, which the tokenizer takes away.")
    if len(ends) > _MAX_ENDS:
        names = ", ".join(repr(text.token_of(id_)) for id_ in ends[_MAX_ENDS:])
        notes.append(f"GGUF has keys for three ends of answers; {names} stand in the Modelfile alone.")
    return notes
