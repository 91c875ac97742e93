"""The evaluations of one run: the student again and again, and the teacher once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.callbacks import OnProgress, ShouldStop
from pocl.errors import LossDiverged
from pocl.evaluation.answers import GenerationSettings, generate_answers, stop_token_ids
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.row_scores import MAX_ROWS, MAX_SHOWN, RowScores, shown
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.score_cache import ScoreCacheKey, load_or_score
from pocl.evaluation.scores import AnswerScores, Scores, summarise_seeds
from pocl.evaluation.token_scores import ScoringSizes, TokenScores, token_scores
from pocl.models.loading import LazyModel
from pocl.models.precision import machine_fingerprint
from pocl.prompting.thoughts import VisibleAnswer
from pocl.spec import Sampling
from pocl.storage.shared_cache import SharedCache
from pocl.teacher.signal import TeacherSignal


@dataclass(frozen=True)
class Evaluator:
    """Scores models on the validation data of a run, all alike."""

    dataset: EncodedDataset
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationSettings
    scoring: ScoringSizes
    shared_vocabulary: int | None = None
    """Both heads agree on the ids below it; None without a teacher."""
    on_progress: OnProgress = lambda _done, _total: None
    """Called with (answers given, answers to give), over all seeds."""
    should_stop: ShouldStop = lambda: False
    """Polled before each batch and each generated token."""

    def score(self, model: PreTrainedModel, teacher: TeacherSignal | None, *, sampled: bool = True) -> Scores:
        """Score `model`, with its divergence from `teacher` if there is one.

        Samples without a reference are answered, once and greedily, and not scored.

        Args:
            sampled: Whether sampled answers are scored too, where the specification asks for them.

        Raises:
            LossDiverged: the cross-entropy or the divergence is not finite.
            RunStopped: when `should_stop` turns true.
            SizeTooLarge: memory ran out.
            ValueError: there is no sample.
        """
        if not self.dataset.samples:
            raise ValueError("an evaluation needs a sample")
        dataset, scored = self.dataset, self.dataset.scored
        sampling = self.generation.sampling if sampled and scored.samples else None
        answers, *answers_by_seed = self._answer(model, sampling)
        greedy, *by_seed = (
            AnswerScores.of([answer.text for answer in each], scored)
            for each in ([answers[row] for row in dataset.scored_rows], *answers_by_seed)
        )
        tokens = token_scores(
            model,
            scored.samples,
            sizes=self.scoring,
            precision=self.generation.precision,
            teacher=teacher,
            shared_vocabulary=self.shared_vocabulary,
            should_stop=self.should_stop,
        )
        if not math.isfinite(tokens.cross_entropy + (tokens.divergence or 0.0)):
            raise LossDiverged("the loss on the validation samples is not finite")
        mean_rouge_l, mean_exact_match = greedy.means
        return Scores(
            rows=len(scored.samples),
            rouge_l=mean_rouge_l,
            exact_match=mean_exact_match,
            cross_entropy=tokens.cross_entropy,
            divergence=tokens.divergence,
            unfinished_thoughts=sum(answers[row].in_thought for row in dataset.scored_rows),
            sampled=None if sampling is None else summarise_seeds(sampling, by_seed),
            by_row=self._row_scores(answers, greedy, tokens),
            answers=tuple(answer.text for answer in answers),
            in_thought=tuple(answer.in_thought for answer in answers),
        )

    def score_teacher(self, teacher: LazyModel, cache: SharedCache) -> Scores:
        """Score the teacher itself, unless another run has left its scores in `cache`: only then is it loaded.

        Raises:
            LossDiverged, RunStopped, SizeTooLarge: as :meth:`score`.
        """
        return load_or_score(cache, self._cache_key(teacher), lambda: self.score(teacher.whole(), None))

    def _answer(self, model: PreTrainedModel, sampling: Sampling | None) -> list[list[VisibleAnswer]]:
        """The greedy answers to all samples, and with each seed of `sampling` the sampled ones to those that have a
        reference.
        """
        samplers = []
        if sampling is not None:
            samplers = [Sampler(sampling.temperature, sampling.top_p, seed) for seed in sampling.seeds]
        return [
            generate_answers(
                model,
                self.tokenizer,
                self.dataset.samples if sampler is None else self.dataset.scored.samples,
                generation=self.generation,
                sampler=sampler,
                on_progress=_part_of(self.on_progress, index, 1 + len(samplers)),
                should_stop=self.should_stop,
            )
            for index, sampler in enumerate((None, *samplers))
        ]

    def _row_scores(self, answers: Sequence[VisibleAnswer], greedy: AnswerScores, tokens: TokenScores) -> RowScores:
        dataset, scored_rows = self.dataset, self.dataset.scored_rows[:MAX_ROWS]
        return RowScores(
            rouge_l=tuple(round(score, 4) for score in greedy.rouge_l[:MAX_ROWS]),
            exact_match=greedy.exact_match[:MAX_ROWS],
            cross_entropy=tuple(round(nats, 6) for nats in tokens.cross_entropy_sums[:MAX_ROWS]),
            tokens=tuple(dataset.samples[row].predicted_tokens for row in scored_rows),
            unfinished_thoughts=tuple(answers[row].in_thought for row in scored_rows),
            shown=tuple(
                shown(prompt, references, answer.text, unfinished_thought=answer.in_thought)
                for prompt, references, answer in zip(
                    dataset.prompts[:MAX_SHOWN] or self._decode_prompts(), dataset.references, answers, strict=False
                )
            ),
        )

    def _decode_prompts(self) -> list[str]:
        """The first prompts as the text of their tokens, with what the template writes around them."""
        return [
            str(self.tokenizer.decode(list(sample.prompt_ids), skip_special_tokens=True))
            for sample in self.dataset.samples[:MAX_SHOWN]
        ]

    def _cache_key(self, model: LazyModel) -> ScoreCacheKey:
        generation = self.generation
        return ScoreCacheKey(
            model=model.digest,
            data=self.dataset.digest,
            references=self.dataset.references_digest,
            end_ids=tuple(sorted(stop_token_ids(model.structure, self.tokenizer, generation))),
            answer_form=f"{generation.stop_text!r} {generation.form}",
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.batch_size,
            generator=generation.generator,
            scoring_tokens=self.scoring.tokens,
            chunk_tokens=self.scoring.chunk_tokens,
            sampling=generation.sampling,
            precision=generation.precision.name,
            machine=machine_fingerprint(generation.precision.device),
        )


def _part_of(on_progress: OnProgress, part: int, parts: int) -> OnProgress:
    """Report the progress of one of several equal parts as progress of the whole."""
    return lambda done, total: on_progress(part * total + done, parts * total)
