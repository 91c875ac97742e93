"""Work on a row that is itself the lease of who does it: renewed from a thread, and tried again after growing waits."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
from sqlalchemy.orm import Session

from domain.database_errors import DatabaseUnavailable
from domain.db import Database
from domain.errors import LostLease

_log = structlog.get_logger(__name__)

_FIRST_WAIT_SECONDS: Final = 15.0
_MAX_WAIT_SECONDS: Final = 1800.0


@contextmanager
def renewed_lease(
    database: Database, renew: Callable[[Session], None], *, lease_seconds: float
) -> Iterator[threading.Event]:
    """Renew a lease during the block, in a thread; the event is set once it is lost.

    Args:
        renew: renews it in a transaction, or raises :class:`LostLease`.
        lease_seconds: how long it lasts; it is renewed three times meanwhile.
    """
    is_over, is_lost = threading.Event(), threading.Event()

    def keep() -> None:
        while not is_over.wait(lease_seconds / 3):
            try:
                with database.transaction(write=True) as session:
                    renew(session)
            except LostLease:
                is_lost.set()
                return
            except DatabaseUnavailable as error:
                _log.warning("database_unavailable", error=str(error))

    renewing = threading.Thread(target=keep, name="row-lease", daemon=True)
    renewing.start()
    try:
        yield is_lost
    finally:
        is_over.set()
        renewing.join()


def wait_after(attempts: int, jitter: float) -> float:
    """How many seconds to wait after so many attempts: a quarter of a minute at first, doubled, half an hour at most.

    Args:
        jitter: from 0 to 1: of a wait three to five quarters.
    """
    return min(_FIRST_WAIT_SECONDS * 2.0 ** min(attempts - 1, 20), _MAX_WAIT_SECONDS) * (0.75 + 0.5 * jitter)
