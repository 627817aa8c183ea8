"""Alembic migrations of the ledger's tables, applied when a ledger is opened."""
