"""Conversations with models on disk are answered as evaluations answer their prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pocl.chat.answerer import Answerer, AnswerEvent
from pocl.chat.protocol import (
    AnswerCancelled,
    AnswerFailed,
    AnswerFinished,
    AnswerPart,
    ChatMessage,
    ChatQuestion,
    ChatTemplateSettings,
)
from pocl.evaluation.answers import GenerationSettings, generate_answers
from pocl.export.chat_templates import alpaca_chat_template
from pocl.export.model_directory import save_model
from pocl.models.loading import load_teacher
from pocl.models.precision import Precision
from pocl.models.tokenizers import text_tokenizer
from pocl.prepare import ending_of
from pocl.prompting.template_choice import make_encoder
from pocl.prompting.template_process import answer as render
from pocl.samples.sample import Message, Sample
from pocl.spec import Data, DataRef, ModelRef, RandomModel
from tests.pocl.byte_tokenizers import CHATML, byte_tokenizer

pytestmark = pytest.mark.system

CPU = torch.device("cpu")
NEW_TOKENS = 24
QUESTIONS = ("What is the answer?", "Write a word.", "Why?")


def write_model(directory: Path, tokenizer: PreTrainedTokenizerFast, templates: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_model(model, tokenizer, directory, chat_templates=templates)


@pytest.fixture(scope="module", params=["chat", "alpaca"])
def template(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(template: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student as its job leaves it, that was taught by this template."""
    directory = tmp_path_factory.mktemp(template)
    tokenizer = byte_tokenizer(begins=template == "alpaca")
    chat = CHATML if template == "chat" else alpaca_chat_template(text_tokenizer(tokenizer))
    write_model(directory, tokenizer, {"default": chat})
    return directory


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(CPU)


def question(model: Path | ModelRef, *contents: str, **fields: Any) -> ChatQuestion:
    messages = tuple(
        ChatMessage(role="assistant" if index % 2 else "user", content=text) for index, text in enumerate(contents)
    )
    defaults: dict[str, Any] = {
        "id": "chat_1",
        "model": model if isinstance(model, ModelRef) else ModelRef(path=str(model)),
        "messages": messages,
        "max_new_tokens": NEW_TOKENS,
        "temperature": 0,
        "top_p": 1,
        "seed": 0,
        "precision": "fp32",
    }
    return ChatQuestion(**{**defaults, **fields})


def ask(answerer: Answerer, asked: ChatQuestion, **options: Any) -> list[AnswerEvent]:
    events: list[AnswerEvent] = []
    answerer.answer(asked, events.append, **options)
    return events


def finished(events: list[AnswerEvent]) -> AnswerFinished:
    assert isinstance(events[-1], AnswerFinished), events
    return events[-1]


def evaluated(model: Path, template: str, text: str, system: str | None = None) -> str:
    """What an evaluation says to this prompt, with the template of the job."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = byte_tokenizer(CHATML if template == "chat" else None, begins=template == "alpaca")
    data = Data(train=DataRef(path="x"), template=template, system=system)
    encoder = make_encoder(data, text_tokenizer(tokenizer), render)
    ending = ending_of(encoder)
    settings = GenerationSettings(
        NEW_TOKENS,
        4,
        end_of_response_id=ending.end_of_response_id,
        end_tokens=ending.end_tokens,
        stop_text=ending.stop_text,
        form=ending.form,
        precision=Precision("fp32", CPU),
    )
    sample = Sample((Message("user", text), Message("assistant", "")))
    (answer,) = generate_answers(loaded, tokenizer, encoder.encode([sample]).samples, generation=settings)
    return answer.text


@pytest.mark.parametrize("text", QUESTIONS)
def test_greedy_answers_are_those_of_the_evaluation(answerer: Answerer, model: Path, template: str, text: str) -> None:
    answer = finished(ask(answerer, question(model, text)))
    assert answer.text == evaluated(model, template, text)
    assert answer.completion_tokens <= NEW_TOKENS
    assert answer.prompt_tokens > 0


def test_system_message_of_the_job_is_that_of_conversations_without_one(
    answerer: Answerer, model: Path, template: str
) -> None:
    asked = question(model, "Why?", template=ChatTemplateSettings(system="Answer in a word."))
    assert finished(ask(answerer, asked)).text == evaluated(model, template, "Why?", system="Answer in a word.")


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_parts_add_up_to_the_answer_and_equal_seeds_answer_alike(
    answerer: Answerer, model: Path, temperature: float
) -> None:
    asked = question(model, "Write a word.", temperature=temperature, seed=7, max_new_tokens=60)
    events, again = ask(answerer, asked), ask(answerer, asked)
    parts = [event.text for event in events if isinstance(event, AnswerPart)]
    assert "".join(parts) == finished(events).text == finished(again).text


def test_answer_ends_before_a_stop_text(answerer: Answerer, model: Path) -> None:
    whole = finished(ask(answerer, question(model, "Why?", temperature=1.0, seed=1))).text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 2]
    stopped = finished(ask(answerer, question(model, "Why?", temperature=1.0, seed=1, stop=(middle,))))
    assert stopped.text == whole[: whole.index(middle)]
    assert stopped.finish_reason == "stop"


def test_answer_at_its_limit_says_so(answerer: Answerer, model: Path) -> None:
    answer = finished(ask(answerer, question(model, "Why?", max_new_tokens=1, temperature=1.0)))
    assert (answer.completion_tokens, answer.finish_reason) == (1, "length")


def test_conversation_beyond_the_positions_of_the_model_is_refused(answerer: Answerer, model: Path) -> None:
    (event,) = ask(answerer, question(model, "word " * 400))
    assert isinstance(event, AnswerFailed)
    assert (event.code, event.fault) == ("context_length_exceeded", "user")
    assert "256" in event.message


def test_answer_never_outgrows_the_positions_of_the_model(answerer: Answerer, model: Path) -> None:
    answer = finished(ask(answerer, question(model, "a" * 60, max_new_tokens=4000, temperature=1.5)))
    assert answer.prompt_tokens + answer.completion_tokens <= 256


def test_several_turns_are_read(answerer: Answerer, model: Path) -> None:
    one = finished(ask(answerer, question(model, "Why?")))
    three = finished(ask(answerer, question(model, "What is the answer?", "A word.", "Why?")))
    assert three.prompt_tokens > one.prompt_tokens


def test_cancelled_answer_ends(answerer: Answerer, model: Path) -> None:
    assert ask(answerer, question(model, "Why?"), should_stop=lambda: True) == [AnswerCancelled(id="chat_1")]


def test_model_that_is_not_there_is_refused_and_the_next_question_answered(answerer: Answerer, model: Path) -> None:
    (event,) = ask(answerer, question(model / "nothing", "Why?"))
    assert isinstance(event, AnswerFailed)
    assert (event.code, event.fault) == ("model_not_found", "user")
    assert str(model) not in event.message
    finished(ask(answerer, question(model, "Why?")))


def test_teacher_and_student_stay_loaded_and_a_third_model_takes_the_place_of_the_oldest() -> None:
    loads: list[str] = []

    def counted(ref: ModelRef, **options: Any) -> Any:
        loads.append(str(ref.random and ref.random.seed))
        return load_teacher(ref, **options)

    answerer = Answerer(CPU, counted)

    def ask_random(seed: int) -> None:
        model = ModelRef(random=RandomModel(layers=1, hidden_size=16, heads=2, seed=seed))
        finished(ask(answerer, question(model, "Why?", max_new_tokens=1)))

    for seed in (1, 2, 1, 2, 3, 2, 1):
        ask_random(seed)
    assert loads == ["1", "2", "3", "1"]
