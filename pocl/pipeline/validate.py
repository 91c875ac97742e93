"""The phase `validating`: what can be refused before a model is loaded."""

from dataclasses import dataclass

from pocl.events import PhaseChanged, RunStarted
from pocl.layout import CHECKPOINTS_DIR
from pocl.models.precision import machine_fingerprint
from pocl.pipeline.context import RunContext
from pocl.pipeline.input_pins import InputPins
from pocl.plan import StagePlan, stage_table
from pocl.plan_warnings import plan_warnings
from pocl.prepare import check_generator
from pocl.read_data import RunData, read_data
from pocl.run_inputs import sample_inputs
from pocl.train import checkpoint
from pocl.train.checkpoint import ResumePoint


@dataclass(frozen=True)
class ValidatedRun:
    """A run before its models are loaded."""

    data: RunData
    table: tuple[StagePlan, ...]
    resume_point: ResumePoint | None
    """Where to go on; None for a run that begins."""
    inputs: InputPins


def validate(context: RunContext) -> ValidatedRun:
    """Read the samples, find where to go on, and plan the stages.

    Raises:
        SpecInvalid, DatasetInvalid: with what to do about it.
        InputsChanged: the samples are not those with which the run began.
    """
    context.sink(PhaseChanged(phase="validating"))
    check_generator(context.spec.resources.generator)
    resume_point = _find_resume_point(context)
    inputs = InputPins(context, resume_point)
    data = read_data(context.spec, inputs.hub)
    for code, sentence, pointer in data.notes:
        context.warn(code, sentence, pointer)
    inputs.add(sample_inputs(context.posted_spec, data.splits.train, data.held_out))
    table = stage_table(context.spec, len(data.splits.train))
    for warning in plan_warnings(context.spec, table):
        context.warn(warning.code, warning.message, warning.pointer)
    context.sink(
        RunStarted(
            resumed_from_step=None if resume_point is None else resume_point.state.step,
            total_steps=table[-1].first_step + table[-1].steps,
            stages=len(table),
        )
    )
    return ValidatedRun(data, table, resume_point, inputs)


def _find_resume_point(context: RunContext) -> ResumePoint | None:
    resume_point, damaged = checkpoint.find_resume_point(context.workdir / CHECKPOINTS_DIR)
    for sentence in damaged:
        context.warn("checkpoint_passed_over", sentence)
    if resume_point is None and damaged:
        context.warn("started_again", "no whole checkpoint is left: starting again from step 0")
    if resume_point is not None:
        context.restore_warnings(resume_point.state)
    machine = machine_fingerprint(context.device)
    if resume_point is not None and resume_point.state.machine != machine:
        context.warn_not_exact(f"continued on another machine, so not to the same bits: {machine}")
    return resume_point
