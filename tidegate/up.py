"""Which parts a workspace needs, and in which order they start."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from urllib.parse import urlsplit

from serving.access import is_loopback
from tidegate import identities
from tidegate.route import local_replicas, name_of
from tidegate.supervisor import Part, Supervisor, tidegate_command
from tidegate.vllm import engines_on_vllm
from tidegate.wiring import Service

# The registry imports MLflow, the server loads a base model: cold disks make both slow once.
READY_SECONDS = 180.0


def answers(url: str) -> bool:
    """Whether an HTTP address answers with success."""
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 - our own http address
            return int(reply.status) == 200  # noqa: PLR2004 - HTTP OK
    except (OSError, urllib.error.URLError):
        return False


def listens(address: str) -> bool:
    """Whether something accepts connections at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except OSError:
        return False


def parts_of(service: Service, *, learn: bool = True) -> list[Part]:
    """The child processes of this workspace, in starting order."""
    root, run = service.workspace.root, service.workspace.run

    def part(name: str, *arguments: str) -> Part:
        return Part(name, tidegate_command(root, *arguments), run / f"part-{name}.log")

    parts = []
    if service.settings.service.broker.bootstrap == "embedded":
        parts.append(part("broker", "broker"))
    if service.settings.service.mlflow.uri == "embedded":
        parts.append(part("mlflow", "mlflow"))
    parts.extend(part(f"ingest-{stream}", "ingest", stream) for stream in service.settings.streams)
    for url, stream in engines_on_vllm(service).items():
        if is_loopback(urlsplit(url).hostname or ""):
            parts.append(part(f"vllm-{stream}", "vllm", stream))
    if service.settings.service.replicas:
        parts.extend(part(f"serve-{name_of(url)}", "serve", "--replica", url) for url in local_replicas(service))
        parts.append(part("route", "route"))
    else:
        parts.append(part("serve", "serve"))
    if learn:
        parts.append(part("learn", "learn"))
    return parts


def make_logins(service: Service, say: Callable[[str], None]) -> None:
    """Make the logins of an MLflow that is to ask for them; the admin's password is said when it is made, only then."""
    if not service.asks_logins or service.settings.service.mlflow.uri != "embedded":
        return
    password = identities.ensure(service.keys_dir)
    if password:
        say(f"MLflow   user admin, password {password}   (shown once; kept in {service.keys_dir}/mlflow_admin)")


def start_all(service: Service, say: Callable[[str], None], *, learn: bool = True) -> Supervisor:
    """Start every part and wait until each answers; on failure nothing is left running.

    Raises:
        TidegateError: a part did not start; its last lines are in the message.
    """
    checks: dict[str, Callable[[], bool]] = {
        "broker": lambda: listens(service.bootstrap),
        "mlflow": lambda: answers(f"{service.mlflow_uri}/health"),
        "api": lambda: answers(f"{service.api_uri}/readyz"),
    }
    make_logins(service, say)  # here, and not in the part, whose output is a log
    supervisor = Supervisor(parts_of(service, learn=learn), say)
    try:
        for part in supervisor.parts:
            supervisor.start(part)
            if part.name in {"broker", "mlflow"}:
                supervisor.wait_ready(part, checks[part.name], READY_SECONDS)
        for part in supervisor.parts:
            if part.name in {"serve", "route"}:
                supervisor.wait_ready(part, checks["api"], READY_SECONDS)
    except BaseException:
        supervisor.stop()
        raise
    return supervisor
