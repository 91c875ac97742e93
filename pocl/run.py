"""The only door to the engine: run a specification in a directory, or continue what the directory holds."""

from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

from pocl.callbacks import ShouldStop
from pocl.determinism import is_without_deterministic_kernel
from pocl.errors import DiskFull, EngineFailure, FieldError, OutOfMemory, PoclError, SpecInvalid, is_disk_full
from pocl.events import Event, Phase, PhaseChanged, Progressed, RunEnded, Sink, StepLogged
from pocl.layout import CACHE_DIR, EVENTS_FILE
from pocl.models.hub import HubClient, HuggingFaceHub, current_policy, hub_policy
from pocl.out_of_memory import is_out_of_memory
from pocl.pipeline.context import RunContext, RunHost
from pocl.pipeline.phases import run_phases
from pocl.report.result import Result
from pocl.spec import DistillationSpec
from pocl.storage.shared_cache import SharedCache
from pocl.storage.workdir import EventLog, lock_workdir

DEFAULT_CACHE_BYTES = 64 << 30


def run(
    spec: DistillationSpec,
    workdir: Path,
    sink: Sink,
    should_stop: ShouldStop = lambda: False,
    shared_cache: SharedCache | None = None,
    should_pause: ShouldStop = lambda: False,
    posted_spec: DistillationSpec | None = None,
    hub: HubClient | None = None,
) -> Result:
    """Distil as `spec` says, in `workdir`, or continue the run that `workdir` holds.

    Args:
        spec: The whole specification, as :func:`pocl.spec.resolve` returns it.
        workdir: Is made if need be; :mod:`pocl.layout` says what it holds.
        sink: Is given every event.
        should_stop: Polled between steps and answers; once it is true the training state is saved and
            :class:`~pocl.errors.RunStopped` is raised.
        shared_cache: Where the teacher's hidden states, its scores and measurements are kept for other runs; below
            `workdir` unless given.
        should_pause: Polled at the end of each stage but the last; once it is true the run stops there, as above.
        posted_spec: The specification before its names became paths of this machine; `spec` unless given. A run that
            goes on from a training state knows by it which inputs another specification may have changed.
        hub: Where models and data sets of the Hub come from; the Hub itself unless given.

    Raises:
        PoclError: whose class says what went wrong. The last event is then a `RunEnded` with the same code.
    """
    tracker = _StepTracker(sink)
    cache = shared_cache or SharedCache(workdir / CACHE_DIR, DEFAULT_CACHE_BYTES)
    with ExitStack() as resources:
        try:
            resources.enter_context(lock_workdir(workdir))
            tracker.sink = resources.enter_context(EventLog(workdir / EVENTS_FILE, sink))
            # While files are fetched nothing else is reported, for hours where a model is large.
            resources.enter_context(hub_policy(replace(current_policy(), on_progress=tracker.report_download)))
            host = RunHost(workdir, tracker, cache, resources, should_stop, should_pause, hub or HuggingFaceHub())
            result = run_phases(RunContext(spec, posted_spec or spec, host))
            cache.unpin()
            return result
        except Exception as error:
            # Every end is reported under its code before the exception leaves.
            pocl_error = _to_pocl_error(error)
            if not pocl_error.retryable:
                cache.unpin()
            with suppress(OSError):
                tracker(_run_ended(pocl_error, tracker.step))
            if pocl_error is error:
                raise
            raise pocl_error from error


class _StepTracker:
    """A sink that passes events on and remembers the last optimiser step and phase."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.step = 0
        self._phase: Phase = "validating"

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepLogged):
            self.step = event.step
        if isinstance(event, PhaseChanged):
            self._phase = event.phase
        self.sink(event)

    def report_download(self, done: int, total: int) -> None:
        """Report bytes that were fetched from the Hub in the present phase."""
        self.sink(Progressed(phase=self._phase, done=done, total=total, unit="bytes"))


def _run_ended(error: PoclError, step: int) -> RunEnded:
    return RunEnded(
        code=error.code,
        message=error.message,
        fault=error.fault,
        retryable=error.retryable,
        hint=error.hint,
        step=step,
    )


def _without_deterministic_kernel(error: Exception) -> FieldError:
    operation = str(error).split(maxsplit=1)[0]
    return FieldError(
        pointer="/resources/deterministic",
        code="no_deterministic_kernel",
        detail=f"a model or method needs {operation}, which has no deterministic kernel; set it to false",
    )


def _to_pocl_error(error: Exception) -> PoclError:
    """Translate any exception to an error of the engine."""
    if isinstance(error, PoclError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("Memory ran out where nothing could be made smaller.")
    if is_without_deterministic_kernel(error):
        return SpecInvalid([_without_deterministic_kernel(error)])
    if is_disk_full(error):
        return DiskFull()
    # The message may name paths and stays in the log; the class is safe to show.
    return EngineFailure(f"the engine failed unexpectedly ({type(error).__name__})")
