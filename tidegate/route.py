"""The routing process, and what makes a server one of several replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from serving.router import Router
    from tidegate.wiring import Service


def address_of(service: Service, replica: str) -> tuple[str, int]:
    """Where one of service.replicas listens.

    Raises:
        ConfigError: it is none of them.
    """
    urls = service.settings.service.replicas
    if replica not in urls:
        known = ", ".join(urls) or "none"
        raise ConfigError(f"replica={replica}: must be one of service.replicas in params.yaml: {known}")
    parts = urlsplit(replica)
    assert parts.hostname and parts.port  # noqa: S101, PT018 - checked with the settings
    return parts.hostname, parts.port


def name_of(replica: str) -> str:
    """What a replica's own files are called by: replicas may share a workspace."""
    return urlsplit(replica).netloc.replace(":", "-").replace("[", "").replace("]", "")


def local_replicas(service: Service) -> list[str]:
    """Those of service.replicas that `tidegate up` starts; others are started where they are."""
    from serving.access import is_loopback

    return [url for url in service.settings.service.replicas if is_loopback(address_of(service, url)[0])]


def router_of(service: Service) -> Router:
    """A router over service.replicas.

    Raises:
        ConfigError: there are none.
    """
    from serving.router import Router

    urls = service.settings.service.replicas
    if not urls:
        raise ConfigError(
            "service.replicas=[]: must name what to route to, like [http://127.0.0.1:8081, http://127.0.0.1:8082]; "
            "one server needs no router"
        )

    def acknowledge(stream: str, version: int) -> None:
        service.store.set_alias(service.model(stream), "live", version)

    return Router(
        urls,
        service.secret_bytes("answers"),
        acknowledge=acknowledge,
        kept=service.workspace.serving / "router.json",
        headers=service.api_headers,
    )


def run_router(service: Service) -> None:
    """Route until SIGINT or SIGTERM; requests in flight are answered first."""
    from serving.router_server import route

    api = service.settings.service.api
    route(lambda: router_of(service), host=api.host, port=api.port)
