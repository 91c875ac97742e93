"""The product's side of each comparison. How the product is called is known here and nowhere else."""

import atexit
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from pocl.data.batches import EncodedSample
from pocl.evaluation.decoding import Decoding
from pocl.evaluation.generate import generate
from pocl.evaluation.token_scores import ScoringSizes, token_scores
from pocl.events import Sink
from pocl.export.student import StudentExport
from pocl.losses.buffers import LossExecution, Workspace
from pocl.losses.fused import fused_objective_sum
from pocl.losses.objective import ObjectiveTerms
from pocl.models.compiled_layers import CompiledLayers, layer_compiler
from pocl.models.layers import decoder_layers
from pocl.models.output_head import Head, HeadInputs, extract_head
from pocl.models.packed import can_pack
from pocl.models.precision import Precision
from pocl.models.random import byte_level_tokenizer
from pocl.plan import StagePlan
from pocl.run import run
from pocl.sizes import RunSizes, Workload, choose_sizes, measure_free_memory
from pocl.spec import DistillationMethod, DistillationSpec
from pocl.spec.presets import resolve
from pocl.storage.shared_cache import SharedCache
from pocl.teacher.cache import open_teacher
from pocl.teacher.distillation_loss import training_loss
from pocl.teacher.signal import TeacherSignal, TeacherSource
from pocl.train.accumulation import normaliser
from pocl.train.checkpoint import Student
from pocl.train.loop import Trainer
from pocl.train.optimizer import make_optimizer
from pocl.train.state import MetricRow, TrainState

NO_LEARNING = 1e-20
"""A learning rate that does all the work of a step and leaves fp32 weights as they are."""
_UNBOUNDED = 1 << 50
_EXECUTION = LossExecution(workspace=Workspace())
"""Kept from step to step, as in training."""


def step_spec(batch_size: int, *, compiled: bool = False, graphs: bool = False) -> DistillationSpec:
    """The paper's settings with batches of `batch_size` samples. The models are made by the benchmark, not read.

    Args:
        compiled: Whether a GPU runs compiled layers and a compiled loss.
        graphs: Whether a GPU replays CUDA graphs.
    """
    return resolve(
        {
            "teacher": {"random": {}},
            "student": {"random": {}},
            "data": {"train": {"path": "samples.jsonl"}},
            "training": {"batch_size": batch_size, "learning_rate": NO_LEARNING, "min_learning_rate": 0.0},
            "resources": {"compile": compiled, "graphs": graphs},
        }
    )


def stored_teacher(teacher: PreTrainedModel, samples: Sequence[EncodedSample], precision: Precision) -> TeacherSignal:
    """Run the teacher once over all samples and cache its hidden states until the process ends.

    This is what the samples cost once in all epochs, stages and jobs; training reads what is returned.
    """
    held = ExitStack()
    atexit.register(held.close)
    return held.enter_context(filled_teacher(teacher, samples, precision))


@contextmanager
def filled_teacher(
    teacher: PreTrainedModel, samples: Sequence[EncodedSample], precision: Precision, directory: Path | None = None
) -> Iterator[TeacherSignal]:
    """The teacher from a cache in `directory`, after filling what it lacks; an empty one unless given."""
    with ExitStack() as held:
        place = directory or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="pocl-bench-")))
        opened = open_teacher(
            TeacherSource.loaded(teacher, "bench", precision),
            samples,
            shared_cache=SharedCache(place, _UNBOUNDED),
            sink=lambda _event: None,
        )
        yield held.enter_context(opened)


def sizes_of_run(
    spec: DistillationSpec, student: PreTrainedModel, teacher: PreTrainedModel | None, precision: Precision
) -> RunSizes:
    """The sizes that a run would choose now, with the memory that is free."""
    has_fused_head = extract_head(student) is not None
    workload = Workload.of(spec, student, teacher, precision=precision, has_fused_head=has_fused_head)
    return choose_sizes(workload, measure_free_memory(student.device))


class OurStep:
    """One optimiser step of the product's own trainer over the samples of a batch."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: TeacherSignal,
        optimizer: AdamW,
        spec: DistillationSpec,
        precision: Precision,
        *,
        temperature: float,
        kd_weight: float,
    ) -> None:
        steps = 1_000_000
        self._stage = StagePlan(
            index=0,
            samples=spec.training.batch_size,
            temperature=temperature,
            kd_weight=kd_weight,
            epochs=steps,
            steps=steps,
            first_step=0,
            steps_per_epoch=1,
        )
        resources, sizes = spec.resources, sizes_of_run(spec, student, teacher.model, precision)
        loss = training_loss(
            student,
            teacher,
            spec.method,
            shared_vocabulary=None,
            precision=precision,
            execution=LossExecution(sizes.loss_chunk_tokens, backend="inductor" if resources.compile else None),
        )
        packed = loss.is_fused and can_pack(student, spec.data.max_length, precision)
        compiler = layer_compiler(compiled=resources.compile, graphs=resources.graphs, few_shapes=packed)
        self._trainer = Trainer(
            spec=spec,
            table=(self._stage,),
            samples=(),
            student=Student(student, StudentExport(byte_level_tokenizer(1024)), optimizer),
            training_loss=loss,
            packed=packed,
            compiled_layers=CompiledLayers(
                () if compiler is None else decoder_layers(student), compiler, graphs=resources.graphs
            ),
            micro_batch_tokens=sizes.micro_batch_tokens,
            workdir=Path(),
            sink=lambda _event: None,
            should_stop=lambda: False,
            state=TrainState(micro_batch_size=spec.training.micro_batch_size or spec.training.batch_size),
        )

    def __call__(self, samples: Sequence[EncodedSample]) -> MetricRow:
        self._trainer.step(self._stage, samples)
        return self._trainer.state.metrics[-1]


def answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    precision: Precision,
    *,
    new_tokens: int,
    graphs: bool = False,
) -> list[list[int]]:
    """Greedy answers of `new_tokens` tokens each, with all prompts in flight at once: no token ends an answer."""
    return generate(
        model,
        prompts,
        Decoding(new_tokens, len(prompts), frozenset(), pad_id=0, precision=precision, graphs=graphs),
    )


def cross_entropy(model: PreTrainedModel, samples: Sequence[EncodedSample], precision: Precision) -> float:
    """Mean cross-entropy of all response tokens, in nats."""
    sizes = sizes_of_run(step_spec(1), model, None, precision)
    scoring = ScoringSizes(sizes.scoring_tokens, sizes.loss_chunk_tokens)
    return token_scores(model, samples, sizes=scoring, precision=precision).cross_entropy


def whole_run(spec: DistillationSpec, workdir: Path, sink: Sink) -> None:
    run(spec, workdir, sink)


def optimizer_of(student: PreTrainedModel, spec: DistillationSpec) -> AdamW:
    return make_optimizer(student, spec.training)


def fused_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    method: DistillationMethod,
    temperature: float,
    kd_weight: float,
) -> Tensor:
    """Mean objective over the tokens of hidden states `[T, d]` through heads `[V, d]`."""
    return fused_objective_sum(
        HeadInputs(student_hidden, Head(student_head)),
        HeadInputs(teacher_hidden, Head(teacher_head)),
        labels,
        ObjectiveTerms(method, temperature, kd_weight, shared_vocabulary=None),
        # As in training: the step's normaliser is the scale, and the head's gradient is accumulated in place.
        scale=normaliser(len(labels)),
        accumulate_into_grad=True,
        execution=_EXECUTION,
    ).loss
