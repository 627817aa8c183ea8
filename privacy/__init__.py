"""Mechanisms, accounting, the ledger that cannot be overspent, receipts and the audit."""
