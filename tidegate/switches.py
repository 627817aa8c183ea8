"""What an operator switches by hand: pause and resume of a stream's spending, the kill switch and its end.

Each is a file in the workspace, so that it is durable and needs nothing else to run. Who did it and why goes into
`switches.log`, a line of JSON each; the kill switch also into the signed history of decisions, at once where this
workspace can sign, else as soon as it can.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import structlog

from serving.killswitch import KillSwitch
from tidegate.access import append_lines, now
from tidegate.errors import TidegateError
from tidegate.locks import Held, alone
from tidegate.workspace import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from tidegate.wiring import Service
    from tidegate.workspace import Workspace

LOG = "switches.log"
# How often `tidegate learn` tries to sign what could not be signed when it happened.
SETTLE_SECONDS = 15.0

log = structlog.get_logger()


def paused_file(workspace: Workspace, stream: str) -> Path:
    """There while no round of the stream begins."""
    return workspace.root / "switches" / f"paused-{stream}.json"


def paused(workspace: Workspace, stream: str) -> dict[str, str] | None:
    """Who paused a stream, why and when; None: it is not. A file that cannot be read is a pause all the same."""
    file = paused_file(workspace, stream)
    if not file.exists():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return {name: str(told[name]) for name in ("who", "why", "at")}
    except (OSError, ValueError, KeyError, TypeError):
        return {"who": "unknown", "why": f"{file.name} cannot be read", "at": "unknown"}


def words(told: Mapping[str, str]) -> str:
    """A pause in words."""
    return f"since {told['at']} by {told['who']}: {told['why']}"


def pause(service: Service, stream: str, *, who: str, why: str) -> str:
    """No round of the stream begins from now on; one that runs goes on to its end. Returns a sentence.

    Raises:
        WorkspaceError: it cannot be recorded; then nothing has changed.
    """
    service.stream(stream)
    at = _note(service, "pause", stream, who=who, why=why)
    write_json(paused_file(service.workspace, stream), {"who": who, "why": why, "at": at})
    return f"{stream} is paused: no round begins until `tidegate resume {stream} --why ...`"


def resume(service: Service, stream: str, *, who: str, why: str) -> str:
    """Rounds of the stream begin again when they are due. Returns a sentence."""
    service.stream(stream)
    file = paused_file(service.workspace, stream)
    if not file.exists():
        return f"{stream} was not paused"
    _note(service, "resume", stream, who=who, why=why)
    file.unlink(missing_ok=True)
    return f"{stream} goes on: its next round begins when it is due"


def kill_switch(service: Service, stream: str) -> KillSwitch:
    """The kill switch of a stream."""
    return KillSwitch(service.workspace.serving / stream, stream)


def kill(service: Service, stream: str, *, who: str, why: str) -> str:
    """The bare base answers from the next request on. Returns a sentence.

    Raises:
        SwapError: the disk does not take it.
        WorkspaceError: it cannot be recorded; the switch is on all the same.
    """
    service.stream(stream)
    switch = kill_switch(service, stream)
    if switch.on:
        return f"the kill switch of {stream} is on already ({words({'at': '?', 'who': '?', 'why': '?', **switch.why})})"
    # The switch first: recording must not keep the base from answering.
    switch.kill(who=who, why=why, at=now())
    _note(service, "kill", stream, who=who, why=why, signed=False)
    signed = settle(service)
    return f"the bare base answers for {stream} from now on; {_recorded(signed)}"


def unkill(service: Service, stream: str, *, who: str, why: str) -> str:
    """What was approved last answers again. Returns a sentence."""
    service.stream(stream)
    switch = kill_switch(service, stream)
    if not switch.on:
        return f"the kill switch of {stream} was off"
    _note(service, "unkill", stream, who=who, why=why, signed=False)
    switch.end()
    signed = settle(service)
    return f"what was approved last answers for {stream} again; {_recorded(signed)}"


def _recorded(unsigned: int) -> str:
    if not unsigned:
        return "recorded in the signed history"
    return f"recorded in {LOG}, and in the signed history as soon as it can be signed"


def entries(workspace: Workspace) -> list[dict[str, Any]]:
    """Everything that was switched, oldest first; lines that are not whole are left out."""
    try:
        text = (workspace.root / LOG).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"when", "who", "what", "stream", "why"} <= entry.keys():
            found.append(entry)
    return found


def settle(service: Service) -> int:
    """Sign what could not be signed when it happened; returns how many entries are still without a signature."""
    from privacy.errors import PrivacyError
    from registry.errors import RegistryError

    left = 0
    with _settling(service.workspace) as mine:
        found = entries(service.workspace) if mine else []
        done = {entry["of"] for entry in found if entry["what"] == "signed"}
        for entry in found:
            if entry.get("signed") is not False or entry["id"] in done:
                continue
            try:
                row = service.approvals(signing=True).append(
                    model=service.model(entry["stream"]),
                    version=0,
                    adapter_sha256="",
                    from_stage="",
                    to_stage="",
                    who=entry["who"],
                    why=entry["why"],
                    kind=entry["what"],
                    when=entry["when"],
                )
            except (RegistryError, PrivacyError, TidegateError) as error:
                log.warning("not signed yet", stream=entry["stream"], what=entry["what"], why=str(error))
                left += 1
                continue
            told = {"what": "signed", "of": entry["id"], "seq": row["seq"], "stream": entry["stream"]}
            append_lines(service.workspace.root / LOG, [{"when": now(), "who": entry["who"], "why": "", **told}])
    return left if mine else 1


@contextmanager
def _settling(workspace: Workspace) -> Iterator[bool]:
    """Whether this process is the one that signs now."""
    try:
        with alone(workspace.run / "switches.lock"):
            yield True
    except Held:
        yield False


def _note(service: Service, what: str, stream: str, *, who: str, why: str, signed: bool | None = None) -> str:
    from secrets import token_hex

    at = now()
    mark = {} if signed is None else {"signed": signed, "id": token_hex(8)}
    line = {"when": at, "who": who, "what": what, "stream": stream, "why": why, **mark}
    append_lines(service.workspace.root / LOG, [line])
    log.info(what, stream=stream, who=who, why=why)
    return at
