"""Logging: coloured lines on a terminal, one JSON object a line otherwise. Never content of a record.

Ingest counts its records exactly in its lines: they are for the operator, inside the trust boundary (docs/privacy.md).
"""

from __future__ import annotations

import logging
import sys

import structlog


def configure() -> None:
    """Send structlog's events to standard error, and quiet the libraries that log by themselves."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    # On the handler, because libraries reset the levels of their own loggers when they are imported.
    logging.getLogger().handlers[0].setLevel(logging.WARNING)
    # Chatty below error: kafka-python repeats every reconnect, alembic every migration.
    for name in ("kafka", "alembic", "dvc", "mlflow", "great_expectations", "apscheduler"):
        logging.getLogger(name).setLevel(logging.ERROR)
