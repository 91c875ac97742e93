"""The phase `exporting`: how the student leaves the run, with its result and report."""

from dataclasses import replace

from pocl.curriculum.ranking import RankedSample
from pocl.events import ArtifactWritten, CheckpointSaved, PhaseChanged, RunFinished
from pocl.export.gguf import check_model
from pocl.export.model_card import CardFacts
from pocl.export.student import StudentExport
from pocl.export.tokenizer_reading import TokenizerTrial, try_tokenizer
from pocl.export.weight_format import choose_export_dtype, dtype_name
from pocl.layout import ANSWERS_FILE, COMPARED_DIR, FINAL_DIR, REPORT_FILE, RESULT_FILE, checkpoint_dir
from pocl.pipeline.context import RunContext
from pocl.pipeline.load import LoadedRun
from pocl.pipeline.validate import ValidatedRun
from pocl.prepare import Models
from pocl.report.result import Origins, Result, build_result, conclude, origin_of, write_result
from pocl.report.run_comparison import compare_with_run
from pocl.run_inputs import samples_used
from pocl.storage.manifest import read_manifest
from pocl.train.checkpoint import Student
from pocl.train.state import TrainState


def try_exported_tokenizer(context: RunContext, validated: ValidatedRun, models: Models) -> TokenizerTrial:
    """Whether the exported tokenizer is read as it is written; a tokenizer that is read otherwise is reported."""
    resume_point = validated.resume_point
    trial = try_tokenizer(
        models.tokenizer,
        validated.inputs.read.inputs["tokenizer"].digest,
        models.student.model.config,
        None if resume_point is None else resume_point.state.tokenizer_trial,
    )
    if not trial.is_read_as_written:
        message = (
            "AutoTokenizer gives other token ids for the exported directory, since it takes the tokenizer class of "
            "the student's family; read it with PreTrainedTokenizerFast, as the model card says"
        )
        context.warn("tokenizer_read_otherwise", message)
    return trial


def student_export(
    context: RunContext, validated: ValidatedRun, loaded: LoadedRun, trial: TokenizerTrial
) -> StudentExport:
    """What is saved with the weights of the student, whatever its progress.

    Raises:
        GgufUnsupported: it is to be written as GGUF, and cannot be.
    """
    models, corpus = loaded.models, loaded.corpus
    if context.spec.export.gguf:
        check_model(models.student.model, models.tokenizer)
    facts = CardFacts(
        spec=context.spec,
        stages=validated.table,
        student=origin_of(models.student),
        teacher=None if models.teacher is None else origin_of(models.teacher),
        template=corpus.template,
        samples=samples_used(validated.data.splits.train, validated.data.held_out),
    )
    return StudentExport(
        models.tokenizer,
        corpus.ending.end_ids,
        corpus.chat_templates,
        facts,
        stop_text=corpus.ending.stop_text,
        needs_generic_tokenizer=not trial.is_read_as_written,
        dtype=choose_export_dtype(context.spec.export.dtype, models.student.stored_dtype),
    )


def export(
    context: RunContext,
    validated: ValidatedRun,
    loaded: LoadedRun,
    student: Student,
    state: TrainState,
    ranking: list[RankedSample],
) -> Result:
    """Write the final weights, `result.json` and the report.

    Raises:
        DiskFull: when there is no space; what was whole stays whole.
    """
    context.sink(PhaseChanged(phase="exporting"))
    conclusions = conclude(state.evaluations, last_stage=state.stage - 1, best_by=context.spec.evaluation.best_by)
    for evaluated in conclusions:
        context.sink(evaluated)
    progress = replace(state.progress, evaluations=(*state.evaluations, *conclusions))
    source, final = context.workdir / checkpoint_dir(state.step), context.workdir / FINAL_DIR
    exported = student.export.link(student.model, source, final, progress, context.spec.export.gguf)
    for note in exported.gguf_notes:
        context.warn("gguf_differs", note)
    if exported.dtype != dtype_name(student.export.dtype):
        message = f"a weight is too large for {dtype_name(student.export.dtype)}: final/ has {exported.dtype}"
        context.warn("export_not_rounded", message)
    models = loaded.models
    compared_with = None
    if (context.workdir / COMPARED_DIR).exists():
        compared_with = compare_with_run(context.workdir, seed=context.spec.seed)
        if compared_with is None:
            pointer = "/curriculum/control/budget_of"
            context.warn("comparison_missing", "the files of the run to compare with are gone or damaged", pointer)
    result = build_result(
        state,
        [*state.evaluations, *conclusions],
        data=loaded.data_encoded,
        spec=context.spec,
        precision=context.precision.name,
        origins=Origins(
            student=origin_of(models.student),
            teacher=None if models.teacher is None else origin_of(models.teacher),
            parameters=loaded.parameters,
            ranking_model=validated.inputs.ranking_model,
            data_commits=validated.data.commits,
        ),
        export=exported,
        compared_with=compared_with,
    )
    write_result(context.workdir, context.spec, result, state.metrics, ranking)
    if (context.workdir / ANSWERS_FILE).exists():
        context.sink(ArtifactWritten(kind="answers", path=ANSWERS_FILE))
    context.sink(ArtifactWritten(kind="result", path=RESULT_FILE))
    context.sink(ArtifactWritten(kind="report", path=REPORT_FILE))
    size = read_manifest(context.workdir / FINAL_DIR).size_bytes
    context.sink(CheckpointSaved(kind="final", path=FINAL_DIR, step=state.step, stage=None, size_bytes=size))
    context.sink(RunFinished(step=state.step))
    return result
