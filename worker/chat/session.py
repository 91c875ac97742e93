"""A worker without a job answers conversations, one at a time, and keeps their models loaded for a while.

Conversations come before the next job and never stop a running one. While the worker waits for the next conversation
it goes on claiming jobs: one that it gets ends the session, and with it the process that holds the models.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import structlog
from sqlalchemy.orm import Session

from domain.artifacts import ArtifactCorrupt, ArtifactNotFound, ArtifactStore
from domain.chat import repository
from domain.chat.repository import ChatClaim, ChatFailure
from domain.checkpoints.repository import get_checkpoint
from domain.db import Database
from domain.errors import ApiError, CheckpointNotFound, LostLease
from domain.model_paths import locate_model
from domain.settings import Settings
from pocl.chat.protocol import AnswerCancelled, AnswerFailed, AnswerFinished, AnswerPart, ChatQuestion
from pocl.spec import ModelRef
from worker.chat.process import ChatProcess, ChatProcessFailed
from worker.engine_environment import redact_secrets

_log = structlog.get_logger(__name__)

_LEASE_SECONDS: Final = 15.0
"""A client that waits for an answer hears of a lost worker this soon."""
_FLUSH_SECONDS: Final = 0.2
"""The interval at which what an answer says is written to its row."""
_POLL_SECONDS: Final = 0.25
"""The interval at which a worker that keeps a model looks for a conversation."""
_JOB_SECONDS: Final = 1.0
"""The interval at which it looks for a job."""
_TURN_SECONDS: Final = 60.0
"""After so long jobs come before conversations, so that these cannot keep jobs waiting for ever."""
_MAX_SECONDS: Final = 1800.0
"""A session lasts no longer."""
_CANCEL_SECONDS: Final = 10.0
"""How long a cancelled answer may take to end; then the process is ended."""
_MAX_TEXT: Final = 1 << 18
"""Characters of an answer: a process that says more is no model of ours."""
_STORE_FAILED: Final = ChatFailure(
    "checkpoint_unavailable", "The files of the checkpoint are damaged, or not to be had from this worker.", "system"
)
_PROCESS_FAILED: Final = ChatFailure(
    "engine_failure", "The process that was answering has ended unexpectedly: ask again.", "system"
)
_OUT_OF_TIME: Final = ChatFailure(
    "answer_timed_out", "The answer took longer than a worker may take for one: ask for fewer tokens.", "capacity"
)
_STOPPED: Final = ChatFailure(repository.WORKER_LOST, "The worker that was answering stops: ask again.", "capacity")

Found = TypeVar("Found")


class _Refused(Exception):
    """The model of a conversation cannot be had; the failure says why."""

    def __init__(self, failure: ChatFailure) -> None:
        super().__init__(failure.code)
        self.failure = failure


@dataclass
class ChatSession:
    """Answers conversations until a job is claimed, or nobody has asked for a while."""

    database: Database
    store: ArtifactStore
    settings: Settings
    worker: str
    process: ChatProcess
    idle_seconds: float
    """How long the model of the last conversation is kept."""
    may_claim: Callable[[Session], bool]
    """Whether the worker may claim anything: it is not drained."""
    should_stop: Callable[[], bool]
    clock: Callable[[], float] = time.monotonic
    wait: Callable[[float], None] = time.sleep
    _fetched: dict[str, Path] = field(default_factory=dict)
    """The directories of checkpoints, by their ids."""

    def run(self, claim_job: Callable[[], Found | None]) -> Found | None:
        """Answer all that wait, and then wait for more while there is a model to keep; the job that was claimed
        meanwhile, None where there was none.

        Raises:
            DatabaseUnavailable: the database is at fault; what was being answered is lost.
        """
        began = idle_since = self.clock()
        job_due = began
        while not self.should_stop():
            has_waited = self.clock() - began >= _TURN_SECONDS
            if has_waited and (job := claim_job()) is not None:
                return job
            if (claim := self._claim()) is not None:
                self._answer(claim)
                idle_since = self.clock()
                continue
            if self.clock() >= job_due:
                if (job := claim_job()) is not None:
                    return job
                job_due = self.clock() + _JOB_SECONDS
            now = self.clock()
            if not self.process.is_running or now - idle_since >= self.idle_seconds or now - began >= _MAX_SECONDS:
                return None
            self.wait(_POLL_SECONDS)
        return None

    def _claim(self) -> ChatClaim | None:
        with self.database.transaction(write=False) as session:
            if not repository.count_waiting(session, limit=1):
                return None
        with self.database.transaction(write=True) as session:
            if not self.may_claim(session):
                return None
            return repository.claim_next(session, worker=self.worker, lease_seconds=_LEASE_SECONDS)

    def _answer(self, claim: ChatClaim) -> None:
        with structlog.contextvars.bound_contextvars(chat_id=claim.id, project=claim.project):
            began = self.clock()
            answer = _Answer(self, claim)
            try:
                outcome = self._outcome(answer)
                with self.database.transaction(write=True) as session:
                    repository.settle(session, claim, outcome)
            except LostLease:
                # The project was deleted, or this worker was silent for too long.
                _log.warning("chat_lease_lost")
                self.process.drain(claim.id, seconds=_CANCEL_SECONDS, clock=self.clock)
                return
            code = outcome.code if isinstance(outcome, ChatFailure) else "ok" if outcome else "cancelled"
            _log.info("chat_answered", outcome=code, tokens=answer.tokens, seconds=round(self.clock() - began, 2))

    def _outcome(self, answer: "_Answer") -> AnswerFinished | ChatFailure | None:
        try:
            question = self._localized(answer)
            self.process.start()
            self.process.ask(question)
            return answer.receive()
        except _Refused as error:
            return error.failure
        except (ChatProcessFailed, OSError) as error:
            tail = redact_secrets(self.process.log_tail(), os.environ).decode("utf-8", "replace")
            _log.error("chat_process_failed", error=str(error), log=tail)
            self.process.close()
            return _PROCESS_FAILED

    def _localized(self, answer: "_Answer") -> ChatQuestion:
        """The question with a path of this machine in place of a checkpoint or a name.

        Raises:
            _Refused: the model is gone, or not to be had from here.
            LostLease: the request has ended.
        """
        claim, model = answer.claim, answer.claim.question.model
        try:
            if model.checkpoint is not None:
                path = self._fetch(answer, model.checkpoint)
            elif model.path is not None:
                path = locate_model(self.settings.model_roots, model.path, pointer="/model")
            else:
                return claim.question
        except CheckpointNotFound as error:
            raise _Refused(ChatFailure(error.code, error.detail, "user")) from error
        except (ApiError, ArtifactNotFound, ArtifactCorrupt, OSError) as error:
            # The service had the model when it took the request: this worker lacks it.
            _log.error("chat_model_not_at_hand", error=str(error))
            raise _Refused(_STORE_FAILED) from error
        return claim.question.model_copy(update={"model": ModelRef(path=str(path))})

    def _fetch(self, answer: "_Answer", checkpoint_id: str) -> Path:
        with self.database.transaction(write=False) as session:
            key = get_checkpoint(session, answer.claim.project, checkpoint_id).store_key
        path = self._fetched.get(checkpoint_id)
        if path is None or not path.exists():
            inputs = self.process.inputs_dir
            inputs.mkdir(parents=True, exist_ok=True)
            path = answer.renew_while(lambda: self.store.provide_directory(key, inputs))
            self._fetched[checkpoint_id] = path
        return path


class _Answer:
    """One answer on its way from the process to its row."""

    def __init__(self, session: ChatSession, claim: ChatClaim) -> None:
        self.claim = claim
        self.tokens = 0
        self._session = session
        self._text = ""
        self._clock = session.clock
        self._until = self._clock() + session.settings.chat_answer_seconds
        self._written_at = self._clock()
        self._is_written = True
        """Whether the row has all of the text."""

    def receive(self) -> AnswerFinished | ChatFailure | None:
        """Carry what the process says into the row, up to the end of the answer; None where it was cancelled.

        Raises:
            LostLease: the request has ended.
            ChatProcessFailed: the process has ended.
        """
        process, session = self._session.process, self._session
        while True:
            for event in process.read(seconds=_FLUSH_SECONDS):
                if event.id != self.claim.id:
                    continue
                match event:
                    case AnswerPart():
                        self._add(event)
                    case AnswerFinished():
                        self.tokens = event.completion_tokens
                        return event
                    case AnswerFailed():
                        return ChatFailure(event.code, event.message, event.fault)
                    case AnswerCancelled():
                        return None
            failure = _STOPPED if session.should_stop() else _OUT_OF_TIME if self._clock() >= self._until else None
            if failure is not None or self._renew_if_due():
                process.drain(self.claim.id, seconds=_CANCEL_SECONDS, clock=self._clock)
                self._renew()
                return failure

    def renew_while(self, work: Callable[[], Found]) -> Found:
        """Run `work`, which takes long, and renew the lease meanwhile.

        Raises:
            LostLease: the request has ended; once `work` has.
        """
        with ThreadPoolExecutor(1) as executor:
            future = executor.submit(copy_context().run, work)
            while not wait_for([future], timeout=1).done:
                self._renew_if_due()
        return future.result()

    def _add(self, part: AnswerPart) -> None:
        self._text += part.text
        self.tokens = part.tokens
        self._is_written = False
        if len(self._text) > _MAX_TEXT:
            raise ChatProcessFailed("the answer has no end")

    def _renew_if_due(self) -> bool:
        """Write what there is to write, and renew the lease; whether the answer is to be cancelled."""
        age = self._clock() - self._written_at
        # A client that is gone is noticed within a second, also while a model loads.
        return self._renew() if age >= (1.0 if self._is_written else _FLUSH_SECONDS) else False

    def _renew(self) -> bool:
        with self._session.database.transaction(write=True) as database_session:
            is_cancelled = repository.renew(
                database_session, self.claim, text=self._text, tokens=self.tokens, lease_seconds=_LEASE_SECONDS
            )
        self._written_at, self._is_written = self._clock(), True
        return is_cancelled
