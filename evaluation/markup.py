"""Pieces of a web page that needs nothing else: no script, no network, no other file; light and dark, on a phone.

Every text is escaped where it is put in: `markupsafe.Markup.format` escapes what is not markup already, and the linter
(ruff S704) refuses markup that is made from anything but a literal. What may run is told to the browser besides: the
policy of the page allows its one style sheet, by hash, and nothing else.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256

from markupsafe import Markup

Cell = str | Markup
_NOTHING = Markup("")
_MARKS = {"candidate": "●", "live": "■", "base": "▲"}


def document(title: str, parts: Iterable[Markup]) -> str:
    """The whole page."""
    digest = b64encode(sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{digest}'"
    page = Markup(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{parts}\n</main>\n</body>\n</html>\n"
    ).format(policy=policy, title=title, style=STYLE, parts=Markup("\n").join(parts))
    return str(page)


def section(title: str, *parts: Markup) -> Markup:
    """A part of the page under a heading of the second level."""
    return Markup("<section><h2>{}</h2>\n{}</section>").format(title, Markup("\n").join(part for part in parts if part))


def paragraph(text: Cell) -> Markup:
    """A paragraph; none for no text."""
    return Markup("<p>{}</p>").format(text) if text else _NOTHING


def items(texts: Iterable[Cell]) -> Markup:
    """A list."""
    return Markup("<ul>{}</ul>").format(_NOTHING.join(Markup("<li>{}</li>").format(text) for text in texts))


def more(title: str, inside: Markup) -> Markup:
    """What is shown when it is asked for."""
    return Markup("<details><summary>{}</summary>{}</details>").format(title, inside)


def figure(chart: Markup, caption: str, numbers: Markup, roles: Sequence[str] = ()) -> Markup:
    """A chart with its caption, a key of its marks, and the same numbers as a table."""
    key = _NOTHING.join(
        Markup(' <span class="key {0}"><span aria-hidden="true">{1}</span> {0}</span>').format(role, _MARKS[role])
        for role in roles
    )
    return Markup("<figure>{}<figcaption>{}{}</figcaption></figure>{}").format(
        chart, caption, key, more("The same as a table", numbers)
    )


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], numbers: Iterable[int] = ()) -> Markup:
    """A table whose first column names its rows, in a region that scrolls by itself where it is too wide.

    Args:
        caption: what it shows.
        head: names of the columns.
        rows: cells.
        numbers: columns that are set to the right.
    """
    right = set(numbers)
    kinds = [Markup(' class="number"') if at in right else _NOTHING for at in range(len(head))]
    top = _NOTHING.join(
        Markup('<th scope="col"{}>{}</th>').format(kind, name) for kind, name in zip(kinds, head, strict=True)
    )
    body = _NOTHING.join(
        Markup('<tr><th scope="row">{}</th>{}</tr>\n').format(
            row[0],
            _NOTHING.join(Markup("<td{}>{}</td>").format(k, cell) for k, cell in zip(kinds[1:], row[1:], strict=True)),
        )
        for row in rows
    )
    return Markup(
        '<div class="scroll" role="region" tabindex="0" aria-label="{0}"><table><caption>{0}</caption>'
        "<thead><tr>{1}</tr></thead>\n<tbody>{2}</tbody></table></div>"
    ).format(caption, top, body)


def pairs(caption: str, rows: Iterable[tuple[str, Cell]]) -> Markup:
    """A table of names and values."""
    body = _NOTHING.join(Markup('<tr><th scope="row">{}</th><td>{}</td></tr>\n').format(*row) for row in rows)
    return Markup('<table class="pairs"><caption>{}</caption><tbody>{}</tbody></table>').format(caption, body)


# Every text has a contrast of at least 4.5 to its ground and every mark of 3, in light and in dark
# (tests/evaluation/test_page.py computes it). The models' colours are near Okabe and Ito's, told apart with every
# form of colour blindness; their marks differ in shape as well.
STYLE = Markup("""
:root{--ground:#ffffff;--panel:#f4f6f8;--ink:#16191d;--soft:#4d5560;--rule:#d5dae0;
--candidate:#0067a3;--live:#a85d00;--base:#3d4248;--good:#0b6b3a;--bad:#a81e2b;--unsure:#7a4d00}
@media (prefers-color-scheme:dark){:root{--ground:#14171b;--panel:#1e2329;--ink:#e8ebef;--soft:#a9b2bd;--rule:#3a424c;
--candidate:#6cb8ee;--live:#f0ac4a;--base:#c3c9d1;--good:#5fd398;--bad:#ff8f94;--unsure:#e6b655}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
overflow-wrap:anywhere}
main{max-width:60rem;margin:0 auto;padding:1rem}
header{background:var(--panel);border-left:.4rem solid var(--unsure);padding:.8rem 1rem;border-radius:.3rem}
header.passed{border-color:var(--good)}header.failed{border-color:var(--bad)}
header.passed h1{color:var(--good)}header.failed h1{color:var(--bad)}header.undecided h1{color:var(--unsure)}
h1{font-size:1.5rem;line-height:1.25;margin:.1rem 0 .4rem}header p{margin:.2rem 0}
header ul{margin:.2rem 0;padding-left:1.2rem}
.of{color:var(--soft);font-size:.9rem}
h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--rule);padding-bottom:.2rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
.scroll{overflow-x:auto;max-width:100%}.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--candidate)}
table{border-collapse:collapse;width:100%;font-size:.9rem}
caption{text-align:left;color:var(--soft);font-size:.85rem;padding:.2rem 0 .4rem;max-width:calc(100vw - 1.5rem)}
th,td{text-align:left;vertical-align:top;padding:.35rem .5rem;border-bottom:1px solid var(--rule)}
th{font-weight:600}thead th{color:var(--soft)}.scroll th,.scroll td{overflow-wrap:normal}
.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.pairs{table-layout:fixed}.pairs th{width:12rem}
.good{color:var(--good)}.bad{color:var(--bad)}.unsure{color:var(--unsure)}.soft{color:var(--soft)}
details{margin:.5rem 0}summary{cursor:pointer;color:var(--soft);padding:.2rem 0}
figure{margin:1rem 0 .2rem}svg{display:block;width:100%;max-width:30rem;height:auto}
figcaption{color:var(--soft);font-size:.85rem;max-width:30rem}.key{white-space:nowrap;margin-left:.4rem}
.key.candidate{color:var(--candidate)}.key.live{color:var(--live)}.key.base{color:var(--base)}
.beside{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:.3rem;margin:0 0 .9rem}
.beside div{background:var(--panel);padding:.3rem .6rem;border-radius:.3rem}
.beside dt{color:var(--soft);font-size:.8rem}.beside dd{margin:0;white-space:pre-wrap;font-size:.9rem}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .tick{fill:var(--soft);font-size:10.5px}
svg .value{font-variant-numeric:tabular-nums}
svg .rule{stroke:var(--rule);fill:none}svg .zero{stroke:var(--soft);fill:none}
svg .line{stroke:var(--candidate);stroke-width:1.5;fill:none}svg .bar{stroke-width:2;fill:none}
svg .bar.candidate{stroke:var(--candidate)}svg .bar.live{stroke:var(--live)}svg .bar.base{stroke:var(--base)}
svg .candidate:not(.bar),svg .used,svg .better{fill:var(--candidate)}svg .live:not(.bar){fill:var(--live)}
svg .base:not(.bar){fill:var(--base)}svg .worse{fill:var(--bad)}
@media (max-width:30rem){body{font-size:15px}main{padding:.7rem}th,td{padding:.3rem .25rem}table{font-size:.82rem}
.pairs th{width:7.5rem}}
""")
