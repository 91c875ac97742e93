"""What generation answers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Question:
    """A prompt that is to be answered."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    limit: int
    """The most tokens of the answer, at least 1."""
    key: str
    """The random draws of the answer follow from it and the seed of the sampler."""

    def up_to(self, length: int) -> "Question":
        """The question with a limit at which the model has read `length` tokens, where the prompt is not longer."""
        tokens_left = length - len(self.prompt)
        return self if tokens_left < 0 else replace(self, limit=min(self.limit, tokens_left + 1))

    def after(self, answer: Sequence[int]) -> "Question":
        """What is left to answer once the answer has begun like this; its draws are others than those before."""
        prompt = [*self.prompt, *answer]
        return Question(prompt, self.limit - len(answer), f"{self.key} after {len(prompt)}")
