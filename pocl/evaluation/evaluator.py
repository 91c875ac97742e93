"""The evaluations of one run: the student again and again, and the teacher once."""

import math
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pocl.callbacks import OnProgress, ShouldStop, throttle
from pocl.errors import LossDiverged
from pocl.evaluation.answers import GenerationSettings, stop_token_ids
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.score_cache import ScoreCacheKey, load_or_score
from pocl.evaluation.scores import Scores, evaluate
from pocl.evaluation.token_scores import ScoringSizes
from pocl.models.loading import LazyModel
from pocl.models.precision import machine_fingerprint
from pocl.storage.shared_cache import SharedCache
from pocl.teacher.signal import TeacherSignal


@dataclass(frozen=True)
class Evaluator:
    """Scores models on the validation data of a run, all alike."""

    dataset: EncodedDataset
    tokenizer: PreTrainedTokenizerBase
    generation: GenerationSettings
    scoring: ScoringSizes
    shared_vocabulary: int | None
    """Both heads agree on the ids below it; None without a teacher."""
    on_progress: OnProgress
    """Called with (answers given, answers to give), once a second at most."""
    should_stop: ShouldStop

    def score(self, model: PreTrainedModel, teacher: TeacherSignal | None, *, sampled: bool = True) -> Scores:
        """Score `model`, with its divergence from `teacher` if there is one.

        Args:
            sampled: Whether sampled answers are scored too, where the specification asks for them.

        Raises:
            LossDiverged: the cross-entropy or the divergence is not finite.
            RunStopped: when `should_stop` turns true.
            SizeTooLarge: memory ran out.
        """
        scores = evaluate(
            model,
            self.tokenizer,
            self.dataset,
            generation=self.generation if sampled else replace(self.generation, sampling=None),
            scoring=self.scoring,
            teacher=teacher,
            shared_vocabulary=self.shared_vocabulary,
            on_progress=throttle(self.on_progress),
            should_stop=self.should_stop,
        )
        if not math.isfinite(scores.cross_entropy + (scores.divergence or 0.0)):
            raise LossDiverged("the loss on the validation samples is not finite")
        return scores

    def score_teacher(self, teacher: LazyModel, cache: SharedCache) -> Scores:
        """Score the teacher itself, unless another run has left its scores in `cache`: only then is it loaded.

        Raises:
            LossDiverged, RunStopped, SizeTooLarge: as :meth:`score`.
        """
        return load_or_score(cache, self._cache_key(teacher), lambda: self.score(teacher.whole(), None))

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
