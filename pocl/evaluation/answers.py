"""Answers of a model to the prompts of samples, as text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.callbacks import OnProgress, ShouldStop
from pocl.data.batches import EncodedSample
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate, model_stop_token_ids
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.stop_text import StopText
from pocl.evaluation.vllm_generation import generate_with_vllm
from pocl.events import Sink, Warned
from pocl.models.precision import Precision
from pocl.out_of_memory import limited_by
from pocl.prompting.thoughts import PLAIN, AnswerForm, VisibleAnswer
from pocl.spec import Sampling

_ROUNDS = 4
_VLLM_SAMPLES = 4096
_PROMPT_END = 64
"""Tokens of a prompt's end in which a thought that it has opened is looked for."""


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated."""

    max_new_tokens: int
    batch_size: int
    """Rows in flight: the prompts that are being answered at a time."""
    end_of_response_id: int
    """The token that ends a response in the data's template; the model's own stop tokens end an answer too."""
    precision: Precision
    end_tokens: frozenset[int] = frozenset()
    """Further tokens that end a response in the data's template."""
    stop_text: str = ""
    """The plain text that ends a response, where no token does; empty where one does."""
    form: AnswerForm = PLAIN
    """What is generated around what a response says; answers are given without it."""
    sampling: Sampling | None = None
    """How answers are sampled beside the greedy ones; None samples none."""
    no_repeat_ngram: int | None = None
    """The size of the n-grams that no answer repeats; None bans none."""
    generator: Literal["engine", "vllm"] = "engine"
    """What generates them: the engine's own loop, or vLLM."""
    graphs: bool = False
    """Whether decode steps are replayed as CUDA graphs, on CUDA."""
    sink: Sink = lambda _: None
    """Is told of fall-backs."""

    @property
    def samples_at_once(self) -> int:
        """Samples worth giving to the generator in one call, where there are more.

        The more there are, the longer all rows stay in flight; vLLM moreover starts anew at each call.
        """
        return max(_VLLM_SAMPLES, self.batch_size) if self.generator == "vllm" else _ROUNDS * self.batch_size


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[EncodedSample],
    *,
    generation: GenerationSettings,
    sampler: Sampler | None = None,
    on_progress: OnProgress | None = None,
    should_stop: ShouldStop = lambda: False,
) -> list[VisibleAnswer]:
    """What the answers to the prompts say, in the order of `samples`: greedy, or drawn by `sampler`.

    What is drawn for a sample follows from the seed of the sampler and the digest of the sample.

    Raises:
        RunStopped: when `should_stop` turns true.
        SizeTooLarge: memory ran out.
    """
    generate_all = generate_with_vllm if generation.generator == "vllm" else generate
    with limited_by("generation_rows"):
        answers = generate_all(
            model,
            [sample.prompt_ids for sample in samples],
            decoding_of(model, tokenizer, generation, sampler),
            keys=[sample.digest for sample in samples],
            on_progress=on_progress,
            should_stop=should_stop,
            sink=generation.sink,
        )
    return read_answers(answers, [sample.prompt_ids for sample in samples], tokenizer, generation.form)


def decoding_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationSettings,
    sampler: Sampler | None = None,
) -> Decoding:
    """How answers of a model are decoded by these settings: greedily, or drawn by `sampler`."""
    stop_text = generation.stop_text
    return Decoding(
        generation.max_new_tokens,
        generation.batch_size,
        stop_token_ids(model, tokenizer, generation),
        pad_id=generation.end_of_response_id,
        precision=generation.precision,
        sampler=sampler,
        stop_text=StopText(stop_text, partial(_text_of, tokenizer)) if stop_text else None,
        no_repeat_ngram=generation.no_repeat_ngram,
        graphs=generation.graphs,
    )


def read_answers(
    answers: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    form: AnswerForm,
) -> list[VisibleAnswer]:
    """What generated answers say, without their thoughts, the marks around them and special tokens."""
    if form == PLAIN:
        texts = (str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in answers)
        return [VisibleAnswer(text.strip()) for text in texts]
    special = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    any_special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
    read = (
        form.read(_text_of(tokenizer, ids), prompt=_text_of(tokenizer, prompt[-_PROMPT_END:]))
        for ids, prompt in zip(answers, prompts, strict=True)
    )
    return [visible._replace(text=any_special.sub("", visible.text).strip()) for visible in read]


def thoughts_not_closed(in_thought: Sequence[bool], pointer: str, max_new_tokens: int, answers: str) -> Warned | None:
    """The warning that answers end inside their thoughts; None where none does.

    Args:
        in_thought: Of each answer whether it does.
        pointer: The field of the specification that bounds them.
        answers: Whose answers they are and what to, for people.
    """
    unfinished = sum(in_thought)
    if not unfinished:
        return None
    message = (
        f"{unfinished} of {len(in_thought)} {answers} end inside their thought at {max_new_tokens} new tokens, and "
        "score 0: allow more with max_new_tokens, or turn thoughts off with data.chat_template_kwargs where the "
        "template has a variable for it"
    )
    return Warned(code="thoughts_not_closed", message=message, pointer=pointer)


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: GenerationSettings
) -> frozenset[int]:
    """Every token that ends an answer."""
    return model_stop_token_ids(model, tokenizer) | {generation.end_of_response_id} | generation.end_tokens


def _text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def generation_batches(samples: Sequence[EncodedSample], size: int) -> list[list[int]]:
    """Batches for generating answers, as indices: samples of like prompt length, longest first.

    The composition of the batches follows from the samples and the size alone, whatever their order: the bits of an
    answer's logits depend on it.
    """
    order = sorted(range(len(samples)), key=lambda i: (-samples[i].prompt_length, samples[i].digest, i))
    return [order[start : start + size] for start in range(0, len(order), size)]
