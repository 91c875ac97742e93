"""ROUGE-L F1 and exact match of an answer against its references, in any script.

ROUGE-L (Lin 2004) of Latin text equals that of the package `rouge_score` with its stemmer, and takes a fraction of the
time: words are stemmed once, references are tokenised once, and the longest common subsequence is computed bit-parallel
over small integers. :mod:`pocl.evaluation.words` says what the words of other scripts are.

Exact match normalises as the evaluation of SQuAD does (Rajpurkar et al. 2016), and in other scripts as that of MLQA
(Lewis et al. 2020): punctuation of Unicode instead of that of ASCII.
"""

import string
import sys
import unicodedata
from collections.abc import Sequence
from itertools import count
from typing import Final

import regex
from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

from pocl.evaluation.words import fold, split_words

METRICS_VERSION: Final = 3
"""Version of both metrics; to be raised when equal texts get other scores: stored scores are computed anew then."""
_MIN_STEMMED_LENGTH = 4
_MAX_CACHED_CHARACTERS = 1 << 23
_NO_WORD = 0
_NO_PUNCTUATION = dict.fromkeys(
    {ord(sign) for sign in string.punctuation}
    | {code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("P")}
)
_ARTICLE = regex.compile(r"\b(?:a|an|the)\b")
_BEYOND_ENGLISH = regex.compile(r"[\p{L}--[a-z]]", regex.V1)
_stemmer = PorterStemmer()


class _Lexicon(dict[str, int]):
    """A cache of word numbers, equal for words of one stem, and of references as sequences of those numbers."""

    def __init__(self) -> None:
        super().__init__()
        self._stems: dict[str, int] = {}
        self._references: dict[str, list[int]] = {}
        self._numbers = count(_NO_WORD + 1)
        self.characters = 0
        """The characters of all cached words and references."""

    def __missing__(self, word: str) -> int:
        is_stemmed = len(word) >= _MIN_STEMMED_LENGTH and word.isascii()
        stem = str(_stemmer.stem(word)) if is_stemmed else word
        number = self._stems.setdefault(stem, next(self._numbers)) if stem else _NO_WORD
        self[word] = number
        self.characters += len(word) + len(stem)
        return number

    def encode(self, text: str) -> list[int]:
        """The numbers of the words of a text."""
        return [number for word in split_words(text) if (number := self[word]) != _NO_WORD]

    def encode_reference(self, text: str) -> list[int]:
        """As :meth:`encode`, but cached: each evaluation has the same references."""
        numbers = self._references.get(text)
        if numbers is None:
            numbers = self._references[text] = self.encode(text)
            self.characters += len(text)
        return numbers


_lexicon = _Lexicon()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 from 0 to 100, the highest over the references; 0 where either side is blank.

    Latin words longer than three characters are Porter-stemmed.

    Raises:
        ValueError: without a reference.
    """
    if not references:
        raise ValueError("rouge_l needs a reference")
    lexicon = _bounded_lexicon()
    predicted = lexicon.encode(prediction)
    return 100 * max(_f1(predicted, lexicon.encode_reference(reference)) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference but for case, punctuation, spacing and English articles.

    Articles are left out where both texts have no letter but a to z. A text of signs alone, of which nothing is left,
    equals only the same signs: an empty answer does not match a reference of signs.

    Raises:
        ValueError: without a reference.
    """
    if not references:
        raise ValueError("exact_match needs a reference")
    return any(_match(prediction, reference) for reference in references)


def _bounded_lexicon() -> _Lexicon:
    """The lexicon for one whole call, replaced once it is too large: numbers of two lexicons cannot be compared."""
    global _lexicon
    if _lexicon.characters > _MAX_CACHED_CHARACTERS:
        _lexicon = _Lexicon()
    return _lexicon


def _f1(predicted: list[int], reference: list[int]) -> float:
    if not predicted or not reference:
        return 0.0
    common = LCSseq.similarity(predicted, reference)
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _match(one: str, other: str) -> bool:
    first, second = _without_punctuation(one), _without_punctuation(other)
    if not _BEYOND_ENGLISH.search(first) and not _BEYOND_ENGLISH.search(second):
        first, second = (_single_spaced(_ARTICLE.sub(" ", text)) for text in (first, second))
    if not first and not second:
        first, second = (_single_spaced(fold(text)) for text in (one, other))
    return first == second


def _without_punctuation(text: str) -> str:
    return _single_spaced(fold(text).translate(_NO_PUNCTUATION))


def _single_spaced(text: str) -> str:
    return " ".join(text.split())
