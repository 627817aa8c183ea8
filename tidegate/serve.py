"""The serving process: one engine a base model, one hot swap a stream, one API."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from registry.states import PRODUCTION
from tidegate.route import address_of, name_of

if TYPE_CHECKING:
    from registry.states import ModelVersion
    from serving.access import Access
    from serving.delivery import Delivery
    from serving.engine import Engine
    from serving.shadow import Idle
    from serving.swap import HotSwap, Wanted
    from serving.traces import Traces
    from serving.transcript import Transcript
    from tidegate.wiring import Service


class Look:
    """The versions of a model as they were when the registry was asked last: one question serves swap and delivery."""

    versions: Sequence[ModelVersion] | None = None


def wanted_of(service: Service, stream: str, look: Look | None = None) -> Callable[[], Wanted | None]:
    """What the registry wants a stream to run: the Production version with its signed approval.

    Args:
        service: the workspace.
        stream: its name.
        look: is given every answer of the registry.
    """
    from serving.errors import Ambiguous
    from serving.swap import Wanted

    model = service.model(stream)

    def ask() -> Wanted | None:
        versions = service.store.versions(model, aliases=False)
        if look is not None:
            look.versions = versions
        found = [v for v in versions if v.stage == PRODUCTION]
        if not found:
            return None
        if len(found) > 1:
            numbers = ", ".join(str(v.version) for v in found)
            raise Ambiguous(
                f"model={model}: versions {numbers} stand in Production at once, 1 is allowed; "
                f"archive all but one in MLflow, or `tidegate rollback {stream} --to N --why ...`"
            )
        version = found[0]
        return Wanted(
            model=model,
            version=version.version,
            stage=version.stage,
            adapter_sha256=version.tag("adapter_sha256"),
            approval=version.tag("approval"),
        )

    return ask


def engine_threads(most: int) -> int:
    """Threads of one matrix product: one core is left to the API, to swaps and to whatever else runs there.

    Two threads on two cores wait for each other at every operation as soon as something else wants a core: a tiny model
    then answered less than half as many (`make bench-serving` with `--threads 2`, beside other work).
    """
    return max(1, min(most, len(os.sched_getaffinity(0)) - 1))


def swaps_of(service: Service, replica: str = "") -> list[HotSwap]:
    """A hot swap for every stream; streams on one base share its engine.

    Args:
        service: the workspace.
        replica: which of several servers behind a router; then the router acknowledges, when all run a version.
    """
    from serving.shadow import Idle
    from serving.swap import HotSwap

    engines: dict[tuple[str, str | None, str], Engine] = {}
    idle: dict[tuple[str, str | None, str], Idle] = {}
    swaps = []
    for stream, settings in service.settings.streams.items():
        where = settings.serving.vllm_url if settings.serving.engine == "vllm" else ""
        shared = (settings.base, settings.learner.system, where)
        if shared not in engines:
            engines[shared] = engine_of(service, stream, replica)
            idle[shared] = Idle(engines[shared])
        model = service.model(stream)

        def fetch(version: int, dest: Path, model: str = model) -> Path:
            return service.store.fetch_adapter(model, version, dest)

        def acknowledge(version: int, model: str = model) -> None:
            if not replica:
                service.store.set_alias(model, "live", version)

        look = Look()
        swaps.append(
            HotSwap(
                stream,
                engines[shared],
                wanted=wanted_of(service, stream, look),
                fetch=fetch,
                acknowledge=acknowledge,
                trusted=service.trusted("approvals"),
                cache=service.workspace.serving / stream,
                model=model,
                open_stream=service.is_open(stream),
                poll_seconds=settings.serving.poll_seconds,
                resident_mb=settings.serving.resident_mb,
                replica=replica,
            )
        )
        swaps[-1].delivery = delivery_of(service, swaps[-1], look, fetch, idle[shared], replica)
    return swaps


def engine_of(service: Service, stream: str, replica: str = "") -> Engine:
    """The engine a stream's settings ask for."""
    settings = service.stream(stream)
    plain = {"batch_max": settings.serving.batch_max, "queue_max": settings.serving.queue_max}
    if settings.serving.engine == "vllm":
        from serving.vllm import VllmEngine

        return VllmEngine(
            service.base(stream),
            settings.serving.vllm_url,
            service.workspace.serving / "vllm",
            owner=f"{service.workspace.root}\n{replica}",
            system=settings.learner.system,
            key=service.vllm_key,
            **plain,
        )
    from serving.inprocess import InProcessEngine

    threads = engine_threads(service.settings.service.threads)
    return InProcessEngine(service.base(stream), system=settings.learner.system, threads=threads, **plain)


def delivery_of(
    service: Service, swap: HotSwap, look: Look, fetch: Callable[[int, Path], Path], idle: Idle, replica: str
) -> Delivery:
    """What goes on beside a stream's live version."""
    from registry.promotion import Trust, proven
    from serving.candidates import Candidates
    from serving.comparing import Rules
    from serving.delivery import Delivery
    from serving.shadow import Shadow

    stream = swap.stream
    model = service.model(stream)
    open_models = [model] if service.is_open(stream) else []

    def prove(version: ModelVersion) -> str:
        return proven(model, version, Trust.from_dir(service.keys_dir, open_models))

    candidates = Candidates(
        stream,
        swap.engine,
        seen=lambda: look.versions,
        prove=prove,
        fetch=fetch,
        cache=service.workspace.serving / stream,
    )
    serving = service.stream(stream).serving

    def step_back(version: int, seq: int, why: str) -> None:
        service.store.step_back(model, version, seq, why=why, who="tidegate serve")

    return Delivery(
        swap,
        candidates,
        trusted=service.trusted("approvals"),
        cache=service.workspace.serving / stream,
        key=service.secret_bytes("answers"),
        step_back=step_back,
        model=model,
        open_stream=bool(open_models),
        rules=Rules(**serving.canary.model_dump()),
        shadow=Shadow(candidates, idle, serving.shadow) if serving.shadow else None,
        poll_seconds=serving.poll_seconds,
        replica=replica,
    )


def access_of(service: Service) -> Access:
    """Who may call the API: holders of keys, and commands of this workspace."""
    from serving.access import Access

    return Access(service.api_keys, service.local_api_key) if service.api_keys_required else Access()


def run_server(service: Service, replica: str | None = None) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight are answered first.

    Args:
        service: the workspace.
        replica: the address of service.replicas to serve at.

    Raises:
        ConfigError: there are replicas, and none or another is named.
    """
    from serving.server import serve
    from tidegate.console_routes import console_of, routes_of
    from tidegate.wiring import Service

    api = service.settings.service.api
    host, port = api.host, api.port
    if replica or service.settings.service.replicas:
        host, port = address_of(service, replica or "")
    swaps = swaps_of(service, name_of(replica) if replica else "")
    # Its own parts: the console asks on threads of its own.
    desk = console_of(Service(service.workspace, service.resolved), swaps)
    streams = service.settings.streams
    with ExitStack() as open_parts:
        serve(
            swaps,
            host=host,
            port=port,
            answer_key=service.secret_bytes("answers"),
            max_tokens={name: stream.serving.max_tokens for name, stream in streams.items()},
            timeouts_s={
                name: stream.serving.answer_seconds_max
                for name, stream in streams.items()
                if stream.serving.answer_seconds_max
            },
            transcripts=_transcripts(service, open_parts),
            traces=_traces(api.traces, open_parts),
            access=access_of(service),
            routes=routes_of(desk, [swap.stream for swap in swaps]),
            on_end=desk.end,
        )


def _transcripts(service: Service, open_parts: ExitStack) -> dict[str, Transcript]:
    """Of the streams that keep one; closed with the stack."""
    from serving.transcript import Transcript

    kept = {
        name: Transcript(service.workspace.transcript(name))
        for name, stream in service.settings.streams.items()
        if stream.serving.log_prompts
    }
    for transcript in kept.values():
        open_parts.callback(transcript.close)
    return kept


def _traces(endpoint: str, open_parts: ExitStack) -> Traces | None:
    """Spans to a collector, if there is one; closed with the stack."""
    if not endpoint:
        return None
    from serving.traces import Traces

    traces = Traces(endpoint)
    open_parts.callback(traces.close)
    return traces
