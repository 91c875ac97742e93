"""A worker that answers conversations as a test says, in a thread beside it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from domain.chat.repository import ChatFailure, claim_next, renew, settle
from domain.db import Database
from pocl.chat.protocol import AnswerFinished, ChatQuestion
from tests.support.waiting import eventually

ANSWER = AnswerFinished(
    id="", text="Because it is.", finish_reason="stop", prompt_tokens=9, completion_tokens=3, warnings=("Careful.",)
)


@contextmanager
def answering(
    database: Database, *texts: str, outcome: AnswerFinished | ChatFailure | None = ANSWER
) -> Iterator[list[ChatQuestion]]:
    """A worker that answers one request beside the block, and what it was asked."""
    asked: list[ChatQuestion] = []
    failures: list[BaseException] = []

    def claimed() -> bool:
        with database.transaction(write=True) as session:
            claim = claim_next(session, worker="worker-1", lease_seconds=60)
        if claim is None:
            return False
        asked.append(claim.question)
        for number, text in enumerate(texts, start=1):
            with database.transaction(write=True) as session:
                renew(session, claim, text=text, tokens=number, lease_seconds=60)
        with database.transaction(write=True) as session:
            settle(session, claim, outcome)
        return True

    def run() -> None:
        try:
            eventually(claimed, what="a conversation")
        except BaseException as error:  # noqa: BLE001 - it is re-raised below
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield asked
    finally:
        thread.join()
    if failures:
        raise failures[0]
