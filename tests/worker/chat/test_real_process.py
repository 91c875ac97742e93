"""The process with a real model, started by a worker in its sandbox."""

import pytest
import torch

from domain.chat.repository import snapshots
from domain.chat.submission import ask_model
from pocl.chat.answerer import Answerer, AnswerEvent
from pocl.chat.protocol import AnswerFinished, ChatMessage, ChatQuestion
from pocl.export.model_directory import save_model
from pocl.models.loading import load_teacher
from pocl.spec import ModelRef, RandomModel
from tests.support.harness import ServiceHarness

pytestmark = [pytest.mark.system, pytest.mark.slow]


def test_worker_answers_with_a_model_as_the_engine_does(harness: ServiceHarness) -> None:
    path = harness.settings.model_roots[0] / "tiny"
    random = load_teacher(
        ModelRef(random=RandomModel(layers=1, hidden_size=16, heads=2)), device=torch.device("cpu"), dtype=torch.float32
    )
    path.mkdir(parents=True)
    save_model(random.model, random.tokenizer, path)
    question = ChatQuestion(
        id="chat_1",
        model=ModelRef(path=str(path)),
        messages=(ChatMessage(role="user", content="Why?"),),
        max_new_tokens=16,
        temperature=0.7,
        top_p=0.9,
        seed=3,
        precision="fp32",
    )
    with harness.database.transaction(write=True) as session:
        chat_id = ask_model(session, harness.settings, "default", "tiny", question).id
    harness.supervisor(chat_idle_seconds=0).work_one()
    with harness.database.transaction(write=False) as session:
        answered = snapshots(session, [chat_id])[chat_id]
    assert answered.failure is None
    events: list[AnswerEvent] = []
    Answerer(torch.device("cpu")).answer(question, events.append)
    assert isinstance(events[-1], AnswerFinished)
    assert (answered.text, answered.tokens) == (events[-1].text, events[-1].completion_tokens)
