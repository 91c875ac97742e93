"""Answers of a model to the prompts of samples, as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.callbacks import OnProgress, ShouldStop
from pocl.data.batches import EncodedSample
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate, model_stop_token_ids
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.vllm_generation import generate_with_vllm
from pocl.events import Sink
from pocl.models.precision import Precision
from pocl.out_of_memory import limited_by
from pocl.prompting.thoughts import Thought, visible_answer
from pocl.spec import Sampling

_ROUNDS = 4
_VLLM_SAMPLES = 4096


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
    stop_sequence: tuple[int, ...] = ()
    """The tokens of the plain text that ends a response, where no token does."""
    thought: Thought | None = None
    """What stands around the thought that a response begins with; answers are given without it."""
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
) -> list[str]:
    """Answers to the prompts, in the order of `samples`: greedy, or drawn by `sampler`.

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
            Decoding(
                generation.max_new_tokens,
                generation.batch_size,
                stop_token_ids(model, tokenizer, generation),
                pad_id=generation.end_of_response_id,
                precision=generation.precision,
                sampler=sampler,
                no_repeat_ngram=generation.no_repeat_ngram,
                graphs=generation.graphs,
            ),
            keys=[sample.digest for sample in samples],
            on_progress=on_progress,
            should_stop=should_stop,
            sink=generation.sink,
        )
    return [_visible_text(ids, tokenizer, generation) for ids in answers]


def stop_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: GenerationSettings
) -> frozenset[int]:
    """Every token that ends an answer."""
    return model_stop_token_ids(model, tokenizer) | {generation.end_of_response_id} | generation.end_tokens


def _visible_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, generation: GenerationSettings) -> str:
    """What an answer says: up to the plain text that ends it, and without the thought that it begins with."""
    ids = up_to_sequence(ids, generation.stop_sequence)
    thought = generation.thought
    if thought is not None:
        # A tag that is a special token would be lost with the others.
        stop = tokenizer.convert_tokens_to_ids(thought.stop)
        if stop in ids and stop in tokenizer.all_special_ids:
            ids = ids[ids.index(stop) + 1 :]
    return visible_answer(str(tokenizer.decode(ids, skip_special_tokens=True)), thought).strip()


def up_to_sequence(ids: Sequence[int], sequence: Sequence[int]) -> list[int]:
    """The ids before the first occurrence of a sequence; all of them where it is empty or does not occur."""
    size, ends_with = len(sequence), tuple(sequence)
    places = range(len(ids) - size + 1 if size else 0)
    stop = next((place for place in places if tuple(ids[place : place + size]) == ends_with), len(ids))
    return list(ids[:stop])


def generation_batches(samples: Sequence[EncodedSample], size: int) -> list[list[int]]:
    """Batches for generating answers, as indices: samples of like prompt length, longest first.

    The composition of the batches follows from the samples and the size alone, whatever their order: the bits of an
    answer's logits depend on it.
    """
    order = sorted(range(len(samples)), key=lambda i: (-samples[i].prompt_length, samples[i].digest, i))
    return [order[start : start + size] for start in range(0, len(order), size)]
