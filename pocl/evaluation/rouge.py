"""ROUGE-L F1 and exact match of an answer against its references.

ROUGE-L (Lin 2004) equals that of the package `rouge_score` with its stemmer, and takes a fraction of the time: words
are stemmed once, references are tokenised once, and the longest common subsequence is computed bit-parallel over small
integers.
"""

import re
import string
from collections.abc import Sequence
from itertools import count

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

_WORD = re.compile(r"[a-z0-9]+")
_MIN_STEMMED_LENGTH = 4
_MAX_CACHED_CHARACTERS = 1 << 23
_NO_WORD = 0
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
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
        stem = word if len(word) < _MIN_STEMMED_LENGTH else str(_stemmer.stem(word))
        number = self._stems.setdefault(stem, next(self._numbers)) if stem else _NO_WORD
        self[word] = number
        self.characters += len(word) + len(stem)
        return number

    def encode(self, text: str) -> list[int]:
        """The numbers of the words of a text."""
        return [number for word in _WORD.findall(text.lower()) if (number := self[word]) != _NO_WORD]

    def encode_reference(self, text: str) -> list[int]:
        """As :meth:`encode`, but cached: each evaluation has the same references."""
        numbers = self._references.get(text)
        if numbers is None:
            numbers = self._references[text] = self.encode(text)
            self.characters += len(text)
        return numbers


_lexicon = _Lexicon()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 from 0 to 100, the highest over the references; 0 where either side has no word.

    Words are runs of a-z and 0-9 after lower-casing; those longer than three characters are Porter-stemmed.

    Raises:
        ValueError: without a reference.
    """
    if not references:
        raise ValueError("rouge_l needs a reference")
    lexicon = _bounded_lexicon()
    predicted = lexicon.encode(prediction)
    return 100 * max(_f1(predicted, lexicon.encode_reference(reference)) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference but for case, ASCII punctuation and spacing.

    Raises:
        ValueError: without a reference.
    """
    if not references:
        raise ValueError("exact_match needs a reference")
    return _normalized(prediction) in map(_normalized, references)


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


def _normalized(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())
