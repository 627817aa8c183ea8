"""The page says what decides first, escapes whatever comes from outside, and needs nothing but itself."""

import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from evaluation.charts import Axis
from evaluation.markup import STYLE
from evaluation.page import version_page
from evaluation.private import PrivateScores
from tests.evaluation.pages import COUNTS, SKILLS, browse, judged, origin, page
from tests.evaluation.planted import FACTS, Planted, write_gate_set

VOID = {"meta", "path", "rect", "circle"}
HOSTILE = "<img src=x onerror=alert(1)></td><script>alert(2)</script>\" onload='x' &amp; {0} {title}"


class Read(HTMLParser):
    """Tags with their attributes, and text by the tag it stands in."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.append((self.open[-1], data))

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def said(self, *tags):
        return [text for tag, text in self.texts if tag in tags]


@pytest.fixture(scope="module")
def gate_set(tmp_path_factory):
    return write_gate_set(tmp_path_factory.mktemp("gates") / "planted.jsonl")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {outcome: page(folder, outcome) for outcome in SKILLS}


@pytest.mark.parametrize(
    ("outcome", "head", "why"),
    [
        (
            "passed",
            "Passed: a person may approve it",
            "Nothing is forgotten against live (lowest: account +12.0 points)",
        ),
        ("failed", "Failed: it cannot be promoted", "It forgets against live: billing -22.0 points (p < 1e-6)"),
        ("undecided", "Undecided: too little is known to promote it", "24 records"),
    ],
)
def test_the_verdict_and_its_reason_come_before_everything(pages, outcome, head, why):
    read = Read(pages[outcome])
    assert "".join(read.said("h1")).strip() == head
    before = pages[outcome].partition("</header>")[0]
    assert why in before.replace("&lt;", "<")
    assert "<table" not in before
    heads = read.said("h2")
    assert heads[:2] == ["Against live", "Gates"]


def test_the_figures_are_those_that_were_found(pages):
    rows = [" ".join(row.split()) for row in re.sub(r"<[^>]+>", " ", pages["failed"]).splitlines()]
    assert "billing 73.0 ± 4.5 51.0 ± 5.0 -22.0 ± 4.1" in rows
    assert "all together 70.3 ± 1.6 81.5 ± 1.5 +11.2 ± 1.8 1468 ± 28" in rows
    assert "version 4 14.0" in rows
    assert "billing +30.0" in rows  # forgetting: 81% was its best ancestor's
    assert any(row.startswith("latency p95 (samples 120, s, less is better) 0.304") for row in rows)
    assert "candidate p50 0.273" in rows


def test_a_gate_that_stopped_it_stands_first_and_one_that_is_only_shown_last(pages):
    results = re.findall(r'<tr><th scope="row">([^<]+)</th><td>(?:<strong class="(\w+)">)?', pages["failed"])
    gates = [one for one in results if one[1] or "(shown only)" in one[0]]
    assert gates[0] == ("forgetting", "bad")
    assert [bool(kind) for _, kind in gates] == sorted((bool(kind) for _, kind in gates), reverse=True)


@pytest.mark.parametrize("outcome", SKILLS)
def test_it_is_whole_html_that_a_screen_reader_can_follow(pages, outcome):
    read = Read(pages[outcome])
    assert read.of("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    assert all(attrs.get("scope") in {"col", "row"} for attrs in read.of("th"))
    assert len(read.of("table")) == len(read.of("caption")) > 8
    ids = [attrs["id"] for _, attrs in read.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    charts = read.of("svg")
    assert len(charts) == len(read.of("title")) - 1 == len(read.of("desc")) == len(read.of("figure")) == 5
    for chart in charts:
        assert chart["role"] == "img"
        assert all(name in ids for name in chart["aria-labelledby"].split())
    assert all(len(text) > 10 for text in read.said("desc"))
    assert len(re.findall("The same as a table</summary><div[^>]*><table>", pages[outcome])) == len(charts)


@pytest.mark.parametrize("outcome", SKILLS)
def test_it_needs_no_other_file_and_runs_nothing(pages, outcome):
    read = Read(pages[outcome])
    assert not {"script", "link", "img", "a", "iframe", "object", "form", "base"} & {tag for tag, _ in read.tags}
    assert not re.search(r"https?:|url\(|@import|javascript:|src=", pages[outcome])
    names = {name for _, attrs in read.tags for name in attrs}
    assert not {name for name in names if name.startswith("on") or name in {"style", "href"}}
    policy = next(attrs["content"] for attrs in read.of("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    digest = b64encode(sha256("".join(read.said("style")).encode()).digest()).decode()
    assert policy == f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-{digest}'"


def test_what_comes_from_outside_does_not_become_markup(tmp_path):
    hostile = write_gate_set(tmp_path / "hostile.jsonl")
    records = [
        one.model_copy(update={"prompt": f"{HOSTILE} {one.prompt}", "domain": f"{HOSTILE} {one.domain}"})
        for one in hostile.records
    ]
    hostile = replace(hostile, records=tuple(records), name=HOSTILE)

    class Rude(Planted):
        def generate(self, _adapter, prompts, _max_tokens):
            return [f"{HOSTILE}\x00\ud800" for _ in prompts]

    found = judged(hostile, facts=replace(FACTS, promise=HOSTILE), scorer=Rude)
    about = replace(origin(found), stream=HOSTILE, round_id=HOSTILE, parent=HOSTILE, blocks=[HOSTILE])
    found = replace(found, reasons=(HOSTILE,), not_measured=(HOSTILE,), private=PrivateScores(None, refusal=HOSTILE))
    text = version_page(found, about).encode(errors="replace").decode()
    read = Read(text)
    assert not {"script", "img"} & {tag for tag, _ in read.tags}
    assert not {name for _, attrs in read.tags for name in attrs if name.startswith("on")}
    assert len(re.findall("&lt;script&gt;alert", text)) > 20
    assert "{0} {title}" in text


def test_only_public_records_are_shown_and_each_is_shown_whole_or_clipped(tmp_path, gate_set):
    found = judged(gate_set)
    public = {record.prompt for record in gate_set.records}
    assert 4 <= len(found.examples) <= 8
    assert {one.prompt for one in found.examples} <= public
    long = replace(found, examples=tuple(replace(one, prompt="a" * 5000) for one in found.examples))
    assert "a" * 601 not in version_page(long, origin(found))
    kinds = [one.kind for one in found.examples]
    assert kinds[0] == "gained: live was wrong"


def test_private_figures_are_the_noisy_ones_alone(pages):
    text = re.sub(r"<[^>]+>", " ", pages["passed"].partition("</style>")[2])
    votes = [sum(COUNTS.values[at : at + 4]) for at in (0, 4, 8)]
    holdout = text.partition("On the stream&#39;s own holdout")[2].partition("Examples")[0]
    assert [f"{value:.0f} ± 16" in holdout for value in votes] == [True] * 3
    for word in ("loss", "gradient", "norm", "draw"):
        assert not re.search(rf"\b{word}", text)


def test_a_refused_holdout_and_no_holdout_are_told_apart(gate_set):
    found = judged(gate_set)
    refused = version_page(replace(found, private=PrivateScores(None, refusal="the account is empty")), origin(found))
    assert "Not released: the account is empty." in refused
    assert "own holdout</h2>" not in version_page(found, origin(found))


def test_the_first_version_is_compared_with_the_base(gate_set):
    found = judged(gate_set, live=None)
    text = version_page(found, replace(origin(found), past=(), kept=None))
    assert "<h2>Against the base</h2>" in text
    assert "there is nothing to forget yet" in text
    assert len(Read(text).of("svg")) == 2


def test_test_noise_promises_nothing(gate_set):
    found = judged(gate_set, facts=replace(FACTS, private=False))
    text = version_page(found, origin(found))
    assert "guarantees no privacy at all" in text
    assert "version 6: 26.0 percent</desc>" in text, "no share of a filter that guarantees nothing"
    assert "epsilon 8" not in text


@pytest.mark.parametrize("how", ["threw", "NaN"])
def test_a_candidate_that_could_not_be_scored_has_a_page_too(gate_set, how):
    class Broken(Planted):
        def score_labels(self, adapter, prompts, labels):
            if adapter != "candidate":
                return super().score_labels(adapter, prompts, labels)
            if how == "threw":
                raise RuntimeError(HOSTILE)
            return np.full((len(prompts), len(labels)), np.nan)

    found = judged(gate_set, scorer=Broken)
    text = version_page(found, origin(found))
    assert found.outcome == ("undecided" if how == "threw" else "failed")
    assert "answers were not scored" in text
    assert "<script>" not in text
    Read(text)


def test_the_page_is_the_same_each_time(gate_set):
    assert len({version_page(found, origin(found)) for found in (judged(gate_set), judged(gate_set))}) == 1


@pytest.mark.parametrize(("low", "high"), [(0, 100), (-25, 5), (0, 0.336), (49, 98), (5, 5), (0, 1e-9)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = Axis(low, high, "s").ticks()
    assert 1 <= len(ticks) <= 5 or low == high
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_and_mark_has_contrast_enough(scheme):
    block = re.findall(r":root\{([^}]*)\}", STYLE)[scheme == "dark"]
    colours = {name: _luminance(code) for name, code in re.findall(r"--(\w+):#([0-9a-f]{6})", block)}
    texts = {"ink", "soft", "good", "bad", "unsure", "candidate", "live", "base"}
    assert texts < colours.keys()
    for name in texts:
        for ground in ("ground", "panel"):
            light, dark = sorted((colours[name], colours[ground]), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{scheme}: {name} on {ground}"


def _luminance(code):
    """Relative luminance (WCAG 2.2)."""
    parts = [int(code[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.slow
@pytest.mark.parametrize("outcome", SKILLS)
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False), (1200, True)])
def test_a_browser_shows_all_of_it_at_any_width_in_light_and_dark(pages, outcome, width, dark):
    seen = browse(pages[outcome], width=width, dark=dark)
    assert seen["wide"] == seen["scrolls"] == width, "nothing scrolls sideways but tables by themselves"
    assert (seen["out"], seen["hidden"], seen["flat"]) == ([], 0, 0)
    assert seen["ground"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")


@pytest.mark.slow
def test_the_browser_sees_what_sticks_out(pages):
    wide = pages["passed"].replace("<main>", f'<main><p class="number">{"w" * 400}</p>', 1)
    assert browse(wide, width=390)["scrolls"] > 390
    table = pages["passed"].replace("<main>", f'<main><table><tr><td class="number">{"w" * 400}</table>', 1)
    assert any("TABLE" in one for one in browse(table, width=390)["out"])
