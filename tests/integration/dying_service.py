"""The service, which kills itself around the commit of the first answer that it keeps.

`python -m tests.integration.dying_service before | after`, with the settings of the service.
"""

import os
import signal
import sys
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.orm import Session

from api.__main__ import main

_kept: set[sa.Connection] = set()


@event.listens_for(sa.Engine, "after_cursor_execute")
def _note(connection: sa.Connection, _cursor: object, statement: str, *_rest: Any) -> None:
    if statement.startswith("UPDATE idempotency_keys SET fingerprint"):
        _kept.add(connection)


def _die(_session: Session) -> None:
    if _kept:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    event.listen(Session, {"before": "before_commit", "after": "after_commit"}[sys.argv.pop()], _die)
    sys.argv.append("serve")
    sys.exit(main())
