"""From a version, or an answer, back to the offsets of the topic it learnt from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from registry.promotion import pick
from registry.states import ModelVersion
from tidegate import ancestry, pruning
from tidegate.errors import UnknownName

if TYPE_CHECKING:
    from tidegate.wiring import Service


def trace(service: Service, what: str, stream: str | None) -> dict[str, Any]:
    """Resolve a version number or an answer id.

    Raises:
        UnknownName: no such version, or several streams and none named.
        AnswerIdError: the id was not made by this service.
    """
    if what.isdigit():
        name, number, source = _only_stream(service, stream), int(what), f"version {what}"
    else:
        from serving.answer_id import resolve

        name, number = resolve(what, service.secret_bytes("answers"))
        source = f"answer {what}"
    if number == 0:
        return {"source": source, "stream": name, "version": "base", "ancestry": []}
    model = service.model(name)
    versions = service.store.versions(model)
    version = pick(versions, model, number)
    chain = ancestry.ancestors(versions, version)
    return {
        "source": source,
        "stream": name,
        "version": number,
        "adapter_sha256": version.tag("adapter_sha256"),
        "base": f"{version.tag('base_name')} ({version.tag('base_licence')})",
        "ancestry": [_step(service, name, chain[i:]) for i in range(len(chain))],
    }


def _only_stream(service: Service, stream: str | None) -> str:
    names = list(service.settings.streams)
    if stream is None and len(names) > 1:
        raise UnknownName(f"--stream: {len(names)} streams have versions; name one of: {', '.join(names)}")
    name = stream or names[0]
    service.stream(name)
    return name


def _step(service: Service, stream: str, chain: list[ModelVersion]) -> dict[str, Any]:
    version = chain[0]
    known = frozenset().union(*(ancestry.block_ids(v) for v in chain[1:]))
    plan = json.loads(version.tag("plan") or "{}")
    revision = version.tag("data_revision")
    manifests = {m.block_id: m for m in service.repository().manifests(stream, revision=revision)}
    topic = service.stream(stream).topic
    blocks = []
    for block in plan.get("blocks", ()):
        manifest = manifests[block["id"]]
        offsets = ", ".join(f"{topic}/{o.partition}: {o.start}-{o.end - 1}" for o in manifest.offsets)
        use = "replay" if block["id"] in known else "new"
        blocks.append({"id": block["id"], "use": use, "q": block["q"], "offsets": offsets})
    return {
        "version": version.version,
        "stage": version.stage,
        "state": version.tag("state"),
        "pruned": pruning.pruned_at(version),
        "round_id": version.tag("round_id"),
        "data_revision": revision,
        "plan_hash": version.tag("plan_hash"),
        "noise_source": plan.get("noise_source", ""),
        "blocks": blocks,
    }
