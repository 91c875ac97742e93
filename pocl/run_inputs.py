"""The inputs of a run as digests: of its samples, and of its models with their tokenizer and template."""

import hashlib
import json
from collections.abc import Mapping, Sequence

import transformers

from pocl.export.model_card import SamplesUsed
from pocl.models.digest import tokenizer_digest
from pocl.models.loading import LazyModel, LoadedModel
from pocl.prepare import Models
from pocl.samples.sample import Sample
from pocl.spec import DistillationSpec
from pocl.storage.inputs import RunInput, RunInputs, order_free_digest


def samples_used(train: Sequence[Sample], held_out: Mapping[str, Sequence[Sample]]) -> tuple[SamplesUsed, ...]:
    """Rows and digest of the training samples, and of those of each name that are evaluated on."""
    return tuple(
        SamplesUsed(name, len(samples), order_free_digest(sample.digest for sample in samples))
        for name, samples in {"train": train, **held_out}.items()
    )


def sample_inputs(
    spec: DistillationSpec, train: Sequence[Sample], held_out: Mapping[str, Sequence[Sample]]
) -> RunInputs:
    """What the run was given as samples, by what `spec` names them as it was posted.

    A branch may be evaluated on other sets, or on more of the same samples, but is trained on no others.
    """
    evaluation = spec.evaluation
    references = {name: ref.model_dump_json() for name, ref in evaluation.sets.items()}
    references["validation"] = str(evaluation.max_rows)
    return RunInputs(
        inputs={
            f"{each.name} samples": RunInput(
                digest=each.digest, size=f"{each.rows} rows", reference=references.get(each.name, "")
            )
            for each in samples_used(train, held_out)
        }
    )


def model_inputs(spec: DistillationSpec, models: Models) -> RunInputs:
    """What the run was given as models, by what `spec` names them as it was posted.

    A branch may have another teacher, and then perhaps another tokenizer and template, but no other student.
    """
    teacher_ref = "" if spec.teacher is None else spec.teacher.model_dump_json()
    reference = hashlib.sha256(teacher_ref.encode()).hexdigest()
    version = f"transformers {transformers.__version__}"
    loaded: dict[str, LoadedModel | LazyModel] = {"student": models.student}
    if models.teacher is not None:
        loaded["teacher"] = models.teacher
    inputs = {
        name: RunInput(digest=model.digest, computed_by=version, reference=reference if _follows(spec, name) else "")
        for name, model in loaded.items()
    }
    templates = json.dumps(models.tokenizer.chat_template, sort_keys=True, default=str)
    inputs |= {
        "tokenizer": RunInput(digest=tokenizer_digest(models.tokenizer), computed_by=version, reference=reference),
        "chat template": RunInput(digest=hashlib.sha256(templates.encode()).hexdigest(), reference=reference),
    }
    return RunInputs(inputs=inputs)


def ranker_inputs(spec: DistillationSpec, digest: str) -> RunInputs:
    """What the run was given as the model that ranks and does nothing else, of this digest; none where it has none."""
    if spec.ranking_model is None:
        return RunInputs()
    version = f"transformers {transformers.__version__}"
    return RunInputs(inputs={"ranking model": RunInput(digest=digest, computed_by=version)})


def _follows(spec: DistillationSpec, name: str) -> bool:
    """Whether an input is the teacher, or made of it."""
    return name == "teacher" or spec.student.from_teacher is not None
