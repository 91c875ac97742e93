"""The phase `caching_teacher`: the teacher's hidden states for every sample of the run."""

from pocl.events import PhaseChanged
from pocl.pipeline.context import RunContext
from pocl.pipeline.load import LoadedRun
from pocl.teacher.cache import open_teacher
from pocl.teacher.signal import TeacherSignal, TeacherSource
from pocl.train.checkpoint import ResumePoint


def cache_teacher(context: RunContext, run: LoadedRun, resume_point: ResumePoint | None) -> TeacherSignal | None:
    """The teacher's hidden states, computed beforehand where there is room; None where nothing needs a teacher.

    The teacher's own layers are given up then: their memory goes to the student.

    Raises:
        RunStopped: what was computed is kept.
        OutOfMemory: the teacher does not fit into the memory of the device.
    """
    models, corpus = run.models, run.corpus
    if models.teacher is None:
        return None
    trained_on = corpus.train.samples if context.spec.method.needs_teacher else ()
    scored_on = [sample for dataset in corpus.held_out.values() for sample in dataset.scored.samples]
    signal = None
    if samples := (*trained_on, *scored_on):
        context.sink(PhaseChanged(phase="caching_teacher"))
        source = TeacherSource(
            models.teacher.digest,
            models.teacher.structure,
            context.precision,
            load=models.teacher.whole,
            head_only=models.teacher.head_only,
        )
        opened = open_teacher(
            source,
            samples,
            shared_cache=context.shared_cache,
            sink=context.sink,
            should_stop=context.host.should_stop,
            # A run goes on with the states that it began with, where out of memory had made their batches smaller too.
            batch_tokens=None if resume_point is None else resume_point.state.teacher_batch_tokens,
        )
        signal = context.host.resources.enter_context(opened)
    models.teacher.release()
    return signal
