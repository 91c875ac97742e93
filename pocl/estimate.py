"""What a run needs: memory, disk, and each pass of a model over samples, with its tokens and operations.

Operations are those of matrix products and attention, two for a multiplication with its addition, as
:class:`torch.utils.flop_counter.FlopCounterMode` counts them. With A parameters of the layers that a token passes,
width d and vocabulary V, and m tokens of context,

    a token through the layers    2 A + 4 layers d m    (Kaplan et al. 2020, table 1)
    the output head at a token    2 V d                 where a response token is predicted, and nowhere else

Training costs three times that, for the gradients of activations and weights; the teacher's head is applied at each
visit, its layers once for each sample. All answers are taken to be as long as they may be, and all stages to become the
best one so far: the counts are those of a run that ends nothing early.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, Self

from pocl.encoding_counts import EncodingCounts
from pocl.inspect import ModelFacts
from pocl.plan import StagePlan
from pocl.spec import (
    ByConvergence,
    ColumnRanker,
    Data,
    DistillationSpec,
    GgufFormat,
    ModelRanker,
    TeacherRanker,
    WarmStudentRanker,
)
from pocl.spec import Training as TrainingSettings

ADAMW_BYTES_PER_PARAMETER: Final = 16
"""The bytes of an fp32 weight, its gradient and its two moments."""
_CHUNK_TOKENS: Final = 512
"""The tokens whose logits are in memory at a time."""
_MEAN_PADDING: Final = 32
"""The mean number of tokens that a sample is padded by where the teacher's hidden states are computed: to multiples of
64."""
_TRAINED: Final = 3
"""Products of a weight in training: forward, and for the gradients of activations and weight."""

ModelRole = Literal["student", "teacher", "ranker"]
PassPhase = Literal["ranking", "evaluating", "caching_teacher", "training"]
Work = Literal["generation", "scoring", "hidden_states", "training"]
Subject = Literal["teacher", "initial", "epoch", "stage"]


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a model that the estimate depends on."""

    parameters: int
    """All of them."""
    active: int
    """The parameters of the layers that a token passes: of experts those that it is given to."""
    layers: int
    width: int
    vocabulary: int
    max_positions: int | None = None
    """The longest sequence, in tokens; None for no limit."""

    @classmethod
    def of(cls, facts: ModelFacts) -> Self:
        """The sizes of an inspected model."""
        return cls(
            parameters=facts.parameters,
            active=sum(facts.layer_parameters) - sum(facts.idle_layer_parameters),
            layers=facts.layers,
            width=facts.hidden_size,
            vocabulary=facts.vocabulary_size,
            max_positions=facts.max_positions,
        )

    def forward(self, tokens: float, context: float) -> float:
        """The operations of so many tokens through the layers, each with `context` tokens that it attends to."""
        return tokens * (2 * self.active + 4 * self.layers * self.width * context)

    def head(self, tokens: float) -> float:
        """The operations of the output head at so many positions."""
        return 2 * tokens * self.vocabulary * self.width


@dataclass(frozen=True)
class ModelSizes:
    """The models of a run."""

    student: ModelSize
    teacher: ModelSize | None
    """None without a teacher."""
    ranker: ModelSize | None = None
    """The model that ranks and is used for nothing else; None where there is none, or its files are not at hand."""


@dataclass(frozen=True)
class SetSize:
    """A set of samples as tokens."""

    samples: int
    tokens: float
    """Of all samples, prompts and answers."""
    prompt_tokens: float
    """Of all samples, before their last answers."""
    trained_tokens: float
    """Of all samples, those that are trained on or scored: answers with their ends."""

    @classmethod
    def of_full_length(cls, samples: int, data: Data) -> Self:
        """So many samples, all as long as `data` allows."""
        prompt, whole = data.max_prompt_length, data.max_length
        return cls(samples, samples * whole, samples * prompt, samples * (whole - prompt))

    @classmethod
    def as_counted(cls, samples: int, counts: EncodingCounts) -> Self:
        """So many samples, in the mean as those that were counted, of which there is at least one."""
        share = samples / counts.rows
        return cls(samples, share * counts.tokens, share * counts.prompt_tokens, share * counts.trained_tokens)

    @property
    def length(self) -> float:
        """The mean tokens of a sample."""
        return self.tokens / max(1, self.samples)

    @property
    def prompt_length(self) -> float:
        """The mean tokens of a prompt."""
        return self.prompt_tokens / max(1, self.samples)

    def visited(self, visits: int) -> Self:
        """So many visits of samples, as a set."""
        share = visits / max(1, self.samples)
        return replace(
            self,
            samples=visits,
            tokens=share * self.tokens,
            prompt_tokens=share * self.prompt_tokens,
            trained_tokens=share * self.trained_tokens,
        )


@dataclass(frozen=True)
class ModelPass:
    """What one model does with one set of samples, as often as it does it."""

    phase: PassPhase
    work: Work
    """`generation` of answers, `scoring` of the references, computing the teacher's `hidden_states`, or `training`."""
    model: ModelRole
    part: str
    """The samples: `train`, `validation`, `test`, or the name of an evaluation set."""
    samples: int
    """How many there are."""
    passes: float
    """How often each is passed, in the mean."""
    tokens: int
    """Prompt and response tokens of all passes."""
    flops: int | None
    """The floating-point operations of all passes; None where the size of the model is not known."""
    subject: Subject | None = None
    """What is evaluated; None in other phases."""
    stage: int | None = None
    """The stage that is trained, counted from 0; None in other phases."""


_GGUF_BYTES: Final[Mapping[GgufFormat, float]] = {"f32": 4, "f16": 2, "q8_0": 34 / 32}
"""Bytes of a parameter; of Q8_0 a scale in fp16 for each 32 bytes."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs."""

    memory_bytes: int
    """The bytes of weights, gradients, optimiser state and the logits of one chunk; activations come on top."""
    disk_bytes: int
    """The bytes of all checkpoints in the working directory, at their most."""
    stored_bytes: int
    """The bytes of all checkpoints in the artifact store, at their most: the end of each stage keeps its training state
    there, from which a branch or a retry starts."""
    passes: tuple[ModelPass, ...]
    """Every pass of a model over samples, in the order of the phases."""

    @property
    def training_flops(self) -> int:
        """The floating-point operations of all training steps, the teacher's one pass over these samples included."""
        return sum(each.flops or 0 for each in self.passes if _is_for_training(each))

    @property
    def flops(self) -> int | None:
        """The floating-point operations of all passes; None where those of one are not known."""
        known = [each.flops for each in self.passes if each.flops is not None]
        return sum(known) if len(known) == len(self.passes) else None


def estimate(
    spec: DistillationSpec, table: tuple[StagePlan, ...], models: ModelSizes, sets: Mapping[str, SetSize]
) -> Estimate:
    """Memory, disk and passes of a run.

    Args:
        table: The stages, as :func:`pocl.plan.stage_table` gives them.
        sets: The sizes of the samples by what they are used for: `train`, and those that are evaluated on.
    """
    weights = 4 * models.student.parameters
    # Weights and two moments; where a stage ends by convergence, also the weights of its best epoch.
    training_state = (4 if isinstance(spec.curriculum.advance, ByConvergence) else 3) * weights
    # While the newest is written there is one more.
    states = spec.checkpoints.keep + 1
    run = _PlannedRun(spec, table, models, sets)
    gguf = sum(int(_GGUF_BYTES[each] * models.student.parameters) for each in spec.export.gguf)
    return Estimate(
        memory_bytes=_memory(spec, models),
        disk_bytes=training_state * states + weights * (len(table) + 2) + gguf,
        # Beside the states the final student and, while a better one is stored, two of the best.
        stored_bytes=training_state * (len(table) + states) + weights * 3 + gguf,
        passes=(*run.ranking(), *run.evaluation_of_teacher(), *run.hidden_states(), *run.training(), *run.evaluation()),
    )


def visits(stage: StagePlan, training: TrainingSettings) -> int:
    """How often the stage visits a sample, all samples together."""
    epochs, steps = divmod(stage.steps, stage.steps_per_epoch)
    if training.last_batch == "drop" and stage.samples >= training.batch_size:
        return stage.steps * training.batch_size
    return epochs * stage.samples + steps * min(training.batch_size, stage.samples)


def _memory(spec: DistillationSpec, models: ModelSizes) -> int:
    student, teacher = models.student, models.teacher if spec.method.needs_teacher else None
    logits = _CHUNK_TOKENS * 4 * 2 * (student.vocabulary + (0 if teacher is None else teacher.vocabulary))
    training = ADAMW_BYTES_PER_PARAMETER * student.parameters + (0 if teacher is None else 4 * teacher.parameters)
    ranking = 4 * (student.parameters + (0 if models.ranker is None else models.ranker.parameters))
    return max(training, ranking) + logits


def _is_for_training(each: ModelPass) -> bool:
    return each.phase == "training" or (each.phase, each.part) == ("caching_teacher", "train")


@dataclass(frozen=True)
class _PlannedRun:
    """The passes of a run, phase by phase."""

    spec: DistillationSpec
    table: tuple[StagePlan, ...]
    models: ModelSizes
    sets: Mapping[str, SetSize]

    def ranking(self) -> Iterator[ModelPass]:
        curriculum = self.spec.curriculum
        ranker = curriculum.ranking.ranker
        if not curriculum.uses_ranking or isinstance(ranker, ColumnRanker):
            return
        role: ModelRole = "student"
        if isinstance(ranker, TeacherRanker | ModelRanker):
            role = "teacher" if isinstance(ranker, TeacherRanker) else "ranker"
        train = self.sets["train"]
        ranked = _Pass("ranking", role, self._size(role), "train", train)
        if isinstance(ranker, WarmStudentRanker):
            samples = ranker.steps * min(self.spec.training.batch_size, train.samples)
            yield ranked.training(samples, teacher=None)
        yield ranked.generation(curriculum.ranking.max_new_tokens, 1)
        yield ranked.scoring(1, teacher=None)

    def evaluation_of_teacher(self) -> Iterator[ModelPass]:
        if self.models.teacher is None or not self.spec.evaluation.teacher:
            return
        for part, samples in self._held_out.items():
            evaluated = _Pass("evaluating", "teacher", self.models.teacher, part, samples, subject="teacher")
            yield evaluated.generation(self.spec.evaluation.max_new_tokens, self._answers_each)
            yield evaluated.scoring(1, teacher=None)

    def hidden_states(self) -> Iterator[ModelPass]:
        for part, samples in self.sets.items():
            if self.models.teacher is not None and (part != "train" or self.spec.method.needs_teacher):
                yield _Pass("caching_teacher", "teacher", self.models.teacher, part, samples).hidden_states()

    def training(self) -> Iterator[ModelPass]:
        teacher = self.models.teacher if self.spec.method.needs_teacher else None
        train = self.sets["train"]
        for stage in self.table:
            # Which samples are the easiest is not known before they are ranked: they are taken to be of mean length.
            samples = train.visited(stage.samples)
            trained = _Pass("training", "student", self.models.student, "train", samples, stage=stage.index)
            yield trained.training(visits(stage, self.spec.training), teacher)

    def evaluation(self) -> Iterator[ModelPass]:
        epochs = sum(stage.epochs for stage in self.table)
        has_validation = "validation" in self._held_out
        for part, samples in self._held_out.items():
            # Other samples are scored after the last stage, and after each that is the best so far.
            times: dict[Subject, int] = {"initial": 1, "stage": len(self.table) if has_validation else 1}
            if part == "validation" and isinstance(self.spec.curriculum.advance, ByConvergence):
                times["epoch"] = epochs
            for subject, count in times.items():
                scored = _Pass("evaluating", "student", self.models.student, part, samples, subject=subject)
                # Greedy answers alone decide when a stage has converged.
                answers = 1 if subject == "epoch" else self._answers_each
                yield scored.generation(self.spec.evaluation.max_new_tokens, count * answers)
                yield scored.scoring(count, self.models.teacher)

    @property
    def _held_out(self) -> Mapping[str, SetSize]:
        return {part: samples for part, samples in self.sets.items() if part != "train"}

    @property
    def _answers_each(self) -> int:
        """The answers to a sample in one evaluation: the greedy one, and one with each seed."""
        sampling = self.spec.evaluation.sampling
        return 1 if sampling is None else 1 + len(sampling.seeds)

    def _size(self, role: ModelRole) -> ModelSize | None:
        sizes = {"student": self.models.student, "teacher": self.models.teacher, "ranker": self.models.ranker}
        return sizes[role]


@dataclass(frozen=True)
class _Pass:
    """A model at a set of samples."""

    phase: PassPhase
    role: ModelRole
    model: ModelSize | None
    part: str
    samples: SetSize
    subject: Subject | None = None
    stage: int | None = None

    def generation(self, max_new_tokens: int, passes: int) -> ModelPass:
        """Answers to each sample, `passes` of them; a sampled one costs what a greedy one costs."""
        model, prompt, count = self.model, self.samples.prompt_length, passes * self.samples.samples
        answer = float(max_new_tokens)
        flops = None
        if model is not None:
            if model.max_positions is not None:
                answer = min(answer, max(0.0, model.max_positions - prompt))
            # The last token of an answer is not read any more.
            read = max(0.0, answer - 1)
            flops = model.forward(prompt, prompt) + model.forward(read, prompt + read / 2) + model.head(answer)
            flops *= count
        return self._made("generation", passes, count * (prompt + answer), flops)

    def scoring(self, passes: int, teacher: ModelSize | None) -> ModelPass:
        """Cross-entropy of the references and, with a teacher whose states are there already, the divergence."""
        samples, flops = self.samples, None
        if self.model is not None:
            heads = [self.model, *([] if teacher is None else [teacher])]
            flops = self.model.forward(samples.tokens, samples.length)
            flops = passes * (flops + sum(each.head(samples.trained_tokens) for each in heads))
        return self._made("scoring", passes, passes * samples.tokens, flops)

    def hidden_states(self) -> ModelPass:
        """The input of the teacher's head, computed on padded samples."""
        samples = self.samples
        assert self.model is not None  # That of a teacher that there is.
        padded = samples.length + _MEAN_PADDING
        return self._made("hidden_states", 1, samples.tokens, self.model.forward(samples.samples * padded, padded))

    def training(self, visited: int, teacher: ModelSize | None) -> ModelPass:
        """So many visits, each with the gradient, and with the teacher's head where there is a teacher."""
        samples = self.samples.visited(visited)
        assert self.model is not None  # The student, whose size is always known.
        flops = self.model.forward(samples.tokens, samples.length) + self.model.head(samples.trained_tokens)
        flops = _TRAINED * flops + (0 if teacher is None else teacher.head(samples.trained_tokens))
        return self._made("training", visited / max(1, self.samples.samples), samples.tokens, flops)

    def _made(self, work: Work, passes: float, tokens: float, flops: float | None) -> ModelPass:
        return ModelPass(
            phase=self.phase,
            work=work,
            model=self.role,
            part=self.part,
            samples=self.samples.samples,
            passes=passes,
            tokens=round(tokens),
            flops=None if flops is None else round(flops),
            subject=self.subject,
            stage=self.stage,
        )
