"""The push of a job's student to the Hugging Face Hub, as the API shows it."""

from datetime import datetime

from api.pagination import Resource
from domain.publications.models import PublicationState


class PublicationError(Resource):
    """Why the student could not be pushed."""

    code: str
    """A stable name of the reason, for programs."""
    message: str
    """One sentence for people."""


class PublicationView(Resource):
    """The push of a job's student to a repository of the Hugging Face Hub."""

    state: PublicationState
    """`pending` until a scheduler takes it, and between two attempts; `uploading` during one; `published` once the
    branch has the files of the student; `failed` where nothing more is tried unless you ask for it. More states may be
    added."""
    repo: str
    """The repository, as `owner/name`."""
    branch: str
    """The branch."""
    checkpoint: str | None
    """The id of the checkpoint that is pushed; null where the job stored none of the kind."""
    attempts: int
    """The number of attempts since the job succeeded, or since another try was asked for."""
    not_before: datetime | None
    """When the next attempt is due; null unless it is pending."""
    error: PublicationError | None
    """Why the last attempt failed; null where none did, or the student is published."""
    url: str | None
    """Where people see the repository; null until it is published."""
    commit: str | None
    """The commit of the branch that has the files; null until it is published."""
    published_at: datetime | None
    """When it was found there; null until then."""
