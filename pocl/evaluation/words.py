"""The words of a text in any script, as ROUGE-L compares them.

Latin: runs of a-z and 0-9 of the lower-cased text, as the package `rouge_score` has them; every other Latin letter
separates words there, and so it does here. What stands beside Latin text changes none of its words.

Scripts that put spaces between words (Cyrillic, Greek, Arabic, Hebrew, Devanagari, Hangul and all not named below):
runs of letters with their marks, and digits. They are compared without case, in normal form C, without presentation
forms, and without what writers may leave out: Arabic and Hebrew vowel points, the tatweel, joiners and other invisible
characters. Apostrophes and hyphens separate words, as they do in Latin text.

Scripts that are written without spaces (Unicode Standard Annex 14 breaks their lines by rules of their own): each
letter with its marks. Words would need a dictionary for each language, and a score would depend on its version; BLEU is
computed over characters there too (the tokenizers `zh` and `char` of sacreBLEU).

Signs and emoji are no words. A text without a word is compared by those of its characters that are letters, symbols or
numbers beyond ASCII, so that an answer of one accented letter, of emoji or of a fraction alone equals itself;
`rouge_score` gives it 0.
"""

import re
import unicodedata
from typing import Final

import regex

_UNSPACED: Final = "".join(
    rf"\p{{{script}}}"
    for script in (
        *("Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Tangut", "Nushu"),
        *("Thai", "Lao", "Khmer", "Myanmar", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Ahom"),
        *("Balinese", "Batak", "Buginese", "Javanese"),
    )
)
"""The scripts without spaces; the long vowel mark of kana and its narrow form belong to no script by themselves."""
_WIDE_LATIN: Final = r"\uff10-\uff19\uff21-\uff3a\uff41-\uff5a"
"""Letters and digits of double width, which stand in East Asian text."""
_NOT_LATIN: Final = (
    rf"[[\p{{L}}\p{{Nd}}\p{{Nl}}]--[\p{{Latin}}\p{{Common}}\p{{Inherited}}0-9]]|[\u30fc\uff70{_WIDE_LATIN}]"
)
_LATIN_WORD: Final = re.compile(r"[a-z0-9]+")
_HAS_OTHER_WORD: Final = regex.compile(_NOT_LATIN, regex.V1)
_RUN: Final = regex.compile(
    rf"[a-z0-9]+|(?:{_NOT_LATIN})(?:{_NOT_LATIN}|[\p{{M}}\p{{Cf}}\u0640\uff9e\uff9f])*", regex.V1
)
"""A Latin word, or a run of words of other scripts without anything between them."""
_WORD: Final = regex.compile(
    rf"[a-z0-9]+|[[{_UNSPACED}\u30fc]&&[\p{{L}}\p{{Nl}}]]\p{{M}}*|[^a-z0-9[[{_UNSPACED}\u30fc]&&[\p{{L}}\p{{Nl}}]]]+",
    regex.V1,
)
_PRESENTATION_FORMS: Final = regex.compile(r"[\ufb1d-\ufdff\ufe70-\ufefc\uff01-\uffee]+")
"""Shapes of letters that have a code of their own: Hebrew and Arabic ones, and those of double or half width."""
_OPTIONAL: Final = regex.compile(
    r"[\p{Cf}\ufe00-\ufe0f\u0640\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7"
    r"\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06ed]+"
)
"""Invisible characters, variation selectors, the tatweel, Hebrew points and accents, Arabic vowel points."""
_OTHER_CHARACTER: Final = regex.compile(r"[[\p{L}\p{S}\p{N}]--[\x00-\x7f]]\p{M}*", regex.V1)
"""A letter, symbol or number beyond ASCII with its marks. Folding comes later: it makes ASCII of some, as of ß."""


def split_words(text: str) -> list[str]:
    """The words of a text, in their order; see above for what a word is."""
    lowered = text.lower()
    if lowered.isascii() or not _HAS_OTHER_WORD.search(lowered):
        words = _LATIN_WORD.findall(lowered)
    else:
        words = []
        for run in _RUN.findall(lowered):
            words += [run] if run.isascii() else _WORD.findall(fold(run))
    return words or [
        folded for each in _OTHER_CHARACTER.findall(unicodedata.normalize("NFC", text)) if (folded := fold(each))
    ]


def fold(text: str) -> str:
    """The text without what never tells two spellings apart: case, presentation forms and optional characters."""
    if text.isascii():
        return text.lower()
    text = _PRESENTATION_FORMS.sub(lambda forms: unicodedata.normalize("NFKC", forms[0]), text)
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return str(_OPTIONAL.sub("", folded))
