"""The phases of one run, in the order in which they happen."""

import os
from collections.abc import Set
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import PreTrainedModel

from pocl.callbacks import OnProgress, ShouldStop
from pocl.curriculum.measurer import DifficultyMeasurer
from pocl.curriculum.ranking import RankedSample, load_or_rank, rank_by_column, save_column_ranking
from pocl.data.batches import EncodedSample
from pocl.determinism import deterministic_kernels, reasons_not_exact
from pocl.errors import DatasetInvalid, ModelUnsupported
from pocl.evaluation.answers import GenerationSettings
from pocl.evaluation.answers_file import AnswersFile, EvaluationKey
from pocl.evaluation.constant_scores import constant_metric, constant_ranking
from pocl.evaluation.dataset import EncodedDataset
from pocl.evaluation.evaluator import Evaluator
from pocl.evaluation.sampling import Sampler
from pocl.evaluation.scores import Scores
from pocl.evaluation.token_scores import ScoringSizes
from pocl.events import (
    ArtifactWritten,
    CheckpointSaved,
    DataEncoded,
    Evaluated,
    Event,
    Phase,
    PhaseChanged,
    Progressed,
    RunFinished,
    RunStarted,
    Sink,
    Warned,
)
from pocl.export.model_card import CardFacts, SamplesUsed
from pocl.export.student import StudentExport
from pocl.export.tokenizer_reading import is_read_as_written
from pocl.layout import (
    ANSWERS_FILE,
    CHECKPOINTS_DIR,
    FINAL_DIR,
    MODEL_DIGESTS_FILE,
    RANKING_FILE,
    REPORT_FILE,
    RESULT_FILE,
    SPEC_FILE,
    checkpoint_dir,
)
from pocl.losses.buffers import LossExecution
from pocl.models.compiled_layers import CompiledLayers, layer_compiler
from pocl.models.digest import DigestStore
from pocl.models.hub import HuggingFaceHub, PinnedHub
from pocl.models.layers import decoder_layers
from pocl.models.loading import LazyModel, load_weights
from pocl.models.output_head import extract_head
from pocl.models.packed import reason_not_to_pack
from pocl.models.precision import choose_device, choose_precision, machine_fingerprint
from pocl.out_of_memory import HALVED_IS_NOT_EXACT, HalvedSize, fit_or_refuse, retry_halved
from pocl.plan import StagePlan, stage_table
from pocl.plan_warnings import plan_warnings
from pocl.prepare import Corpus, Models, check_generator, encode_corpus, load_models
from pocl.rankers import RankerSetup, choose_ranker
from pocl.read_data import read_data
from pocl.report.result import Result, build_result, conclude, origin_of, write_result
from pocl.run_inputs import model_inputs, ranker_inputs, sample_inputs, samples_used
from pocl.sizes import RunSizes, Workload, choose_sizes, measure_free_memory
from pocl.spec import ColumnRanker, DistillationSpec, Sampling
from pocl.storage.inputs import RunInputs, pin_inputs, pinned_inputs
from pocl.storage.manifest import read_manifest
from pocl.storage.shared_cache import SharedCache
from pocl.storage.workdir import pin_again, pin_spec
from pocl.teacher.cache import CachedTeacher, open_teacher
from pocl.teacher.distillation_loss import TrainingLoss, training_loss
from pocl.teacher.shards import choose_batch_tokens
from pocl.teacher.signal import LiveTeacher, TeacherSignal, TeacherSource
from pocl.train import checkpoint
from pocl.train.checkpoint import EvaluatedRows, ResumePoint, TrainState
from pocl.train.loop import Score, Student, Trainer
from pocl.train.optimizer import make_optimizer
from pocl.train.prefetch import Prefetcher
from pocl.train.schedule import training_order


class Pipeline:
    """One run of one specification: validate, load, rank, cache the teacher, train, evaluate and export."""

    def __init__(
        self,
        spec: DistillationSpec,
        workdir: Path,
        sink: Sink,
        *,
        should_stop: ShouldStop,
        should_pause: ShouldStop,
        shared_cache: SharedCache,
        resources: ExitStack,
        posted_spec: DistillationSpec,
    ) -> None:
        """Pin the specification in `workdir`, and set up threads, device and precision.

        Args:
            resources: Is given what must be released when the run ends.
            posted_spec: `spec` before its names became paths of this machine.
        """
        self._posted_spec = posted_spec
        self._spec = pin_spec(
            workdir, spec, spec.with_choices(_choices_at_start(spec)).with_day(datetime.now(UTC).date())
        )
        self._workdir = workdir
        self._sink = sink
        self._should_stop = should_stop
        self._should_pause = should_pause
        self._shared_cache = shared_cache
        self._resources = resources
        torch.set_num_threads(self._spec.resources.threads or 1)
        # Progress bars would fill a log file; the events say how far a run is.
        transformers.utils.logging.disable_progress_bar()
        self._device = choose_device(self._spec.resources.device)
        if self._spec.resources.deterministic:
            resources.enter_context(deterministic_kernels(self._device))
        self._not_exact = reasons_not_exact(spec, self._device)
        self._warned_codes: set[str] = set()
        self._ranker_inputs = RunInputs()
        self._answers = AnswersFile(workdir / ANSWERS_FILE)
        self._data_commits: dict[str, str] = {}
        self._data_encoded: list[DataEncoded] = []
        self._precision = choose_precision(self._spec.training.precision, self._device)
        sink(ArtifactWritten(kind="spec", path=SPEC_FILE))

    def run(self) -> Result:
        """Do what is left of the run.

        Raises:
            PoclError: whose class says what went wrong.
        """
        self._sink(PhaseChanged(phase="validating"))
        check_generator(self._spec.resources.generator)
        data = read_data(self._spec)
        for code, sentence in data.notes:
            self._sink(Warned(code=code, message=sentence))
        splits, held_out, self._data_commits = data.splits, data.held_out, data.commits
        resume_point = self._find_resume_point()
        inputs = sample_inputs(self._posted_spec, splits.train, held_out)
        pinned = self._refuse_changes(resume_point, inputs)
        table = stage_table(self._spec, len(splits.train))
        if resume_point is None:
            for warning in plan_warnings(self._spec, table):
                self._sink(Warned(code=warning.code, message=warning.message))
        self._sink(
            RunStarted(
                resumed_from_step=None if resume_point is None else resume_point.state.step,
                total_steps=table[-1].first_step + table[-1].steps,
                stages=len(table),
            )
        )
        self._sink(PhaseChanged(phase="loading"))
        digests = DigestStore(self._shared_cache.root / MODEL_DIGESTS_FILE)
        models = load_models(
            self._spec,
            device=self._device,
            precision=self._precision,
            digests=digests,
            hub=PinnedHub(HuggingFaceHub(), pinned.commits),
        )
        inputs = inputs.joined(model_inputs(self._posted_spec, models))
        self._refuse_changes(resume_point, inputs)
        # The model that ranks is read later, and was pinned by an earlier start.
        pin_inputs(self._workdir, pinned.joined(inputs))
        self._warn_of_models(models)
        self._choose_sizes(models)
        corpus = encode_corpus(self._spec.data, models, splits.train, held_out)
        self._data_encoded = [
            DataEncoded(part=part, template=corpus.template_kind, counts=counts)
            for part, counts in corpus.counts.items()
        ]
        for event in self._data_encoded:
            self._sink(event)
        if resume_point is None:
            for about_samples in corpus.warnings:
                self._sink(Warned(code=about_samples.code, message=about_samples.message))
        self._report_unscored(corpus)
        ranking = self._rank(models, corpus, digests, resume_point)
        inputs = inputs.joined(self._ranker_inputs)
        pin_inputs(self._workdir, inputs)
        made = set() if resume_point is None else resume_point.state.evaluation_keys
        self._answers.keep_only(made)
        teacher_scores = self._score_teacher(models, corpus, made)
        teacher = self._open_teacher(models, corpus, resume_point)
        if models.teacher is not None:
            # A cached teacher needs its layers no more: the memory goes to the student.
            models.teacher.release()
        rows = training_order(
            self._spec.curriculum.control,
            [sample.row for sample in ranking],
            corpus.train.sample_digests,
            self._spec.seed,
        )
        training_samples = [corpus.train.samples[row] for row in rows]
        score = partial(self._score_student, models, corpus, teacher) if corpus.held_out else None
        trainer = self._trainer(models, training_samples, table, resume_point, teacher, score)
        trainer.student.export = self._student_export(models, corpus, table, samples_used(splits.train, held_out))
        trainer.state.inputs = inputs
        trainer.splits = tuple(corpus.held_out)
        trainer.keep_answers = lambda key, scores: self._answers.add(key, corpus.held_out[key.split], scores)
        for evaluated, row_scores in teacher_scores:
            trainer.state.evaluations += evaluated
            trainer.state.row_scores.append(row_scores)
        state = trainer.run()
        return self._export(models, trainer.student, state, ranking)

    def _find_resume_point(self) -> ResumePoint | None:
        resume_point, damaged = checkpoint.find_resume_point(self._workdir / CHECKPOINTS_DIR)
        for sentence in damaged:
            self._sink(Warned(code="checkpoint_passed_over", message=sentence))
        if resume_point is None and damaged:
            self._sink(Warned(code="started_again", message="no whole checkpoint is left: starting again from step 0"))
        if resume_point is not None and resume_point.state.machine != machine_fingerprint(self._device):
            self._warn_not_exact(
                f"continued on another machine, so not to the same bits: {machine_fingerprint(self._device)}"
            )
        return resume_point

    def _warn_of_models(self, models: Models) -> None:
        for role, model in (("student", models.student), ("teacher", models.teacher)):
            for warning in () if model is None else model.warnings:
                self._sink(Warned(code=warning.code, message=f"{role}: {warning.message}"))
        for warning in () if models.vocabulary is None else models.vocabulary.warnings():
            self._sink(Warned(code=warning.code, message=warning.message))

    def _refuse_changes(self, resume_point: ResumePoint | None, inputs: RunInputs) -> RunInputs:
        """Compare `inputs` with those that the run began with.

        Returns:
            Those that it began with; none for a run that begins.

        Raises:
            InputsChanged: they differ; nothing in the directory is touched.
        """
        pinned = [pinned_inputs(self._workdir) or RunInputs()]
        if resume_point is not None:
            pinned.append(resume_point.state.inputs)
        for before in pinned:
            before.refuse_changes(inputs)
            if names := before.incomparable(inputs):
                message = (
                    f"continued with other versions, which compute other digests: whether {', '.join(names)} changed "
                    "since the run began cannot be told"
                )
                self._warn_once(Warned(code="inputs_not_compared", message=message))
        return pinned[-1]

    def _warn_once(self, event: Event) -> None:
        """Report a fall-back that would be met again and again."""
        if isinstance(event, Warned) and event.code in self._warned_codes:
            return
        if isinstance(event, Warned):
            self._warned_codes.add(event.code)
        self._sink(event)

    def _warn_not_exact(self, reason: str) -> None:
        self._sink(Warned(code="not_exact", message=reason))
        self._note_not_exact(reason)

    def _note_not_exact(self, reason: str) -> None:
        if reason not in self._not_exact:
            self._not_exact.append(reason)

    @property
    def _sizes(self) -> RunSizes:
        return RunSizes.pinned_in(self._spec)

    def _choose_sizes(self, models: Models) -> None:
        """Choose and pin those sizes that are neither posted nor pinned already."""
        teacher = None if models.teacher is None else models.teacher.structure
        workload = Workload.of(
            self._spec,
            models.student.model,
            teacher,
            precision=self._precision,
            has_fused_head=extract_head(models.student.model) is not None,
        )
        self._pin(self._spec.with_choices(choose_sizes(workload, measure_free_memory(self._device)).choices))

    def _halve(self, size: HalvedSize) -> None:
        """Pin half the size: a run that goes on after an interruption must not begin with the whole one again."""
        sizes = self._sizes.halved(size)
        self._pin(self._spec.with_fields(sizes.choices))
        message = f"out of memory: begun again with {getattr(sizes, size)} {size.replace('_', ' ')}"
        self._sink(Warned(code=f"{size}_halved", message=message))
        self._note_not_exact(HALVED_IS_NOT_EXACT)

    def _pin(self, spec: DistillationSpec) -> None:
        if spec != self._spec:
            pin_again(self._workdir, spec)
            self._spec = spec
            self._sink(ArtifactWritten(kind="spec", path=SPEC_FILE))

    def _report_unscored(self, corpus: Corpus) -> None:
        """Say of which samples to evaluate on the answers are kept without a score."""
        for name, dataset in corpus.held_out.items():
            if unscored := len(dataset.samples) - len(dataset.scored.samples):
                message = f"{unscored} {name} samples have no reference to compare with: they are answered, not scored"
                self._sink(Warned(code="answers_not_scored", message=message))

    def _evaluator(self, models: Models, corpus: Corpus, dataset: EncodedDataset) -> Evaluator:
        return Evaluator(
            dataset,
            models.tokenizer,
            self._generation(self._spec.evaluation.max_new_tokens, corpus, sampling=self._spec.evaluation.sampling),
            self._scoring,
            shared_vocabulary=models.shared_vocabulary,
            on_progress=self._progress("evaluating", "rows"),
            should_stop=self._should_stop,
        )

    def _generation(
        self, max_new_tokens: int, corpus: Corpus, *, sampling: Sampling | None = None
    ) -> GenerationSettings:
        return GenerationSettings(
            max_new_tokens,
            self._sizes.generation_rows,
            end_of_response_id=corpus.ending.end_of_response_id,
            end_tokens=corpus.ending.end_tokens,
            stop_sequence=corpus.ending.stop_sequence,
            thought=corpus.ending.thought,
            precision=self._precision,
            sampling=sampling,
            generator=self._spec.resources.generator,
            graphs=self._spec.resources.graphs,
            sink=self._warn_once,
        )

    @property
    def _scoring(self) -> ScoringSizes:
        return ScoringSizes(self._sizes.scoring_tokens, self._sizes.loss_chunk_tokens)

    def _rank(
        self, models: Models, corpus: Corpus, digests: DigestStore, resume_point: ResumePoint | None
    ) -> list[RankedSample]:
        """Rank the training samples by their difficulty, or load an equal ranking; empty where nothing uses it.

        Raises:
            InputsChanged: the model that ranks is not the one that the run began with; nothing is ranked.
        """
        if not self._spec.curriculum.uses_ranking:
            return []
        self._sink(PhaseChanged(phase="ranking"))
        ranking_spec = self._spec.curriculum.ranking
        if isinstance(ranking_spec.ranker, ColumnRanker):
            return self._rank_by_column(ranking_spec.ranker, corpus)
        temperature = ranking_spec.temperature
        sampler = None if temperature is None else Sampler(temperature=temperature, top_p=1.0, seed=self._spec.seed)

        def rank() -> tuple[list[RankedSample], bool]:
            setup = RankerSetup(models, corpus, self._precision, self._sizes, digests, self._sink, self._should_stop)
            generation = self._generation(ranking_spec.max_new_tokens, corpus)
            ranker = choose_ranker(self._spec, setup)
            self._ranker_inputs = ranker_inputs(self._posted_spec, ranker.digest)
            self._refuse_changes(resume_point, self._ranker_inputs)
            measurer = DifficultyMeasurer(
                ranker,
                models.tokenizer,
                corpus.train,
                template=corpus.template,
                rrf_k=ranking_spec.rrf_k,
                generation=replace(generation, no_repeat_ngram=ranking_spec.no_repeat_ngram),
                sampler=sampler,
                scoring=self._scoring,
                on_progress=self._progress("ranking", "samples"),
                should_stop=self._should_stop,
            )
            return load_or_rank(
                self._workdir,
                measurer.cache_key,
                corpus.train.sample_digests,
                measurer.measure,
                self._shared_cache,
            )

        ranking, was_here = retry_halved(rank, self._halve)
        if not was_here:
            self._sink(ArtifactWritten(kind="ranking", path=RANKING_FILE))
            scores = [sample.rouge_l for sample in ranking if sample.rouge_l is not None]
            if (warning := constant_ranking(scores)) is not None:
                self._sink(warning)
        return ranking

    def _rank_by_column(self, ranker: ColumnRanker, corpus: Corpus) -> list[RankedSample]:
        """Rank the training samples by the difficulties that their rows have.

        Raises:
            DatasetInvalid: a row has none.
        """
        difficulties = [each for each in corpus.difficulties if each is not None]
        if missing := len(corpus.difficulties) - len(difficulties):
            raise DatasetInvalid(
                f"{missing} of {len(corpus.difficulties)} training rows have no difficulty, by which "
                "curriculum.ranking.ranker ranks: give each row a number in the column `difficulty`."
            )
        digests = [sample.digest for sample in corpus.train.samples]
        ranking = rank_by_column(difficulties, digests, easiest=ranker.easiest)
        if not save_column_ranking(self._workdir, ranking):
            self._sink(ArtifactWritten(kind="ranking", path=RANKING_FILE))
        return ranking

    def _score_teacher(
        self, models: Models, corpus: Corpus, made: Set[EvaluationKey]
    ) -> list[tuple[list[Evaluated], EvaluatedRows]]:
        """The evaluations of the teacher that the specification asks for and that are not made yet, with the scores of
        each sample.
        """
        teacher = models.teacher
        if teacher is None or not self._spec.evaluation.teacher:
            return []
        missing = [name for name in corpus.held_out if EvaluationKey(name, "teacher", None) not in made]
        return [self._score_teacher_on(name, teacher, models, corpus) for name in missing]

    def _score_teacher_on(
        self, split: str, teacher: LazyModel, models: Models, corpus: Corpus
    ) -> tuple[list[Evaluated], EvaluatedRows]:
        self._sink(PhaseChanged(phase="evaluating"))
        dataset = corpus.held_out[split]
        scores = retry_halved(
            lambda: self._evaluator(models, corpus, dataset).score_teacher(teacher, self._shared_cache),
            self._halve,
        )
        assert scores.by_row is not None  # As whatever the evaluator scores.
        self._answers.add(EvaluationKey(split, "teacher", None), dataset, scores)
        rows = EvaluatedRows(subject="teacher", stage=None, split=split, rows=scores.by_row)
        if not scores.rows:
            return [], rows
        evaluated = Evaluated(subject="teacher", split=split, **scores.reported)
        self._sink(evaluated)
        warning = constant_metric("rouge_l", scores.by_row.rouge_l, model="teacher", samples=f"{split} samples")
        if warning is not None:
            self._sink(warning)
        return [evaluated], rows

    def _score_student(
        self, models: Models, corpus: Corpus, teacher: TeacherSignal | None, split: str, *, sampled: bool
    ) -> Scores:
        def score() -> Scores:
            with models.product_weights.in_use():
                evaluator = self._evaluator(models, corpus, corpus.held_out[split])
                return evaluator.score(models.student.model, teacher, sampled=sampled)

        return retry_halved(score, self._halve)

    def _open_teacher(self, models: Models, corpus: Corpus, resume_point: ResumePoint | None) -> TeacherSignal | None:
        """The teacher's hidden states for every sample of the run, computed beforehand where there is room."""
        if models.teacher is None:
            return None
        trained_on = corpus.train.samples if self._spec.method.needs_teacher else ()
        scored_on = [sample for dataset in corpus.held_out.values() for sample in dataset.scored.samples]
        if not (samples := (*trained_on, *scored_on)):
            return None
        self._sink(PhaseChanged(phase="caching_teacher"))
        source = TeacherSource(
            models.teacher.digest,
            models.teacher.structure,
            self._precision,
            load=models.teacher.whole,
            head_only=models.teacher.head_only,
        )
        teacher = open_teacher(
            source,
            samples,
            shared_cache=self._shared_cache,
            sink=self._sink,
            should_stop=self._should_stop,
            # A run goes on with the states that it began with, where out of memory had made their batches smaller too.
            batch_tokens=None if resume_point is None else resume_point.state.teacher_batch_tokens,
        )
        return self._resources.enter_context(teacher)

    def _trainer(
        self,
        models: Models,
        samples: list[EncodedSample],
        table: tuple[StagePlan, ...],
        resume_point: ResumePoint | None,
        teacher: TeacherSignal | None,
        score: Score | None,
    ) -> Trainer:
        model, resources = models.student.model, self._spec.resources
        optimizer = make_optimizer(model, self._spec.training)
        state = self._initial_state() if resume_point is None else resume_point.state
        is_cached = not isinstance(teacher, LiveTeacher)
        teacher_batch_tokens = teacher.batch_tokens if isinstance(teacher, CachedTeacher) else None
        if resume_point is not None:
            load_weights(model, resume_point.directory)
            fit_or_refuse(
                lambda: checkpoint.restore_optimizer(resume_point.directory, model, optimizer),
                "The state of the optimiser",
            )
            if state.cached_teacher != is_cached:
                self._warn_not_exact(
                    f"continued with the teacher {'cached' if is_cached else 'live'}, so not to the same bits"
                )
            elif state.teacher_batch_tokens not in (None, teacher_batch_tokens):
                self._warn_not_exact("continued with a teacher that runs on smaller batches, so not to the same bits")
        state.cached_teacher = is_cached
        state.teacher_batch_tokens = teacher_batch_tokens
        if teacher_batch_tokens is not None and teacher_batch_tokens < choose_batch_tokens(self._device):
            self._note_not_exact(HALVED_IS_NOT_EXACT)
        state.note_not_exact(*self._not_exact)
        # What is noted from here on enters the training state.
        self._not_exact = state.not_exact
        loss = training_loss(
            model,
            teacher,
            self._spec.method,
            shared_vocabulary=models.shared_vocabulary,
            precision=self._precision,
            execution=LossExecution(
                self._sizes.loss_chunk_tokens, backend="inductor" if resources.compile and self._on_gpu else None
            ),
            product_weights=models.product_weights,
        )
        packed = self._can_pack(model, loss, teacher)
        return Trainer(
            spec=self._spec,
            table=table,
            samples=samples,
            student=Student(model, StudentExport(models.tokenizer), optimizer),
            training_loss=loss,
            packed=packed,
            compiled_layers=self._compiled_layers(model, packed=packed),
            prefetcher=self._prefetcher(teacher),
            micro_batch_tokens=self._sizes.micro_batch_tokens,
            workdir=self._workdir,
            sink=self._sink,
            should_stop=self._should_stop,
            should_pause=self._should_pause,
            score=score,
            state=state,
            best_epoch_weights=(
                None if resume_point is None else checkpoint.read_best_epoch_weights(resume_point.directory)
            ),
        )

    def _student_export(
        self, models: Models, corpus: Corpus, table: tuple[StagePlan, ...], samples: tuple[SamplesUsed, ...]
    ) -> StudentExport:
        facts = CardFacts(
            spec=self._spec,
            stages=table,
            student=origin_of(models.student),
            teacher=None if models.teacher is None else origin_of(models.teacher),
            template=corpus.template,
            samples=samples,
        )
        needs_generic = not is_read_as_written(models.tokenizer, models.student.model.config)
        if needs_generic:
            message = (
                "AutoTokenizer gives other token ids for the exported directory, since it takes the tokenizer class of "
                "the student's family; read it with PreTrainedTokenizerFast, as the model card says"
            )
            self._sink(Warned(code="tokenizer_read_otherwise", message=message))
        return StudentExport(
            models.tokenizer,
            corpus.ending.end_ids,
            corpus.chat_templates,
            facts,
            stop_text=str(models.tokenizer.decode(list(corpus.ending.stop_sequence))),
            needs_generic_tokenizer=needs_generic,
        )

    def _can_pack(self, model: PreTrainedModel, loss: TrainingLoss, teacher: TeacherSignal | None) -> bool:
        """Whether micro-batches are packed; a model that pads them instead is reported."""
        max_length = self._spec.data.max_length
        if loss.is_fused:
            reason = reason_not_to_pack(model, max_length, self._precision)
        else:
            reason = "an output head is no linear map, so that full logits are computed"
        if reason is not None:
            self._sink(Warned(code="not_packed", message=f"the student's samples are padded, not packed: {reason}"))
            return False
        if isinstance(teacher, LiveTeacher) and (reason := teacher.reason_not_to_pack(max_length)) is not None:
            self._sink(Warned(code="not_packed", message=f"the teacher's samples are padded, not packed: {reason}"))
        return True

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _prefetcher(self, teacher: TeacherSignal | None) -> Prefetcher | None:
        """What prepares micro-batches ahead, where the specification asks for it and the teacher's states are cached.

        A live teacher works on the stream of the step, so that nothing could overlap.
        """
        if not self._spec.resources.prefetch or not self._on_gpu:
            return None
        if isinstance(teacher, LiveTeacher):
            message = "prefetch of resources: the teacher runs at each visit of a sample, so nothing is prefetched"
            self._sink(Warned(code="resources_ignored", message=message))
            return None
        return Prefetcher(self._device)

    def _compiled_layers(self, student: PreTrainedModel, *, packed: bool) -> CompiledLayers:
        """The student's layers, compiled where the specification asks for it and the device is one for it."""
        resources = self._spec.resources
        wanted = [name for name in ("compile", "graphs", "prefetch") if getattr(resources, name)]
        if wanted and not self._on_gpu:
            message = f"{', '.join(wanted)} of resources: on a GPU alone, and this run is on a CPU"
            self._sink(Warned(code="resources_ignored", message=message))
            return CompiledLayers()
        compiler = layer_compiler(compiled=resources.compile, graphs=resources.graphs, few_shapes=packed)
        if compiler is None:
            return CompiledLayers()
        try:
            layers = decoder_layers(student)
        except ModelUnsupported as error:
            self._sink(Warned(code="resources_ignored", message=f"the student is not compiled: {error}"))
            return CompiledLayers()
        return CompiledLayers(layers, compiler, graphs=resources.graphs)

    def _initial_state(self) -> TrainState:
        # Dropout draws from here on; until then loading may have drawn any number of times.
        torch.manual_seed(self._spec.seed)
        return TrainState(
            micro_batch_size=self._spec.training.micro_batch_size or 1, machine=machine_fingerprint(self._device)
        )

    def _export(self, models: Models, student: Student, state: TrainState, ranking: list[RankedSample]) -> Result:
        self._sink(PhaseChanged(phase="exporting"))
        conclusions = conclude(state.evaluations, last_stage=state.stage - 1, best_by=self._spec.evaluation.best_by)
        for evaluated in conclusions:
            self._sink(evaluated)
        progress = replace(state.progress, evaluations=(*state.evaluations, *conclusions))
        checkpoint.link_weights(
            self._workdir / checkpoint_dir(state.step),
            self._workdir / FINAL_DIR,
            card=lambda requirement: student.export.card(student.model, progress, requirement),
        )
        result = build_result(
            state,
            [*state.evaluations, *conclusions],
            data=self._data_encoded,
            models=models,
            spec=self._spec,
            precision=self._precision.name,
            data_commits=self._data_commits,
        )
        write_result(self._workdir, self._spec, result, state.metrics, ranking)
        if self._answers.path.exists():
            self._sink(ArtifactWritten(kind="answers", path=ANSWERS_FILE))
        self._sink(ArtifactWritten(kind="result", path=RESULT_FILE))
        self._sink(ArtifactWritten(kind="report", path=REPORT_FILE))
        size = read_manifest(self._workdir / FINAL_DIR).size_bytes
        self._sink(CheckpointSaved(kind="final", path=FINAL_DIR, step=state.step, stage=None, size_bytes=size))
        self._sink(RunFinished(step=state.step))
        return result

    def _progress(self, phase: Phase, unit: Literal["samples", "rows"]) -> OnProgress:
        return lambda done, total: self._sink(Progressed(phase=phase, done=done, total=total, unit=unit))


def _choices_at_start(spec: DistillationSpec) -> dict[str, dict[str, int]]:
    """What the engine chooses before the models are loaded, by part and field."""
    return {
        "resources": {"threads": len(os.sched_getaffinity(0))},
        "training": {"micro_batch_size": spec.training.batch_size},
    }
