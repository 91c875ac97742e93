"""The inputs of a run: compared with those that it began with, and pinned in its directory."""

from pocl.models.hub import PinnedHub
from pocl.pipeline.context import RunContext
from pocl.storage.inputs import RunInputs, pin_inputs, pinned_inputs
from pocl.train.checkpoint import ResumePoint


class InputPins:
    """The inputs of one run, as far as they are read."""

    def __init__(self, context: RunContext, resume_point: ResumePoint | None) -> None:
        """Read what the run began with.

        Raises:
            WorkdirMismatch: another version of the engine wrote it.
        """
        self._context = context
        self._earlier = [pinned_inputs(context.workdir) or RunInputs()]
        if resume_point is not None:
            self._earlier.append(resume_point.state.inputs)
        self._read = RunInputs()
        commits = {key: commit for each in self._earlier for key, commit in each.commits.items()}
        self.hub = PinnedHub(context.host.hub, commits)
        """The Hub, on which branches stay at the commits that the run began with."""
        self.ranking_model: dict[str, str | None] | None = None
        """Where the model came from that ranks and does nothing else, and its digest; None until it is read."""

    @property
    def read(self) -> RunInputs:
        """All that was read so far."""
        return self._read.joined(RunInputs(commits=dict(self.hub.commits)))

    def add(self, inputs: RunInputs) -> None:
        """Compare inputs that were just read with those that the run began with.

        Raises:
            InputsChanged: they differ; nothing in the directory is touched.
        """
        for before in self._earlier:
            before.refuse_changes(inputs)
            if names := before.incomparable(inputs):
                message = (
                    f"continued with other versions, which compute other digests: whether {', '.join(names)} changed "
                    "since the run began cannot be told"
                )
                self._context.warn("inputs_not_compared", message)
        self._read = self._read.joined(inputs)

    def pin(self, *, are_complete: bool) -> None:
        """Pin what was read so far.

        Args:
            are_complete: Nothing more will be read; else what an earlier start read besides stays pinned.

        Raises:
            DiskFull: when there is no space.
        """
        pin_inputs(self._context.workdir, self.read if are_complete else self._earlier[-1].joined(self.read))
