"""What the phases of a run share: the pinned specification, where the run happens, and what it has told so far."""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

import torch
import transformers

from pocl.callbacks import OnProgress, ShouldStop
from pocl.container_limits import available_cpus
from pocl.determinism import deterministic_kernels, reasons_not_exact
from pocl.events import ArtifactWritten, Event, Phase, Progressed, Sink, Warned
from pocl.layout import SPEC_FILE
from pocl.models.hub import HubClient
from pocl.models.precision import choose_device, choose_precision
from pocl.out_of_memory import HALVED_IS_NOT_EXACT, HalvedSize
from pocl.sizes import RunSizes
from pocl.spec import DistillationSpec
from pocl.storage.shared_cache import SharedCache
from pocl.storage.workdir import pin_again, pin_spec
from pocl.train.state import MAX_WARNINGS, TrainState

_ABOUT_INTERRUPTIONS: Final = frozenset(
    {
        "checkpoint_passed_over",
        "inputs_not_compared",
        "not_exact",
        "started_again",
        "teacher_cache_damaged",
        "teacher_cache_rebuilt",
    }
)
"""Codes of warnings about how a run went on. Its result is that of a run that was not interrupted, which has none;
`not_exact` of a result says where it is not.
"""


@dataclass(frozen=True)
class RunHost:
    """What whoever starts a run provides for it."""

    workdir: Path
    """Its directory; :mod:`pocl.layout` says what it holds."""
    sink: Sink
    """Is given every event."""
    shared_cache: SharedCache
    """Keeps what other runs can use."""
    resources: ExitStack
    """Is given what must be released when the run ends."""
    should_stop: ShouldStop
    should_pause: ShouldStop
    """Polled at the end of each stage but the last."""
    hub: HubClient
    """Where models and data sets of the Hub come from."""


class RunContext:
    """What the phases of one run share."""

    def __init__(self, spec: DistillationSpec, posted_spec: DistillationSpec, host: RunHost) -> None:
        """Pin the specification in the directory of the run, and set up threads, device and precision.

        Args:
            posted_spec: `spec` before its names became paths of this machine.

        Raises:
            WorkdirMismatch: the directory was started with another specification.
        """
        self.posted_spec = posted_spec
        self.host = host
        self.workdir, self.shared_cache = host.workdir, host.shared_cache
        self.warnings: list[Warned] = []
        """What the result says of the run besides its figures: its warnings, each once."""
        self._spec = pin_spec(
            self.workdir, spec, spec.with_choices(_choices_at_start(spec)).with_day(datetime.now(UTC).date())
        )
        torch.set_num_threads(self._spec.resources.threads or 1)
        # Progress bars would fill a log file; the events say how far a run is.
        transformers.utils.logging.disable_progress_bar()
        self.device = choose_device(self._spec.resources.device)
        if self._spec.resources.deterministic:
            host.resources.enter_context(deterministic_kernels(self.device))
        self.precision = choose_precision(self._spec.training.precision, self.device)
        self.not_exact = reasons_not_exact(spec, self.device)
        """Why the run may end in other bits when it is repeated, a sentence each."""
        self.sink(ArtifactWritten(kind="spec", path=SPEC_FILE))

    @property
    def spec(self) -> DistillationSpec:
        """The specification with what the engine has chosen so far."""
        return self._spec

    @property
    def sizes(self) -> RunSizes:
        """How much is done at once, once it is chosen."""
        return RunSizes.pinned_in(self._spec)

    @property
    def is_on_gpu(self) -> bool:
        """Whether the run computes on a GPU."""
        return self.device.type == "cuda"

    def pin(self, spec: DistillationSpec) -> None:
        """Pin `spec`, which has more choices of the engine than before."""
        if spec != self._spec:
            pin_again(self.workdir, spec)
            self._spec = spec
            self.sink(ArtifactWritten(kind="spec", path=SPEC_FILE))

    def halve(self, size: HalvedSize) -> None:
        """Pin half the size: a run that goes on after an interruption must not begin with the whole one again.

        Raises:
            OutOfMemory: the size is 1 already.
        """
        sizes = self.sizes.halved(size)
        self.pin(self._spec.with_fields(sizes.choices))
        message = f"out of memory: begun again with {getattr(sizes, size)} {size.replace('_', ' ')}"
        self.warn(f"{size}_halved", message)
        self.note_not_exact(HALVED_IS_NOT_EXACT)

    def sink(self, event: Event) -> None:
        """Report an event; a warning once, however often the run is continued, and note it for the result."""
        if isinstance(event, Warned) and event.code not in _ABOUT_INTERRUPTIONS:
            if event in self.warnings:
                return
            if len(self.warnings) < MAX_WARNINGS:
                self.warnings.append(event)
        self.host.sink(event)

    def warn(self, code: str, message: str, pointer: str | None = None) -> None:
        """Report a warning.

        Args:
            pointer: the field of the specification that it is about.
        """
        self.sink(Warned(code=code, message=message, pointer=pointer))

    def report_once(self, event: Event) -> None:
        """Report an event; of warnings that would come again and again the first of each code."""
        if not isinstance(event, Warned) or event.code not in {warning.code for warning in self.warnings}:
            self.sink(event)

    def restore_warnings(self, state: TrainState) -> None:
        """Note the warnings that the run had given when its training state was saved: they are not given again.

        Those of another specification, from which this one branched, are not this run's.
        """
        if state.warned_spec == self.warned_spec:
            self.warnings[:0] = [warning for warning in state.warnings if warning not in self.warnings]

    @property
    def warned_spec(self) -> str:
        """What the warnings of a training state are about: the digest of the specification as it was posted."""
        return hashlib.sha256(self.posted_spec.model_dump_json().encode()).hexdigest()

    def warn_not_exact(self, reason: str) -> None:
        """Report why the run may end in other bits, and note it for the result."""
        self.warn("not_exact", reason)
        self.note_not_exact(reason)

    def note_not_exact(self, reason: str) -> None:
        """Note for the result why the run may end in other bits."""
        if reason not in self.not_exact:
            self.not_exact.append(reason)

    def progress(self, phase: Phase, unit: Literal["samples", "rows"]) -> OnProgress:
        """What reports the progress of a phase."""
        return lambda done, total: self.sink(Progressed(phase=phase, done=done, total=total, unit=unit))


def _choices_at_start(spec: DistillationSpec) -> dict[str, dict[str, int]]:
    """What the engine chooses before the models are loaded, by part and field."""
    return {
        "resources": {"threads": available_cpus()},
        "training": {"micro_batch_size": spec.training.batch_size},
    }
