"""The console as HTML: one page, and its parts, each of which is sent anew when it has changed.

Every value is escaped where it is put in (`evaluation/markup.py`); the only script and the only style sheet are files
of this server's own, and the policy of the page allows nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from evaluation.markup import STYLE, Cell, items, more, pairs, paragraph, table
from tidegate.budget import SHARE_ALARM
from tidegate.runbook import parted

if TYPE_CHECKING:
    from tidegate.console import Snapshot, StreamView, Told

# `frame-ancestors` and the like can only stand in a header, so all of it does.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_NOTHING = Markup("")
_SPACE = Markup(" ")
_CLASSES = {"passed": "good", "failed": "bad", "undecided": "unsure"}
_SEPARATOR = Markup("\n")


def sections(snapshot: Snapshot) -> dict[str, Markup]:
    """The parts of the page by the id of their element, in the order in which they stand."""
    parts = {"alarms": _alarms(snapshot)}
    for view in snapshot.streams:
        parts[f"stream-{view.name}"] = _stream(snapshot, view)
    return parts


def document(parts: Mapping[str, Markup], streams: Sequence[str], *, compare: bool = True, out: bool = False) -> str:
    """The whole page.

    Args:
        parts: its sections, by id.
        streams: whom the prompt box can ask.
        compare: whether the reader may ask candidates too.
        out: whether there is somebody to log out.
    """
    shown = _SEPARATOR.join((*parts.values(), _ask(streams, compare=compare)))
    return str(
        Markup(
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<title>Tidegate</title>\n'
            '<link rel="icon" href="/tidegate/console.svg">\n<link rel="stylesheet" href="/tidegate/console.css">\n'
            '<script src="/tidegate/console.js" defer></script>\n'
            '<noscript><meta http-equiv="refresh" content="10"></noscript>\n</head>\n<body>\n'
            '<a class="skip" href="#ask">To the prompt box</a>\n'
            '<header class="top"><h1>Tidegate</h1><p id="connection" class="soft" role="status">'
            "as of the moment it was loaded</p>{out}</header>\n"
            "<main>\n{shown}\n</main>\n"
            '<p id="said" class="unseen" role="status" aria-live="polite"></p>\n</body>\n</html>\n'
        ).format(shown=shown, out=_LOGOUT if out else _NOTHING)
    )


def login_page(message: str = "") -> str:
    """Asks for an API key."""
    return str(
        Markup(
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<title>Tidegate: log in</title>\n'
            '<link rel="icon" href="/tidegate/console.svg">\n<link rel="stylesheet" href="/tidegate/console.css">\n'
            '</head>\n<body>\n<main class="login"><h1>Tidegate</h1>\n{message}'
            '<form method="post" action="/tidegate/login"><label for="key">API key</label>'
            '<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>'
            "<button>Log in</button></form>\n</main>\n</body>\n</html>\n"
        ).format(message=Markup('<p class="bad" role="alert">{}</p>').format(message) if message else _NOTHING)
    )


def runbook_page(kind: str, text: str) -> str:
    """One section of the runbook, as it is written."""
    return str(
        Markup(
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<meta name="color-scheme" content="light dark">\n<title>Runbook: {kind}</title>\n'
            '<link rel="icon" href="/tidegate/console.svg">\n<link rel="stylesheet" href="/tidegate/console.css">\n'
            '</head>\n<body>\n<main><p><a href="/">Back to the console</a></p><h1>Runbook: {kind}</h1>'
            '<pre class="runbook">{text}</pre></main>\n</body>\n</html>\n'
        ).format(kind=kind, text=text)
    )


_LOGOUT = Markup('<form method="post" action="/tidegate/logout"><button>Log out</button></form>')


def _alarms(snapshot: Snapshot) -> Markup:
    if not snapshot.alarms:
        inside = paragraph(Markup('<span class="good">No alarm stands.</span>'))
    else:
        inside = Markup('<ul class="alarms">{}</ul>').format(
            _NOTHING.join(Markup("<li>{}</li>").format(_alarm(text)) for text in snapshot.alarms)
        )
    return Markup('<section id="alarms" data-count="{}" aria-label="Alarms"><h2>Alarms</h2>{}</section>').format(
        len(snapshot.alarms), inside
    )


def _alarm(text: str) -> Markup:
    said, kind = parted(text)
    link = Markup(' <a href="/tidegate/runbook/{0}">what to do: {0}</a>').format(kind) if kind else _NOTHING
    return Markup('<span class="bad">{}</span>{}').format(said, link)


def _stream(snapshot: Snapshot, view: StreamView) -> Markup:
    serving = view.serving
    return Markup(
        '<section id="stream-{name}" class="stream" data-live="{live}" aria-label="Stream {name}">'
        "<h2>{name}</h2>\n{parts}</section>"
    ).format(
        name=view.name,
        live=serving["version"],
        parts=_SEPARATOR.join((_facts(snapshot, view), _waiting(snapshot, view), _rounds(view), _history(view))),
    )


def _facts(snapshot: Snapshot, view: StreamView) -> Markup:
    serving, registry = view.serving, view.registry.value
    live: Cell = Markup('<strong class="live">{}</strong>').format(serving["version"])
    if serving["number"]:
        live = live + _SPACE + _link(snapshot, view, serving["number"])
    if serving["guarantee"]:
        live += Markup(' <span class="unsure">without privacy</span>')
    if serving["loading"]:
        live += Markup(" (loading {})").format(serving["loading"])
    rows: list[tuple[str, Cell]] = [("answers with", live)]
    wanted = ", ".join(str(number) for number in registry.wanted) if registry else ""
    if registry and wanted != str(serving["number"] or ""):
        rows.append(("the registry wants", wanted or "the bare base"))
    if canary := serving.get("canary"):
        failed = f"{canary['failed']} of {canary['requests']} failed"
        live_failed = f"{canary['live_failed']} of {canary['live_requests']} of live"
        rows.append(("canary", f"{canary['version']} has {100 * canary['share']:.4g}%: {failed}, {live_failed}"))
    if serving["killed"]:
        rows.append(("kill switch", Markup('<strong class="bad">on: the bare base answers</strong>')))
    flight = sum(serving["in_flight"].values())
    rows += [
        ("base", view.base),
        ("answers", f"{flight} in flight, {serving['waiting']} waiting"),
        ("lag", _told(view.lag, _lag)),
        ("budget", _told(view.budget, _budget)),
        *_schedule(view),
    ]
    return pairs(f"What runs in {view.name}", rows)


def _schedule(view: StreamView) -> Iterable[tuple[str, Cell]]:
    now = (view.rounds.value or {}).get("now", {})
    names = {
        "runs": "round now",
        "waiting_since": "round waits since",
        "next_due": "next round",
        "last_outcome": "last round",
        "held": "held",
        "paused": "paused",
    }
    return [(shown, str(now[name])) for name, shown in names.items() if now.get(name)]


def _lag(found: Any) -> Cell:
    parts = f", in {len(found.behind)} partitions" if len(found.behind) > 1 else ""
    return f"{found.offsets:,} offsets on the topic are in no sealed block yet{parts}"


def _budget(found: Any) -> Cell:
    used = Markup(
        '<meter min="0" max="1" high="{high}" optimum="0" value="{share:.4f}" '
        'aria-label="share of the budget used"></meter> '
    ).format(high=SHARE_ALARM, share=found.share_used_median)
    words = (
        f"{found.share_used_median:.1%} of the median block's filter is used, {found.share_used_max:.1%} of the most"
    )
    left = "" if found.rounds_left is None else f"; {found.rounds_left} more rounds at this pace"
    return used + Markup('{}{}<br><span class="soft">{}</span>').format(words, left, found.promise)


def _told(told: Told, show: Any) -> Cell:
    """What a source said, with its age when it says nothing now."""
    shown: Cell = show(told.value) if told.value is not None else ("none yet" if told.at else "not known yet")
    if told.error:
        age = f"as of {told.at}; " if told.at else ""
        return Markup('{} <span class="unsure">({}{})</span>').format(shown, age, told.error)
    if told.late:
        age = f"as of {told.at}; " if told.at else ""
        return Markup('{} <span class="unsure">({}no answer yet)</span>').format(shown, age)
    return shown


def _link(snapshot: Snapshot, view: StreamView, version: Any) -> Markup:
    """To the exact version's page in MLflow."""
    return Markup('<a href="{}/#/models/{}/versions/{}" rel="noreferrer">version {} in MLflow</a>').format(
        snapshot.mlflow_uri, quote(view.model, safe=""), version, version
    )


def _waiting(snapshot: Snapshot, view: StreamView) -> Markup:
    registry = view.registry.value
    title = Markup("<h3>Waits for a person</h3>")
    if registry is None or not registry.waiting:
        none = "No candidate waits." if registry else "What waits is not known: the registry has not answered."
        return title + _NOTHING.join((paragraph(none), _age(view.registry)))
    rows = [
        Markup('<span class="candidate">{link}</span> <span class="{kind}">{verdict}</span>, {guarantee}, {round}, {at}'
               "<br><code>tidegate approve {stream} {number} --why …</code>").format(
            link=_link(snapshot, view, found["version"]),
            kind=_CLASSES.get(found["verdict"], "unsure"),
            verdict=found["verdict"],
            guarantee=found["guarantee"],
            round=found["round"],
            at=found["created_at"],
            stream=view.name,
            number=found["version"],
        )
        for found in registry.waiting
    ]  # fmt: skip
    return title + items(rows) + _age(view.registry)


def _age(told: Told) -> Markup:
    if not told.error and not told.late:
        return _NOTHING
    return Markup('<p class="unsure">As of {}: {}</p>').format(told.at or "never", told.error or "no answer yet")


def _rounds(view: StreamView) -> Markup:
    last = (view.rounds.value or {}).get("last", [])
    if not last:
        return _NOTHING
    rows = [
        (
            found["round"],
            Markup('<span class="{}">{}</span>{}').format(
                _CLASSES.get(found["outcome"], "soft"),
                found["outcome"],
                f": version {found['version']}" if found["version"] else "",
            ),
            _gates(view.name, found),
        )
        for found in last
    ]
    return table(f"Last rounds of {view.name}", ("round", "outcome", "gates"), rows)


def _gates(stream: str, found: Mapping[str, Any]) -> Markup:
    gates = found["gates"]
    if not gates:
        return Markup('<span class="soft">not judged</span>')
    hard = [gate for gate in gates if gate.get("hard")]
    passed = sum(gate.get("outcome") == "passed" for gate in hard)
    told = items(
        Markup('<span class="{}">{}</span> {}: {}').format(
            _CLASSES.get(gate.get("outcome"), "soft") if gate.get("hard") else "soft",
            gate.get("outcome", "") if gate.get("hard") else "shown",
            gate.get("name", ""),
            gate.get("sentence", ""),
        )
        for gate in gates
    )
    inside = more(f"{passed} of {len(hard)} hard gates passed", told)
    return Markup('<div id="gates-{}-{}">{}</div>').format(stream, found["round"], inside)


def _history(view: StreamView) -> Markup:
    rows = view.history.value
    if not rows:
        return _age(view.history)
    cells = [
        (
            Markup("{}<br>{}").format(row["when"], row["who"]),
            f"{row['kind']} {row['version'] or 'base'}",
            row["why"],
        )
        for row in rows
    ]
    caption = f"Decisions on {view.name}, newest first (chain and signatures verified)"
    return table(caption, ("when, who", "what", "why"), cells) + _age(view.history)


_BOTH = Markup(' <button id="both" type="button" class="second">Ask live and the candidate</button>')


def _ask(streams: Sequence[str], *, compare: bool) -> Markup:
    options = _NOTHING.join(Markup("<option>{}</option>").format(name) for name in streams)
    return Markup(
        '<section aria-label="Prompt box"><h2>Ask</h2>\n<form id="ask">'
        '<p><label for="model">Stream</label> <select id="model" name="model">{}</select></p>'
        '<p><label for="prompt">Prompt</label><textarea id="prompt" name="prompt" rows="3" required></textarea></p>'
        '<p><button id="send">Ask live</button>{}</p></form>\n'
        "<noscript><p>Asking from this page needs its script; <code>tidegate ask</code> does without.</p></noscript>"
        '<div id="answers" aria-live="polite"></div></section>'
    ).format(options, _BOTH if compare else _NOTHING)


CSS = STYLE + Markup("""
header.top{display:flex;flex-wrap:wrap;gap:.2rem 1rem;align-items:baseline;max-width:60rem;margin:0 auto;
padding:.8rem 1rem;border:0;background:none}
header.top h1{margin:0}header.top p{margin:0}header.top form{margin-left:auto}
main{padding-top:0}a{color:var(--candidate)}
.skip{position:absolute;left:-99rem}.skip:focus{left:1rem;top:.5rem;background:var(--ground);padding:.3rem}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);margin:0}
.live{color:var(--live)}strong.live{font-size:1.1rem}
.alarms{padding-left:1.2rem}
.stream{border:1px solid var(--rule);border-radius:.4rem;padding:0 1rem 1rem;margin:1rem 0}
.stream details{margin:0}.stream .scroll{margin-top:1rem}.stream th{font-weight:500}
.stream h2{margin-top:.8rem}.stream .pairs th{width:9rem}
meter{width:8rem;height:.9rem;vertical-align:middle}
code{font-size:.85em;background:var(--panel);padding:.1rem .3rem;border-radius:.2rem}
label{font-weight:600;margin-right:.5rem}
textarea,select,input{font:inherit;color:inherit;background:var(--ground);border:1px solid var(--soft);
border-radius:.3rem;padding:.4rem}
textarea,input{width:100%;display:block;margin-top:.2rem}
button{font:inherit;color:var(--ground);background:var(--candidate);border:0;border-radius:.3rem;padding:.45rem 1rem;
cursor:pointer;min-height:2.4rem}
button:disabled{background:var(--soft);cursor:default}
header.top button,.second{background:none;color:var(--candidate);border:1px solid var(--candidate);padding:.1rem .6rem;
min-height:1.8rem}
a:focus-visible,button:focus-visible,textarea:focus-visible,select:focus-visible,input:focus-visible{
outline:2px solid var(--candidate);outline-offset:2px}
#answers figure{margin:.6rem 0;background:var(--panel);border-radius:.3rem;padding:.5rem .8rem}
#answers figcaption{max-width:none}#answers .text{white-space:pre-wrap;margin:.2rem 0;min-height:1.5rem}
#answers .sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:0 .6rem}
.login{max-width:24rem}.runbook{white-space:pre-wrap;font:inherit}
@media (max-width:30rem){.stream{padding:0 .6rem .6rem}.stream .pairs th{width:6.5rem}header.top{padding:.7rem}}
""")
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#0067a3"/>'
    '<path d="M2 10q3-3 6 0t6 0M2 13q3-3 6 0t6 0M8 2v5" fill="none" stroke="#fff" stroke-width="1.6"/></svg>'
)
