"""Builds the model of a directory or GGUF file of tensors without memory; run in a child process, since the service
has no torch and the files come from clients.

See :mod:`pocl.limited_process`, and :mod:`domain.model_structure` for what is asked.
"""

from pathlib import Path
from typing import Any

from pocl.errors import PoclError
from pocl.models.family_trial import run_structure
from pocl.models.gguf import check_gguf
from pocl.models.model_files import check_structure
from pocl.preview.encoder import describe_refusal


def answer(request: dict[str, Any]) -> dict[str, Any]:  # Any: JSON.
    """Why a run would refuse the model at a path, for its config or for names and shapes of its weights; else what it
    would warn of.
    """
    path = Path(request["path"])
    try:
        if path.is_file():
            check_gguf(path)
        else:
            model, warnings = check_structure(path)
            run_structure(model)
            return {"warnings": [[warning.code, warning.message] for warning in warnings]}
    except PoclError as error:
        if error.fault != "user":
            raise
        return {"refusal": describe_refusal(error)}
    return {}
