"""What is wrong with a workspace and its surroundings, and what to do about it. Looks, and changes nothing.

Each check runs on a thread of its own and for a bounded time: what hangs is a finding, and keeps no other from being
made.
"""

from __future__ import annotations

import email.utils
import importlib.metadata
import os
import shutil
import socket
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from tidegate import heartbeat, lag, runbook, status, switches
from tidegate.errors import expected_errors
from tidegate.locks import is_held
from tidegate.up import listens

if TYPE_CHECKING:
    from tidegate.wiring import Service

Grade = Literal["ok", "note", "bad"]
# Kinds of findings that are no alarms elsewhere: each has a section in docs/runbook.md.
KINDS = ("settings", "dependency", "keys", "ledger", "disk", "clock", "port", "guard", "base", "remote", "lock",
         "switches", "broker", "down", "lag", "records")  # fmt: skip
# A check that says nothing for so long has found something: whatever it asked hangs.
CHECK_SECONDS = 20.0
GIB = 1 << 30
# A round's checkpoint, a block and an adapter together are far below; SQLite and git need air.
DISK_BAD_BYTES, DISK_NOTE_BYTES = GIB, 5 * GIB
# Tokens, windows and tables go by the second; HTTP's Date is to the second, and the answer takes a moment.
CLOCK_SECONDS = 5.0
# So many blocks of the stream's own size behind: more than a burst.
LAG_BLOCKS = 10
# Nothing of git or DVC holds a lock so long.
LOCK_SECONDS = 900.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: which check made it.
        grade: ok; note: nothing is broken, somebody should know; bad: to be mended.
        said: what was found.
        todo: what to do; empty for ok.
        kind: its section in docs/runbook.md; empty for ok.
    """

    check: str
    grade: Grade
    said: str
    todo: str = ""
    kind: str = ""

    def as_json(self) -> dict[str, str]:
        """JSON form."""
        see = f"{runbook.FILE}#{self.kind}" if self.kind else ""
        return {"check": self.check, "grade": self.grade, "said": self.said, "todo": self.todo, "see": see}


Check = Callable[["Service"], Iterator[Finding]]


def examine(service: Service, seconds: float = CHECK_SECONDS) -> list[Finding]:
    """Every finding, in the order of the checks.

    Args:
        service: the workspace.
        seconds: how long a check may take.
    """
    found: list[list[Finding]] = [[] for _ in CHECKS]

    def run(at: int, name: str, check: Check) -> None:
        try:
            found[at].extend(check(service))
        except expected_errors() as error:
            found[at].append(Finding(name, "bad", str(error), "see the runbook", _KIND_OF.get(name, "records")))
        except Exception as error:  # noqa: BLE001 - a defect in one check must not hide the others' findings
            text = f"{type(error).__name__}: {error}"
            found[at].append(Finding(name, "bad", text, "see the runbook", _KIND_OF.get(name, "records")))

    threads = [
        threading.Thread(target=run, args=(at, name, check), daemon=True)
        for at, (name, check) in enumerate(CHECKS.items())
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread, name, own in zip(threads, CHECKS, found, strict=True):
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            text = f"no answer within {seconds:g} s"
            own.append(Finding(name, "bad", text, "whatever it asks hangs: see its log", _KIND_OF.get(name, "records")))
    return [finding for own in found for finding in tuple(own)]


# -- this machine ------------------------------------------------------------------------------------------------------


def _versions(_service: Service) -> Iterator[Finding]:
    """Libraries against what the package asks for. An extra that is not installed is no fault of a part without it."""
    from packaging.requirements import Requirement

    wrong = 0
    for line in importlib.metadata.requires("tidegate") or ():
        wanted = Requirement(line)
        if wanted.name == "tidegate":  # its extras of extras
            continue
        try:
            have = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            if wanted.marker is None:
                wrong += 1
                yield Finding("versions", "bad", f"{wanted.name} is not installed", "make install", "dependency")
            continue
        if not wanted.specifier.contains(have, prereleases=True):
            wrong += 1
            text = f"{wanted.name} {have}: must be {wanted.specifier}"
            yield Finding("versions", "bad", text, "make install", "dependency")
    if not wrong:
        yield Finding("versions", "ok", f"Python {sys.version.split()[0]}, every library as asked for")


def _keys(service: Service) -> Iterator[Finding]:
    from serving.access import read_keys
    from serving.errors import KeysUnreadable

    folder = service.keys_dir
    loose = [
        file
        for file in (folder, *sorted(folder.glob("*")))
        if not file.name.endswith(".pub") and not (file.is_dir() and file != folder)
        if stat.S_IMODE(file.stat().st_mode) & 0o077
    ]
    for file in loose:
        mode = stat.S_IMODE(file.stat().st_mode)
        todo = f"chmod {'700' if file.is_dir() else '600'} {file}"
        yield Finding("keys", "bad", f"{file}: mode {mode:04o} lets others in", todo, "keys")
    purposes = ("receipts", "verdicts", "approvals")
    for name in purposes:
        if not any((folder / f"{name}{half}").exists() for half in (".pem", ".pub")):
            text = f"keys/{name}.pem: is missing, and so is its public half"
            yield Finding("keys", "bad", text, "restore it from the backup", "keys")
    readable = service.api_keys not in loose
    try:
        if readable:
            read_keys(service.api_keys)
    except KeysUnreadable as damaged:
        readable = False
        yield Finding("keys", "bad", f"{damaged}: the API lets nobody in", "restore it from the backup", "keys")
    if not loose and readable:
        yield Finding("keys", "ok", f"{folder}: nobody else may read it")


def _disk(service: Service) -> Iterator[Finding]:
    root = service.workspace.root
    free = shutil.disk_usage(root).free
    grade: Grade = "bad" if free < DISK_BAD_BYTES else "note" if free < DISK_NOTE_BYTES else "ok"
    todo = "" if grade == "ok" else "tidegate gc; tidegate prune STREAM"
    yield Finding("disk", grade, f"{free / GIB:.1f} GiB free at {root}", todo, "" if grade == "ok" else "disk")


def _clock(service: Service) -> Iterator[Finding]:
    """Against MLflow's clock, and against the newest decision, which nobody can have signed in the future."""
    now = datetime.now(UTC)
    newest = max((row["when"] for row in service.approvals().history()), default="")
    if newest and (datetime.fromisoformat(newest) - now).total_seconds() > CLOCK_SECONDS:
        yield Finding("clock", "bad", f"a decision was signed at {newest}, it is {now:%Y-%m-%dT%H:%M:%SZ}",
                      "set the clock (NTP)", "clock")  # fmt: skip
    try:
        with urllib.request.urlopen(f"{service.mlflow_uri}/health", timeout=5) as reply:  # noqa: S310 - http, ours
            said = email.utils.parsedate_to_datetime(reply.headers["Date"])
    except (OSError, ValueError, TypeError, urllib.error.URLError):
        return
    apart = abs((datetime.now(UTC) - said).total_seconds())
    if apart > CLOCK_SECONDS:
        yield Finding("clock", "bad", f"{apart:.0f} s apart from MLflow's clock", "set the clock (NTP)", "clock")
    else:
        yield Finding("clock", "ok", "agrees with MLflow's")


def _ports(service: Service) -> Iterator[Finding]:
    """Two parts on one port, and strangers where a part of ours should be."""
    settings = service.settings.service
    wanted: dict[int, list[str]] = {}
    for name, port, ours in (
        ("service.broker.port", settings.broker.port, settings.broker.bootstrap == "embedded"),
        ("service.mlflow.port", settings.mlflow.port, settings.mlflow.uri == "embedded"),
        ("service.api.port", settings.api.port, True),
        ("service.learn_metrics_port", settings.learn_metrics_port, True),
        *((f"streams.{name}.ingest.metrics_port", s.ingest.metrics_port, True)
          for name, s in service.settings.streams.items()),
    ):  # fmt: skip
        if ours and port:
            wanted.setdefault(port, []).append(name)
    twice = {port: names for port, names in wanted.items() if len(names) > 1}
    for port, names in twice.items():
        yield Finding("ports", "bad", f"{' and '.join(names)}: both {port}", "give each its own", "settings")
    address = urlsplit(service.api_uri).netloc
    if listens(address) and status.serving_state(service) is None:
        text = f"something listens at {address}, and it is not this workspace's server"
        yield Finding("ports", "bad", text, "stop it, or change service.api.port", "port")
    elif not twice:
        yield Finding("ports", "ok", f"{len(wanted)} in the settings, none twice")


def _locks(service: Service) -> Iterator[Finding]:
    """What a crash of git left, and rounds that hold their lock and say nothing."""
    data = service.workspace.data
    files = [*data.glob(".git/*.lock"), *data.glob(".git/refs/**/*.lock")]
    old = [file for file in files if _age_s(file) > LOCK_SECONDS and not _is_flocked(file)]
    for file in old:
        text = f"{file}: {_age_s(file) / 60:.0f} minutes old"
        yield Finding("locks", "bad", text, "if no tidegate or git process runs, remove it", "lock")
    silent = 0
    for stream, settings in service.settings.streams.items():
        beat = heartbeat.beat_file(service.workspace, stream)
        if not is_held(heartbeat.lock_file(service.workspace, stream)) or not beat.exists():
            continue
        if _age_s(beat) > settings.learner.stuck_seconds:
            silent += 1
            text = f"{stream}: its round has said nothing for {_age_s(beat) / 60:.0f} minutes"
            todo = "`tidegate learn` kills it and tries again; where that does not run, end its process"
            yield Finding("locks", "bad", text, todo, "stuck")
    if not old and not silent:
        yield Finding("locks", "ok", "none is left over")


def _age_s(file: Path) -> float:
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0


def _is_flocked(file: Path) -> bool:
    try:
        return is_held(file)
    except OSError:
        return True


# -- what it talks to --------------------------------------------------------------------------------------------------


def _broker(service: Service) -> Iterator[Finding]:
    from ingest.broker import check

    check(service.kafka())
    yield Finding("broker", "ok", f"{service.bootstrap} answers and lets us in")
    for stream, settings in service.settings.streams.items():
        found = lag.look(service, stream)
        if found is None:
            text = f"{stream}: topic {settings.topic} does not exist yet"
            yield Finding("broker", "note", text, "the first producer makes it", "lag")
        elif found.offsets > LAG_BLOCKS * settings.ingest.block_offsets:
            text = f"{stream}: {found.offsets:,} offsets are in no block, more than {LAG_BLOCKS} blocks"
            yield Finding("broker", "bad", text, f"is `tidegate ingest {stream}` running?", "lag")
        else:
            yield Finding("broker", "ok", f"{stream}: {found.offsets:,} offsets are in no block yet")


def _mlflow(service: Service) -> Iterator[Finding]:
    if service.store.guarded():
        yield Finding("mlflow", "ok", f"{service.mlflow_uri} answers, with the guard")
    else:
        text = f"{service.mlflow_uri} answers without the guard"
        yield Finding("mlflow", "note", text, "start it by `tidegate mlflow`, or decide by `tidegate approve`", "guard")


def _server(service: Service) -> Iterator[Finding]:
    state = status.serving_state(service)
    if state is None:
        text = f"nothing answers at {service.api_uri}"
        yield Finding("server", "bad", text, "tidegate up, or tidegate serve", "down")
        return
    for name, stream in state["streams"].items():
        yield Finding("server", "ok", f"{name} answers with {stream['version']}")


def _remote(service: Service) -> Iterator[Finding]:
    """A folder is looked at; of another kind, only whether its host can be reached."""
    remote = service.repository().remote
    parts = urlsplit(remote)
    if parts.scheme in {"", "file"}:
        folder = service.workspace.data / (parts.path or remote)
        there = folder.is_dir() and os.access(folder, os.W_OK)
        # DVC makes it with the first push.
        there = there or (not folder.exists() and os.access(folder.parent, os.W_OK))
        if there:
            yield Finding("remote", "ok", f"{folder} can be written")
        else:
            yield Finding("remote", "bad", f"{folder}: cannot be written", "mount it, or mend its rights", "remote")
        return
    if parts.scheme in {"http", "https", "ssh"} and parts.hostname:
        port = parts.port or {"http": 80, "https": 443, "ssh": 22}[parts.scheme]
        try:
            socket.create_connection((parts.hostname, port), timeout=5).close()
        except OSError as error:
            text = f"{parts.hostname}:{port}: {error.strerror or error}"
            yield Finding("remote", "bad", text, "blocks are copied when it is back", "remote")
            return
    yield Finding("remote", "ok", f"{parts.scheme}://{parts.hostname or ''}: whether it takes blocks, its pushes say")


# -- what it keeps -----------------------------------------------------------------------------------------------------


def _chains(service: Service) -> Iterator[Finding]:
    """Both chains whole, and the ledger as new as every receipt."""
    from tidegate.cycle import require_whole_ledger

    rows = service.ledger.verify_chain()
    receipts = require_whole_ledger(service)
    head = service.ledger.head()[:16]
    yield Finding("chains", "ok", f"ledger: {rows} rows, head {head}, as new as its {receipts} receipts")
    decisions = service.approvals().verify(service.trusted("approvals"))
    yield Finding("chains", "ok", f"history of decisions: {decisions} signed rows")


def _bases(service: Service) -> Iterator[Finding]:
    from learner.base import is_prepared

    for spec in sorted({stream.base for stream in service.settings.streams.values()}):
        if is_prepared(spec, service.workspace.bases):
            yield Finding("bases", "ok", f"{spec} is prepared")
        else:
            yield Finding("bases", "note", f"{spec} is not prepared", "the first start takes its time", "base")


def _switched(service: Service) -> Iterator[Finding]:
    for stream in service.settings.streams:
        if told := switches.paused(service.workspace, stream):
            text = f"{stream} is paused {switches.words(told)}"
            yield Finding("switches", "note", text, f"tidegate resume {stream} --why ...", "switches")
        kill = switches.kill_switch(service, stream)
        if kill.on:
            yield Finding("switches", "note", kill.sentence(), f"tidegate unkill {stream} --why ...", "killed")
    found = switches.entries(service.workspace)
    done = {entry["of"] for entry in found if entry["what"] == "signed"}
    if unsigned := [entry for entry in found if entry.get("signed") is False and entry["id"] not in done]:
        text = f"{len(unsigned)} of the kill switch are not in the signed history yet"
        yield Finding("switches", "note", text, "`tidegate learn` signs them where the key is", "switches")


def _alarms(service: Service) -> Iterator[Finding]:
    """What `tidegate status` says, but for what other checks say of the same."""
    standing = status.look(service)["alarms"]
    for alarm in standing:
        text, kind = runbook.parted(alarm)
        if kind not in {"down", "killed", "registry"}:
            yield Finding("alarms", "bad", text, "see the runbook", kind)
    if not standing:
        yield Finding("alarms", "ok", "none stands")


# By the order of a reader's questions: this machine, what it talks to, what it keeps, what somebody meant.
CHECKS: dict[str, Check] = {
    "versions": _versions,
    "keys": _keys,
    "disk": _disk,
    "clock": _clock,
    "ports": _ports,
    "locks": _locks,
    "broker": _broker,
    "mlflow": _mlflow,
    "server": _server,
    "remote": _remote,
    "chains": _chains,
    "bases": _bases,
    "switches": _switched,
    "alarms": _alarms,
}
# Where a check that breaks off leads to.
_KIND_OF = {"versions": "dependency", "keys": "keys", "disk": "disk", "clock": "ledger", "ports": "port",
            "locks": "lock", "broker": "broker", "mlflow": "down", "server": "down", "remote": "remote",
            "chains": "ledger", "bases": "base", "switches": "switches"}  # fmt: skip


def report(findings: list[Finding]) -> dict[str, Any]:
    """JSON form: `well` is whether nothing is bad."""
    return {"well": all(f.grade != "bad" for f in findings), "findings": [f.as_json() for f in findings]}


def as_text(findings: list[Finding]) -> str:
    """For a terminal: what is wrong last, where a reader looks first."""
    marks = {"ok": "ok  ", "note": "NOTE", "bad": "BAD "}
    lines = []
    for finding in sorted(findings, key=lambda f: ("ok", "note", "bad").index(f.grade)):
        lines.append(f"{marks[finding.grade]}  {finding.check:<9} {finding.said}")
        if finding.todo:
            see = f" ({runbook.FILE}#{finding.kind})" if finding.kind else ""
            lines.append(f"{'':17}-> {finding.todo}{see}")
    return "\n".join(lines)
