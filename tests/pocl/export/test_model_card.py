"""The model card is valid for the Hub, says what was trained from what, and names nothing of a machine."""

from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from pocl.events import Evaluated
from pocl.export.model_card import CardFacts, ExportedModel, Progress, SamplesUsed, TrainedStage, code, model_card
from pocl.inspect.licence import read_licence
from pocl.plan import stage_table
from pocl.spec import JS, AllSamples, ForwardKL, resolve

SPEC = resolve(
    {
        "preset": "quick",
        "teacher": {"path": "/srv/secret/teacher"},
        "student": {"path": "/srv/secret/student"},
        "data": {"train": {"path": "/srv/secret/rows.jsonl"}},
        "curriculum": {"stages": 2},
    }
)
DIGEST = "ab" * 32
MODEL = ExportedModel("transformers>=4.57", "float32", True, ["<|im_end|>"], ["min_length"], True)
TRAINED = TrainedStage(1.0, 0.7, ForwardKL(), 3, SPEC.recipe_digest)
SCORES = [
    Evaluated(subject="initial", rows=6, rouge_l=1.5, exact_match=0, cross_entropy=4.25),
    Evaluated(
        subject="stage", stage=0, step=3, rows=6, rouge_l=20.25, exact_match=1, cross_entropy=2.5, divergence=0.5
    ),
]


def origin(kind: str = "path", name: str = "base", **more: str) -> dict[str, str | None]:
    return {"kind": kind, "name": name, "digest": DIGEST, **more}


def card_of(student: dict[str, str | None], teacher: dict[str, str | None] | None) -> str:
    facts = CardFacts(SPEC, stage_table(SPEC, 12), student, teacher, "chat", [SamplesUsed("train", 12, DIGEST)])
    return model_card(facts, MODEL, Progress(3, [TRAINED], SCORES))


def front_matter(card: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return read


def test_card_says_what_was_trained_from_what() -> None:
    card = card_of(origin(), origin(name="big", license="apache-2.0"))
    for text in (
        "forward_kl",
        "`big`",
        DIGEST,
        "| 1 | `forward_kl` | 6 |",
        "20.25",
        "4.2500",
        "transformers>=4.57",
        "`<|im_end|>`",
    ):
        assert text.replace("|im_end|", "?im_end?") in card
    assert "/srv" not in card
    assert "secret" not in card
    assert card == card_of(origin(), origin(name="big", license="apache-2.0"))


def test_card_says_how_to_read_a_tokenizer_that_its_family_would_rebuild() -> None:
    facts = CardFacts(SPEC, stage_table(SPEC, 12), origin(), None, "chat", [])
    cards = [
        model_card(facts, replace(MODEL, needs_generic_tokenizer=needed), Progress(0, [], []))
        for needed in (False, True)
    ]
    assert ["PreTrainedTokenizerFast" in card for card in cards] == [False, True]


def test_card_attributes_each_stage_to_its_method_and_names_a_control() -> None:
    spec = SPEC.with_fields({"curriculum": {"control": AllSamples(kind="all_samples")}})
    facts = CardFacts(spec, stage_table(spec, 12), origin(), origin(), "chat", [])
    inherited = TrainedStage(3.5, 0.25, JS(beta=0.1), 7, "another recipe")
    card = model_card(facts, MODEL, Progress(7, [inherited], []))
    assert "| 1 | `js (beta 0.1)` | 12 | 3.5 | 0.25 | 7 | yes |" in card
    assert "| 2 | `forward_kl` | 12 | 2 | 1 | 2 | no |" in card
    assert "1 of the stages were trained by the run that this one branched from" in card
    assert "Control experiment all_samples: each stage takes all samples." in card
    assert "ontrol" not in card_of(origin(), origin())
    assert "branched" not in card_of(origin(), origin())


def test_hub_reads_the_front_matter() -> None:
    student = origin("hub", "owner/base", revision="main", commit="c" * 40, license="mit")
    data: Any = ModelCard(card_of(student, origin(license="mit"))).data
    read = data.to_dict()
    assert (read["base_model"], read["license"], read["library_name"]) == ("owner/base", "mit", "transformers")


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ({}, {}, None),
        ({"license": "mit"}, {}, "mit"),
        ({}, {"license": "other", "license_name": "llama3"}, "other"),
        ({"license": "mit"}, {"license": "apache-2.0"}, "other"),
    ],
)
def test_licence_in_front_matter_is_that_of_both(
    student: dict[str, str], teacher: dict[str, str], expected: str | None
) -> None:
    card = card_of(origin(**student), origin(**teacher))
    assert front_matter(card).get("license") == expected
    assert all(f"`{value}`" in card for value in (*student.values(), *teacher.values()))


@given(st.text(max_size=40))
@settings(max_examples=30)
def test_name_of_others_stays_text(name: str) -> None:
    plain = code(name)
    assert "\n" not in plain
    assert plain.strip("`").count("`") == 0
    card = card_of(origin(name=name), None)
    assert len(card.splitlines()) == len(card_of(origin(name="base"), None).splitlines())


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("---\nlicense: llama3.1\nlicense_name: x\n---\n# A model", {"license": "llama3.1", "license_name": "x"}),
        ("---\r\nlicense: [mit, apache-2.0]\r\n---\r\n", {"license": "mit, apache-2.0"}),
        ("---\nlicense: {a: 1}\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("# license: mit", {}),
        ("---\nlicense: " + "x" * 300 + "\n---\n", {}),
        ("---\nx: " + "[" * 60_000 + "\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\nlicense:\n- mit\n- bsd\ntags:\n- a\n---\n", {"license": "mit, bsd"}),
        ("", {}),
    ],
)
def test_licence_is_read_from_a_card_where_it_states_one(text: str, stated: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text, newline="")
    assert read_licence(tmp_path) == stated


def test_model_without_a_card_states_no_licence(tmp_path: Path) -> None:
    assert read_licence(tmp_path) == {}


@pytest.mark.parametrize("system", ["Be brief.", "Line one\n```\nline two", "`" * 7, "### Input:\n| a |"])
def test_card_has_what_of_the_prompts_stands_in_no_other_file(system: str) -> None:
    spec = resolve(SPEC.model_dump(mode="json") | {"data": {"train": {"path": "rows.jsonl"}, "system": system}})
    spec = spec.with_day(date(2026, 1, 2))
    for template, place in (("chat", "after an empty line"), ("alpaca", "`### Input:`")):
        facts = CardFacts(spec, stage_table(spec, 12), origin(), None, template, [])
        card = model_card(facts, MODEL, Progress(0, [], []))
        assert place in card
        assert "2026-01-02" in card
        fence, after = next((line, index) for index, line in enumerate(card.split("\n")) if line.endswith("`text"))
        lines = card.split("\n")[after + 1 :]
        # The block ends at the first line that is its fence, and holds the message as it is.
        assert "\n".join(lines[: lines.index(fence.removesuffix("text"))]) == system


def test_card_has_no_system_message_where_none_was_added() -> None:
    assert "```" not in card_of(origin(), None)
