"""Every error the registry raises on purpose.

    RegistryError
    ├── RegistryUnavailable   MLflow does not answer, or answers something that is not MLflow
    ├── UnknownVersion        the model or the version does not exist
    ├── PromotionRefused      the guard, or MLflow's own permissions, say no: the message is the guard's
    sentence
    ├── ApprovalsError        the history of approvals cannot be read or written
    │   └── ApprovalsTampered a row does not match its hash, its predecessor or its signature
    └── ServerFailed          the MLflow child process did not start, or died

Errors of requests, mlflow and sqlalchemy are translated in the one file that imports the library.
"""


class RegistryError(Exception):
    """Base of everything the registry raises on purpose."""


class RegistryUnavailable(RegistryError):
    """MLflow cannot be reached or does not answer as MLflow does."""


class UnknownVersion(RegistryError):
    """The registered model or its version does not exist."""


class PromotionRefused(RegistryError):
    """A change of the registry that must not happen; the message says why and what to do."""


class ApprovalsError(RegistryError):
    """The history of approvals cannot be read or written."""


class ApprovalsTampered(ApprovalsError):
    """The history was changed after it was written; the message names the first row that does not match."""


class ServerFailed(RegistryError):
    """The MLflow server did not start, or is gone."""
