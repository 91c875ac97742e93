"""Which versions of the service work together: those of one generation, and of two neighbours.

A release that changes the schema, rows or messages has a generation of its own, one more than the release before. While
a service is upgraded, processes of two generations share a database: so a migration only adds what the code of the
generation before can do without (*expand*), and what that code needs is taken away by the release after (*contract*).
The database records the generation of its schema, and each worker and scheduler its own.
"""

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, Session, mapped_column

from domain.db import Base, db_now, upsert_into

GENERATION: Final = 2
"""The generation of this code. It is counted up with the first change after a release; see docs/upgrading.md."""
FIRST_GENERATION: Final = 1
"""The generation of processes and schemas that record none."""
_LIVE_SECONDS: Final = 180
"""A process whose last heartbeat is older has ended."""
_ROW: Final = 1


class SchemaState(Base):
    """The generation of the schema; one row."""

    __tablename__ = "schema_state"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    generation: Mapped[int]
    """That of the newest version that has migrated the database."""


@dataclass(frozen=True)
class RunningProcess:
    """A worker or scheduler that has shown its liveness lately."""

    name: str
    generation: int


def read_generation(connection: sa.Connection) -> int:
    """The generation of the schema that the database has."""
    if not sa.inspect(connection).has_table(SchemaState.__tablename__):
        return FIRST_GENERATION
    return connection.scalar(sa.select(SchemaState.generation)) or FIRST_GENERATION


def record_generation(connection: sa.Connection) -> None:
    """Record that the schema is of this generation."""
    statement = upsert_into(connection, SchemaState).values(id=_ROW, generation=GENERATION)
    connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"generation": GENERATION}))


def is_newer(session: Session) -> bool:
    """Whether a newer generation has migrated the database."""
    return (session.scalar(sa.select(SchemaState.generation)) or FIRST_GENERATION) > GENERATION


def list_older_processes(connection: sa.Connection, *, than: int) -> list[RunningProcess]:
    """The workers and schedulers that live and are of a generation before `than`."""
    found: list[RunningProcess] = []
    inspector = sa.inspect(connection)
    for table in ("workers", "schedulers"):
        columns = {column["name"] for column in inspector.get_columns(table)} if inspector.has_table(table) else set()
        if not columns:
            continue
        generation = "generation" if "generation" in columns else "NULL"
        rows = sa.text(f"SELECT name, {generation} AS generation FROM {table} WHERE seen_at >= :since")
        since = connection.scalar(sa.select(db_now(-_LIVE_SECONDS)))
        rows = rows.bindparams(sa.bindparam("since", since, type_=db_now.type))
        found += [RunningProcess(row.name, row.generation or FIRST_GENERATION) for row in connection.execute(rows)]
    return [process for process in found if process.generation < than]
