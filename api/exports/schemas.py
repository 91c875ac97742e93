"""Exports as the API shows them, and the body of a request for one."""

from datetime import datetime
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from api.pagination import Page, Resource
from domain.exports.models import CheckpointExport, ExportState
from pocl.errors import Fault
from pocl.spec import GgufFormat


class CheckpointExportCreate(BaseModel):
    """What a checkpoint is to be exported as."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        json_schema_extra={"examples": [{"format": "q8_0"}]},
    )

    format: GgufFormat
    """The format of the matrices in a GGUF file; vectors, such as the weights of norms, are in fp32 always."""


class CheckpointExportError(Resource):
    """Why an attempt at an export failed."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""
    fault: Fault
    """Whose fault it is: of what was asked for, of a machine that is too small or full, or of the service."""


class CheckpointExportView(Resource):
    """A checkpoint as GGUF, with an Ollama Modelfile. It goes with its checkpoint."""

    id: str
    """The id of the export."""
    object: Literal["checkpoint.export"] = "checkpoint.export"
    """The kind of the resource."""
    checkpoint_id: str
    """The checkpoint that is exported."""
    job_id: str
    """The job that saved the checkpoint."""
    format: GgufFormat
    """The format of the matrices."""
    state: ExportState
    """`pending` until a worker takes it, and between two attempts; `running` during one; `complete` once its files can
    be downloaded; `failed` where nothing more is tried unless you ask for it again. More states may be added."""
    attempts: int
    """The number of attempts since it was asked for, or asked for again."""
    not_before: datetime | None
    """When the next attempt is due; null unless it is pending."""
    error: CheckpointExportError | None
    """Why the last attempt failed; null where none did, or the export is complete."""
    size_bytes: int | None
    """The size of its files together, in bytes; null until it is complete."""
    manifest_sha256: str | None
    """The SHA-256 digest of its `manifest.json`, hexadecimal; null until it is complete."""
    notes: list[str]
    """Sentences on what differs from the checkpoint; empty until it is complete."""
    created_at: datetime
    """When it was first asked for."""
    completed_at: datetime | None
    """When its files were whole; null until then."""

    @classmethod
    def from_row(cls, row: CheckpointExport) -> Self:
        """The view of an export."""
        shown = {name: getattr(row, name) for name in cls.model_fields.keys() - {"object", "notes", "not_before"}}
        not_before = row.not_before if row.state == "pending" else None
        return cls(**shown, notes=row.notes or [], not_before=not_before)


class CheckpointExportPage(Page[CheckpointExportView, str]):
    """Exports of a checkpoint, newest first."""
