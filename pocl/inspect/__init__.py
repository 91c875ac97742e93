"""What a model's files say about it, read without torch and without running any code in them.

Every read is bounded and every count is checked against the size of its file: the files come from
whoever posts a job.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pocl.errors import ModelNotFound, ModelUnsupported
from pocl.inspect.directory import inspect_directory, read_supported_configs
from pocl.inspect.facts import (
    ModelFacts,
    ModelWarning,
    check_layers_exist,
    check_sequence_length,
    facts_of_selected_layers,
)
from pocl.inspect.family_support import (
    check_family,
    check_gguf_family,
    explain_no_gguf,
    explain_unselectable_layers,
    is_tried,
)
from pocl.inspect.gguf import inspect_gguf
from pocl.inspect.hub_snapshots import cached_snapshot
from pocl.inspect.random import random_facts
from pocl.inspect.vocabulary import (
    SharedVocabulary,
    TokenLimits,
    compare_vocabularies,
    encodes_with_teacher_tokenizer,
    shared_vocabulary,
)

__all__ = [
    "ModelFacts",
    "ModelWarning",
    "SharedVocabulary",
    "TokenLimits",
    "cached_snapshot",
    "check_gguf_family",
    "check_layers_exist",
    "check_sequence_length",
    "compare_vocabularies",
    "encodes_with_teacher_tokenizer",
    "explain_no_gguf",
    "explain_unselectable_layers",
    "facts_of_selected_layers",
    "inspect_model",
    "random_facts",
    "read_supported_configs",
    "shared_vocabulary",
]


def inspect_model(path: Path) -> ModelFacts:
    """The facts of a model directory (config.json, tokenizer.json, safetensors) or of a `.gguf` file.

    Raises:
        ModelNotFound: nothing is there, or it may not be read.
        ModelUnsupported: what is there is no causal language model in safetensors or GGUF, needs code of
            its own, or is damaged.
    """
    kind = _kind(path)
    if kind is None:
        raise ModelNotFound(f"There is no model at the path that ends in {path.name[:80]!r}.")
    try:
        facts = inspect_directory(path) if kind == "directory" else inspect_gguf(path)
    except PermissionError:
        raise ModelNotFound(f"The model {path.name!r} may not be read by the service.") from None
    except OSError:
        # The text of an OSError names the whole path, which callers must not learn.
        raise ModelUnsupported(f"The files of the model {path.name!r} cannot be read.") from None
    check_family(facts.family)
    if is_tried(facts.family):
        return facts
    message = (
        f"the family {facts.family[:40]} was not tried before: a run tries it as it loads the model, and refuses it "
        "where a padded batch gives other logits than each text by itself"
    )
    return replace(facts, warnings=(*facts.warnings, ModelWarning("family_not_tried", message)))


def _kind(path: Path) -> Literal["directory", "file"] | None:
    try:
        if path.is_dir():
            return "directory"
        return "file" if path.is_file() else None
    except OSError:
        # Too long a name, or a directory on the way that may not be entered.
        return None
