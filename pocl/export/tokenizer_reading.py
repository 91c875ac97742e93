"""Whether the tokenizer of an exported directory is read as it was written.

`AutoTokenizer` takes the tokenizer class of some families (Qwen2, Phi-3, ...) whatever the files say, and that class
builds rules of its own out of the vocabulary. A student whose tokens come by other rules must be read another way.
"""

import hashlib
import tempfile
from pathlib import Path
from typing import Final

import transformers
from pydantic import BaseModel, ConfigDict
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pocl.export.compatibility import write_tokenizer_config

PROBE_TEXTS: Final = (
    "The year 2026, at 3.14 kg; I'd say it's \u00bdof 1,234,567!",
    "  leading,  doubled and trailing  ",
    "\n\n\tdef f(x):\n    return {'a': [x**2]}\n",
    "naïve Straße İstanbul Привет مرحبا नमस्ते",
    "今天天气很好。 こんにちは 한국어 \U0001f469\u200d\U0001f4bb",
    "<|im_start|>user\n<s>[INST] x [/INST]</s><think>y</think>",
)
"""Words, numbers, spaces, code, several scripts and control tokens."""


class TokenizerTrial(BaseModel):
    """What trying an exported tokenizer found; the training state keeps it, since a trial takes seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: str
    """SHA-256, hexadecimal, over all that it follows from."""
    is_read_as_written: bool
    """Whether `AutoTokenizer` gives the same ids."""


def try_tokenizer(
    tokenizer: PreTrainedTokenizerBase, digest: str, config: PreTrainedConfig, earlier: TokenizerTrial | None
) -> TokenizerTrial:
    """Try a tokenizer beside the config that it is saved with, unless `earlier` was a trial of just these.

    Args:
        digest: Of the tokenizer, as :func:`~pocl.models.digest.tokenizer_digest` gives it.
    """
    parts = (digest, type(tokenizer).__name__, config.to_json_string(), transformers.__version__)
    inputs = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    if earlier is not None and earlier.inputs == inputs:
        return earlier
    return TokenizerTrial(inputs=inputs, is_read_as_written=is_read_as_written(tokenizer, config))


def is_read_as_written(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> bool:
    """Whether `AutoTokenizer` gives the ids of `tokenizer` for :data:`PROBE_TEXTS` when both are saved together.

    Nothing is left on the disk.
    """
    with tempfile.TemporaryDirectory(prefix="pocl-tokenizer-") as name:
        directory = Path(name)
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_tokenizer_config(directory, chat_templates={}, pad_token=None)
        try:
            read = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
    return all(read(text)["input_ids"] == tokenizer(text)["input_ids"] for text in PROBE_TEXTS)
