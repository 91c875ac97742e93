"""Checks of a job's models at submission: their files, sizes, layers and vocabularies."""

from collections.abc import Mapping
from dataclasses import dataclass
from threading import BoundedSemaphore

from domain.errors import engine_refusals
from domain.model_paths import locate_model
from domain.settings import Settings
from pocl.inspect import (
    ModelFacts,
    SharedVocabulary,
    check_sequence_length,
    facts_of_selected_layers,
    inspect_model,
    random_facts,
    shared_vocabulary,
)
from pocl.spec import RANKING_MODEL_POINTER, DistillationSpec, ModelRef

# Each inspection may take some hundred megabytes for a moment, and more of them at once would be no faster.
_inspection_slots = BoundedSemaphore(2)


@dataclass(frozen=True)
class InspectedModels:
    """The facts of both models; null where the files are not at hand (a model on the Hub), or there is no teacher."""

    teacher: ModelFacts | None
    student: ModelFacts | None
    vocabulary: SharedVocabulary | None = None
    """How far their vocabularies agree; null where one is not at hand, or the student is cut out of the teacher."""


def inspect_models(
    settings: Settings, spec: DistillationSpec, checkpoints: Mapping[str, str], *, pointer_prefix: str = ""
) -> InspectedModels:
    """Inspect teacher, student and the model that ranks as far as their files are at hand, and check that they agree.

    Args:
        checkpoints: id of each checkpoint that the specification names -> its key in the artifact store.
        pointer_prefix: where the specification stands in the client's document, for the pointers of errors.

    Raises:
        PathOutsideModelRoots: a model is not where the service may read it.
        EngineRefusal: a model is missing or unsupported, the student keeps layers that the teacher does not have,
            samples are longer than a model allows, or the student has another vocabulary than the teacher or the model
            that ranks.
    """
    teacher = _inspect(settings, spec.teacher, f"{pointer_prefix}/teacher", checkpoints)
    ranking_pointer = f"{pointer_prefix}{RANKING_MODEL_POINTER}"
    ranking_model = _inspect(settings, spec.ranking_model, ranking_pointer, checkpoints)
    with engine_refusals(pointer_prefix):
        _check_sequence_length(spec, ranking_model)
    with engine_refusals(pointer_prefix):
        _check_sequence_length(spec, teacher)
        if spec.student.from_teacher is not None:
            layers = spec.student.from_teacher.layers
            if teacher is not None and ranking_model is not None:
                with engine_refusals(ranking_pointer):
                    shared_vocabulary(ranking_model, teacher)
            return InspectedModels(teacher, None if teacher is None else facts_of_selected_layers(teacher, layers))
    student = _inspect(settings, spec.student, f"{pointer_prefix}/student", checkpoints)
    with engine_refusals(pointer_prefix):
        _check_sequence_length(spec, student)
    vocabulary = None
    if teacher is not None and student is not None:
        with engine_refusals(f"{pointer_prefix}/student"):
            vocabulary = shared_vocabulary(teacher, student)
    if ranking_model is not None and student is not None:
        with engine_refusals(ranking_pointer):
            shared_vocabulary(ranking_model, student)
    return InspectedModels(teacher, student, vocabulary)


def _inspect(
    settings: Settings, ref: ModelRef | None, pointer: str, checkpoints: Mapping[str, str]
) -> ModelFacts | None:
    if ref is None:
        return None
    if ref.random is not None:
        return random_facts(ref.random)
    if ref.path is not None:
        pointer = f"{pointer}/path"
        directory = locate_model(settings.model_roots, ref.path, pointer=pointer)
    elif ref.checkpoint is not None:
        pointer = f"{pointer}/checkpoint"
        directory = settings.artifact_root / checkpoints[ref.checkpoint]
        if not directory.is_dir():
            # The store may be on other machines only; the worker then checks.
            return None
    else:
        return None
    with engine_refusals(pointer), _inspection_slots:
        return inspect_model(directory)


def _check_sequence_length(spec: DistillationSpec, model: ModelFacts | None) -> None:
    check_sequence_length(spec.data.max_length, None if model is None else model.max_positions)
