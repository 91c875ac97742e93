"""The phases of a run, in the order in which they happen."""

from functools import partial

from pocl.pipeline.cache_teacher import cache_teacher
from pocl.pipeline.context import RunContext
from pocl.pipeline.evaluate import RunEvaluations
from pocl.pipeline.export import export, student_export, try_exported_tokenizer
from pocl.pipeline.load import load
from pocl.pipeline.rank import rank
from pocl.pipeline.train import TrainingParts, make_trainer
from pocl.pipeline.validate import validate
from pocl.report.result import Result
from pocl.train.evaluations import StudentScoring


def run_phases(context: RunContext) -> Result:
    """Do what is left of the run.

    Raises:
        PoclError: whose class says what went wrong.
    """
    validated = validate(context)
    loaded = load(context, validated)
    ranking = rank(context, loaded, validated.inputs)
    validated.inputs.pin(are_complete=True)

    evaluations = RunEvaluations(context, loaded)
    resume_point = validated.resume_point
    made = set() if resume_point is None else resume_point.state.evaluation_keys
    evaluations.drop_answers_but_of(made)
    teacher_scores = evaluations.score_teacher(made)
    teacher = cache_teacher(context, loaded, resume_point)

    scoring = None
    if evaluations.splits:
        score = partial(evaluations.score_student, teacher)
        scoring = StudentScoring(score, evaluations.splits, evaluations.keep_answers)
    tokenizer_trial = try_exported_tokenizer(context, validated, loaded.models)
    exported_student = student_export(context, validated, loaded, tokenizer_trial)
    parts = TrainingParts([sample.row for sample in ranking], teacher, exported_student, scoring)
    trainer = make_trainer(context, validated, loaded, parts)
    trainer.state.inputs, trainer.state.tokenizer_trial = validated.inputs.read, tokenizer_trial
    # Added to the state that the trainer knows from the disk: they are not saved yet.
    for evaluation in teacher_scores:
        trainer.state.add_evaluation(evaluation)
    state = trainer.run()
    return export(context, validated, loaded, trainer.student, state, ranking)
