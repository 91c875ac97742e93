"""The trackers that a job may ask for, and the row of each: what it has been sent, and what went wrong."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import ForeignKey, Index, String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, JsonType, UtcDateTime, db_now

TrackerKind = Literal["tensorboard", "mlflow", "wandb"]
TrackerChannel = Literal["tensorboard", "mlflow", "wandb", "wandb_offline"]
"""A way in which metrics are tracked: a kind of tracker, and for Weights & Biases whether it is online."""
TrackerState = Literal["open", "closed", "failed"]
FILE_CHANNELS: Final[tuple[TrackerChannel, ...]] = ("tensorboard", "wandb_offline")
"""The channels that make a file of the job's metrics; the others send them to a server."""
MAX_TRACKERS: Final = 3
RESERVED_TAGS: Final = ("pocl.", "mlflow.")
"""How the tags begin that the service and MLflow set."""


def _refuse_reserved(tags: dict[str, str]) -> dict[str, str]:
    for name in tags:
        if name.startswith(RESERVED_TAGS):
            raise ValueError("tags that begin with 'pocl.' or 'mlflow.' are set by the service and by MLflow")
    return tags


_Text = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
_Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f/\\#?%:]+$")]
_Tag = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]*$")]
_TagName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_. /-]{0,126}$")]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TensorBoardTracker(_Options):
    """An event file for TensorBoard, which is made of the metrics of the job and can be downloaded."""

    kind: Literal["tensorboard"]
    """TensorBoard."""

    @property
    def channel(self) -> TrackerChannel:
        return "tensorboard"


class MlflowTracker(_Options):
    """A run on the MLflow server of the service."""

    kind: Literal["mlflow"]
    """MLflow."""
    experiment: _Text = "pocl"
    """The experiment that the run is in; it is made where there is none of this name."""
    run_name: _Text | None = None
    """The name of the run; null: that of the job, or else its id."""
    tags: Annotated[dict[_TagName, _Text], Field(max_length=16), AfterValidator(_refuse_reserved)] = {}
    """Tags of the run besides those that the service sets, which begin with `pocl.`."""

    @property
    def channel(self) -> TrackerChannel:
        return "mlflow"


class WandbTracker(_Options):
    """A run of Weights & Biases, on the server that the service has a key for, or as a file."""

    kind: Literal["wandb"]
    """Weights & Biases."""
    project: _Name = "pocl"
    """The project of Weights & Biases that the run is in."""
    entity: _Name | None = None
    """The user or team that the project belongs to; null: the default of the service's key."""
    mode: Literal["online", "offline"] = "online"
    """`online` sends the metrics while the job runs; `offline` makes a file, which can be downloaded and is sent by
    `wandb sync`."""
    run_name: _Text | None = None
    """The name of the run; null: that of the job, or else its id."""
    group: _Name | None = None
    """The group of the run; null: the job that this one was retried or branched from, if any."""
    tags: Annotated[tuple[_Tag, ...], Field(max_length=16)] = ()
    """Tags of the run."""

    @property
    def channel(self) -> TrackerChannel:
        return "wandb" if self.mode == "online" else "wandb_offline"


TrackerOptions = TensorBoardTracker | MlflowTracker | WandbTracker
TaggedTracker = Annotated[TrackerOptions, Field(discriminator="kind")]
"""A tracker as clients name it, told apart by its `kind`."""


class JobTracker(Base):
    """A tracker of a job, and how much of the job's metrics it has."""

    __tablename__ = "job_trackers"
    __table_args__ = (Index("ix_job_trackers_pending", "pending", "channel"),)

    job_id: Mapped[str] = mapped_column(String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    kind: Mapped[TrackerKind] = mapped_column(String(16), primary_key=True)
    position: Mapped[int]
    """The place in the job's list of trackers, counted from 0."""
    channel: Mapped[TrackerChannel] = mapped_column(String(16))
    options: Mapped[dict[str, Any]] = mapped_column(JsonType)
    """The fields of :data:`TrackerOptions`."""
    state: Mapped[TrackerState] = mapped_column(String(16), default="open")
    """`closed`: the job has ended, and the tracker has all of it; `failed`: it was given up."""
    pending: Mapped[bool] = mapped_column(default=False)
    """Whether the job has changed its state since it was last forwarded while no worker held it."""
    due_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
    """When the next values are sent."""
    failures: Mapped[int] = mapped_column(default=0)
    """How often in a row nothing could be sent."""
    failing_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """When the first of these failures was; null where the last values were sent."""
    problem: Mapped[dict[str, str] | None] = mapped_column(JsonType)
    """`code` and `message` of the last failure; null where the last values were sent."""
    run_id: Mapped[str | None] = mapped_column(String(200))
    """The id of the run on the tracker's server; null before it is made, and for a file."""
    run_url: Mapped[str | None] = mapped_column(String(1000))
    """Where people see the run; null where the tracker does not say."""
    last_steps: Mapped[dict[str, int]] = mapped_column(JsonType, default=dict)
    """The last optimiser step of each series that the tracker has: what is forwarded begins after it."""
