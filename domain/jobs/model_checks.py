"""Checks of a job's models at submission: their files, sizes, layers and vocabularies."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from domain.errors import engine_refusals
from domain.model_facts import ModelFactsCache
from domain.model_paths import locate_model
from domain.model_structure import StructureChecker
from domain.settings import Settings
from pocl.inspect import (
    ModelFacts,
    SharedVocabulary,
    TokenLimits,
    cached_snapshot,
    check_gguf_family,
    check_sequence_length,
    encodes_with_teacher_tokenizer,
    facts_of_selected_layers,
    random_facts,
    shared_vocabulary,
)
from pocl.spec import RANKING_MODEL_POINTER, DistillationSpec, ModelRef, RandomModel

_facts = ModelFactsCache()
_structures = StructureChecker()


ModelFiles = Path | RandomModel
"""Where the files of a model are; a freshly initialised one has none."""


@dataclass(frozen=True)
class InspectedModels:
    """The facts of both models; null where the files are not at hand, or there is no teacher. Those of a model on the
    Hub are at hand where the cache of this machine has the commit that is named."""

    teacher: ModelFacts | None
    student: ModelFacts | None
    vocabulary: SharedVocabulary | None = None
    """How far their vocabularies agree; null where one is not at hand, or the student is cut out of the teacher."""
    tokenizer: ModelFiles | None = None
    """The model whose tokenizer a run encodes the samples with; null where the files do not say which."""
    tokenizer_role: Literal["teacher", "student"] = "teacher"
    """Which of both that is."""
    ranking_model: ModelFacts | None = None
    """The facts of the model that ranks and is used for nothing else; null where there is none, or its files are not at
    hand."""

    @property
    def token_limits(self) -> TokenLimits:
        """Which token ids the samples may use."""
        models = {"student": self.student, "teacher": self.teacher}
        rows = {role: model.vocabulary_size for role, model in models.items() if model is not None}
        return TokenLimits(rows, {} if self.vocabulary is None else self.vocabulary.conflicts)


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
    teacher_pointer, student_pointer = f"{pointer_prefix}/teacher", f"{pointer_prefix}/student"
    teacher_files = locate_files(settings, spec.teacher, teacher_pointer, checkpoints)
    teacher = _inspect(teacher_files, spec.teacher, teacher_pointer)
    ranking_pointer = f"{pointer_prefix}{RANKING_MODEL_POINTER}"
    ranking_files = locate_files(settings, spec.ranking_model, ranking_pointer, checkpoints)
    ranking_model = _inspect(ranking_files, spec.ranking_model, ranking_pointer)
    with engine_refusals(pointer_prefix):
        _check_sequence_length(spec, ranking_model)
    with engine_refusals(pointer_prefix):
        _check_sequence_length(spec, teacher)
        if spec.student.from_teacher is not None:
            layers = spec.student.from_teacher.layers
            if teacher is not None and ranking_model is not None:
                with engine_refusals(ranking_pointer):
                    shared_vocabulary(ranking_model, teacher)
            student = None if teacher is None else facts_of_selected_layers(teacher, layers)
            _check_gguf(spec, student)
            return InspectedModels(teacher, student, None, teacher_files, ranking_model=ranking_model)
    student_files = locate_files(settings, spec.student, student_pointer, checkpoints)
    student = _inspect(student_files, spec.student, student_pointer)
    with engine_refusals(pointer_prefix):
        _check_sequence_length(spec, student)
        _check_gguf(spec, student)
    vocabulary = None
    if teacher is not None and student is not None:
        with engine_refusals(student_pointer):
            vocabulary = shared_vocabulary(teacher, student)
    if ranking_model is not None and student is not None:
        with engine_refusals(ranking_pointer):
            shared_vocabulary(ranking_model, student)
    if spec.teacher is None:
        return InspectedModels(None, student, None, student_files, "student", ranking_model)
    if teacher is None or student is None:
        return InspectedModels(teacher, student, ranking_model=ranking_model)
    if encodes_with_teacher_tokenizer(len(teacher.tokens), student.vocabulary_size):
        return InspectedModels(teacher, student, vocabulary, teacher_files, "teacher", ranking_model)
    return InspectedModels(teacher, student, vocabulary, student_files, "student", ranking_model)


def locate_files(
    settings: Settings, ref: ModelRef | None, pointer: str, checkpoints: Mapping[str, str]
) -> ModelFiles | None:
    """Where the files of a model are on this machine; null where they are not at hand.

    Raises:
        PathOutsideModelRoots, EngineRefusal: the model is not where the service may read it, or missing.
    """
    if ref is None:
        return None
    if ref.random is not None:
        return ref.random
    if ref.path is not None:
        return locate_model(settings.model_roots, ref.path, pointer=f"{pointer}/path")
    if ref.checkpoint is not None:
        directory = settings.artifact_root / checkpoints[ref.checkpoint]
        # The store may be on other machines only; the worker then checks.
        return directory if directory.is_dir() else None
    # The worker fetches it where it is not in the cache of this machine.
    return None if ref.hub is None else cached_snapshot(ref.hub)


def source_field(ref: ModelRef) -> str:
    """The field that says where the files of a model come from."""
    return next(name for name in ("path", "checkpoint", "hub") if getattr(ref, name) is not None)


def _inspect(files: ModelFiles | None, ref: ModelRef | None, pointer: str) -> ModelFacts | None:
    if files is None or ref is None:
        return None
    if isinstance(files, RandomModel):
        return random_facts(files)
    with engine_refusals(f"{pointer}/{source_field(ref)}"):
        facts = _facts.facts_of(files)
        # The files of a checkpoint are the engine's own.
        if facts.is_described or ref.checkpoint is not None:
            return facts
        return replace(facts, warnings=(*facts.warnings, *_structures.check(files)))


def _check_sequence_length(spec: DistillationSpec, model: ModelFacts | None) -> None:
    check_sequence_length(spec.data.max_length, None if model is None else model.max_positions)


def _check_gguf(spec: DistillationSpec, student: ModelFacts | None) -> None:
    if spec.export.gguf and student is not None:
        check_gguf_family(student.family)
