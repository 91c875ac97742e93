"""The table of throughput: how fast devices did jobs of a size."""

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import String
from sqlalchemy.orm import Mapped, mapped_column

from domain.db import Base, UtcDateTime, db_now


class Throughput(Base):
    """The planned operations a second of whole jobs that ended well on one device, by the size of the student."""

    __tablename__ = "throughputs"

    device: Mapped[str] = mapped_column(String(16), primary_key=True)
    """`cpu` or `cuda`."""
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    """The name of the device."""
    size_class: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """The logarithm to base 4 of the student's parameters, rounded down."""
    jobs: Mapped[int]
    mean_log: Mapped[float] = mapped_column(sa.Double)
    """The mean of the natural logarithm of the operations a second."""
    squares: Mapped[float] = mapped_column(sa.Double)
    """The sum of the squared deviations from that mean."""
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, default=db_now())
