"""A tokenizer read from its files gives the ids of tokenizer.json, whatever class the files name, and keeps them."""

import inspect
import json
import logging
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from pocl.errors import ModelUnsupported
from pocl.inspect.random import byte_level_vocabulary
from pocl.models.tokenizers import text_tokenizer, transformers_tokenizer
from pocl.prompting.byte_level import byte_level_text_tokenizer
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.prompting.tokenizer_files import CLASS_DEFAULTS, CLASS_FAMILIES, read_tokenizer
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer

PROBES = (
    "The sky is blue.", "In 2023 we had 650841823 plums.", "a  b\n\n\nc (x): it's\tdone!", " leading",
    "naïve é 天空 🙂", "<s>Hello</s><|im_start|>user\n", "\x00\x7f\r\n", "\uff21 \ufb01", "e\u0301 Å", "",
)  # fmt: skip
SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS: dict[str, Any] = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "cl100k": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K), "isolated"), BYTES]),
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
}
CLASSES = (
    "GPT2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "CodeGenTokenizer",
    "GPTNeoXTokenizerFast", "GemmaTokenizer", "CohereTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend",
    "NoSuchTokenizer", None,
)  # fmt: skip
FAMILIES = ("llama", "gpt2", "qwen2", "gemma2")


@pytest.fixture(autouse=True)
def _silence_transformers() -> Iterator[None]:
    # It warns about classes that do not fit, which is what is tried here.
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def byte_bpe(split: Any = SPLITS["gpt2"], special: tuple[str, ...] = SPECIAL) -> Tokenizer:
    """Byte-level BPE whose merges cross every rule of splitting, so that the rules show in the ids."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*PROBES, "1999 and 2023 it's done!\n\n"] * 20, trainer)
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_bpe() -> Tokenizer:
    """BPE with byte fallback that prepends the sign of a space, as Llama 2's."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=[*SPECIAL, *fallback], show_progress=False)
    backend.train_from_iterator(PROBES[:4] * 20, trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][: len(SPECIAL)]
    return Tokenizer.from_str(json.dumps(content))


BACKENDS = {name: byte_bpe(split) for name, split in SPLITS.items()} | {"sentencepiece": sentencepiece_bpe()}


def written(
    directory: Path, backend: Tokenizer, *, family: str = "llama", model: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A model directory as published, but for its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": family, **(model or {})}))
    return directory


def ids_of(backend: Tokenizer) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in PROBES]


def ids_by_transformers(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]


@pytest.mark.parametrize("kind", BACKENDS)
def test_ids_are_as_tokenizer_json_says_whatever_the_class_is(kind: str, tmp_path: Path) -> None:
    expected = ids_of(BACKENDS[kind])
    for number, (name, family) in enumerate(product(CLASSES, FAMILIES)):
        config: dict[str, Any] = {} if name is None else {"tokenizer_class": name}
        named: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        directory = written(tmp_path / str(number), BACKENDS[kind], family=family, **named, **config)
        tokenizer = read_tokenizer(directory)
        assert [list(encoded.ids) for encoded in tokenizer.encode_all(PROBES)] == expected
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


@pytest.mark.parametrize("kind", BACKENDS)
def test_exported_tokenizer_json_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    named: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    directory = written(tmp_path / "published", BACKENDS[kind], **named)
    tokenizer = transformers_tokenizer(read_tokenizer(directory))
    assert ids_by_transformers(tokenizer) == ids_of(BACKENDS[kind])
    tokenizer.save_pretrained(tmp_path / "exported")
    assert ids_of(Tokenizer.from_file(str(tmp_path / "exported" / "tokenizer.json"))) == ids_of(BACKENDS[kind])
    again = read_tokenizer(tmp_path / "exported")
    assert ids_by_transformers(transformers_tokenizer(again)) == ids_of(BACKENDS[kind])
    assert again.special_tokens == read_tokenizer(directory).special_tokens
    for text, ids in zip(PROBES, ids_of(BACKENDS[kind]), strict=True):
        assert tokenizer.decode(ids) == again.decode(ids) == BACKENDS[kind].decode(ids, skip_special_tokens=False), text


@given(text=st.text(max_size=40))
def test_ids_of_one_text_equal_those_of_many_and_offsets_point_into_it(text: str) -> None:
    tokenizer = byte_level_text_tokenizer(64)
    (encoded,) = tokenizer.encode_all([text])
    assert encoded == tokenizer.encode(text)
    assert all(0 <= start <= stop <= len(text) for start, stop in encoded.offsets)
    stops = [stop for _, stop in encoded.offsets]
    assert "".join(text[start:stop] for start, stop in zip([0, *stops], stops, strict=False)) == text
    assert tokenizer.decode(encoded.ids) == text


def test_offsets_are_not_trimmed_by_the_rule_for_special_tokens() -> None:
    backend = byte_bpe()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = TextTokenizer.from_backend(backend, {}).encode("a word")
    assert encoded.offsets[0][0] == 0
    assert [stop for _, stop in encoded.offsets][:-1] == [start for start, _ in encoded.offsets][1:]


def test_truncation_and_padding_of_tokenizer_json_do_not_touch_a_text(tmp_path: Path) -> None:
    backend = byte_bpe()
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    tokenizer = read_tokenizer(written(tmp_path, backend))
    assert len(tokenizer.encode("a text of more than four tokens, and less than many").ids) > 4
    assert len(tokenizer.encode("a").ids) == 1


@pytest.mark.parametrize("begins", [True, False])
def test_begin_tokens_are_those_that_the_tokenizer_adds(begins: bool) -> None:
    theirs = byte_tokenizer(begins=begins)
    assert list(text_tokenizer(theirs).begin_ids) == theirs("a")["input_ids"][:-1]
    # Wrapping it has left it as it was, and what is made of it begins texts alike.
    assert transformers_tokenizer(text_tokenizer(theirs))("a b")["input_ids"] == theirs("a b")["input_ids"]


LAYOUTS: dict[str, dict[str, dict[str, Any] | str]] = {
    "one text": {"tokenizer_config.json": {"chat_template": CHATML}},
    "named": {"tokenizer_config.json": {"chat_template": [
        {"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools"}]}},
    "file over entry": {"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": CHATML},
    "files by name": {"tokenizer_config.json": {"chat_template": "old"}, "chat_template.jinja": CHATML,
                      "additional_chat_templates/rag.jinja": "rag"},
    "named alone": {"tokenizer_config.json": {}, "additional_chat_templates/rag.jinja": "rag"},
    "entry over processor": {"tokenizer_config.json": {"chat_template": CHATML},
                             "chat_template.json": {"chat_template": "of the processor"}},
    "none": {"tokenizer_config.json": {}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_templates_have_the_precedence_of_transformers(layout: str, tmp_path: Path) -> None:
    written(tmp_path, BACKENDS["gpt2"])
    put(tmp_path, LAYOUTS[layout])
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    expected = theirs if isinstance(theirs, dict) else {} if theirs is None else {"default": theirs}
    tokenizer = read_tokenizer(tmp_path)
    assert dict(tokenizer.templates) == expected
    assert transformers_tokenizer(tokenizer).chat_template == theirs
    assert dict(text_tokenizer(transformers_tokenizer(tokenizer)).templates) == expected


def test_template_of_the_processor_counts_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    written(tmp_path, BACKENDS["gpt2"])
    put(tmp_path, {"chat_template.json": {"chat_template": CHATML}})
    assert dict(read_tokenizer(tmp_path).templates) == {"default": CHATML}


SPECIALS: dict[str, dict[str, dict[str, Any] | str]] = {
    "texts": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<|im_start|>"}},
    "objects": {"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False,
                                          "normalized": False, "rstrip": False, "single_word": False}}},
    "map over an old config": {"tokenizer_config.json": {"eos_token": "</s>", "pad_token": "<unk>"},
                               "special_tokens_map.json": {"eos_token": "<|im_end|>"}},
    "config with its tokens over map": {
        "tokenizer_config.json": {"eos_token": "</s>", "added_tokens_decoder": {
            "2": {"content": "</s>", "special": True, "lstrip": False, "rstrip": False, "normalized": False,
                  "single_word": False}}},
        "special_tokens_map.json": {"eos_token": "<|im_end|>"}},
    "new tokens": {"tokenizer_config.json": {"eos_token": "</s>", "pad_token": "[PAD]",
                                             "extra_special_tokens": ["<tool>", "<s>"]}},
    "old name of new tokens": {"tokenizer_config.json": {"eos_token": "</s>", "additional_special_tokens": ["<tool>"]}},
    "named extra tokens": {"tokenizer_config.json": {"eos_token": "</s>", "extra_special_tokens": {"boi": "<img>"}}},
}  # fmt: skip


@pytest.mark.parametrize("layout", SPECIALS)
def test_special_tokens_are_those_that_transformers_shows_a_template(layout: str, tmp_path: Path) -> None:
    written(tmp_path, BACKENDS["gpt2"])
    put(tmp_path, SPECIALS[layout])
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    assert dict(tokenizer.special_tokens) == theirs.special_tokens_map
    assert dict(tokenizer.vocabulary) == theirs.get_vocab()
    text = "[PAD]<tool> a <img></s>"
    assert list(tokenizer.encode(text).ids) == theirs(text, add_special_tokens=False)["input_ids"]
    for ids in (tokenizer.encode(text).ids,):
        assert tokenizer.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_map_names_what_the_config_leaves_out(tmp_path: Path) -> None:
    written(tmp_path, BACKENDS["gpt2"], added_tokens_decoder={})
    put(tmp_path, {"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}})
    assert read_tokenizer(tmp_path).eos_id == 4


def test_end_ids_are_those_of_the_generation_config_and_the_tokenizer(tmp_path: Path) -> None:
    written(tmp_path, BACKENDS["gpt2"], model={"eos_token_id": 2}, eos_token="<unk>")
    assert read_tokenizer(tmp_path).end_ids == {0, 2}
    put(tmp_path, {"generation_config.json": {"eos_token_id": [3, 4]}})
    assert read_tokenizer(tmp_path).end_ids == {0, 3, 4}


def test_tokenizer_that_names_no_end_token_has_that_of_the_model(tmp_path: Path) -> None:
    written(tmp_path, BACKENDS["gpt2"], family="olmo2", model={"eos_token_id": [4, 2]})
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.special_tokens["eos_token"], tokenizer.eos_id) == ("<|im_end|>", 4)


@pytest.mark.parametrize("name", CLASS_DEFAULTS)
def test_defaults_of_a_class_are_those_of_transformers(name: str) -> None:
    parameters = inspect.signature(getattr(transformers, name).__init__).parameters
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    defaults = {key: parameters[key].default for key in names if key in parameters}
    assert CLASS_DEFAULTS[name] == {key: str(token) for key, token in defaults.items() if token is not None}
    for family in CLASS_FAMILIES.get(name, ()):
        assert TOKENIZER_MAPPING_NAMES[family] == name


def test_special_tokens_that_no_file_names_are_those_of_the_class(tmp_path: Path) -> None:
    backend = byte_bpe(special=("<|endoftext|>",))
    tokenizer = read_tokenizer(written(tmp_path, backend, family="gpt2", model_max_length=1024))
    assert dict(tokenizer.special_tokens) == AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert tokenizer.eos_id == 0
    null = read_tokenizer(written(tmp_path / "null", backend, family="gpt2", eos_token="<|endoftext|>", bos_token=None))
    assert "bos_token" not in null.special_tokens


@pytest.mark.parametrize("adds_begin", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_files_of_gpt2_are_read_as_transformers_reads_them(family: str, adds_begin: bool, tmp_path: Path) -> None:
    backend = byte_bpe(special=("<|endoftext|>", "</s>"))
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "add_bos_token": adds_begin}
    written(tmp_path, backend, family=family, **config)
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = read_tokenizer(tmp_path)
    ours = transformers_tokenizer(tokenizer)
    assert ids_by_transformers(ours) == ids_by_transformers(theirs) == [list(tokenizer.encode(t).ids) for t in PROBES]
    assert ours("a text")["input_ids"] == theirs("a text")["input_ids"]
    assert dict(tokenizer.special_tokens) == theirs.special_tokens_map


@pytest.mark.parametrize("files", [{"tokenizer.model": "x"}, {"vocab.json": {"a": 0}, "merges.txt": "#version: 0.2\n"}])
def test_other_files_are_refused_with_what_to_do(files: dict[str, Any], tmp_path: Path) -> None:
    written(tmp_path, BACKENDS["gpt2"], tokenizer_class="Qwen2Tokenizer")
    (tmp_path / "tokenizer.json").unlink()
    put(tmp_path, files)
    with pytest.raises(ModelUnsupported, match="save_pretrained"):
        read_tokenizer(tmp_path)


def test_ids_on_which_the_files_disagree_are_refused_by_name(tmp_path: Path) -> None:
    token = {"content": "<tool>", "special": True}
    written(tmp_path, BACKENDS["gpt2"], added_tokens_decoder={"5000": token})
    with pytest.raises(ModelUnsupported, match="'<tool>' the id 5000"):
        read_tokenizer(tmp_path)


@given(junk=st.binary(max_size=200).filter(lambda raw: not raw.strip().startswith(b"{")))
@settings(max_examples=25)
def test_junk_is_refused(junk: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("junk")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        written(directory, BACKENDS["gpt2"])
        (directory / name).write_bytes(junk)
        with pytest.raises(ModelUnsupported):
            read_tokenizer(directory)


def test_added_tokens_are_known_with_their_flags(tmp_path: Path) -> None:
    backend = byte_bpe()
    backend.add_tokens([AddedToken("<plain>", special=False)])
    tokenizer = read_tokenizer(written(tmp_path, backend))
    added = tokenizer.id_of("<plain>")
    assert added is not None
    assert not tokenizer.added_tokens[added].special
    assert tokenizer.added_tokens[1].special
    assert (tokenizer.token_of(added), tokenizer.size) == ("<plain>", backend.get_vocab_size())


def test_byte_level_tokenizer_has_the_vocabulary_of_the_inspection() -> None:
    assert dict(byte_level_text_tokenizer(64).vocabulary) == byte_level_vocabulary()


def put(directory: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
