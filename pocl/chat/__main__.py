"""`python -m pocl.chat`: answers the questions that come on standard input, one at a time: :mod:`pocl.chat.protocol`.

It exits with 0 at the end of its input, and with 2 where a line of it cannot be read.
"""

import pocl.search_path  # noqa: F401 # Before all imports that a file of the working directory could take.

# isort: split

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from functools import partial
from queue import SimpleQueue
from typing import TextIO

from pydantic import ValidationError

from pocl.chat.protocol import ChatCancel, ChatQuestion, chat_inputs
from pocl.layout import ExitCode
from pocl.reserved_stdout import reserve_stdout


class _Inbox:
    """Reads standard input in a thread: questions in their order, and which of them are cancelled."""

    def __init__(self, lines: TextIO) -> None:
        self._lines = lines
        self._questions: SimpleQueue[ChatQuestion | None] = SimpleQueue()
        self._cancelled: set[str] = set()
        self.is_over = threading.Event()
        """Whether no more follows: what is being answered has no reader any more."""
        self.failed = False
        """Whether a line could not be read."""
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def next_question(self) -> ChatQuestion | None:
        """Wait for the next question; None at the end of the input."""
        return self._questions.get()

    def is_cancelled(self, question: ChatQuestion) -> bool:
        return self.is_over.is_set() or question.id in self._cancelled

    def forget(self, question: ChatQuestion) -> None:
        """Drop what is known of a question that has been answered."""
        self._cancelled.discard(question.id)

    def _read(self) -> None:
        try:
            for line in self._lines:
                match chat_inputs.validate_json(line):
                    case ChatCancel() as cancel:
                        self._cancelled.add(cancel.id)
                    case ChatQuestion() as question:
                        self._questions.put(question)
        except ValidationError as error:
            self.failed = True
            # The text of the error would quote what a client wrote.
            sys.stderr.write(f"a line of the input is wrong in {error.error_count()} places\n")
        self.is_over.set()
        self._questions.put(None)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    events = reserve_stdout()
    # This must be set before torch is loaded: see pocl/__main__.py.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    inbox = _Inbox(sys.stdin)
    import torch

    from pocl.chat.answerer import Answerer, AnswerEvent
    from pocl.models.hub import HubPolicy, hub_policy
    from pocl.models.precision import choose_device

    if options.threads is not None:
        torch.set_num_threads(options.threads)

    def write(event: AnswerEvent) -> None:
        events.write(event.model_dump_json() + "\n")
        events.flush()

    allowed = None if options.hub_allow is None else [pattern for pattern in options.hub_allow if pattern]
    with hub_policy(HubPolicy(allowed, options.hub_cache_bytes)):
        answerer = Answerer(choose_device(options.device))
        while (question := inbox.next_question()) is not None:
            answerer.answer(question, write, partial(inbox.is_cancelled, question))
            inbox.forget(question)
    return ExitCode.USAGE if inbox.failed else ExitCode.DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pocl.chat", description="Answer conversations.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what it computes on")
    parser.add_argument("--threads", type=int, help="threads of the CPU; torch's choice unless given")
    parser.add_argument(
        "--hub-allow",
        action="append",
        metavar="PATTERN",
        help="read only repositories of the Hub that match, such as 'acme/*'; may be given again; '' allows none",
    )
    parser.add_argument("--hub-cache-bytes", type=int, help="size of the cache of the Hub (default: no bound)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
