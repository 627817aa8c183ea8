"""What the documents say is executed or checked: commands exist, settings exist, files named are there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
GROUPS = ("apikeys", "dlq", "expectations", "gates", "hooks", "users")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]


def commands_in(page):
    text = page.read_text(encoding="utf-8")
    return re.findall(r"(?:^\$ |^    |`)tidegate ((?:-w \S+ )?[a-z]+[^`\n]*)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_in_the_documents_exists_with_its_options(page):
    for command in commands_in(page):
        words = command.split("#")[0].split()
        if words[0] == "-w":
            words = words[2:]
        assert words[0] in COMMANDS, f"{page.name}: tidegate {command}"
        options = [word for word in words if re.fullmatch(r"--[a-z-]+", word)]
        name = words[:1]
        if words[0] in GROUPS:
            # A group's own help does not tell its commands' options.
            name, options = words[:2], [*options, "--help"]
        if options:
            done = subprocess.run(
                [sys.executable, "-m", "tidegate", *name, "--help"], capture_output=True, text=True, check=True
            )
            for option in options:
                assert option in done.stdout, f"{page.name}: tidegate {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_make_target_in_the_documents_exists(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    targets |= {f"bench-{path.stem}" for path in (ROOT / "bench").glob("*.py")} | {"bench-NAME"}
    for target in re.findall(r"`make ([A-Za-z-]+)", page.read_text(encoding="utf-8")):
        assert target in targets, f"{page.name}: make {target}"


def test_the_architecture_names_every_source_file():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for package in ("tidegate", "ingest", "privacy", "learner", "evaluation", "registry", "serving"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in {"__init__.py", "env.py"} and "versions" not in path.parent.parts[-1:]:
                assert path.name in text, f"ARCHITECTURE.md: {path.relative_to(ROOT)}"


def test_every_setting_is_described_in_the_template():
    import yaml

    from tidegate.config import _known_paths, load

    raw = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    load(ROOT / "params.yaml", {})
    for path in _known_paths(raw).values():
        node = raw
        for part in path:
            assert part in node, f"params.yaml: {'.'.join(path)} is not there"
            node = node[part]


def test_the_privacy_page_names_files_that_exist():
    text = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    for name in set(
        re.findall(r"`((?:tidegate|ingest|privacy|learner|evaluation|registry|serving)/[a-z_]+\.py)`", text)
    ):
        assert (ROOT / name).exists(), name
