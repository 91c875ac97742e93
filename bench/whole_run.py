"""What a whole run is benchmarked with: its models and samples on disk, and the seconds of its phases."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.lengths import MAX_LENGTH, MAX_PROMPT_LENGTH, representative_lengths
from bench.sizes import Size, build_model
from pocl.events import Event, PhaseChanged
from pocl.export.model_directory import save_model
from pocl.prompting.alpaca import alpaca_turns
from pocl.samples.reading import read_samples

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")

Phases = dict[str, float]
"""Seconds."""


class Stopwatch:
    """Sums the seconds of each phase."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._phase = "loading"
        self.seconds: Phases = {}

    def enter(self, phase: str) -> None:
        now = self._clock()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def sink(self, event: Event) -> None:
        if isinstance(event, PhaseChanged):
            self.enter(event.phase)


def write_inputs(
    scratch: Path,
    size: Size,
    *,
    rows: int,
    validation_rows: int,
    device: torch.device,
    teacher_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Write models, tokenizer and samples below `scratch`; the parts of a specification that name them."""
    tokenizer = word_tokenizer(size.vocabulary)
    student = build_model(size.student_config, 0, device=device)
    save_model(student, tokenizer, scratch / "student")
    del student
    teacher = build_model(size.teacher_config, 1, device=device, dtype=teacher_dtype)
    save_model(teacher, tokenizer, scratch / "teacher")
    _write_samples(scratch / "train.jsonl", rows, size, tokenizer, seed=0)
    _write_samples(scratch / "validation.jsonl", validation_rows, size, tokenizer, seed=1)
    return {
        "teacher": {"path": str(scratch / "teacher")},
        "student": {"path": str(scratch / "student")},
        "data": {
            "train": {"path": str(scratch / "train.jsonl")},
            "validation": {"path": str(scratch / "validation.jsonl")},
            "template": "alpaca",
            "max_length": MAX_LENGTH,
            "max_prompt_length": MAX_PROMPT_LENGTH,
        },
    }


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of the words w4, w5, ..., and one token for all others."""
    words = [*_SPECIAL, *(f"w{at}" for at in range(len(_SPECIAL), vocabulary))]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _write_samples(path: Path, count: int, size: Size, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Write samples of random words, as long in tokens as Dolly's under the Alpaca template."""
    generator = torch.Generator().manual_seed(seed)

    def words(length: int) -> str:
        ids = torch.randint(len(_SPECIAL), size.vocabulary, (max(1, length),), generator=generator)
        return " ".join(f"w{at}" for at in ids.tolist())

    def line(prompt: int, response: int) -> str:
        row: dict[str, Any] = {"instruction": words(prompt), "input": "", "output": words(response)}
        return json.dumps(row) + "\n"

    path.write_text(line(1, 1))
    (turn,) = alpaca_turns(read_samples(path)[0])
    template_tokens = len(tokenizer(turn.prompt, add_special_tokens=False)["input_ids"]) - 1
    path.write_text(
        "".join(line(prompt - template_tokens, response - 1) for prompt, response in representative_lengths(count))
    )
