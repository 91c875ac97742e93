"""Scores of a model on held-out rows: ROUGE-L and exact match of greedy answers, cross-entropy, divergence."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.data.batches import Batch, Encoded, collate
from pocl.errors import DiskFull, RunStopped
from pocl.generate import eos_ids, generate
from pocl.models.precision import Precision
from pocl.reuse import ReuseStore
from pocl.rouge import exact_match, rouge_l
from pocl.teacher.comparison import Comparison
from pocl.teacher.signal import TeacherSignal

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scores:
    rows: int
    rouge_l: float
    """Mean F1 over rows, 0 to 100."""
    exact_match: float
    """Per cent of rows."""
    cross_entropy: float
    """Nats per response token."""
    divergence: float | None
    """Forward KL to the teacher at temperature 1, nats per response token."""


_SCORES = TypeAdapter(Scores)
_KIND, _SCORES_FILE = "scores", "scores.json"


@dataclass(frozen=True)
class Rows:
    """Rows to score, encoded once, with their references."""

    encoded: tuple[Encoded, ...]
    references: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Answering:
    """How answers are generated."""

    max_new_tokens: int
    batch_size: int
    end_id: int
    """The token that ends a response in the data's template; the model's own ends end an answer too."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    *,
    answering: Answering,
    precision: Precision,
    teacher: TeacherSignal | None = None,
    shared_vocabulary: int | None = None,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Scores:
    """Score `model`; without a teacher there is no divergence.

    Raises:
        RunStopped: when `should_stop` turns true.
    """
    answers = answer(
        model,
        tokenizer,
        rows.encoded,
        answering=answering,
        precision=precision,
        on_progress=on_progress,
        should_stop=should_stop,
    )
    pairs = list(zip(answers, rows.references, strict=True))
    comparison = Comparison(model, teacher, shared_vocabulary=shared_vocabulary, precision=precision)
    ce_sum = kl_sum = 0.0
    tokens = 0
    for _, batch in length_batches(rows.encoded, answering.batch_size, model.device):
        if should_stop():
            raise RunStopped
        entropies, divergences = comparison.scores(batch)
        ce_sum += entropies.sum().item()
        kl_sum += 0.0 if divergences is None else divergences.sum().item()
        tokens += batch.tokens
    return Scores(
        rows=len(pairs),
        rouge_l=sum(rouge_l(text, references) for text, references in pairs) / len(pairs),
        exact_match=100 * sum(exact_match(text, references) for text, references in pairs) / len(pairs),
        cross_entropy=ce_sum / max(1, tokens),
        divergence=kl_sum / max(1, tokens) if teacher is not None else None,
    )


class ScoredBefore(BaseModel):
    """All that the scores of a model depend on; equal inputs give equal scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    """Digest of weights and config."""
    data: str
    """Digest of the encoded rows."""
    references: str
    """Digest of what the answers are compared with."""
    max_new_tokens: int
    batch_size: int
    precision: str
    machine: str


def load_or_score(store: ReuseStore, inputs: ScoredBefore, score: Callable[[], Scores]) -> Scores:
    """The scores of these inputs, from another run that left them in `store`, or else new ones, left there."""
    key = hashlib.sha256(inputs.model_dump_json().encode()).hexdigest()
    found = store.find(_KIND, key)
    if found is not None:
        return _SCORES.validate_json((found / _SCORES_FILE).read_bytes())
    scores = score()
    # Without room for them they are merely not there for the next run.
    with suppress(DiskFull), store.add(_KIND, key) as scratch:
        (scratch / _SCORES_FILE).write_bytes(_SCORES.dump_json(scores))
    return scores


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Encoded],
    *,
    answering: Answering,
    precision: Precision,
    on_progress: OnProgress | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Greedy answers to the prompts, as text, in the order of `encoded`.

    Raises:
        RunStopped: when `should_stop` turns true.
    """
    eos = eos_ids(model, tokenizer) | {answering.end_id}
    with precision.autocast():
        ids = generate(
            model,
            [row.prompt_ids for row in encoded],
            max_new_tokens=answering.max_new_tokens,
            batch_size=answering.batch_size,
            eos_token_ids=eos,
            pad_id=answering.end_id,
            on_progress=on_progress,
            should_stop=should_stop,
        )
    return [str(tokenizer.decode(one, skip_special_tokens=True)).strip() for one in ids]


def last_turn_cross_entropy(
    model: PreTrainedModel,
    encoded: Sequence[Encoded],
    *,
    batch_size: int,
    precision: Precision,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Mean cross-entropy of each row's last assistant turn, in nats per token, in the order of `encoded`.

    Raises:
        RunStopped: when `should_stop` turns true.
    """
    comparison = Comparison(model, None, shared_vocabulary=None, precision=precision)
    means = [0.0] * len(encoded)
    for indices, batch in length_batches(encoded, batch_size, model.device):
        if should_stop():
            raise RunStopped
        losses, _ = comparison.scores(batch)
        of_row = batch.predicts.nonzero()[:, 0]
        counted = batch.last_turn.to(losses.dtype)
        zeros = torch.zeros(len(indices), dtype=losses.dtype, device=losses.device)
        sums = zeros.index_add(0, of_row, losses * counted)
        counts = zeros.index_add(0, of_row, counted)
        for index, mean in zip(indices, (sums / counts.clamp(min=1)).tolist(), strict=True):
            means[index] = mean
    return means


def length_batches(encoded: Sequence[Encoded], size: int, device: torch.device) -> list[tuple[list[int], Batch]]:
    """Batches of rows of similar length, each with the indices of its rows; their composition is fixed."""
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i].input_ids), encoded[i].digest, i))
    pieces = [order[start : start + size] for start in range(0, len(order), size)]
    return [(piece, collate([encoded[i] for i in piece], device=device)) for piece in pieces]
