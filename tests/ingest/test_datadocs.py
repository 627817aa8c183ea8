"""Data Docs can be read without a network, show no half of a site, and let no record write a page."""

import contextlib
import fcntl
import os
import re
import stat
import tempfile
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ingest.datadocs import DataDocs, self_contained
from ingest.expectations import Suite, write_default_suite
from ingest.record import RecordLimits
from tests.ingest.blocks import record

LIMITS = RecordLimits(frozenset({"billing"}), frozenset({"refund"}), 2000, 20)
HOSTILE = "</td><script>alert(1)</script><img src=//x.example/a onerror=alert(2)><style>@import '//x.example'</style>"
RECORDS = [record(0), record(1, completion=HOSTILE), record(2, domain="kitchen"), record(3, label="refund")]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    path = tmp_path_factory.mktemp("suite") / "s.yaml"
    write_default_suite(path, LIMITS)
    return Suite(path)


@pytest.fixture(scope="module")
def site(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ws") / "docs" / "desk"
    assert DataDocs(folder, 600).build(suite, RECORDS, block_id="desk-0-7") == folder / "index.html"
    return folder


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class _Fetched(HTMLParser):
    """What a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}:
            self.found.append(tag)
        self.found += [name for name in names if name.startswith("on") or name in {"src", "srcset", "action"}]
        if (href := names.get("href")) is not None:
            self.links.append(href)


def test_no_page_fetches_or_runs_anything(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) == 3
    for page in pages:
        text = page.read_text(encoding="utf-8")
        reader = _Fetched()
        reader.feed(text)
        assert reader.found == []
        assert not [link for link in reader.links if re.match(r"\s*([a-z]+:|//)", link)]
        assert "default-src 'none'" in text.partition("</head>")[0]
        assert not re.search(r"https?://", text)
        assert not re.search(r"url\(|@import", "".join(re.findall(r"<style>.*?</style>", text, re.DOTALL)))


def test_the_index_leads_to_the_block_and_its_failed_values(site: Path) -> None:
    text = (site / "index.html").read_text(encoding="utf-8")
    assert "block desk-0-7, 4 records: 2 of 6 expectations failed" in text
    links = re.findall(r'<td><a href="([^"]+)">', text)
    assert len(links) == 2
    for link in links:
        assert (site / link).is_file()
    result = next((site / link).read_text(encoding="utf-8") for link in links if link.startswith("validations/"))
    assert "kitchen" in result
    assert "&lt;script&gt;alert(1)" in result


def test_the_library_itself_would_have_let_the_record_write_the_page(suite: Suite, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ingest.expectations._escaped", lambda value: value)
    suite.write_docs(RECORDS, tmp_path, "b")
    raw = "".join(page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html"))
    assert "<script>alert(1)</script>" in raw
    assert "https://" in raw


def test_only_the_owner_may_look_and_nothing_is_left_elsewhere(suite: Suite, tmp_path: Path, monkeypatch) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    folder = tmp_path / "docs" / "desk"
    old_mask = os.umask(0)
    try:
        DataDocs(folder, 600).build(suite, RECORDS, block_id="b")
    finally:
        os.umask(old_mask)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder.parent, folder)] == [0o700, 0o700]
    assert not list(scratch.rglob("*.html"))
    assert _names(folder.parent) == {"desk", ".desk.lock"}


def test_a_reader_finds_a_whole_site_or_none(suite: Suite, tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "desk"
    docs = DataDocs(folder, 600)
    docs.build(suite, RECORDS, block_id="b0")
    done = threading.Event()
    seen: list[set[str]] = []

    def read() -> None:
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                before = folder.stat().st_ino
                names = {path.name for path in folder.iterdir()}
                # Else it was replaced in between, and what was listed is no longer the site.
                if folder.stat().st_ino == before:
                    seen.append(names)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(3):
        docs.build(suite, RECORDS, block_id=f"b{number}")
    done.set()
    reader.join()
    assert len(seen) > 100
    assert {frozenset(names) for names in seen} == {frozenset({"index.html", "validations", "expectations"})}
    assert "block b2" in (folder / "index.html").read_text(encoding="utf-8")


def test_a_crash_between_leaves_nothing_that_stays(suite: Suite, tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "docs" / "desk"
    docs = DataDocs(folder, 600)
    docs.build(suite, RECORDS, block_id="b0")
    # What SIGKILL may leave: an unfinished site, and the old one already set aside.
    (folder.parent / ".desk.new-abc").mkdir()
    folder.rename(folder.parent / ".desk.old")
    docs.build(suite, RECORDS, block_id="b1")
    assert _names(folder.parent) == {"desk", ".desk.lock"}
    monkeypatch.setattr(Suite, "write_docs", lambda *_args, **_named: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        docs.build(suite, RECORDS, block_id="b2")
    assert _names(folder.parent) == {"desk", ".desk.lock"}
    assert "block b1" in (folder / "index.html").read_text(encoding="utf-8")


def test_two_processes_of_a_stream_do_not_spoil_each_others_site(suite: Suite, tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "desk"
    docs = DataDocs(folder, 600)
    docs.build(suite, RECORDS, block_id="b0")
    unfinished = folder.parent / ".desk.new-other"
    unfinished.mkdir()
    with (folder.parent / ".desk.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        docs.build(suite, RECORDS, block_id="b1")
    assert unfinished.is_dir()
    assert "block b0" in (folder / "index.html").read_text(encoding="utf-8")
    docs.build(suite, RECORDS, block_id="b2")
    assert _names(folder.parent) == {"desk", ".desk.lock"}
    assert "block b2" in (folder / "index.html").read_text(encoding="utf-8")


def test_no_records_change_nothing(suite: Suite, tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "desk"
    assert DataDocs(folder, 600).build(suite, [], block_id="b") == folder / "index.html"
    assert not folder.exists()


def test_an_empty_suite_has_a_site_too(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("schema_version: 1\nexpectations: []\n")
    index = DataDocs(tmp_path / "docs", 600).build(Suite(tmp_path / "s.yaml"), [record(0)], block_id="b")
    assert "every expectation met" in index.read_text(encoding="utf-8")


def test_due_once_an_interval_or_never() -> None:
    docs = DataDocs(Path("unused"), 10)
    assert [docs.due(now) for now in (100.0, 100.1, 109.9, 110.0, 111.0, 200.0)] == [
        True,
        False,
        False,
        True,
        False,
        True,
    ]
    assert not any(DataDocs(Path("unused"), 0).due(now) for now in (0.0, 1e9))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("<p>a &lt; b &amp; c&#39;s</p>", "<p>a &lt; b &amp; c&#39;s</p>"),
        ("<script>1 < 2</script>x", "x"),
        ("<a href='javascript:x()' onclick='y()'>t</a>", "<a>t</a>"),
        ("<a href='../i.html#s'>t</a>", '<a href="../i.html#s">t</a>'),
        ("<style>a { background: url('//x/y') } b {}</style>", "<style>a { background: none } b {}</style>"),
        ("<p style='background: url(x)'>t</p><meta http-equiv=refresh content='0;url=//x'>", "<p>t</p>"),
        ("<img src=x>a<br/>b<svg><p>c</p></svg>d", "a<br>bd"),
    ],
)
def test_cleaning_takes_away_what_acts_and_nothing_else(given: str, kept: str) -> None:
    assert self_contained(given) == kept
