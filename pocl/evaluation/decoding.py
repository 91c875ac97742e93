"""How answers are decoded, whatever decodes them."""

from collections.abc import Set
from dataclasses import dataclass

import torch

from pocl.evaluation.sampling import Sampler
from pocl.evaluation.stop_text import StopText
from pocl.models.precision import Precision


@dataclass(frozen=True)
class Decoding:
    """How every answer is decoded."""

    max_new_tokens: int
    """The most tokens of an answer, at least 1. An answer also ends where the model has no more positions."""
    rows_in_flight: int
    """The prompts that are being answered at a time, at least 1."""
    eos_token_ids: Set[int]
    """The tokens that end an answer and are not part of it; may be empty."""
    pad_id: int
    """Any id of the vocabulary; it fills masked positions."""
    precision: Precision | None = None
    """Of the products; None takes that of the weights."""
    sampler: Sampler | None = None
    """Draws each token; None takes the most likely one."""
    stop_text: StopText | None = None
    """The text that ends an answer where no token does; the answer holds it, up to the token that completes it."""
    no_repeat_ngram: int | None = None
    """The size of the n-grams, at least 2, that no answer repeats, be they of the prompt or its own; None bans none."""
    graphs: bool = False
    """Replay decode steps as CUDA graphs, where the model is on CUDA."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.rows_in_flight < 1:
            raise ValueError("max_new_tokens and rows_in_flight must be at least 1")

    def precision_on(self, device: torch.device) -> Precision:
        """The precision of the products of a model on `device`, whose weights are in fp32."""
        return self.precision or Precision("fp32", device)
