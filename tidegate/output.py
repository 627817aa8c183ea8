"""What commands print: a table for people, JSON for programs, the same facts in both."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def as_json(value: Any) -> None:
    """Print a value as indented JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows as a table; a terminal that is narrow wraps cells instead of losing them."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        view.add_column(name, overflow="fold")
    for row in rows:
        view.add_row(*("" if cell is None else str(cell) for cell in row))
    # A pipe or a log has no width of its own: 140 columns keep hashes and reasons on one line.
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(view)


def facts(pairs: Mapping[str, Any]) -> None:
    """Print name and value, a line each."""
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        sys.stdout.write(f"{name:<{width}}  {value}\n")


def say(line: str) -> None:
    """Print one line at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
