"""ROUGE-L F1 and exact match of an answer against its references.

ROUGE-L (Lin 2004) gives the very numbers of the package `rouge_score` with its stemmer, many times
faster: words are stemmed once, references are read once, and the longest common subsequence is computed
bit-parallel over small integers.
"""

import re
import string
from collections.abc import Sequence
from itertools import count

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

_WORD = re.compile(r"[a-z0-9]+")
_SHORTEST_STEMMED = 4
_CHARACTERS_REMEMBERED = 1 << 23
_NO_WORD = 0
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_stemmer = PorterStemmer()


class _Lexicon(dict[str, int]):
    """Words as numbers, equal for words of one stem; and whole references as sequences of those."""

    def __init__(self) -> None:
        super().__init__()
        self._stems: dict[str, int] = {}
        self._references: dict[str, list[int]] = {}
        self._numbers = count(_NO_WORD + 1)
        self.characters = 0
        """Of the words and references held."""

    def __missing__(self, word: str) -> int:
        stem = word if len(word) < _SHORTEST_STEMMED else str(_stemmer.stem(word))
        number = self._stems.setdefault(stem, next(self._numbers)) if stem else _NO_WORD
        self[word] = number
        self.characters += len(word) + len(stem)
        return number

    def read(self, text: str) -> list[int]:
        """The numbers of a text's words."""
        return [number for word in _WORD.findall(text.lower()) if (number := self[word]) != _NO_WORD]

    def read_reference(self, text: str) -> list[int]:
        """As :meth:`read`, remembered: the same references come back at each evaluation."""
        numbers = self._references.get(text)
        if numbers is None:
            numbers = self._references[text] = self.read(text)
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
    predicted = lexicon.read(prediction)
    return 100 * max(_f1(predicted, lexicon.read_reference(reference)) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference but for case, ASCII punctuation and spacing.

    Raises:
        ValueError: without a reference.
    """
    if not references:
        raise ValueError("exact_match needs a reference")
    return _bare(prediction) in map(_bare, references)


def _bounded_lexicon() -> _Lexicon:
    """One lexicon for the whole of a call: a new one once the old holds too much, since numbers cannot be mixed."""
    global _lexicon
    if _lexicon.characters > _CHARACTERS_REMEMBERED:
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


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())
