"""A row names its account and window; charges stand packed, with one mechanism for many blocks, ordered for both uses.

Rows written before keep their hashes: the new fields at their defaults are no part of what is hashed.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002_accounts"
down_revision = "0001_chained"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the two fields; move each row's (q, sigma, steps) into a table of their own, without loss."""
    op.add_column("ledger", sa.Column("account", sa.String(16), nullable=False, server_default="train"))
    op.add_column("ledger", sa.Column("window", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "mechanisms",
        sa.Column("seq", sa.Integer, sa.ForeignKey("ledger.seq"), primary_key=True, autoincrement=False),
        # Position of the first charge of its row that uses it.
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        # Float is IEEE double precision in SQLite and PostgreSQL: what is read is what was written, bit for bit.
        sa.Column("q", sa.Float, nullable=False),
        sa.Column("sigma", sa.Float, nullable=False),
        sa.Column("steps", sa.Integer, nullable=False),
        sqlite_with_rowid=False,  # found by its key alone, in one step
    )
    op.execute(
        "INSERT INTO mechanisms (seq, number, q, sigma, steps) "
        "SELECT seq, MIN(position), q, sigma, steps FROM charges GROUP BY seq, q, sigma, steps"
    )
    op.create_table(
        "packed_charges",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        # A block is named by its place in the blocks' chain: short, and never given twice.
        sa.Column("block", sa.Integer, sa.ForeignKey("blocks.seq"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["seq", "number"], ["mechanisms.seq", "mechanisms.number"]),
        # A row's charges lie side by side, so that an audit reads the file from front to back.
        sqlite_with_rowid=False,
    )
    op.execute(
        "INSERT INTO packed_charges (seq, position, block, number) "
        "SELECT c.seq, c.position, b.seq, m.number FROM charges c JOIN blocks b ON b.block_id = c.block_id "
        "JOIN mechanisms m ON m.seq = c.seq AND m.q = c.q AND m.sigma = c.sigma AND m.steps = c.steps"
    )
    op.drop_table("charges")
    op.rename_table("packed_charges", "charges")
    # All a reservation asks about a block stands in the index, so its charges lie side by side there.
    op.create_index("charges_of_block", "charges", ["block", "seq", "number"])
    # The newest row of a stream in windows, however many rows have none.
    op.create_index("windows_of_stream", "ledger", ["stream", "window", "seq"])


def downgrade() -> None:
    """Refuse: a ledger is never made to forget."""
    raise RuntimeError("accounts and windows cannot be taken out of the ledger: rows depend on them")
