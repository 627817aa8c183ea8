"""The first schema: blocks with their frozen policy, rounds, and charges beside them; blocks and rounds are chained."""

import sqlalchemy as sa
from alembic import op

revision = "0001_chained"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the three tables."""
    op.create_table(
        "blocks",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("block_id", sa.String(200), nullable=False, unique=True),
        sa.Column("stream", sa.String(64), nullable=False, index=True),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("prev_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
    )
    op.create_table(
        "ledger",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("stream", sa.String(64), nullable=False, index=True),
        sa.Column("round_id", sa.String(200), nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("plan_hash", sa.String(64), nullable=False),
        sa.Column("noise_source", sa.String(16), nullable=False),
        sa.Column("adapter_sha256", sa.String(64), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("blocks_head", sa.String(64), nullable=False),
        sa.Column("prev_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        # A second row for one step of one attempt is a bug or a race: the database refuses it too.
        sa.UniqueConstraint("round_id", "attempt", "state", name="one_row_a_step"),
    )
    op.create_table(
        "charges",
        sa.Column("seq", sa.Integer, sa.ForeignKey("ledger.seq"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("block_id", sa.String(200), sa.ForeignKey("blocks.block_id"), nullable=False, index=True),
        # Float is IEEE double precision in SQLite and PostgreSQL: what is read is what was written, bit for bit.
        sa.Column("q", sa.Float, nullable=False),
        sa.Column("sigma", sa.Float, nullable=False),
        sa.Column("steps", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    """Refuse: a ledger is never made to forget."""
    raise RuntimeError("the ledger's first schema cannot be undone: it holds what was spent")
