"""Generation without a cache: at each token the whole text is read again.

It is right for every causal model, also for one whose cache of transformers is not: what follows a token changes
nothing at it, so rows are padded on the right as they are for training. It costs as many forward passes over whole
texts as an answer has tokens.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pocl.callbacks import ShouldStop
from pocl.errors import RunStopped
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.question import Question
from pocl.evaluation.repeated_ngrams import RepeatedNgrams
from pocl.models.heads import response_logits


def answer_uncached(
    model: PreTrainedModel,
    questions: Sequence[Question],
    decoding: Decoding,
    on_answer: Callable[[int, list[int]], None],
    should_stop: ShouldStop,
    on_partial: Callable[[int, list[int]], None] = lambda *_: None,
) -> None:
    """Answer questions in batches of the rows in flight; arguments as of
    :func:`~pocl.evaluation.padded_generation.answer_padded`.

    Raises:
        RunStopped: `should_stop`, polled before each token, returned true.
    """
    sampler, stop_text = decoding.sampler, decoding.stop_text
    for start in range(0, len(questions), decoding.rows_in_flight):
        batch = questions[start : start + decoding.rows_in_flight]
        texts = [list(question.prompt) for question in batch]
        going = list(range(len(batch)))
        uniforms = None
        if sampler is not None:
            longest = max(question.limit for question in batch)
            uniforms = sampler.uniforms([question.key for question in batch], longest).to(model.device)
        for step in range(max(question.limit for question in batch)):
            if should_stop():
                raise RunStopped
            logits = _next_logits(model, [texts[row] for row in going], decoding.pad_id)
            if decoding.no_repeat_ngram is not None:
                logits = _without_repeats(logits, [texts[row] for row in going], decoding.no_repeat_ngram)
            if sampler is None or uniforms is None:
                tokens = logits.argmax(dim=-1).tolist()
            else:
                tokens = sampler.choose(logits, uniforms[going, step]).tolist()
            kept = []
            for row, token in zip(going, tokens, strict=True):
                if token in decoding.eos_token_ids:
                    continue
                texts[row].append(token)
                answer = texts[row][len(batch[row].prompt) :]
                is_stopped = stop_text is not None and stop_text.length_with(answer, step) is not None
                if step + 1 < batch[row].limit and not is_stopped:
                    kept.append(row)
                    on_partial(start + row, answer)
            going = kept
            if not going:
                break
        for row, question in enumerate(batch):
            on_answer(start + row, texts[row][len(question.prompt) :])


def _next_logits(model: PreTrainedModel, texts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """The logits of the token after each text, `[texts, V]`."""
    width = max(map(len, texts))
    padded = [[*text, *[pad_id] * (width - len(text))] for text in texts]
    real = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
    input_ids = torch.tensor(padded, device=model.device)
    last = [row * width + len(text) - 1 for row, text in enumerate(texts)]
    return response_logits(
        model, input_ids, torch.tensor(real, device=model.device), torch.tensor(last, device=model.device)
    )


def _without_repeats(logits: Tensor, texts: Sequence[Sequence[int]], size: int) -> Tensor:
    """The logits with minus infinity for each token that would repeat an n-gram of this size."""
    repeats = RepeatedNgrams.empty(size, len(texts), max(map(len, texts)), logits.device)
    repeats.begin(range(len(texts)), texts)
    return repeats.banned(logits)
