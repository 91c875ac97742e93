"""Encoders for chat templates and tokenizers without models."""

import itertools
import re
from datetime import date
from typing import Any

from pocl.prompting.encoded_sample import EncodedSample
from pocl.prompting.encoding import SampleEncoder
from pocl.prompting.template_choice import make_encoder
from pocl.prompting.template_process import answer
from pocl.prompting.text_tokenizer import TextTokenizer
from pocl.samples.sample import Message, Role, Sample
from pocl.spec import Data, DataRef

DAY = date(2024, 5, 6)


def encoder_of(tokenizer: TextTokenizer, **data: Any) -> SampleEncoder:  # Any: fields of Data.
    """The encoder for the tokenizer's chat template; `data` are fields of the specification."""
    lengths = {"max_length": 5000, "max_prompt_length": 4000}
    spec = Data(train=DataRef(path="x"), **{"template": "chat", "date": DAY, **lengths, **data})
    return make_encoder(spec, tokenizer, answer)


def with_day(source: str, day: date = DAY) -> str:
    """The template with a day in place of today."""
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda call: repr(day.strftime(call[2])), source)


def talk(*contents: str, system: str | None = None) -> Sample:
    """A conversation: a user and the assistant in turns."""
    roles: tuple[Role, Role] = ("user", "assistant")
    head = [] if system is None else [Message("system", system)]
    return Sample((*head, *(Message(roles[index % 2], content) for index, content in enumerate(contents))))


def pieces(encoded: EncodedSample, tokenizer: TextTokenizer) -> list[str]:
    """The text of the prompt, the first response, what stands behind it, the second response, and so on."""
    borders = [0, *(place for span in encoded.response_spans for place in span), len(encoded.input_ids)]
    return [tokenizer.decode(encoded.input_ids[start:stop]) for start, stop in itertools.pairwise(borders)]
