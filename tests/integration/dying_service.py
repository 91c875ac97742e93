"""The service, which kills itself before or after the commit of the first response that it stores.

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

_storing_connections: set[sa.Connection] = set()


@event.listens_for(sa.Engine, "after_cursor_execute")
def _watch_statement(connection: sa.Connection, _cursor: object, statement: str, *_rest: Any) -> None:
    if statement.startswith("UPDATE idempotency_keys SET fingerprint"):
        _storing_connections.add(connection)


def _die(_session: Session) -> None:
    if _storing_connections:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    event.listen(Session, {"before": "before_commit", "after": "after_commit"}[sys.argv.pop()], _die)
    sys.argv.append("serve")
    sys.exit(main())
