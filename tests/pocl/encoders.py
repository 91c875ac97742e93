"""Samples as tokens of small real tokenizers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerFast

from pocl.models.tokenizers import text_tokenizer
from pocl.prompting.encoded_sample import EncodedSample
from pocl.prompting.template_choice import make_encoder
from pocl.prompting.template_process import answer
from pocl.samples.sample import Message, Sample
from pocl.spec import Data, DataRef
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer

PLAIN = byte_tokenizer()
CHAT = byte_tokenizer(CHATML)
BEGINS = byte_tokenizer(begins=True)
END = CHAT.eos_token_id


def encode_with(
    sample: Sample,
    template: Literal["chat", "alpaca"] = "chat",
    *,
    length: int = 10_000,
    prompt: int = 9_000,
    begins: bool = False,
) -> EncodedSample:
    tokenizer = CHAT if template == "chat" else BEGINS if begins else PLAIN
    encoder = make_encoder(Data(train=DataRef(path="x"), template=template), text_tokenizer(tokenizer), answer)
    return replace(encoder, max_length=length, max_prompt_length=prompt).encode([sample]).samples[0]


def decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerFast = CHAT) -> str:
    found = tokenizer.decode(list(ids))
    assert isinstance(found, str)
    return found


def say(instruction: str, output: str) -> Sample:
    return Sample((Message("user", instruction), Message("assistant", output)))


TALK = Sample(
    (
        Message("user", "Why?"),
        Message("assistant", "Because."),
        Message("user", "Really?"),
        Message("assistant", "Yes."),
    )
)
