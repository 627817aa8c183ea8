"""What people see of decisions: a panel on MLflow's page of a version, and the history of a model as a page of its own.

`page.js` beside this file stands in the head of MLflow's page, so that it runs before MLflow's own scripts and needs no
request of its own, whatever prefix MLflow is served under. It draws what `standing` tells. The history's page needs no
script at all.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from evaluation.markup import Cell, document, items, paragraph, section, table
from privacy.errors import PrivacyError
from registry.approvals import Approval, Approvals, Verifier
from registry.approvals import standing as standing_of
from registry.canary import CANARY
from registry.errors import ApprovalsTampered
from registry.promotion import pick
from registry.states import PRODUCTION, ModelVersion, State

_SAYS = {
    State.FAILED: "It failed its gates",
    State.UNDECIDED: "Too little is known of it",
    State.REJECTED: "It was rejected",
    State.SUPERSEDED: "A newer candidate took its place",
    State.STALE: "What it was trained from is not live any more",
}


@dataclass(frozen=True)
class Seal:
    """Whether the history is what was once written.

    Attributes:
        holds: every row is signed by a trusted key and names the row before it.
        sentence: the same for a person.
    """

    holds: bool
    sentence: str


@dataclass(frozen=True)
class Event:
    """One line of the history.

    Attributes:
        what: what was done, in words.
        from_stage, to_stage: empty for what moved nothing.
        sentence: why it was refused.
    """

    when: str
    who: str
    version: int
    what: str
    why: str
    from_stage: str = ""
    to_stage: str = ""
    sentence: str = ""

    def as_json(self) -> dict[str, Any]:
        """As the panel's script takes it."""
        told = {"when": self.when, "who": self.who, "version": self.version, "what": self.what, "why": self.why}
        return told | {"from": self.from_stage, "to": self.to_stage, "sentence": self.sentence}


@cache
def _script() -> str:
    return files("registry").joinpath("page.js").read_text(encoding="utf-8")


def with_script(html: str) -> str:
    """MLflow's page with the script in its head; a page without a head stays what it is."""
    return html.replace("<head>", f"<head><script>(() => {{\n{_script()}}})();</script>", 1)


def seal_of(approvals: Approvals, keys: Verifier, carried: Iterable[Approval] = ()) -> Seal:
    """Check the whole chain, of every model: a gap would show in none of them alone.

    Args:
        approvals: the history.
        keys: whose signatures count.
        carried: copies of decisions that versions carry. Rows cut off the chain's end show by them alone; one that is
            not signed says nothing, since whoever may tag a version can write it.
    """
    try:
        count = approvals.verify(keys)
    except ApprovalsTampered as error:
        return Seal(holds=False, sentence=f"The history was changed after it was written: {error}")
    newest = max((int(one["seq"]) for one in carried if _is_signed(one, keys)), default=0)
    if newest > count:
        return Seal(
            holds=False,
            sentence=f"The history ends with decision {count}, but a version carries decision {newest}: "
            "its end was cut off; restore it from a backup.",
        )
    if not count:
        return Seal(holds=True, sentence="No decision has been made yet.")
    rows = "The one decision in this registry is" if count == 1 else f"All {count} decisions in this registry are"
    return Seal(holds=True, sentence=f"{rows} signed, and none was changed, dropped or moved.")


def carried_by(versions: Iterable[ModelVersion]) -> list[Approval]:
    """The decisions that versions carry as tags, as far as they can be read."""
    found = []
    for version in versions:
        for name in ("approval", CANARY):
            try:
                told = json.loads(version.tag(name) or "null")
            except ValueError:
                continue
            if isinstance(told, dict):
                found.append(told)
    return found


def events_of(history: Sequence[Approval], refusals: Sequence[Mapping[str, Any]]) -> list[Event]:
    """What happened to a model, newest first: decisions, and promotions that were refused.

    Args:
        history: decisions, oldest first.
        refusals: what was refused, oldest first.
    """
    decided = [
        Event(
            when=row["when"],
            who=row["who"],
            version=row["version"],
            what=_what(row),
            why=row["why"],
            from_stage=row["from"] if row["kind"] != CANARY else "",
            to_stage=row["to"] if row["kind"] != CANARY else "",
        )
        for row in history
    ]
    refused = [
        Event(
            when=row["when"],
            who=row["who"],
            version=row["version"],
            what="refused",
            why=row["why"],
            sentence=row["sentence"],
        )
        for row in refusals
    ]
    return sorted([*decided, *refused], key=lambda event: event.when)[::-1]


def standing(
    model: str,
    number: int,
    *,
    versions: Sequence[ModelVersion],
    approvals: Approvals,
    seal: Seal,
    objection: Callable[[int], str],
    hindrance: str = "",
) -> dict[str, Any]:
    """Where a version stands now, for the panel on its page.

    Args:
        model: registered model.
        number: its version.
        versions: all of the model.
        approvals: the history.
        seal: whether it holds.
        objection: why a version could not go to Production now; empty when it could.
        hindrance: why it could not by whoever asks; empty when it could.

    Raises:
        UnknownVersion: the model has no such version.
    """
    chosen = pick(versions, model, number)
    history = approvals.history(model)
    now = standing_of(history)
    live, canary = now.live, now.canary
    facts = [["Trained from", _parent(chosen, versions, live)]]
    if chosen.tag("registered_by"):
        facts.append(["Registered by", f"{chosen.tag('registered_by')} at {_time(chosen.created_at)} UTC"])
    if canary is not None and canary["version"] == number:
        facts.append(["On trial", f"{_what(canary)} by {canary['who']} at {_time(canary['when'])} UTC"])
    return {
        "model": model,
        "version": number,
        "says": _says(chosen, live, "" if _answers(chosen, live) else objection(number), hindrance),
        "facts": facts,
        "events": [event.as_json() for event in events_of(history, approvals.refusals(model))],
        "seal": {"holds": seal.holds, "sentence": seal.sentence},
    }


def history_page(model: str, events: Sequence[Event], seal: Seal) -> str:
    """Every decision on a model, as a web page without a script."""
    mark = Markup('<strong class="{}"><span aria-hidden="true">{}</span> {}</strong>').format(
        "good" if seal.holds else "bad", "✓" if seal.holds else "✗", seal.sentence
    )
    about = (
        "A decision is signed when it is made and names the one before it, over all models of this registry.",
        "What was refused changed nothing: it is kept for reading, unsigned, the newest thousand.",
    )
    rows = [
        (_time(event.when), event.who, str(event.version), _did(event), event.why or "no reason given")
        for event in events
    ]
    head = ("when (UTC)", "who", "version", "what", "why")
    told = table(f"Who decided what on {model}, newest first.", head, rows) if rows else paragraph("Nothing yet.")
    top = Markup('<header class="{}"><p class="of">{}</p><h1>Who decided what</h1><p>{}</p></header>').format(
        "passed" if seal.holds else "failed", model, mark
    )
    return document(
        f"{model}: who decided what", (top, section("History", told), section("How to read it", items(about)))
    )


def _is_signed(row: Approval, keys: Verifier) -> bool:
    try:
        keys.verify(row)
    except (PrivacyError, ValueError, KeyError, TypeError):
        return False
    return isinstance(row.get("seq"), int)


def _did(event: Event) -> Cell:
    if event.sentence:
        return Markup('<strong class="bad">{}</strong>: {}').format(event.what, event.sentence)
    moved = Markup("<br>{} → {}").format(event.from_stage, event.to_stage) if event.from_stage else ""
    return Markup("<strong>{}</strong>{}").format(event.what, moved)


_WORDS = {
    "promote": "approved",
    "emergency": "rolled back in an emergency",
    "kill": "kill switch on: the bare base answers",
    "unkill": "kill switch off",
}


def _what(row: Approval) -> str:
    to_production = row["to"] == PRODUCTION
    if row["kind"] == CANARY:
        if row["canary"]["share"]:
            return f"given {100 * row['canary']['share']:.3g}% of the requests"
        return "trial ended by the server" if row["canary"].get("automatic") else "trial ended"
    if row["kind"] in _WORDS:
        return _WORDS[row["kind"]]
    if row["kind"] == "rollback":
        return "rolled back to" if to_production else "taken out"
    return "rejected" if row["from"] != PRODUCTION else "never carried out"


def _answers(chosen: ModelVersion, live: Approval | None) -> bool:
    return live is not None and live["version"] == chosen.version


def _says(chosen: ModelVersion, live: Approval | None, objection: str, hindrance: str) -> dict[str, str]:
    """One line that a person who opens the page reads first, and what they can do."""
    if live is not None and _answers(chosen, live):
        why = f": “{live['why']}”" if live["why"] else ", without a reason"
        told = f"Approved by {live['who']} at {_time(live['when'])} UTC{why}."
        return {"kind": "live", "head": "It is live: it answers now", "sentence": told}
    if objection:
        known = _SAYS.get(chosen.state) if chosen.state else None
        return {"kind": "no", "head": known or "It cannot go to Production", "sentence": f"{objection}."}
    head = "It was live before" if chosen.state is State.RETIRED else "It passed its gates and waits for a decision"
    if hindrance:
        return {"kind": "waits", "head": head, "sentence": f"Not yours to approve: {hindrance}."}
    if chosen.state is State.RETIRED:
        told = "Stage, Transition to Production goes back to it at once; say why in the comment."
        return {"kind": "waits", "head": head, "sentence": told}
    told = (
        "To approve it: Stage, Transition to Production. To reject it, for good: Transition to Archived. "
        "Say why in the comment: it is kept with your name."
    )
    return {"kind": "waits", "head": head, "sentence": told}


def _parent(chosen: ModelVersion, versions: Sequence[ModelVersion], live: Approval | None) -> str:
    """What it was trained from, and whether that still answers."""
    now = f"version {live['version']} is live now" if live else "no version is live now"
    if not chosen.parent_sha256:
        return "the base model itself" + (f"; {now}" if live and not _answers(chosen, live) else "")
    found = next((v for v in versions if v.adapter_sha256 == chosen.parent_sha256), None)
    name = (
        f"version {found.version}" if found else f"an adapter this registry does not know ({chosen.parent_sha256[:12]})"
    )
    if live is not None and _answers(chosen, live):
        return name
    if live is not None and live["adapter_sha256"] == chosen.parent_sha256:
        return f"{name}, which is still live"
    return f"{name}, which is not live: {now}"


def _time(when: str) -> str:
    return when.replace("T", " ").removesuffix("Z")
