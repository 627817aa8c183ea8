"""Logins of the registry: the service's own, kept in the keys folder, and a person's, from their environment.

Where `service.mlflow.auth` is `basic`, MLflow knows two users of the service's own: `tidegate-learner` registers
versions and puts them away, `tidegate-server` reads and says what answers. A decision is always a person's.
"""

from __future__ import annotations

import os
import secrets
import sys
from typing import TYPE_CHECKING

from registry.roles import SERVICES, Role
from tidegate.config import read_secret
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

ADMIN = "admin"
_USER, _PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
# 24 random bytes: 192 bits, 32 characters.
_SECRET_BYTES = 24


def ensure(keys: Path) -> str | None:
    """Make the passwords that are missing, each in a file of mode 0600; the admin's if it was made now.

    Raises:
        ConfigError: a file can be read by others.
    """
    made = {name: _make(keys, name) for name in (_file(ADMIN), *map(_file, SERVICES), _file("forms"))}
    return made[_file(ADMIN)]


def of_service(keys: Path, role: str) -> tuple[str, str] | None:
    """User and password of one of the service's own, or of the admin; None: MLflow here was never started with logins.

    Raises:
        ConfigError: the file can be read by others.
    """
    password = read_secret(_file(role), keys)
    user = ADMIN if role == ADMIN else SERVICES[Role(role)]
    return (user, password) if password else None


def secret_of_forms(keys: Path) -> str:
    """What signs the forms of MLflow's own pages."""
    return read_secret(_file("forms"), keys) or ""


def of_person() -> tuple[str, str] | None:
    """The login that the environment names, in MLflow's own variables."""
    user = os.environ.get(_USER)
    return (user, os.environ.get(_PASSWORD, "")) if user else None


def ask_person() -> tuple[str, str]:
    """The login of whoever decides: from the environment, or asked for on a terminal.

    Raises:
        ConfigError: neither.
    """
    named = of_person()
    if named:
        return named
    if not sys.stdin.isatty():
        raise ConfigError(
            f"MLflow asks who decides: set {_USER} and {_PASSWORD} to a login that has the role approver; "
            f"an admin makes one by `tidegate users add NAME` and `tidegate users grant NAME approver STREAM`"
        )
    import click

    user = click.prompt("MLflow user", err=True)
    return str(user), str(click.prompt("Password", hide_input=True, err=True))


def forget_person() -> None:
    """For a process that works on its own: whoever started it did not register what it registers."""
    for name in (_USER, _PASSWORD):
        os.environ.pop(name, None)


def _file(role: str) -> str:
    return f"mlflow_{role}"


def _make(keys: Path, name: str) -> str | None:
    if read_secret(name, keys) is not None:
        return None
    keys.mkdir(parents=True, exist_ok=True)
    value = secrets.token_urlsafe(_SECRET_BYTES)
    try:
        handle = os.open(keys / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None  # another process of the workspace was first
    with os.fdopen(handle, "w") as out:
        out.write(value)
        out.flush()
        os.fsync(out.fileno())
    return value
