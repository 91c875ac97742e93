"""ROUGE-L F1 and exact match of an answer against its references.

ROUGE-L (Lin 2004) gives the very numbers of the package `rouge_score` with its stemmer, several times
faster: stems are remembered, and the longest common subsequence is computed bit-parallel.
"""

import re
import string
from collections.abc import Sequence
from functools import lru_cache

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

_WORD = re.compile(r"[a-z0-9]+")
_SHORTEST_STEMMED = 4
_STEMS_REMEMBERED = 1 << 17
_LONGEST_REMEMBERED = 32
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_stemmer = PorterStemmer()


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 from 0 to 100, the highest over the references; 0 where either side has no word.

    Words are runs of a-z and 0-9 after lower-casing; those longer than three characters are Porter-stemmed.

    Raises:
        ValueError: without a reference.
    """
    if not references:
        raise ValueError("rouge_l needs a reference")
    # Numbered per call: small integers compare fastest, and no table grows without bound.
    numbers: dict[str, int] = {}
    predicted = _numbered(prediction, numbers)
    return 100 * max(_f1(predicted, _numbered(reference, numbers)) for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> bool:
    """Whether the prediction equals a reference but for case, ASCII punctuation and spacing.

    Raises:
        ValueError: without a reference.
    """
    if not references:
        raise ValueError("exact_match needs a reference")
    return _bare(prediction) in map(_bare, references)


def _numbered(text: str, numbers: dict[str, int]) -> list[int]:
    return [numbers.setdefault(stem, len(numbers)) for stem in map(_stem, _WORD.findall(text.lower())) if stem]


def _stem(word: str) -> str:
    if len(word) < _SHORTEST_STEMMED:
        return word
    return _remembered_stem(word) if len(word) <= _LONGEST_REMEMBERED else _stemmed(word)


def _stemmed(word: str) -> str:
    return str(_stemmer.stem(word))


# Only words of ordinary length are kept, so the memory is bounded too, not just the number of entries.
_remembered_stem = lru_cache(maxsize=_STEMS_REMEMBERED)(_stemmed)


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
