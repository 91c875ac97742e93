"""Answers conversations with models that stay loaded, by the template, tokenizer and generation of evaluations."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Final

import torch

from pocl.callbacks import ShouldStop
from pocl.chat.answer_text import AnswerText
from pocl.chat.protocol import (
    MAX_CONTEXT_TOKENS,
    AnswerCancelled,
    AnswerFailed,
    AnswerFinished,
    AnswerPart,
    ChatQuestion,
    ChatTemplateSettings,
)
from pocl.encoding_counts import EncodingCounts
from pocl.errors import EngineFailure, OutOfMemory, PoclError, RunStopped
from pocl.evaluation.answers import GenerationSettings, decoding_of, read_answers
from pocl.evaluation.generate import generate
from pocl.evaluation.sampling import Sampler
from pocl.export.chat_templates import alpaca_chat_template
from pocl.inspect.chat_templates import DEFAULT_TEMPLATE
from pocl.models.loading import LoadedModel, load_teacher
from pocl.models.precision import choose_precision
from pocl.out_of_memory import is_out_of_memory, release_memory
from pocl.prepare import ending_of, tokenizer_for_texts
from pocl.prompting.encoding import SampleEncoder
from pocl.prompting.template_choice import make_encoder
from pocl.prompting.template_renderer import call_shared_process
from pocl.samples.sample import Message, Sample
from pocl.spec import Data, DataRef

_MAX_MODELS: Final = 2
"""Models that stay loaded: a teacher and its student are asked in turns."""

AnswerEvent = AnswerPart | AnswerFinished | AnswerFailed | AnswerCancelled
OnEvent = Callable[[AnswerEvent], None]


class ConversationTooLong(PoclError):
    """The conversation has more tokens than the model can read."""

    code = "context_length_exceeded"
    fault = "user"
    hint = "Shorten the conversation."


@dataclass(frozen=True)
class _ChatModel:
    """A model with the encoder of its conversations."""

    loaded: LoadedModel
    encoder: SampleEncoder
    positions: int
    """The most tokens of a conversation and its answer."""


class Answerer:
    """Answers questions one after the other, and keeps the last models.

    Args:
        device: What it computes on.
        load: Loads a model as :func:`~pocl.models.loading.load_teacher` does.
    """

    def __init__(self, device: torch.device, load: Callable[..., LoadedModel] = load_teacher) -> None:
        self._device = device
        self._load_model = load
        self._models: OrderedDict[str, _ChatModel] = OrderedDict()

    def answer(self, question: ChatQuestion, on_event: OnEvent, should_stop: ShouldStop = lambda: False) -> None:
        """Answer a question: `on_event` is given the parts of the answer and its end, whatever that is.

        Args:
            should_stop: Polled before each token; once it is true the answer ends as cancelled.
        """
        try:
            on_event(self._answer(question, on_event, should_stop))
        except RunStopped:
            on_event(AnswerCancelled(id=question.id))
        except PoclError as error:
            on_event(_failed(question, error))
        except Exception as error:
            if not is_out_of_memory(error):
                on_event(_failed(question, EngineFailure(f"the engine failed unexpectedly ({type(error).__name__})")))
                raise
            # What was loaded may be half of it: the next question begins with none.
            self._models.clear()
            release_memory()
            on_event(_failed(question, OutOfMemory("The model and its answer do not fit into the memory.")))

    def _answer(self, question: ChatQuestion, on_event: OnEvent, should_stop: ShouldStop) -> AnswerFinished:
        model = self._model(question)
        sample = Sample(tuple(Message(each.role, each.content) for each in question.messages))
        # A conversation is no sample of a file: sentences call it what it is.
        encoded = model.encoder.named("the request").encode([sample])
        (prompt,) = (each.prompt_ids for each in encoded.samples)
        tokens = encoded.counts.prompt_tokens + encoded.counts.tokens_cut
        if encoded.counts.prompts_cut or len(prompt) >= model.positions:
            raise ConversationTooLong(
                f"The conversation has {tokens} tokens, and the model reads {model.positions} at most, those of the "
                "answer included: shorten it."
            )
        limit = min(question.max_new_tokens, model.positions - len(prompt))
        tokenizer, ending = model.loaded.tokenizer, ending_of(model.encoder)
        settings = GenerationSettings(
            max_new_tokens=limit,
            batch_size=1,
            end_of_response_id=ending.end_of_response_id,
            end_tokens=ending.end_tokens,
            stop_text=ending.stop_text,
            form=ending.form,
            precision=choose_precision(question.precision, self._device),
        )
        sampler = Sampler(question.temperature, question.top_p, question.seed) if question.temperature else None
        # Answers that are not asked to stop at the text that ends one in the template stop there all the same.
        stop = (*question.stop, *((ending.stop_text,) if ending.stop_text else ()))
        text = AnswerText(lambda ids: read_answers([ids], [prompt], tokenizer, ending.form)[0].text, ending.form, stop)
        generated: list[int] = []

        def on_partial(_index: int, ids: list[int]) -> None:
            generated[:] = ids
            if part := text.grow(ids):
                on_event(AnswerPart(id=question.id, text=part, tokens=len(ids)))

        try:
            (answer,) = generate(
                model.loaded.model,
                [prompt],
                decoding_of(model.loaded.model, tokenizer, settings, sampler),
                keys=[sample.digest],
                on_partial=on_partial,
                should_stop=lambda: text.stopped or should_stop(),
            )
            generated[:] = answer
        except RunStopped:
            if not text.stopped:
                raise
        if part := text.finish(generated):
            on_event(AnswerPart(id=question.id, text=part, tokens=len(generated)))
        ended = text.stopped or len(generated) < limit
        return AnswerFinished(
            id=question.id,
            text=text.text,
            finish_reason="stop" if ended else "length",
            prompt_tokens=len(prompt),
            completion_tokens=len(generated),
            warnings=_warnings(encoded.counts),
        )

    def _model(self, question: ChatQuestion) -> _ChatModel:
        """The model of a question, loaded unless it is; the one that was asked the longest ago makes room."""
        key = f"{question.model.model_dump_json()} {question.template.model_dump_json()} {question.precision}"
        if key in self._models:
            self._models.move_to_end(key)
            return self._models[key]
        while len(self._models) >= _MAX_MODELS:
            self._drop_oldest()
        try:
            model = self._load(question)
        except Exception as error:
            if not (is_out_of_memory(error) and self._models):
                raise
            model = None
        if model is None:
            # The others are in the way.
            while self._models:
                self._drop_oldest()
            model = self._load(question)
        self._models[key] = model
        return model

    def _load(self, question: ChatQuestion) -> _ChatModel:
        precision = choose_precision(question.precision, self._device)
        loaded = self._load_model(question.model, device=self._device, dtype=precision.weights)
        tokenizer = tokenizer_for_texts(loaded.tokenizer, loaded.structure)
        configured = getattr(loaded.model.config, "max_position_embeddings", None)
        positions = min(configured if isinstance(configured, int) and configured > 1 else 1 << 62, MAX_CONTEXT_TOKENS)
        is_alpaca = tokenizer.templates.get(DEFAULT_TEMPLATE) == alpaca_chat_template(tokenizer)
        data = _data(question.template, is_alpaca=is_alpaca, positions=positions)
        return _ChatModel(loaded, make_encoder(data, tokenizer, call_shared_process), positions)

    def _drop_oldest(self) -> None:
        self._models.popitem(last=False)
        release_memory()


def _data(settings: ChatTemplateSettings, *, is_alpaca: bool, positions: int) -> Data:
    """The settings of an encoder whose prompts may take all positions but one.

    Args:
        is_alpaca: whether the template of the model is what a student that was taught by the Alpaca prompt is saved
            with: the prompt itself gives the tokens that it was taught with.
    """
    return Data(
        # An encoder reads no file.
        train=DataRef(path="none"),
        template="alpaca" if is_alpaca else "auto",
        system=settings.system,
        date=None if settings.date is None else date.fromisoformat(settings.date),
        max_length=max(positions, 8),
        max_prompt_length=max(positions, 8) - 1,
    )


def _warnings(counts: EncodingCounts) -> tuple[str, ...]:
    return tuple(f"The model does not see {name}: its chat template leaves it out." for name in counts.left_out)


def _failed(question: ChatQuestion, error: PoclError) -> AnswerFailed:
    return AnswerFailed(id=question.id, code=error.code, message=error.message, fault=error.fault)
