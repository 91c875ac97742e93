"""Parts of a specification in words, for the report, the model card and whoever reads them."""

from typing import assert_never

from pocl.spec.curriculum import (
    AllSamples,
    ColumnRanker,
    ConstantTemperature,
    ConstantWeight,
    Control,
    ModelRanker,
    NoCurriculum,
    Ranker,
    ReversedOrder,
    ShuffledStages,
    StudentRanker,
    TeacherRanker,
    WarmStudentRanker,
)
from pocl.spec.methods import Method


def describe_control(control: Control | None) -> str | None:
    """In what a control experiment differs from the curriculum; None for the curriculum itself."""
    match control:
        case None:
            return None
        case NoCurriculum():
            return f"Control experiment {control.kind}: all samples in one stage, at one temperature."
        case ShuffledStages():
            return f"Control experiment {control.kind}: the stages take the samples in a random order."
        case AllSamples():
            return f"Control experiment {control.kind}: each stage takes all samples."
        case ReversedOrder():
            return f"Control experiment {control.kind}: the stages take the samples from hard to easy."
        case ConstantTemperature():
            return f"Control experiment {control.kind}: all stages have one temperature."
        case ConstantWeight():
            return f"Control experiment {control.kind}: all stages have one KD weight."
        case _:
            assert_never(control)


def describe_ranker(ranker: Ranker) -> str:
    """The model that the samples were ranked by, for people."""
    match ranker:
        case StudentRanker():
            return "the untrained student"
        case TeacherRanker():
            return "the teacher"
        case ModelRanker():
            return "another model"
        case WarmStudentRanker():
            return f"a copy of the student after {ranker.steps} steps of warm-up"
        case ColumnRanker():
            return "the column difficulty of the data"
        case _:
            assert_never(ranker)


def method_name(method: Method) -> str:
    """The name of a method, with those of its parameters that are not the defaults."""
    parameters = method.model_dump(exclude={"name"}, exclude_defaults=True)
    settings = ", ".join(f"{name} {value}" for name, value in parameters.items())
    return f"{method.name.value} ({settings})" if settings else method.name.value
