"""Counts ends of jobs and attempts in the transaction that brings them about, so that none is lost or counted twice.

The counts of a transaction are written together at its commit, in one order for all transactions: two that end jobs in
the same ways wait for each other for the time of a commit, and never in a circle.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from domain.db import upsert_into
from domain.end_counts.models import EndCount, EndKind

_PENDING: Final = "pocl_end_counts"
"""Key in the `info` of a session: the ends that its transaction has not written yet."""
_CODE: Final = re.compile(r"[a-z0-9_]{1,64}")
_OTHER_CODE: Final = "other"


def count_end(session: Session, kind: EndKind, end: str, *, fault: str | None, code: str) -> None:
    """Count one end when the session's transaction commits.

    Args:
        code: the code of the end reason; one that is none counts as `other`.
    """
    pending: Counter[tuple[str, str, str, str]] = session.info.setdefault(_PENDING, Counter())
    pending[kind, end, fault or "none", code if _CODE.fullmatch(code) else _OTHER_CODE] += 1


def list_end_counts(session: Session, *, limit: int) -> Sequence[EndCount]:
    """The counts, the largest first."""
    return session.scalars(sa.select(EndCount).order_by(EndCount.count.desc()).limit(limit)).all()


@event.listens_for(Session, "before_commit")
def _write_pending(session: Session) -> None:
    pending: Counter[tuple[str, str, str, str]] | None = session.info.pop(_PENDING, None)
    if not pending:
        return
    rows = [
        {"kind": kind, "end": end, "fault": fault, "code": code, "count": count}
        for (kind, end, fault, code), count in sorted(pending.items())
    ]
    statement = upsert_into(session.connection(), EndCount).values(rows)
    session.execute(
        statement.on_conflict_do_update(
            index_elements=["kind", "end", "fault", "code"],
            set_={"count": EndCount.count + statement.excluded.count},
        )
    )


@event.listens_for(Session, "after_rollback")
def _forget_pending(session: Session) -> None:
    session.info.pop(_PENDING, None)
