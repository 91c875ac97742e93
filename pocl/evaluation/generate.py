"""Generation of answers to many prompts, greedy or sampled, with a key-value cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.callbacks import OnProgress, ShouldStop
from pocl.evaluation.continuous_batching import ContinuousBatching
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.padded_generation import answer_padded, can_decode_padded
from pocl.evaluation.question import Question
from pocl.evaluation.uncached_generation import answer_uncached
from pocl.events import Sink, Warned
from pocl.models.inference_weights import inference_weights
from pocl.models.precision import Precision
from pocl.models.rope_scaling import rope_switch_length
from pocl.models.slot_decoder import can_decode_in_slots, fits_window

OnAnswer = Callable[[int, list[int]], None]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    *,
    keys: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    on_partial: OnAnswer | None = None,
    should_stop: ShouldStop = lambda: False,
    sink: Sink = lambda _: None,
) -> list[list[int]]:
    """Generate an answer to each prompt, token by token, until an end-of-sequence token or the limit.

    An answer does not depend on the other prompts, their order or the rows in flight, but for rounding: see
    :mod:`~pocl.evaluation.continuous_batching` for what its bits depend on.

    Args:
        model: Any causal language model; it runs in eval mode, and its mode is restored.
        prompts: Token ids, at least one each. They may contain `pad_id` and end-of-sequence tokens.
        keys: One key for each prompt, from which its random draws follow together with the seed of the sampler;
            its index in `prompts` unless given.
        on_progress: Called with (prompts answered, prompts) whenever answers have ended.
        on_partial: Called every few tokens with the index of a prompt whose answer goes on, and its tokens so far.
        should_stop: Polled before each prefill and each token.
        sink: Is told where the model cannot be batched continuously, by the code of its :class:`FallbackDecoding`.

    Returns:
        The new token ids of each answer, in the order of `prompts`.

    Raises:
        RunStopped: `should_stop` returned true.
        ValueError: a prompt is empty or leaves no position for an answer, or there are more or fewer keys than prompts.
    """
    questions = questions_of(model, prompts, decoding.max_new_tokens, keys)
    answers: dict[int, list[int]] = {}

    def on_answer(index: int, answer: list[int]) -> None:
        answers[index] = answer
        if on_progress is not None:
            on_progress(len(answers), len(prompts))

    was_training = model.training
    model.train(False)
    try:
        # The longest prompts come first: what does not fit into memory fails at once and not after an hour.
        order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
        if order:
            asked = [questions[index] for index in order]
            report = None if on_partial is None else _renumbered(on_partial, order)
            answerer = _Answerer(model, decoding, should_stop, sink, report)
            answerer.answer_in_parts(asked, lambda place, answer: on_answer(order[place], answer))
    finally:
        model.train(was_training)
    return [answers[index] for index in range(len(prompts))]


def model_stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The end-of-sequence tokens of the generation config and of the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(int(id_) for id_ in (*ids, tokenizer.eos_token_id) if id_ is not None)


def questions_of(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    keys: Sequence[str] | None,
) -> list[Question]:
    """What :func:`generate` is asked, in the order of `prompts`; arguments and errors are those of it."""
    keys = [str(index) for index in range(len(prompts))] if keys is None else keys
    if len(keys) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts have {len(keys)} keys")
    positions = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        positions = None
    questions = []
    for index, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
        if not prompt:
            raise ValueError(f"prompt {index} is empty")
        if positions is not None and len(prompt) >= positions:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; the model has {positions} positions")
        limit = max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
        questions.append(Question(prompt, limit, key))
    return questions


@dataclass(frozen=True)
class _Answerer:
    """Answers questions with one model in eval mode; the fields are arguments of :func:`generate`."""

    model: PreTrainedModel
    decoding: Decoding
    should_stop: ShouldStop
    sink: Sink
    on_partial: OnAnswer | None = None

    def answer_in_parts(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Answer `questions`; where the model reads longer texts with other rotary factors, an answer that grows beyond
        that length is gone on with as a text that is read anew, since nothing that was cached before holds any more.
        """
        switch = rope_switch_length(self.model)
        if switch is None:
            self.answer(questions, on_answer)
            return
        first_parts = [question.up_to(switch) for question in questions]
        begun: dict[int, list[int]] = {}

        def on_first_part(index: int, answer: list[int]) -> None:
            if len(answer) == first_parts[index].limit < questions[index].limit:
                begun[index] = answer
            else:
                on_answer(index, answer)

        self.answer(first_parts, on_first_part)
        places = sorted(begun)
        if places:
            rest = [questions[index].after(begun[index]) for index in places]
            beginnings = [begun[index] for index in places]
            report = None if self.on_partial is None else _renumbered(self.on_partial, places, beginnings)
            replace(self, on_partial=report).answer(
                rest, lambda place, answer: on_answer(places[place], beginnings[place] + answer)
            )

    def answer(self, questions: Sequence[Question], on_answer: OnAnswer) -> None:
        """Answer `questions` in their order; `on_answer` is called with each one's index and new tokens."""
        model, decoding = self.model, self.decoding
        trials, precision = _trials.setdefault(model, _DecodingTrials()), decoding.precision_on(model.device)
        with inference_weights(model, precision, decoding.rows_in_flight):
            longest = max(len(question.prompt) + question.limit for question in questions)
            if fits_window(model, longest) and trials.in_slots(model, precision):
                ContinuousBatching(model, questions, decoding).run(on_answer, self.should_stop, self.on_partial)
                return
        with precision.autocast():
            fallback = trials.fallback(model, precision)
            message = f"a {model.config.model_type} model {fallback.reason}, which takes longer"
            self.sink(Warned(code=fallback.code, message=message))
            answer = answer_uncached if fallback is FallbackDecoding.UNCACHED else answer_padded
            if fallback is FallbackDecoding.SINGLE:
                decoding = replace(decoding, rows_in_flight=1)
            answer(model, questions, decoding, on_answer, self.should_stop, self.on_partial or (lambda *_: None))


def _renumbered(
    report: OnAnswer, indices: Sequence[int], beginnings: Sequence[Sequence[int]] | None = None
) -> OnAnswer:
    """`report` for questions that are asked in another order, or gone on with: of the question at `place` it is given
    `indices[place]`, and its answer behind `beginnings[place]`.
    """

    def report_renumbered(place: int, answer: list[int]) -> None:
        report(indices[place], [*(() if beginnings is None else beginnings[place]), *answer])

    return report_renumbered


class FallbackDecoding(Enum):
    """How a model that cannot be batched continuously is answered, from the fastest on."""

    PADDED = (
        "generation_padded",
        "cannot have rows in flight at tokens of their own: answers are generated in padded batches",
    )
    SINGLE = (
        "generation_single",
        "lets padding enter its state: answers are generated one by one",
    )
    UNCACHED = (
        "generation_uncached",
        "cannot go on from a cache as it reads a text at once: answers are generated without one",
    )

    def __init__(self, code: str, reason: str) -> None:
        self.code = code
        """Of the event that says so."""
        self.reason = reason


class _DecodingTrials:
    """What trying a model found, by the precision: it follows from the model's code and not from its weights."""

    def __init__(self) -> None:
        self._in_slots: dict[str, bool] = {}
        self._fallbacks: dict[str, FallbackDecoding] = {}

    def in_slots(self, model: PreTrainedModel, precision: Precision) -> bool:
        """Whether rows can be in flight at tokens of their own; with the inference weights of that precision."""
        if precision.name not in self._in_slots:
            self._in_slots[precision.name] = can_decode_in_slots(model)
        return self._in_slots[precision.name]

    def fallback(self, model: PreTrainedModel, precision: Precision) -> FallbackDecoding:
        """The fastest fallback that is right; under the autocast of that precision."""
        if precision.name not in self._fallbacks:
            fallback = FallbackDecoding.UNCACHED
            if can_decode_padded(model, together=True):
                fallback = FallbackDecoding.PADDED
            elif can_decode_padded(model, together=False):
                fallback = FallbackDecoding.SINGLE
            self._fallbacks[precision.name] = fallback
        return self._fallbacks[precision.name]


_trials: WeakKeyDictionary[PreTrainedModel, _DecodingTrials] = WeakKeyDictionary()
