"""The table of end counts: how many jobs and attempts have ended, and how."""

from typing import Literal

import sqlalchemy as sa
from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base

EndKind = Literal["job", "attempt"]


class EndCount(Base):
    """How many jobs or attempts have ended in one way. It only grows: deleted jobs stay counted."""

    __tablename__ = "end_counts"

    kind: Mapped[EndKind] = mapped_column(String(16), primary_key=True)
    end: Mapped[str] = mapped_column(String(16), primary_key=True)
    """The terminal state of the job, or how the attempt ended."""
    fault: Mapped[str] = mapped_column(String(16), primary_key=True)
    """Whose fault it was; `none` for nobody's."""
    code: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The code of the end reason."""
    count: Mapped[int] = mapped_column(sa.BigInteger, default=0)
