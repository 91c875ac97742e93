"""Plans of jobs: a specification that was checked, with its stages, its cost and what is to be said about it."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.orm import Session

from domain.encoding_checks import EncodingChecker
from domain.errors import engine_refusals
from domain.jobs.budget import with_budget
from domain.jobs.data_checks import DataFigures, StoredRows, check_datasets, set_sizes
from domain.jobs.fleet import Fleet, ResourceRequest, live_fleet
from domain.jobs.forecast import Forecast, make_forecast
from domain.jobs.model_checks import InspectedModels, inspect_models
from domain.jobs.queue import explain_misfit
from domain.jobs.references import ASSUMED_SAMPLES, resolve_references
from domain.settings import Settings
from pocl.estimate import Estimate, ModelSize, ModelSizes, SetSize, estimate
from pocl.plan import StagePlan, stage_table
from pocl.plan_warnings import PlanWarning, plan_warnings
from pocl.prompting.encoding_warnings import pointer_of_part, set_warnings
from pocl.spec import DistillationSpec, resolve


@dataclass(frozen=True)
class JobPlan:
    """A specification that was checked, and what a job with it would do."""

    posted_spec: Mapping[str, Any]
    """The specification as the client posted it."""
    spec: DistillationSpec
    """The resolved specification: every default is named."""
    samples: int
    """The number of training samples."""
    stages: tuple[StagePlan, ...]
    estimate: Estimate | None
    """What the job costs; null where a model's files are not at hand."""
    warnings: tuple[PlanWarning, ...]
    worker_warnings: tuple[PlanWarning, ...]
    """Those of `warnings` that compare the job with the workers there are."""
    datasets: Mapping[str, StoredRows]
    """The data sets by the pointers to the fields that name them."""
    models: InspectedModels
    fleet: Fleet
    """The workers that there were when the job was planned."""
    forecast: Forecast | None = None
    """What the job will take: see :func:`forecast_plan`."""
    data: tuple[DataFigures, ...] = ()
    """What encoding the data sets cuts and leaves out, as far as it was tried: see :func:`check_data`."""
    pointer_prefix: str = ""
    """Where the specification stands in the client's document, for the pointers of errors."""

    @property
    def total_steps(self) -> int:
        """The optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def student_parameters(self) -> int | None:
        """The parameters of the student; null where its files are not at hand."""
        return None if self.models.student is None else self.models.student.parameters


def plan_job(
    session: Session, settings: Settings, posted_spec: Mapping[str, Any], *, project: str, pointer_prefix: str = ""
) -> JobPlan:
    """Check a specification and plan its stages. It writes nothing: the dry run of a submission.

    Call it in a transaction that does not write, since it reads the models' files.

    Args:
        pointer_prefix: where the specification stands in the client's document, for the pointers of errors.

    Raises:
        EngineRefusal: fields are wrong, the project does not have a data set or checkpoint, a path stands where an
            uploaded data set is needed, there are more stages than samples, the budget of a control is
            not known, or the models cannot be used together.
        PathOutsideModelRoots: a model is not where the service may read it.
    """
    with engine_refusals(pointer_prefix):
        # Templates that print the date would else print another one when a job is resumed.
        spec = with_budget(session, project, resolve(posted_spec)).with_day(datetime.now(UTC).date())
        rows, store_keys = resolve_references(session, settings, project, spec)
        samples = _planned_samples(spec, rows["/data/train"].samples)
        stages = stage_table(spec, samples)
    models = inspect_models(settings, spec, store_keys, pointer_prefix=pointer_prefix)
    estimated = _estimate(spec, stages, models, set_sizes(spec, samples, rows, ()))
    fleet = live_fleet(session, settings.lease_seconds)
    worker_warnings = tuple(_worker_warnings(fleet, spec, estimated))
    return JobPlan(
        posted_spec=posted_spec,
        spec=spec,
        samples=samples,
        stages=stages,
        estimate=estimated,
        warnings=(*_warnings(spec, stages, models), *worker_warnings),
        worker_warnings=worker_warnings,
        datasets=rows,
        models=models,
        fleet=fleet,
        pointer_prefix=pointer_prefix,
    )


def check_data(checker: EncodingChecker, plan: JobPlan) -> JobPlan:
    """The plan with what encoding its data sets cuts and leaves out, and warnings about that: the long part of the dry
    run, which needs no transaction.

    Raises:
        EngineRefusal: a run would refuse a data set, the tokenizer or the settings of the data.
    """
    spec, prefix = plan.spec, plan.pointer_prefix
    data = tuple(check_datasets(checker, spec, plan.datasets, plan.models, pointer_prefix=prefix))
    samples = next((each.training_samples for each in data if each.training_samples is not None), plan.samples)
    if samples != plan.samples:
        # A split was planned by its shares; now its parts are known.
        with engine_refusals(prefix):
            stages = stage_table(spec, samples)
        plan = replace(
            plan,
            samples=samples,
            stages=stages,
            warnings=(*_warnings(spec, stages, plan.models), *plan.worker_warnings),
        )
    sets = set_sizes(spec, samples, plan.datasets, data)
    warnings = (
        each if each.pointer is None else replace(each, pointer=f"{prefix}{each.pointer}")
        for each in (*plan.warnings, *_data_warnings(data))
    )
    return replace(plan, data=data, estimate=_estimate(spec, plan.stages, plan.models, sets), warnings=tuple(warnings))


def forecast_plan(session: Session, settings: Settings, plan: JobPlan) -> JobPlan:
    """The plan with what the job will take, by the workers of the plan, and a warning where the disk is full."""
    forecast = make_forecast(
        session,
        settings,
        plan.fleet,
        plan.estimate,
        device=plan.spec.resources.device,
        student_parameters=plan.student_parameters,
    )
    disk = forecast.disk
    if disk.fits is False:
        message = (
            f"The checkpoints of the job may take {disk.needed_bytes} bytes, and {disk.free_bytes} are free where the "
            "artifact store is: free some, or keep fewer checkpoints."
        )
        plan = replace(plan, warnings=(*plan.warnings, PlanWarning("disk_space_low", message)))
    return replace(plan, forecast=forecast)


def _planned_samples(spec: DistillationSpec, rows: int) -> int:
    """The number of samples that are trained on, of so many; about, where a split takes some of them away."""
    split = spec.data.split
    return rows if split is None else max(1, round(rows * (1 - split.validation - split.test)))


def _estimate(
    spec: DistillationSpec, stages: tuple[StagePlan, ...], models: InspectedModels, sets: Mapping[str, SetSize]
) -> Estimate | None:
    if models.student is None or (models.teacher is None and spec.teacher is not None):
        return None
    sizes = ModelSizes(
        student=ModelSize.of(models.student),
        teacher=None if models.teacher is None else ModelSize.of(models.teacher),
        ranker=None if models.ranking_model is None else ModelSize.of(models.ranking_model),
    )
    return estimate(spec, stages, sizes, sets)


def _warnings(
    spec: DistillationSpec, stages: tuple[StagePlan, ...], models: InspectedModels
) -> tuple[PlanWarning, ...]:
    return (*_model_warnings(spec, models), *plan_warnings(spec, stages))


def _worker_warnings(fleet: Fleet, spec: DistillationSpec, estimated: Estimate | None) -> Iterator[PlanWarning]:
    request = ResourceRequest(spec.resources.device, None if estimated is None else estimated.memory_bytes)
    misfit = explain_misfit(fleet, request)
    if misfit is not None:
        yield PlanWarning("no_worker_fits", f"{misfit} It would wait in the queue until one that fits is started.")


def _model_warnings(spec: DistillationSpec, models: InspectedModels) -> Iterator[PlanWarning]:
    facts = {"student": models.student}
    if spec.teacher is not None:
        facts["teacher"] = models.teacher
    uninspected = [role for role, model in facts.items() if model is None]
    if uninspected:
        roles = " and ".join(uninspected)
        yield PlanWarning("models_not_inspected", f"The files of the {roles} are not at hand: the worker checks them.")
    for role, model in facts.items():
        for warning in () if model is None or _is_cut_out(spec, role) else model.warnings:
            yield PlanWarning(warning.code, f"{role}: {warning.message}", f"/{role}")
    for warning in () if models.vocabulary is None else models.vocabulary.warnings():
        yield PlanWarning(warning.code, warning.message, "/student")
    if spec.data.train.hub is not None:
        message = f"The worker counts the samples of data.train.hub: the plan assumes {ASSUMED_SAMPLES} of them."
        yield PlanWarning("samples_assumed", message, "/data/train/hub")


def _is_cut_out(spec: DistillationSpec, role: str) -> bool:
    """Whether a model consists of layers of the teacher, whose warnings are given once."""
    return role == "student" and spec.student.from_teacher is not None


def _data_warnings(data: Iterable[DataFigures]) -> Iterator[PlanWarning]:
    about_template = dict.fromkeys(warning for figures in data for warning in figures.warnings)
    yield from (PlanWarning(*warning) for warning in about_template)
    for figures in data:
        if figures.tried < figures.samples:
            message = (
                f"{figures.part}: {figures.tried} of {figures.samples} samples were tried as tokens; "
                "the worker tries all of them before it trains."
            )
            yield PlanWarning("samples_not_tried", message, pointer_of_part(figures.part))
        about_part = set_warnings(figures.part, figures.counts, pointer_of_part(figures.part))
        yield from (PlanWarning(*warning) for warning in about_part)
