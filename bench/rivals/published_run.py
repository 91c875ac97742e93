"""The published recipe from ranking to the last evaluation, by its own means.

Answers come from `transformers` at 16 prompts a batch, all padded to the longest prompt allowed; ROUGE-L from
`rouge_score`; cross-entropy from logits of samples padded to 512; training as in :mod:`bench.rivals.published`. Models,
samples, stages, epochs, batches and evaluations are those of the specification. Favourable to it: it evaluates at
stage ends rather than after each epoch, and saves the weights alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.generate import greedy, left_padded
from bench.rivals import IGNORED
from bench.rivals.published import Padded, PublishedStep
from pocl.data.batches import EncodedSample
from pocl.models.precision import Precision, choose_device, choose_precision
from pocl.models.tokenizers import text_tokenizer
from pocl.plan import stage_table
from pocl.prompting.encoding import SampleEncoder
from pocl.samples.reading import read_samples
from pocl.spec import DataRef, DistillationSpec, ModelRef
from pocl.train.schedule import batches, cosine, shuffled

EnterPhase = Callable[[str], None]
_BATCH_SIZE = 16
"""Prompts that are answered at once, unless the specification says."""


@dataclass(frozen=True)
class _Run:
    spec: DistillationSpec
    tokenizer: PreTrainedTokenizerBase
    precision: Precision
    end_id: int

    def read(self, ref: DataRef | None) -> tuple[list[EncodedSample], list[str]]:
        """Read samples as token ids, and their references."""
        assert ref is not None  # The benchmark names files.
        assert ref.path is not None
        data, samples = self.spec.data, read_samples(Path(ref.path))
        encoder = SampleEncoder(
            text_tokenizer(self.tokenizer), None, data.system, data.max_length, data.max_prompt_length
        )
        return list(encoder.encode(samples).samples), [sample.references[0] for sample in samples]

    @torch.no_grad()
    def scores(
        self, model: PreTrainedModel, samples: Sequence[EncodedSample], references: Sequence[str], new_tokens: int
    ) -> tuple[list[float], list[float]]:
        """ROUGE-L and mean cross-entropy of each sample."""
        was_training = model.training
        model.train(False)
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        rouge: list[float] = []
        entropy: list[float] = []
        size = self.spec.evaluation.batch_size or _BATCH_SIZE
        for batch, batch_references in zip(batches(samples, size), batches(references, size), strict=True):
            answers = self._answers(model, batch, new_tokens)
            rouge += [scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(batch_references, answers, strict=True)]
            entropy += self._entropies(model, batch)
        model.train(was_training)
        return rouge, entropy

    def _answers(self, model: PreTrainedModel, samples: Sequence[EncodedSample], new_tokens: int) -> list[str]:
        ids, mask = left_padded([sample.prompt_ids for sample in samples], self.spec.data.max_prompt_length)
        with self.precision.autocast():
            answers = greedy(model, ids, mask, new_tokens, end_id=self.end_id, pad_id=self.end_id)
        return list(self.tokenizer.batch_decode(answers, skip_special_tokens=True))

    def _entropies(self, model: PreTrainedModel, samples: Sequence[EncodedSample]) -> list[float]:
        batch = Padded.collate(samples)
        with self.precision.autocast():
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none"
        )
        means: list[float] = (losses.sum(dim=1) / (batch.labels != IGNORED).sum(dim=1).clamp(min=1)).tolist()
        return means


def published_run(spec: DistillationSpec, workdir: Path, enter: EnterPhase) -> None:
    """Do all of `spec` and leave the weights of each stage in `workdir`; `enter` is called with each phase."""
    precision = choose_precision(spec.training.precision, choose_device("cpu"))
    assert spec.teacher is not None  # The benchmark names one.
    student, teacher = _load(spec.student, torch.float32), _load(spec.teacher, precision.weights)
    student.train()
    teacher.train(False).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(spec.student.path)
    run = _Run(spec, tokenizer, precision, int(tokenizer.eos_token_id))
    train, references = run.read(spec.data.train)
    held_out = run.read(spec.data.validation)
    new_tokens = spec.evaluation.max_new_tokens
    enter("ranking")
    order = _rank(*run.scores(student, train, references, spec.curriculum.ranking.max_new_tokens), spec)
    enter("evaluating")
    for model in (teacher, student):
        run.scores(model, *held_out, new_tokens)
    for stage in stage_table(spec, len(train)):
        enter("training")
        training = spec.training
        optimizer = AdamW(student.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
        step = PublishedStep(
            student, teacher, optimizer, precision, stage.temperature, stage.kd_weight, training.max_grad_norm
        )
        easiest = [train[index] for index in order[: stage.samples]]
        steps_done = 0
        for epoch in range(stage.epochs):
            for batch in batches(shuffled(easiest, spec.seed, stage.index, epoch), training.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = cosine(
                        steps_done, total=stage.steps, peak=training.learning_rate, floor=training.min_learning_rate
                    )
                step(batch)
                steps_done += 1
        student.save_pretrained(workdir / str(stage.index))
        enter("evaluating")
        run.scores(student, *held_out, new_tokens)


def _load(ref: ModelRef, dtype: torch.dtype) -> PreTrainedModel:
    assert ref.path is not None  # The benchmark names a directory.
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(ref.path, dtype=dtype)
    return model


def _rank(rouge: Sequence[float], entropy: Sequence[float], spec: DistillationSpec) -> list[int]:
    """Indices of the samples from easy to hard, by reciprocal rank fusion of both scores."""
    k, indices = spec.curriculum.ranking.rrf_k, range(len(rouge))
    fused = [0.0] * len(rouge)
    for order in (sorted(indices, key=lambda i: -rouge[i]), sorted(indices, key=lambda i: entropy[i])):
        for rank, index in enumerate(order, start=1):
            fused[index] += 1 / (k + rank)
    return sorted(indices, key=lambda i: -fused[i])
