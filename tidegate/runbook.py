"""Which section of docs/runbook.md an alarm leads to."""

from __future__ import annotations

import re

from tidegate.workspace import CHECKOUT

FILE = "docs/runbook.md"
_POINTER = re.compile(r" \(docs/runbook\.md#([a-z_]+)\)\Z")


def pointed(kind: str, text: str) -> str:
    """An alarm's sentence with the section that says what to do."""
    return f"{text} ({FILE}#{kind})"


def parted(text: str) -> tuple[str, str]:
    """The sentence without its pointer, and the section it leads to; empty when it leads nowhere."""
    found = _POINTER.search(text)
    return (text[: found.start()], found[1]) if found else (text, "")


def sections() -> dict[str, str]:
    """Every section's text by its title; none where the documents are not installed."""
    try:
        text = (CHECKOUT / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    parts = re.split(r"^## ([a-z_]+)\n", text, flags=re.MULTILINE)
    return {title: body.split("\n# ")[0].strip() for title, body in zip(parts[1::2], parts[2::2], strict=True)}
