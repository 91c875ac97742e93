"""ROUGE-L against the package that defines it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pocl.evaluation import rouge
from pocl.evaluation.rouge import exact_match, rouge_l

SCORER = RougeScorer(["rougeL"], use_stemmer=True)
STEMS = ["relat", "nation", "happi", "run", "generous", "sky", "die", "lie", "oper", "feed", "agree", "motor"]
STEMS += ["care", "conflat", "activ", "form", "adjust", "depend"]
ENDINGS = [
    "",
    "s",
    "ed",
    "ing",
    "ness",
    "ly",
    "ies",
    "ational",
    "ization",
    "iveness",
    "y",
    "ement",
    "'s",
    "-",
    ".",
    ", ",
    "é",
]


SOUP = ["snake_case", "_x_", "3", "1984", "x2y", "naïve", "İstanbul", "\u212aelvin", "ﬁre", "don't", "U.S.A.", "²", "٣"]
SOUP += ["日本", "e-mail", "running", "runs", "ran", "RUNNER", "\n", "\u2028", "a", "the", "cats", "happiness", "ied"]
DOLLY = Path(__file__).resolve().parents[3] / "examples" / "dolly-short"


def expected(prediction: str, references: list[str]) -> float:
    return 100 * float(SCORER.score_multi(references, prediction)["rougeL"].fmeasure)


def sentence(rng: random.Random) -> str:
    words = [rng.choice(STEMS) + rng.choice(ENDINGS) for _ in range(rng.randint(0, 25))]
    return " ".join(word.upper() if rng.random() < 0.2 else word for word in words)


def test_rouge_l_equals_rouge_score_on_thousands_of_word_sequences() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        prediction, references = sentence(rng), [sentence(rng) for _ in range(rng.randint(1, 3))]
        assert rouge_l(prediction, references) == expected(prediction, references)


def test_rouge_l_equals_rouge_score_on_real_text() -> None:
    rows = [json.loads(line) for path in DOLLY.glob("*.jsonl") for line in path.read_text().splitlines()]
    texts = [row[field] for row in rows for field in ("instruction", "output")]
    assert len(texts) > 500
    rng = random.Random(0)
    for _ in range(400):
        # Halves have words in common with their whole.
        prediction, references = rng.choice(texts), [rng.choice(texts), rng.choice(texts)]
        if rng.random() < 0.5:
            prediction = references[0][: len(references[0]) // 2] + prediction
        assert rouge_l(prediction, references) == expected(prediction, references)


def test_rouge_l_equals_rouge_score_on_word_soup() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        prediction, reference = (" ".join(rng.choices(SOUP, k=rng.randint(0, 20))) for _ in range(2))
        assert rouge_l(prediction, [reference]) == expected(prediction, [reference])


def test_lexicon_cache_is_bounded_and_its_replacement_changes_no_score() -> None:
    rng = random.Random(2)
    pairs = [(sentence(rng), [sentence(rng)]) for _ in range(50)]
    before = [rouge_l(*pair) for pair in pairs]
    lexicon = rouge._lexicon
    for place in range(12):
        rouge_l("word", [f"{place} " + "x" * (1 << 20)])
    assert rouge._lexicon is not lexicon
    assert rouge._lexicon.characters < 1 << 24
    assert [rouge_l(*pair) for pair in pairs] == before


@given(st.text(max_size=60), st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_rouge_l_equals_rouge_score_on_any_text(prediction: str, references: list[str]) -> None:
    assert rouge_l(prediction, references) == expected(prediction, references)


@given(st.lists(st.text("abeginsty", max_size=12)), st.lists(st.text("abeginsty", max_size=12)))
def test_rouge_l_equals_rouge_score_on_words_that_are_stemmed(prediction: list[str], reference: list[str]) -> None:
    pair = " ".join(prediction), [" ".join(reference)]
    assert rouge_l(*pair) == expected(*pair)


@given(st.text(max_size=60), st.text(max_size=60))
def test_rouge_l_is_symmetric_and_between_0_and_100(one: str, other: str) -> None:
    assert 0 <= rouge_l(one, [other]) <= 100
    assert rouge_l(one, [other]) == pytest.approx(rouge_l(other, [one]))


def test_the_best_reference_counts() -> None:
    assert rouge_l("a red fox", ["nothing", "a red fox"]) == 100
    assert rouge_l("a red fox", ["a", "a red"]) == rouge_l("a red fox", ["a red"]) == 80


@pytest.mark.parametrize(("one", "other", "score"), [("his", "hi", 0), ("cats", "cat", 100), ("skies", "sky", 100)])
def test_words_of_more_than_three_letters_are_stemmed(one: str, other: str, score: float) -> None:
    assert rouge_l(one, [other]) == score == expected(one, [other])


@pytest.mark.parametrize(("prediction", "reference"), [("", "word"), ("word", ""), ("", ""), ("¿?", "word")])
def test_text_without_words_scores_zero(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, [reference]) == 0


def test_words_of_any_length_are_scored() -> None:
    endless = "ya" * 50_000
    assert rouge_l(endless, [endless]) == 100


@pytest.mark.parametrize("same", ["The answer", "the  ANSWER.", " the\nanswer! "])
def test_exact_match_ignores_case_punctuation_and_spacing(same: str) -> None:
    assert exact_match(same, ["other", "The answer."])


@pytest.mark.parametrize("other", ["answer", "the answers", "theanswer", ""])
def test_exact_match_requires_the_same_words(other: str) -> None:
    assert not exact_match(other, ["The answer."])


@pytest.mark.parametrize("score", [rouge_l, exact_match])
def test_missing_reference_is_refused(score: Callable[[str, list[str]], float]) -> None:
    with pytest.raises(ValueError, match="needs a reference"):
        score("word", [])
