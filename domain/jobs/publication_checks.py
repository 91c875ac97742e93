"""Whether the student of a job may be pushed where its specification says: checked at submission and by schedulers."""

from collections.abc import Sequence
from typing import Final

from sqlalchemy.orm import Session

from domain.settings import Settings
from domain.workers.repository import live_publisher
from pocl.errors import FieldError
from pocl.spec import DistillationSpec

OWNER_NOT_ALLOWED: Final = "hub_owner_not_allowed"
PUBLISHING_NOT_AVAILABLE: Final = "hub_publishing_not_available"


def may_publish_to(owners: Sequence[str], repo: str) -> bool:
    """Whether `owner/name` belongs to one of the owners; letter case counts for nothing, as on the Hub."""
    return repo.partition("/")[0].lower() in {owner.lower() for owner in owners}


def explain_owner(owners: Sequence[str], repo: str) -> str:
    """The sentence for a repository of another owner, without its full stop."""
    if not owners:
        return f"{repo} is not written: this service pushes nothing to the Hub; leave `export.hub` out"
    return f"{repo} is not written: this service pushes to repositories of {', '.join(owners)} alone"


def check_publication(session: Session, settings: Settings, spec: DistillationSpec) -> list[FieldError]:
    """What is wrong with the repository that the student is to be pushed to, if anything."""
    wanted = spec.export.hub
    if wanted is None:
        return []
    if not may_publish_to(settings.hub_publish_to, wanted.repo):
        detail = explain_owner(settings.hub_publish_to, wanted.repo)
        return [FieldError("/export/hub/repo", OWNER_NOT_ALLOWED, detail)]
    # With no scheduler alive, as while it starts again, nothing is known.
    if live_publisher(session, settings.lease_seconds) is False:
        detail = (
            "no scheduler that is alive has a token of the Hub: have the operator set POCL_HUB_WRITE_TOKEN, or leave "
            "`export.hub` out"
        )
        return [FieldError("/export/hub", PUBLISHING_NOT_AVAILABLE, detail)]
    return []
