"""What people call the models that were scored."""

from pocl.events import Evaluated

_MODEL_NAMES = {
    "teacher": "teacher",
    "initial": "untrained student",
    "best": "best student",
    "final": "final student",
}


def subject_name(evaluated: Evaluated) -> str:
    """The name of what was scored, for people."""
    if evaluated.subject == "stage" and evaluated.stage is not None:
        return f"after stage {evaluated.stage + 1}"
    if evaluated.subject == "best" and evaluated.stage is not None:
        return f"best student (stage {evaluated.stage + 1})"
    return model_name(evaluated.subject)


def model_name(subject: str) -> str:
    """The name of a model that was scored, for people."""
    return _MODEL_NAMES.get(subject, subject)
