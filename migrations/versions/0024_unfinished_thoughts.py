"""How many scored answers of an evaluation end inside their thought."""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"


def upgrade() -> None:
    column = sa.Column("unfinished_thoughts", sa.Integer(), nullable=False, server_default="0")
    op.add_column("job_evaluations", column)


def downgrade() -> None:
    op.drop_column("job_evaluations", "unfinished_thoughts")
