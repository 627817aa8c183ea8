"""Great Expectations' Data Docs of the newest block, as a static site that needs no network to be read.

    FOLDER/index.html                the list of runs (one: the newest block), and of suites
    FOLDER/validations/...           each expectation, how many rows failed it, and some of their values
    FOLDER/expectations/...          the suite in words

The pages show values of people's records: they belong inside the trust boundary, mode 0700, and are served to nobody.
The library's own pages ask six companies' servers for stylesheets and scripts when they are opened. Here these are
taken away, with every script, and a small stylesheet is put into each page; what a page may load is then forbidden
by a policy in its head (Content Security Policy level 3, https://www.w3.org/TR/CSP3/), should something be left.
"""

from __future__ import annotations

import contextlib
import fcntl
import html
import os
import re
import shutil
import tempfile
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from ingest.expectations import Suite
    from ingest.record import Record

_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
# What the library's pages take from Bootstrap, as far as reading them needs it.
_STYLE: Final = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 0 1rem 3rem; color: #222; }
nav.navbar { border-bottom: 1px solid #ccc; }
ol.breadcrumb, ul.nav, ul.nav-tabs { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; }
table { border-collapse: collapse; margin: .5rem 0; width: 100%; }
th, td { border: 1px solid #ddd; padding: .3rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { background: #f3f3f3; }
.alert { background: #eef1f5; padding: .6rem .9rem; margin: 1.2rem 0 .6rem; }
.badge { background: #eef1f5; padding: 0 .3rem; border-radius: .2rem; font-family: monospace; }
.text-danger { color: #b00020; } .text-success { color: #1b7a2f; }
i.fa-times::before, i.fa-exclamation-triangle::before { content: "\\2717"; }
i.fa-check-circle::before { content: "\\2713"; }
td .show-scrollbars { max-height: none !important; }
.card:has(.btn-group), a[data-toggle="collapse"] { display: none; }
"""
# Whole elements that load or run something, or (buttons, inputs) do nothing without scripts.
_DROPPED: Final = frozenset(
    {"script", "link", "img", "iframe", "object", "embed", "base", "form", "input", "button", "svg", "video", "audio"}
    | {"footer"}  # an advertisement
)
_VOID: Final = frozenset({"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"})
_ELSEWHERE: Final = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)
_CSS_URL: Final = re.compile(r"url\([^)]*\)|@import[^;]*;?", re.IGNORECASE)
# Work under way stands beside the site under a name that a reader does not look for.
_UNFINISHED: Final = ".{name}.new-"
_REPLACED: Final = ".{name}.old"
_LOCK: Final = ".{name}.lock"


class DataDocs:
    """The Data Docs of one stream in a folder, made anew every so many seconds."""

    def __init__(self, folder: Path, every_seconds: float) -> None:
        """Touch nothing on disk yet. `every_seconds=0`: never due; :meth:`build` works all the same."""
        self.folder = folder
        self.every_seconds = every_seconds
        self._due_at: float | None = None

    def due(self, now: float) -> bool:
        """Whether to build now (seconds of any one clock that does not go back); true at most once an interval.

        A build that fails is therefore tried again only after the interval: it raises one alarm, not one a block.
        """
        if self.every_seconds <= 0 or (self._due_at is not None and now < self._due_at):
            return False
        self._due_at = now + self.every_seconds
        return True

    def build(self, suite: Suite, records: Sequence[Record], *, block_id: str) -> Path:
        """Run the suite on a block's records and replace the site; returns the path of its index page.

        The new site is finished beside the old one and takes its place by renaming: a reader finds the old site, for
        an instant none, or the new one, never half of one. A block without records leaves the site as it is, and so
        does a build while another process of the stream is building: its block is as new.

        Raises:
            ValidationStopped: the suite could not be evaluated at all.
            OSError: the folder cannot be written.
        """
        index = self.folder / "index.html"
        if not records:
            return index
        parent, name = self.folder.parent, self.folder.name
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _alone(parent / _LOCK.format(name=name)) as alone:
            if alone:
                for left in parent.glob(f"{_UNFINISHED.format(name=name)}*"):
                    shutil.rmtree(left, ignore_errors=True)
                self._replace(suite, records, block_id)
        return index

    def _replace(self, suite: Suite, records: Sequence[Record], block_id: str) -> None:
        parent = self.folder.parent
        # mkdtemp makes it with mode 0700.
        fresh = parent / tempfile.mkdtemp(prefix=_UNFINISHED.format(name=self.folder.name), dir=parent)
        try:
            failed = suite.write_docs(records, fresh, run_name=block_id)
            said = f"{failed} of {suite.size} expectations failed" if failed else "every expectation met"
            _close_off(fresh, f"block {block_id}, {len(records)} records: {said}")
            self._take_place(fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _take_place(self, fresh: Path) -> None:
        old = self.folder.with_name(_REPLACED.format(name=self.folder.name))
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        fresh.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Hold a lock; False when another process does. Let go by the kernel, also after SIGKILL."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


def _close_off(site: Path, result: str) -> None:
    """Make a site of the library self-contained: no script, nothing from elsewhere, mode 0600."""
    shutil.rmtree(site / "static", ignore_errors=True)
    pages = sorted(site.rglob("*.html"))
    links = {page: page.relative_to(site).as_posix() for page in pages}
    # The library fills these tables by scripts.
    rows = {
        "ge-index-page-validation-results-table": _rows(result, [x for x in links.values() if x.startswith("val")]),
        "ge-index-page-expectation_suites-table": _rows(
            "the suite", [x for x in links.values() if x.startswith("exp")]
        ),
    }
    for page in pages:
        page.write_text(self_contained(page.read_text(encoding="utf-8"), rows), encoding="utf-8")
        page.chmod(0o600)


def _rows(text: str, links: Sequence[str]) -> str:
    return "".join(f'<tr><td><a href="{html.escape(link)}">{html.escape(text)}</a></td></tr>' for link in links)


def self_contained(page: str, rows: Mapping[str, str] | None = None) -> str:
    """An HTML page without scripts, pictures and anything that a browser would fetch.

    `rows` fills tables that were left to scripts, by the class of the table.
    """
    cleaner = _Cleaner(rows or {})
    cleaner.feed(page)
    cleaner.close()
    return "".join(cleaner.out)


class _Cleaner(HTMLParser):
    """Writes what it reads, without what loads, runs or leads out of the site."""

    def __init__(self, rows: Mapping[str, str]) -> None:
        super().__init__(convert_charrefs=False)
        self._rows = rows
        self.out: list[str] = []
        self._skipping: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipping or tag in _DROPPED:
            if tag not in _VOID:
                self._skipping.append(tag)
            return
        if tag == "meta" and any(name == "http-equiv" for name, _ in attrs):
            return
        self._in_style = tag == "style"
        kept = "".join(_attribute(name, value) for name, value in attrs if _harmless(name, value))
        self.out.append(f"<{tag}{kept}>")
        if tag == "table":
            classes = (dict(attrs).get("class") or "").split()
            self.out += [self._rows[name] for name in classes if name in self._rows]
        if tag == "head":
            self.out.append(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{_STYLE}</style>')

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            self.handle_starttag(tag, attrs)
        elif not self._skipping and tag not in _DROPPED:
            self.handle_starttag(tag, attrs)
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False
        if self._skipping:
            if tag in self._skipping:
                del self._skipping[self._skipping.index(tag) :]
        elif tag not in _VOID and tag not in _DROPPED:
            self.out.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        self._keep(_CSS_URL.sub("none", data) if self._in_style else data)

    def handle_entityref(self, name: str) -> None:
        self._keep(f"&{name};")

    def handle_charref(self, name: str) -> None:
        self._keep(f"&#{name};")

    def handle_decl(self, decl: str) -> None:
        self._keep(f"<!{decl}>")

    def _keep(self, text: str) -> None:
        if not self._skipping:
            self.out.append(text)


def _harmless(name: str, value: str | None) -> bool:
    if name.startswith("on") or name in {"src", "srcset", "data", "action", "formaction", "poster", "background"}:
        return False
    if name in {"href", "xlink:href"}:
        return not _ELSEWHERE.match(value or "")
    return name != "style" or not _CSS_URL.search(value or "")


def _attribute(name: str, value: str | None) -> str:
    return f" {name}" if value is None else f' {name}="{html.escape(value)}"'
