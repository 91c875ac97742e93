"""A tokenizer as its tokenizer.json says, with what chat templates and generation ask of it.

transformers rebuilds some tokenizers from the class that tokenizer_config.json names, and then splits text by other
rules than those of tokenizer.json. Here the file alone says what the ids of a text are; the other files name special
tokens, templates and the tokens that end an answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import JsonValue
from tokenizers import AddedToken, Tokenizer


class TokenizedText(NamedTuple):
    """A text as token ids."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    """[start, stop) of each token, in characters of the text; tokens of one character share its offsets."""


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer with its special tokens and chat templates."""

    backend: Tokenizer = field(repr=False)
    """Without the rule that adds special tokens around a text, which would also trim offsets."""
    special_tokens: Mapping[str, str]
    """Special tokens as a template sees them, by their names: `bos_token`, `eos_token`, ..."""
    templates: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Chat templates by name; "default" is used unless another is named."""
    configured_end_ids: frozenset[int] = frozenset()
    """The tokens that end an answer by the model's generation config, or else by its config."""
    post_processor: Any = field(default=None, repr=False)
    """The rule that adds special tokens around a text, of `tokenizers.processors`; None where there is none."""
    settings: Mapping[str, JsonValue] = field(default_factory=dict, repr=False)
    """Entries of tokenizer_config.json that say nothing about ids, such as `model_max_length`."""

    @classmethod
    def from_backend(
        cls,
        backend: Tokenizer,
        special_tokens: Mapping[str, str],
        *,
        templates: Mapping[str, str] = MappingProxyType({}),
        configured_end_ids: Iterable[int] = (),
        settings: Mapping[str, JsonValue] = MappingProxyType({}),
    ) -> "TextTokenizer":
        """A tokenizer around `backend`, which is changed: truncation, padding and post-processing are taken off it."""
        backend.no_truncation()
        backend.no_padding()
        post_processor = backend.post_processor
        backend.post_processor = None
        return cls(
            backend,
            MappingProxyType(dict(special_tokens)),
            MappingProxyType(dict(templates)),
            frozenset(configured_end_ids),
            post_processor,
            MappingProxyType(dict(settings)),
        )

    def encode(self, text: str) -> TokenizedText:
        """The ids of `text` alone, without special tokens before or after."""
        return _tokenized(self.backend.encode(text, add_special_tokens=False))

    def encode_all(self, texts: Sequence[str]) -> list[TokenizedText]:
        """As :meth:`encode` of each text, faster."""
        return [_tokenized(encoding) for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_of(self, token: str) -> int | None:
        """The id of a token; None where the vocabulary lacks it."""
        return self.backend.token_to_id(token)

    def token_of(self, id_: int) -> str | None:
        """The token of an id, as the vocabulary spells it; None where there is none."""
        return self.backend.id_to_token(id_)

    @property
    def size(self) -> int:
        """The tokens of the vocabulary, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        """The id of every token, added tokens included."""
        return MappingProxyType(self.backend.get_vocab(with_added_tokens=True))

    @cached_property
    def added_tokens(self) -> Mapping[int, AddedToken]:
        """The tokens that are found in a text before it is split, special or not, by id."""
        return MappingProxyType(self.backend.get_added_tokens_decoder())

    @property
    def bos_id(self) -> int | None:
        """The begin-of-sequence token; None where there is none."""
        return self._special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The end-of-sequence token; None where there is none."""
        return self._special_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """The padding token; None where there is none."""
        return self._special_id("pad_token")

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends an answer by the model's files: those of the generation config, and `eos_id`."""
        return self.configured_end_ids | ({self.eos_id} if self.eos_id is not None else set())

    @cached_property
    def begin_ids(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer itself puts before a text."""
        if self.post_processor is None:
            return ()
        content = self.backend.encode("a", add_special_tokens=False)
        whole = self.post_processor.process(content, add_special_tokens=True).ids
        starts = range(len(whole) - len(content.ids) + 1)
        start = next((start for start in starts if whole[start : start + len(content.ids)] == content.ids), 0)
        return tuple(whole[:start])

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.id_of(token)


def _tokenized(encoding: Any) -> TokenizedText:  # Any: the library does not export the type of its encodings.
    return TokenizedText(tuple(encoding.ids), tuple(encoding.offsets))
