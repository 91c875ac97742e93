"""An exported student stops where it was taught to stop, under plain `generate()` with nothing given."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from pocl.evaluation.answers import GenerationSettings, stop_token_ids
from pocl.export.generation import exported_generation
from pocl.export.model_directory import save_model
from pocl.models.precision import Precision
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer
from tests.pocl.export.certain_student import certain_student

START = 40
"""The last token of the prompt; the student answers 41, 42, ... until something ends its answer."""
TAUGHT_END = 45


def generation_config(**settings: Any) -> GenerationConfig:
    # Published files hold settings that the class warns of.
    return GenerationConfig.from_dict({key: value for key, value in settings.items() if value is not None})


def answer_of(directory: Path) -> list[int]:
    """The new tokens of plain transformers, from the files of a directory alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    prompt = torch.tensor([[30, 31, START]])
    with torch.no_grad():
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    new: list[int] = ids[0, prompt.shape[1] :].tolist()
    return new


SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "old end": {"eos_token_id": 90},
    "old ends": {"eos_token_id": [90, 91], "pad_token_id": 90},
    "end beyond the vocabulary": {"eos_token_id": 100_000, "pad_token_id": 100_001},
    "pads with the taught end": {"eos_token_id": 90, "pad_token_id": TAUGHT_END},
    "sampling without do_sample": {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 90},
    "sampling that generate refuses": {"do_sample": True, "temperature": 0.0, "top_k": 1, "eos_token_id": 90},
    "short": {"max_length": 5, "eos_token_id": 90},
    "few new tokens": {"max_new_tokens": 2, "eos_token_id": 90},
    "longer than its positions": {"max_length": 10_000, "eos_token_id": 90},
    "must not end": {"min_length": 60, "min_new_tokens": 50, "eos_token_id": 90},
    "suppressed end": {"suppress_tokens": [TAUGHT_END], "begin_suppress_tokens": [41], "eos_token_id": 90},
    "forced tokens": {"forced_bos_token_id": 3, "forced_eos_token_id": 4, "eos_token_id": 90},
    "beams": {"num_beams": 3, "length_penalty": 2.0, "eos_token_id": 90},
    "for another machine": {"cache_implementation": "offloaded", "eos_token_id": 90},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plain_generate_stops_at_the_taught_end(name: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    model = certain_student(len(tokenizer), generation=generation_config(**SETTINGS[name]))
    save_model(model, tokenizer, tmp_path, end_ids=[TAUGHT_END])
    expected = list(range(START + 1, TAUGHT_END + 1))
    # What follows the end in its row pads.
    assert answer_of(tmp_path)[: len(expected) + 1] == expected


def test_answer_ends_without_a_limit_of_twenty_tokens(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    save_model(certain_student(len(tokenizer)), tokenizer, tmp_path, end_ids=[START + 100])
    assert answer_of(tmp_path) == list(range(START + 1, START + 101))


@pytest.mark.parametrize("options", [{"max_new_tokens": 3}, {"max_new_tokens": 3, "do_sample": False}, {}])
def test_plain_calls_of_generate_are_not_warned(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer(CHATML)
    save_model(certain_student(len(tokenizer)), tokenizer, tmp_path, end_ids=[TAUGHT_END])
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    # Its messages have a handler of their own, and do not reach the one of pytest.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    prompt = torch.tensor([[30, 31, START]])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    new = ids.shape[1] - prompt.shape[1]
    assert new == options.get("max_new_tokens", TAUGHT_END - START)
    assert caplog.messages == []


@pytest.mark.parametrize("own", [None, 64, 10_000])
@pytest.mark.parametrize("positions", [48, 512])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_answer_without_an_end_stays_within_the_positions(own: int | None, positions: int) -> None:
    tokenizer = byte_tokenizer(CHATML)
    model = certain_student(len(tokenizer), positions=positions, generation=generation_config(max_length=own))
    exported = exported_generation(model, tokenizer).config
    assert exported.max_length is None
    # A prompt of half the positions leaves room for it.
    assert exported.max_new_tokens == min(own if own is not None and own <= positions else positions, positions) // 2


def test_end_that_is_no_special_token_ends_and_stays_no_special_token(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.add_tokens([AddedToken("<turn_end>", special=False)])
    end = tokenizer.get_vocab()["<turn_end>"]
    model = certain_student(len(tokenizer))
    save_model(model, tokenizer, tmp_path, end_ids=[end])
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id[0] == end
    assert not saved.added_tokens_decoder[end].special
    text = "a<turn_end>b <|im_end|> <s>"
    assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_plain_text_that_ends_answers_ends_them_with_the_tokenizer_and_raises_without(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    own = generation_config(stop_strings=["an older end"], eos_token_id=90)
    model = certain_student(len(tokenizer), generation=own)
    end = str(tokenizer.decode([44, 45]))
    saved = save_model(model, tokenizer, tmp_path, end_ids=[90], stop_text=end)
    assert "stop_strings" not in saved.generation.left_out
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[30, 31, START]])
    arguments = {"attention_mask": torch.ones_like(prompt)}
    ids = read.generate(prompt, **arguments, tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    assert ids[0].tolist() == [30, 31, START, 41, 42, 43, 44, 45]
    with pytest.raises(ValueError, match="tokenizer"):
        read.generate(prompt, **arguments)


def test_a_student_taught_with_a_token_keeps_no_text_that_ended_its_answers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    model = certain_student(len(tokenizer), generation=generation_config(stop_strings=["an older end"]))
    saved = save_model(model, tokenizer, tmp_path, end_ids=[TAUGHT_END])
    assert saved.generation.left_out == ("stop_strings",)
    assert answer_of(tmp_path) == list(range(START + 1, TAUGHT_END + 1))


def test_config_and_generation_config_name_the_ends_that_evaluation_stops_at(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    model = certain_student(len(tokenizer), generation=generation_config(eos_token_id=[90, 91]))
    save_model(model, tokenizer, tmp_path, end_ids=[TAUGHT_END, 47])
    evaluated = {
        *stop_token_ids(model, tokenizer, GenerationSettings(8, 2, TAUGHT_END, Precision("fp32", torch.device("cpu")))),
        47,
    }
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read.generation_config.eos_token_id == read.config.eos_token_id
    assert set(read.config.eos_token_id) == evaluated
    assert read.config.eos_token_id[:2] == [TAUGHT_END, 47]


def test_saving_changes_neither_model_nor_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(CHATML)
    own = generation_config(eos_token_id=90, temperature=0.5)
    model = certain_student(len(tokenizer), generation=own)
    before = (model.generation_config.to_dict(), tokenizer.chat_template, tokenizer.pad_token_id)
    save_model(model, tokenizer, tmp_path, end_ids=[TAUGHT_END], chat_templates={"default": "{{ messages }}"})
    assert model.generation_config is own
    assert (model.generation_config.to_dict(), tokenizer.chat_template, tokenizer.pad_token_id) == before


def test_sampling_of_the_student_stays_and_what_is_left_out_is_named() -> None:
    tokenizer = byte_tokenizer(CHATML)
    own = generation_config(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.05, min_new_tokens=4, max_new_tokens=3
    )
    exported = exported_generation(certain_student(len(tokenizer), generation=own), tokenizer)
    kept = exported.config.to_diff_dict()
    assert (kept["do_sample"], kept["temperature"], kept["top_p"]) == (True, 0.6, 0.9)
    assert kept["repetition_penalty"] == 1.05
    assert exported.left_out == ("min_new_tokens",)


ids = st.one_of(st.none(), st.integers(-1, 70))


@given(own_pad=ids, tokenizer_pad=st.integers(0, 60), ends=st.lists(st.integers(0, 60), min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pad_token_is_no_taught_end_where_another_is_there(
    own_pad: int | None, tokenizer_pad: int, ends: list[int]
) -> None:
    tokenizer, model = TOKENIZER, MODEL
    tokenizer.pad_token_id = tokenizer_pad
    model.generation_config = generation_config(pad_token_id=own_pad)
    exported = exported_generation(model, tokenizer, end_ids=ends)
    pad = exported.pad_token_id
    assert pad is not None
    assert 0 <= pad < len(tokenizer)
    usable = {id_ for id_ in (own_pad, tokenizer_pad) if id_ is not None and id_ >= 0} - {tokenizer.bos_token_id}
    if usable - set(ends):
        assert pad in usable - set(ends)


TOKENIZER: PreTrainedTokenizerFast = byte_tokenizer(CHATML)
MODEL = certain_student(len(TOKENIZER))
