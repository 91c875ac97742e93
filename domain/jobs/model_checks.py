"""What can be known of a job's models at submission: their files, sizes, layers and vocabularies."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore

from domain.errors import ModelMissing, ModelRefused, SpecRefused, VocabulariesDiffer, with_pointer_prefix
from domain.model_paths import locate_model
from domain.settings import Settings
from pocl.errors import FieldError, ModelNotFound, ModelUnsupported, PoclError, SpecInvalid, VocabularyMismatch
from pocl.inspect import (
    ModelFacts,
    check_sequence_length,
    facts_of_selected_layers,
    inspect_model,
    random_facts,
    shared_vocabulary,
)
from pocl.spec import DistillationSpec, ModelRef

# Each may take some hundred megabytes for a moment, and more at once would be no faster.
_few_at_once = BoundedSemaphore(2)


@dataclass(frozen=True)
class InspectedModels:
    """Null where the files are not at hand, a model on the Hub for instance, or where there is no teacher."""

    teacher: ModelFacts | None
    student: ModelFacts | None


def inspect_models(
    settings: Settings, spec: DistillationSpec, checkpoints: Mapping[str, str], *, pointer_prefix: str = ""
) -> InspectedModels:
    """Inspect teacher and student as far as their files are at hand, and check them against each other.

    Args:
        checkpoints: id of each checkpoint that the specification names -> its key in the artifact store.
        pointer_prefix: where the specification stands in the client's document, for the pointers of errors.

    Raises:
        PathOutsideModelRoots, ModelMissing, ModelRefused: one of the models cannot be used.
        SpecRefused: the student keeps layers that the teacher does not have, or rows are longer than a model.
        VocabulariesDiffer: the teacher's distributions would mean something else to the student.
    """
    teacher = _facts(settings, spec.teacher, f"{pointer_prefix}/teacher", checkpoints)
    _require_positions(spec, teacher, pointer_prefix)
    if spec.student.from_teacher is not None:
        return InspectedModels(teacher, _cut(teacher, spec.student.from_teacher.layers, pointer_prefix))
    student = _facts(settings, spec.student, f"{pointer_prefix}/student", checkpoints)
    _require_positions(spec, student, pointer_prefix)
    if teacher is not None and student is not None:
        _require_one_vocabulary(teacher, student, pointer_prefix)
    return InspectedModels(teacher, student)


def _facts(settings: Settings, ref: ModelRef | None, pointer: str, checkpoints: Mapping[str, str]) -> ModelFacts | None:
    if ref is None:
        return None
    if ref.random is not None:
        return random_facts(ref.random)
    if ref.path is not None:
        pointer = f"{pointer}/path"
        return _inspect(locate_model(settings.model_roots, ref.path, pointer=pointer), pointer)
    if ref.checkpoint is not None:
        place = settings.artifact_root / checkpoints[ref.checkpoint]
        # The store may be on other machines only; the worker then checks.
        return _inspect(place, f"{pointer}/checkpoint") if place.is_dir() else None
    return None


def _inspect(place: Path, pointer: str) -> ModelFacts:
    try:
        with _few_at_once:
            return inspect_model(place)
    except ModelNotFound as error:
        raise ModelMissing(error.message, field_errors=[_field_error(error, pointer)]) from error
    except ModelUnsupported as error:
        raise ModelRefused(error.message, field_errors=[_field_error(error, pointer)]) from error


def _cut(teacher: ModelFacts | None, layers: tuple[int, ...], pointer_prefix: str) -> ModelFacts | None:
    if teacher is None:
        return None
    try:
        return facts_of_selected_layers(teacher, layers)
    except SpecInvalid as error:
        raise SpecRefused(field_errors=with_pointer_prefix(error.field_errors, pointer_prefix)) from error


def _require_positions(spec: DistillationSpec, model: ModelFacts | None, pointer_prefix: str) -> None:
    try:
        check_sequence_length(spec.data.max_length, None if model is None else model.max_positions)
    except SpecInvalid as error:
        raise SpecRefused(field_errors=with_pointer_prefix(error.field_errors, pointer_prefix)) from error


def _require_one_vocabulary(teacher: ModelFacts, student: ModelFacts, pointer_prefix: str) -> None:
    try:
        shared_vocabulary(teacher, student)
    except VocabularyMismatch as error:
        raise VocabulariesDiffer(
            error.message, field_errors=[_field_error(error, f"{pointer_prefix}/student")]
        ) from error


def _field_error(error: PoclError, pointer: str) -> FieldError:
    return FieldError(pointer, error.code, error.message)
