"""The text of an answer while it grows: what is certain is passed on, what may turn out otherwise is held back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from pocl.prompting.thoughts import AnswerForm

_REPLACEMENT: Final = "\ufffd"
"""What the bytes of a character that is not whole yet decode to."""


@dataclass
class AnswerText:
    """The visible text of one answer, given tokens as they come.

    What was passed on is never taken back. The whole text is the concatenation of what :meth:`grow` and :meth:`finish`
    return, but for one case: a model that closes a thought which it never opened has said before that its answer is
    what follows, and only the whole text, :attr:`text`, knows.
    """

    read: Callable[[Sequence[int]], str]
    """What the tokens of an answer say, without thoughts, marks and space around it."""
    form: AnswerForm
    stop: Sequence[str] = ()
    """Texts at the first of which the answer ends; it does not hold it."""
    text: str = ""
    """All that the answer says, as far as it is certain."""
    stopped: bool = field(default=False)
    """Whether the answer has come to one of the texts of `stop`."""

    def grow(self, tokens: Sequence[int]) -> str:
        """What is certain by these tokens, the answer's from its beginning on, and was not before."""
        visible = self._up_to_stop(self.read(tokens))
        if not self.stopped:
            visible = visible.rstrip(_REPLACEMENT)
            visible = visible[: len(visible) - self._uncertain(visible)]
        return self._advance(visible)

    def finish(self, tokens: Sequence[int]) -> str:
        """What is left of an answer that ends with these tokens."""
        if self.stopped:
            return ""
        visible = self._up_to_stop(self.read(tokens))
        if not visible.startswith(self.text):
            self.text = visible
            return ""
        return self._advance(visible)

    def _up_to_stop(self, visible: str) -> str:
        places = [place for each in self.stop if (place := visible.find(each)) >= 0]
        if not places:
            return visible
        self.stopped = True
        return visible[: min(places)]

    def _uncertain(self, visible: str) -> int:
        """How many characters at the end may begin a text that ends the answer, or what stands before it."""
        beginnings = [self.form.opening, *([] if self.form.thought is None else [self.form.thought.start])]
        if any(beginning.startswith(visible) for beginning in beginnings):
            return len(visible)
        ends = (*self.stop, *self.form.closings)
        longest = max((len(end) for end in ends), default=1) - 1
        lengths = range(min(longest, len(visible)), 0, -1)
        return next((n for n in lengths if any(end.startswith(visible[-n:]) for end in ends)), 0)

    def _advance(self, visible: str) -> str:
        if len(visible) <= len(self.text) or not visible.startswith(self.text):
            return ""
        new = visible[len(self.text) :]
        self.text = visible
        return new
