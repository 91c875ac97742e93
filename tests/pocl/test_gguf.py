"""GGUF files: headers are read within bounds, and what is loaded is whole, saves again and tokenises as trained."""

import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pocl.errors import ModelUnsupported, PoclError
from pocl.export.model_directory import save_model
from pocl.inspect import inspect_model
from pocl.models import gguf
from pocl.models.loading import load_student, load_teacher
from pocl.spec import ModelRef, StudentRef
from tests.pocl.tiny_gguf import HIDDEN, LAYERS, POSITIONS, write_gguf

CPU = torch.device("cpu")


def refusal(path: Path) -> str:
    with pytest.raises(ModelUnsupported) as raised:
        inspect_model(path)
    assert str(path.parent) not in raised.value.message
    return raised.value.message


def test_header_gives_the_facts_of_the_loaded_model(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    facts, loaded = inspect_model(path), load_teacher(ModelRef(path=str(path)), device=CPU, dtype=torch.float32)
    assert (facts.family, facts.layers, facts.hidden_size, facts.max_positions) == ("llama", LAYERS, HIDDEN, POSITIONS)
    assert facts.vocabulary_size == loaded.model.config.vocab_size
    assert facts.parameters == sum(p.numel() for p in loaded.model.parameters())
    assert facts.size_bytes == path.stat().st_size
    assert facts.has_chat_template
    assert facts.tied_embeddings


def test_tokens_equal_the_loaded_tokenizer_without_padding_tokens(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    vocabulary = gguf.load_gguf(path)[1].get_vocab()
    del vocabulary["[PAD261]"]
    assert inspect_model(path).tokens == vocabulary


@pytest.mark.parametrize("quantised", [False, True])
def test_saved_as_safetensors_it_gives_the_same_logits(quantised: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", quantised=quantised)
    loaded = load_teacher(ModelRef(path=str(path)), device=CPU, dtype=torch.float32)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, loaded.model(ids).logits)
    text = "In 2010, 10 of 101."
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text) == loaded.tokenizer(text)


def test_quantised_weights_become_trainable(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", quantised=True)
    model = load_student(StudentRef(path=str(path)), None, device=CPU).model
    model(torch.arange(5)[None]).logits.sum().backward()
    assert all(p.dtype == torch.float32 and p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("pre", sorted(gguf._SINGLE_DIGITS))
def test_single_digit_rules_split_digits_one_by_one(pre: str, tmp_path: Path) -> None:
    tokenizer = gguf.load_gguf(write_gguf(tmp_path / "tiny.gguf", pre=pre))[1]
    assert tokenizer.tokenize("a10") == ["a", "1", "0"]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_other_rules_leave_digits_together(pre: str, tmp_path: Path) -> None:
    tokenizer = gguf.load_gguf(write_gguf(tmp_path / "tiny.gguf", pre=pre))[1]
    assert tokenizer.tokenize("a10") == ["a", "10"]


def test_no_text_gives_an_id_past_the_embeddings(tmp_path: Path) -> None:
    model, tokenizer = gguf.load_gguf(write_gguf(tmp_path / "tiny.gguf"))
    assert max(tokenizer("<|endoftext|><s></s><unk>").input_ids) < model.config.vocab_size
    assert len(tokenizer) == model.config.vocab_size


def test_special_tokens_stay_whole(tmp_path: Path) -> None:
    tokenizer = gguf.load_gguf(write_gguf(tmp_path / "tiny.gguf", control="<|turn|>"))[1]
    assert tokenizer.tokenize("a<|turn|>b") == ["a", "<|turn|>", "b"]


def test_special_token_lost_by_the_conversion_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", control="<\uff5cUser\uff5c>")
    with pytest.raises(ModelUnsupported, match="special token"):
        gguf.load_gguf(path)


def test_qwen_normalises_accents_to_nfc(tmp_path: Path) -> None:
    tokenizer = gguf.load_gguf(write_gguf(tmp_path / "tiny.gguf", pre="qwen2"))[1]
    assert tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids


def test_rules_left_to_transformers_are_supported_by_it() -> None:
    assert not gguf._SPLIT_BY_TRANSFORMERS - GGUF_PRE_TOKENIZER_SPLITS.keys()


@pytest.mark.parametrize("pre", ["new-rules", "default", None])
def test_unknown_pre_tokenizer_rules_are_refused(pre: str | None, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", pre=pre)
    with pytest.raises(ModelUnsupported, match="give the model as safetensors"):
        load_teacher(ModelRef(path=str(path)), device=CPU, dtype=torch.float32)


def test_one_file_of_a_split_model_is_refused(tmp_path: Path) -> None:
    assert "merge them" in refusal(write_gguf(tmp_path / "tiny.gguf", parts=3))


@pytest.mark.parametrize("kept", [0, 3, 4, 20, 24, 100, 2000, 6000])
def test_truncated_header_is_refused(kept: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:kept])
    refusal(path)


@pytest.mark.parametrize("position", [4, 8, 16, 24], ids=["version", "tensors", "entries", "key length"])
def test_oversized_counts_in_the_header_are_refused(position: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    raw = bytearray(path.read_bytes())
    raw[position : position + 8] = struct.pack("<Q", (1 << 64) - 1)
    path.write_bytes(raw)
    refusal(path)


@given(offset=st.integers(0, 8000), junk=st.binary(min_size=1, max_size=8))
def test_a_damaged_header_is_read_or_refused(
    offset: int, junk: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(junk)] = junk
    path.write_bytes(raw)
    # Some bytes are the text of a token: then it is another model, but a readable one.
    with suppress(PoclError):
        assert inspect_model(path).vocabulary_size > 0


@given(st.binary(max_size=100))
def test_files_that_are_no_gguf_are_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes) -> None:
    path = tmp_path_factory.mktemp("junk") / "model.bin"
    path.write_bytes(junk)
    refusal(path)
