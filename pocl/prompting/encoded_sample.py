"""A sample as token ids with its response tokens marked."""

import hashlib
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class EncodedSample:
    """One sample as token ids: a prompt, its response, and what the template writes behind it."""

    digest: str
    """SHA-256 of the sample that was encoded."""
    input_ids: tuple[int, ...]
    prompt_length: int
    """Tokens before the last turn's response."""
    earlier_spans: tuple[tuple[int, int], ...] = ()
    """[start, stop) of the responses of earlier turns; they lie inside the prompt."""
    trailing_tokens: int = 0
    """Tokens of the template behind the last response, such as a newline after the end of turn; never labelled."""

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 over token ids and label mask; a model cannot tell samples of equal digest apart."""
        return hashlib.sha256(f"{self.input_ids} {self.response_spans}".encode()).hexdigest()

    @property
    def response_stop(self) -> int:
        """The position behind the last turn's response."""
        return len(self.input_ids) - self.trailing_tokens

    @property
    def response_spans(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of the responses that are trained on, of all turns; the last turn's is always one of them."""
        return (*self.earlier_spans, (self.prompt_length, self.response_stop))

    @property
    def predicted_tokens(self) -> int:
        """Number of response tokens that some position predicts; no position predicts a sample's first token."""
        return sum(stop - max(start, 1) for start, stop in self.response_spans if stop > max(start, 1))

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What generation of the last turn starts from; always the beginning of `input_ids`."""
        return self.input_ids[: self.prompt_length]

    @property
    def reference_ids(self) -> tuple[int, ...]:
        """The last turn's response, with its end token unless it was cut."""
        return self.input_ids[self.prompt_length : self.response_stop]

    @property
    def label_mask(self) -> tuple[bool, ...]:
        """For each token whether it is a response token that is trained on, its end token included."""
        mask = [False] * len(self.input_ids)
        for start, stop in self.response_spans:
            mask[start:stop] = [True] * (stop - start)
        return tuple(mask)
