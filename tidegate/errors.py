"""Every error Tidegate raises on purpose, and the exit code of the command that meets it.

    Exception
    ├── TidegateError            the application's own           exit 1
    │   ├── ConfigError          a setting is wrong              exit 2
    │   ├── WorkspaceError       the workspace is missing/broken exit 2
    │   ├── UnknownName          a stream, version or block that does not exist
    │   └── RoundRefused         a round that must not or need not run
    ├── ingest.errors.IngestError
    ├── privacy.errors.PrivacyError
    ├── learner.errors.LearnerError
    ├── evaluation.errors.EvaluationError
    ├── registry.errors.RegistryError
    └── serving.errors.ServingError

Foreign exceptions (kafka, dvc, mlflow, sqlalchemy) are translated in the one file that imports the library.
A message is one line: name, value, bound, and the way out.
"""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2


class TidegateError(Exception):
    """Base of the application's own errors."""

    exit_code = EXIT_FAILED


class ConfigError(TidegateError):
    """A setting is unknown, of the wrong type, or out of its bounds."""

    exit_code = EXIT_USAGE


class WorkspaceError(TidegateError):
    """The workspace does not exist, is not one, or is unsafe to use."""

    exit_code = EXIT_USAGE


class UnknownName(TidegateError):
    """A stream, version, block or answer id that does not exist."""

    exit_code = EXIT_USAGE


class RoundRefused(TidegateError):
    """A round that must not run (budget, waiting candidate) or need not (nothing new)."""


def expected_errors() -> tuple[type[Exception], ...]:
    """The error bases a command may show as one line; anything else is a defect and keeps its traceback."""
    from evaluation.errors import EvaluationError
    from ingest.errors import IngestError
    from learner.errors import LearnerError
    from privacy.errors import PrivacyError
    from registry.errors import RegistryError
    from serving.errors import ServingError

    return (
        TidegateError,
        IngestError,
        PrivacyError,
        LearnerError,
        EvaluationError,
        RegistryError,
        ServingError,
    )
