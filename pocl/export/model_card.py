"""The model card of a distilled student: `README.md` with front matter for the Hub.

What it says follows from the run's specification, its inputs and its training state. It names no path of a machine and
no time, so that equal runs write equal bytes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import yaml

from pocl.events import Evaluated
from pocl.inspect.licence import LICENCE_FIELDS
from pocl.plan import StagePlan
from pocl.spec import DistillationSpec, Method, describe_control, method_name
from pocl.storage.manifest import WeightsFacts

CARD_FILE: Final = "README.md"
TRAINED_DTYPE: Final = "float32"
"""The format of the weights that are trained."""
_MAX_LEFT_OUT: Final = 12


@dataclass(frozen=True)
class SamplesUsed:
    """A set of samples that the run used."""

    name: str
    """What they were used for: `train`, `validation`, ..."""
    rows: int
    digest: str
    """SHA-256 over the digests of the samples, whatever their order."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a run, whatever its progress."""

    spec: DistillationSpec
    stages: Sequence[StagePlan]
    student: Mapping[str, str | None]
    """Where the student came from, its digest before training, and its licence where its card states one."""
    teacher: Mapping[str, str | None] | None
    template: str
    """The name of the template that the samples were encoded with."""
    samples: Sequence[SamplesUsed]


@dataclass(frozen=True)
class ExportedModel:
    """What a card says of the files beside it."""

    requires: str | None
    """What reads them, as pip takes a requirement, e.g. `transformers>=4.57`; null where that was not found out."""
    dtype: str
    """The format of the stored weights: `float32`, `bfloat16` or `float16`."""
    tied_embeddings: bool
    """Whether input and output embeddings are one tensor."""
    eos_tokens: Sequence[str]
    """The tokens at which an answer ends."""
    settings_left_out: Sequence[str] = ()
    """Settings of the student's own generation config that have no place in the exported one."""
    has_chat_template: bool = False
    """Whether there is a chat template: the one that the student was taught with."""
    stop_text: str = ""
    """The plain text that ends an answer, for which no token stands; empty where a token ends it."""
    needs_generic_tokenizer: bool = False
    """`AutoTokenizer` reads the tokenizer by other rules than it was written with."""
    gguf_notes: Sequence[str] = ()
    """Sentences on what the GGUF files beside it say otherwise."""

    @property
    def weights(self) -> WeightsFacts:
        """What the manifest says of the weights."""
        return WeightsFacts(requires=self.requires, dtype=self.dtype, tied_embeddings=self.tied_embeddings)


@dataclass(frozen=True)
class TrainedStage:
    """A finished stage, as it was trained: by the run of the card, or by one that it branched from."""

    temperature: float
    kd_weight: float
    method: Method
    steps: int
    recipe: str
    """The `recipe_digest` of the specification that it was trained with."""


@dataclass(frozen=True)
class Progress:
    """How far the run was when the files were written."""

    step: int
    finished_stages: Sequence[TrainedStage]
    evaluations: Sequence[Evaluated]


def model_card(facts: CardFacts, model: ExportedModel, progress: Progress) -> str:
    """The text of the card."""
    sections = [
        _front_matter(facts),
        "# A distilled language model",
        _introduction(facts, progress),
        *_use(model),
        *_prompts(facts),
        *_origins(facts),
        *_training(facts, progress),
        *_data(facts),
        *_scores(model, progress),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(facts: CardFacts) -> str:
    student, teacher = facts.student, facts.teacher or {}
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "knowledge-distillation", "pocl"],
    }
    base = student if student["kind"] == "hub" else teacher if student["kind"] == "from_teacher" else {}
    if base.get("kind") == "hub":
        fields |= {"base_model": base["name"], "base_model_relation": "finetune"}
    fields |= _licence_fields(student, teacher)
    return "---\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=200) + "---"


def _licence_fields(student: Mapping[str, str | None], teacher: Mapping[str, str | None]) -> dict[str, str | None]:
    of_student, of_teacher = ({name: of[name] for name in LICENCE_FIELDS if of.get(name)} for of in (student, teacher))
    if not of_student or not of_teacher or of_student == of_teacher:
        return of_teacher or of_student
    # The Hub takes one licence; two that differ are told in the text below.
    return {"license": "other", "license_name": "see-the-licences-of-student-and-teacher"}


def _introduction(facts: CardFacts, progress: Progress) -> str:
    method = facts.spec.method.name.value
    steps = f"{progress.step} optimiser steps, {len(progress.finished_stages)} of {len(facts.stages)} stages"
    if facts.teacher is None:
        return f"A student that was fine-tuned on reference answers (`{method}`): {steps}."
    if not facts.spec.method.needs_teacher:
        return f"A student that was fine-tuned on reference answers (`{method}`) beside a teacher: {steps}."
    return f"A student that was distilled from a teacher by `{method}`: {steps}."


def _use(model: ExportedModel) -> list[str]:
    ends = ", ".join(map(code, model.eos_tokens)) or "no token"
    facts = [
        f"- Read by {f'`{model.requires}`' if model.requires else 'versions that were not found out'}; the weights "
        f"are {model.dtype} in safetensors"
        + (f", rounded from those that were trained in {TRAINED_DTYPE}." if model.dtype != TRAINED_DTYPE else "."),
        f"- Input and output embeddings are {'one tensor' if model.tied_embeddings else 'two tensors'}.",
        f"- Answers end at {ends}; `generation_config.json` says so to `generate()` and to servers.",
        "- `chat_template.jinja` is the template that the student was taught with."
        if model.has_chat_template
        else "- There is no chat template.",
    ]
    if model.stop_text:
        facts.append(
            f"- The template ends answers with the plain text {code(model.stop_text)}, for which no token stands. "
            "`generation_config.json` has it as `stop_strings`: give `generate()` the tokenizer too "
            "(`tokenizer=tokenizer`), else it raises. Give the text to a server as `stop`."
        )
    if model.needs_generic_tokenizer:
        facts.append(
            "- Read the tokenizer with `PreTrainedTokenizerFast.from_pretrained`: `AutoTokenizer` takes the class of "
            "the model's family, whose rules are not those of `tokenizer.json`, and gives other token ids."
        )
    if model.settings_left_out:
        names = ", ".join(map(code, model.settings_left_out[:_MAX_LEFT_OUT]))
        more = "" if len(model.settings_left_out) <= _MAX_LEFT_OUT else ", ..."
        facts.append(f"- Left out of the student's own generation config: {names}{more}.")
    return ["## Use", "\n".join(facts)]


def _prompts(facts: CardFacts) -> list[str]:
    """What of the prompts stands in no file beside the card."""
    data = facts.spec.data
    place = "under the heading `### Input:`" if facts.template.startswith("alpaca") else "after an empty line"
    lines = [f"- The text that an instruction is about (`input`, `context`) followed it {place}."]
    if data.date is not None:
        lines.append(f"- Where the template prints today's date, it printed {data.date.isoformat()}.")
    if data.system is None:
        return ["## Prompts", "\n".join(lines)]
    lines.append("- Samples without a system message were given this one, which the template does not write by itself:")
    return ["## Prompts", "\n".join(lines), _fenced(data.system)]


def _fenced(text: str) -> str:
    """A text of others as a block of Markdown code, of any length and with its line ends."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _origins(facts: CardFacts) -> list[str]:
    rows = [("student at start", facts.student)] + ([("teacher", facts.teacher)] if facts.teacher is not None else [])
    table = _table(
        ("", "name", "from", "licence", "digest"),
        [
            (role, code(of["name"] or ""), _provenance(of), _licence(of), code((of.get("digest") or "")[:16]))
            for role, of in rows
        ],
    )
    return ["## Student and teacher", table]


def _provenance(origin: Mapping[str, str | None]) -> str:
    match origin["kind"]:
        case "hub":
            return f"the Hub, {code(origin['revision'] or '')} at commit {code((origin['commit'] or '')[:12])}"
        case "from_teacher":
            return f"layers {code(origin['layers'] or '')} of the teacher"
        case "random":
            return "random weights"
        case _:
            return "files"


def _licence(origin: Mapping[str, str | None]) -> str:
    stated = [code(value) for name in LICENCE_FIELDS if (value := origin.get(name))]
    return ", ".join(stated) or "not stated"


def _training(facts: CardFacts, progress: Progress) -> list[str]:
    spec = facts.spec
    inherited = sum(stage.recipe != spec.recipe_digest for stage in progress.finished_stages)
    parameters = spec.method.model_dump(mode="json", exclude={"name"})
    settings = ", ".join(f"{name} {value}" for name, value in sorted(parameters.items()))
    lines = [
        f"- Method: `{spec.method.name.value}`" + (f" ({settings})" if settings else ""),
        *([f"- {control}"] if (control := describe_control(spec.curriculum.control)) else []),
        *(
            [f"- {inherited} of the stages were trained by the run that this one branched from, as the table says."]
            if inherited
            else []
        ),
        f"- Template: {code(facts.template)}; at most {spec.data.max_length} tokens, of which "
        f"{spec.data.max_prompt_length} of the prompt",
        f"- Batch {spec.training.batch_size}, learning rate {spec.training.learning_rate:g}, seed {spec.seed}, "
        f"preset `{spec.preset}`",
    ]
    table = _table(
        ("stage", "method", "samples", "temperature", "KD weight", "steps", "done"),
        [_stage_row(stage, spec.method, progress) for stage in facts.stages],
    )
    return ["## Training", "\n".join(lines), table]


def _stage_row(planned: StagePlan, method: Method, progress: Progress) -> tuple[object, ...]:
    """A stage as it was trained where it is finished, else as it is planned."""
    is_done = planned.index < len(progress.finished_stages)
    stage = (
        progress.finished_stages[planned.index]
        if is_done
        else TrainedStage(planned.temperature, planned.kd_weight, method, planned.steps, "")
    )
    return (
        planned.index + 1,
        code(method_name(stage.method)),
        planned.samples,
        f"{stage.temperature:.4g}",
        f"{stage.kd_weight:.4g}",
        stage.steps,
        "yes" if is_done else "no",
    )


def _data(facts: CardFacts) -> list[str]:
    table = _table(
        ("samples", "rows", "SHA-256 over the samples, in any order"),
        [(each.name, each.rows, code(each.digest)) for each in facts.samples],
    )
    return ["## Data", table]


def _scores(model: ExportedModel, progress: Progress) -> list[str]:
    if not progress.evaluations:
        return ["## Scores", "Nothing was scored up to these weights."]
    table = _table(
        ("", "samples", "step", "rows", "ROUGE-L", "exact match", "cross-entropy", "KL to the teacher"),
        [
            (
                _subject(each),
                code(each.split),
                each.step,
                each.rows,
                f"{each.rouge_l:.2f}",
                f"{each.exact_match:.2f}",
                f"{each.cross_entropy:.4f}",
                "" if each.divergence is None else f"{each.divergence:.4f}",
            )
            for each in progress.evaluations
        ],
    )
    rounded = (
        []
        if model.dtype == TRAINED_DTYPE
        else [f"The scores are those of the trained weights, in {TRAINED_DTYPE}; the files have them in {model.dtype}."]
    )
    return ["## Scores", "Of greedy answers to the held-out samples:", table, *rounded]


def _subject(evaluated: Evaluated) -> str:
    if evaluated.subject == "initial":
        return "student at start"
    return evaluated.subject if evaluated.stage is None else f"{evaluated.subject} {evaluated.stage + 1}"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def code(text: str) -> str:
    """A text of others as Markdown code within a line of a table: whatever it holds, it stays text."""
    plain = "".join(character if character.isprintable() and character not in "`|" else "?" for character in text)
    return f"`{plain}`" if plain else ""
