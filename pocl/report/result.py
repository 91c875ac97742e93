"""What a run leaves for people and programs to read: `result.json` and `report.html`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from pocl.curriculum.ranking import RankedSample
from pocl.evaluation.intervals import ScoreDifference
from pocl.events import DataEncoded, Evaluated, Warned
from pocl.export.model_card import ExportedModel
from pocl.layout import REPORT_FILE, RESULT_FILE
from pocl.models.loading import LazyModel, LoadedModel
from pocl.report.comparison import ComparedAnswers, ModelComparison
from pocl.report.figures import StageFigures, TrainingCurve
from pocl.report.heading import RunName, describe_models, describe_time, read_run_name
from pocl.report.render import ReportData, render
from pocl.report.run_comparison import RunComparison
from pocl.spec import Control, DistillationSpec
from pocl.storage.manifest import replace_file
from pocl.train.selection import VALIDATION, best_chosen_by, best_stage
from pocl.train.state import MetricRow, TrainState


class Result(BaseModel):
    """What a run came to; the content of `result.json`."""

    model_config = ConfigDict(frozen=True)

    steps: int
    """Optimiser steps, those of inherited stages included."""
    tokens_seen: int
    """Prompt and response tokens that the student was trained on."""
    samples: int
    """Training samples."""
    control: Control | None = None
    """The control experiment that the run was; null for the curriculum itself."""
    compared_with: RunComparison | None = None
    """The run that the control is compared with, where it names one (`control.budget_of`)."""
    data: tuple[DataEncoded, ...] = ()
    """What was cut and left out when the samples of each data set became tokens."""
    stages: tuple[StageFigures, ...]
    evaluations: tuple[Evaluated, ...]
    differences: tuple[ScoreDifference, ...] = ()
    """By how much the trained student scores above the untrained one and the teacher, with 95 % intervals."""
    answers: tuple[ComparedAnswers, ...] = ()
    """Answers of all models to the first samples of each set."""
    best_stage: int | None
    """The stage whose weights are in `best/`; `final/` holds the last stage's."""
    best_by: Literal["rouge_l", "exact_match"] = "rouge_l"
    """The score of the greedy answers to the validation samples by which that stage was to be chosen."""
    best_chosen_by: Literal["rouge_l", "exact_match", "cross_entropy"] | None = None
    """The score that chose it: `cross_entropy` where `best_by` was the same after every stage, and so chose nothing;
    null without validation samples."""
    teacher: dict[str, str | None] | None
    """Where the teacher came from, and its digest."""
    student: dict[str, str | None]
    """Where the student came from, and its digest before training."""
    parameters: dict[Literal["teacher", "student"], int] = {}
    """How many parameters they have."""
    ranking_model: dict[str, str | None] | None = None
    """Where the model came from that ranked the samples and did nothing else, and its digest; null where there was
    none."""
    data_commits: dict[str, str] = {}
    """The commits of the data sets of the Hub, by the pointers of their fields in the specification."""
    export: ExportedModel | None = None
    """What `final/` holds, and what reads it."""
    precision: str
    machine: str
    """What the bits of the result depend on besides: versions, hardware and threads."""
    not_exact: tuple[str, ...] = ()
    """Why the run may end in other bits when it is repeated or resumed, a sentence each; empty where it would not."""
    warnings: tuple[Warned, ...] = ()
    """What is to be known of specification, data, models and answers, by code: :data:`~pocl.train.state.MAX_WARNINGS`
    at most, and none about interruptions."""


@dataclass(frozen=True)
class Origins:
    """Where models and data of a run came from, each model with its digest."""

    student: dict[str, str | None]
    teacher: dict[str, str | None] | None
    parameters: Mapping[Literal["teacher", "student"], int]
    ranking_model: dict[str, str | None] | None
    """The model that ranked and did nothing else; None where there was none."""
    data_commits: Mapping[str, str]
    """The commits of data sets of the Hub, by the pointers of their fields."""


def build_result(
    state: TrainState,
    evaluations: list[Evaluated],
    *,
    data: Sequence[DataEncoded],
    spec: DistillationSpec,
    precision: str,
    origins: Origins,
    export: ExportedModel,
    compared_with: RunComparison | None,
) -> Result:
    """The figures of a finished run."""
    comparison = ModelComparison(state, best_stage(evaluations, spec.evaluation.best_by))
    best_by = spec.evaluation.best_by
    return Result(
        steps=state.step,
        tokens_seen=state.tokens_seen,
        samples=state.finished_stages[-1].samples,
        control=spec.curriculum.control,
        compared_with=compared_with,
        data=tuple(data),
        stages=_stage_figures(state, spec),
        evaluations=tuple(evaluations),
        differences=comparison.differences(seed=spec.seed),
        answers=comparison.answers(),
        best_stage=best_stage(evaluations, best_by),
        best_by=best_by,
        best_chosen_by=best_chosen_by(evaluations, best_by),
        teacher=origins.teacher,
        student=origins.student,
        parameters=dict(origins.parameters),
        ranking_model=origins.ranking_model,
        data_commits=dict(origins.data_commits),
        export=export,
        precision=precision,
        machine=state.machine,
        not_exact=tuple(state.not_exact),
        warnings=tuple(sorted(state.warnings, key=lambda each: (each.code, each.pointer or "", each.message))),
    )


def conclude(
    evaluations: Sequence[Evaluated], *, last_stage: int, best_by: Literal["rouge_l", "exact_match"]
) -> list[Evaluated]:
    """The scores of the final student, and of the best one on the samples that did not choose it: those of its stage
    under names of their own.
    """
    stages = [each for each in evaluations if each.subject == "stage"]
    best = best_stage(evaluations, best_by)
    return [
        *(
            each.model_copy(update={"subject": "best"})
            for each in stages
            if each.stage == best and each.split != VALIDATION
        ),
        *(each.model_copy(update={"subject": "final", "stage": None}) for each in stages if each.stage == last_stage),
    ]


def write_result(
    workdir: Path, spec: DistillationSpec, result: Result, metrics: list[MetricRow], ranking: list[RankedSample]
) -> None:
    """Write both files. The report has the name of the run where its directory has one, and its time with it; without
    that equal runs write equal bytes.

    Raises:
        DiskFull: when there is no space; a file has its old content or its new one.
    """
    replace_file(workdir / RESULT_FILE, result.model_dump_json(indent=1) + "\n")
    data = _report_data(spec, result, metrics, ranking, read_run_name(workdir))
    replace_file(workdir / REPORT_FILE, render(data))


def _stage_figures(state: TrainState, spec: DistillationSpec) -> tuple[StageFigures, ...]:
    starts = [0, *state.stage_ends[:-1]]
    return tuple(
        StageFigures(
            index=index,
            samples=stage.samples,
            temperature=stage.temperature,
            kd_weight=stage.kd_weight,
            method=stage.method,
            inherited=stage.recipe != spec.recipe_digest,
            steps=stage.end_step - start,
            end_step=stage.end_step,
            kept_epoch=stage.kept_epoch,
        )
        for index, (stage, start) in enumerate(zip(state.finished_stages, starts, strict=True))
    )


def origin_of(loaded: LoadedModel | LazyModel) -> dict[str, str | None]:
    """Where a model came from, and its digest."""
    return {**loaded.origin, "digest": loaded.digest}


def _settings(spec: DistillationSpec) -> dict[str, str]:
    training = spec.training
    return {
        "learning rate": f"{training.learning_rate:g}, falling to {training.min_learning_rate:g} in each stage",
        "samples of an optimiser step": str(training.batch_size),
        "tokens of a sample": f"{spec.data.max_length} at most",
    }


def _heading(result: Result, run_name: RunName | None) -> Sequence[str]:
    models = describe_models(result.teacher, result.student, result.parameters)
    if run_name is None:
        return ("POCL distillation report", models)
    return (run_name.name, describe_time(run_name, datetime.now(UTC)), models)


def _report_data(
    spec: DistillationSpec,
    result: Result,
    metrics: list[MetricRow],
    ranking: list[RankedSample],
    run_name: RunName | None,
) -> ReportData:
    return ReportData(
        samples=result.samples,
        control=result.control,
        compared_with=result.compared_with,
        tokens_seen=result.tokens_seen,
        data=result.data,
        stages=result.stages,
        evaluations=result.evaluations,
        differences=result.differences,
        answers=result.answers,
        curve=TrainingCurve(
            steps=[row.step for row in metrics],
            loss=[row.loss for row in metrics],
            cross_entropy=[row.cross_entropy for row in metrics],
            divergence=[row.divergence for row in metrics],
            temperature=[row.temperature for row in metrics],
        ),
        ranking=ranking,
        ranker=spec.curriculum.ranking.ranker,
        validation_ends_stages=spec.curriculum.ends_by_convergence,
        best_stage=result.best_stage,
        settings=_settings(spec),
        not_exact=result.not_exact,
        warnings=result.warnings,
        heading=_heading(result, run_name),
        provenance={
            **_export_facts(result.export),
            "preset": spec.preset,
            "seed": str(spec.seed),
            "best stage by": result.best_chosen_by,
            "precision": result.precision,
            "machine": result.machine,
            "teacher": None if result.teacher is None else result.teacher["digest"],
            "student at start": result.student["digest"],
            **{
                f"{name}, on the Hub": f"{origin['name']} at commit {origin['commit']}"
                for name, origin in (
                    ("teacher", result.teacher),
                    ("student at start", result.student),
                    ("model that ranked", result.ranking_model),
                )
                if origin is not None and origin["kind"] == "hub"
            },
            **{f"data of {pointer}": f"commit {commit}" for pointer, commit in result.data_commits.items()},
        },
    )


def _export_facts(export: ExportedModel | None) -> dict[str, str | None]:
    if export is None:
        return {}
    return {
        "read by": export.requires,
        "weights": f"{export.dtype}, input and output embeddings {'one tensor' if export.tied_embeddings else 'two'}",
    }
