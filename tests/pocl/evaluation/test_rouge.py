"""ROUGE-L against the package that defines it, and its laws in other scripts; exact match."""

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pocl.evaluation import rouge
from pocl.evaluation.rouge import exact_match, rouge_l
from pocl.evaluation.words import split_words

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


SOUP = ["snake_case", "_x_", "3", "1984", "x2y", "naïve", "İstanbul", "\u212aelvin", "ﬁre", "don't", "U.S.A.", "²", "½"]
SOUP += ["Öl", "e-mail", "running", "runs", "ran", "RUNNER", "\n", "\u2028", "a", "the", "cats", "happiness", "ied"]
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


def latin_texts() -> st.SearchStrategy[str]:
    """Texts whose letters are all Latin, most of them beyond a-z, with signs, and one word at least."""
    accented = st.characters(min_codepoint=0xC0, max_codepoint=0x24F, categories=["L"])
    signs = st.characters(categories=["P", "S", "Z", "No", "Mn"], max_codepoint=0x2FFF)
    texts = st.text(accented | signs | st.characters(max_codepoint=0x7F), max_size=60)
    return texts.filter(lambda text: expected(text, [text]) > 0)


@given(latin_texts(), st.lists(latin_texts(), min_size=1, max_size=3))
def test_rouge_l_equals_rouge_score_on_any_latin_text(prediction: str, references: list[str]) -> None:
    assert rouge_l(prediction, references) == expected(prediction, references)


@given(st.text(st.characters(max_codepoint=0x7F)), st.text(st.characters(max_codepoint=0x7F)))
def test_rouge_l_equals_rouge_score_on_any_ascii_text(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, [reference]) == expected(prediction, [reference])


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


SENTENCES = {
    "Arabic": ("القطة تجلس على السجادة الحمراء", 5),
    "Armenian": ("Կատուն նստած է կարմիր գորգի վրա", 6),
    "Bengali": ("বিড়ালটি লাল মাদুরে বসে আছে", 5),
    "Burmese": ("ကြောင်သည် ဖျာပေါ်တွင်ထိုင်သည်", None),
    "Chinese": ("猫坐在红色的垫子上。", None),
    "Devanagari": ("बिल्ली लाल चटाई पर बैठी है।", 6),
    "Ethiopic": ("ድመቷ፡ቀይ፡ምንጣፍ፡ላይ፡ተቀምጣለች", 5),
    "Georgian": ("კატა წითელ ხალიჩაზე ზის", 4),
    "Greek": ("η γάτα κάθεται στο κόκκινο χαλί.", 6),
    "Hebrew": ("החתול יושב על השטיח האדום", 5),
    "Japanese": ("猫は赤いマットに座っている", None),
    "Khmer": ("ឆ្មាអង្គុយលើកន្ទេល", None),
    "Korean": ("고양이가 빨간 매트 위에 앉아 있다", 6),
    "Lao": ("ແມວນັ່ງຢູ່ເທິງເສື່ອ", None),
    "Latin beyond ASCII": ("ə à ø", 3),
    "Persian": ("گربه روی فرش قرمز نشسته است", 6),
    "Russian": ("Кошка сидит на красном коврике", 5),
    "Tamil": ("பூனை சிவப்பு பாயில் அமர்ந்திருக்கிறது", 4),
    "Thai": ("แมวนั่งบนเสื่อ", None),
    "Tibetan": ("ཞི་མི་གདན་སྟེང་དུ་བསྡད", 6),
    "emoji": ("👍 🎉", 2),
}
"""A sentence in each script, and how many words it has; None for scripts without spaces."""


@pytest.mark.parametrize("script", SENTENCES)
def test_identical_texts_score_100_in_every_script_and_half_a_text_less(script: str) -> None:
    sentence, count = SENTENCES[script]
    letters = sum(unicodedata.category(character).startswith("L") for character in sentence)
    assert len(split_words(sentence)) == (letters if count is None else count)
    assert rouge_l(sentence, [sentence]) == 100
    half = sentence[: len(sentence) // 2]
    assert 0 < rouge_l(half, [sentence]) < 100
    assert rouge_l(sentence, ["something else"]) == 0


@given(st.text(st.characters(categories=["L", "So", "No"]), min_size=1), st.text())
@example(text="ß", other="")  # What folding makes of these is ASCII.
@example(text="\u017f", other="?")
@example(text="½", other="")
@example(text="①②", other="!")
@example(text="👍🏽", other="")
def test_any_text_of_letters_or_symbols_equals_itself_whatever_stands_beside_it(text: str, other: str) -> None:
    assert rouge_l(text, [text]) == 100
    assert rouge_l(f"{other} {text}", [f"{other} {text}"]) == 100


@given(st.permutations(["γάτα", "кот", "猫", "บ้าน", "cat", "고양이"]), st.text(max_size=30))
def test_scores_do_not_depend_on_the_order_in_which_they_are_computed(words: list[str], other: str) -> None:
    texts = [*words, " ".join(words), other]
    pairs = [(one, [two]) for one in texts for two in texts]
    forward = [rouge_l(*pair) for pair in pairs]
    assert [rouge_l(*pair) for pair in reversed(pairs)] == forward[::-1]


@pytest.mark.parametrize("script", sorted(SENTENCES.keys() - {"Latin beyond ASCII"}))
def test_normal_forms_do_not_matter_beyond_latin(script: str) -> None:
    sentence, _ = SENTENCES[script]
    assert rouge_l(unicodedata.normalize("NFD", sentence), [unicodedata.normalize("NFC", sentence)]) == 100


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ПРИВЕТ", "привет"),
        ("ΓΆΤΑΣ", "γάτας"),
        ("اَلْعَرَبِيَّةُ", "العربية"),
        ("العـــربية", "العربية"),
        ("שָׁלוֹם", "שלום"),
        ("ﾃﾞｰﾀ", "データ"),
        ("ＡＢＣ１２３の", "abc123の"),
        ("می‌خواهم", "میخواهم"),
        ("ﻣﺮﺣﺒﺎ", "مرحبا"),
        ("‏שלום‏", "שלום"),
        ("❤️", "❤"),
    ],
)
def test_spellings_of_one_word_are_one_word(one: str, other: str) -> None:
    assert rouge_l(one, [other]) == 100


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("iPhone을 2024年に買った", ["iphone", "을", "2024", "年", "に", "買", "っ", "た"]),
        ("модель GPT-4", ["модель", "gpt", "4"]),
        ("hindi हिन्दी में", ["hindi", "हिन्दी", "में"]),
        ("great 👍", ["great"]),
        ("बच्चे ३ थे", ["बच्चे", "३", "थे"]),
    ],
)
def test_words_of_mixed_scripts(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [("", "word"), ("word", ""), ("", ""), ("¿?", "word"), ("", "猫"), (".", "."), ("\u200b", "\u200b")],
)
def test_text_without_words_scores_zero(prediction: str, reference: str) -> None:
    assert rouge_l(prediction, [reference]) == 0


def test_words_of_any_length_are_scored() -> None:
    endless = "ya" * 50_000
    assert rouge_l(endless, [endless]) == 100


@pytest.mark.parametrize("same", ["The answer", "the  ANSWER.", " the\nanswer! ", "answer", "“An answer”"])
def test_exact_match_ignores_case_punctuation_spacing_and_articles(same: str) -> None:
    assert exact_match(same, ["other", "The answer."])


@pytest.mark.parametrize("other", ["an answer to it", "the answers", "theanswer", "", "the", "."])
def test_exact_match_requires_the_same_words(other: str) -> None:
    assert not exact_match(other, ["The answer."])


@pytest.mark.parametrize(
    ("one", "other"), [("", "..."), ("", "?!"), ("!", "?"), ("", ":-)"), ("the", "A"), ("the", ".")]
)
def test_texts_of_which_normalisation_leaves_nothing_match_only_themselves(one: str, other: str) -> None:
    assert not exact_match(one, [other])
    assert not exact_match(other, [one])
    assert exact_match(other, [other])
    assert exact_match(f" {other.upper()}\n", [other])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("蓝色。", "蓝色", True),
        ("«Мир!»", "мир", True),
        ("Straße", "STRASSE", True),
        ("है।", "है", True),
        ("café", "cafe", False),
        ("10²", "102", False),
        ("il y a une île", "il y une île", False),
        ("a 猫", "猫", False),
    ],
)
def test_exact_match_knows_punctuation_of_every_script_and_articles_of_english_alone(
    one: str, other: str, same: bool
) -> None:
    assert exact_match(one, [other]) is exact_match(other, [one]) is same


@given(st.text())
def test_any_text_matches_itself(text: str) -> None:
    assert exact_match(text, [text])


@pytest.mark.parametrize("score", [rouge_l, exact_match])
def test_missing_reference_is_refused(score: Callable[[str, list[str]], float]) -> None:
    with pytest.raises(ValueError, match="needs a reference"):
        score("word", [])
