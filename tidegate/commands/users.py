"""`tidegate users`: logins of the registry, and what each may do."""

from __future__ import annotations

import secrets
import sys
from typing import TYPE_CHECKING, Any

import click

from tidegate import output

if TYPE_CHECKING:
    from tidegate.wiring import Service

_ROLES = ("viewer", "trainer", "approver", "admin")
_JSON = click.option("--json", "want_json", is_flag=True, help="JSON instead of a line.")
# 12 random bytes: 24 characters that no shell takes for anything else, 96 bits.
_PASSWORD_BYTES = 12


@click.group()
def users() -> None:
    """Who may do what in MLflow, where service.mlflow.auth is basic. Each role but admin is for one stream.

    \b
    viewer     reads the versions of a stream and their evidence
    trainer    registers versions, by a client of their own
    approver   decides what goes live, what leaves, and what is rejected
    admin      makes users and gives roles; also all of the above

    Works while MLflow runs, by the admin's password in the keys folder, or by the login in MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD. Everything may be repeated.
    """  # noqa: D301 - click takes the character itself for a mark


@users.command()
@click.argument("name")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input instead of making one.")
@_JSON
@click.pass_obj
def add(given: str | None, name: str, *, password_stdin: bool, want_json: bool) -> None:
    """Make user NAME, without any role. A password that is made here is shown once, and kept nowhere."""
    password = sys.stdin.readline().rstrip("\n") if password_stdin else secrets.token_hex(_PASSWORD_BYTES)
    made = _open(given).users.add_user(name, password)
    shown = password if made and not password_stdin else None
    if want_json:
        output.as_json({"name": name, "made": made, "password": shown})
    elif not made:
        output.say(f"{name} is there already and stays as they are")
    else:
        output.say(f"made   {name}" + (f", password {shown}   (shown once)" if shown else ""))


@users.command()
@click.argument("name")
@click.argument("role", type=click.Choice(_ROLES))
@click.argument("stream", required=False)
@_JSON
@click.pass_obj
def grant(given: str | None, name: str, role: str, stream: str | None, *, want_json: bool) -> None:
    """Give user NAME a ROLE on STREAM; admin is for all of them, so it takes no stream."""
    service = _open(given)
    changed = service.users.grant(name, role, _model(service, role, stream))
    _tell(name, role, stream, has=True, changed=changed, want_json=want_json)


@users.command()
@click.argument("name")
@click.argument("role", type=click.Choice(_ROLES))
@click.argument("stream", required=False)
@_JSON
@click.pass_obj
def revoke(given: str | None, name: str, role: str, stream: str | None, *, want_json: bool) -> None:
    """Take from user NAME a ROLE on STREAM. It holds from their next request on."""
    service = _open(given)
    changed = service.users.revoke(name, role, _model(service, role, stream))
    _tell(name, role, stream, has=False, changed=changed, want_json=want_json)


@users.command("list")
@_JSON
@click.pass_obj
def list_(given: str | None, *, want_json: bool) -> None:
    """List users and their roles by registered model; the service's own two as well."""
    found = _open(given).users.users()
    if want_json:
        output.as_json(found)
        return
    rows = [
        (user["name"], "admin" if user["admin"] else "the service" if user["service"] else "", _roles(user["roles"]))
        for user in found
    ]
    output.table("users of MLflow", ("user", "", "roles"), rows)


def _roles(roles: dict[str, list[str]]) -> str:
    return "; ".join(f"{model}: {', '.join(given)}" for model, given in roles.items())


def _model(service: Service, role: str, stream: str | None) -> str:
    if role == "admin":
        if stream is not None:
            raise click.UsageError("admin is for all streams: leave STREAM out")
        return ""
    if stream is None:
        raise click.UsageError(f"{role} of which stream? They are: {', '.join(service.settings.streams)}")
    return service.model(stream)


def _tell(name: str, role: str, stream: str | None, *, has: bool, changed: bool, want_json: bool) -> None:
    if want_json:
        output.as_json({"name": name, "role": role, "stream": stream, "has": has, "changed": changed})
        return
    state = "is" if has else "is not"
    output.say(f"{name} {state} {role}{f' of {stream}' if stream else ''}{'' if changed else ', as before'}")


def _open(given: str | None) -> Any:
    from tidegate.wiring import open_service

    return open_service(given)
